// The last 1x1 convolution at occupied voxels: a row of features times the few weights of one height.
//
// Least work: D features a cell and C logits a voxel moved, C * D multiply-adds a voxel.
#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 2048;  // voxels
constexpr int64_t kParts = 32;    // sums of the weights' gradient: fixed, so that threads do not change the result

struct Shape {
  int64_t places, D, Z, C, V;
};

Shape shape_of(const Tensor& features, const Tensor& voxels, const Tensor& weight, int64_t heights) {
  STD_TORCH_CHECK(features.dim() == 4 && weight.dim() == 2 && weight.size(1) == features.size(1) &&
                      heights > 0 && weight.size(0) % heights == 0,
                  "voxel_head: features [B, D, R, A] and weight [Z * classes, D]");
  const bool is_double = features.scalar_type() == ScalarType::Double;
  check_tensor("voxel_head", "weight", weight, is_double ? ScalarType::Double : ScalarType::Float, {-1, -1}, features);
  check_tensor("voxel_head", "voxels", voxels, ScalarType::Long, {-1}, features);
  const int64_t places = features.size(0) * features.size(2) * features.size(3);
  return {places, features.size(1), heights, weight.size(0) / heights, voxels.size(0)};
}

template <class T>
const T* nhwc_data(const Tensor& features) {
  const Tensor rows = nhwc(features);
  STD_TORCH_CHECK(rows.is_contiguous(), "voxel_head: features must be channels last");
  return data<T>(rows);
}

Tensor voxel_head(const Tensor& features, const Tensor& voxels, const Tensor& weight, const Tensor& bias,
                  int64_t heights) {
  const Shape n = shape_of(features, voxels, weight, heights);
  check_tensor("voxel_head", "bias", bias, weight.scalar_type(), {n.Z * n.C}, features);
  Tensor logits = empty_as(features, {n.V, n.C}, weight.scalar_type());
  const int64_t* voxel = data<int64_t>(voxels);
  const int64_t V = check_padded("voxel_head: voxels", voxel, n.V, n.places * n.Z);
  for_floating("voxel_head", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T* feature = nhwc_data<T>(features);
    const F *w = data<F>(weight), *shift = data<F>(bias);
    F* out = mutable_data<F>(logits);
    std::fill(out + V * n.C, out + n.V * n.C, F(0));  // of padding
    torch::stable::parallel_for(0, V, kGrain, [&](int64_t begin, int64_t end) {
      std::vector<F> row(n.D);
      int64_t before = -1;
      for (int64_t v = begin; v < end; ++v) {
        const int64_t place = voxel[v] / n.Z, k = voxel[v] % n.Z * n.C;
        if (place != before) {
          for (int64_t d = 0; d < n.D; ++d) row[d] = F(feature[place * n.D + d]);
        }
        before = place;
        for (int64_t c = 0; c < n.C; ++c) {
          const F* __restrict__ line = w + (k + c) * n.D;
          F sum = 0;
#pragma omp simd reduction(+ : sum)
          for (int64_t d = 0; d < n.D; ++d) sum = multiply_add(row[d], line[d], sum);
          out[v * n.C + c] = sum + shift[k + c];
        }
      }
    });
  });
  return logits;
}

std::tuple<Tensor, Tensor, Tensor> voxel_head_backward(const Tensor& gradient, const Tensor& features,
                                                       const Tensor& voxels, const Tensor& weight, int64_t heights) {
  const Shape n = shape_of(features, voxels, weight, heights);
  check_tensor("voxel_head_backward", "gradient", gradient, weight.scalar_type(), {n.V, n.C}, features);
  Tensor to_features =
      empty_as(features, {features.size(0), features.size(2), features.size(3), n.D}, features.scalar_type());
  Tensor to_weight = zeros_as(weight, {n.Z * n.C, n.D}, weight.scalar_type());
  Tensor to_bias = zeros_as(weight, {n.Z * n.C}, weight.scalar_type());
  const int64_t* voxel = data<int64_t>(voxels);
  check_ascending("voxel_head: voxels", voxel, n.V, n.places * n.Z);
  for_floating("voxel_head_backward", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T* feature = nhwc_data<T>(features);
    const F *w = data<F>(weight), *up = data<F>(gradient);
    T* out = mutable_data<T>(to_features);
    // 1) of the features: every place is one thread's; the voxels of a place are neighbours
    torch::stable::parallel_for(0, n.places, 1 << 14, [&](int64_t begin, int64_t end) {
      std::vector<F> sum(n.D);
      int64_t v = std::lower_bound(voxel, voxel + n.V, begin * n.Z) - voxel, clean = begin;
      while (v < n.V && voxel[v] < end * n.Z) {
        const int64_t place = voxel[v] / n.Z;
        std::memset(static_cast<void*>(out + clean * n.D), 0, (place - clean) * n.D * sizeof(T));
        std::fill(sum.begin(), sum.end(), F(0));
        for (; v < n.V && voxel[v] / n.Z == place; ++v) {
          const int64_t k = voxel[v] % n.Z * n.C;
          for (int64_t c = 0; c < n.C; ++c) {
            const F* __restrict__ line = w + (k + c) * n.D;
            const F g = up[v * n.C + c];
            for (int64_t d = 0; d < n.D; ++d) sum[d] = multiply_add(g, line[d], sum[d]);
          }
        }
        for (int64_t d = 0; d < n.D; ++d) out[place * n.D + d] = T(sum[d]);
        clean = place + 1;
      }
      std::memset(static_cast<void*>(out + clean * n.D), 0, (end - clean) * n.D * sizeof(T));
    });
    // 2) of weight and bias: parts, then their sum
    const int64_t size = n.Z * n.C * (n.D + 1);
    std::vector<F> parts(kParts * size, F(0));
    torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        F *sum = parts.data() + part * size, *sum_bias = sum + n.Z * n.C * n.D;
        for (int64_t v = share(n.V, kParts, part); v < share(n.V, kParts, part + 1); ++v) {
          const T* __restrict__ row = feature + voxel[v] / n.Z * n.D;
          const int64_t k = voxel[v] % n.Z * n.C;
          for (int64_t c = 0; c < n.C; ++c) {
            const F g = up[v * n.C + c];
            F* __restrict__ line = sum + (k + c) * n.D;
            for (int64_t d = 0; d < n.D; ++d) line[d] = multiply_add(g, F(row[d]), line[d]);
            sum_bias[k + c] += g;
          }
        }
      }
    });
    F *out_weight = mutable_data<F>(to_weight), *out_bias = mutable_data<F>(to_bias);
    for (int64_t part = 0; part < kParts; ++part) {
      const F *sum = parts.data() + part * size, *sum_bias = sum + n.Z * n.C * n.D;
      for (int64_t i = 0; i < n.Z * n.C * n.D; ++i) out_weight[i] += sum[i];
      for (int64_t i = 0; i < n.Z * n.C; ++i) out_bias[i] += sum_bias[i];
    }
  });
  return {channels_last(to_features), to_weight, to_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("voxel_head", TORCH_BOX(&kdmos::voxel_head));
  m.impl("voxel_head_backward", TORCH_BOX(&kdmos::voxel_head_backward));
}

// The last 1x1 convolution at occupied voxels: a row of features times the few weights of one height.
//
// Least work: D features a cell and C logits a voxel moved, C * D multiply-adds a voxel; backward the dense gradient of
// the features written once and twice the multiply-adds. With D = 32 and C = 3 a voxel takes 192 operations for 20
// bytes and its share of a cell's 128: bytes decide. The weights (12 kB there) stay in L1.
//
// What `voxels` holds is not read on the host: those outside of the grid are skipped.
#include <algorithm>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;     // teams of lanes that share nothing but the weights: any full size would do
constexpr int kBlocks = 3;        // of a multiprocessor, at least: enough warps, and no registers spilled
constexpr int kClasses = 4;       // logits of a voxel that are summed while its features pass once
constexpr int kSumThreads = 256;  // at most: one for each of the C * (D + 1) sums of a height, 132 of the student
constexpr int kTile = 128;        // voxels whose places are worked out once for all those threads
constexpr int kBatch = 8;         // of them, whose loads are under way at the same time
constexpr int kRows = 8;          // runs of parts that are summed side by side
constexpr int64_t kParts = 1024;  // of the weights' gradient: fixed, so that the GPU does not change the result
constexpr int64_t kPartVoxels = 64;         // voxels that make a part worth its memory
constexpr int64_t kPartBytes = 64 << 20;    // of all parts
constexpr int64_t kSharedBytes = 40 << 10;  // of one part, beside the tile in the 48 kB that every GPU has

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

// A team a voxel: each lane sums its channels, then the lanes are summed as a tree.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    voxel_head_kernel(const T* __restrict__ feature, const int64_t* __restrict__ voxel,
                      const wide_t<T>* __restrict__ w, const wide_t<T>* __restrict__ shift, Shape n, int width,
                      wide_t<T>* __restrict__ out) {
  using F = wide_t<T>;
  const int teams = kThreads / width, team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;
  const int64_t stride = int64_t(gridDim.x) * teams;
  for (int64_t base = int64_t(blockIdx.x) * teams; base < n.V; base += stride) {
    const int64_t v = min(base + team, n.V - 1);  // teams without a voxel go along: the sums need whole warps
    const bool inside = uint64_t(voxel[v]) < uint64_t(n.places * n.Z);
    const int64_t at = inside ? voxel[v] : 0;  // padding goes along too, and gets 0
    const int64_t place = at / n.Z, k = at % n.Z * n.C;
    const T* row = feature + place * n.D;
    for (int64_t c = 0; c < n.C; c += kClasses) {
      F sum[kClasses] = {};
      for (int64_t d = lane * kVector; d < n.D; d += width * kVector) {
        const Vec<T, kVector> x = load<kVector>(row + d);
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          if (c + j < n.C) {
            const Vec<F, kVector> line = load<kVector>(w + (k + c + j) * n.D + d);
#pragma unroll
            for (int i = 0; i < kVector; ++i) sum[j] += F(x.value[i]) * line.value[i];
          }
        }
      }
      for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
        for (int j = 0; j < kClasses; ++j) sum[j] += __shfl_xor_sync(0xffffffff, sum[j], step);
      }
      if (lane == 0 && base + team < n.V) {
#pragma unroll
        for (int j = 0; j < kClasses; ++j) {
          if (c + j < n.C) out[v * n.C + c + j] = inside ? sum[j] + shift[k + c + j] : F(0);
        }
      }
    }
  }
}

Tensor voxel_head(const Tensor& features, const Tensor& voxels, const Tensor& weight, const Tensor& bias,
                  int64_t heights) {
  STD_TORCH_CHECK(features.is_cuda(), "voxel_head: features on the GPU");
  const Shape n = shape_of(features, voxels, weight, heights);
  check_tensor("voxel_head", "bias", bias, weight.scalar_type(), {n.Z * n.C}, features);
  const OnDevice device(features);
  Tensor logits = empty_as(features, {n.V, n.C}, weight.scalar_type());
  if (n.V == 0 || n.C == 0) return logits;
  for_floating("voxel_head", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T* feature = nhwc_data<T>(features);
    const F *w = data<F>(weight), *shift = data<F>(bias);
    for_vector<T>(n.D, {feature, w}, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int width = team_width(n.D / kVector);
      voxel_head_kernel<T, kVector><<<num_blocks(n.V, kThreads / width), kThreads, 0, device.stream()>>>(
          feature, data<int64_t>(voxels), w, shift, n, width, mutable_data<F>(logits));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return logits;
}

// Of the features, zeroed before: the team of a place's first voxel walks on to its last, in order.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    feature_gradient_kernel(const wide_t<T>* __restrict__ up, const int64_t* __restrict__ voxel,
                            const wide_t<T>* __restrict__ w, Shape n, int width, T* __restrict__ out) {
  using F = wide_t<T>;
  const int teams = kThreads / width, team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;
  const int64_t stride = int64_t(gridDim.x) * teams;
  for (int64_t first = int64_t(blockIdx.x) * teams + team; first < n.V; first += stride) {
    if (uint64_t(voxel[first]) >= uint64_t(n.places * n.Z)) continue;
    const int64_t place = voxel[first] / n.Z, floor = place * n.Z;  // the voxel of its lowest height
    if (first > 0 && uint64_t(voxel[first - 1] - floor) < uint64_t(n.Z)) continue;
    for (int64_t d = lane * kVector; d < n.D; d += width * kVector) {
      F sum[kVector] = {};
      for (int64_t v = first; v < n.V && uint64_t(voxel[v] - floor) < uint64_t(n.Z); ++v) {
        const int64_t k = (voxel[v] - floor) * n.C;
        for (int64_t c = 0; c < n.C; ++c) {
          const Vec<F, kVector> line = load<kVector>(w + (k + c) * n.D + d);
          const F g = up[v * n.C + c];
#pragma unroll
          for (int i = 0; i < kVector; ++i) sum[i] += g * line.value[i];
        }
      }
      Vec<T, kVector> total;
#pragma unroll
      for (int i = 0; i < kVector; ++i) total.value[i] = T(sum[i]);
      store(out + place * n.D + d, total);
    }
  }
}

// Parts of the gradient of weight and bias, [parts, Z * C, D + 1] with the bias as column D, whose feature is 1.
//
// A block sums its share of the voxels in their order. A thread keeps the same class and column for all heights, so
// that no two threads add to the same sum; how many threads there are does not change it.
template <class T, bool kShared>
__global__ void __launch_bounds__(kSumThreads)
    weight_parts_kernel(const wide_t<T>* __restrict__ up, const T* __restrict__ feature,
                        const int64_t* __restrict__ voxel, Shape n, wide_t<T>* parts) {
  using F = wide_t<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int64_t row[kTile], line[kTile];
  const int64_t columns = n.D + 1, size = n.Z * n.C * columns;
  F* part = parts + int64_t(blockIdx.x) * size;
  F* sum = kShared ? reinterpret_cast<F*>(memory) : part;  // more than shared memory holds: where it is wanted
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum[i] = F(0);
  const int64_t begin = n.V * int64_t(blockIdx.x) / gridDim.x;
  int64_t end = n.V * (int64_t(blockIdx.x) + 1) / gridDim.x;
  while (end > begin && voxel[end - 1] >= n.places * n.Z) --end;  // padding, which has no features
  for (int64_t first = begin; first < end; first += kTile) {
    const int tile = int(min(int64_t(kTile), end - first));
    __syncthreads();  // the tile before is used up, the sums are zero
    for (int t = threadIdx.x; t < tile; t += blockDim.x) {
      const int64_t at = voxel[first + t];
      const bool inside = uint64_t(at) < uint64_t(n.places * n.Z);
      row[t] = inside ? at / n.Z * n.D : 0;
      line[t] = inside ? at % n.Z * n.C * columns : -1;
    }
    __syncthreads();
    for (int64_t q = threadIdx.x; q < n.C * columns; q += blockDim.x) {
      const int64_t c = q / columns, d = q % columns;
      for (int t = 0; t < tile; t += kBatch) {
        F g[kBatch], x[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int at = min(t + b, tile - 1);
          g[b] = up[(first + at) * n.C + c];
          x[b] = d < n.D ? F(feature[row[at] + d]) : F(1);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (t + b < tile && line[t + b] >= 0) sum[line[t + b] + q] += g[b] * x[b];
        }
      }
    }
  }
  if constexpr (kShared) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < size; i += blockDim.x) part[i] = sum[i];
  }
}

// Whole warps for `sums` sums, each as often at work as the others where they are more than a block has threads.
unsigned int sum_threads(int64_t sums) {
  const int64_t rounds = (sums + kSumThreads - 1) / kSumThreads;
  return unsigned(((sums + rounds - 1) / rounds + 31) / 32 * 32);
}

// The parts in order, in kRows runs, then the runs; a warp for 32 sums, so that its loads are neighbours.
template <class F>
__global__ void __launch_bounds__(32 * kRows)
    weight_sum_kernel(const F* __restrict__ parts, int64_t num_parts, int64_t D, int64_t size,
                      F* __restrict__ to_weight, F* __restrict__ to_bias) {
  __shared__ F runs[kRows][32];
  const int64_t begin = num_parts * threadIdx.y / kRows, end = num_parts * (threadIdx.y + 1) / kRows;
  for (int64_t base = int64_t(blockIdx.x) * 32; base < size; base += int64_t(gridDim.x) * 32) {
    const int64_t i = base + threadIdx.x;
    F sum = 0;
    if (i < size) {
#pragma unroll 8
      for (int64_t part = begin; part < end; ++part) sum += parts[part * size + i];
    }
    runs[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && i < size) {
#pragma unroll
      for (int run = 1; run < kRows; ++run) sum += runs[run][threadIdx.x];
      const int64_t line = i / (D + 1), d = i % (D + 1);
      if (d < D) to_weight[line * D + d] = sum;
      else to_bias[line] = sum;
    }
    __syncthreads();
  }
}

std::tuple<Tensor, Tensor, Tensor> voxel_head_backward(const Tensor& gradient, const Tensor& features,
                                                       const Tensor& voxels, const Tensor& weight, int64_t heights) {
  STD_TORCH_CHECK(features.is_cuda(), "voxel_head: features on the GPU");
  const Shape n = shape_of(features, voxels, weight, heights);
  check_tensor("voxel_head_backward", "gradient", gradient, weight.scalar_type(), {n.V, n.C}, features);
  const OnDevice device(features);
  const cudaStream_t stream = device.stream();
  Tensor to_features =
      empty_as(features, {features.size(0), features.size(2), features.size(3), n.D}, features.scalar_type());
  Tensor to_weight = empty_as(weight, {n.Z * n.C, n.D}, weight.scalar_type());
  Tensor to_bias = empty_as(weight, {n.Z * n.C}, weight.scalar_type());
  const size_t bytes = to_features.numel() * to_features.element_size();
  if (bytes) STD_CUDA_CHECK(cudaMemsetAsync(to_features.mutable_data_ptr(), 0, bytes, stream));
  const int64_t* voxel = data<int64_t>(voxels);
  for_floating("voxel_head_backward", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T* feature = nhwc_data<T>(features);
    const F *w = data<F>(weight), *up = data<F>(gradient);
    // 1) of the features: the voxels of a place are neighbours
    if (n.V > 0 && n.D > 0) {
      for_vector<T>(n.D, {w}, [&](auto vector) {
        constexpr int kVector = decltype(vector)::value;
        const int width = team_width(n.D / kVector);
        feature_gradient_kernel<T, kVector><<<num_blocks(n.V, kThreads / width), kThreads, 0, stream>>>(
            up, voxel, w, n, width, mutable_data<T>(to_features));
      });
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    // 2) of weight and bias: parts, then their sum
    const int64_t size = n.Z * n.C * (n.D + 1), part_bytes = size * int64_t(sizeof(F));
    if (size == 0) return;
    const int64_t wanted = std::min({kParts, n.V / kPartVoxels, kPartBytes / part_bytes});
    const int64_t num_parts = std::max<int64_t>(1, wanted);
    Tensor parts = empty_as(weight, {num_parts, size}, weight.scalar_type());
    const unsigned int threads = sum_threads(n.C * (n.D + 1));
    if (part_bytes <= kSharedBytes) {
      weight_parts_kernel<T, true><<<unsigned(num_parts), threads, size_t(part_bytes), stream>>>(
          up, feature, voxel, n, mutable_data<F>(parts));
    } else {
      weight_parts_kernel<T, false><<<unsigned(num_parts), threads, 0, stream>>>(
          up, feature, voxel, n, mutable_data<F>(parts));
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    weight_sum_kernel<F><<<num_blocks(size, 32), dim3(32, kRows), 0, stream>>>(
        data<F>(parts), num_parts, n.D, size, mutable_data<F>(to_weight), mutable_data<F>(to_bias));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {channels_last(to_features), to_weight, to_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("voxel_head", TORCH_BOX(&kdmos::voxel_head));
  m.impl("voxel_head_backward", TORCH_BOX(&kdmos::voxel_head_backward));
}

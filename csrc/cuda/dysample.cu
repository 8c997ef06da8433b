// Learned upsampling, channels last: [B, H, W, C] -> [B, sH, sW, C].
//
// Least work forward: x and the offsets read once, the output written once; four multiply-adds a value. Backward:
// output gradient, x and offsets read, two gradients written; eight multiply-adds a value, and four atomic additions,
// because where a sub-pixel reads is learned. Those add up in no fixed order: the gradient of x is not deterministic
// to the last bits; that of the offsets and the forward pass are.
#include <algorithm>

#include "../dysample.h"
#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;         // of a block at most; nothing is shared, so as many blocks as fit hide the loads
constexpr int kMostLanes = 32;        // threads along the channels of a group: a warp can sum over them
constexpr int kMostPixels = 64;       // of a block: CUDA's limit for blockDim.z
constexpr int64_t kMostPlaces = 64;   // groups * scale^2, as on the CPU
constexpr int64_t kMost = 1LL << 30;  // rows, columns or pixels: they are counted in int

// Of the forward pass on a multiprocessor: as many as registers allow without spilling.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 3 : 4;

struct Shape {
  int B, H, W, s, G, P;  // P = G * s * s places an input pixel
  int64_t C;
  bool circular;
};

// Where sub-pixel (i, j) of input pixel (h, w) samples group g: place (g * s + i) * s + j of the pixel.
template <class F>
struct Place {
  __device__ Place(const Shape& n, const F* __restrict__ offset, int h, int w, int p)
      : x(n.circular ? wrapped(F(w) + offset[p], n.W) : clamped(F(w) + offset[p], n.W)),
        y(clamped(F(h) + offset[n.P + p], n.H)) {
    const int top = y.first * n.W, bottom = y.second * n.W;
    corner[0] = top + x.first, corner[1] = top + x.second;
    corner[2] = bottom + x.first, corner[3] = bottom + x.second;
    const F a = x.share, d = y.share;
    weight[0] = (1 - d) * (1 - a), weight[1] = (1 - d) * a, weight[2] = d * (1 - a), weight[3] = d * a;
  }
  Between<F> x, y;
  int corner[4];  // pixels of the image
  F weight[4];
};

// A block is (vectors of a group, groups, pixels of an output row): consecutive threads write consecutive bytes.
// blockIdx.y is the output row; every extent walks on by its width.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    dysample_kernel(const T* __restrict__ x, const wide_t<T>* __restrict__ offset, const Shape n, T* __restrict__ out) {
  using F = wide_t<T>;
  const int width = int(n.C / n.G), columns = n.s * n.W, rows = n.B * n.s * n.H;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int b = row / (n.s * n.H), sub_row = row % (n.s * n.H), h = sub_row / n.s, i = sub_row % n.s;
    const T* image = x + int64_t(b) * n.H * n.W * n.C;
    for (int column = blockIdx.x * blockDim.z + threadIdx.z; column < columns; column += gridDim.x * blockDim.z) {
      const int w = column / n.s, j = column % n.s;
      const F* shift = offset + ((int64_t(b) * n.H + h) * n.W + w) * 2 * n.P;
      T* pixel = out + (int64_t(row) * columns + column) * n.C;
      for (int g = threadIdx.y; g < n.G; g += blockDim.y) {
        const Place<F> at(n, shift, h, w, (g * n.s + i) * n.s + j);
        for (int k = threadIdx.x * V; k < width; k += blockDim.x * V) {
          const int64_t c = int64_t(g) * width + k;
          const auto corner = [&](int q) { return load<V>(image + at.corner[q] * n.C + c); };
          const Vec<T, V> xa = corner(0), xb = corner(1), xc = corner(2), xd = corner(3);
          Vec<T, V> value;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            value.value[v] = T(at.weight[0] * F(xa.value[v]) + at.weight[1] * F(xb.value[v]) +
                               at.weight[2] * F(xc.value[v]) + at.weight[3] * F(xd.value[v]));
          }
          store(pixel + c, value);
        }
      }
    }
  }
}

// to[v] += weight * up[v]
template <int V, class T>
__device__ void add(wide_t<T>* to, wide_t<T> weight, const Vec<T, V>& up) {
  using F = wide_t<T>;
#if __CUDA_ARCH__ >= 900
  constexpr bool kQuads = V % 4 == 0;  // float sums, four at a time
#else
  constexpr bool kQuads = false;
#endif
  if constexpr (kQuads) {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const float a = weight * F(up.value[v]), b = weight * F(up.value[v + 1]), c = weight * F(up.value[v + 2]),
                  d = weight * F(up.value[v + 3]);
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                   :: "l"(__cvta_generic_to_global(to + v)), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
    }
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) atomicAdd(to + v, weight * F(up.value[v]));
  }
}

// Blocks as above, but blockDim.x is a power of two: the team of threads of one pixel and group lies in one warp and
// sums over the channels. x_gradient holds zeros before.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    dysample_backward_kernel(const T* __restrict__ upstream, const T* __restrict__ x,
                             const wide_t<T>* __restrict__ offset, const Shape n, wide_t<T>* __restrict__ x_gradient,
                             wide_t<T>* __restrict__ offset_gradient) {
  using F = wide_t<T>;
  const int width = int(n.C / n.G), columns = n.s * n.W, rows = n.B * n.s * n.H;
  const unsigned lanes = blockDim.x, thread = (threadIdx.z * blockDim.y + threadIdx.y) * lanes + threadIdx.x;
  const unsigned team = (~0u >> (32 - lanes)) << (thread % 32 - threadIdx.x);
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {
    const int b = row / (n.s * n.H), sub_row = row % (n.s * n.H), h = sub_row / n.s, i = sub_row % n.s;
    const int64_t start = int64_t(b) * n.H * n.W * n.C;
    for (int column = blockIdx.x * blockDim.z + threadIdx.z; column < columns; column += gridDim.x * blockDim.z) {
      const int w = column / n.s, j = column % n.s;
      const int64_t shift = ((int64_t(b) * n.H + h) * n.W + w) * 2 * n.P;
      const T* pixel = upstream + (int64_t(row) * columns + column) * n.C;
      for (int g = threadIdx.y; g < n.G; g += blockDim.y) {
        const int p = (g * n.s + i) * n.s + j;
        const Place<F> at(n, offset + shift, h, w, p);
        F a = 0, bb = 0, cc = 0, d = 0;  // <gradient, corner>
        for (int k = threadIdx.x * V; k < width; k += lanes * V) {
          const int64_t c = int64_t(g) * width + k;
          const T* from = x + start + c;
          F* into = x_gradient + start + c;
          const Vec<T, V> up = load<V>(pixel + c);
          const auto corner = [&](int q) { return load<V>(from + at.corner[q] * n.C); };
          const Vec<T, V> xa = corner(0), xb = corner(1), xc = corner(2), xd = corner(3);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const F u = F(up.value[v]);
            a += u * F(xa.value[v]), bb += u * F(xb.value[v]), cc += u * F(xc.value[v]), d += u * F(xd.value[v]);
          }
#pragma unroll
          for (int q = 0; q < 4; ++q) add<V, T>(into + at.corner[q] * n.C, at.weight[q], up);
        }
        const F along = at.x.share, down = at.y.share;
        F gx = (1 - down) * (bb - a) + down * (d - cc), gy = (1 - along) * (cc - a) + along * (d - bb);
        for (unsigned m = lanes / 2; m > 0; m /= 2) {
          gx += __shfl_xor_sync(team, gx, m);
          gy += __shfl_xor_sync(team, gy, m);
        }
        if (threadIdx.x == 0) {
          offset_gradient[shift + p] = at.x.free ? gx : F(0);
          offset_gradient[shift + n.P + p] = at.y.free ? gy : F(0);
        }
      }
    }
  }
}

// Half types are summed in float32 and narrowed here.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    narrow_kernel(const float* __restrict__ sums, int64_t size, T* __restrict__ narrow) {
  const int64_t step = int64_t(gridDim.x) * kThreads * V;
  for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < size; i += step) {
    const Vec<float, V> sum = load<V>(sums + i);
    Vec<T, V> value;
#pragma unroll
    for (int v = 0; v < V; ++v) value.value[v] = T(sum.value[v]);
    store(narrow + i, value);
  }
}

Shape shape_of(const Tensor& x, const Tensor& offset, int64_t scale, int64_t groups, bool circular) {
  STD_TORCH_CHECK(scale >= 1 && groups >= 1 && scale <= kMostPlaces && groups <= kMostPlaces &&
                      groups * scale * scale <= kMostPlaces,
                  "dysample: more than ", kMostPlaces, " places a pixel");
  const int64_t B = x.size(0), H = x.size(1), W = x.size(2), C = x.size(3), P = groups * scale * scale;
  const bool wide = x.scalar_type() == ScalarType::Double;
  check_tensor("dysample", "x (channels last)", x, x.scalar_type(), {-1, -1, -1, -1}, x);
  check_tensor("dysample", "offset (channels last)", offset, wide ? ScalarType::Double : ScalarType::Float,
               {B, H, W, 2 * P}, x);
  STD_TORCH_CHECK(C % groups == 0, "dysample: the channels do not divide into groups");
  STD_TORCH_CHECK(scale * H <= kMost && B <= kMost / std::max<int64_t>(1, scale * H) && scale * W <= kMost &&
                      H <= kMost / std::max<int64_t>(1, W) && C <= kMost,
                  "dysample: image too large");
  return {int(B), int(H), int(W), int(scale), int(groups), int(P), C, circular};
}

struct Blocks {
  dim3 grid, block;
};

Blocks blocks_for(const Shape& n, int64_t vectors, bool power_of_two) {
  unsigned lanes = unsigned(std::clamp<int64_t>(vectors, 1, kMostLanes));
  if (power_of_two) {
    unsigned power = 1;
    while (power < lanes) power *= 2;
    lanes = power;
  }
  const unsigned groups = std::min(unsigned(n.G), kThreads / lanes);
  const unsigned pixels = std::min(unsigned(kMostPixels), kThreads / (lanes * groups));
  const int64_t rows = int64_t(n.B) * n.s * n.H;
  return {dim3(num_blocks(int64_t(n.s) * n.W, pixels), num_blocks(rows, 1, 65535)), dim3(lanes, groups, pixels)};
}

Tensor dysample(const Tensor& x_nchw, const Tensor& offset_nchw, int64_t scale, int64_t groups, bool circular) {
  const Tensor x = nhwc(x_nchw), offset = nhwc(offset_nchw);
  const Shape n = shape_of(x, offset, scale, groups, circular);
  const OnDevice device(x);
  Tensor out = empty_as(x, {n.B, int64_t(n.s) * n.H, int64_t(n.s) * n.W, n.C}, x.scalar_type());
  if (out.numel() == 0) return channels_last(out);
  for_floating("dysample", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* image = data<T>(x);
    T* to = mutable_data<T>(out);
    for_vector<T>(n.C / n.G, {image, to}, [&](auto constant) {
      constexpr int V = decltype(constant)::value;
      const Blocks blocks = blocks_for(n, n.C / n.G / V, false);
      dysample_kernel<T, V><<<blocks.grid, blocks.block, 0, device.stream()>>>(image, data<wide_t<T>>(offset), n, to);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return channels_last(out);
}

std::tuple<Tensor, Tensor> dysample_backward(const Tensor& gradient_nchw, const Tensor& x_nchw,
                                             const Tensor& offset_nchw, int64_t scale, int64_t groups, bool circular) {
  const Tensor gradient = nhwc(gradient_nchw), x = nhwc(x_nchw), offset = nhwc(offset_nchw);
  const Shape n = shape_of(x, offset, scale, groups, circular);
  check_tensor("dysample_backward", "gradient (channels last)", gradient, x.scalar_type(),
               {n.B, int64_t(n.s) * n.H, int64_t(n.s) * n.W, n.C}, x);
  const OnDevice device(x);
  const ScalarType dtype = x.scalar_type();
  const bool is_half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  Tensor sums = zeros_as(x, {n.B, n.H, n.W, n.C}, is_half ? ScalarType::Float : dtype);
  Tensor x_gradient = is_half ? empty_as(x, {n.B, n.H, n.W, n.C}, dtype) : sums;
  Tensor offset_gradient = empty_as(offset, {n.B, n.H, n.W, 2 * n.P}, offset.scalar_type());
  if (offset.numel() == 0) return {channels_last(x_gradient), channels_last(offset_gradient)};
  for_floating("dysample_backward", dtype, [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T *image = data<T>(x), *upstream = data<T>(gradient);
    // 1) the gradient of the offsets, and of x in sums
    for_vector<T>(n.C / n.G, {image, upstream, data<F>(sums)}, [&](auto constant) {
      constexpr int V = decltype(constant)::value;
      const Blocks blocks = blocks_for(n, n.C / n.G / V, true);
      dysample_backward_kernel<T, V><<<blocks.grid, blocks.block, 0, device.stream()>>>(
          upstream, image, data<F>(offset), n, mutable_data<F>(sums), mutable_data<F>(offset_gradient));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    // 2) half types
    if constexpr (sizeof(T) != sizeof(F)) {
      const int64_t size = x.numel();
      if (size == 0) return;
      for_vector<T>(size, {data<float>(sums), data<T>(x_gradient)}, [&](auto constant) {
        constexpr int V = decltype(constant)::value;
        narrow_kernel<T, V><<<num_blocks(size, kThreads * V), kThreads, 0, device.stream()>>>(
            data<float>(sums), size, mutable_data<T>(x_gradient));
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    }
  });
  return {channels_last(x_gradient), channels_last(offset_gradient)};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("dysample", TORCH_BOX(&kdmos::dysample));
  m.impl("dysample_backward", TORCH_BOX(&kdmos::dysample_backward));
}

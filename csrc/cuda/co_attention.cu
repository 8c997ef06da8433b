// Co-attention and the 2x2 maxima of both branches, channels last; the equations stand in co_attention.h.
//
// Least work: `fused` and motion read once, appearance twice (the mean over the image stands between), the result and
// the maxima written once; a pixel takes 18 D + M + 3 C multiply-adds. Sums over the image are made in parts, whose
// number depends on its size alone, and then joined in float64 in a fixed order: no atomics.
#include "../co_attention.h"

#include <algorithm>
#include <numeric>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // little is shared: any full size would do
constexpr int kWarps = kThreads / 32;
constexpr int kTaps = 9;              // of a 3x3 convolution
constexpr int kPartPixels = 1024;     // of an image, summed by one block
constexpr int64_t kMostY = 65535;     // CUDA's limit for gridDim.y, over which images are spread
constexpr int64_t kMost = 1LL << 30;  // pixels of an image, and channels: they are counted in int

template <class F>
__device__ F sigmoid(F x) {
  return F(1) / (F(1) + exp(-x));
}

// The sum of a value of each thread of a warp, in a tree; every lane gets it.
template <class F>
__device__ F sum_of_warp(F value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// 1) sums of sigmoid(3x3 convolution) over 256 pixels, for both gates: parts [B, blocks, 2]. A thread a pixel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    gate_parts_kernel(const T* __restrict__ fused, const wide_t<T>* __restrict__ weight,
                      const wide_t<T>* __restrict__ bias, const AttentionShape n, wide_t<T>* __restrict__ parts) {
  using F = wide_t<T>;
  __shared__ F sums[2][kWarps];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, H = int(n.H), W = int(n.W), D = int(n.D);
  const int pixel = int(blockIdx.x) * kThreads + int(threadIdx.x), row = pixel / W, column = pixel % W;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    F first = 0, second = 0;
    if (row < H) {
      first = bias[0], second = bias[1];
      for (int tap = 0; tap < kTaps; ++tap) {
        const int h = row + tap / 3 - 1;
        int w = column + tap % 3 - 1;
        w = w < 0 ? w + W : w >= W ? w - W : w;
        if (h < 0 || h >= H) continue;
        const T* from = fused + ((b * H + h) * W + w) * D;
        for (int d = 0; d < D; d += V) {
          const Vec<T, V> value = load<V>(from + d);
#pragma unroll
          for (int v = 0; v < V; ++v) {  // the weights are the same for all threads: one load for a warp
            first = multiply_add(F(value.value[v]), weight[(d + v) * kTaps + tap], first);
            second = multiply_add(F(value.value[v]), weight[(D + d + v) * kTaps + tap], second);
          }
        }
      }
      first = sigmoid(first), second = sigmoid(second);
    }
    first = sum_of_warp(first), second = sum_of_warp(second);
    if (lane == 0) sums[0][warp] = first, sums[1][warp] = second;
    __syncthreads();
    if (threadIdx.x < 2) {
      F sum = 0;
      for (int i = 0; i < kWarps; ++i) sum += sums[threadIdx.x][i];
      parts[(b * gridDim.x + blockIdx.x) * 2 + threadIdx.x] = sum;
    }
    __syncthreads();  // before the next image takes the memory
  }
}

// 2) means from parts [B, num, size]: [B, size]. A warp a value, whose lanes sum every 32nd part in order.
template <class F>
__global__ void __launch_bounds__(kThreads)
    mean_kernel(const F* __restrict__ parts, int64_t B, int64_t num, int64_t size, int64_t pixels,
                F* __restrict__ mean) {
  const int64_t value = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (value >= B * size) return;  // a whole warp
  const int lane = int(threadIdx.x) % 32;
  const F* from = parts + value / size * num * size + value % size;
  double sum = 0;
  for (int64_t part = lane; part < num; part += 32) sum += double(from[part * size]);
  sum = sum_of_warp(sum);
  if (lane == 0) mean[value] = F(sum / double(pixels));
}

// 3) s of each pixel. A team of lanes a pixel: each sums its channels, then the lanes are summed as a tree.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    seen_kernel(const T* __restrict__ motion, const wide_t<T>* __restrict__ weight, const wide_t<T>* __restrict__ bias,
                const wide_t<T>* __restrict__ gates, const AttentionShape n, int width, wide_t<T>* __restrict__ seen) {
  using F = wide_t<T>;
  const int teams = kThreads / width, team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;
  const int64_t pixels = n.B * n.H * n.W, stride = int64_t(gridDim.x) * teams;
  for (int64_t base = int64_t(blockIdx.x) * teams; base < pixels; base += stride) {
    const int64_t pixel = min(base + team, pixels - 1);  // teams without a pixel go along: the sums need whole warps
    F sum = 0;
    for (int64_t m = lane * V; m < n.M; m += width * V) {
      const Vec<T, V> value = load<V>(motion + pixel * n.M + m);
#pragma unroll
      for (int v = 0; v < V; ++v) sum = multiply_add(F(value.value[v]), weight[m + v], sum);
    }
    for (int step = width / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    const F gate = gates[2 * (pixel / (n.H * n.W)) + 1];
    if (lane == 0 && base + team < pixels) seen[pixel] = sigmoid(multiply_add(gate, sum, bias[0]));
  }
}

// 4) sums of s * appearance over kPartPixels pixels: parts [B, blocks, C]. A block is (vectors of a pixel, pixels);
// more vectors than threads are walked over.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    seen_parts_kernel(const T* __restrict__ appearance, const wide_t<T>* __restrict__ seen, const AttentionShape n,
                      wide_t<T>* __restrict__ parts) {
  using F = wide_t<T>;
  __shared__ F memory[kThreads][V];
  const int across = int(blockDim.x), x = int(threadIdx.x), y = int(threadIdx.y), C = int(n.C);
  const int begin = int(blockIdx.x) * kPartPixels, end = int(min(n.H * n.W, int64_t(begin) + kPartPixels));
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    const int64_t image = b * n.H * n.W;
    F* to = parts + (b * gridDim.x + blockIdx.x) * C;
    for (int base = 0; base < C; base += across * V) {
      const int c = base + x * V;
      F sum[V] = {};
      if (c < C) {
        for (int pixel = begin + y; pixel < end; pixel += blockDim.y) {
          const Vec<T, V> value = load<V>(appearance + (image + pixel) * C + c);
          const F s = seen[image + pixel];
#pragma unroll
          for (int v = 0; v < V; ++v) sum[v] = multiply_add(s, F(value.value[v]), sum[v]);
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) memory[y * across + x][v] = sum[v];
      __syncthreads();
      if (y == 0 && c < C) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          F total = 0;
          for (int i = 0; i < int(blockDim.y); ++i) total += memory[i * across + x][v];
          to[c + v] = total;
        }
      }
      __syncthreads();  // before the next channels take the memory
    }
  }
}

// 5) which channels: scale [B, C] = g_a C softmax(channel g_a mean + bias). A block an image.
template <class F>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(const F* __restrict__ mean, const F* __restrict__ gates, const F* __restrict__ channel,
                 const F* __restrict__ bias, const AttentionShape n, F* __restrict__ scale) {
  __shared__ double memory[kWarps];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, C = int(n.C);
  const auto join = [&](double value, bool largest) {  // of a value of each warp
    if (lane == 0) memory[warp] = value;
    __syncthreads();
    double all = memory[0];
    for (int i = 1; i < kWarps; ++i) all = largest ? (all > memory[i] ? all : memory[i]) : all + memory[i];
    __syncthreads();
    return all;
  };
  for (int64_t b = blockIdx.x; b < n.B; b += gridDim.x) {
    const double gate = double(gates[2 * b]);
    F* to = scale + b * C;
    double largest = -HUGE_VAL, total = 0;
    for (int c = warp; c < C; c += kWarps) {  // a warp a channel
      double sum = 0;
      for (int k = lane; k < C; k += 32) sum += double(channel[int64_t(c) * C + k]) * double(mean[b * C + k]);
      sum = sum_of_warp(sum) * gate + double(bias[c]);
      if (lane == 0) to[c] = F(sum);
      largest = largest > sum ? largest : sum;
    }
    largest = join(largest, true);  // from here on all threads see `to`
    for (int c = threadIdx.x; c < C; c += kThreads) total += exp(double(to[c]) - largest);
    total = join(sum_of_warp(total), false);
    for (int c = threadIdx.x; c < C; c += kThreads) to[c] = F(gate * double(C) * exp(double(to[c]) - largest) / total);
  }
}

template <class T, int V>
__device__ Vec<T, V> larger(const Vec<T, V>& a, const Vec<T, V>& b) {
  using F = wide_t<T>;
  Vec<T, V> out;
#pragma unroll
  for (int v = 0; v < V; ++v) out.value[v] = F(a.value[v]) > F(b.value[v]) ? a.value[v] : b.value[v];
  return out;
}

// 6) the result and its maxima. A thread for a vector of channels of 2 x 2 pixels, of which the last row and column may
// be missing.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    attend_kernel(const T* __restrict__ appearance, const wide_t<T>* __restrict__ seen,
                  const wide_t<T>* __restrict__ gates, const wide_t<T>* __restrict__ scale, const AttentionShape n,
                  T* __restrict__ out, T* __restrict__ half) {
  using F = wide_t<T>;
  const int64_t vectors = n.C / V, across = (n.W + 1) / 2, size = (n.H + 1) / 2 * across * vectors;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    const F gate = gates[2 * b];
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += int64_t(gridDim.x) * kThreads) {
      const unsigned square = unsigned(i / vectors);  // an image has at most 2^31 pixels
      const int64_t c = (i - square * vectors) * V, w = square % unsigned(across) * 2, h = square / unsigned(across) * 2;
      Vec<F, V> factor;
#pragma unroll
      for (int v = 0; v < V; ++v) factor.value[v] = scale[b * n.C + c + v];
      Vec<T, V> value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int64_t row = h + k / 2, column = w + k % 2, pixel = (b * n.H + row) * n.W + column;
        if (row >= n.H || column >= n.W) continue;
        const int64_t place = pixel * n.C + c;
        value[k] = load<V>(appearance + place);
        const F s = seen[pixel];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          value[k].value[v] = narrow<T>(F(value[k].value[v]) * multiply_add(s, factor.value[v], gate));
        }
        store(out + place, value[k]);
      }
      if (h + 1 >= n.H || w + 1 >= n.W) continue;
      const Vec<T, V> largest = larger<T, V>(larger<T, V>(value[0], value[1]), larger<T, V>(value[2], value[3]));
      store(half + ((b * (n.H / 2) + h / 2) * (n.W / 2) + w / 2) * n.C + c, largest);
    }
  }
}

// 7) the maxima of motion. A thread for a vector of channels of 2 x 2 pixels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    halve_kernel(const T* __restrict__ motion, const AttentionShape n, T* __restrict__ half) {
  const int64_t vectors = n.M / V, H = n.H / 2, W = n.W / 2, size = H * W * vectors;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += int64_t(gridDim.x) * kThreads) {
      const int64_t c = i % vectors * V, w = i / vectors % W, h = i / vectors / W;
      const T* from = motion + ((b * n.H + 2 * h) * n.W + 2 * w) * n.M + c;
      const Vec<T, V> above = larger<T, V>(load<V>(from), load<V>(from + n.M));
      const Vec<T, V> below = larger<T, V>(load<V>(from + n.W * n.M), load<V>(from + (n.W + 1) * n.M));
      store(half + ((b * H + h) * W + w) * n.M + c, larger<T, V>(above, below));
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> co_attention(const Tensor& appearance, const Tensor& motion, const Tensor& fused,
                                                const Tensor& gate, const Tensor& gate_bias, const Tensor& spatial,
                                                const Tensor& spatial_bias, const Tensor& channel,
                                                const Tensor& channel_bias) {
  const AttentionShape n =
      attention_shape({appearance, motion, fused, gate, gate_bias, spatial, spatial_bias, channel, channel_bias});
  STD_TORCH_CHECK(n.H <= kMost / n.W && n.C <= kMost / kThreads && n.D <= kMost / kTaps / 2,
                  "co_attention: image too large");
  const OnDevice device(appearance);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = appearance.scalar_type(), wide = gate.scalar_type();
  const int64_t pixels = n.H * n.W, half_pixels = (n.H / 2) * (n.W / 2);
  Tensor attended = empty_as(appearance, {n.B, n.H, n.W, n.C}, dtype);
  Tensor half_appearance = empty_as(appearance, {n.B, n.H / 2, n.W / 2, n.C}, dtype);
  Tensor half_motion = empty_as(appearance, {n.B, n.H / 2, n.W / 2, n.M}, dtype);
  const auto results = [&] {
    return std::make_tuple(channels_last(attended), channels_last(half_appearance), channels_last(half_motion));
  };
  if (n.B == 0) return results();
  const unsigned images = unsigned(std::min(n.B, kMostY));
  const int64_t gate_parts = (pixels + kThreads - 1) / kThreads, seen_parts = (pixels + kPartPixels - 1) / kPartPixels;
  Tensor of_gates = empty_as(gate, {n.B, gate_parts, 2}, wide), gates = empty_as(gate, {n.B, 2}, wide);
  Tensor seen = empty_as(gate, {n.B, pixels}, wide), of_seen = empty_as(gate, {n.B, seen_parts, n.C}, wide);
  Tensor mean = empty_as(gate, {n.B, n.C}, wide), scale = empty_as(gate, {n.B, n.C}, wide);
  for_floating("co_attention", dtype, [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T *from = data<T>(appearance), *moving = data<T>(motion);
    const F* gated = data<F>(gates);
    T *out = mutable_data<T>(attended), *half = mutable_data<T>(half_appearance);
    for_vector<T>(n.D, {data<T>(fused)}, [&](auto vector) {
      gate_parts_kernel<T, decltype(vector)::value><<<dim3(unsigned(gate_parts), images), kThreads, 0, stream>>>(
          data<T>(fused), data<F>(gate), data<F>(gate_bias), n, mutable_data<F>(of_gates));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    mean_kernel<F><<<num_blocks(2 * n.B, kWarps, kMost), kThreads, 0, stream>>>(data<F>(of_gates), n.B, gate_parts, 2,
                                                                                pixels, mutable_data<F>(gates));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_vector<T>(n.M, {moving, half_motion.const_data_ptr()}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int width = team_width(n.M / V);
      seen_kernel<T, V><<<num_blocks(n.B * pixels, kThreads / width), kThreads, 0, stream>>>(
          moving, data<F>(spatial), data<F>(spatial_bias), gated, n, width, mutable_data<F>(seen));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const dim3 grid(num_blocks(half_pixels * (n.M / V), kThreads), images);
      halve_kernel<T, V><<<grid, kThreads, 0, stream>>>(moving, n, mutable_data<T>(half_motion));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    for_vector<T>(n.C, {from, out, half}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const unsigned across = unsigned(std::min<int64_t>(n.C / V, kThreads));
      seen_parts_kernel<T, V><<<dim3(unsigned(seen_parts), images), dim3(across, kThreads / across), 0, stream>>>(
          from, data<F>(seen), n, mutable_data<F>(of_seen));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      mean_kernel<F><<<num_blocks(n.B * n.C, kWarps, kMost), kThreads, 0, stream>>>(
          data<F>(of_seen), n.B, seen_parts, n.C, pixels, mutable_data<F>(mean));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      scale_kernel<F><<<images, kThreads, 0, stream>>>(data<F>(mean), gated, data<F>(channel), data<F>(channel_bias), n,
                                                       mutable_data<F>(scale));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const dim3 grid(num_blocks((n.H + 1) / 2 * ((n.W + 1) / 2) * (n.C / V), kThreads), images);
      attend_kernel<T, V><<<grid, kThreads, 0, stream>>>(from, data<F>(seen), gated, data<F>(scale), n, out, half);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return results();
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("co_attention", TORCH_BOX(&kdmos::co_attention)); }

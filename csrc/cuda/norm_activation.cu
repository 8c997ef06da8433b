// Batch norm in training and LeakyReLU on rows [P, C]; the equations stand in norm_activation.h.
//
// Least work: forward x read twice and written once, backward x and gradient read twice and written once; 3 to 8
// operations a value. Bytes decide. Sums are made in two stages: parts of the rows, whose number depends on P alone,
// by a block each, and then the parts in float64, in a tree. No atomics: the result does not depend on the GPU.
#include "../norm_activation.h"

#include <algorithm>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;        // nothing but the sum of a block is shared: any full size would do
constexpr int kBlocks = 3;           // of a multiprocessor, at least: enough warps, and no registers spilled
constexpr int kWalk = 8;             // rows a thread takes at least, so that its channels' factors are loaded once
constexpr int64_t kMostParts = 512;  // of the rows: a few waves of blocks
constexpr int64_t kPartRows = 256;   // that make a part worth its block, at least
constexpr int kRuns = 16;            // of parts, joined side by side

// Parts of the rows: `size` rows each, but for the last.
struct Parts {
  explicit Parts(int64_t P)
      : size(std::max(kPartRows, (P + kMostParts - 1) / kMostParts)), num((P + size - 1) / size) {}
  int64_t size, num;
};

// A block is (vectors of a row, rows); more vectors than threads are walked over.
dim3 block_for(int64_t columns) {
  const unsigned across = unsigned(std::clamp<int64_t>(columns, 1, kThreads));
  return dim3(across, kThreads / across);
}

// Sums two values of each of V channels over the rows of the block, in a tree, and puts them into `to` [2, C].
template <class F, int V>
__device__ void sum_of_block(F (&first)[V], F (&second)[V], bool inside, int64_t channel, int64_t C,
                             F* __restrict__ to) {
  __shared__ F memory[2 * V][kThreads];  // neighbours in a row: no bank conflicts
  const int across = int(blockDim.x), y = int(threadIdx.y), place = y * across + int(threadIdx.x);
#pragma unroll
  for (int v = 0; v < V; ++v) memory[v][place] = first[v], memory[V + v][place] = second[v];
  for (int rows = int(blockDim.y); rows > 1;) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    if (y + half < rows) {
#pragma unroll
      for (int v = 0; v < 2 * V; ++v) memory[v][place] += memory[v][place + half * across];
    }
    rows = half;
  }
  if (y == 0 && inside) {  // its own thread added the last
#pragma unroll
    for (int v = 0; v < V; ++v) to[channel + v] = memory[v][place], to[C + channel + v] = memory[V + v][place];
  }
  __syncthreads();  // before the next channels take the memory
}

// 1) a block a part of the rows: sums of d and of d * d, d = x - the part's first row
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const T* __restrict__ x, int64_t P, int64_t C, int64_t size, wide_t<T>* __restrict__ sums) {
  using F = wide_t<T>;
  const int64_t begin = int64_t(blockIdx.x) * size, end = min(begin + size, P);
  for (int64_t base = 0; base < C; base += int64_t(blockDim.x) * V) {
    const int64_t channel = base + int64_t(threadIdx.x) * V;
    const bool inside = channel < C;
    F sum[V] = {}, square[V] = {};
    if (inside) {
      const Vec<T, V> shift = load<V>(x + begin * C + channel);
#pragma unroll 4
      for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
        const Vec<T, V> value = load<V>(x + row * C + channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const F d = F(value.value[v]) - F(shift.value[v]);
          sum[v] += d;
          square[v] = multiply_add(d, d, square[v]);
        }
      }
    }
    sum_of_block<F, V>(sum, square, inside, channel, C, sums + int64_t(blockIdx.x) * 2 * C);
  }
}

// 2) the parts: a block for 32 channels; each run joins its parts in order, then the runs are joined in a tree
template <class T>
__global__ void __launch_bounds__(32 * kRuns, 1)
    join_moments_kernel(const wide_t<T>* __restrict__ sums, const T* __restrict__ x, const Parts parts, int64_t P,
                        int64_t C, wide_t<T>* __restrict__ mean, wide_t<T>* __restrict__ variance) {
  using F = wide_t<T>;
  __shared__ double memory[3][kRuns][32];
  const int lane = int(threadIdx.x), run = int(threadIdx.y);
  const int64_t channel = int64_t(blockIdx.x) * 32 + lane;
  Moments all{0, 0, 0};
  if (channel < C) {
    for (int64_t part = parts.num * run / kRuns; part < parts.num * (run + 1) / kRuns; ++part) {
      const int64_t begin = part * parts.size;
      const F sum = sums[part * 2 * C + channel], square = sums[(part * 2 + 1) * C + channel];
      const double rows = double(min(parts.size, P - begin));  // never 0
      all = join(all, moments_of(rows, double(F(x[begin * C + channel])), double(sum), double(square)));
    }
  }
  for (int half = kRuns / 2; half > 0; half /= 2) {
    memory[0][run][lane] = all.count, memory[1][run][lane] = all.mean, memory[2][run][lane] = all.square;
    __syncthreads();
    if (run < half) {
      const Moments other{memory[0][run + half][lane], memory[1][run + half][lane], memory[2][run + half][lane]};
      if (other.count > 0) all = join(all, other);
    }
    __syncthreads();
  }
  if (run == 0 && channel < C) mean[channel] = F(all.mean), variance[channel] = F(variance_of(all));
}

// What V channels of a row are shifted by and multiplied with.
template <class F, int V>
struct Factors {
  __device__ Factors(const F* mean_, const F* variance, const F* weight, const F* bias_, F eps, int64_t channel) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      mean[v] = mean_[channel + v], bias[v] = bias_[channel + v];
      invstd[v] = inverse_std(variance[channel + v], eps);
      scale[v] = weight[channel + v] * invstd[v];
    }
  }
  F mean[V], invstd[V], scale[V], bias[V];
};

template <class F>
struct Channels {  // [C] each
  const F *mean, *variance, *weight, *bias;
};

// 3) z, again too
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normalise_kernel(const T* __restrict__ x, const Channels<wide_t<T>> by, const NormSettings n,
                     T* __restrict__ out) {
  using F = wide_t<T>;
  const F slope = F(n.slope);
  const int64_t start = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t channel = int64_t(threadIdx.x) * V; channel < n.C; channel += int64_t(blockDim.x) * V) {
    const Factors<F, V> f(by.mean, by.variance, by.weight, by.bias, F(n.eps), channel);
#pragma unroll 4
    for (int64_t row = start; row < n.P; row += stride) {
      Vec<T, V> value = load<V>(x + row * n.C + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const F a = before_activation(F(value.value[v]), f.mean[v], f.scale[v], f.bias[v]);
        value.value[v] = narrow<T>(activate(a, a, slope));
      }
      store(out + row * n.C + channel, value);
    }
  }
}

// 4) backward, a block a part of the rows: sums of g and of g * (x - mean)
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gradient_sums_kernel(const T* __restrict__ gradient, const T* __restrict__ x, const Channels<wide_t<T>> by,
                         const NormSettings n, int64_t size, wide_t<T>* __restrict__ sums) {
  using F = wide_t<T>;
  const F slope = F(n.slope);
  const int64_t begin = int64_t(blockIdx.x) * size, end = min(begin + size, n.P);
  for (int64_t base = 0; base < n.C; base += int64_t(blockDim.x) * V) {
    const int64_t channel = base + int64_t(threadIdx.x) * V;
    const bool inside = channel < n.C;
    F sum[V] = {}, product[V] = {};
    if (inside) {
      const Factors<F, V> f(by.mean, by.variance, by.weight, by.bias, F(n.eps), channel);
#pragma unroll 2
      for (int64_t row = begin + threadIdx.y; row < end; row += blockDim.y) {
        const Vec<T, V> value = load<V>(x + row * n.C + channel), up = load<V>(gradient + row * n.C + channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const F d = F(value.value[v]) - f.mean[v];
          const F g = activate(multiply_add(d, f.scale[v], f.bias[v]), F(up.value[v]), slope);
          sum[v] += g;
          product[v] = multiply_add(g, d, product[v]);
        }
      }
    }
    sum_of_block<F, V>(sum, product, inside, channel, n.C, sums + int64_t(blockIdx.x) * 2 * n.C);
  }
}

// 5) the parts in order, in runs, then the runs
template <class F>
__global__ void __launch_bounds__(32 * kRuns, 1)
    join_gradients_kernel(const F* __restrict__ sums, const Parts parts, const F* __restrict__ variance,
                          const NormSettings n, F* __restrict__ to_weight, F* __restrict__ to_bias) {
  __shared__ double memory[2][kRuns][32];
  const int lane = int(threadIdx.x), run = int(threadIdx.y);
  const int64_t channel = int64_t(blockIdx.x) * 32 + lane;
  double sum = 0, product = 0;
  if (channel < n.C) {
    for (int64_t part = parts.num * run / kRuns; part < parts.num * (run + 1) / kRuns; ++part) {
      sum += double(sums[part * 2 * n.C + channel]);
      product += double(sums[(part * 2 + 1) * n.C + channel]);
    }
  }
  for (int half = kRuns / 2; half > 0; half /= 2) {
    memory[0][run][lane] = sum, memory[1][run][lane] = product;
    __syncthreads();
    if (run < half) sum += memory[0][run + half][lane], product += memory[1][run + half][lane];
    __syncthreads();
  }
  if (run == 0 && channel < n.C) {
    to_bias[channel] = F(sum);
    to_weight[channel] = F(product * double(inverse_std(variance[channel], F(n.eps))));
  }
}

// 6) of the rows: scale * g - constant - (x - mean) * factor
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    normalise_backward_kernel(const T* __restrict__ gradient, const T* __restrict__ x, const Channels<wide_t<T>> by,
                              const wide_t<T>* __restrict__ to_weight, const wide_t<T>* __restrict__ to_bias,
                              const NormSettings n, T* __restrict__ to_x) {
  using F = wide_t<T>;
  const F slope = F(n.slope);
  const int64_t start = int64_t(blockIdx.x) * blockDim.y + threadIdx.y, stride = int64_t(gridDim.x) * blockDim.y;
  for (int64_t channel = int64_t(threadIdx.x) * V; channel < n.C; channel += int64_t(blockDim.x) * V) {
    const Factors<F, V> f(by.mean, by.variance, by.weight, by.bias, F(n.eps), channel);
    F constant[V], factor[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      constant[v] = f.scale[v] * to_bias[channel + v] / F(n.P);
      factor[v] = f.scale[v] * f.invstd[v] * to_weight[channel + v] / F(n.P);
    }
#pragma unroll 2
    for (int64_t row = start; row < n.P; row += stride) {
      Vec<T, V> value = load<V>(x + row * n.C + channel);
      const Vec<T, V> up = load<V>(gradient + row * n.C + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const F d = F(value.value[v]) - f.mean[v];
        const F g = activate(multiply_add(d, f.scale[v], f.bias[v]), F(up.value[v]), slope);
        value.value[v] = narrow<T>(multiply_add(f.scale[v], g, -multiply_add(d, factor[v], constant[v])));
      }
      store(to_x + row * n.C + channel, value);
    }
  }
}

template <class F>
Channels<F> channels(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias) {
  return {data<F>(mean), data<F>(variance), data<F>(weight), data<F>(bias)};
}

template <class T, class F>
void normalise(const NormSettings& n, const Tensor& x, const Channels<F>& by, const Tensor& out, cudaStream_t stream) {
  for_vector<T>(n.C, {data<T>(x), data<T>(out)}, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    const dim3 block = block_for(n.C / V);
    normalise_kernel<T, V><<<num_blocks(n.P, block.y * kWalk), block, 0, stream>>>(data<T>(x), by, n,
                                                                                   mutable_data<T>(out));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> norm_activation(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   double eps, double slope) {
  const NormSettings n = norm_settings("norm_activation", x, {&weight, &bias}, eps, slope);
  const OnDevice device(x);
  const cudaStream_t stream = device.stream();
  Tensor out = empty_as(x, {n.P, n.C}, x.scalar_type());
  Tensor mean = zeros_as(weight, {n.C}, weight.scalar_type()), variance = zeros_as(weight, {n.C}, weight.scalar_type());
  if (n.P == 0 || n.C == 0) return {out, mean, variance};
  const Parts parts(n.P);
  Tensor sums = empty_as(weight, {parts.num, 2, n.C}, weight.scalar_type());
  for_floating("norm_activation", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    for_vector<T>(n.C, {data<T>(x)}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      moments_kernel<T, V><<<unsigned(parts.num), block_for(n.C / V), 0, stream>>>(data<T>(x), n.P, n.C, parts.size,
                                                                                   mutable_data<F>(sums));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    join_moments_kernel<T><<<num_blocks(n.C, 32), dim3(32, kRuns), 0, stream>>>(
        data<F>(sums), data<T>(x), parts, n.P, n.C, mutable_data<F>(mean), mutable_data<F>(variance));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    normalise<T>(n, x, channels<F>(mean, variance, weight, bias), out, stream);
  });
  return {out, mean, variance};
}

Tensor norm_activation_again(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                             const Tensor& bias, double eps, double slope) {
  const NormSettings n = norm_settings("norm_activation_again", x, {&mean, &variance, &weight, &bias}, eps, slope);
  const OnDevice device(x);
  Tensor out = empty_as(x, {n.P, n.C}, x.scalar_type());
  if (n.P == 0 || n.C == 0) return out;
  for_floating("norm_activation_again", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    normalise<T>(n, x, channels<wide_t<T>>(mean, variance, weight, bias), out, device.stream());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(const Tensor& gradient, const Tensor& x,
                                                            const Tensor& mean, const Tensor& variance,
                                                            const Tensor& weight, const Tensor& bias, double eps,
                                                            double slope) {
  const NormSettings n = norm_settings("norm_activation_backward", x, {&mean, &variance, &weight, &bias}, eps, slope);
  check_gradient(gradient, x);
  const OnDevice device(x);
  const cudaStream_t stream = device.stream();
  Tensor to_x = empty_as(x, {n.P, n.C}, x.scalar_type());
  Tensor to_weight = zeros_as(weight, {n.C}, weight.scalar_type());
  Tensor to_bias = zeros_as(weight, {n.C}, weight.scalar_type());
  if (n.P == 0 || n.C == 0) return {to_x, to_weight, to_bias};
  const Parts parts(n.P);
  Tensor sums = empty_as(weight, {parts.num, 2, n.C}, weight.scalar_type());
  for_floating("norm_activation_backward", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const Channels<F> by = channels<F>(mean, variance, weight, bias);
    for_vector<T>(n.C, {data<T>(x), data<T>(gradient), data<T>(to_x)}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const dim3 block = block_for(n.C / V);
      gradient_sums_kernel<T, V><<<unsigned(parts.num), block, 0, stream>>>(data<T>(gradient), data<T>(x), by, n,
                                                                            parts.size, mutable_data<F>(sums));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      join_gradients_kernel<F><<<num_blocks(n.C, 32), dim3(32, kRuns), 0, stream>>>(
          data<F>(sums), parts, data<F>(variance), n, mutable_data<F>(to_weight), mutable_data<F>(to_bias));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      normalise_backward_kernel<T, V><<<num_blocks(n.P, block.y * kWalk), block, 0, stream>>>(
          data<T>(gradient), data<T>(x), by, data<F>(to_weight), data<F>(to_bias), n, mutable_data<T>(to_x));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {to_x, to_weight, to_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("norm_activation", TORCH_BOX(&kdmos::norm_activation));
  m.impl("norm_activation_again", TORCH_BOX(&kdmos::norm_activation_again));
  m.impl("norm_activation_backward", TORCH_BOX(&kdmos::norm_activation_backward));
}

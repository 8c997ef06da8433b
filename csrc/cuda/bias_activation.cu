// x = leaky_relu(x + bias) in place, over rows [P, C]; the equation stands in bias_activation.h.
//
// Least work: x read once and written once; three operations a value: bytes decide. A thread keeps 16 bytes of channels
// for all its rows, so that it loads their bias once; neighbours stand in neighbouring channels, then rows.
#include "../bias_activation.h"

#include <algorithm>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // nothing is shared: as many blocks as fit hide the loads
constexpr int kBatch = 4;      // rows of a thread loaded before the first is stored: in place, a load waits for stores

// A block is (vectors of a row, rows); more vectors than threads are walked over.
template <class T, class B, int V>
__global__ void __launch_bounds__(kThreads)
    bias_activation_kernel(T* x, const B* __restrict__ bias, int64_t P, int64_t C, wide_t<T> slope) {
  using F = wide_t<T>;
  const int64_t step = int64_t(gridDim.x) * blockDim.y;
  for (int64_t c = int64_t(threadIdx.x) * V; c < C; c += int64_t(blockDim.x) * V) {
    F own[V];
#pragma unroll
    for (int v = 0; v < V; ++v) own[v] = F(bias[c + v]);
    for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < P; row += step * kBatch) {
      Vec<T, V> value[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b * step < P) value[b] = load<V>(x + (row + b * step) * C + c);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (row + b * step >= P) break;
#pragma unroll
        for (int v = 0; v < V; ++v) value[b].value[v] = T(biased_activation(F(value[b].value[v]), own[v], slope));
        store(x + (row + b * step) * C + c, value[b]);
      }
    }
  }
}

void bias_activation(const Tensor& x, const Tensor& bias, double slope) {
  const BiasSettings n = bias_settings(x, bias, slope);
  if (n.P == 0) return;
  const OnDevice device(x);
  for_types(x, bias, [&](auto type, auto bias_type) {
    using T = decltype(type);
    using B = decltype(bias_type);
    T* to = mutable_data<T>(x);
    for_vector<T>(n.C, {to}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const unsigned across = unsigned(std::min<int64_t>(n.C / V, kThreads));
      const dim3 block(across, kThreads / across);
      bias_activation_kernel<T, B, V><<<num_blocks(n.P, block.y * kBatch), block, 0, device.stream()>>>(
          to, data<B>(bias), n.P, n.C, wide_t<T>(n.slope));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("bias_activation", TORCH_BOX(&kdmos::bias_activation)); }

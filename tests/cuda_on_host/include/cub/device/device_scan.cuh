// CUB's prefix sum, as a loop on the host.
#pragma once
#include <cuda_runtime.h>
namespace cub {
struct DeviceScan {
  template <class I, class O>
  static cudaError_t InclusiveSum(void* scratch, size_t& bytes, I in, O* out, int n, cudaStream_t) {
    if (!scratch) { bytes = 77; return cudaSuccess; }
    if (bytes < 77) return cudaErrorInvalidValue;
    std::memset(scratch, 0xff, bytes);
    std::decay_t<decltype(in[0])> sum = 0;
    for (int i = 0; i < n; ++i) out[i] = sum = sum + in[i];
    return cudaSuccess;
  }
};
}

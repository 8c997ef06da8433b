// CUB's radix sort, as a stable sort on the host.
#pragma once
#include <cuda_runtime.h>
#include <algorithm>
#include <numeric>
#include <vector>
namespace cub {
struct DeviceRadixSort {
  template <class K, class V>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, const K* in, K* out, const V* vin, V* vout, int n, int b0, int b1, cudaStream_t) {
    if (!scratch) { bytes = 333; return cudaSuccess; }
    if (b0 < 0 || b1 > int(sizeof(K) * 8) || b1 <= b0 || bytes < 333) return cudaErrorInvalidValue;
    std::memset(scratch, 0xff, bytes);
    const uint64_t mask = b1 == 64 ? ~uint64_t(0) : (uint64_t(1) << b1) - 1;
    std::vector<int> o(n);
    std::iota(o.begin(), o.end(), 0);
    std::stable_sort(o.begin(), o.end(), [&](int a, int b) { return (uint64_t(in[a]) & mask) >> b0 < (uint64_t(in[b]) & mask) >> b0; });
    for (int i = 0; i < n; ++i) out[i] = in[o[i]], vout[i] = vin[o[i]];
    return cudaSuccess;
  }
};
}

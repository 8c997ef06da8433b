// to[index[i]] += rows[i].
//
// Bytes that must move: each row of `rows` once, of `to` twice. A thread takes a value; the threads of a warp share a
// row or stand in neighbouring ones. By atomics: a row of `to` may be named twice, and is then summed in no fixed order.
#include <algorithm>

#include "launch.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // nothing is shared: as many blocks as fit hide the loads

__device__ __forceinline__ void add(float* to, float value) { atomicAdd(to, value); }
__device__ __forceinline__ void add(double* to, double value) { atomicAdd(to, value); }

// The 16-bit types by comparing and swapping, which every architecture has that they have.
template <class T>
__device__ __forceinline__ void add(T* to, T value) {
  static_assert(sizeof(T) == sizeof(unsigned short));
  auto* word = reinterpret_cast<unsigned short*>(to);
  unsigned short before = *word, seen;
  do {
    seen = before;
    T sum;
    memcpy(&sum, &seen, sizeof(sum));
    sum = T(float(sum) + float(value));
    unsigned short after;
    memcpy(&after, &sum, sizeof(after));
    before = atomicCAS(word, seen, after);
  } while (before != seen);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    add_rows_kernel(const int64_t* __restrict__ index, const T* __restrict__ rows, int64_t M, int64_t C, int64_t values,
                    T* __restrict__ to) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < values; k += step) {
    const int64_t place = index[k / C];
    if (place >= 0 && place < M) add(to + place * C + k % C, rows[k]);
  }
}

void add_rows(const Tensor& to, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(to.dim() == 2 && rows.dim() == 2 && index.dim() == 1, "add_rows: to [M, C], index [N], rows [N, C]");
  const int64_t M = to.size(0), C = to.size(1), values = rows.numel();
  STD_TORCH_CHECK(rows.size(0) == index.numel() && rows.size(1) == C, "add_rows: rows [N, C] as the index and `to` say");
  STD_TORCH_CHECK(to.is_contiguous() && index.is_contiguous() && rows.is_contiguous(), "add_rows: contiguous tensors");
  STD_TORCH_CHECK(to.scalar_type() == rows.scalar_type() && index.scalar_type() == ScalarType::Long,
                  "add_rows: one floating type and an int64 index");
  if (values == 0) return;
  const OnDevice on(to);
  for_floating("add_rows", to.scalar_type(), [&](auto type) {
    using T = decltype(type);
    add_rows_kernel<<<num_blocks(values, kThreads), kThreads, 0, on.stream()>>>(
        data<int64_t>(index), data<T>(rows), M, C, values, mutable_data<T>(to));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("add_rows", TORCH_BOX(&kdmos::add_rows)); }

// out = points, but NaN in rows that hold anything not finite; and how many rows are so, or of odd remission.
//
// Least work: 16 bytes a row read, 16 written, about ten operations: bytes decide. A thread takes a row; a block
// counts at its barrier, and adds only what is not 0: for most scans nothing. Counts are integers: their order does not
// matter.
#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // nothing is shared: as many blocks as fit hide the loads

using Count = unsigned long long;

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000u) != 0x7f800000u; }

// A row by kSize values at a time: 4 where each begins at a multiple of 16 bytes.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    copy_scan_kernel(const float* __restrict__ points, int64_t stride, int64_t n, float most, float* __restrict__ out,
                     Count* __restrict__ counts) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  // the threads of a block stay together: base is the block's
  for (int64_t base = int64_t(blockIdx.x) * kThreads; base < n; base += step) {
    const int64_t i = base + threadIdx.x;
    bool bad = false, odd = false;
    if (i < n) {
      Vec<float, kSize> row[4 / kSize];
#pragma unroll
      for (int k = 0; k < 4 / kSize; ++k) row[k] = load<kSize>(points + i * stride + k * kSize);
#pragma unroll
      for (int k = 0; k < 4; ++k) bad |= !is_finite(row[k / kSize].value[k % kSize]);
      const float remission = row[3 / kSize].value[3 % kSize];
      odd = !bad && (remission < 0.0f || remission > most);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        float& value = row[k / kSize].value[k % kSize];
        value = bad ? __uint_as_float(0xffffffffu) : value;
      }
#pragma unroll
      for (int k = 0; k < 4 / kSize; ++k) store(out + i * 4 + k * kSize, row[k]);
    }
    const int num_bad = __syncthreads_count(bad), num_odd = __syncthreads_count(odd);
    if (threadIdx.x == 0 && num_bad) atomicAdd(&counts[0], Count(num_bad));
    if (threadIdx.x == 0 && num_odd) atomicAdd(&counts[1], Count(num_odd));
  }
}

Tensor copy_scan(const Tensor& points, const Tensor& out, double most) {
  const int64_t n = points.dim() == 2 ? points.size(0) : -1;
  STD_TORCH_CHECK(n >= 0 && points.size(1) == 4 && points.stride(1) == 1 && points.scalar_type() == ScalarType::Float,
                  "copy_scan: expected float32 points [n, 4], each row whole in memory");
  check_tensor("copy_scan", "out", out, ScalarType::Float, {n, 4}, points);
  const OnDevice device(points);
  Tensor counts = empty_as(points, {2}, ScalarType::Long);
  STD_CUDA_CHECK(cudaMemsetAsync(counts.mutable_data_ptr(), 0, 2 * sizeof(int64_t), device.stream()));
  if (n == 0) return counts;
  const int64_t stride = points.stride(0);
  const float* from = data<float>(points);
  float* to = mutable_data<float>(out);
  for_vector<float>(stride, {from, to}, [&](auto vector) {
    copy_scan_kernel<decltype(vector)::value><<<num_blocks(n, kThreads), kThreads, 0, device.stream()>>>(
        from, stride, n, float(most), to, reinterpret_cast<Count*>(counts.mutable_data_ptr()));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return counts;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("copy_scan", TORCH_BOX(&kdmos::copy_scan)); }

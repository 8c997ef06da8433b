// to[index[i]] += rows[i], where equal values of the index stand next to each other.
//
// Bytes that must move: the index, each row of `rows` once, of `to` twice; an addition a value. A team of lanes takes a
// row of `rows`, 16 bytes a lane; that of the first row of a run of equal places walks on to its last. So a row of `to`
// is one team's: no atomics, and the sum is that of the CPU, row by row in float32, or float64 for float64.
#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // nothing is shared: as many blocks as fit hide the loads
constexpr int kBlocks = 6;     // of a multiprocessor, at least: no registers spilled

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    add_rows_kernel(const int64_t* __restrict__ index, const T* __restrict__ rows, int64_t M, int64_t N, int64_t C,
                    int width, wide_t<T>* __restrict__ to) {
  using F = wide_t<T>;
  const int teams = kThreads / width, team = int(threadIdx.x) / width, lane = int(threadIdx.x) % width;
  const int64_t stride = int64_t(gridDim.x) * teams;
  for (int64_t first = int64_t(blockIdx.x) * teams + team; first < N; first += stride) {
    const int64_t place = index[first];
    if (uint64_t(place) >= uint64_t(M) || (first > 0 && index[first - 1] == place)) continue;
    for (int64_t c = int64_t(lane) * kVector; c < C; c += int64_t(width) * kVector) {
      Vec<F, kVector> sum = load<kVector>(to + place * C + c);
      for (int64_t i = first; i < N && index[i] == place; ++i) {
        const Vec<T, kVector> row = load<kVector>(rows + i * C + c);
#pragma unroll
        for (int k = 0; k < kVector; ++k) sum.value[k] += F(row.value[k]);
      }
      store(to + place * C + c, sum);
    }
  }
}

void add_rows(const Tensor& to, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(to.is_cuda() && to.dim() == 2 && rows.dim() == 2, "add_rows: to [M, C] on the GPU, rows [N, C]");
  const ScalarType dtype = rows.scalar_type();
  const int64_t M = to.size(0), C = to.size(1), N = rows.size(0);
  check_tensor("add_rows", "to", to, dtype == ScalarType::Double ? dtype : ScalarType::Float, {M, C}, to);
  check_tensor("add_rows", "index", index, ScalarType::Long, {N}, to);
  check_tensor("add_rows", "rows", rows, dtype, {N, C}, to);
  if (N * C == 0) return;
  const OnDevice device(to);
  for_floating("add_rows", dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(rows);
    wide_t<T>* sums = mutable_data<wide_t<T>>(to);
    for_vector<T>(C, {from, sums}, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int width = team_width(C / kVector);
      add_rows_kernel<T, kVector><<<num_blocks(N, kThreads / width), kThreads, 0, device.stream()>>>(
          data<int64_t>(index), from, M, N, C, width, sums);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("add_rows", TORCH_BOX(&kdmos::add_rows)); }

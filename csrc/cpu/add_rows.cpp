// to[index[i]] += rows[i], row by row in the order of i.
//
// Bytes that must move: each row of `rows` once, of `to` twice; an addition a value, in float32, float64 for float64. A
// thread owns a range of `to` and looks through all of the index for it: no atomics, and the order is kept.
#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kLeast = 1 << 16;  // elements below which one thread is enough

void add_rows(const Tensor& to, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(to.dim() == 2 && rows.dim() == 2, "add_rows: to [M, C], rows [N, C]");
  const ScalarType dtype = rows.scalar_type();
  const int64_t M = to.size(0), C = to.size(1), N = rows.size(0);
  check_tensor("add_rows", "to", to, dtype == ScalarType::Double ? dtype : ScalarType::Float, {M, C}, to);
  check_tensor("add_rows", "index", index, ScalarType::Long, {N}, to);
  check_tensor("add_rows", "rows", rows, dtype, {N, C}, to);
  const int64_t* place = data<int64_t>(index);
  check_within("add_rows: the index", place, N, M);
  for_floating("add_rows", dtype, [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    F* sums = mutable_data<F>(to);
    const T* from = data<T>(rows);
    const int64_t owners = N * C < kLeast ? 1 : num_threads();
    torch::stable::parallel_for(0, owners, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = share(M, owners, begin), last = share(M, owners, end);
      for (int64_t i = 0; i < N; ++i) {
        if (place[i] < first || place[i] >= last) continue;
        F* __restrict__ sum = sums + place[i] * C;
        const T* __restrict__ row = from + i * C;
        for (int64_t c = 0; c < C; ++c) sum[c] += F(row[c]);
      }
    });
  });
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("add_rows", TORCH_BOX(&kdmos::add_rows)); }

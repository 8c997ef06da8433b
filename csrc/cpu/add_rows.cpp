// to[index[i]] += rows[i], row by row in the order of i.
//
// Bytes that must move: each row of `rows` once, of `to` twice; nothing is computed. A thread owns a range of `to` and looks through all of the index for it: no atomics, and the order is kept.
#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kLeast = 1 << 16;  // elements below which one thread is enough

void add_rows(const Tensor& to, const Tensor& index, const Tensor& rows) {
  STD_TORCH_CHECK(to.dim() == 2 && rows.dim() == 2 && index.dim() == 1, "add_rows: to [M, C], index [N], rows [N, C]");
  const int64_t M = to.size(0), C = to.size(1), N = index.numel();
  STD_TORCH_CHECK(rows.size(0) == N && rows.size(1) == C, "add_rows: rows [N, C] as the index and `to` say");
  STD_TORCH_CHECK(to.is_contiguous() && index.is_contiguous() && rows.is_contiguous(), "add_rows: contiguous tensors");
  STD_TORCH_CHECK(to.scalar_type() == rows.scalar_type() && index.scalar_type() == ScalarType::Long,
                  "add_rows: one floating type and an int64 index");
  const int64_t* place = data<int64_t>(index);
  bool good = true;
  for (int64_t i = 0; i < N; ++i) good &= (place[i] >= 0) & (place[i] < M);
  STD_TORCH_CHECK(good, "add_rows: the index must lie within 0 and ", M);
  for_floating("add_rows", to.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    T* sums = mutable_data<T>(to);
    const T* from = data<T>(rows);
    const int64_t owners = N * C < kLeast ? 1 : num_threads();
    torch::stable::parallel_for(0, owners, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = share(M, owners, begin), last = share(M, owners, end);
      for (int64_t i = 0; i < N; ++i) {
        if (place[i] < first || place[i] >= last) continue;
        T* __restrict__ sum = sums + place[i] * C;
        const T* __restrict__ row = from + i * C;
        for (int64_t c = 0; c < C; ++c) sum[c] = narrow<T>(F(sum[c]) + F(row[c]));
      }
    });
  });
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("add_rows", TORCH_BOX(&kdmos::add_rows)); }

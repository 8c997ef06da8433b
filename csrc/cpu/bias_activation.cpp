// x = leaky_relu(x + bias) in place, over rows [P, C]; the equation stands in bias_activation.h.
//
// Least work: x read once and written once; three operations a value: bytes decide. The bias is repeated until it is
// worth a vector, so that few channels are as quick as many.
#include "../bias_activation.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 16;  // values, about 20 us of work
constexpr int64_t kRepeated = 256;   // values of the repeated bias, about: a few vectors, in L1

template <class T, class F>
void activate_rows(T* __restrict__ x, const F* __restrict__ bias, F slope, int64_t size) {
#pragma omp simd
  for (int64_t k = 0; k < size; ++k) x[k] = narrow<T>(biased_activation(F(x[k]), bias[k], slope));
}

void bias_activation(const Tensor& x, const Tensor& bias, double slope) {
  const BiasSettings n = bias_settings(x, bias, slope);
  if (n.P == 0) return;
  for_types(x, bias, [&](auto type, auto bias_type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const auto* from = data<decltype(bias_type)>(bias);
    const int64_t rows = std::max<int64_t>(1, kRepeated / n.C);  // that are done together
    std::vector<F> repeated(rows * n.C);
    for (int64_t k = 0; k < rows * n.C; ++k) repeated[k] = F(from[k % n.C]);
    T* to = mutable_data<T>(x);
    torch::stable::parallel_for(0, n.P, std::max<int64_t>(1, kGrain / n.C), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row += rows) {
        activate_rows(to + row * n.C, repeated.data(), F(n.slope), std::min(rows, end - row) * n.C);
      }
    });
  });
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("bias_activation", TORCH_BOX(&kdmos::bias_activation)); }

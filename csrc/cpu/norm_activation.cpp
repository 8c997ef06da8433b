// Batch norm in training and LeakyReLU on rows [P, C]; the equations stand in norm_activation.h.
//
// Least work: forward x read twice and written once, backward x and gradient read twice and written once; 3 to 8
// operations a value. Bytes decide. Sums are made over chunks of rows in the type of the sums, those of a chunk in L1,
// and joined in float64 in order, so that neither threads nor their number change the result.
#include "../norm_activation.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kChunk = 256;      // rows: few enough for sums in float32
constexpr int kRows = 8;             // of them, added up in registers before the sums in L1 are touched
constexpr int64_t kGrain = 1 << 15;  // values a thread takes at least

// body(index of a chunk, its first row, its rows)
template <class Body>
void for_chunks(const NormSettings& n, const Body& body) {
  const int64_t chunks = (n.P + kChunk - 1) / kChunk, grain = kGrain / (kChunk * std::max<int64_t>(1, n.C));
  torch::stable::parallel_for(0, chunks, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) body(k, k * kChunk, std::min(kChunk, n.P - k * kChunk));
  });
}

// Sums over each chunk: two a channel.
template <class F>
struct Sums {
  explicit Sums(const NormSettings& n) : C(n.C), chunks((n.P + kChunk - 1) / kChunk), values(chunks * 2 * C) {}
  F* first(int64_t chunk) const { return values + chunk * 2 * C; }
  F* second(int64_t chunk) const { return first(chunk) + C; }

  int64_t C, chunks;
  Scratch<F> values;
};

// What the rows are shifted by and multiplied with, by channel.
template <class F>
struct Factors {
  Factors(const NormSettings& n, const Tensor& mean_, const Tensor& variance, const Tensor& weight, const Tensor& bias_)
      : mean(data<F>(mean_)), bias(data<F>(bias_)), slope(F(n.slope)), invstd(n.C), scale(n.C) {
    for (int64_t c = 0; c < n.C; ++c) {
      invstd[c] = inverse_std(data<F>(variance)[c], F(n.eps));
      scale[c] = data<F>(weight)[c] * invstd[c];
    }
  }
  const F *mean, *bias;
  F slope;
  std::vector<F> invstd, scale;
};

// Adds d and d * d, d = x - shift, of kCount rows.
template <int kCount, class T, class F>
void add_moments(const T* __restrict__ x, const T* __restrict__ shift, int64_t C, F* __restrict__ sum,
                 F* __restrict__ square) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    F s = 0, q = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const F d = F(x[i * C + c]) - F(shift[c]);
      s += d;
      q = multiply_add(d, d, q);
    }
    sum[c] += s;
    square[c] += q;
  }
}

template <class T, class F>
void normalise(const T* __restrict__ x, const F* __restrict__ mean, const F* __restrict__ scale,
               const F* __restrict__ bias, F slope, int64_t C, T* __restrict__ out) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const F a = before_activation(F(x[c]), mean[c], scale[c], bias[c]);
    out[c] = narrow<T>(activate(a, a, slope));
  }
}

// Adds g and g * (x - mean) of kCount rows.
template <int kCount, class T, class F>
void add_gradients(const T* __restrict__ gradient, const T* __restrict__ x, const F* __restrict__ mean,
                   const F* __restrict__ scale, const F* __restrict__ bias, F slope, int64_t C, F* __restrict__ sum,
                   F* __restrict__ product) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    F s = 0, p = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const F d = F(x[i * C + c]) - mean[c];
      const F g = activate(multiply_add(d, scale[c], bias[c]), F(gradient[i * C + c]), slope);
      s += g;
      p = multiply_add(g, d, p);
    }
    sum[c] += s;
    product[c] += p;
  }
}

// scale * g - constant - (x - mean) * factor
template <class T, class F>
void normalise_backward(const T* __restrict__ gradient, const T* __restrict__ x, const F* __restrict__ mean,
                        const F* __restrict__ scale, const F* __restrict__ bias, F slope,
                        const F* __restrict__ constant, const F* __restrict__ factor, int64_t C, T* __restrict__ to) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    const F d = F(x[c]) - mean[c];
    const F g = activate(multiply_add(d, scale[c], bias[c]), F(gradient[c]), slope);
    to[c] = narrow<T>(multiply_add(scale[c], g, -multiply_add(d, factor[c], constant[c])));
  }
}

template <class T, class F>
void statistics(const NormSettings& n, const T* x, F* mean, F* variance) {
  // 1) sums of each chunk, of distances from its first row
  const Sums<F> sums(n);
  for_chunks(n, [&](int64_t k, int64_t first, int64_t rows) {
    const T* shift = x + first * n.C;
    F *sum = sums.first(k), *square = sums.second(k);
    std::fill(sum, sum + 2 * n.C, F(0));
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) add_moments<kRows>(shift + r * n.C, shift, n.C, sum, square);
    for (; r < rows; ++r) add_moments<1>(shift + r * n.C, shift, n.C, sum, square);
  });
  // 2) joined in order
  std::vector<Moments> all(n.C, Moments{0, 0, 0});
  for (int64_t k = 0; k < sums.chunks; ++k) {
    const double rows = double(std::min(kChunk, n.P - k * kChunk));
    const T* shift = x + k * kChunk * n.C;
    for (int64_t c = 0; c < n.C; ++c) {
      all[c] = join(all[c], moments_of(rows, double(F(shift[c])), double(sums.first(k)[c]), double(sums.second(k)[c])));
    }
  }
  for (int64_t c = 0; c < n.C; ++c) mean[c] = F(all[c].mean), variance[c] = F(variance_of(all[c]));
}

template <class T, class F>
void apply(const NormSettings& n, const T* x, const Factors<F>& by, T* out) {
  for_chunks(n, [&](int64_t, int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
      normalise(x + r * n.C, by.mean, by.scale.data(), by.bias, by.slope, n.C, out + r * n.C);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> norm_activation(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   double eps, double slope) {
  const NormSettings n = norm_settings("norm_activation", x, {&weight, &bias}, eps, slope);
  Tensor out = empty_as(x, {n.P, n.C}, x.scalar_type());
  Tensor mean = empty_as(weight, {n.C}, weight.scalar_type()), variance = empty_as(weight, {n.C}, weight.scalar_type());
  for_floating("norm_activation", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    statistics(n, data<T>(x), mutable_data<F>(mean), mutable_data<F>(variance));
    apply(n, data<T>(x), Factors<F>(n, mean, variance, weight, bias), mutable_data<T>(out));
  });
  return {out, mean, variance};
}

Tensor norm_activation_again(const Tensor& x, const Tensor& mean, const Tensor& variance, const Tensor& weight,
                             const Tensor& bias, double eps, double slope) {
  const NormSettings n = norm_settings("norm_activation_again", x, {&mean, &variance, &weight, &bias}, eps, slope);
  Tensor out = empty_as(x, {n.P, n.C}, x.scalar_type());
  for_floating("norm_activation_again", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    apply(n, data<T>(x), Factors<wide_t<T>>(n, mean, variance, weight, bias), mutable_data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_activation_backward(const Tensor& gradient, const Tensor& x,
                                                            const Tensor& mean, const Tensor& variance,
                                                            const Tensor& weight, const Tensor& bias, double eps,
                                                            double slope) {
  const NormSettings n = norm_settings("norm_activation_backward", x, {&mean, &variance, &weight, &bias}, eps, slope);
  check_gradient(gradient, x);
  Tensor to_x = empty_as(x, {n.P, n.C}, x.scalar_type());
  Tensor to_weight = empty_as(weight, {n.C}, weight.scalar_type());
  Tensor to_bias = empty_as(weight, {n.C}, weight.scalar_type());
  for_floating("norm_activation_backward", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const Factors<F> by(n, mean, variance, weight, bias);
    const T *row = data<T>(x), *up = data<T>(gradient);
    // 1) sums of g and of g * (x - mean): of each chunk, then joined in order
    const Sums<F> sums(n);
    for_chunks(n, [&](int64_t k, int64_t first, int64_t rows) {
      F *sum = sums.first(k), *product = sums.second(k);
      std::fill(sum, sum + 2 * n.C, F(0));
      const auto add = [&](auto count, int64_t r) {
        add_gradients<decltype(count)::value>(up + r * n.C, row + r * n.C, by.mean, by.scale.data(), by.bias, by.slope,
                                              n.C, sum, product);
      };
      int64_t r = first;
      for (; r + kRows <= first + rows; r += kRows) add(std::integral_constant<int, kRows>{}, r);
      for (; r < first + rows; ++r) add(std::integral_constant<int, 1>{}, r);
    });
    std::vector<double> sum(n.C, 0), product(n.C, 0);
    for (int64_t k = 0; k < sums.chunks; ++k) {
      for (int64_t c = 0; c < n.C; ++c) sum[c] += sums.first(k)[c], product[c] += sums.second(k)[c];
    }
    // 2) of the rows
    std::vector<F> constant(n.C), factor(n.C);
    for (int64_t c = 0; c < n.C; ++c) {
      const F g = F(sum[c]), p = F(product[c] * by.invstd[c]);
      mutable_data<F>(to_bias)[c] = g, mutable_data<F>(to_weight)[c] = p;
      constant[c] = by.scale[c] * g / F(n.P), factor[c] = by.scale[c] * by.invstd[c] * p / F(n.P);
    }
    for_chunks(n, [&](int64_t, int64_t first, int64_t rows) {
      for (int64_t r = first; r < first + rows; ++r) {
        normalise_backward(up + r * n.C, row + r * n.C, by.mean, by.scale.data(), by.bias, by.slope, constant.data(),
                           factor.data(), n.C, mutable_data<T>(to_x) + r * n.C);
      }
    });
  });
  return {to_x, to_weight, to_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("norm_activation", TORCH_BOX(&kdmos::norm_activation));
  m.impl("norm_activation_again", TORCH_BOX(&kdmos::norm_activation_again));
  m.impl("norm_activation_backward", TORCH_BOX(&kdmos::norm_activation_backward));
}

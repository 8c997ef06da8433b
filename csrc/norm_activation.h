// The arithmetic of batch norm and LeakyReLU that CPU and GPU share.
//
//   forward   z = f(a), a = (x - mean) * scale + bias, scale = weight * invstd, invstd = 1 / sqrt(variance + eps),
//             f(a) = a if a > 0 else slope * a
//   backward  g = gradient * f'(a), to_bias = sum of g, to_weight = sum of g * (x - mean) * invstd,
//             to_x = scale * (g - to_bias / P - (x - mean) * invstd * to_weight / P)
#pragma once

#include "common.h"

namespace kdmos {

struct NormSettings {
  int64_t P, C;
  double eps, slope;
};

// Number, mean and sum of squared distances from the mean, in float64.
struct Moments {
  double count, mean, square;
};

// Of the `count` > 0 values that differ from `shift` by d, from the sums of d and of d * d. Where shift is one of the
// values the two terms of `square` do not cancel: it is 1 / (count + 1) of the first at least.
KDMOS_BOTH Moments moments_of(double count, double shift, double sum, double sum_square) {
  return {count, shift + sum / count, sum_square - sum * (sum / count)};
}

// Of both together; not both empty. (Chan, Golub and LeVeque 1979.)
KDMOS_BOTH Moments join(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, share = b.count / count, distance = b.mean - a.mean;
  return {count, a.mean + distance * share, a.square + b.square + distance * distance * (a.count * share)};
}

KDMOS_BOTH double variance_of(const Moments& m) {
  return m.square < 0 ? 0 : m.square / (m.count > 0 ? m.count : 1);  // so put, NaN remains
}

template <class F>
KDMOS_BOTH F inverse_std(F variance, F eps) {
  return F(1) / std::sqrt(variance + eps);
}

template <class F>
KDMOS_BOTH F before_activation(F x, F mean, F scale, F bias) {
  return multiply_add(x - mean, scale, bias);
}

// f(a) where `value` is a, g where it is the gradient. The product is always made: no branch to keep out of vectors.
template <class F>
KDMOS_BOTH F activate(F a, F value, F slope) {
  return value * (a > F(0) ? F(1) : slope);
}

inline NormSettings norm_settings(const char* op, const Tensor& x, std::initializer_list<const Tensor*> channels,
                                  double eps, double slope) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), op, ": expected contiguous rows [P, C]");
  const bool is_double = x.scalar_type() == ScalarType::Double;
  for (const Tensor* each : channels) {
    STD_TORCH_CHECK(each->dim() == 1 && each->size(0) == x.size(1) && each->is_contiguous() &&
                        each->scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float) &&
                        each->is_cuda() == x.is_cuda() && each->get_device_index() == x.get_device_index(),
                    op, ": statistics and parameters are [C] on the rows' device, float32, or float64 as the rows");
  }
  return {x.size(0), x.size(1), eps, slope};
}

inline void check_gradient(const Tensor& gradient, const Tensor& x) {
  STD_TORCH_CHECK(gradient.dim() == 2 && gradient.size(0) == x.size(0) && gradient.size(1) == x.size(1) &&
                      gradient.is_contiguous() && gradient.scalar_type() == x.scalar_type() &&
                      gradient.is_cuda() == x.is_cuda() && gradient.get_device_index() == x.get_device_index(),
                  "norm_activation_backward: expected a contiguous gradient of the rows' shape, type and device");
}

}  // namespace kdmos

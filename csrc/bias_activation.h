// What CPU and GPU share of x = f(x + bias), f(a) = a if a > 0 else slope * a.
#pragma once

#include "common.h"

namespace kdmos {

template <class F>
KDMOS_BOTH F biased_activation(F x, F bias, F slope) {
  const F a = x + bias;
  return a * (a > F(0) ? F(1) : slope);  // the product is always made: no branch to keep out of vectors
}

struct BiasSettings {
  int64_t P, C;  // rows [P, C]: of an image its pixels
  double slope;
};

inline BiasSettings bias_settings(const Tensor& x, const Tensor& bias, double slope) {
  STD_TORCH_CHECK(x.dim() == 2 ? x.is_contiguous() : x.dim() == 4 && nhwc(x).is_contiguous(),
                  "bias_activation: expected contiguous rows [N, C], or an image [B, C, H, W] that is channels last");
  const int64_t C = x.size(1);
  STD_TORCH_CHECK(bias.scalar_type() == x.scalar_type() || bias.scalar_type() == ScalarType::Float,
                  "bias_activation: the bias is of the type of x or float32");
  check_tensor("bias_activation", "bias", bias, bias.scalar_type(), {C}, x);
  STD_TORCH_CHECK(slope >= 0 && slope <= 1, "bias_activation: a slope from 0 to 1");
  return {C ? x.numel() / C : 0, C, slope};
}

// body(T{}, the bias's type) of x and bias.
template <class Body>
void for_types(const Tensor& x, const Tensor& bias, const Body& body) {
  for_floating("bias_activation", x.scalar_type(), [&](auto type) {
    if (bias.scalar_type() == ScalarType::Float) return body(type, float{});
    body(type, type);
  });
}

}  // namespace kdmos

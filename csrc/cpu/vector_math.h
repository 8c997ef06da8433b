// exp and log without calls and branches, so that the compiler turns loops over them into vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common.h"

namespace kdmos {

// e^x for x <= 88, relative error below 2e-7; 0 below -87.
inline float exponential(float x) {
  constexpr float kLog2e = 1.44269504088896341f, kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2 in two parts
  const float clipped = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(clipped * kLog2e);
  const float r = multiply_add(n, -kLow, multiply_add(n, -kHigh, clipped));  // [-ln 2 / 2, ln 2 / 2]
  float p = 1.0f / 5040.0f;  // Taylor: the next term is 5e-9
  p = multiply_add(p, r, 1.0f / 720.0f);
  p = multiply_add(p, r, 1.0f / 120.0f);
  p = multiply_add(p, r, 1.0f / 24.0f);
  p = multiply_add(p, r, 1.0f / 6.0f);
  p = multiply_add(p, r, 0.5f);
  p = multiply_add(p, r, 1.0f);
  p = multiply_add(p, r, 1.0f);
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : p * power;
}

// 2^x for x <= 127, relative error below 1e-7 and vanishing towards whole x; 2^-125 below -125.
inline float exponential2(float x) {
  const float clipped = x < -125.0f ? -125.0f : x;
  const float n = std::nearbyint(clipped);
  const float r = clipped - n;  // [-1/2, 1/2], exact
  float p = 1.535336e-4f;  // best in the relative error, 1.6e-8 with these rounded numbers
  p = multiply_add(p, r, 1.3398875e-3f);
  p = multiply_add(p, r, 9.618437e-3f);
  p = multiply_add(p, r, 5.5503324e-2f);
  p = multiply_add(p, r, 0.24022648f);
  p = multiply_add(p, r, 0.6931472f);
  p = multiply_add(p, r, 1.0f);
  int32_t bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits += int32_t(n) << 23;  // p >= 1 / sqrt(2): its exponent stays that of a normal number
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

// ln x for normal x > 0, absolute error below 2e-7 near 1.
inline float logarithm(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  // x = m 2^e with m in [sqrt(1/2), sqrt(2))
  const int32_t shifted = bits - 0x3f3504f3, exponent = shifted >> 23;
  const int32_t mantissa = (shifted & 0x007fffff) + 0x3f3504f3;
  float m;
  std::memcpy(&m, &mantissa, sizeof(m));
  // ln m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172
  const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
  float series = multiply_add(q, 2.0f / 9.0f, 2.0f / 7.0f);
  series = multiply_add(series, q, 2.0f / 5.0f);
  series = multiply_add(series, q, 2.0f / 3.0f);
  return multiply_add(float(exponent), 0.693147180559945f, multiply_add(s * q, series, 2.0f * s));
}

inline double exponential(double x) { return std::exp(x); }
inline double exponential2(double x) { return std::exp2(x); }
inline double logarithm(double x) { return std::log(x); }

// ln(1 + e) for 0 <= e <= 1, exact to rounding for small e too.
template <class F>
inline F logarithm_of_one_plus(F e) {
  const F w = 1 + e;
  return logarithm(w) + (e - (w - 1)) / w;  // what 1 + e lost
}

}  // namespace kdmos

// Where a point lies: the polar grid of the student and the range grid of the residuals.
#pragma once

#include "common.h"

namespace kdmos {

// a * b + c, fused where the processor can.
KDMOS_BOTH double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__CUDA_ARCH__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// atan2(y, x), correct to the last bit of float but for about one value in a thousand.
//
// On the CPU a polynomial in float64 (interpolated at Chebyshev nodes, error 7e-11) that the compiler vectorises.
KDMOS_BOTH float angle(float y, float x) {
#ifdef __CUDA_ARCH__
  return atan2f(y, x);
#else
  const float ax = std::fabs(x), ay = std::fabs(y);
  const float high = ax > ay ? ax : ay, low = ax > ay ? ay : ax;
  const double t = high > 0.0f ? double(low) / double(high) : 0.0, u = t * t;
  constexpr double kSeries[] = {
      0.9999999999293034,   -0.3333333129088546,   0.19999901102031373,   -0.14283813253845248,
      0.11091922949633487,  -0.08974171895628882,  0.07228278167635424,   -0.05395667730662497,
      0.033826215081032,    -0.015828319890303203, 0.004732482998793987,  -0.0006633952412764076};
  double p = kSeries[11];
#ifndef __CUDACC__
#pragma GCC unroll 11
#endif
  for (int k = 10; k >= 0; --k) p = multiply_add(p, u, kSeries[k]);
  double result = p * t;
  result = ay > ax ? 1.5707963267948966 - result : result;
  result = std::signbit(x) ? 3.141592653589793 - result : result;
  return std::copysign(float(result), y);
#endif
}

// floor((clip(v) - lower) / interval) in float64: an index must not depend on float32 rounding.
KDMOS_BOTH int polar_index(double v, double lower, double upper, double interval) {
  v = v < lower ? lower : v;
  v = v > upper ? upper : v;
  return int((v - lower) / interval);  // not negative: truncation is floor
}

// x x + y y + z z with every product rounded: a cell must not depend on who fuses.
KDMOS_BOTH float squared_norm(float x, float y, float z) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fadd_rn(__fmul_rn(x, x), __fmul_rn(y, y)), __fmul_rn(z, z));
#else
  return x * x + y * y + z * z;
#endif
}

struct ResidualGrid {
  int rows, columns;
  float max_range, low, high;          // metres; open bounds
  float min_ratio, min_height, max_height;
};

// Row-major cell of a point of the residual grid, -1 outside of it. NaN is outside.
KDMOS_BOTH int residual_cell(float x, float y, float z, const ResidualGrid& grid) {
  const float distance = std::sqrt(squared_norm(x, y, z));
  // & and not &&: no branches, so that the compiler makes vectors of it
  const bool inside = (distance > 0.0f) & (distance < grid.max_range) & (z > grid.low) & (z < grid.high);
  float row = 0.5f * (angle(y, x) / 3.14159265358979f + 1.0f) * float(grid.rows);
  float column = (1.0f - distance / grid.max_range) * float(grid.columns);
  const float last_row = float(grid.rows - 1), last_column = float(grid.columns - 1);
  row = inside ? row : 0.0f;  // NaN has no integer
  column = inside ? column : 0.0f;
  row = row > last_row ? last_row : row;
  column = column > last_column ? last_column : column;
  const int cell = int(row) * grid.columns + int(column);
  return inside ? cell : -1;
}

// What a cell keeps of first - second: see kdmos/ops/height_residual.py.
KDMOS_BOTH float height_difference(float first, float second, bool second_occluded, const ResidualGrid& grid) {
  const bool keep = (grid.min_ratio * first >= second) & !second_occluded & (first >= grid.min_height) &
                    (first <= grid.max_height);
  return keep ? first - second : 0.0f;
}

}  // namespace kdmos

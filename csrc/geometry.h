// Where a point lies: the polar grid of the student and the range grid of the residuals.
#pragma once

#include "common.h"

namespace kdmos {

// One row of a 3 x 4 transform: the same bits on CPU and GPU.
KDMOS_BOTH float transformed(const double* m, double x, double y, double z) {
  return float(multiply_add(m[2], z, multiply_add(m[1], y, multiply_add(m[0], x, m[3]))));
}

// a * b, rounded before anything is added to it: nvcc would fuse the two, the CPU's compiler is told not to.
KDMOS_BOTH float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

KDMOS_BOTH double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// atan2(y, x) by a polynomial without branches, which compilers vectorise; computed in F, the same on CPU and GPU.
// atan(t) / t in t^2 on [0, 1], interpolated at Chebyshev nodes: error 7e-11 in double, 2e-8 in float.
//
// In double, a point takes a division, 11 multiply-adds, 2 products and at most 2 subtractions: on a GPU about 25
// instructions of float64, 3 M a scan. That is below a microsecond where float64 runs at half the rate of float32, and
// some 5 where it runs at a 64th of it. It stays: in float a third of the angles are off, by up to two of their last
// digits, in double two in ten thousand by one; and the sectors near a border are those of the definition in float64.
template <class F>
KDMOS_BOTH float angle(float y, float x) {
  constexpr double kDouble[] = {
      0.9999999999293034,   -0.3333333129088546,   0.19999901102031373,   -0.14283813253845248,
      0.11091922949633487,  -0.08974171895628882,  0.07228278167635424,   -0.05395667730662497,
      0.033826215081032,    -0.015828319890303203, 0.004732482998793987,  -0.0006633952412764076};
  constexpr double kFloat[] = {0.9999999817886562,  -0.33333036709287395, 0.19991872029133478,
                                 -0.1419779779427397, 0.10618370637663439,  -0.07456854827461762,
                                 0.042137623605949366, -0.015731249132328082, 0.0027662835042828226};
  constexpr bool kIsDouble = sizeof(F) == sizeof(double);
  constexpr int kTerms = kIsDouble ? 12 : 9;
  const float ax = std::fabs(x), ay = std::fabs(y);
  const float high = ax > ay ? ax : ay, low = ax > ay ? ay : ax;
  const F t = high > 0.0f ? F(low) / F(high) : F(0), u = t * t;
  F p = F(kIsDouble ? kDouble[kTerms - 1] : kFloat[kTerms - 1]);
#ifndef __CUDACC__
#pragma GCC unroll 11
#endif
  for (int k = kTerms - 2; k >= 0; --k) p = multiply_add(p, u, F(kIsDouble ? kDouble[k] : kFloat[k]));
  F result = rounded_product(p, t);
  result = ay > ax ? F(1.5707963267948966) - result : result;
  result = std::signbit(x) ? F(3.141592653589793) - result : result;
  return std::copysign(float(result), y);
}

// floor((clip(v) - lower) / interval) in float64: an index must not depend on float32 rounding.
KDMOS_BOTH int polar_index(double v, double lower, double upper, double interval) {
  v = v < lower ? lower : v;
  v = v > upper ? upper : v;
  return int((v - lower) / interval);  // not negative: truncation is floor
}

// x x + y y + z z with every product rounded: a cell must not depend on who fuses.
KDMOS_BOTH float squared_norm(float x, float y, float z) {
  return rounded_product(x, x) + rounded_product(y, y) + rounded_product(z, z);
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
  float row = 0.5f * (angle<float>(y, x) / 3.14159265358979f + 1.0f) * float(grid.rows);
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

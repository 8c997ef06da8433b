// Products of matrices with AVX-512: of rows that lie anywhere, [rows, inputs], with packed weights [inputs, outputs].
#pragma once

#include "parallel.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace kdmos {

constexpr int64_t kLanes = 16;  // sums of a vector

inline __m512 load_sums(const float* from) { return _mm512_loadu_ps(from); }
inline void store_sums(float* to, __m512 sum) { _mm512_storeu_ps(to, sum); }

// What the inner loop does with inputs and weights of a type: kStep inputs at a time.
template <class T>
struct Vector;

template <>
struct Vector<float> {
  static constexpr int64_t kStep = 1;
  static __m512 load(const float* weight) { return _mm512_loadu_ps(weight); }
  static __m512 repeat(const float* input) { return _mm512_set1_ps(*input); }
  static __m512 add(__m512 sum, __m512 weight, __m512 input) { return _mm512_fmadd_ps(weight, input, sum); }
};

#if defined(__AVX512BF16__)
inline __m512 load_sums(const BFloat16* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}
inline void store_sums(BFloat16* to, __m512 sum) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(sum)); }

template <>
struct Vector<BFloat16> {
  static constexpr int64_t kStep = 2;  // products of pairs, added in float32
  static __m512bh load(const BFloat16* weight) { return (__m512bh)_mm512_loadu_si512(weight); }
  static __m512bh repeat(const BFloat16* input) {
    int32_t pair;
    std::memcpy(&pair, input, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static __m512 add(__m512 sum, __m512bh weight, __m512bh input) { return _mm512_dpbf16_ps(sum, weight, input); }
};
#endif

// LeakyReLU of a slope in [0, 1]; ReLU if it is 0, of minus infinity too, where a product would be NaN.
struct Activation {
  explicit Activation(float slope) : factor(_mm512_set1_ps(slope)), sloped(slope == 0.0f ? 0 : 0xffff) {}

  // The larger of x and slope * x; of x alone if that is NaN.
  KDMOS_BOTH __m512 operator()(__m512 x) const { return _mm512_max_ps(_mm512_maskz_mul_ps(sloped, x, factor), x); }

  __m512 factor;
  __mmask16 sloped;
};

// kRows x kVectors * 16 sums, in registers while all inputs pass.
template <class T, int kRows, int kVectors>
struct Sums {
  using V = Vector<T>;
  static constexpr int64_t kOutputs = kVectors * kLanes;

  KDMOS_BOTH explicit Sums(const float* bias) {
#pragma GCC unroll 32
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[row][v] = _mm512_loadu_ps(bias + v * kLanes);
    }
  }

  // `count` inputs of each row, from where from[row] points. Returns the weights of the next.
  KDMOS_BOTH const T* add(const T* const* from, int64_t count, const T* weight) {
    for (int64_t c = 0; c < count; c += V::kStep, weight += kOutputs * V::kStep) {
      decltype(V::load(weight)) weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = V::load(weight + v * kLanes * V::kStep);
#pragma GCC unroll 32
      for (int row = 0; row < kRows; ++row) {
        const auto input = V::repeat(from[row] + c);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[row][v] = V::add(sum[row][v], weights[v], input);
      }
    }
    return weight;
  }

  // LeakyReLU of the sums to to[row] + first, which may be of another type than the inputs.
  template <class To>
  KDMOS_BOTH void store(To* const* to, int64_t first, float slope) const {
    const Activation activation(slope);
#pragma GCC unroll 32
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store_sums(to[row] + first + v * kLanes, activation(sum[row][v]));
    }
  }

  // The largest sums of rows that follow each other to one place: a row that `goes_on` (all bits, or none) has the
  // place of the one before it, the first what an earlier block left there. NaN wins, as in torch.
  template <class To>
  KDMOS_BOTH void store_largest(To* const* to, int64_t first, const __mmask16* goes_on) const {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __m512 largest = load_sums(to[0] + first + v * kLanes);
#pragma GCC unroll 32
      for (int row = 0; row < kRows; ++row) {
        const __mmask16 stays = _mm512_cmp_ps_mask(largest, sum[row][v], _CMP_NLT_UQ) &
                                _mm512_cmp_ps_mask(sum[row][v], sum[row][v], _CMP_EQ_OQ);
        largest = _mm512_mask_mov_ps(sum[row][v], stays & goes_on[row], largest);
        store_sums(to[row] + first + v * kLanes, largest);
      }
    }
  }

  __m512 sum[kRows][kVectors];
};

}  // namespace kdmos

#endif

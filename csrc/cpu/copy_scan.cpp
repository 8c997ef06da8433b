// out = points, but NaN in rows that hold anything not finite; and how many rows are so, or of odd remission.
//
// Least work: 16 bytes a row read, 16 written, about three operations a value on its bits: bytes decide. A block is
// copied and then looked at in L1: first whether any of its values is not finite, in vectors over all of them; only
// then is a row a unit. Nothing branches inside a block. Counts are integers: threads do not change them.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 17;  // rows: fewer are copied before a second thread has woken up

constexpr int64_t kBlock = 256;      // rows: they stay in L1
constexpr uint64_t kExponent = 0x7f8000007f800000u, kOne = 0x0080000000800000u, kSign = 0x8000000080000000u;

// Two values as one word: an exponent of ones, which infinity and NaN have, carries into the sign's place.
inline uint64_t carry(uint64_t word) { return (word & kExponent) + kOne; }

inline bool is_odd(float remission, float most) { return (remission < 0.0f) | (remission > most); }

struct Counts {
  int64_t bad = 0, odd = 0;
};

// Makes rows NaN that hold anything not finite, and counts.
void look(float* __restrict__ rows, int64_t n, float most, Counts& counts) {
  uint64_t any = 0;
#pragma omp simd reduction(| : any)
  for (int64_t k = 0; k < 2 * n; ++k) {
    uint64_t word;
    std::memcpy(&word, rows + 2 * k, sizeof(word));
    any |= carry(word);
  }
  int32_t num_bad = 0, num_odd = 0;
  if ((any & kSign) == 0) {
#pragma omp simd reduction(+ : num_odd)
    for (int64_t i = 0; i < n; ++i) num_odd += is_odd(rows[i * 4 + 3], most);
  } else {
#pragma omp simd reduction(+ : num_bad, num_odd)
    for (int64_t i = 0; i < n; ++i) {
      uint64_t word[2];
      std::memcpy(word, rows + i * 4, sizeof(word));
      const bool bad = ((carry(word[0]) | carry(word[1])) & kSign) != 0, odd = is_odd(rows[i * 4 + 3], most);
      const uint64_t nan = bad ? ~uint64_t(0) : 0;
      word[0] |= nan, word[1] |= nan;
      std::memcpy(rows + i * 4, word, sizeof(word));
      num_bad += bad;
      num_odd += odd & !bad;
    }
  }
  counts.bad += num_bad, counts.odd += num_odd;
}

Tensor copy_scan(const Tensor& points, const Tensor& out, double most) {
  const int64_t n = points.dim() == 2 ? points.size(0) : -1;
  STD_TORCH_CHECK(n >= 0 && points.size(1) == 4 && points.stride(1) == 1 && points.scalar_type() == ScalarType::Float,
                  "copy_scan: expected float32 points [n, 4], each row whole in memory");
  check_tensor("copy_scan", "out", out, ScalarType::Float, {n, 4}, points);
  const int64_t stride = points.stride(0);
  const float* from = data<float>(points);
  float* to = mutable_data<float>(out);
  std::atomic<int64_t> num_bad{0}, num_odd{0};
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    Counts counts;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t size = std::min(kBlock, end - first);
      if (stride == 4) {
        std::memcpy(to + first * 4, from + first * 4, size * 16);
      } else {
        for (int64_t i = first; i < first + size; ++i) std::memcpy(to + i * 4, from + i * stride, 16);
      }
      look(to + first * 4, size, float(most), counts);
    }
    num_bad += counts.bad;
    num_odd += counts.odd;
  });
  Tensor counts = empty_as(points, {2}, ScalarType::Long);
  mutable_data<int64_t>(counts)[0] = num_bad;
  mutable_data<int64_t>(counts)[1] = num_odd;
  return counts;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("copy_scan", TORCH_BOX(&kdmos::copy_scan)); }

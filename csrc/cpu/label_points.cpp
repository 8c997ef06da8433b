// labels = raw[argmax of logits], probability = softmax(logits)[moving], in one pass.
//
// Least work: 4 C bytes a point read, 8 written; C exponentials, C comparisons and a division: they take
// longer than the bytes, which lie in a cache. Points stand in the lanes of a vector, class by class, block by block;
// two, three and four classes are constants, so that their columns are made by shuffles instead of one by one.
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 15;  // points, tens of microseconds of work
constexpr int64_t kMostClasses = 32;
constexpr int64_t kBlock = 128;  // points whose logits, maxima and sums stay in L1 while the classes go by

struct Classes {
  int64_t num;
  std::vector<uint32_t> raw;
  std::vector<float> is_moving;  // 1 for that class, else 0: a factor where a choice would be a branch
};

// kClasses of them, if that is known when this is compiled, else 0.
template <int64_t kClasses>
void label_rows(const float* logits, int64_t n, const Classes& classes, uint32_t* all_labels, float* all_own) {
  const int64_t C = kClasses ? kClasses : classes.num;
  float column[kClasses ? kClasses : kMostClasses][kBlock], most[kBlock], sum[kBlock], own[kBlock];
  uint32_t label[kBlock];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    // 1) by class
    const float* __restrict__ rows = logits + first * C;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t c = 0; c < C; ++c) column[c][i] = rows[i * C + c];
    }
    // 2) the largest; NaN is above all, as in torch, and of equal ones the first stays
    for (int64_t i = 0; i < size; ++i) most[i] = column[0][i], label[i] = classes.raw[0], sum[i] = own[i] = 0;
    for (int64_t c = 1; c < C; ++c) {
      const uint32_t raw = classes.raw[c];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float value = column[c][i], before = most[i];
        const bool better = (value > before) | ((value != value) & (before == before));
        most[i] = better ? value : before;
        label[i] = better ? raw : label[i];
      }
    }
    // 3) the share of the moving class
    for (int64_t c = 0; c < C; ++c) {
      const float is_moving = classes.is_moving[c];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float e = exponential(column[c][i] - most[i]);
        sum[i] += e;
        own[i] = multiply_add(e, is_moving, own[i]);
      }
    }
    for (int64_t i = 0; i < size; ++i) all_own[first + i] = own[i] / sum[i];
    std::copy_n(label, size, all_labels + first);
  }
}

void label_points(const Tensor& logits, int64_t moving, std::vector<int64_t> raw, const Tensor& labels,
                  const Tensor& probability) {
  const int64_t C = int64_t(raw.size());
  check_tensor("label_points", "logits", logits, ScalarType::Float, {-1, C}, logits);
  STD_TORCH_CHECK(C >= 1 && C <= kMostClasses && moving >= 0 && moving < C,
                  "label_points: 1 to 32 classes, the moving one among them");
  const int64_t n = logits.size(0);
  check_tensor("label_points", "labels", labels, ScalarType::UInt32, {n}, logits);
  check_tensor("label_points", "probability", probability, ScalarType::Float, {n}, logits);
  Classes classes{C, {raw.begin(), raw.end()}, std::vector<float>(C, 0.0f)};
  classes.is_moving[moving] = 1;
  const auto label = C == 2 ? label_rows<2> : C == 3 ? label_rows<3> : C == 4 ? label_rows<4> : label_rows<0>;
  const float* row = data<float>(logits);
  uint32_t* to = mutable_data<uint32_t>(labels);
  float* own = mutable_data<float>(probability);
  torch::stable::parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
    label(row + begin * C, end - begin, classes, to + begin, own + begin);
  });
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("label_points", TORCH_BOX(&kdmos::label_points)); }

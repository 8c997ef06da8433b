// Majority label of the points of each voxel, over the sorted points.
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 8192;  // voxels

Tensor voxel_label(const Tensor& labels, const Tensor& order, const Tensor& voxel_start, int64_t num_classes) {
  const int64_t V = voxel_start.size(0) - 1;
  Tensor winner = empty_as(labels, {V}, ScalarType::Byte);
  const uint8_t* label = data<uint8_t>(labels);
  const int64_t *sorted = data<int64_t>(order), *start = data<int64_t>(voxel_start);
  uint8_t* out = mutable_data<uint8_t>(winner);
  torch::stable::parallel_for(0, V, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> votes(num_classes + 1);
    for (int64_t v = begin; v < end; ++v) {
      const int64_t size = start[v + 1] - start[v];
      const int64_t* point = sorted + start[v];
      // labels outside the model's classes (255) vote too, as one class above all others
      int64_t best = size ? std::min<int64_t>(label[point[0]], num_classes) : 0;
      if (size > 1) {
        for (int64_t i = 0; i < size; ++i) ++votes[std::min<int64_t>(label[point[i]], num_classes)];
        best = 0;
        for (int64_t c = 1; c <= num_classes; ++c) best = votes[c] > votes[best] ? c : best;  // ties: lower class
        std::fill(votes.begin(), votes.end(), 0);
      }
      out[v] = best == num_classes ? 255 : uint8_t(best);
    }
  });
  return winner;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("voxel_label", TORCH_BOX(&kdmos::voxel_label)); }

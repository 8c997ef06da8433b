// Majority label of the points of each voxel, over the sorted points.
#include <algorithm>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 8192;  // voxels
constexpr int64_t kBlock = 256;   // voxels whose votes stay in L1

Tensor voxel_label(const Tensor& labels, const Tensor& order, const Tensor& voxel_start, int64_t num_classes) {
  STD_TORCH_CHECK(labels.dim() == 1 && num_classes >= 0, "voxel_label: labels [N], num_classes >= 0");
  const int64_t N = labels.size(0), V = voxel_start.numel() - 1;
  check_tensor("voxel_label", "labels", labels, ScalarType::Byte, {N}, labels);
  check_tensor("voxel_label", "order", order, ScalarType::Long, {N}, labels);
  check_tensor("voxel_label", "voxel_start", voxel_start, ScalarType::Long, {V + 1}, labels);
  STD_TORCH_CHECK(V >= 0, "voxel_label: voxel_start [V + 1]");
  check_ascending("voxel_label: voxel_start", data<int64_t>(voxel_start), V + 1, N + 1);
  check_within("voxel_label: order", data<int64_t>(order), N, N);
  Tensor winner = empty_as(labels, {V}, ScalarType::Byte);
  const uint8_t* label = data<uint8_t>(labels);
  const int64_t *sorted = data<int64_t>(order), *start = data<int64_t>(voxel_start);
  uint8_t* out = mutable_data<uint8_t>(winner);
  const uint8_t most = uint8_t(std::min<int64_t>(num_classes, 255));
  torch::stable::parallel_for(0, V, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> votes;
    std::vector<int32_t> changes, count(num_classes + 1);
    int64_t mixed[kBlock];
    for (int64_t low = begin; low < end; low += kBlock) {
      const int64_t high = std::min(end, low + kBlock), first = start[low], size = start[high] - first;
      // 1) what each point of a block of voxels says, and how many before it have said another thing than the last
      votes.resize(size + 1);
      changes.resize(size + 1);
      uint8_t *vote = votes.data(), before = 0;
      int32_t *changed = changes.data(), sum = 0;
      for (int64_t i = 0; i < size; ++i) {
        // labels outside the model's classes (255) vote too, as one class above all others
        const uint8_t own = std::min(label[sorted[first + i]], most);
        sum += own != before;
        changed[i] = sum;
        vote[i] = before = own;
      }
      // 2) the points of most voxels agree; the others' are counted
      int64_t num_mixed = 0;
      for (int64_t v = low; v < high; ++v) {
        const int64_t from = start[v] - first, to = start[v + 1] - first;
        const uint8_t own = from < to ? vote[from] : 0;
        out[v] = own == most ? 255 : own;
        mixed[num_mixed] = v;
        num_mixed += changed[std::max(from, to - 1)] != changed[from];
      }
      for (int64_t k = 0; k < num_mixed; ++k) {
        const int64_t v = mixed[k];
        for (int64_t i = start[v] - first; i < start[v + 1] - first; ++i) ++count[vote[i]];
        int64_t best = 0;
        for (int64_t c = 1; c <= num_classes; ++c) best = count[c] > count[best] ? c : best;  // ties: lower class
        out[v] = best == num_classes ? 255 : uint8_t(best);
        std::fill(count.begin(), count.end(), 0);
      }
    }
  });
  return winner;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("voxel_label", TORCH_BOX(&kdmos::voxel_label)); }

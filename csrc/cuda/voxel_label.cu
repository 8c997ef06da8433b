// Majority label of the points of each voxel, over the sorted points.
//
// Least work: 8 bytes of order and 1 of label a point, 9 a voxel; a few comparisons a point: bytes decide. A thread
// counts a voxel of few points in registers, its warp one of many in shared memory.
//
// What `order` and `start` hold is not read on the host: rows that they name outside of the labels are skipped.
#include <algorithm>

#include "launch.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 128;   // four warps: 4 kB of votes
constexpr int kBlocks = 12;     // of a multiprocessor, at least: no registers spilled
constexpr int kFew = 8;         // points whose labels fit in registers; most voxels have fewer
constexpr int kMaxVotes = 256;  // a label is a byte

using Key = unsigned long long;

// Largest for the most votes, then for the lowest class.
__device__ Key key_of(Key votes, int label) { return votes << 8 | Key(kMaxVotes - 1 - label); }

// What a point votes for, -1 without one; labels outside the model's classes (255) vote too, as one class above all.
__device__ int vote_of(const uint8_t* __restrict__ label, int64_t row, int64_t N, int num_classes) {
  return uint64_t(row) < uint64_t(N) ? min(int(label[row]), num_classes) : -1;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    voxel_label_kernel(const uint8_t* __restrict__ label, const int64_t* __restrict__ order,
                       const int64_t* __restrict__ start, int64_t N, int64_t V, int num_classes,
                       uint8_t* __restrict__ out) {
  __shared__ unsigned int all_votes[kThreads / 32][kMaxVotes];
  unsigned int* votes = all_votes[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  // the lanes of a warp stay together: base is the block's
  for (int64_t base = int64_t(blockIdx.x) * kThreads; base < V; base += stride) {
    const int64_t v = base + threadIdx.x;
    const int64_t first = v < V ? max(start[v], int64_t(0)) : 0, last = v < V ? min(start[v + 1], N) : 0;
    Key best = 0;

    // 1) few points: every label against every other
    if (last - first <= kFew) {
      int vote[kFew];
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        vote[i] = first + i < last ? vote_of(label, order[first + i], N, num_classes) : -1;
      }
#pragma unroll
      for (int i = 0; i < kFew; ++i) {
        int count = 0;
#pragma unroll
        for (int j = 0; j < kFew; ++j) count += vote[j] == vote[i];
        if (vote[i] >= 0) best = max(best, key_of(count, vote[i]));
      }
    }

    // 2) many points: one voxel after the other, with the whole warp
    unsigned int many = __ballot_sync(0xffffffff, last - first > kFew);
    while (many) {
      const int owner = __ffs(many) - 1;
      many &= many - 1;
      const int64_t from = __shfl_sync(0xffffffff, first, owner), to = __shfl_sync(0xffffffff, last, owner);
      for (int c = lane; c <= num_classes; c += 32) votes[c] = 0;
      __syncwarp();
      for (int64_t i = from + lane; i < to; i += 32) {
        const int vote = vote_of(label, order[i], N, num_classes);
        if (vote >= 0) atomicAdd(&votes[vote], 1u);
      }
      __syncwarp();
      Key most = 0;
      for (int c = lane; c <= num_classes; c += 32) most = max(most, key_of(votes[c], c));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) most = max(most, __shfl_xor_sync(0xffffffff, most, step));
      if (lane == owner) best = most;
      __syncwarp();  // all have read the votes
    }
    const int winner = best ? kMaxVotes - 1 - int(best & (kMaxVotes - 1)) : 0;  // no points: 0
    if (v < V) out[v] = winner == num_classes ? 255 : uint8_t(winner);
  }
}

Tensor voxel_label(const Tensor& labels, const Tensor& order, const Tensor& voxel_start, int64_t num_classes) {
  STD_TORCH_CHECK(labels.is_cuda() && labels.dim() == 1 && num_classes >= 0,
                  "voxel_label: labels [N] on the GPU, num_classes >= 0");
  const int64_t N = labels.size(0), V = voxel_start.numel() - 1;
  check_tensor("voxel_label", "labels", labels, ScalarType::Byte, {N}, labels);
  check_tensor("voxel_label", "order", order, ScalarType::Long, {N}, labels);
  check_tensor("voxel_label", "voxel_start", voxel_start, ScalarType::Long, {V + 1}, labels);
  STD_TORCH_CHECK(V >= 0, "voxel_label: voxel_start [V + 1]");
  const OnDevice device(labels);
  Tensor winner = empty_as(labels, {V}, ScalarType::Byte);
  if (V == 0) return winner;
  voxel_label_kernel<<<num_blocks(V, kThreads), kThreads, 0, device.stream()>>>(
      data<uint8_t>(labels), data<int64_t>(order), data<int64_t>(voxel_start), N, V,
      int(std::min<int64_t>(num_classes, kMaxVotes - 1)), mutable_data<uint8_t>(winner));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return winner;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("voxel_label", TORCH_BOX(&kdmos::voxel_label)); }

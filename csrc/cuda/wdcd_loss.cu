// Decoupled distillation in one pass: loss and its gradient together.
//
// With z = logits / T, t the target, q the softmax of the others and d = z_t - logsumexp(others), so that
// p_t = sigmoid(d):
//   NCKD = sum_k qT_k (zT_k - zS_k) - log(ST / SS),          dNCKD / dzS_k = qS_k - qT_k          (k != t)
//   TCKD = bT (log bT - log bS) + rT (log rT - log rS),      dTCKD / dzS_t = G,  dTCKD / dzS_k = -G qS_k
// with b = p_t, r = 1 - p_t and, where a floor f is added to every probability of the student, bS = p_t + f and
// rS = r + (C - 1) f:  G = rT p_t (r / rS) - bT r (p_t / bS), which is p_t - bT at f = 0.
//
// Least work: two rows of C logits and a label read, a gradient row written: 12 C + 1 bytes a point in float32 and the
// label once more for the counts. 2 (C - 1) exps and a log a point, four more where TCKD counts (moving points).
//
// The loss does not depend on the order in which threads run: counts are integers, each block sums its points in a
// fixed tree, and one block sums the blocks.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "launch.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;      // 8 warps: the sum over a block is short, and small blocks fill a multiprocessor
constexpr int kMostBlocks = 4096;  // several waves, so that the last is short; fixed, so that N alone orders the sum
constexpr int kMostClasses = 32;   // as many as lanes: lane c counts class c
constexpr int kMostScans = 1 << 24;  // scans * classes are counted in int
constexpr int kLabels = 8;         // a thread counts at once: loads in flight

enum Normaliser { kPoint = 0, kWeight = 1, kClass = 2 };

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }

// -1 for what is not labelled.
template <class L>
__device__ int class_of(L label, int C) {
  const int64_t value = int64_t(label);
  return value >= 0 && value < C ? int(value) : -1;
}

// 1) labels of each class and scan: count [B, C], zeros before. blockIdx.y is the scan.
template <class L>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const L* __restrict__ labels, const int64_t* __restrict__ offsets, int64_t N, int B, int C,
                 unsigned long long* __restrict__ count) {
  __shared__ unsigned int block_count[kMostClasses];
  const int lane = threadIdx.x % 32;
  constexpr int64_t kChunk = kThreads * kLabels;
  for (int b = blockIdx.y; b < B; b += gridDim.y) {
    if (threadIdx.x < kMostClasses) block_count[threadIdx.x] = 0;
    __syncthreads();
    const int64_t start = offsets ? max(offsets[b], int64_t(0)) : 0, stop = offsets ? min(offsets[b + 1], N) : N;
    unsigned int own = 0;  // of class `lane`, in this warp
    for (int64_t first = start + blockIdx.x * kChunk; first < stop; first += gridDim.x * kChunk) {
      int target[kLabels];
#pragma unroll
      for (int k = 0; k < kLabels; ++k) {
        const int64_t i = first + k * kThreads + threadIdx.x;
        target[k] = i < stop ? class_of(labels[i], C) : -1;
      }
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int k = 0; k < kLabels; ++k) {
          const unsigned int votes = __ballot_sync(~0u, target[k] == c);
          own += lane == c ? __popc(votes) : 0;
        }
      }
    }
    if (own > 0) atomicAdd(&block_count[lane], own);
    __syncthreads();
    if (threadIdx.x < C && block_count[threadIdx.x] > 0) {
      atomicAdd(count + b * C + threadIdx.x, static_cast<unsigned long long>(block_count[threadIdx.x]));
    }
    __syncthreads();  // before the next scan clears the counters
  }
}

// What a point of a class of a scan counts.
template <class F>
struct alignas(2 * sizeof(F)) Share {
  F tckd, nckd;
};

// 2) what divides them: shares [B, C]. One block; the totals are summed in order, as on the CPU.
template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    shares_kernel(const unsigned long long* __restrict__ count, const F* __restrict__ tables, int B, int C,
                  int normaliser, Share<F>* __restrict__ shares) {
  __shared__ F term_t[kThreads], term_n[kThreads], total[2];
  const F *tckd = tables, *nckd = tables + C, *weight = tables + 2 * C;
  if (threadIdx.x == 0) total[0] = total[1] = 0;
  for (int first = 0; first < B * C; first += kThreads) {
    const int i = first + int(threadIdx.x);
    if (i < B * C) {
      const int c = i % C;
      const F n = F(count[i]);
      if (normaliser == kWeight) {
        term_t[threadIdx.x] = tckd[c] != 0 ? n * weight[c] : F(0);
        term_n[threadIdx.x] = n * weight[c];
      } else {
        term_t[threadIdx.x] = term_n[threadIdx.x] = weight[c] != 0 ? n : F(0);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const int size = min(kThreads, B * C - first);
      F total_t = total[0], total_n = total[1];
      for (int k = 0; k < size; ++k) total_t += term_t[k], total_n += term_n[k];
      total[0] = total_t, total[1] = total_n;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < B * C; i += kThreads) {
    const int c = i % C;
    const F scans = F(count[i]) * F(B);
    const F t = normaliser == kClass ? scans : total[0], n = normaliser == kClass ? scans : total[1];
    shares[i] = {t > 0 ? tckd[c] * weight[c] / t : F(0), n > 0 ? nckd[c] * weight[c] / n : F(0)};
  }
}

// The scan of a row: offsets[b] <= i < offsets[b + 1].
__device__ int scan_of(int64_t i, const int64_t* __restrict__ offsets, int B) {
  int low = 0, high = B;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= i ? low : high) = middle;
  }
  return low;
}

// The logits of a point over the temperature. kC classes: in registers; kC = 0: any number, read again by each pass.
template <class F, int kC>
struct Row {
  static constexpr int kUnroll = kC ? kC : 1;

  // `whole`: rows are whole vectors of 16 bytes.
  __device__ Row(const F* __restrict__ row, F scale, bool whole) : row(row), scale(scale) {
    if constexpr (kC > 0) {
      if (kC * sizeof(F) % 16 == 0 && whole) {
        uint4 raw[(kC * sizeof(F) + 15) / 16];
#pragma unroll
        for (int k = 0; k < int(kC * sizeof(F) / 16); ++k) raw[k] = __ldg(reinterpret_cast<const uint4*>(row) + k);
        std::memcpy(held, raw, sizeof(held));
      } else {
#pragma unroll
        for (int c = 0; c < kC; ++c) held[c] = row[c];
      }
#pragma unroll
      for (int c = 0; c < kC; ++c) held[c] *= scale;
    }
  }

  __device__ F z(int c) const {
    if constexpr (kC > 0) {
      return held[c];
    } else {
      return row[c] * scale;
    }
  }

  // exp(z - the largest of the others), 0 for the target
  __device__ F e(int c) const {
    if constexpr (kC > 0) {
      return soft[c];
    } else {
      return c == target ? F(0) : exponential(z(c) - largest);
    }
  }

  // exps of the others; their largest logit, the sum of the exps, and the target's logit.
  __device__ void soften(int its_target, int C) {
    target = its_target;
    largest = -std::numeric_limits<F>::infinity(), sum = 0, own = 0;
#pragma unroll kUnroll
    for (int c = 0; c < C; ++c) {
      const bool is_target = c == target;
      const F other = is_target ? largest : z(c);
      largest = other > largest ? other : largest;
      own = is_target ? z(c) : own;
    }
#pragma unroll kUnroll
    for (int c = 0; c < C; ++c) {
      if constexpr (kC > 0) soft[c] = c == target ? F(0) : exponential(held[c] - largest);
      sum += e(c);
    }
  }

  const F* row;
  F scale, held[kC ? kC : 1], soft[kC ? kC : 1];
  F largest, sum, own;
  int target;
};

// The sum over the block, in thread 0.
__device__ double block_sum(double value) {
  __shared__ double warp_sum[kThreads / 32];
  for (int m = 16; m > 0; m /= 2) value += __shfl_xor_sync(~0u, value, m);
  if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) value += warp_sum[warp];
  return value;
}

// 3) loss, a part for each block, and gradient, or null.
template <class F, class L, int kC>
__global__ void __launch_bounds__(kThreads, 3)
    wdcd_loss_kernel(const F* __restrict__ student, const F* __restrict__ teacher, const L* __restrict__ labels,
                     const int64_t* __restrict__ offsets, int64_t N, int B, int num_classes,
                     const Share<F>* __restrict__ shares, F temperature, F floor, bool whole, F* __restrict__ gradient,
                     double* __restrict__ part) {
  constexpr int kUnroll = Row<F, kC>::kUnroll;
  const int C = kC ? kC : num_classes;
  const F scale = 1 / temperature;
  double total = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < N; i += int64_t(gridDim.x) * kThreads) {
    Row<F, kC> s(student + i * C, scale, whole), t(teacher + i * C, scale, whole);
    const int target = class_of(labels[i], C);
    Share<F> share{0, 0};
    if (target >= 0) share = shares[(offsets ? scan_of(i, offsets, B) : 0) * C + target];
    const bool counts = share.tckd != 0 || share.nckd != 0;
    F loss = 0, gain = 0;
    if (counts) {
      // 1) the others
      s.soften(target, C);
      t.soften(target, C);
      F difference = 0;
#pragma unroll kUnroll
      for (int c = 0; c < C; ++c) difference += t.e(c) * (c == target ? F(0) : t.z(c) - s.z(c));
      const F nckd = difference / t.sum - (t.largest - s.largest) - logarithm(t.sum / s.sum);
      loss = share.nckd != 0 ? share.nckd * nckd : F(0);
      // 2) target against the others
      if (share.tckd != 0) {
        const F d_s = s.own - s.largest - logarithm(s.sum), d_t = t.own - t.largest - logarithm(t.sum);
        const F e_s = exponential(-std::fabs(d_s)), e_t = exponential(-std::fabs(d_t));
        const F log_s = logarithm(1 + e_s), log_t = logarithm(1 + e_t);
        const F p_s = (d_s > 0 ? F(1) : e_s) / (1 + e_s), r_s = (d_s > 0 ? e_s : F(1)) / (1 + e_s);
        const F p_t = (d_t > 0 ? F(1) : e_t) / (1 + e_t), r_t = (d_t > 0 ? e_t : F(1)) / (1 + e_t);
        F log_b = (d_s > 0 ? F(0) : d_s) - log_s, log_r = (d_s > 0 ? -d_s : F(0)) - log_s, u = 1, v = 1;
        if (floor > 0) {
          const F b = p_s + floor, r = r_s + F(C - 1) * floor;
          log_b = logarithm(b), log_r = logarithm(r), u = p_s / b, v = r_s / r;
        }
        const F tckd = p_t * ((d_t > 0 ? F(0) : d_t) - log_t - log_b) + r_t * ((d_t > 0 ? -d_t : F(0)) - log_t - log_r);
        loss += share.tckd * tckd;
        gain = share.tckd * (r_t * p_s * v - p_t * r_s * u) / temperature;
      }
    }
    total += double(loss);
    // 3) the gradient
    if (gradient) {
      const F sum_s = counts ? 1 / s.sum : F(0), sum_t = counts ? 1 / t.sum : F(0), share_n = share.nckd / temperature;
      const auto value = [&](int c) {
        if (!counts) return F(0);
        const F q_s = s.e(c) * sum_s, q_t = t.e(c) * sum_t;
        return c == target ? gain : share_n * (q_s - q_t) - gain * q_s;
      };
      F* __restrict__ out = gradient + i * C;
      if constexpr (kC > 0) {
        F held[kC];
#pragma unroll
        for (int c = 0; c < kC; ++c) held[c] = value(c);
        if (sizeof(held) % 16 == 0 && whole) {
          uint4 raw[(sizeof(held) + 15) / 16];
          std::memcpy(raw, held, sizeof(held));
#pragma unroll
          for (int k = 0; k < int(sizeof(held) / 16); ++k) reinterpret_cast<uint4*>(out)[k] = raw[k];
        } else {
#pragma unroll
          for (int c = 0; c < kC; ++c) out[c] = held[c];
        }
      } else {
        for (int c = 0; c < C; ++c) out[c] = value(c);
      }
    }
  }
  total = block_sum(total);
  if (threadIdx.x == 0) part[blockIdx.x] = total;
}

// 4) the blocks' parts. One block.
template <class F>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* __restrict__ part, int num_parts, F* __restrict__ loss) {
  double total = 0;
  for (int k = threadIdx.x; k < num_parts; k += kThreads) total += part[k];
  total = block_sum(total);
  if (threadIdx.x == 0) *loss = F(total);
}

bool starts_at_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// `offsets` is not read on the host: that it runs from 0 to the number of points is the caller's word. Were it wrong,
// the result would be, but nothing outside the tensors is touched.
std::tuple<Tensor, Tensor> wdcd_loss(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                     const Tensor& tables, const std::optional<Tensor>& offsets, double temperature,
                                     int64_t normaliser, double floor, bool with_gradient) {
  STD_TORCH_CHECK(student.is_cuda() && student.dim() == 2, "wdcd_loss: student [N, C] on the GPU");
  const int64_t N = student.size(0), C = student.size(1);
  const ScalarType dtype = student.scalar_type();
  STD_TORCH_CHECK(C >= 2 && C <= kMostClasses, "wdcd_loss: 2 to ", kMostClasses, " classes, got ", C);
  const bool wide = dtype == ScalarType::Double, bytes = labels.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(wide || dtype == ScalarType::Float, "wdcd_loss: logits in float32 or float64");
  check_tensor("wdcd_loss", "student", student, dtype, {N, C}, student);
  check_tensor("wdcd_loss", "teacher", teacher, dtype, {N, C}, student);
  check_tensor("wdcd_loss", "labels", labels, bytes ? ScalarType::Byte : ScalarType::Long, {N}, student);
  check_tensor("wdcd_loss", "tables", tables, dtype, {3, C}, student);
  if (offsets) check_tensor("wdcd_loss", "offsets", *offsets, ScalarType::Long, {-1}, student);
  STD_TORCH_CHECK(!offsets || offsets->numel() >= 2 || (offsets->numel() == 1 && N == 0),
                  "wdcd_loss: offsets int64 [B + 1]");
  const OnDevice device(student);
  Tensor gradient = empty_as(student, {with_gradient ? N : 0, C}, dtype);
  if (N == 0) return {zeros_as(student, {}, dtype), gradient};
  Tensor loss = empty_as(student, {}, dtype);
  STD_TORCH_CHECK(!offsets || offsets->numel() <= kMostScans, "wdcd_loss: more than ", kMostScans, " scans");
  const int B = offsets ? int(offsets->numel()) - 1 : 1;
  const int64_t* rows = offsets ? data<int64_t>(*offsets) : nullptr;
  Tensor count = zeros_as(student, {B, C}, ScalarType::Long);
  Tensor shares = empty_as(student, {B, C, 2}, dtype);
  const unsigned int blocks = num_blocks(N, kThreads, kMostBlocks);
  Tensor part = empty_as(student, {int64_t(blocks)}, ScalarType::Double);

  const auto run = [&](auto type, auto label) {
    using F = decltype(type);
    using L = decltype(label);
    const cudaStream_t stream = device.stream();
    const L* y = data<L>(labels);
    const F *of_student = data<F>(student), *of_teacher = data<F>(teacher);
    F* to = with_gradient ? mutable_data<F>(gradient) : nullptr;
    auto* counted = mutable_data<unsigned long long>(count);
    auto* share = mutable_data<Share<F>>(shares);
    const dim3 grid(num_blocks((N + B - 1) / B, kThreads * kLabels, kMostBlocks), num_blocks(B, 1, 65535));
    count_kernel<L><<<grid, kThreads, 0, stream>>>(y, rows, N, B, int(C), counted);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    shares_kernel<F><<<1, kThreads, 0, stream>>>(counted, data<F>(tables), B, int(C), int(normaliser), share);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    const auto with = [&](auto constant) {
      constexpr int kC = decltype(constant)::value;
      const bool whole = starts_at_16(of_student) && starts_at_16(of_teacher) && starts_at_16(to);
      wdcd_loss_kernel<F, L, kC><<<blocks, kThreads, 0, stream>>>(of_student, of_teacher, y, rows, N, B, int(C), share,
                                                                  F(temperature), F(floor), whole, to,
                                                                  mutable_data<double>(part));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    C == 4 ? with(std::integral_constant<int, 4>{}) : C == 3 ? with(std::integral_constant<int, 3>{})
                                                             : with(std::integral_constant<int, 0>{});
    sum_kernel<F><<<1, kThreads, 0, stream>>>(data<double>(part), int(blocks), mutable_data<F>(loss));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  wide ? (bytes ? run(double{}, uint8_t{}) : run(double{}, int64_t{}))
       : (bytes ? run(float{}, uint8_t{}) : run(float{}, int64_t{}));
  return {loss, gradient};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("wdcd_loss", TORCH_BOX(&kdmos::wdcd_loss)); }

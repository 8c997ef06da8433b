// Decoupled distillation in one pass: loss and its gradient together.
//
// With z = logits / T, t the target, q the softmax of the others and d = z_t - logsumexp(others), so that
// p_t = sigmoid(d):
//   NCKD = sum_k qT_k (zT_k - zS_k) - log(ST / SS),          dNCKD / dzS_k = qS_k - qT_k          (k != t)
//   TCKD = bT (log bT - log bS) + rT (log rT - log rS),      dTCKD / dzS_t = G,  dTCKD / dzS_k = -G qS_k
// with b = p_t, r = 1 - p_t and, where a floor f is added to every probability of the student, bS = p_t + f and
// rS = r + (C - 1) f:  G = rT p_t (r / rS) - bT r (p_t / bS), which is p_t - bT at f = 0.
//
// Least work: two rows of C logits and a label read, a gradient row written: 13 C bytes a point in float32. Above
// that limit stand 2 (C - 1) exps and a log a point, four more where TCKD counts (moving points: few blocks).
#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

// Constant trips over one vector or two: what such loops hand to each other stays in registers.
#define KDMOS_LANES _Pragma("omp simd simdlen(16)") for (int i = 0; i < kLanes; ++i)

namespace kdmos {
namespace {

constexpr int kLanes = 16;          // points in vectors at once
constexpr int kBlock = 256;         // points summed together
constexpr int64_t kCounted = 2048;  // labels counted at once, from L1
constexpr int kMostClasses = 32;
constexpr int64_t kGrain = 32;      // blocks

enum Normaliser { kPoint = 0, kWeight = 1, kClass = 2 };

// What a point of each class of each scan counts, [scan, class] for TCKD and NCKD.
template <class F>
struct Shares {
  std::vector<F> tckd, nckd;
};

template <class F, class L>
Shares<F> count_shares(const L* labels, const int64_t* offsets, int64_t B, int64_t C, const F* tables, int normaliser) {
  const F *tckd = tables, *nckd = tables + C, *weight = tables + 2 * C;
  // 1) labels of each class and scan; counters of their own for every worker
  const int64_t N = offsets[B], parts = std::max<int64_t>(1, std::min(num_threads(), N / (kBlock * kGrain)));
  std::vector<int64_t> part_count(parts * B * C, 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t low = share(N, parts, part), high = share(N, parts, part + 1);
      for (int64_t b = 0; b < B; ++b) {
        int64_t* count = &part_count[(part * B + b) * C];
        const int64_t end_of_scan = std::min(high, offsets[b + 1]);
        for (int64_t first = std::max(low, offsets[b]); first < end_of_scan; first += kCounted) {
          const int64_t last = std::min(first + kCounted, end_of_scan);
          for (int64_t c = 0; c < C; ++c) {  // compared in vectors, class after class
            int32_t found = 0;
            for (int64_t i = first; i < last; ++i) found += labels[i] == L(c);
            count[c] += found;
          }
        }
      }
    }
  });
  std::vector<F> count(B * C, F(0));
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) count[b * C + c] += F(part_count[(part * B + b) * C + c]);
    }
  }
  // 2) what divides them
  F total_t = 0, total_n = 0;
  for (int64_t i = 0; i < B * C; ++i) {
    const int64_t c = i % C;
    if (normaliser == kWeight) {
      total_t += tckd[c] != 0 ? count[i] * weight[c] : F(0);
      total_n += count[i] * weight[c];
    } else if (weight[c] != 0) {
      total_t += count[i];
      total_n += count[i];
    }
  }
  Shares<F> shares{std::vector<F>(B * C), std::vector<F>(B * C)};
  for (int64_t i = 0; i < B * C; ++i) {
    const int64_t c = i % C;
    const F t = normaliser == kClass ? count[i] * F(B) : total_t, n = normaliser == kClass ? count[i] * F(B) : total_n;
    shares.tckd[i] = t > 0 ? tckd[c] * weight[c] / t : F(0);
    shares.nckd[i] = n > 0 ? nckd[c] * weight[c] / n : F(0);
  }
  return shares;
}

// A label as 32 bits, -1 if it has more.
template <class L>
int32_t narrow_label(L label) {
  return L(int32_t(label)) == label ? int32_t(label) : -1;
}

// kLanes points in vectors, class by class. kC classes, or n where kC is 0. Each point has an order of its own: class 0
// is among the others in the place of the target, so that the others are always 1 to C - 1.
template <class F, int kC>
struct Lanes {
  static constexpr int kRows = kC ? kC : kMostClasses;
  using Row = F[kLanes];
  alignas(64) Row share_t, share_n;

  // Logits z, and of the others the largest, e = exp(z - largest) and its sum.
  static void soften(const F* rows, const int32_t* target, int C, F scale, Row* z, Row* e, F* largest, F* sum) {
#pragma omp simd simdlen(kLanes)
    for (int i = 0; i < kLanes; ++i) {
      for (int c = 0; c < C; ++c) z[c][i] = rows[i * C + c] * scale;
    }
    Row own;
    KDMOS_LANES own[i] = z[0][i];
    for (int c = 1; c < C; ++c) {
      KDMOS_LANES {
        const bool is_target = target[i] == c;
        const F here = z[c][i];
        own[i] = is_target ? here : own[i];
        z[c][i] = is_target ? z[0][i] : here;
      }
    }
    KDMOS_LANES z[0][i] = own[i], largest[i] = z[1][i], sum[i] = 0;
    for (int c = 2; c < C; ++c) KDMOS_LANES largest[i] = z[c][i] > largest[i] ? z[c][i] : largest[i];
    for (int c = 1; c < C; ++c) {
      KDMOS_LANES {
        e[c][i] = exponential(z[c][i] - largest[i]);
        sum[i] += e[c][i];
      }
    }
  }

  // Adds the loss of each point to `total` and writes the rows of the gradient, if any.
  void run(const F* student, const F* teacher, const int32_t* target, int n, F temperature, F floor, double* total,
           F* gradient) const {
    const int C = kC ? kC : n;
    const F scale = 1 / temperature;
    Row s[kRows], t[kRows], e_s[kRows], e_t[kRows], max_s, max_t, sum_s, sum_t, loss, gain;
    soften(student, target, C, scale, s, e_s, max_s, sum_s);
    soften(teacher, target, C, scale, t, e_t, max_t, sum_t);
    // 1) among the others
    Row difference;
    KDMOS_LANES difference[i] = 0;
    for (int c = 1; c < C; ++c) KDMOS_LANES difference[i] += e_t[c][i] * (t[c][i] - s[c][i]);
    int32_t any = 0;
#pragma omp simd simdlen(kLanes) reduction(| : any)
    for (int i = 0; i < kLanes; ++i) {
      const F nckd = difference[i] / sum_t[i] - (max_t[i] - max_s[i]) - logarithm(sum_t[i] / sum_s[i]);
      loss[i] = share_n[i] != 0 ? share_n[i] * nckd : F(0);
      gain[i] = 0;
      any |= share_t[i] != 0;
    }
    // 2) target against the others, where any of the points has that part
    if (any) {
      KDMOS_LANES {
        const F d_s = s[0][i] - max_s[i] - logarithm(sum_s[i]), d_t = t[0][i] - max_t[i] - logarithm(sum_t[i]);
        const F x_s = exponential(-std::fabs(d_s)), x_t = exponential(-std::fabs(d_t));
        const F log_s = logarithm(1 + x_s), log_t = logarithm(1 + x_t);
        const F p_s = (d_s > 0 ? F(1) : x_s) / (1 + x_s), r_s = (d_s > 0 ? x_s : F(1)) / (1 + x_s);
        const F p_t = (d_t > 0 ? F(1) : x_t) / (1 + x_t), r_t = (d_t > 0 ? x_t : F(1)) / (1 + x_t);
        F log_b = (d_s > 0 ? F(0) : d_s) - log_s, log_r = (d_s > 0 ? -d_s : F(0)) - log_s, u = 1, v = 1;
        if (floor > 0) {
          const F b = p_s + floor, r = r_s + F(C - 1) * floor;
          log_b = logarithm(b), log_r = logarithm(r), u = p_s / b, v = r_s / r;
        }
        const F tckd = p_t * ((d_t > 0 ? F(0) : d_t) - log_t - log_b) + r_t * ((d_t > 0 ? -d_t : F(0)) - log_t - log_r);
        loss[i] += share_t[i] != 0 ? share_t[i] * tckd : F(0);
        gain[i] = share_t[i] * (r_t * p_s * v - p_t * r_s * u) / temperature;
      }
    }
    KDMOS_LANES total[i] += double(loss[i]);
    if (!gradient) return;
    // 3) the gradient; class 0 and the target change places again
    Row by_s, by_t, first;
    KDMOS_LANES {
      const F share = share_n[i] * scale;
      by_s[i] = (share - gain[i]) / sum_s[i];
      by_t[i] = share / sum_t[i];
      first[i] = gain[i] = share_n[i] != 0 || share_t[i] != 0 ? gain[i] : F(0);
    }
    for (int c = 1; c < C; ++c) {
      KDMOS_LANES {
        const bool is_target = target[i] == c;
        const F result = by_s[i] * e_s[c][i] - by_t[i] * e_t[c][i];
        const F other = share_n[i] != 0 || share_t[i] != 0 ? result : F(0);  // even if the logits are not finite
        first[i] = is_target ? other : first[i];
        s[c][i] = is_target ? gain[i] : other;
      }
    }
    KDMOS_LANES s[0][i] = first[i];
#pragma omp simd simdlen(kLanes)
    for (int i = 0; i < kLanes; ++i) {
      for (int c = 0; c < C; ++c) gradient[i * C + c] = s[c][i];
    }
  }
};

template <class F, class L, int kC>
double run_blocks(const F* student, const F* teacher, const L* labels, const int64_t* offsets, int64_t B, int64_t n,
                  const Shares<F>& shares, F temperature, F floor, F* gradient) {
  const int64_t N = offsets[B], num_blocks = (N + kBlock - 1) / kBlock;
  const int C = kC ? kC : int(n);
  std::vector<double> loss(num_blocks);
  torch::stable::parallel_for(0, num_blocks, kGrain, [&](int64_t begin, int64_t end) {
    Lanes<F, kC> lanes;
    int64_t b = 0;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t block = number * kBlock, rest = std::min(N, block + kBlock) - block;
      alignas(64) int32_t targets[kBlock];  // of the whole block: read long after they are written in smaller pieces
      for (int i = 0; i < rest; ++i) targets[i] = narrow_label(labels[block + i]);
      for (int i = rest; i < kBlock; ++i) targets[i] = -1;
      double total[kLanes] = {};
      for (int64_t first = block; first < block + rest; first += kLanes) {
        // 1) what each point counts
        while (first >= offsets[b + 1]) ++b;
        const int32_t* target = targets + (first - block);
        const int size = int(std::min<int64_t>(kLanes, N - first));
        const F *tckd = shares.tckd.data() + b * C, *nckd = shares.nckd.data() + b * C;
        if (first + kLanes <= offsets[b + 1]) {  // all of one scan: no branches
          KDMOS_LANES lanes.share_t[i] = lanes.share_n[i] = 0;
          for (int c = 0; c < C; ++c) {
            const F share_t = tckd[c], share_n = nckd[c];
            KDMOS_LANES {
              lanes.share_t[i] = target[i] == c ? share_t : lanes.share_t[i];
              lanes.share_n[i] = target[i] == c ? share_n : lanes.share_n[i];
            }
          }
        } else {
          for (int i = 0, of = 0; i < kLanes; ++i) {
            while (i < size && first + i >= offsets[b + of + 1]) ++of;
            const bool labelled = target[i] >= 0 && target[i] < C;
            lanes.share_t[i] = labelled ? tckd[of * C + target[i]] : F(0);
            lanes.share_n[i] = labelled ? nckd[of * C + target[i]] : F(0);
          }
        }
        // 2) loss and gradient; the last rows through memory that has kLanes of them
        const F *s = student + first * C, *t = teacher + first * C;
        F* out = gradient ? gradient + first * C : nullptr;
        if (size == kLanes) {
          lanes.run(s, t, target, C, temperature, floor, total, out);
        } else {
          F rows[3][kMostClasses * kLanes] = {};
          std::copy_n(s, size * C, rows[0]);
          std::copy_n(t, size * C, rows[1]);
          lanes.run(rows[0], rows[1], target, C, temperature, floor, total, rows[2]);
          if (out) std::copy_n(rows[2], size * C, out);
        }
      }
      for (double part : total) loss[number] += part;
    }
  });
  double total = 0;
  for (double part : loss) total += part;
  return total;
}

std::tuple<Tensor, Tensor> wdcd_loss(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                     const Tensor& tables, const std::optional<Tensor>& offsets, double temperature,
                                     int64_t normaliser, double floor, bool with_gradient) {
  STD_TORCH_CHECK(student.dim() == 2, "wdcd_loss: student [N, C]");
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
  STD_TORCH_CHECK(!offsets || offsets->numel() >= 1, "wdcd_loss: offsets int64 [B + 1]");
  const std::vector<int64_t> whole{0, N};
  const int64_t* rows = offsets ? data<int64_t>(*offsets) : whole.data();
  const int64_t B = offsets ? offsets->numel() - 1 : 1;
  check_ascending("wdcd_loss: offsets", rows, B + 1, N + 1);
  STD_TORCH_CHECK(rows[0] == 0 && rows[B] == N, "wdcd_loss: offsets must run from 0 to the number of points");
  Tensor loss = empty_as(student, {}, student.scalar_type());
  Tensor gradient = empty_as(student, {with_gradient ? N : 0, C}, student.scalar_type());

  const auto run = [&](auto type, auto label) {
    using F = decltype(type);
    using L = decltype(label);
    const auto with = [&](auto constant) {
      const L* y = data<L>(labels);
      const Shares<F> shares = count_shares<F, L>(y, rows, B, C, data<F>(tables), int(normaliser));
      const double total = run_blocks<F, L, constant()>(data<F>(student), data<F>(teacher), y, rows, B, C, shares,
                                                        F(temperature), F(floor),
                                                        with_gradient ? mutable_data<F>(gradient) : nullptr);
      *mutable_data<F>(loss) = F(total);
    };
    C == 4 ? with(std::integral_constant<int, 4>{}) : C == 3 ? with(std::integral_constant<int, 3>{})
                                                             : with(std::integral_constant<int, 0>{});
  };
  wide ? (bytes ? run(double{}, uint8_t{}) : run(double{}, int64_t{}))
       : (bytes ? run(float{}, uint8_t{}) : run(float{}, int64_t{}));
  return {loss, gradient};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("wdcd_loss", TORCH_BOX(&kdmos::wdcd_loss)); }

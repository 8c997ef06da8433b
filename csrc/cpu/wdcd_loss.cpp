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
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace kdmos {
namespace {

constexpr int kBlock = 256;        // points in vectors at once: all arrays of a block stay in L1 for few classes
constexpr int kMostClasses = 32;
constexpr int64_t kGrain = 32;     // blocks

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
  std::vector<int64_t> part_count(parts * B * (C + 1), 0);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t low = share(N, parts, part), high = share(N, parts, part + 1);
      for (int64_t b = 0; b < B; ++b) {
        // four tables in turn, so that equal neighbours do not wait for each other
        int64_t count[4][kMostClasses + 1] = {};
        const int64_t first = std::max(low, offsets[b]), last = std::min(high, offsets[b + 1]);
        for (int64_t i = first; i < last; ++i) {
          const bool labelled = labels[i] >= 0 && labels[i] < L(C);
          ++count[i & 3][labelled ? int64_t(labels[i]) : C];
        }
        for (int64_t c = 0; c <= C; ++c) {
          part_count[(part * B + b) * (C + 1) + c] = count[0][c] + count[1][c] + count[2][c] + count[3][c];
        }
      }
    }
  });
  std::vector<F> count(B * C, F(0));
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t c = 0; c < C; ++c) count[b * C + c] += F(part_count[(part * B + b) * (C + 1) + c]);
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

// A block of points, class by class. kC classes, or n where kC is 0.
template <class F, int kC>
struct Block {
  static constexpr int kRows = kC ? kC : kMostClasses;
  F student[kRows][kBlock], teacher[kRows][kBlock];  // z; then exp(z - the largest of the others), 0 for the target
  F share_t[kBlock], share_n[kBlock];
  int32_t target[kBlock];

  // exps of the others in place; their largest logit, the sum of the exps, and the target's logit.
  static void soften(F (&z)[kRows][kBlock], const int32_t* target, int C, int size, F* largest, F* sum, F* own) {
    for (int i = 0; i < size; ++i) largest[i] = -std::numeric_limits<F>::infinity(), sum[i] = 0, own[i] = 0;
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < size; ++i) {
        const bool is_target = target[i] == c;
        const F other = is_target ? largest[i] : z[c][i];
        largest[i] = other > largest[i] ? other : largest[i];
        own[i] = is_target ? z[c][i] : own[i];
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < size; ++i) {
        const F e = target[i] == c ? F(0) : exponential(z[c][i] - largest[i]);
        z[c][i] = e;
        sum[i] += e;
      }
    }
  }

  // Loss of the block; the gradient takes the student's place.
  double run(int n, int size, F temperature, F floor, bool with_gradient) {
    const int C = kC ? kC : n;
    F difference[kBlock], max_s[kBlock], max_t[kBlock], sum_s[kBlock], sum_t[kBlock], own_s[kBlock], own_t[kBlock];
    F gain[kBlock], loss[kBlock];
    // 1) the others: NCKD needs sum_k eT_k (zT_k - zS_k), taken before z is lost
    F others[kRows][kBlock];
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < size; ++i) others[c][i] = target[i] == c ? F(0) : teacher[c][i] - student[c][i];
    }
    soften(student, target, C, size, max_s, sum_s, own_s);
    soften(teacher, target, C, size, max_t, sum_t, own_t);
    for (int i = 0; i < size; ++i) difference[i] = 0;
    for (int c = 0; c < C; ++c) {
      for (int i = 0; i < size; ++i) difference[i] += teacher[c][i] * others[c][i];
    }
    int32_t any = 0;
#pragma omp simd reduction(| : any)
    for (int i = 0; i < size; ++i) {
      const F nckd = difference[i] / sum_t[i] - (max_t[i] - max_s[i]) - logarithm(sum_t[i] / sum_s[i]);
      loss[i] = share_n[i] != 0 ? share_n[i] * nckd : F(0);
      gain[i] = 0;
      any |= share_t[i] != 0;
    }
    // 2) target against the others, where any point of the block has that part
    if (any) {
      for (int i = 0; i < size; ++i) {
        const F d_s = own_s[i] - max_s[i] - logarithm(sum_s[i]), d_t = own_t[i] - max_t[i] - logarithm(sum_t[i]);
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
        loss[i] += share_t[i] != 0 ? share_t[i] * tckd : F(0);
        gain[i] = share_t[i] * (r_t * p_s * v - p_t * r_s * u) / temperature;
      }
    }
    // 3) the gradient
    if (with_gradient) {
      for (int i = 0; i < size; ++i) {
        sum_s[i] = 1 / sum_s[i];
        sum_t[i] = 1 / sum_t[i];
        share_n[i] /= temperature;
      }
      for (int c = 0; c < C; ++c) {
        for (int i = 0; i < size; ++i) {
          const F q_s = student[c][i] * sum_s[i], q_t = teacher[c][i] * sum_t[i];
          const F other = share_n[i] * (q_s - q_t) - gain[i] * q_s;
          const F result = target[i] == c ? gain[i] : other;
          student[c][i] = share_n[i] != 0 || share_t[i] != 0 ? result : F(0);
        }
      }
    }
    double total = 0;
    for (int i = 0; i < size; ++i) total += double(loss[i]);
    return total;
  }
};

template <class F, class L, int kC>
double run_blocks(const F* student, const F* teacher, const L* labels, const int64_t* offsets, int64_t B, int64_t n,
                  const Shares<F>& shares, F temperature, F floor, F* gradient) {
  const int64_t N = offsets[B], num_blocks = (N + kBlock - 1) / kBlock;
  const int C = kC ? kC : int(n);
  std::vector<double> loss(num_blocks);
  torch::stable::parallel_for(0, num_blocks, kGrain, [&](int64_t begin, int64_t end) {
    const auto block = std::make_unique<Block<F, kC>>();
    const F scale = 1 / temperature;
    int64_t b = 0;
    for (int64_t number = begin; number < end; ++number) {
      const int64_t first = number * kBlock;
      const int size = int(std::min<int64_t>(kBlock, N - first));
      for (int i = 0; i < size; ++i) {
        for (int c = 0; c < C; ++c) {
          block->student[c][i] = student[(first + i) * C + c] * scale;
          block->teacher[c][i] = teacher[(first + i) * C + c] * scale;
        }
      }
      while (first >= offsets[b + 1]) ++b;
      const auto take = [&](int i, const F* tckd, const F* nckd) {
        const L label = labels[first + i];
        const bool labelled = (label >= 0) & (label < L(C));
        const int32_t target = labelled ? int32_t(label) : 0;
        block->target[i] = target;
        block->share_t[i] = labelled ? tckd[target] : F(0);
        block->share_n[i] = labelled ? nckd[target] : F(0);
      };
      if (first + size <= offsets[b + 1]) {  // all of one scan: no branches
        const F *tckd = shares.tckd.data() + b * C, *nckd = shares.nckd.data() + b * C;
        for (int i = 0; i < size; ++i) take(i, tckd, nckd);
      } else {
        for (int i = 0, of = int(b); i < size; ++i) {
          while (first + i >= offsets[of + 1]) ++of;
          take(i, shares.tckd.data() + of * C, shares.nckd.data() + of * C);
        }
      }
      loss[number] = block->run(C, size, temperature, floor, gradient != nullptr);
      if (gradient) {
        F* __restrict__ out = gradient + first * C;
        for (int i = 0; i < size; ++i) {
          for (int c = 0; c < C; ++c) out[i * C + c] = block->student[c][i];
        }
      }
    }
  });
  double total = 0;
  for (double part : loss) total += part;
  return total;
}

std::tuple<Tensor, Tensor> wdcd_loss(const Tensor& student, const Tensor& teacher, const Tensor& labels,
                                     const Tensor& tables, const std::optional<Tensor>& offsets, double temperature,
                                     int64_t normaliser, double floor, bool with_gradient) {
  const int64_t N = student.size(0), C = student.size(1);
  STD_TORCH_CHECK(C >= 2 && C <= kMostClasses, "wdcd_loss: 2 to ", kMostClasses, " classes, got ", C);
  STD_TORCH_CHECK(student.is_contiguous() && teacher.is_contiguous() && labels.is_contiguous(), "wdcd_loss: contiguous");
  const std::vector<int64_t> whole{0, N};
  const int64_t* rows = offsets ? data<int64_t>(*offsets) : whole.data();
  const int64_t B = offsets ? offsets->size(0) - 1 : 1;
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
  const bool wide = student.scalar_type() == ScalarType::Double, bytes = labels.scalar_type() == ScalarType::Byte;
  wide ? (bytes ? run(double{}, uint8_t{}) : run(double{}, int64_t{}))
       : (bytes ? run(float{}, uint8_t{}) : run(float{}, int64_t{}));
  return {loss, gradient};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("wdcd_loss", TORCH_BOX(&kdmos::wdcd_loss)); }

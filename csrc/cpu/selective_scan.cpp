// A linear recurrence along sequences of points, each with its own step size, input and output projection.
//
//   dt = softplus(delta + delta_bias),  h_t = e_t h_{t-1} + dt_t u_t b_t  with  e_t = exp(dt_t a)     [D, S]
//   y_t = (sum_s h_t c_t + skip u_t) silu(gate_t)                                                     [D]
// and backwards, with r = dy silu(gate) and g_t the gradient of h_t:
//   g_t = r_t c_t + e_{t+1} g_{t+1},  db_t = sum_d g_t dt_t u_t,  dc_t = sum_d r_t h_t
//   du_t = r_t skip + dt_t sum_s g_t b_t
//   da = sum_t q_t dt_t,  ddt_t = sum_s q_t a + u_t sum_s g_t b_t  with  q_t = g_t e_t h_{t-1}
//
// Least work: u, delta, gate and y once, b and c once: 16 D + 8 S bytes a point in float32. Far above that limit stand
// D S exponentials a point, about twenty operations each with the step of the recurrence; backward about fifty.
//
// A task takes 16 channels, the lanes of the vectors, through one or more whole sequences, 64 points at a time, state
// by state: what 64 points need of one state stays in L1. The forward keeps the states at each 64 points; the backward
// begins there again. Sums over channels are made per 16, then in their order; sums over points per 64, then in double
// and in the order of the sequences: threads do not change them. One sequence of few channels has few tasks, D / 16.
#include <algorithm>
#include <vector>

#include "../selective_scan.h"
#include "parallel.h"
#include "vector_math.h"

namespace kdmos {
namespace {

constexpr int kLanes = 16;       // channels: a line of memory in float32
constexpr int kMostGroups = 16;  // of sequences: tasks for each 16 channels

template <class F>
struct Inputs {
  const F *u, *delta, *a, *b, *c, *skip, *gate, *delta_bias;  // gate: or null
  const int64_t* offsets;
  int64_t N, D, S, B;
};

// Points of a piece. Five more, or the arrays of a piece, 4 KiB each, would meet in the same sets of L1.
template <class F>
using Rows = F[kChunk + 5][kLanes];

// n rows of 16 channels, of which `width` are there; the others are 0.
template <class F>
void take(const F* __restrict__ from, int64_t D, int n, int width, Rows<F>& to) {
  if (width == kLanes) {
    for (int t = 0; t < n; ++t) {
      for (int l = 0; l < kLanes; ++l) to[t][l] = from[t * D + l];
    }
  } else {
    for (int t = 0; t < n; ++t) {
      for (int l = 0; l < kLanes; ++l) to[t][l] = l < width ? from[t * D + l] : F(0);
    }
  }
}

template <class F>
void put(const Rows<F>& from, int64_t D, int n, int width, F* __restrict__ to) {
  for (int t = 0; t < n; ++t) {
    if (width == kLanes) {
      for (int l = 0; l < kLanes; ++l) to[t * D + l] = from[t][l];
    } else {
      for (int l = 0; l < width; ++l) to[t * D + l] = from[t][l];
    }
  }
}

// Sums over the lanes of n rows.
template <class F>
void sum_lanes(const Rows<F>& rows, int n, F* __restrict__ to) {
  alignas(64) F half[kChunk][8], quarter[kChunk][4];
  for (int t = 0; t < n; ++t) {
    for (int l = 0; l < 8; ++l) half[t][l] = rows[t][l] + rows[t][8 + l];
  }
  for (int t = 0; t < n; ++t) {
    for (int l = 0; l < 4; ++l) quarter[t][l] = half[t][l] + half[t][4 + l];
  }
  for (int t = 0; t < n; ++t) to[t] = (quarter[t][0] + quarter[t][1]) + (quarter[t][2] + quarter[t][3]);
}

// What 16 channels of a piece of a sequence need: at most 64 points, all of one chunk.
template <class F>
struct Piece {
  alignas(64) Rows<F> u, dt, x, y, gate;           // x = dt u; y before the gate
  alignas(64) Rows<F> slope, r, before, e, gb, q;  // backward: dt by delta; before: h_{t-1}; sums over s: g b, q a
  alignas(64) Rows<F> of_b, of_c;                  // what each channel gives them
  alignas(64) F skip[kLanes], delta_bias[kLanes];

  void channels(const Inputs<F>& in, int64_t d, int width) {
    for (int l = 0; l < kLanes; ++l) {
      skip[l] = l < width ? in.skip[d + l] : F(0);
      delta_bias[l] = l < width ? in.delta_bias[d + l] : F(0);
    }
  }

  void points(const Inputs<F>& in, int64_t first, int n, int64_t d, int width) {
    take(in.u + first * in.D + d, in.D, n, width, u);
    take(in.delta + first * in.D + d, in.D, n, width, dt);
    if (in.gate) take(in.gate + first * in.D + d, in.D, n, width, gate);
    for (int t = 0; t < n; ++t) {
      for (int l = 0; l < kLanes; ++l) {
        const F v = dt[t][l] + delta_bias[l], e = exponential(-std::fabs(v)), log = logarithm_of_one_plus(e);
        dt[t][l] = v > 20 ? v : (v < 0 ? F(0) : v) + log;
        slope[t][l] = v > 20 ? F(1) : (v > 0 ? F(1) : e) / (1 + e);
        x[t][l] = dt[t][l] * u[t][l];
        y[t][l] = skip[l] * u[t][l];
      }
    }
  }

  // One state of every channel through the piece; `keep`: with what the backward reads.
  template <bool keep>
  void scan(const F* __restrict__ a, const F* __restrict__ b, const F* __restrict__ c, int64_t S, int n, F* h) {
    alignas(64) F state[kLanes], a2[kLanes];
    for (int l = 0; l < kLanes; ++l) state[l] = h[l], a2[l] = a[l];
    for (int t = 0; t < n; ++t) {
      const F bt = b[t * S], ct = c[t * S];
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const F decay = exponential2(dt[t][l] * a2[l]);
        if (keep) before[t][l] = state[l], e[t][l] = decay;
        state[l] = multiply_add(decay, state[l], x[t][l] * bt);
        y[t][l] = multiply_add(state[l], ct, y[t][l]);
      }
    }
    for (int l = 0; l < kLanes; ++l) h[l] = state[l];
  }
};

// The sequences in groups of about N / groups points; by the shapes alone, so that the sums' order is theirs too.
std::vector<int64_t> group_sequences(const int64_t* offsets, int64_t B, int64_t N) {
  const int64_t groups = std::min<int64_t>(B, kMostGroups);
  std::vector<int64_t> first(groups + 1);
  for (int64_t g = 0, b = 0; g <= groups; ++g) {
    while (b < B && offsets[b] < share(N, groups, g)) ++b;
    first[g] = g == groups ? B : b;
  }
  return first;
}

// body(first channel, how many, group) for each 16 channels and group of sequences.
template <class Body>
void for_tasks(int64_t D, int64_t groups, const Body& body) {
  const int64_t blocks = (D + kLanes - 1) / kLanes;
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t d = task / groups * kLanes;
      body(d, int(std::min<int64_t>(kLanes, D - d)), task % groups);
    }
  });
}

// a log2(e), [S, 16], for exponentials of base 2.
template <class F>
void take_a(const Inputs<F>& in, int64_t d, int width, F* a2) {
  for (int64_t s = 0; s < in.S; ++s) {
    for (int l = 0; l < kLanes; ++l) a2[s * kLanes + l] = l < width ? F(in.a[(d + l) * in.S + s] * kLog2e) : F(0);
  }
}

template <class F>
void forward(const Inputs<F>& in, F* y, F* states) {
  const std::vector<int64_t> group = group_sequences(in.offsets, in.B, in.N);
  const int64_t D = in.D, S = in.S;
  for_tasks(D, int64_t(group.size()) - 1, [&](int64_t d, int width, int64_t g) {
    const auto piece = std::make_unique<Piece<F>>();
    std::vector<F> a2(S * kLanes), h(S * kLanes);
    take_a(in, d, width, a2.data());
    piece->channels(in, d, width);
    for (int64_t seq = group[g]; seq < group[g + 1]; ++seq) {
      std::fill(h.begin(), h.end(), F(0));
      for (int64_t first = in.offsets[seq], last = in.offsets[seq + 1]; first < last;) {
        const int n = int(std::min(last, (first / kChunk + 1) * kChunk) - first);
        if (states && first % kChunk == 0) {
          F* __restrict__ to = states + first / kChunk * S * D + d;
          for (int64_t s = 0; s < S; ++s) {
            for (int l = 0; l < width; ++l) to[s * D + l] = h[s * kLanes + l];
          }
        }
        piece->points(in, first, n, d, width);
        for (int64_t s = 0; s < S; ++s) {
          const F *b = in.b + first * S + s, *c = in.c + first * S + s;
          piece->template scan<false>(a2.data() + s * kLanes, b, c, S, n, h.data() + s * kLanes);
        }
        if (in.gate) {
          for (int t = 0; t < n; ++t) {
            for (int l = 0; l < kLanes; ++l) {
              const F z = piece->gate[t][l], e = exponential(-std::fabs(z));
              piece->y[t][l] *= z * (z > 0 ? F(1) : e) / (1 + e);
            }
          }
        }
        put(piece->y, D, n, width, y + first * D + d);
        first += n;
      }
    }
  });
}

template <class F>
struct Gradients {
  F *u, *delta, *a, *b, *c, *skip, *gate, *delta_bias;
};

// The backward of a piece, the last points first. carry: e_{t+1} g_{t+1} of each state, [S, 16]; of_b, of_c: [S, N], of
// these channels; of_a: [S, 16].
template <class F>
void piece_backward(Piece<F>& p, const Inputs<F>& in, int64_t first, int n, const F* a2, const F* h, F* carry,
                    F* of_b, F* of_c, double* of_a) {
  const int64_t S = in.S;
  for (int t = 0; t < n; ++t) {
    for (int l = 0; l < kLanes; ++l) p.gb[t][l] = p.q[t][l] = 0;
  }
  for (int64_t s = 0; s < S; ++s) {
    const F *b = in.b + first * S + s, *c = in.c + first * S + s;
    alignas(64) F last[kLanes], after[kLanes], a_of[kLanes], sum[kLanes] = {};
    for (int l = 0; l < kLanes; ++l) last[l] = h[s * kLanes + l];
    p.template scan<true>(a2 + s * kLanes, b, c, S, n, last);
    for (int l = 0; l < kLanes; ++l) after[l] = carry[s * kLanes + l], a_of[l] = a2[s * kLanes + l];
    for (int t = n - 1; t >= 0; --t) {
      const F bt = b[t * S], ct = c[t * S];
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const F g = multiply_add(p.r[t][l], ct, after[l]), of_previous = g * p.e[t][l];
        const F q = of_previous * p.before[t][l];
        p.of_b[t][l] = g * p.x[t][l];
        p.of_c[t][l] = p.r[t][l] * last[l];
        last[l] = p.before[t][l];
        after[l] = of_previous;
        p.gb[t][l] = multiply_add(g, bt, p.gb[t][l]);
        p.q[t][l] = multiply_add(q, a_of[l], p.q[t][l]);
        sum[l] = multiply_add(q, p.dt[t][l], sum[l]);
      }
    }
    for (int l = 0; l < kLanes; ++l) carry[s * kLanes + l] = after[l], of_a[s * kLanes + l] += double(sum[l]);
    sum_lanes(p.of_b, n, of_b + s * in.N + first);
    sum_lanes(p.of_c, n, of_c + s * in.N + first);
  }
}

template <class F>
void backward(const Inputs<F>& in, const F* gradient, const F* states, const Gradients<F>& out) {
  const std::vector<int64_t> group = group_sequences(in.offsets, in.B, in.N);
  const int64_t N = in.N, D = in.D, S = in.S, blocks = (D + kLanes - 1) / kLanes, groups = int64_t(group.size()) - 1;
  const Scratch<F> parts(2 * blocks * S * N);                         // of b and c, for each 16 channels
  std::vector<double> sums(groups * (S + 2) * blocks * kLanes, 0.0);  // of a, skip and delta_bias, for each group
  for_tasks(D, groups, [&](int64_t d, int width, int64_t g) {
    const auto piece = std::make_unique<Piece<F>>();
    Piece<F>& p = *piece;
    std::vector<F> a2(S * kLanes), h(S * kLanes), carry(S * kLanes);
    take_a(in, d, width, a2.data());
    p.channels(in, d, width);
    F *of_b = parts + d / kLanes * S * N, *of_c = of_b + blocks * S * N;
    double* of_a = sums.data() + (g * blocks * kLanes + d) * (S + 2);  // [S + 2, 16]
    double *of_skip = of_a + S * kLanes, *of_bias = of_skip + kLanes;
    for (int64_t seq = group[g + 1] - 1; seq >= group[g]; --seq) {
      std::fill(carry.begin(), carry.end(), F(0));
      for (int64_t start = in.offsets[seq], last = in.offsets[seq + 1]; last > start;) {
        // 1) the points again, and the state before them
        const int64_t first = std::max(start, (last - 1) / kChunk * kChunk);
        const int n = int(last - first);
        p.points(in, first, n, d, width);
        const F* from = states + first / kChunk * S * D + d;
        for (int64_t s = 0; s < S; ++s) {
          for (int l = 0; l < kLanes; ++l) h[s * kLanes + l] = first > start && l < width ? from[s * D + l] : F(0);
        }
        // 2) through the states
        take(gradient + first * D + d, D, n, width, p.r);
        if (in.gate) {
          for (int t = 0; t < n; ++t) {
            for (int l = 0; l < kLanes; ++l) {
              const F z = p.gate[t][l], e = exponential(-std::fabs(z)), sigmoid = (z > 0 ? F(1) : e) / (1 + e);
              p.gate[t][l] = p.r[t][l] * sigmoid * multiply_add(z, 1 - sigmoid, F(1));
              p.r[t][l] *= z * sigmoid;
            }
          }
        }
        piece_backward(p, in, first, n, a2.data(), h.data(), carry.data(), of_b, of_c, of_a);
        // 3) what is each point's own
        alignas(64) F sum_skip[kLanes] = {}, sum_bias[kLanes] = {};
        for (int t = 0; t < n; ++t) {
          for (int l = 0; l < kLanes; ++l) {
            const F u = p.u[t][l], of_dt = multiply_add(u, p.gb[t][l], F(kLn2) * p.q[t][l]);
            sum_skip[l] = multiply_add(p.r[t][l], u, sum_skip[l]);
            p.u[t][l] = multiply_add(p.dt[t][l], p.gb[t][l], p.r[t][l] * p.skip[l]);
            p.dt[t][l] = of_dt * p.slope[t][l];
            sum_bias[l] += p.dt[t][l];
            p.gate[t][l] *= p.y[t][l];
          }
        }
        for (int l = 0; l < kLanes; ++l) of_skip[l] += double(sum_skip[l]), of_bias[l] += double(sum_bias[l]);
        put(p.u, D, n, width, out.u + first * D + d);
        put(p.dt, D, n, width, out.delta + first * D + d);
        if (in.gate) put(p.gate, D, n, width, out.gate + first * D + d);
        last = first;
      }
    }
  });
  // 4) the sums over the channels and over the groups
  torch::stable::parallel_for(0, num_chunks(N), 64, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kChunk; first < std::min(N, end * kChunk); first += kChunk) {
      const int64_t n = std::min(kChunk, N - first);
      for (F* to : {out.b, out.c}) {
        for (int64_t s = 0; s < S; ++s) {
          const F* __restrict__ from = parts + ((to == out.c ? blocks * S : 0) + s) * N + first;
          F sum[kChunk] = {};
          for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t t = 0; t < n; ++t) sum[t] += from[block * S * N + t];
          }
          for (int64_t t = 0; t < n; ++t) to[(first + t) * S + s] = sum[t];
        }
      }
    }
  });
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t s = 0; s < S + 2; ++s) {
      double total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        total += sums[(g * blocks + d / kLanes) * kLanes * (S + 2) + s * kLanes + d % kLanes];
      }
      (s < S ? out.a[d * S + s] : s == S ? out.skip[d] : out.delta_bias[d]) = F(total);
    }
  }
}

template <class F>
Inputs<F> check_inputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
                       const Tensor& skip, const std::optional<Tensor>& gate, const Tensor& delta_bias,
                       const Tensor& offsets) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1), B = offsets.numel() - 1;
  for (const Tensor* t : {&u, &delta, &a, &b, &c, &skip, &delta_bias, gate ? &*gate : &u}) {
    STD_TORCH_CHECK(t->is_contiguous() && t->scalar_type() == u.scalar_type(),
                    "selective_scan: all contiguous and of one type");
  }
  STD_TORCH_CHECK(delta.numel() == N * D && (!gate || gate->numel() == N * D) && a.numel() == D * S &&
                      b.numel() == N * S && c.numel() == N * S && skip.numel() == D && delta_bias.numel() == D,
                  "selective_scan: u, delta and gate [N, D], a [D, S], b and c [N, S], skip and delta_bias [D]");
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float || u.scalar_type() == ScalarType::Double,
                  "selective_scan: in float32 or float64");
  check_tensor("selective_scan", "offsets", offsets, ScalarType::Long, {-1}, u);
  STD_TORCH_CHECK(B >= 0, "selective_scan: offsets int64 [B + 1]");
  const int64_t* rows = data<int64_t>(offsets);
  check_ascending("selective_scan: offsets", rows, B + 1, N + 1);
  STD_TORCH_CHECK(rows[0] == 0 && rows[B] == N, "selective_scan: offsets must run from 0 to the number of points");
  return {data<F>(u), data<F>(delta), data<F>(a), data<F>(b), data<F>(c), data<F>(skip),
          gate ? data<F>(*gate) : nullptr, data<F>(delta_bias), rows, N, D, S, B};
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                          const Tensor& c, const Tensor& skip, const std::optional<Tensor>& gate,
                                          const Tensor& delta_bias, const Tensor& offsets, bool with_states) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1);
  Tensor y = empty_as(u, {N, D}, u.scalar_type());
  Tensor states = empty_as(u, {with_states ? num_chunks(N) : 0, S, D}, u.scalar_type());
  const auto run = [&](auto type) {
    using F = decltype(type);
    const Inputs<F> in = check_inputs<F>(u, delta, a, b, c, skip, gate, delta_bias, offsets);
    if (y.numel() > 0) forward<F>(in, mutable_data<F>(y), with_states ? mutable_data<F>(states) : nullptr);
  };
  u.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
  return {y, states};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& gradient, const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& skip, const std::optional<Tensor>& gate, const Tensor& delta_bias, const Tensor& offsets,
    const Tensor& states) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1);
  const ScalarType dtype = u.scalar_type();
  Tensor of_u = empty_as(u, {N, D}, dtype), of_delta = empty_as(u, {N, D}, dtype), of_a = zeros_as(u, {D, S}, dtype),
         of_b = zeros_as(u, {N, S}, dtype), of_c = zeros_as(u, {N, S}, dtype), of_skip = zeros_as(u, {D}, dtype),
         of_gate = empty_as(u, {gate ? N : 0, D}, dtype), of_bias = zeros_as(u, {D}, dtype);
  const auto run = [&](auto type) {
    using F = decltype(type);
    const Inputs<F> in = check_inputs<F>(u, delta, a, b, c, skip, gate, delta_bias, offsets);
    check_tensor("selective_scan_backward", "gradient", gradient, dtype, {N, D}, u);
    check_tensor("selective_scan_backward", "states", states, dtype, {num_chunks(N), S, D}, u);
    if (N * D == 0) return;
    const Gradients<F> out{mutable_data<F>(of_u), mutable_data<F>(of_delta), mutable_data<F>(of_a),
                           mutable_data<F>(of_b), mutable_data<F>(of_c), mutable_data<F>(of_skip),
                           gate ? mutable_data<F>(of_gate) : nullptr, mutable_data<F>(of_bias)};
    backward<F>(in, data<F>(gradient), data<F>(states), out);
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {of_u, of_delta, of_a, of_b, of_c, of_skip, of_gate, of_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&kdmos::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&kdmos::selective_scan_backward));
}

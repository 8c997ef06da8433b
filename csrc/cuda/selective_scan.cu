// A linear recurrence along sequences of points, each with its own step size, input and output projection.
//
//   dt = softplus(delta + delta_bias),  h_t = e_t h_{t-1} + dt_t u_t b_t  with  e_t = exp(dt_t a)     [D, S]
//   y_t = (sum_s h_t c_t + skip u_t) silu(gate_t)                                                     [D]
// and backwards, with r = dy silu(gate) and g_t the gradient of h_t:
//   g_t = r_t c_t + e_{t+1} g_{t+1},  db_t = sum_d g_t dt_t u_t,  dc_t = sum_d r_t h_t
//   du_t = r_t skip + dt_t sum_s g_t b_t
//   da = sum_t q_t dt_t,  ddt_t = sum_s q_t a + u_t sum_s g_t b_t  with  q_t = g_t e_t h_{t-1}
//
// Least work: u, delta, gate and y once, b and c once: 16 D + 8 S bytes a point in float32, and D S exponentials a
// point, of which a multiprocessor makes 16 a clock. Both ways the points are passed in chunks of 64, cut at multiples
// of 64 whatever the sequences: 1) each chunk from a state of zero, for what it adds to the state and by how much it decays
// it; 2) the states at the chunks' ends, one after the other; 3) each chunk again from its true state. So the forward
// makes each exponential twice, the backward three times.
//
// A team of lanes has a channel, each lane four of its states. Four points at a time, lane q % 4 computes the step of
// point q % 4 and hands it round; sums over states end in the lane of their point. Nothing is added by atomics: sums
// over channels are made within a block, then over the blocks, sums over points within a chunk, then over the chunks,
// always in the same order.
#include <cmath>
#include <type_traits>

#include "../selective_scan.h"
#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kStates = 4;   // of a lane
constexpr int kGroup = 4;    // points that a team passes together
constexpr int kGroups = int(kChunk) / kGroup;
constexpr int kMostStates = 64;
constexpr int kParts = 32;  // of the chunks, each for one warp, in sums and carries over all chunks
static_assert(kChunk == 64, "a bit of a word for each point");

// Threads of a block: as many as keep the state at each group of a chunk, 4 * 19 values a thread, in 38 KiB. In
// float64, which is for checks, registers are short too: more is in shared memory.
template <class F>
constexpr bool kWide = sizeof(F) == 8;
template <class F>
constexpr int kThreads = kWide<F> ? 32 : 128;
template <class F>
constexpr int kBlocks = 512 / kThreads<F>;  // at least, on a multiprocessor: 128 registers a thread

template <class F>
struct Inputs {
  const F *u, *delta, *a, *b, *c, *skip, *gate, *delta_bias;  // gate: or null
  const int64_t* offsets;
  int64_t N, B;
  int D, S;
};

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float exponential2(float x) { return exp2f(x); }
__device__ double exponential2(double x) { return exp2(x); }
__device__ float logarithm_of_one_plus(float x) { return log1pf(x); }
__device__ double logarithm_of_one_plus(double x) { return log1p(x); }

// The points of a chunk at which a sequence starts, a bit each.
__device__ uint64_t starts_in(const int64_t* __restrict__ offsets, int64_t B, int64_t first, int n) {
  int64_t low = 0, high = B;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle] < first) low = middle + 1; else high = middle;
  }
  uint64_t starts = 0;
  for (; low < B && offsets[low] < first + n; ++low) starts |= uint64_t(1) << ((offsets[low] - first) & 63);
  return starts;
}

// Where a thread works: states 4 q .. 4 q + 3 of channel d, in a chunk of n points. kTeam lanes have a channel.
template <class F, int kTeam>
struct Place {
  __device__ explicit Place(const Inputs<F>& in)
      : first(int64_t(blockIdx.x) * kChunk), n(int(min(kChunk, in.N - first))), lane(threadIdx.x % 32),
        q(threadIdx.x % kTeam), d(blockIdx.y * (kThreads<F> / kTeam) + threadIdx.x / kTeam), there(d < in.D),
        starts(starts_in(in.offsets, in.B, first, n)) {}

  // Row of point t of the chunk; beyond the last, that of the last.
  __device__ int64_t row(int t) const { return first + min(t, n - 1); }
  // Of value [t, d], if the chunk has point t.
  __device__ int64_t at(int t, int D) const { return (first + t) * D + d; }
  __device__ bool has(int t) const { return there && t < n; }
  // Of state i of chunk k in [chunks, rows, D].
  __device__ int64_t state(int64_t k, int rows, int i, int D) const { return (k * rows + kStates * q + i) * D + d; }

  int64_t first;
  int n, lane, q, d;
  bool there;
  uint64_t starts;
};

// Four values from states 4 q on, of a row of S; 0 beyond. `whole`: 16-byte loads, S a multiple of 4.
template <bool kWhole, class F>
__device__ void take_states(const F* __restrict__ row, int q, int S, F (&to)[kStates]) {
  if constexpr (kWhole) {
    const auto vec = load<kStates>(row + kStates * q);
#pragma unroll
    for (int i = 0; i < kStates; ++i) to[i] = vec.value[i];
  } else {
#pragma unroll
    for (int i = 0; i < kStates; ++i) to[i] = kStates * q + i < S ? row[kStates * q + i] : F(0);
  }
}

// a log2(e) of the lane's states, for exponentials of base 2; 0 where there are none, so that these stay 0.
template <class F, int kTeam>
__device__ void take_a(const Inputs<F>& in, const Place<F, kTeam>& at, F (&a2)[kStates]) {
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    const int s = kStates * at.q + i;
    a2[i] = at.there && s < in.S ? F(in.a[int64_t(at.d) * in.S + s] * kLog2e) : F(0);
  }
}

// The states with which a chunk begins (or ends), of [chunks, S, D].
template <class F, int kTeam>
__device__ void take_carry(const Inputs<F>& in, const Place<F, kTeam>& at, const F* __restrict__ from,
                           F (&to)[kStates]) {
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    to[i] = at.there && kStates * at.q + i < in.S ? from[at.state(blockIdx.x, in.S, i, in.D)] : F(0);
  }
}

template <class F, int kTeam>
__device__ void put_carry(const Inputs<F>& in, const Place<F, kTeam>& at, const F (&from)[kStates],
                          F* __restrict__ to) {
#pragma unroll
  for (int i = 0; i < kStates; ++i) {
    if (at.there && kStates * at.q + i < in.S) to[at.state(blockIdx.x, in.S, i, in.D)] = from[i];
  }
}

// A lane's own point; beyond the last and without channel all 0, which leaves states as they are.
template <class F>
struct Point {
  F u = 0, dt = 0, slope = 0;  // slope: of dt by delta
};

template <class F, int kTeam>
__device__ Point<F> take_point(const Inputs<F>& in, const Place<F, kTeam>& at, int t, F delta_bias) {
  Point<F> p;
  if (at.has(t)) {
    const F v = in.delta[at.at(t, in.D)] + delta_bias;
    p.u = in.u[at.at(t, in.D)];
    p.dt = v > 20 ? v : logarithm_of_one_plus(exponential(v));
    p.slope = v > 20 ? F(1) : 1 / (1 + exponential(-v));
  }
  return p;
}

// The value of the lane that has point j of the group.
template <class F>
__device__ F of_point(F value, int lane, int j) {
  return __shfl_sync(~0u, value, (lane & ~(kGroup - 1)) | j);
}

// Sums over a team of a value for each of four points, the sum of point q % 4 in lane q.
template <int kTeam, class F>
__device__ F sum_over_team(const F (&v)[kGroup], int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  const F low = (upper ? v[2] : v[0]) + __shfl_xor_sync(~0u, upper ? v[0] : v[2], 2);
  const F high = (upper ? v[3] : v[1]) + __shfl_xor_sync(~0u, upper ? v[1] : v[3], 2);
  F sum = (odd ? high : low) + __shfl_xor_sync(~0u, odd ? low : high, 1);
#pragma unroll
  for (int m = 4; m < kTeam; m *= 2) sum += __shfl_xor_sync(~0u, sum, m);
  return sum;
}

// Sums over the channels of a warp of eight values of each lane; of these, lane l ends with kKept =
// 8 / (32 / kTeam), from number l / kTeam * kKept on, in v[0] .. v[kKept - 1].
template <int kTeam, class F>
__device__ void sum_over_channels(F (&v)[2 * kStates], int lane) {
  int n = 2 * kStates;
#pragma unroll
  for (int m = 16; m >= kTeam; m /= 2) {
    n /= 2;
    const bool upper = lane & m;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      v[i] = (upper ? v[n + i] : v[i]) + __shfl_xor_sync(~0u, upper ? v[i] : v[n + i], m);
    }
  }
}

// Sum of each lane's own points, over the four lanes that have them.
template <class F>
__device__ F sum_over_group(F value) {
  value += __shfl_xor_sync(~0u, value, 2);
  return value + __shfl_xor_sync(~0u, value, 1);
}

// The gate's factor and its derivative.
template <class F>
__device__ F silu(F z) {
  return z / (1 + exponential(-z));
}

template <class F>
__device__ F silu_slope(F z) {
  const F sigmoid = 1 / (1 + exponential(-z));
  return sigmoid * multiply_add(z, 1 - sigmoid, F(1));
}

// 1) What each chunk adds to the state, [chunks, S, D], and its sum of steps, [chunks, D], or -1 if a sequence starts
// in it. Backward: likewise what it adds to the gradient of the state before it.
template <class F, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kThreads<F>, kBlocks<F>)
    local_kernel(const Inputs<F> in, F* __restrict__ local, F* __restrict__ steps) {
  const Place<F, kTeam> at(in);
  const F delta_bias = at.there ? in.delta_bias[at.d] : F(0);
  F a2[kStates], h[kStates] = {}, total = 0;
  take_a(in, at, a2);
  for (int from = 0; from < at.n; from += kGroup) {
    const Point<F> p = take_point(in, at, from + at.q % kGroup, delta_bias);
    total += p.dt;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const F dt = of_point(p.dt, at.lane, j), x = of_point(p.dt * p.u, at.lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F b[kStates];
      take_states<kWhole>(in.b + at.row(from + j) * in.S, at.q, in.S, b);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        h[i] = multiply_add(exponential2(dt * a2[i]), start ? F(0) : h[i], x * b[i]);
      }
    }
  }
  total = sum_over_group(total);
  put_carry(in, at, h, local);
  if (at.there && at.q == 0) steps[int64_t(blockIdx.x) * in.D + at.d] = at.starts ? F(-1) : total;
}

template <class F, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kThreads<F>, kBlocks<F>)
    local_backward_kernel(const Inputs<F> in, const F* __restrict__ gradient, F* __restrict__ local,
                          F* __restrict__ steps) {
  const Place<F, kTeam> at(in);
  const F delta_bias = at.there ? in.delta_bias[at.d] : F(0);
  F a2[kStates], carry[kStates] = {}, total = 0;
  take_a(in, at, a2);
  for (int from = (at.n - 1) / kGroup * kGroup; from >= 0; from -= kGroup) {
    const int own = from + at.q % kGroup;
    const Point<F> p = take_point(in, at, own, delta_bias);
    F r = at.has(own) ? gradient[at.at(own, in.D)] : F(0);
    if (in.gate && at.has(own)) r *= silu(in.gate[at.at(own, in.D)]);
    total += p.dt;
#pragma unroll
    for (int j = kGroup - 1; j >= 0; --j) {
      const F dt = of_point(p.dt, at.lane, j), r_j = of_point(r, at.lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F c[kStates];
      take_states<kWhole>(in.c + at.row(from + j) * in.S, at.q, in.S, c);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const F g = multiply_add(r_j, c[i], carry[i]);
        carry[i] = start ? F(0) : exponential2(dt * a2[i]) * g;
      }
    }
  }
  total = sum_over_group(total);
  put_carry(in, at, carry, local);
  if (at.there && at.q == 0) steps[int64_t(blockIdx.x) * in.D + at.d] = at.starts ? F(-1) : total;
}

// decay * value + add, where nothing comes through a decay of 0, infinities of another sequence neither.
template <class F>
__device__ F carry_on(F decay, F value, F add) {
  return decay == 0 ? add : multiply_add(decay, value, add);
}

// 2) In place of what each chunk adds, the state before it (backward: what comes from behind it). A block has 32
// channels of one state, each warp a part of the chunks: first what its part adds, then from what is before the part.
template <class F>
__global__ void __launch_bounds__(32 * kParts)
    carry_kernel(const F* __restrict__ a, const F* __restrict__ steps, int64_t chunks, int D, int S, bool backward,
                 F* __restrict__ local) {
  __shared__ F part_decay[kParts][32], part_value[kParts][32];
  const int x = threadIdx.x, part = threadIdx.y, d = blockIdx.x * 32 + x, s = blockIdx.y;
  const int64_t begin = chunks * part / kParts, end = chunks * (part + 1) / kParts;
  const bool there = d < D;
  const F a2 = there ? F(a[int64_t(d) * S + s] * kLog2e) : F(0);
  const auto decay_of = [&](int64_t k) {
    const F total = steps[k * D + d];
    return total < 0 ? F(0) : exponential2(total * a2);
  };
  F decay = 1, value = 0;
  if (there) {
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = backward ? chunks - 1 - i : i;
      const F through = decay_of(k);
      value = carry_on(through, value, local[(k * S + s) * D + d]);
      decay *= through;
    }
  }
  part_decay[part][x] = decay;
  part_value[part][x] = value;
  __syncthreads();
  value = 0;
  for (int before = 0; before < part; ++before) {
    value = carry_on(part_decay[before][x], value, part_value[before][x]);
  }
  if (there) {
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = backward ? chunks - 1 - i : i, place = (k * S + s) * D + d;
      const F add = local[place];
      local[place] = value;
      value = carry_on(decay_of(k), value, add);
    }
  }
}

// 3) The output, each chunk from the state before it.
template <class F, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kThreads<F>, kBlocks<F>)
    selective_scan_kernel(const Inputs<F> in, const F* __restrict__ states, F* __restrict__ y) {
  const Place<F, kTeam> at(in);
  const F delta_bias = at.there ? in.delta_bias[at.d] : F(0), skip = at.there ? in.skip[at.d] : F(0);
  F a2[kStates], h[kStates];
  take_a(in, at, a2);
  take_carry(in, at, states, h);
  for (int from = 0; from < at.n; from += kGroup) {
    const int own = from + at.q % kGroup;
    const Point<F> p = take_point(in, at, own, delta_bias);
    F part[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const F dt = of_point(p.dt, at.lane, j), x = of_point(p.dt * p.u, at.lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F b[kStates], c[kStates];
      take_states<kWhole>(in.b + at.row(from + j) * in.S, at.q, in.S, b);
      take_states<kWhole>(in.c + at.row(from + j) * in.S, at.q, in.S, c);
      part[j] = 0;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        h[i] = multiply_add(exponential2(dt * a2[i]), start ? F(0) : h[i], x * b[i]);
        part[j] = multiply_add(h[i], c[i], part[j]);
      }
    }
    F sum = multiply_add(skip, p.u, sum_over_team<kTeam>(part, at.lane));
    if (at.has(own) && at.q < kGroup) {
      const int64_t place = at.at(own, in.D);
      if (in.gate) sum *= silu(in.gate[place]);
      y[place] = sum;
    }
  }
}

template <class F>
struct Gradients {
  F *u, *delta, *gate;
  F *b, *c;   // [tiles of channels, N, S]
  F* points;  // sums over a chunk's points: [chunks, S + 2, D], of a, then skip, then delta_bias
};

// 3) The gradients, each chunk from the state before it and what comes from behind it, the last points first.
template <class F, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kThreads<F>, kBlocks<F>)
    selective_scan_backward_kernel(const Inputs<F> in, const F* __restrict__ gradient, const F* __restrict__ states,
                                   const F* __restrict__ carries, const Gradients<F> out) {
  constexpr int kWarps = kThreads<F> / 32, kKept = 2 * kStates * kTeam / 32, kColumns = 2 * kStates * kTeam;
  // Of this thread alone: the states before each group and then, from the present group's place on, before each of its
  // points.
  __shared__ F before[kGroups + kGroup - 1][kStates][kThreads<F>];
  __shared__ F of_warp[kGroup][kWarps][kColumns];  // of b, then of c
  // Decays of the group's points, the sums of a, and a log2(e): in registers, or for float64 in shared memory.
  constexpr int kSum = kGroup, kRate = kGroup + 1;
  __shared__ F shared[kWide<F> ? kGroup + 2 : 1][kStates][kThreads<F>];
  F own[kGroup + 2][kStates];
  const auto held = [&](int row, int i) -> F& {
    if constexpr (kWide<F>) {
      return shared[row][i][threadIdx.x];
    } else {
      return own[row][i];
    }
  };
  const Place<F, kTeam> at(in);
  const int D = in.D, S = in.S, lane = at.lane, warp = threadIdx.x / 32;
  const F delta_bias = at.there ? in.delta_bias[at.d] : F(0), skip = at.there ? in.skip[at.d] : F(0);
  F h[kStates], carry[kStates], of_skip = 0, of_bias = 0;
  take_a(in, at, h);
#pragma unroll
  for (int i = 0; i < kStates; ++i) held(kRate, i) = h[i], held(kSum, i) = 0;
  take_carry(in, at, states, h);
  take_carry(in, at, carries, carry);
  // a) the state before each group
  for (int from = 0; from < at.n; from += kGroup) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) before[from / kGroup][i][threadIdx.x] = h[i];
    if (from + kGroup >= at.n) break;
    const Point<F> p = take_point(in, at, from + at.q % kGroup, delta_bias);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const F dt = of_point(p.dt, lane, j), x = of_point(p.dt * p.u, lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F b[kStates];
      take_states<kWhole>(in.b + at.row(from + j) * S, at.q, S, b);
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        h[i] = multiply_add(exponential2(dt * held(kRate, i)), start ? F(0) : h[i], x * b[i]);
      }
    }
  }
  for (int from = (at.n - 1) / kGroup * kGroup; from >= 0; from -= kGroup) {
    // b) forward through the group: the state before each point (0 at a start), its decay, and what y gives the gate
    const int mine = from + at.q % kGroup;
    const bool has = at.has(mine);
    const int64_t place = at.at(mine, D);
    const Point<F> p = take_point(in, at, mine, delta_bias);
    const F dy = has ? gradient[place] : F(0), z = has && in.gate ? in.gate[place] : F(0);
    const F r = in.gate ? dy * silu(z) : dy;
    F part[kGroup], part_q[kGroup];
    F(*before_point)[kStates][kThreads<F>] = before + from / kGroup;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = before_point[0][i][threadIdx.x];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const F dt = of_point(p.dt, lane, j), x = of_point(p.dt * p.u, lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F b[kStates], c[kStates];
      take_states<kWhole>(in.b + at.row(from + j) * S, at.q, S, b);
      take_states<kWhole>(in.c + at.row(from + j) * S, at.q, S, c);
      part[j] = 0;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        if (start) h[i] = 0;
        before_point[j][i][threadIdx.x] = h[i];
        const F e = exponential2(dt * held(kRate, i));
        held(j, i) = e;
        h[i] = multiply_add(e, h[i], x * b[i]);
        part[j] = multiply_add(h[i], c[i], part[j]);
      }
    }
    if (in.gate) {
      const F y = multiply_add(skip, p.u, sum_over_team<kTeam>(part, lane));
      if (has && at.q < kGroup) out.gate[place] = dy * silu_slope(z) * y;
    }
    // c) and back
#pragma unroll
    for (int j = kGroup - 1; j >= 0; --j) {
      const F dt = of_point(p.dt, lane, j), x = of_point(p.dt * p.u, lane, j), r_j = of_point(r, lane, j);
      const bool start = (at.starts >> (from + j)) & 1;
      F b[kStates], c[kStates], of_states[2 * kStates];
      take_states<kWhole>(in.b + at.row(from + j) * S, at.q, S, b);
      take_states<kWhole>(in.c + at.row(from + j) * S, at.q, S, c);
      part[j] = part_q[j] = 0;
#pragma unroll
      for (int i = 0; i < kStates; ++i) {
        const F previous = before_point[j][i][threadIdx.x], g = multiply_add(r_j, c[i], carry[i]);
        const F e = held(j, i), of_previous = g * e, q = of_previous * previous;
        of_states[i] = g * x;
        of_states[kStates + i] = r_j * multiply_add(e, previous, x * b[i]);
        carry[i] = start ? F(0) : of_previous;
        part[j] = multiply_add(g, b[i], part[j]);
        part_q[j] = multiply_add(q, held(kRate, i), part_q[j]);
        held(kSum, i) = multiply_add(q, dt, held(kSum, i));
      }
      sum_over_channels<kTeam>(of_states, lane);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int number = lane / kTeam * kKept + i;  // of the eight: four states of b, four of c
        of_warp[j][warp][number / kStates * (kStates * kTeam) + kStates * at.q + number % kStates] = of_states[i];
      }
    }
    // d) what is each point's own
    const F of_x = sum_over_team<kTeam>(part, lane), of_exponent = sum_over_team<kTeam>(part_q, lane);
    const F of_delta = multiply_add(p.u, of_x, F(kLn2) * of_exponent) * p.slope;
    of_skip = multiply_add(r, p.u, of_skip);
    of_bias += of_delta;
    if (has && at.q < kGroup) {
      out.u[place] = multiply_add(p.dt, of_x, r * skip);
      out.delta[place] = of_delta;
    }
    // e) b and c: the warps' sums, in their order
    __syncthreads();
    for (int i = threadIdx.x; i < kGroup * kColumns; i += kThreads<F>) {
      const int j = i / kColumns, column = i % kColumns, s = column % (kStates * kTeam);
      if (from + j < at.n && s < S) {
        F sum = of_warp[j][0][column];
#pragma unroll
        for (int w = 1; w < kWarps; ++w) sum += of_warp[j][w][column];
        F* to = column < kStates * kTeam ? out.b : out.c;
        to[(int64_t(blockIdx.y) * in.N + at.first + from + j) * S + s] = sum;
      }
    }
    __syncthreads();
  }
  of_skip = sum_over_group(of_skip);
  of_bias = sum_over_group(of_bias);
  if (at.there) {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      if (kStates * at.q + i < S) out.points[at.state(blockIdx.x, S + 2, i, D)] = held(kSum, i);
    }
    if (at.q == 0) {
      out.points[(int64_t(blockIdx.x) * (S + 2) + S) * D + at.d] = of_skip;
      out.points[(int64_t(blockIdx.x) * (S + 2) + S + 1) * D + at.d] = of_bias;
    }
  }
}

// 4) Sums over the chunks, of [chunks, S + 2, D]. A block has 32 channels of one row, each warp a part of the chunks.
template <class F>
__global__ void __launch_bounds__(32 * kParts)
    sum_chunks_kernel(const F* __restrict__ points, int64_t chunks, int D, int S, F* __restrict__ of_a,
                      F* __restrict__ of_skip, F* __restrict__ of_bias) {
  __shared__ double part_sum[kParts][32];
  const int x = threadIdx.x, part = threadIdx.y, d = blockIdx.x * 32 + x, s = blockIdx.y;
  double sum = 0;
  if (d < D) {
#pragma unroll 4
    for (int64_t k = chunks * part / kParts; k < chunks * (part + 1) / kParts; ++k) {
      sum += double(points[(k * (S + 2) + s) * D + d]);
    }
  }
  part_sum[part][x] = sum;
  __syncthreads();
  if (part == 0 && d < D) {
    for (int other = 1; other < kParts; ++other) sum += part_sum[other][x];
    F* to = s < S ? of_a + int64_t(d) * S + s : (s == S ? of_skip : of_bias) + d;
    *to = F(sum);
  }
}

// 5) Sums over the tiles of channels, of [tiles, N * S].
template <class F>
__global__ void __launch_bounds__(256)
    sum_tiles_kernel(const F* __restrict__ parts, int64_t size, int tiles, F* __restrict__ to) {
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < size; i += int64_t(gridDim.x) * 256) {
    F sum = parts[i];
    for (int tile = 1; tile < tiles; ++tile) sum += parts[tile * size + i];
    to[i] = sum;
  }
}

// `offsets` is not read on the host: that it ascends from 0 to the number of points is the caller's word. Were it
// wrong, the result would be, but nothing outside the tensors is touched.
template <class F>
Inputs<F> check_inputs(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
                       const Tensor& skip, const std::optional<Tensor>& gate, const Tensor& delta_bias,
                       const Tensor& offsets) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1), B = offsets.numel() - 1;
  for (const Tensor* t : {&u, &delta, &a, &b, &c, &skip, &delta_bias, gate ? &*gate : &u}) {
    STD_TORCH_CHECK(t->is_cuda() && t->get_device_index() == u.get_device_index() && t->is_contiguous() &&
                        t->scalar_type() == u.scalar_type(),
                    "selective_scan: all on one GPU, contiguous and of one type");
  }
  STD_TORCH_CHECK(delta.numel() == N * D && (!gate || gate->numel() == N * D) && a.numel() == D * S &&
                      b.numel() == N * S && c.numel() == N * S && skip.numel() == D && delta_bias.numel() == D,
                  "selective_scan: u, delta and gate [N, D], a [D, S], b and c [N, S], skip and delta_bias [D]");
  STD_TORCH_CHECK(u.scalar_type() == ScalarType::Float || u.scalar_type() == ScalarType::Double,
                  "selective_scan: in float32 or float64");
  check_tensor("selective_scan", "offsets", offsets, ScalarType::Long, {-1}, u);
  STD_TORCH_CHECK(B >= 0, "selective_scan: offsets int64 [B + 1]");
  STD_TORCH_CHECK(S <= kMostStates && D <= 1 << 18, "selective_scan: at most ", kMostStates, " states and ", 1 << 18,
                  " channels");
  STD_TORCH_CHECK(num_chunks(N) <= 0x7fffffff, "selective_scan: too many points");
  return {data<F>(u), data<F>(delta), data<F>(a), data<F>(b), data<F>(c), data<F>(skip),
          gate ? data<F>(*gate) : nullptr, data<F>(delta_bias), data<int64_t>(offsets), N, B, int(D), int(S)};
}

// body(lanes of a team, whether rows of S are 16-byte loads)
template <class F, class Body>
void for_states(const Inputs<F>& in, const Body& body) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (in.S > 16) return body(std::integral_constant<int, 16>{}, std::false_type{});
  if constexpr (!kWide<F>) {
    if (in.S == 16 && aligned(in.b) && aligned(in.c)) return body(std::integral_constant<int, 4>{}, std::true_type{});
  }
  return body(std::integral_constant<int, 4>{}, std::false_type{});
}

// A block for each chunk and tile of channels.
template <class F, int kTeam>
dim3 tiles_of(const Inputs<F>& in) {
  constexpr int kChannels = kThreads<F> / kTeam;
  return dim3(unsigned(num_chunks(in.N)), unsigned((in.D + kChannels - 1) / kChannels));
}

template <class F>
void launch_carry(const Inputs<F>& in, const F* steps, bool backward, F* local, cudaStream_t stream) {
  if (in.S == 0) return;
  const dim3 grid(unsigned((in.D + 31) / 32), unsigned(in.S)), block(32, kParts);
  carry_kernel<F><<<grid, block, 0, stream>>>(in.a, steps, num_chunks(in.N), in.D, in.S, backward, local);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> selective_scan(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b,
                                          const Tensor& c, const Tensor& skip, const std::optional<Tensor>& gate,
                                          const Tensor& delta_bias, const Tensor& offsets, bool with_states) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1), chunks = num_chunks(N);
  const ScalarType dtype = u.scalar_type();
  STD_TORCH_CHECK(u.is_cuda() && u.dim() == 2 && a.dim() == 2, "selective_scan: all on the GPU, u [N, D], a [D, S]");
  const OnDevice device(u);
  Tensor y = empty_as(u, {N, D}, dtype), states = empty_as(u, {chunks, S, D}, dtype);
  const auto run = [&](auto type) {
    using F = decltype(type);
    const Inputs<F> in = check_inputs<F>(u, delta, a, b, c, skip, gate, delta_bias, offsets);
    if (N * D == 0) return;
    Tensor steps = empty_as(u, {chunks, D}, dtype);
    for_states(in, [&](auto team, auto whole) {
      constexpr int kTeam = decltype(team)::value;
      constexpr bool kWhole = decltype(whole)::value;
      const cudaStream_t stream = device.stream();
      const dim3 grid = tiles_of<F, kTeam>(in);
      F *at_start = mutable_data<F>(states), *of_steps = mutable_data<F>(steps);
      local_kernel<F, kTeam, kWhole><<<grid, kThreads<F>, 0, stream>>>(in, at_start, of_steps);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      launch_carry<F>(in, of_steps, false, at_start, stream);
      selective_scan_kernel<F, kTeam, kWhole><<<grid, kThreads<F>, 0, stream>>>(in, at_start, mutable_data<F>(y));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {y, with_states ? states : empty_as(u, {0, S, D}, dtype)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Tensor& gradient, const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& skip, const std::optional<Tensor>& gate, const Tensor& delta_bias, const Tensor& offsets,
    const Tensor& states) {
  const int64_t N = u.size(0), D = u.size(1), S = a.size(1), chunks = num_chunks(N);
  const ScalarType dtype = u.scalar_type();
  STD_TORCH_CHECK(u.is_cuda() && u.dim() == 2 && a.dim() == 2, "selective_scan: all on the GPU, u [N, D], a [D, S]");
  const OnDevice device(u);
  Tensor of_u = empty_as(u, {N, D}, dtype), of_delta = empty_as(u, {N, D}, dtype), of_a = zeros_as(u, {D, S}, dtype),
         of_b = zeros_as(u, {N, S}, dtype), of_c = zeros_as(u, {N, S}, dtype), of_skip = zeros_as(u, {D}, dtype),
         of_gate = empty_as(u, {gate ? N : 0, D}, dtype), of_bias = zeros_as(u, {D}, dtype);
  const auto run = [&](auto type) {
    using F = decltype(type);
    const Inputs<F> in = check_inputs<F>(u, delta, a, b, c, skip, gate, delta_bias, offsets);
    check_tensor("selective_scan_backward", "gradient", gradient, dtype, {N, D}, u);
    check_tensor("selective_scan_backward", "states", states, dtype, {chunks, S, D}, u);
    if (N * D == 0) return;
    Tensor steps = empty_as(u, {chunks, D}, dtype), carries = empty_as(u, {chunks, S, D}, dtype);
    Tensor points = empty_as(u, {chunks, S + 2, D}, dtype);
    for_states(in, [&](auto team, auto whole) {
      constexpr int kTeam = decltype(team)::value;
      constexpr bool kWhole = decltype(whole)::value;
      const cudaStream_t stream = device.stream();
      const dim3 grid = tiles_of<F, kTeam>(in);
      const int64_t tiles = grid.y;
      Tensor parts = empty_as(u, {tiles > 1 ? 2 * tiles * N * S : 0}, dtype);
      F *to_b = mutable_data<F>(of_b), *to_c = mutable_data<F>(of_c), *from_behind = mutable_data<F>(carries);
      F* part_b = tiles > 1 ? mutable_data<F>(parts) : to_b;
      F* part_c = tiles > 1 ? part_b + tiles * N * S : to_c;
      const Gradients<F> out{mutable_data<F>(of_u), mutable_data<F>(of_delta),
                             gate ? mutable_data<F>(of_gate) : nullptr, part_b, part_c, mutable_data<F>(points)};
      local_backward_kernel<F, kTeam, kWhole><<<grid, kThreads<F>, 0, stream>>>(in, data<F>(gradient), from_behind,
                                                                                 mutable_data<F>(steps));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      launch_carry<F>(in, data<F>(steps), true, from_behind, stream);
      selective_scan_backward_kernel<F, kTeam, kWhole><<<grid, kThreads<F>, 0, stream>>>(
          in, data<F>(gradient), data<F>(states), from_behind, out);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      const dim3 rows(unsigned((D + 31) / 32), unsigned(S + 2)), block(32, kParts);
      sum_chunks_kernel<F><<<rows, block, 0, stream>>>(out.points, chunks, int(D), int(S), mutable_data<F>(of_a),
                                                       mutable_data<F>(of_skip), mutable_data<F>(of_bias));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      if (tiles > 1 && S > 0) {
        const unsigned int blocks = num_blocks(N * S, 256);
        sum_tiles_kernel<F><<<blocks, 256, 0, stream>>>(part_b, N * S, int(tiles), to_b);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        sum_tiles_kernel<F><<<blocks, 256, 0, stream>>>(part_c, N * S, int(tiles), to_c);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  };
  dtype == ScalarType::Double ? run(double{}) : run(float{});
  return {of_u, of_delta, of_a, of_b, of_c, of_skip, of_gate, of_bias};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&kdmos::selective_scan));
  m.impl("selective_scan_backward", TORCH_BOX(&kdmos::selective_scan_backward));
}

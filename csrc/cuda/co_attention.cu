// Co-attention and the 2x2 maxima of both branches, channels last; the equations stand in co_attention.h.
//
// Least work: `fused` and motion read once, appearance twice (the mean over the image stands between), the result and
// the maxima written once; a pixel takes 18 D + M + 3 C multiply-adds. Of a scan in bfloat16, at 3.0 TB/s:
//
//   image    C    M    D   MB     us   10^6 multiply-adds
//   480x360  32   16   32  53.9   18   119
//   240x180  64   32   32  24.2    8    35
//   120x90   128  64   32  11.4    4    11
//   60x45    256  128  32   5.5    2     4
//
// 95 MB and 32 us in all, 25 us where appearance is still in L2 when it is read again; arithmetic takes 6 us. Small
// images are a matter of latency: hence four launches. What one must know of the whole image, the blocks of the next
// join themselves from parts, in float64 and always in the same order: no atomics, no counters, and the result depends
// on nothing but the image. The number of parts depends on its height and width alone.
#include "../co_attention.h"

#include <algorithm>
#include <numeric>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : 3;  // of a multiprocessor, at least: as registers allow without spilling
constexpr int64_t kMostY = 65535;                // CUDA's limit for gridDim.y, over which images are spread
constexpr int64_t kMost = 1LL << 30;             // pixels of an image, and channels: they are counted in int

// Gates: a block has tiles of kSide x kSide pixels. A thread takes kRun of them, one below the other, so that a weight
// that it loads serves kRun times and a value up to six; and of the channels one of kUnits units of 16 bytes, or of one
// channel where rows do not divide. The units of a pixel are summed in the end.
constexpr int kTaps = 9;  // of a 3x3 convolution
constexpr int kSide = 16, kRun = 4, kUnits = 4;
constexpr int kWide = kSide + 2, kPixels = kWide * kWide;  // of a tile with its halo
constexpr int kUnitLoads = 6;                              // that a thread makes at once: its share of the tile
constexpr int64_t kMostGateParts = 1024;                   // each block of the next launch reads them all
static_assert(kSide * kSide / kRun * kUnits == kThreads);

// A tile lies in kUnits planes. Shared memory serves eight lanes at a time with 16 bytes each, and they collide where
// the places of two differ by a multiple of eight. Lanes that compute read eight neighbours of a plane; lanes that fill
// it write two neighbours in each of four planes: apart by 2 modulo 8, so that neither collide.
constexpr int kPlane = kPixels + (10 - kPixels % 8) % 8;
static_assert(kPlane % 8 == 2 && kUnits == 4);

// The rest goes by squares of 2x2 pixels: about kParts parts, which fill the GPU whatever the level, and more where
// they would have more than kMostSquares, for which there is shared memory.
constexpr int64_t kParts = 256, kMostSquares = 128;
constexpr int kPixelLoads = 4;            // of appearance that a thread makes at once
constexpr int kSlice = 32;                // channels, and rows of the channel matrix, of a block
constexpr int64_t kMostAttending = 1024;  // blocks of an image: each makes the softmax anew

struct Tiles {
  explicit Tiles(const AttentionShape& n)
      : across(int((n.W + kSide - 1) / kSide)), num(int((n.H + kSide - 1) / kSide) * across),
        size(int((num + kMostGateParts - 1) / kMostGateParts)), parts((num + size - 1) / size) {}
  int across, num, size, parts;  // size: of a part
};

struct Squares {  // of which the last row and column may lack pixels
  explicit Squares(const AttentionShape& n)
      : across(int((n.W + 1) / 2)), num(int((n.H + 1) / 2) * across),
        size(int(std::min((num + kParts - 1) / kParts, kMostSquares))), parts((num + size - 1) / size) {}
  int across, num, size, parts;
};

template <class F>
__device__ F sigmoid(F x) {
  return F(1) / (F(1) + exp(-x));
}

__device__ double sum(double a, double b) { return a + b; }

template <class F>
__device__ F larger(F a, F b) {
  return a > b ? a : b;
}

// A value of each thread of a warp, joined in a tree; every lane gets the sum.
template <class F>
__device__ F sum_of_warp(F value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
  return value;
}

// A value of each thread of a block of kThreads, joined in a tree, then warp by warp; every thread gets it.
template <double (*kJoin)(double, double)>
__device__ double of_block(double value) {
  __shared__ double memory[kWarps];
  for (int step = 16; step > 0; step /= 2) value = kJoin(value, __shfl_xor_sync(0xffffffff, value, step));
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = value;
  __syncthreads();
  double all = memory[0];
#pragma unroll
  for (int i = 1; i < kWarps; ++i) all = kJoin(all, memory[i]);
  __syncthreads();  // before the next value takes the memory
  return all;
}

// 1) sums of sigmoid(3x3 convolution) over tiles, for both gates: parts [B, parts, 2]
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    gate_parts_kernel(const T* __restrict__ fused, const wide_t<T>* __restrict__ weight,
                      const wide_t<T>* __restrict__ bias, const AttentionShape n, const Tiles tiles,
                      wide_t<T>* __restrict__ parts) {
  using F = wide_t<T>;
  using Unit = Vec<T, V>;
  using Four = Vec<F, 4>;
  constexpr int kChannels = kUnits * V;  // at a time
  __shared__ Unit tile[kUnits][kPlane];
  __shared__ Four weights[kUnits][3][V][2];  // [unit, column, channel, row and gate]: six of each eight
  __shared__ F sums[kUnits][2][kRun][kThreads / kUnits];
  __shared__ F of_warps[2][kWarps];
  const int thread = int(threadIdx.x), H = int(n.H), W = int(n.W), D = int(n.D);
  const int x = thread % kSide, run = thread / kSide % (kSide / kRun), unit = thread / (kThreads / kUnits);
  const int end = min(tiles.num, int(blockIdx.x + 1) * tiles.size);
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    const T* image = fused + b * H * W * D;
    F first = 0, second = 0;
    for (int t = int(blockIdx.x) * tiles.size; t < end; ++t) {
      const int top = t / tiles.across * kSide, left = t % tiles.across * kSide;
      F value[2][kRun];
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        value[0][r] = unit == 0 ? bias[0] : F(0);
        value[1][r] = unit == 0 ? bias[1] : F(0);
      }
      for (int base = 0; base < D; base += kChannels) {
        // 1a) the tile, its circle closed, zeros beyond the first and the last row; and its weights
#pragma unroll 1
        for (int batch = thread; batch < kPixels * kUnits; batch += kUnitLoads * kThreads) {
          Unit loaded[kUnitLoads];
#pragma unroll
          for (int k = 0; k < kUnitLoads; ++k) {
            const int i = batch + k * kThreads, pixel = i / kUnits, d = base + i % kUnits * V;
            const int row = top + pixel / kWide - 1;
            int column = left + pixel % kWide - 1;
            column = column < 0 ? column + W : column >= W ? column - W : column;
            loaded[k] = Unit{};
            if (pixel < kPixels && row >= 0 && row < H && column < W && d < D) {
              loaded[k] = load<V>(image + int64_t(row * W + column) * D + d);
            }
          }
#pragma unroll
          for (int k = 0; k < kUnitLoads; ++k) {
            const int i = batch + k * kThreads;
            if (i < kPixels * kUnits) tile[i % kUnits][i / kUnits] = loaded[k];
          }
        }
        for (int i = thread; i < 2 * kChannels * kTaps; i += kThreads) {
          const int gate = i / (kChannels * kTaps), d = i / kTaps % kChannels, tap = i % kTaps;
          if (base + d >= D) continue;
          const int place = tap / 3 * 2 + gate;
          weights[d / V][tap % 3][d % V][place / 4].value[place % 4] = weight[(gate * D + base + d) * kTaps + tap];
        }
        __syncthreads();
        // 1b) kRun pixels of one unit: all lanes of a warp want the same weights
        if (base + unit * V < D) {
#pragma unroll 1
          for (int column = 0; column < 3; ++column) {
            Unit from[kRun + 2];
#pragma unroll
            for (int i = 0; i < kRun + 2; ++i) from[i] = tile[unit][(run * kRun + i) * kWide + x + column];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const Four upper = weights[unit][column][v][0], lower = weights[unit][column][v][1];
              const F of[3][2] = {{upper.value[0], upper.value[1]}, {upper.value[2], upper.value[3]},
                                  {lower.value[0], lower.value[1]}};
#pragma unroll
              for (int i = 0; i < kRun + 2; ++i) {
#pragma unroll
                for (int r = 0; r < kRun; ++r) {
                  if (r > i || i > r + 2) continue;
                  value[0][r] = multiply_add(F(from[i].value[v]), of[i - r][0], value[0][r]);
                  value[1][r] = multiply_add(F(from[i].value[v]), of[i - r][1], value[1][r]);
                }
              }
            }
          }
        }
        __syncthreads();  // before the next channels, or tile, take the memory
      }
      // 1c) a thread a pixel: the units in order
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        sums[unit][0][r][thread % (kThreads / kUnits)] = value[0][r];
        sums[unit][1][r][thread % (kThreads / kUnits)] = value[1][r];
      }
      __syncthreads();
      const int r = thread / (kThreads / kUnits), place = thread % (kThreads / kUnits);
      F a = 0, m = 0;
#pragma unroll
      for (int i = 0; i < kUnits; ++i) a += sums[i][0][r][place], m += sums[i][1][r][place];
      if (top + run * kRun + r < H && left + x < W) first += sigmoid(a), second += sigmoid(m);
    }
    first = sum_of_warp(first), second = sum_of_warp(second);
    if (thread % 32 == 0) of_warps[0][thread / 32] = first, of_warps[1][thread / 32] = second;
    __syncthreads();
    if (thread < 2) {
      F total = 0;
      for (int i = 0; i < kWarps; ++i) total += of_warps[thread][i];
      parts[(b * tiles.parts + blockIdx.x) * 2 + thread] = total;
    }
    __syncthreads();  // before the next image takes the memory
  }
}

// 2) s of each pixel, seen [B, squares, 4]; the maxima of motion; sums of s * appearance over a part of the squares,
// parts [B, parts, C]; and g_a, gates [B], in passing
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    seen_kernel(const T* __restrict__ appearance, const T* __restrict__ motion,
                const wide_t<T>* __restrict__ gate_parts, int num_gate_parts, const wide_t<T>* __restrict__ weight,
                const wide_t<T>* __restrict__ bias, const AttentionShape n, const Squares squares, int width,
                wide_t<T>* __restrict__ gates, wide_t<T>* __restrict__ seen, T* __restrict__ half,
                wide_t<T>* __restrict__ parts) {
  using F = wide_t<T>;
  using Four = Vec<F, 4>;
  using Pixels = Vec<int, 4>;
  __shared__ Four s[kMostSquares];
  __shared__ Pixels pixels[kMostSquares];  // of a square; -1 where the image has none
  __shared__ F memory[V][kThreads];        // neighbours in neighbouring banks
  const int thread = int(threadIdx.x), H = int(n.H), W = int(n.W), C = int(n.C), M = int(n.M);
  const int teams = kThreads / width, team = thread / width, lane = thread % width;
  const int across = min(C / V, kThreads), rows = kThreads / across, x = thread % across, y = thread / across;
  const int begin = int(blockIdx.x) * squares.size, count = min(squares.size, squares.num - begin);
  const F offset = bias[0];
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    // 2a) the gates
    const auto gate_of = [&](int branch) {
      const F* from = gate_parts + b * num_gate_parts * 2 + branch;
      double value = 0;
#pragma unroll 4
      for (int i = thread; i < num_gate_parts; i += kThreads) value += double(from[2 * i]);
      return F(of_block<sum>(value) / double(n.H * n.W));
    };
    const F gate = gate_of(1);
    if (blockIdx.x == 0) {
      const F gate_a = gate_of(0);
      if (thread == 0) gates[b] = gate_a;
    }
    // 2b) a team of lanes a square: each lane sums its channels, then the lanes are summed in a tree
    const T* moving = motion + b * H * W * M;
    for (int base = 0; base < count; base += teams) {
      const bool real = base + team < count;  // teams without a square go along: the sums need whole warps
      const int place = min(base + team, count - 1), square = begin + place;
      const int h = square / squares.across, w = square % squares.across;
      const bool below = 2 * h + 1 < H, right = 2 * w + 1 < W;
      int at[4];  // missing ones are read as their neighbours
#pragma unroll
      for (int k = 0; k < 4; ++k) at[k] = (2 * h + (k / 2 && below)) * W + 2 * w + (k % 2 && right);
      F value[4] = {};
      for (int m = lane * V; m < M; m += width * V) {
        const Vec<F, V> by = load<V>(weight + m);
        Vec<T, V> pixel[4], maximum;
#pragma unroll
        for (int k = 0; k < 4; ++k) pixel[k] = load<V>(moving + int64_t(at[k]) * M + m);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          F x[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            x[k] = F(pixel[k].value[v]);
            value[k] = multiply_add(x[k], by.value[v], value[k]);
          }
          maximum.value[v] = narrow<T>(larger(larger(x[0], x[1]), larger(x[2], x[3])));
        }
        if (real && below && right) store(half + ((b * (H / 2) + h) * (W / 2) + w) * M + m, maximum);
      }
      for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < 4; ++k) value[k] += __shfl_xor_sync(0xffffffff, value[k], step);
      }
      if (lane != 0 || !real) continue;
      Four where;
      Pixels there;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool missing = (k / 2 && !below) || (k % 2 && !right);
        where.value[k] = missing ? F(0) : sigmoid(multiply_add(gate, value[k], offset));
        there.value[k] = missing ? -1 : at[k];
      }
      s[place] = where, pixels[place] = there;
      store(seen + (b * squares.num + square) * 4, where);
    }
    __syncthreads();
    // 2c) a thread a vector of channels of every rows-th pixel, then the threads in a tree; further channels are walked
    for (int base = 0; base < C; base += across * V) {
      const int c = base + x * V;
      const bool inside = y < rows && c < C;
      F value[V] = {};
      if (inside) {
        const T* from = appearance + b * H * W * C + c;
        for (int i = y; i < 4 * count; i += kPixelLoads * rows) {
          Vec<T, V> loaded[kPixelLoads];
          F where[kPixelLoads];
#pragma unroll
          for (int k = 0; k < kPixelLoads; ++k) {
            const int place = min(i + k * rows, 4 * count - 1), pixel = pixels[place / 4].value[place % 4];
            const bool there = i + k * rows < 4 * count && pixel >= 0;
            where[k] = there ? s[place / 4].value[place % 4] : F(0);
            loaded[k] = Vec<T, V>{};
            if (there) loaded[k] = load<V>(from + int64_t(pixel) * C);
          }
#pragma unroll
          for (int k = 0; k < kPixelLoads; ++k) {
#pragma unroll
            for (int v = 0; v < V; ++v) value[v] = multiply_add(where[k], F(loaded[k].value[v]), value[v]);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) memory[v][thread] = value[v];
      for (int left = rows; left > 1;) {
        const int middle = (left + 1) / 2;
        __syncthreads();
        if (y + middle < left) {
#pragma unroll
          for (int v = 0; v < V; ++v) memory[v][thread] += memory[v][thread + middle * across];
        }
        left = middle;
      }
      if (y == 0 && inside) {  // its own thread added the last
        Vec<F, V> total;
#pragma unroll
        for (int v = 0; v < V; ++v) total.value[v] = memory[v][thread];
        store(parts + (b * squares.parts + blockIdx.x) * C + c, total);
      }
      __syncthreads();  // before the next channels, or image, take the memory
    }
  }
}

// 3) channel g_a mean(s * appearance) + bias, in slices of kSlice channels of the mean, so that a block joins the parts
// of no others: z [B, slices, C]. A warp a row of the matrix; a block is one slice of kSlice rows.
template <class F>
__global__ void __launch_bounds__(kSlice* kSlice)
    channel_kernel(const F* __restrict__ parts, int num_parts, const F* __restrict__ gates,
                   const F* __restrict__ channel, const F* __restrict__ bias, const AttentionShape n,
                   double* __restrict__ z) {
  static_assert(kSlice == 32, "a lane a channel");
  __shared__ double memory[kSlice][kSlice + 1];  // read by columns
  __shared__ double means[kSlice];
  const int warp = int(threadIdx.x) / kSlice, lane = int(threadIdx.x) % kSlice, C = int(n.C);
  const int slices = (C + kSlice - 1) / kSlice, slice = int(blockIdx.x) % slices;
  const int k = slice * kSlice + lane, c = int(blockIdx.x) / slices * kSlice + warp;
  const double by = k < C && c < C ? double(channel[int64_t(c) * C + k]) : 0.0;
  const double offset = slice == 0 && c < C ? double(bias[c]) : 0.0;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    const double gate = double(gates[b]);
    double value = 0;
    if (k < C) {
      const F* from = parts + b * num_parts * C + k;
#pragma unroll 8
      for (int part = warp; part < num_parts; part += kSlice) value += double(from[int64_t(part) * C]);
    }
    memory[warp][lane] = value;
    __syncthreads();
    value = sum_of_warp(memory[lane][warp]);
    if (lane == 0) means[warp] = value / double(n.H * n.W);
    __syncthreads();
    value = sum_of_warp(by * means[lane]) * gate + offset;
    if (lane == 0 && c < C) z[(b * slices + slice) * C + c] = value;
    __syncthreads();  // before the next image takes the memory
  }
}

// 4) the result and its maxima. Each block makes the softmax of z anew; then a thread takes a vector of channels of
// every rows-th square.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<T> + 1)
    attend_kernel(const T* __restrict__ appearance, const wide_t<T>* __restrict__ seen,
                  const wide_t<T>* __restrict__ gates, const double* __restrict__ z, const AttentionShape n,
                  const Squares squares, T* __restrict__ out, T* __restrict__ half) {
  using F = wide_t<T>;
  using Channels = Vec<F, V>;
  __shared__ Channels scale[kThreads];
  const int thread = int(threadIdx.x), H = int(n.H), W = int(n.W), C = int(n.C);
  const int across = min(C / V, kThreads), rows = kThreads / across, x = thread % across, y = thread / across;
  const int slices = (C + kSlice - 1) / kSlice;
  for (int64_t b = blockIdx.y; b < n.B; b += gridDim.y) {
    // 4a) the softmax
    const F gate = gates[b];
    const auto z_of = [&](int c) {
      double value = 0;
#pragma unroll 4
      for (int slice = 0; slice < slices; ++slice) value += z[(b * slices + slice) * C + c];
      return value;
    };
    double most = -HUGE_VAL, total = 0;
#pragma unroll 1
    for (int c = thread; c < C; c += kThreads) most = larger(most, z_of(c));
    most = of_block<larger<double>>(most);
#pragma unroll 1
    for (int c = thread; c < C; c += kThreads) total += exp(z_of(c) - most);
    const double factor = double(gate) * double(C) / of_block<sum>(total);
    for (int base = 0; base < C; base += across * V) {
#pragma unroll 1
      for (int i = thread; i < min(across * V, C - base); i += kThreads) {
        scale[i / V].value[i % V] = F(factor * exp(z_of(base + i) - most));
      }
      __syncthreads();
      // 4b) squares
      const int c = base + x * V;
      const T* from = appearance + b * H * W * C + c;
      T *to = out + b * H * W * C + c, *halved = half + b * (H / 2) * (W / 2) * C + c;
      const int first = y < rows && c < C ? int(blockIdx.x) * rows + y : squares.num;
      const Channels by = scale[x];
      for (int square = first; square < squares.num; square += int(gridDim.x) * rows) {
        const int h = square / squares.across * 2, w = square % squares.across * 2;
        const Vec<F, 4> s = load<4>(seen + (b * squares.num + square) * 4);
        Vec<T, V> value[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = h + k / 2, column = w + k % 2;
          if (row < H && column < W) value[k] = load<V>(from + int64_t(row * W + column) * C);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int row = h + k / 2, column = w + k % 2;
          if (row >= H || column >= W) continue;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            value[k].value[v] = narrow<T>(F(value[k].value[v]) * multiply_add(s.value[k], by.value[v], gate));
          }
          store(to + int64_t(row * W + column) * C, value[k]);
        }
        if (h + 1 >= H || w + 1 >= W) continue;
        Vec<T, V> maximum;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          maximum.value[v] = narrow<T>(larger(larger(F(value[0].value[v]), F(value[1].value[v])),
                                              larger(F(value[2].value[v]), F(value[3].value[v]))));
        }
        store(halved + int64_t(h / 2 * (W / 2) + w / 2) * C, maximum);
      }
      __syncthreads();  // before the next channels, or image, take the memory
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> co_attention(const Tensor& appearance, const Tensor& motion, const Tensor& fused,
                                                const Tensor& gate, const Tensor& gate_bias, const Tensor& spatial,
                                                const Tensor& spatial_bias, const Tensor& channel,
                                                const Tensor& channel_bias) {
  const AttentionShape n =
      attention_shape({appearance, motion, fused, gate, gate_bias, spatial, spatial_bias, channel, channel_bias});
  STD_TORCH_CHECK(n.H <= kMost / n.W && n.C <= kMost / (kSlice * kSlice) && n.M <= kMost && n.D <= kMost / kTaps / 2,
                  "co_attention: image too large");
  const OnDevice device(appearance);
  const cudaStream_t stream = device.stream();
  const ScalarType dtype = appearance.scalar_type(), wide = gate.scalar_type();
  Tensor attended = empty_as(appearance, {n.B, n.H, n.W, n.C}, dtype);
  Tensor half_appearance = empty_as(appearance, {n.B, n.H / 2, n.W / 2, n.C}, dtype);
  Tensor half_motion = empty_as(appearance, {n.B, n.H / 2, n.W / 2, n.M}, dtype);
  const auto results = [&] {
    return std::make_tuple(channels_last(attended), channels_last(half_appearance), channels_last(half_motion));
  };
  if (n.B == 0) return results();
  const unsigned images = unsigned(std::min(n.B, kMostY));
  const Tiles tiles(n);
  const Squares squares(n);
  const int64_t slices = (n.C + kSlice - 1) / kSlice;
  Tensor of_gates = empty_as(gate, {n.B, tiles.parts, 2}, wide), gates = empty_as(gate, {n.B}, wide);
  Tensor seen = empty_as(gate, {n.B, squares.num, 4}, wide), of_seen = empty_as(gate, {n.B, squares.parts, n.C}, wide);
  Tensor z = empty_as(gate, {n.B, slices, n.C}, ScalarType::Double);
  for_floating("co_attention", dtype, [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T *from = data<T>(appearance), *moving = data<T>(motion);
    T *out = mutable_data<T>(attended), *half = mutable_data<T>(half_appearance);
    T* halved = mutable_data<T>(half_motion);
    for_vector<T>(n.D, {data<T>(fused)}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      gate_parts_kernel<T, V><<<dim3(unsigned(tiles.parts), images), kThreads, 0, stream>>>(
          data<T>(fused), data<F>(gate), data<F>(gate_bias), n, tiles, mutable_data<F>(of_gates));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_vector<T>(std::gcd(n.M, n.C), {from, moving, halved, data<F>(spatial)}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      seen_kernel<T, V><<<dim3(unsigned(squares.parts), images), kThreads, 0, stream>>>(
          from, moving, data<F>(of_gates), tiles.parts, data<F>(spatial), data<F>(spatial_bias), n, squares,
          team_width(n.M / V), mutable_data<F>(gates), mutable_data<F>(seen), halved, mutable_data<F>(of_seen));
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    channel_kernel<F><<<dim3(unsigned(slices * slices), images), kSlice * kSlice, 0, stream>>>(
        data<F>(of_seen), squares.parts, data<F>(gates), data<F>(channel), data<F>(channel_bias), n,
        mutable_data<double>(z));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    for_vector<T>(n.C, {from, out, half}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const int64_t rows = kThreads / std::min<int64_t>(n.C / V, kThreads);
      attend_kernel<T, V><<<dim3(num_blocks(squares.num, rows, kMostAttending), images), kThreads, 0, stream>>>(
          from, data<F>(seen), data<F>(gates), data<double>(z), n, squares, out, half);
    });
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return results();
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("co_attention", TORCH_BOX(&kdmos::co_attention)); }

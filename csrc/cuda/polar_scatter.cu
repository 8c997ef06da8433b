// Largest feature of the points of each cell, over points sorted by cell: lanes over channels, 16 bytes each.
//
// Least work forward: each feature read once, 8 bytes of argmax and one maximum a cell and channel written. Backward:
// each gradient of a point written once, no zeroing, no atomics: a cell knows all its points. One comparison a feature:
// bytes decide. A few cells near the sensor have hundreds of points, the most have two or three, so that a cell is the
// work of one team of lanes, but a long one that of all teams of a block.
//
// What `order` and `start` hold is not read on the host: rows that they name outside of the features are skipped.
#include <algorithm>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // eight warps: enough to share a long cell, small enough to follow it with little idling
constexpr int kBlocks = 3;     // of a multiprocessor, at least: 48 kB of rows under way there, no registers spilled
constexpr int kBatch = 4;      // rows whose loads are under way at the same time
constexpr int kLong = 32;      // points of a cell beyond which the teams of a block share it

// How a block of teams walks over cells and slices of channels; a slice is one vector a lane.
struct Slices {
  int teams, team, lane;
  int64_t tile, count;  // channels of a slice, slices of a row

  __device__ Slices(int width, int vector, int64_t C)
      : teams(kThreads / width), team(int(threadIdx.x) / width), lane(int(threadIdx.x) % width),
        tile(int64_t(width) * vector), count((C + tile - 1) / tile) {}
};

// The points [first, last) of cell m, of N.
struct Span {
  int64_t first, last;

  __device__ Span(const int64_t* __restrict__ start, int64_t m, int64_t N)
      : first(max(start[m], int64_t(0))), last(min(start[m + 1], N)) {}
  __device__ int64_t size() const { return last - first; }  // not above 0: empty
};

// The row of a point in the order, -1 where there is none. No order: the points are sorted already.
__device__ int32_t row_of(const int64_t* __restrict__ order, int64_t at, int64_t N) {
  const int64_t row = order ? order[at] : at;
  return uint64_t(row) < uint64_t(N) ? int32_t(row) : -1;
}

// NaN wins, as in torch; of equal values the lower point wins, whichever comes first.
template <bool kWithPoint, class F>
__device__ void take(F value, int32_t row, F& largest, int32_t& point) {
  bool wins = (value > largest) | ((value != value) & (largest == largest));
  if (kWithPoint) {
    wins |= (value == largest) & (row < point);
    point = wins ? row : point;
  }
  largest = wins ? value : largest;
}

// largest[k], point[k] of the rows [first, last) in the channels from `features` on; -inf and no point without rows.
template <bool kWithPoint, class T, int kVector>
__device__ void cell_maximum(const T* __restrict__ features, int64_t N, int64_t C, const int64_t* __restrict__ order,
                             int64_t first, int64_t last, wide_t<T> (&largest)[kVector], int32_t (&point)[kVector]) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) largest[k] = -wide_t<T>(INFINITY), point[k] = INT32_MAX;
  for (int64_t i = first; i < last; i += kBatch) {
    int32_t row[kBatch];
    Vec<T, kVector> feature[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      row[b] = row_of(order, min(i + b, last - 1), N);  // the last row again changes nothing
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) feature[b] = load<kVector>(features + int64_t(max(row[b], 0)) * C);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (row[b] < 0) continue;
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        take<kWithPoint>(wide_t<T>(feature[b].value[k]), row[b], largest[k], point[k]);
      }
    }
  }
}

// With points: maximum and argmax [M, C]. Without: maximum [num_places, C], of which the rows `cells` are written, or
// row m for cell m where that is null.
template <class T, int kVector, bool kWithPoint>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cell_maximum_kernel(const T* __restrict__ features, const int64_t* __restrict__ order,
                        const int64_t* __restrict__ start, const int64_t* __restrict__ cells, int64_t N, int64_t M,
                        int64_t C, int64_t num_places, int width, T* __restrict__ maximum,
                        int64_t* __restrict__ argmax) {
  using F = wide_t<T>;
  __shared__ F part_largest[kThreads * kVector];
  __shared__ int32_t part_point[kWithPoint ? kThreads * kVector : 1];
  const Slices slices(width, kVector, C);
  const int64_t items = M * slices.count, stride = int64_t(gridDim.x) * slices.teams;
  F largest[kVector];
  int32_t point[kVector];
  for (int64_t base = int64_t(blockIdx.x) * slices.teams; base < items; base += stride) {
    // 1) a cell for each team
    bool is_long = false;
    if (base + slices.team < items) {
      const int64_t m = (base + slices.team) / slices.count;
      const int64_t c = (base + slices.team) % slices.count * slices.tile + slices.lane * kVector;
      const int64_t to = kWithPoint || !cells ? m : cells[m];
      const Span span(start, m, N);
      is_long = span.size() > kLong;
      if (!is_long && c < C && uint64_t(to) < uint64_t(num_places)) {
        cell_maximum<kWithPoint>(features + c, N, C, order, span.first, span.last, largest, point);
        const auto empty = [&](int k) { return kWithPoint ? point[k] == INT32_MAX : span.size() <= 0; };
        Vec<T, kVector> out;
#pragma unroll
        for (int k = 0; k < kVector; ++k) out.value[k] = T(empty(k) ? F(0) : largest[k]);
        store(maximum + to * C + c, out);
        if constexpr (kWithPoint) {
          Vec<int64_t, kVector> out_point;
#pragma unroll
          for (int k = 0; k < kVector; ++k) out_point.value[k] = empty(k) ? -1 : point[k];
          store(argmax + to * C + c, out_point);
        }
      }
    }
    if (!__syncthreads_or(is_long)) continue;

    // 2) the long cells of this block, one after the other: each team some rows, then the best of the teams in order
    for (int t = 0; t < slices.teams && base + t < items; ++t) {
      const int64_t m = (base + t) / slices.count, slice = (base + t) % slices.count * slices.tile;
      const int64_t to = kWithPoint || !cells ? m : cells[m];
      const Span span(start, m, N);
      if (span.size() <= kLong || uint64_t(to) >= uint64_t(num_places)) continue;  // the same for all threads
      const int64_t step = (span.size() + slices.teams - 1) / slices.teams;
      const int64_t from = min(span.first + slices.team * step, span.last), until = min(from + step, span.last);
      const int64_t c = slice + slices.lane * kVector;
      if (c < C) {
        cell_maximum<kWithPoint>(features + c, N, C, order, from, until, largest, point);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          part_largest[threadIdx.x * kVector + k] = largest[k];  // [teams, tile]
          if (kWithPoint) part_point[threadIdx.x * kVector + k] = point[k];
        }
      }
      __syncthreads();
      const int tile = int(slices.tile);
      for (int k = threadIdx.x; k < tile && slice + k < C; k += kThreads) {
        F best = part_largest[k];
        int32_t best_point = kWithPoint ? part_point[k] : 0;
        for (int part = k + tile; part < slices.teams * tile; part += tile) {
          take<kWithPoint>(part_largest[part], kWithPoint ? part_point[part] : 0, best, best_point);
        }
        const bool empty = kWithPoint && best_point == INT32_MAX;
        maximum[to * C + slice + k] = T(empty ? F(0) : best);
        if (kWithPoint) argmax[to * C + slice + k] = empty ? -1 : best_point;
      }
      __syncthreads();  // the parts are used up
    }
  }
}

// What the kernels read: values [N, C], the order of points [N], the start of cells [M + 1].
void check_sorted(const char* op, const char* name, const Tensor& values, const std::optional<Tensor>& order,
                  const Tensor& start, int64_t N) {
  STD_TORCH_CHECK(values.is_cuda() && values.dim() == 2, op, ": expected ", name, " of two dimensions, on the GPU");
  check_tensor(op, name, values, values.scalar_type(), {-1, -1}, values);
  if (order) check_tensor(op, "order", *order, ScalarType::Long, {N}, values);
  check_tensor(op, "start", start, ScalarType::Long, {-1}, values);
  STD_TORCH_CHECK(start.size(0) > 0 && N < (int64_t(1) << 31), op, ": start [M + 1], and at most 2^31 points");
}

template <bool kWithPoint>
void launch_cell_maximum(const char* op, const Tensor& features, const std::optional<Tensor>& order,
                         const Tensor& start, const int64_t* cells, int64_t num_places, const Tensor& maximum,
                         int64_t* argmax, cudaStream_t stream) {
  const int64_t N = features.size(0), C = features.size(1), M = start.size(0) - 1;
  if (M == 0 || C == 0) return;
  for_floating(op, features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* feature = data<T>(features);
    for_vector<T>(C, {feature}, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int width = team_width(C / kVector);
      const int64_t slices = (C + width * kVector - 1) / (width * kVector);
      cell_maximum_kernel<T, kVector, kWithPoint><<<num_blocks(M * slices, kThreads / width), kThreads, 0, stream>>>(
          feature, order ? data<int64_t>(*order) : nullptr, data<int64_t>(start), cells, N, M, C, num_places, width,
          mutable_data<T>(maximum), argmax);
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor> polar_scatter(const Tensor& features, const std::optional<Tensor>& order,
                                         const Tensor& start) {
  check_sorted("polar_scatter", "features", features, order, start, features.size(0));
  const int64_t C = features.size(1), M = start.size(0) - 1;
  const OnDevice device(features);
  Tensor maximum = empty_as(features, {M, C}, features.scalar_type());
  Tensor argmax = empty_as(features, {M, C}, ScalarType::Long);
  launch_cell_maximum<true>("polar_scatter", features, order, start, nullptr, M, maximum,
                            mutable_data<int64_t>(argmax), device.stream());
  return {maximum, argmax};
}

// polar_scatter without argmax; [M, C].
Tensor cell_max(const Tensor& features, const std::optional<Tensor>& order, const Tensor& start) {
  check_sorted("cell_max", "features", features, order, start, features.size(0));
  const int64_t M = start.size(0) - 1;
  const OnDevice device(features);
  Tensor maximum = empty_as(features, {M, features.size(1)}, features.scalar_type());
  launch_cell_maximum<false>("cell_max", features, order, start, nullptr, M, maximum, nullptr, device.stream());
  return maximum;
}

// The gradient of a cell's rows [first, last): its own where the row is the largest, else 0.
template <class T, int kVector>
__device__ void cell_gradient(const T* __restrict__ gradient, const int64_t* __restrict__ argmax,
                              const int64_t* __restrict__ order, int64_t first, int64_t last, int64_t N, int64_t C,
                              T* __restrict__ points) {
  if (first >= last) return;
  const Vec<T, kVector> g = load<kVector>(gradient);
  const Vec<int64_t, kVector> arg = load<kVector>(argmax);
  int32_t point[kVector];
#pragma unroll
  for (int k = 0; k < kVector; ++k) point[k] = int32_t(arg.value[k]);
  for (int64_t i = first; i < last; i += kBatch) {
    int32_t row[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      row[b] = row_of(order, min(i + b, last - 1), N);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      Vec<T, kVector> out;
#pragma unroll
      for (int k = 0; k < kVector; ++k) out.value[k] = point[k] == row[b] ? g.value[k] : T(0.0f);
      if (i + b < last && row[b] >= 0) store(points + int64_t(row[b]) * C, out);
    }
  }
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    polar_scatter_backward_kernel(const T* __restrict__ gradient, const int64_t* __restrict__ argmax,
                                  const int64_t* __restrict__ order, const int64_t* __restrict__ start, int64_t M,
                                  int64_t C, int64_t N, int width, T* __restrict__ points) {
  const Slices slices(width, kVector, C);
  const int64_t items = M * slices.count, stride = int64_t(gridDim.x) * slices.teams;
  for (int64_t base = int64_t(blockIdx.x) * slices.teams; base < items; base += stride) {
    // 1) a cell for each team
    bool is_long = false;
    if (base + slices.team < items) {
      const int64_t m = (base + slices.team) / slices.count;
      const int64_t c = (base + slices.team) % slices.count * slices.tile + slices.lane * kVector;
      const Span span(start, m, N);
      is_long = span.size() > kLong;
      if (!is_long && c < C) {
        cell_gradient<T, kVector>(gradient + m * C + c, argmax + m * C + c, order, span.first, span.last, N, C,
                                  points + c);
      }
    }
    if (!__syncthreads_or(is_long)) continue;

    // 2) the long cells of this block: each team some rows
    for (int t = 0; t < slices.teams && base + t < items; ++t) {
      const int64_t m = (base + t) / slices.count;
      const int64_t c = (base + t) % slices.count * slices.tile + slices.lane * kVector;
      const Span span(start, m, N);
      if (span.size() <= kLong || c >= C) continue;
      const int64_t step = (span.size() + slices.teams - 1) / slices.teams;
      const int64_t from = min(span.first + slices.team * step, span.last), until = min(from + step, span.last);
      cell_gradient<T, kVector>(gradient + m * C + c, argmax + m * C + c, order, from, until, N, C, points + c);
    }
  }

  // 3) points outside all cells: the rest of the order, before the first cell and after the last
  const int64_t before = min(max(start[0], int64_t(0)), N), after = min(max(start[M], before), N);
  Vec<T, kVector> zero;
#pragma unroll
  for (int k = 0; k < kVector; ++k) zero.value[k] = T(0.0f);
  for (int64_t i = int64_t(blockIdx.x) * slices.teams + slices.team; i < before + N - after; i += stride) {
    const int32_t row = row_of(order, i < before ? i : i - before + after, N);
    if (row < 0) continue;
    for (int64_t c = slices.lane * kVector; c < C; c += slices.tile) store(points + row * C + c, zero);
  }
}

Tensor polar_scatter_backward(const Tensor& gradient, const Tensor& argmax, const std::optional<Tensor>& order,
                              const Tensor& start, int64_t num_points) {
  check_sorted("polar_scatter_backward", "gradient", gradient, order, start, num_points);
  const int64_t M = gradient.size(0), C = gradient.size(1), N = num_points;
  check_tensor("polar_scatter_backward", "argmax", argmax, ScalarType::Long, {M, C}, gradient);
  STD_TORCH_CHECK(start.size(0) == M + 1, "polar_scatter_backward: gradient and argmax [M, C], start [M + 1]");
  const OnDevice device(gradient);
  Tensor points = empty_as(gradient, {N, C}, gradient.scalar_type());
  if (N == 0 || C == 0) return points;
  for_floating("polar_scatter_backward", gradient.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(gradient);
    const int64_t* arg = data<int64_t>(argmax);
    for_vector<T>(C, {from, arg}, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int width = team_width(C / kVector);
      const int64_t slices = (C + width * kVector - 1) / (width * kVector);
      // how many points lie outside is on the device: teams for an eighth of all
      const int64_t work = std::max(M, N / 8) * slices;
      polar_scatter_backward_kernel<T, kVector>
          <<<num_blocks(work, kThreads / width), kThreads, 0, device.stream()>>>(
              from, arg, order ? data<int64_t>(*order) : nullptr, data<int64_t>(start), M, C, N, width,
              mutable_data<T>(points));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return points;
}

// [num_places, C], all zero.
Tensor zero_places(const Tensor& like, int64_t num_places, int64_t C, cudaStream_t stream) {
  Tensor dense = empty_as(like, {num_places, C}, like.scalar_type());
  const size_t bytes = dense.numel() * dense.element_size();
  if (bytes) STD_CUDA_CHECK(cudaMemsetAsync(dense.mutable_data_ptr(), 0, bytes, stream));
  return dense;
}

// polar_scatter into the dense places, without argmax; [num_places, C].
Tensor polar_scatter_bev(const Tensor& features, const std::optional<Tensor>& order, const Tensor& start,
                         const Tensor& cells, int64_t num_places) {
  check_sorted("polar_scatter_bev", "features", features, order, start, features.size(0));
  check_tensor("polar_scatter_bev", "cells", cells, ScalarType::Long, {start.size(0) - 1}, features);
  const OnDevice device(features);
  Tensor dense = zero_places(features, num_places, features.size(1), device.stream());
  launch_cell_maximum<false>("polar_scatter_bev", features, order, start, data<int64_t>(cells), num_places, dense,
                             nullptr, device.stream());
  return dense;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cells_to_bev_kernel(const T* __restrict__ values, const int64_t* __restrict__ cells, int64_t M, int64_t C,
                        int64_t num_places, int width, T* __restrict__ dense) {
  const Slices slices(width, kVector, C);
  const int64_t stride = int64_t(gridDim.x) * slices.teams;
  for (int64_t m = int64_t(blockIdx.x) * slices.teams + slices.team; m < M; m += stride) {
    const int64_t to = cells[m];
    if (uint64_t(to) >= uint64_t(num_places)) continue;
    for (int64_t c = slices.lane * kVector; c < C; c += slices.tile) {
      store(dense + to * C + c, load<kVector>(values + m * C + c));
    }
  }
}

Tensor cells_to_bev(const Tensor& values, const Tensor& cells, int64_t num_places) {
  STD_TORCH_CHECK(values.is_cuda() && values.dim() == 2, "cells_to_bev: expected values [M, C] on the GPU");
  const int64_t M = values.size(0), C = values.size(1);
  check_tensor("cells_to_bev", "values", values, values.scalar_type(), {M, C}, values);
  check_tensor("cells_to_bev", "cells", cells, ScalarType::Long, {M}, values);
  const OnDevice device(values);
  Tensor dense = zero_places(values, num_places, C, device.stream());
  if (M == 0 || C == 0) return dense;
  for_floating("cells_to_bev", values.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(values);
    for_vector<T>(C, {from}, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int width = team_width(C / kVector);
      cells_to_bev_kernel<T, kVector><<<num_blocks(M, kThreads / width), kThreads, 0, device.stream()>>>(
          from, data<int64_t>(cells), M, C, num_places, width, mutable_data<T>(dense));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return dense;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("polar_scatter", TORCH_BOX(&kdmos::polar_scatter));
  m.impl("polar_scatter_backward", TORCH_BOX(&kdmos::polar_scatter_backward));
  m.impl("cell_max", TORCH_BOX(&kdmos::cell_max));
  m.impl("polar_scatter_bev", TORCH_BOX(&kdmos::polar_scatter_bev));
  m.impl("cells_to_bev", TORCH_BOX(&kdmos::cells_to_bev));
}

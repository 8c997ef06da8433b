// Points to polar voxels: features, then one stable sort by voxel that every later op uses.
//
// Least work: 16 bytes in and 84 out a point, about 60 operations of which 3 are float64 divisions: bytes decide. The
// radix sort moves 16 bytes a point for each 8 bits of the voxel's number, 4 times for 8 scans of 480 x 360 x 32.
#include <algorithm>
#include <bit>
#include <limits>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include "../geometry.h"
#include "launch.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // 9 kB of features wait in shared memory, so that many such blocks fit
constexpr int kBlocks = 4;     // of a multiprocessor, at least: enough warps, and no registers spilled
constexpr int kFeatures = 9;

struct Axis {
  double lower, upper, interval;
  int bins;
};

struct Grid {
  Axis rho, phi, height;
};

// Calls call(scratch, bytes) as CUB wants it: once to learn the bytes, once to work.
template <class Call>
void with_scratch(const Tensor& like, const Call& call) {
  size_t bytes = 0;
  STD_CUDA_CHECK(call(nullptr, bytes));
  bytes = bytes ? bytes : 1;  // no address would ask for the bytes again
  Tensor scratch = empty_as(like, {int64_t(bytes)}, ScalarType::Byte);
  STD_CUDA_CHECK(call(scratch.mutable_data_ptr(), bytes));
}

// Memory for keys of any width.
template <class Key>
Tensor empty_keys(const Tensor& like, int64_t N) {
  return empty_as(like, {N}, sizeof(Key) == 4 ? ScalarType::Int : ScalarType::Long);
}

// The points by ascending key; equal keys stay in their order.
template <class Key>
void sort_points(const Tensor& like, const Key* key, Key* sorted_key, const int32_t* point, int32_t* sorted_point,
                 int64_t N, uint64_t last_key, cudaStream_t stream) {
  const int bits = last_key ? int(std::bit_width(last_key)) : 1;
  with_scratch(like, [&](void* scratch, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(scratch, bytes, key, sorted_key, point, sorted_point, int32_t(N), 0, bits,
                                           stream);
  });
}

// Scan of a row: the last that does not start after it. In [0, B) whatever the offsets say.
__device__ int64_t scan_of(const int64_t* __restrict__ start, int64_t B, int64_t i) {
  int64_t low = 0, high = B - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (start[middle] <= i) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The bin, and the offset from its centre. The points are finite by contract; NaN must still not leave the grid.
__device__ int bin_of(float v, const Axis& axis, float& offset) {
  const int index = min(max(polar_index(v, axis.lower, axis.upper, axis.interval), 0), axis.bins - 1);
  // not fused, as in torch
  offset = float(v - __dadd_rn(__dmul_rn(index + 0.5, axis.interval), axis.lower));
  return index;
}

template <class Key>
__global__ void __launch_bounds__(kThreads, kBlocks)
    points_kernel(const float* __restrict__ xyzr, const int64_t* __restrict__ start, int64_t N, int64_t B, Grid grid,
                  bool aligned, float* __restrict__ feature, Key* __restrict__ key, int32_t* __restrict__ point,
                  int64_t* __restrict__ ends) {
  __shared__ float tile[kThreads * kFeatures];  // nine is odd: no bank conflicts
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    ends[0] = start[0];
    ends[1] = start[B];
  }
  const int64_t num_points = start[B];  // the rows from there on are padding
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < N; first += int64_t(gridDim.x) * kThreads) {
    const int64_t i = first + threadIdx.x;
    if (i < N && i >= num_points) {
#pragma unroll
      for (int k = 0; k < kFeatures; ++k) tile[threadIdx.x * kFeatures + k] = 0.0f;
      key[i] = Key(B * grid.rho.bins * grid.phi.bins * grid.height.bins);  // above all voxels
      point[i] = int32_t(i);
    } else if (i < N) {
      const float4 p = aligned ? reinterpret_cast<const float4*>(xyzr)[i]
                               : make_float4(xyzr[4 * i], xyzr[4 * i + 1], xyzr[4 * i + 2], xyzr[4 * i + 3]);
      // not fused, as in torch: the ring must not depend on it
      const float r = __fsqrt_rn(__fadd_rn(__fmul_rn(p.x, p.x), __fmul_rn(p.y, p.y)));
      const float a = angle<double>(p.y, p.x);
      float dr, da, dz;
      const int ring = bin_of(r, grid.rho, dr), sector = bin_of(a, grid.phi, da), up = bin_of(p.z, grid.height, dz);
      const float row[kFeatures] = {dr, da, dz, r, a, p.z, p.x, p.y, p.w};
#pragma unroll
      for (int k = 0; k < kFeatures; ++k) tile[threadIdx.x * kFeatures + k] = row[k];
      const int64_t place = (scan_of(start, B, i) * grid.rho.bins + ring) * grid.phi.bins + sector;
      key[i] = Key(place * grid.height.bins + up);
      point[i] = int32_t(i);
    }
    __syncthreads();
    const int size = int(min(int64_t(kThreads), N - first)) * kFeatures;
    for (int k = threadIdx.x; k < size; k += kThreads) feature[first * kFeatures + k] = tile[k];
    __syncthreads();
  }
}

// 1 in the upper half where a cell starts, 1 in the lower half where a voxel does: one sum counts both.
template <class Key>
struct Starts {
  const Key* key;
  Key Z;
  __host__ __device__ uint64_t operator()(int32_t i) const {
    constexpr uint64_t kCell = uint64_t(1) << 32;
    if (i == 0) return kCell + 1;
    const Key before = key[i - 1], here = key[i];
    return (before / Z != here / Z ? kCell : 0) + (before != here ? 1 : 0);
  }
};

// What cells and voxels have beyond those with points is padding: outside the grid, and where the points end. If there
// are more cells than num_cells, those left over have none, and cell_start ends where the first of them starts.
template <class Key>
__global__ void __launch_bounds__(kThreads, kBlocks)
    ranks_kernel(const Key* __restrict__ key, const int32_t* __restrict__ point, const uint64_t* __restrict__ counts,
                 const int64_t* __restrict__ ends, int64_t N, Key Z, int64_t num_places, int64_t num_cells,
                 int64_t num_voxels, int64_t* __restrict__ cell_rank, int64_t* __restrict__ cells,
                 int64_t* __restrict__ cell_start, int64_t* __restrict__ voxel_rank, int64_t* __restrict__ voxels,
                 int64_t* __restrict__ voxel_start, int64_t* __restrict__ order) {
  const int64_t num_points = min(max(ends[1], int64_t(0)), N);  // whatever the offsets say
  const uint64_t total = num_points ? counts[num_points - 1] : 0;
  const int64_t M = int64_t(total >> 32), V = int64_t(uint32_t(total));
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i <= N; i += stride) {
    if (i < num_points) {
      const uint64_t count = counts[i], before = i ? counts[i - 1] : 0;  // up to and with this point
      const int64_t cell = int64_t(count >> 32) - 1, voxel = int64_t(uint32_t(count)) - 1;
      const int32_t row = point[i];
      order[i] = row;
      cell_rank[row] = cell;
      voxel_rank[row] = voxel;
      if (uint32_t(count) != uint32_t(before)) {
        voxels[voxel] = int64_t(key[i]);
        voxel_start[voxel] = i;
      }
      if (count >> 32 != before >> 32) {
        if (cell < num_cells) cells[cell] = int64_t(key[i] / Z);
        if (cell <= num_cells) cell_start[cell] = i;
      }
    } else if (i < N) {
      order[i] = i;  // the sort is stable, and padding last of all
      cell_rank[i] = N;
      voxel_rank[i] = N - 1;
    }
    if (i >= M && i < num_cells) cells[i] = num_places;
    if (i >= M && i <= num_cells) cell_start[i] = num_points;
    if (i >= V && i < num_voxels) voxels[i] = num_places * int64_t(Z);
    if (i >= V && i <= num_voxels) voxel_start[i] = num_points;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> polar_grid(
    const Tensor& points, const Tensor& offsets, const std::vector<double>& lower, const std::vector<double>& upper,
    const std::vector<double>& interval, const std::vector<int64_t>& bins, bool fixed_size, int64_t max_cells) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) == 4 && points.is_contiguous(), "polar_grid: points [N, 4]");
  const int64_t N = points.size(0), B = offsets.size(0) - 1;
  const int64_t R = bins[0], A = bins[1], Z = bins[2], num_places = B * R * A;
  STD_TORCH_CHECK(num_places < std::numeric_limits<int32_t>::max() && N < std::numeric_limits<int32_t>::max(),
                  "polar_grid: more than 2^31 cells or points");
  STD_TORCH_CHECK(points.scalar_type() == ScalarType::Float, "polar_grid: points in float32");
  check_tensor("polar_grid", "offsets", offsets, ScalarType::Long, {-1}, points);
  STD_TORCH_CHECK(B > 0 || N == 0, "polar_grid: offsets must run from 0 to the number of points");
  const Grid grid{{lower[0], upper[0], interval[0], int(R)},
                  {lower[1], upper[1], interval[1], int(A)},
                  {lower[2], upper[2], interval[2], int(Z)}};
  const OnDevice device(points);
  const cudaStream_t stream = device.stream();

  Tensor features = empty_as(points, {N, kFeatures}, ScalarType::Float);
  Tensor cell_rank = empty_as(points, {N}, ScalarType::Long), voxel_rank = empty_as(points, {N}, ScalarType::Long);
  Tensor order = empty_as(points, {N}, ScalarType::Long);
  if (N == 0) {
    Tensor cells = empty_as(points, {0}, ScalarType::Long), voxels = empty_as(points, {0}, ScalarType::Long);
    return {features,   cell_rank, cells, zeros_as(points, {1}, ScalarType::Long), voxel_rank, voxels,
            zeros_as(points, {1}, ScalarType::Long), order};
  }

  const uint64_t last_key = uint64_t(num_places * Z) - (fixed_size ? 0 : 1);  // padding is above all voxels
  const auto launch_polar_grid = [&](auto type)
      -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
    using Key = decltype(type);
    Tensor keys = empty_keys<Key>(points, N), sorted_keys = empty_keys<Key>(points, N);
    Tensor numbers = empty_as(points, {N}, ScalarType::Int), sorted_numbers = empty_as(points, {N}, ScalarType::Int);
    Tensor sums = empty_as(points, {N + 2}, ScalarType::Long);  // and the ends of the offsets
    Key* sorted_key = mutable_data<Key>(sorted_keys);
    int32_t* sorted_point = mutable_data<int32_t>(sorted_numbers);
    uint64_t* count = mutable_data<uint64_t>(sums);

    // 1) features and voxel of each point
    const float* xyzr = data<float>(points);
    points_kernel<Key><<<num_blocks(N, kThreads), kThreads, 0, stream>>>(
        xyzr, data<int64_t>(offsets), N, B, grid, reinterpret_cast<uintptr_t>(xyzr) % sizeof(float4) == 0,
        mutable_data<float>(features), mutable_data<Key>(keys), mutable_data<int32_t>(numbers),
        mutable_data<int64_t>(sums) + N);
    STD_CUDA_KERNEL_LAUNCH_CHECK();

    // 2) the points by voxel; the voxels of a cell are neighbours
    sort_points<Key>(points, data<Key>(keys), sorted_key, data<int32_t>(numbers), sorted_point, N, last_key, stream);

    // 3) how many cells and voxels there are up to each point; the last knows how many there are
    const auto starts = thrust::make_transform_iterator(thrust::make_counting_iterator<int32_t>(0),
                                                        Starts<Key>{sorted_key, Key(Z)});
    with_scratch(points, [&](void* scratch, size_t& bytes) {
      return cub::DeviceScan::InclusiveSum(scratch, bytes, starts, count, int32_t(N), stream);
    });
    int64_t num_cells = max_cells < 0 ? N : std::min(max_cells, N), num_voxels = N;
    if (!fixed_size) {
      int64_t last[3];
      STD_CUDA_CHECK(cudaMemcpyAsync(last, count + N - 1, sizeof(last), cudaMemcpyDeviceToHost, stream));
      STD_CUDA_CHECK(cudaStreamSynchronize(stream));
      STD_TORCH_CHECK(last[1] == 0 && last[2] == N, "polar_grid: offsets must run from 0 to the number of points");
      num_cells = last[0] >> 32, num_voxels = last[0] & 0xffffffff;
    }

    // 4) the ranks of each point
    Tensor cells = empty_as(points, {num_cells}, ScalarType::Long);
    Tensor cell_start = empty_as(points, {num_cells + 1}, ScalarType::Long);
    Tensor voxels = empty_as(points, {num_voxels}, ScalarType::Long);
    Tensor voxel_start = empty_as(points, {num_voxels + 1}, ScalarType::Long);
    ranks_kernel<Key><<<num_blocks(N + 1, kThreads), kThreads, 0, stream>>>(
        sorted_key, sorted_point, count, data<int64_t>(sums) + N, N, Key(Z), num_places, num_cells, num_voxels,
        mutable_data<int64_t>(cell_rank), mutable_data<int64_t>(cells), mutable_data<int64_t>(cell_start),
        mutable_data<int64_t>(voxel_rank), mutable_data<int64_t>(voxels), mutable_data<int64_t>(voxel_start),
        mutable_data<int64_t>(order));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    return {features, cell_rank, cells, cell_start, voxel_rank, voxels, voxel_start, order};
  };
  return last_key < uint64_t(1) << 32 ? launch_polar_grid(uint32_t{}) : launch_polar_grid(uint64_t{});
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    cells_kernel(const int64_t* __restrict__ rank, int64_t N, int64_t num_cells, uint32_t* __restrict__ key,
                 int32_t* __restrict__ point) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < N; i += stride) {
    const int64_t cell = rank[i];
    key[i] = uint32_t(cell >= 0 && cell < num_cells ? cell : num_cells);
    point[i] = int32_t(i);
  }
}

// start[c] = the first point whose cell is not below c: a search for each cell, because cells may be empty.
__global__ void __launch_bounds__(kThreads, kBlocks)
    start_kernel(const uint32_t* __restrict__ key, const int32_t* __restrict__ point, int64_t N, int64_t num_cells,
                 int64_t* __restrict__ order, int64_t* __restrict__ start) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < N || i <= num_cells; i += stride) {
    if (i < N) order[i] = point[i];
    if (i <= num_cells) {
      int64_t low = 0, high = N;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (int64_t(key[middle]) < i) low = middle + 1;
        else high = middle;
      }
      start[i] = low;
    }
  }
}

// The stable sort alone: rows whose cell is outside [0, num_cells) come last.
std::tuple<Tensor, Tensor> sort_by_cell(const Tensor& cell, int64_t num_cells) {
  const int64_t N = cell.size(0);
  check_tensor("sort_by_cell", "cell", cell, ScalarType::Long, {N}, cell);
  STD_TORCH_CHECK(num_cells < std::numeric_limits<int32_t>::max() && N < std::numeric_limits<int32_t>::max(),
                  "sort_by_cell: more than 2^31 cells or points");
  const OnDevice device(cell);
  const cudaStream_t stream = device.stream();
  Tensor order = empty_as(cell, {N}, ScalarType::Long), start = empty_as(cell, {num_cells + 1}, ScalarType::Long);
  Tensor keys = empty_keys<uint32_t>(cell, N), sorted_keys = empty_keys<uint32_t>(cell, N);
  Tensor numbers = empty_as(cell, {N}, ScalarType::Int), sorted_numbers = empty_as(cell, {N}, ScalarType::Int);
  uint32_t* sorted_key = mutable_data<uint32_t>(sorted_keys);
  int32_t* sorted_point = mutable_data<int32_t>(sorted_numbers);
  if (N > 0) {
    cells_kernel<<<num_blocks(N, kThreads), kThreads, 0, stream>>>(
        data<int64_t>(cell), N, num_cells, mutable_data<uint32_t>(keys), mutable_data<int32_t>(numbers));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    sort_points<uint32_t>(cell, data<uint32_t>(keys), sorted_key, data<int32_t>(numbers), sorted_point, N,
                          uint64_t(num_cells), stream);
  }
  start_kernel<<<num_blocks(std::max(N, num_cells + 1), kThreads), kThreads, 0, stream>>>(
      sorted_key, sorted_point, N, num_cells, mutable_data<int64_t>(order), mutable_data<int64_t>(start));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {order, start};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("polar_grid", TORCH_BOX(&kdmos::polar_grid));
  m.impl("sort_by_cell", TORCH_BOX(&kdmos::sort_by_cell));
}

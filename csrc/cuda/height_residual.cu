// Height-range residuals: project the scans of a window, reduce min z and max z per cell, compare, read back.
//
// Least work for a window of 8 scans of 120 k points: 16 MB read and 4 MB written, 5 us on an H200. Above that stand
// one transform in float64, one atan2 and two integer atomics a point; cells and bounds (6 MB) stay in L2. Transforms
// travel with the launch: nothing is copied to the device.
#include <algorithm>
#include <vector>

#include "../geometry.h"
#include "launch.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;     // nothing is shared: any size that fills a multiprocessor
constexpr int kRayThreads = 128;  // a ray: 4 of its 480 columns each, and several rays on every multiprocessor
constexpr int kMostScans = 20;    // taken by one launch: its arguments must stay below 4 KB
constexpr int kMostWindows = 32;  // likewise

struct Scan {
  const float* points;  // x, y, z and whatever follows
  int64_t size, stride;
  bool aligned;  // rows of 16 bytes
};

// Where the values of a scan go: column `channel` and on, of rows that lie `stride` apart; zeros before.
struct Out {
  float* rows;
  int64_t stride;
};

struct Span {
  int64_t start, stop;  // scans
};

// A scan as the kernels see it.
struct Part {
  Scan scan;
  Out out;
  int64_t row;            // of its first point among those that are read, -1 if it is not
  int32_t number, group;  // of the scan; of the bounds it goes into
  double transform[12];
};

struct Parts {
  Part part[kMostScans];
};

struct Window {
  int32_t start, stop;  // scans
  int32_t first, last;  // groups
};

struct Windows {
  Window newer, older[kMostWindows];
};

// Unsigned integers in the order of the floats. 0 lies below them all: what an empty cell keeps.
__device__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float value_of(uint32_t code) { return __uint_as_float(code & 0x80000000u ? code & 0x7fffffffu : ~code); }

// 1) heights per cell: bounds [group, cell, (largest -z, largest z)], zeros before; blockIdx.y is the scan.
__global__ void __launch_bounds__(kThreads)
    project_kernel(const __grid_constant__ Parts parts, const ResidualGrid grid, uint32_t* __restrict__ bounds,
                   int32_t* __restrict__ cells) {
  const Part& part = parts.part[blockIdx.y];
  const double* m = part.transform;
  uint32_t* group = bounds + 2 * part.group * (int64_t(grid.rows) * grid.columns);
  const int64_t size = part.scan.size, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    const float* p = part.scan.points + i * part.scan.stride;
    const float4 point = part.scan.aligned ? *reinterpret_cast<const float4*>(p) : make_float4(p[0], p[1], p[2], 0.0f);
    const double px = point.x, py = point.y, pz = point.z;
    const float x = transformed(m, px, py, pz), y = transformed(m + 4, px, py, pz), z = transformed(m + 8, px, py, pz);
    const int cell = residual_cell(x, y, z, grid);
    if (part.row >= 0) cells[part.row + i] = cell;
    if (cell < 0) continue;
    atomicMax(group + 2 * int64_t(cell), ordered(-z));
    atomicMax(group + 2 * int64_t(cell) + 1, ordered(z));
  }
}

// max z - min z of a cell over groups [first, last), 0 if none has a point.
__device__ float height_range(const uint2* __restrict__ bounds, int64_t num_cells, int64_t cell, int first, int last) {
  uint2 code{0, 0};
  for (int g = first; g < last; ++g) {
    const uint2 more = bounds[g * num_cells + cell];
    code.x = max(code.x, more.x);
    code.y = max(code.y, more.y);
  }
  const float low = -value_of(code.x), high = value_of(code.y);  // NaN if there is none
  return high > low ? high - low : 0.0f;
}

// 2) the difference of the windows, a block a ray. Columns run from far to near, and so a cell is hidden before the
// first of its ray that has a height. values [older window, (newer - older, older - newer), cell]; blockIdx.y is the
// older window.
__global__ void __launch_bounds__(kRayThreads)
    difference_kernel(const __grid_constant__ Windows windows, const uint2* __restrict__ bounds,
                      const ResidualGrid grid, float* __restrict__ values) {
  __shared__ int newest_seen, oldest_seen;  // the first column with a height
  const Window newer = windows.newer, older = windows.older[blockIdx.y];
  const int64_t num_cells = int64_t(grid.rows) * grid.columns;
  for (int64_t r = blockIdx.x; r < grid.rows; r += gridDim.x) {
    float* newest = values + 2 * blockIdx.y * num_cells + r * grid.columns;  // height ranges, then differences
    float* oldest = newest + num_cells;
    if (threadIdx.x == 0) newest_seen = oldest_seen = grid.columns;
    __syncthreads();
    int newest_first = grid.columns, oldest_first = grid.columns;  // of this thread's columns
    for (int c = threadIdx.x; c < grid.columns; c += kRayThreads) {
      newest[c] = height_range(bounds, num_cells, r * grid.columns + c, newer.first, newer.last);
      oldest[c] = height_range(bounds, num_cells, r * grid.columns + c, older.first, older.last);
      if (newest[c] > 0.0f) newest_first = min(newest_first, c);
      if (oldest[c] > 0.0f) oldest_first = min(oldest_first, c);
    }
    atomicMin(&newest_seen, newest_first);
    atomicMin(&oldest_seen, oldest_first);
    __syncthreads();
    for (int c = threadIdx.x; c < grid.columns; c += kRayThreads) {  // the columns this thread wrote
      const float a = newest[c], b = oldest[c];
      newest[c] = height_difference(a, b, c < oldest_seen, grid);
      oldest[c] = height_difference(b, a, c < newest_seen, grid);
    }
    __syncthreads();  // before the next ray
  }
}

// 3) each point reads its cell from its own window's side; blockIdx.y is the scan. What is not 0 (2 %) is written.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const __grid_constant__ Parts parts, const __grid_constant__ Windows windows, int num_windows,
                int64_t first_window, int64_t num_cells, const float* __restrict__ values,
                const int32_t* __restrict__ cells) {
  const Part& part = parts.part[blockIdx.y];
  const int s = part.number;
  const bool is_new = windows.newer.start <= s && s < windows.newer.stop;
  const int64_t size = part.scan.size, step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < size; i += step) {
    const int32_t cell = cells[part.row + i];
    if (cell < 0) continue;
    for (int w = 0; w < num_windows; ++w) {
      const bool is_old = windows.older[w].start <= s && s < windows.older[w].stop;
      const float value = is_old || is_new ? values[(2 * w + is_old) * num_cells + cell] : 0.0f;
      if (value != 0.0f) part.out.rows[i * part.out.stride + first_window + w] = value;
    }
  }
}

// Where a step's points and results lie between its stages; steps of one stream take turns in it.
struct Workspace {
  Workspace(const Tensor& like, int64_t num_groups, int64_t num_cells, int64_t num_windows, int64_t num_points)
      : bounds(empty_as(like, {2 * num_groups * num_cells}, ScalarType::Int)),
        values(empty_as(like, {2 * std::min<int64_t>(num_windows, kMostWindows) * num_cells}, ScalarType::Float)),
        cells(empty_as(like, {num_points}, ScalarType::Int)) {}
  Tensor bounds;  // [group, cell, (largest -z, largest z)]
  Tensor values;  // [older window, (newer - older, older - newer), cell]
  Tensor cells;   // of the points that are read
};

// launch(parts, grid) for the scans, kMostScans at a time.
template <class Launch>
void for_parts(const std::vector<Part>& all, const Launch& launch) {
  for (size_t first = 0; first < all.size(); first += kMostScans) {
    const size_t size = std::min<size_t>(kMostScans, all.size() - first);
    Parts parts{};
    int64_t largest = 0;
    for (size_t k = 0; k < size; ++k) {
      parts.part[k] = all[first + k];
      largest = std::max(largest, all[first + k].scan.size);
    }
    launch(parts, dim3(num_blocks(largest, kThreads), unsigned(size)));
  }
}

class WindowStep {
 public:
  // Groups are the scans that all windows hold whole or not at all.
  WindowStep(const ResidualGrid& grid, Span newer, const std::vector<Span>& older, Span read, int64_t num_scans)
      : grid_(grid), read_(read), cuts_{0, num_scans} {
    const auto cut = [&](Span s) { cuts_.push_back(s.start), cuts_.push_back(s.stop); };
    cut(newer);
    for (Span window : older) cut(window);
    std::sort(cuts_.begin(), cuts_.end());
    cuts_.erase(std::unique(cuts_.begin(), cuts_.end()), cuts_.end());
    const auto place = [&](int64_t scan) {
      return int32_t(std::lower_bound(cuts_.begin(), cuts_.end(), scan) - cuts_.begin());
    };
    const auto window = [&](Span s) {
      return Window{int32_t(s.start), int32_t(s.stop), place(s.start), place(s.stop)};
    };
    newer_ = window(newer);
    for (Span s : older) older_.push_back(window(s));
  }

  int64_t num_groups() const { return int64_t(cuts_.size()) - 1; }

  // transforms: on the host. out: of each scan that is read.
  void run(const Scan* scans, const double* transforms, const Out* out, const Workspace& space,
           cudaStream_t stream) const {
    const int64_t num_cells = int64_t(grid_.rows) * grid_.columns, W = int64_t(older_.size());
    uint32_t* bounds = mutable_data<uint32_t>(space.bounds);
    float* values = mutable_data<float>(space.values);
    int32_t* cells = mutable_data<int32_t>(space.cells);
    std::vector<Part> parts, read;
    int64_t row = 0;
    for (int64_t s = 0; s < cuts_.back(); ++s) {
      const bool is_read = read_.start <= s && s < read_.stop;
      const int32_t group = int32_t(std::upper_bound(cuts_.begin(), cuts_.end(), s) - cuts_.begin()) - 1;
      Part part{scans[s], is_read ? out[s - read_.start] : Out{}, is_read ? row : -1, int32_t(s), group, {}};
      std::copy_n(transforms + 16 * s, 12, part.transform);
      if (is_read) row += scans[s].size;
      if (scans[s].size == 0) continue;
      parts.push_back(part);
      if (is_read) read.push_back(part);
    }
    // 1) heights per cell
    STD_CUDA_CHECK(cudaMemsetAsync(bounds, 0, 2 * num_groups() * num_cells * sizeof(uint32_t), stream));
    for_parts(parts, [&](const Parts& some, dim3 grid) {
      project_kernel<<<grid, kThreads, 0, stream>>>(some, grid_, bounds, cells);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
    for (int64_t first = 0; first < W; first += kMostWindows) {
      const int size = int(std::min<int64_t>(kMostWindows, W - first));
      Windows windows{newer_};
      std::copy_n(older_.begin() + first, size, windows.older);
      // 2) the difference of the windows, ray by ray
      const dim3 rays(num_blocks(grid_.rows, 1), unsigned(size));
      difference_kernel<<<rays, kRayThreads, 0, stream>>>(windows, reinterpret_cast<const uint2*>(bounds), grid_,
                                                          values);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      // 3) each point reads its cell
      for_parts(read, [&](const Parts& some, dim3 grid) {
        read_kernel<<<grid, kThreads, 0, stream>>>(some, windows, size, first, num_cells, values, cells);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
    }
  }

 private:
  ResidualGrid grid_;
  Span read_;
  std::vector<int64_t> cuts_;  // group g is scans [cuts_[g], cuts_[g + 1])
  Window newer_;
  std::vector<Window> older_;
};

ResidualGrid make_grid(const std::vector<int64_t>& bins, const std::vector<double>& limits) {
  STD_TORCH_CHECK(bins.size() == 2 && limits.size() == 6, "height_residual: 2 bins and 6 limits");
  STD_TORCH_CHECK(bins[0] > 0 && bins[1] > 0 && bins[0] <= INT32_MAX / bins[1], "height_residual: 1 to 2^31 cells");
  return {int(bins[0]),     int(bins[1]),     float(limits[0]), float(limits[1]), float(limits[2]),
          float(limits[3]), float(limits[4]), float(limits[5])};
}

std::vector<Scan> make_scans(const std::vector<Tensor>& tensors, const Tensor& transforms) {
  STD_TORCH_CHECK(transforms.is_cpu() && transforms.is_contiguous() && transforms.scalar_type() == ScalarType::Double,
                  "height_residual: transforms in float64, contiguous, on the CPU");
  STD_TORCH_CHECK(!tensors.empty(), "height_residual: no scans");
  std::vector<Scan> scans;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) >= 3 && (tensor.stride(1) == 1 || tensor.size(0) == 0),
                    "height_residual: scans [n, >= 3], rows contiguous");
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float &&
                        tensor.get_device_index() == tensors[0].get_device_index() && tensor.is_cuda(),
                    "height_residual: scans in float32, on one GPU");
    const float* points = data<float>(tensor);
    const bool aligned = tensor.size(1) >= 4 && tensor.stride(0) % 4 == 0 && reinterpret_cast<uintptr_t>(points) % 16 == 0;
    scans.push_back({points, tensor.size(0), tensor.stride(0), aligned});
  }
  return scans;
}

// Values of scan read[0] + i go to out[i], columns channels[i] and on.
void height_residual(const std::vector<Tensor>& tensors, const Tensor& transforms, const std::vector<int64_t>& bins,
                     const std::vector<double>& limits, const std::vector<int64_t>& windows,
                     const std::vector<int64_t>& read, const std::vector<Tensor>& outs,
                     const std::vector<int64_t>& channels) {
  const std::vector<Scan> scans = make_scans(tensors, transforms);
  const ResidualGrid grid = make_grid(bins, limits);
  const int64_t S = int64_t(scans.size());
  STD_TORCH_CHECK(transforms.numel() == 16 * S, "height_residual: a transform a scan");
  STD_TORCH_CHECK(windows.size() >= 2 && windows.size() % 2 == 0 && read.size() == 2,
                  "height_residual: windows are pairs of scans");
  const auto span = [&](int64_t start, int64_t stop) {
    STD_TORCH_CHECK(0 <= start && start <= stop && stop <= S, "height_residual: a window beyond the scans");
    return Span{start, stop};
  };
  const Span newer = span(windows[0], windows[1]), is_read = span(read[0], read[1]);
  std::vector<Span> older;
  for (size_t i = 2; i < windows.size(); i += 2) older.push_back(span(windows[i], windows[i + 1]));
  const int64_t W = int64_t(older.size()), R = is_read.stop - is_read.start;
  STD_TORCH_CHECK(int64_t(outs.size()) == R && int64_t(channels.size()) == R,
                  "height_residual: a place for each scan that is read");
  std::vector<Out> out;
  int64_t num_read = 0;
  for (int64_t i = 0; i < R; ++i) {
    const Tensor& to = outs[i];
    const int64_t size = scans[is_read.start + i].size;
    STD_TORCH_CHECK(to.is_cuda() && to.get_device_index() == tensors[0].get_device_index() &&
                        to.scalar_type() == ScalarType::Float && to.dim() == 2 && to.size(0) == size &&
                        (to.stride(1) == 1 || size == 0) && channels[i] >= 0 && channels[i] + W <= to.size(1),
                    "height_residual: values go to float32 [points of the scan, >= channel + windows] on the scans' GPU");
    out.push_back({mutable_data<float>(to) + channels[i], to.stride(0)});
    num_read += size;
  }
  if (num_read * W == 0) return;
  const OnDevice device(tensors[0]);
  const WindowStep step(grid, newer, older, is_read, S);
  const Workspace space(tensors[0], step.num_groups(), int64_t(grid.rows) * grid.columns, W, num_read);
  step.run(scans.data(), data<double>(transforms), out.data(), space, device.stream());
}

// The published form of a whole sequence: step i compares scans [i + K/2, i + K) with [i, i + K/2), and what scan
// i + j reads is its channel K - 1 - j. The steps follow one another on the stream.
Tensor height_residual_sequence(const std::vector<Tensor>& tensors, const Tensor& transforms,
                                const std::vector<int64_t>& bins, const std::vector<double>& limits) {
  const std::vector<Scan> scans = make_scans(tensors, transforms);
  const ResidualGrid grid = make_grid(bins, limits);
  STD_TORCH_CHECK(transforms.dim() == 4, "height_residual_sequence: transforms [T, K, 4, 4]");
  const int64_t T = transforms.size(0), K = transforms.size(1), S = int64_t(scans.size());
  STD_TORCH_CHECK(S == T + K - 1 && transforms.numel() == 16 * T * K,
                  "height_residual_sequence: K transforms for each of S - K + 1 steps");
  std::vector<int64_t> row(S + 1, 0);
  for (int64_t s = 0; s < S; ++s) row[s + 1] = row[s] + scans[s].size;
  const OnDevice device(tensors[0]);
  Tensor residual = zeros_as(tensors[0], {row[S], K}, ScalarType::Float);
  if (T * row[S] * K == 0) return residual;
  int64_t most = 0;  // points of a step
  for (int64_t i = 0; i < T; ++i) most = std::max(most, row[i + K] - row[i]);
  const WindowStep step(grid, {K / 2, K}, {{0, K / 2}}, {0, K}, K);
  const Workspace space(tensors[0], step.num_groups(), int64_t(grid.rows) * grid.columns, 1, most);
  std::vector<Out> out(K);
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < K; ++j) out[j] = {mutable_data<float>(residual) + row[i + j] * K + (K - 1 - j), K};
    step.run(scans.data() + i, data<double>(transforms) + i * K * 16, out.data(), space, device.stream());
  }
  return residual;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("height_residual", TORCH_BOX(&kdmos::height_residual));
  m.impl("height_residual_sequence", TORCH_BOX(&kdmos::height_residual_sequence));
}

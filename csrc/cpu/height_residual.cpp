// Height-range residuals: project the scans of a window, reduce min z and max z per cell, compare, read back.
//
// Least work for a window of 8 scans of 120 k points: 16 MB read, one transform, one atan2 and one update of a
// cell's (min, max) a point. The last two are what it takes: bytes do not matter here.
#include <algorithm>
#include <limits>
#include <vector>

#include "../geometry.h"
#include "parallel.h"

namespace kdmos {
namespace {

constexpr int kBlock = 256;          // points projected together, in vectors
constexpr int64_t kGrain = 1 << 15;  // points read back by a thread at least

struct Scan {
  const float* points;  // x, y, z and whatever follows
  int64_t size, stride;
};

struct Span {
  int64_t start, stop;  // scans
};

// Some rows of a scan, and the number of the bounds they go into.
struct Part {
  int64_t scan, begin, end;
};

// Scans of one window step, from where they are read to the frame the cells are laid in.
struct Step {
  const Scan* scans;
  const double* transforms;  // [num_scans, 4, 4]
};

// Cells of points [begin, end) of a scan, -1 outside, to `cells` (or not, if null), and their heights to `bounds`.
void project(const Step& step, const Part& part, const ResidualGrid grid, float* __restrict__ bounds,
             int32_t* __restrict__ cells) {
  const Scan& scan = step.scans[part.scan];
  double m[12];
  std::copy_n(step.transforms + 16 * part.scan, 12, m);
  float x[kBlock], y[kBlock], z[kBlock];
  int32_t cell[kBlock];
  for (int64_t first = part.begin; first < part.end; first += kBlock) {
    const int size = int(std::min<int64_t>(kBlock, part.end - first));
    const float* p = scan.points + first * scan.stride;
    for (int i = 0; i < size; ++i, p += scan.stride) x[i] = p[0], y[i] = p[1], z[i] = p[2];
    for (int i = 0; i < size; ++i) {
      const double px = x[i], py = y[i], pz = z[i];
      const float qx = float(m[0] * px + m[1] * py + m[2] * pz + m[3]);
      const float qy = float(m[4] * px + m[5] * py + m[6] * pz + m[7]);
      const float qz = float(m[8] * px + m[9] * py + m[10] * pz + m[11]);
      cell[i] = residual_cell(qx, qy, qz, grid);
      z[i] = qz;
    }
    for (int i = 0; i < size; ++i) {
      if (cell[i] < 0) continue;
      float* bound = bounds + 2 * int64_t(cell[i]);  // (min, max) side by side: one cache line a point
      bound[0] = z[i] < bound[0] ? z[i] : bound[0];
      bound[1] = z[i] > bound[1] ? z[i] : bound[1];
    }
    if (cells) std::copy(cell, cell + size, cells + (first - part.begin));
  }
}

// Where a step's points and results lie between its stages. One thread's in the sequence form.
struct Workspace {
  Workspace(int64_t num_bounds, int64_t num_cells, int64_t num_windows, int64_t num_points)
      : bounds(2 * num_bounds * num_cells), values(2 * num_windows * num_cells), cells(num_points) {}
  Scratch<float> bounds;   // [part, cell, (min, max)]
  Scratch<float> values;   // [older window, (newer - older, older - newer), cell]
  Scratch<int32_t> cells;  // of the points that are read
};

class WindowStep {
 public:
  WindowStep(const ResidualGrid& grid, Span newer, std::vector<Span> older, Span read)
      : grid_(grid), newer_(newer), older_(std::move(older)), read_(read) {}

  // Groups of scans that all windows hold whole or not at all, each split for `threads` workers to be busy.
  void plan(const Scan* scans, int64_t num_scans, int64_t threads) {
    std::vector<int64_t> cuts{0, num_scans};
    const auto cut = [&](Span s) { cuts.push_back(s.start), cuts.push_back(s.stop); };
    cut(newer_);
    for (Span window : older_) cut(window);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    const int64_t num_atoms = int64_t(cuts.size()) - 1, splits = (threads + num_atoms - 1) / num_atoms;
    group_.clear();
    parts_.clear();
    for (int64_t atom = 0; atom < num_atoms; ++atom) {
      for (int64_t split = 0; split < splits; ++split) {
        std::vector<Part> parts;
        for (int64_t s = cuts[atom]; s < cuts[atom + 1]; ++s) {
          const int64_t size = scans[s].size;
          parts.push_back({s, share(size, splits, split), share(size, splits, split + 1)});
        }
        parts_.push_back(std::move(parts));
        group_.push_back({cuts[atom], cuts[atom + 1]});
      }
    }
  }

  int64_t num_bounds() const { return int64_t(parts_.size()); }

  // out[row of the points read][older window], each written where `Write` says.
  template <class Write>
  void run(const Step& step, Workspace& space, const Write& write) const {
    const int64_t num_cells = int64_t(grid_.rows) * grid_.columns, W = int64_t(older_.size());
    std::vector<int64_t> row(read_.stop - read_.start + 1, 0);  // first row of each scan that is read
    for (int64_t s = read_.start; s < read_.stop; ++s) {
      row[s - read_.start + 1] = row[s - read_.start] + step.scans[s].size;
    }
    // 1) heights per cell
    torch::stable::parallel_for(0, num_bounds(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* bounds = space.bounds + 2 * b * num_cells;
        constexpr float inf = std::numeric_limits<float>::infinity();
        for (int64_t i = 0; i < num_cells; ++i) bounds[2 * i] = inf, bounds[2 * i + 1] = -inf;
        for (const Part& part : parts_[b]) {
          const bool is_read = read_.start <= part.scan && part.scan < read_.stop;
          project(step, part, grid_, bounds, is_read ? space.cells + row[part.scan - read_.start] + part.begin : nullptr);
        }
      }
    });
    // 2) the difference of the windows, ray by ray: columns run from far to near
    torch::stable::parallel_for(0, grid_.rows, 32, [&](int64_t begin, int64_t end) {
      const int64_t columns = grid_.columns;
      std::vector<float> low(columns), high(columns), newest(columns), oldest(columns);
      std::vector<uint8_t> newest_hidden(columns), oldest_hidden(columns);
      const auto height_range = [&](int64_t r, Span window, std::vector<float>& extent, std::vector<uint8_t>& hidden) {
        constexpr float inf = std::numeric_limits<float>::infinity();
        std::fill(low.begin(), low.end(), inf);
        std::fill(high.begin(), high.end(), -inf);
        for (int64_t b = 0; b < num_bounds(); ++b) {
          if (group_[b].start < window.start || group_[b].stop > window.stop) continue;
          const float* bounds = space.bounds + 2 * (b * num_cells + r * columns);
          for (int64_t c = 0; c < columns; ++c) {
            low[c] = std::min(low[c], bounds[2 * c]);
            high[c] = std::max(high[c], bounds[2 * c + 1]);
          }
        }
        bool seen = false;
        for (int64_t c = 0; c < columns; ++c) {
          extent[c] = high[c] > low[c] ? high[c] - low[c] : 0.0f;
          seen |= extent[c] > 0.0f;
          hidden[c] = !seen;
        }
      };
      for (int64_t r = begin; r < end; ++r) {
        height_range(r, newer_, newest, newest_hidden);
        for (int64_t w = 0; w < W; ++w) {
          height_range(r, older_[w], oldest, oldest_hidden);
          float* values = space.values + 2 * w * num_cells + r * columns;
          for (int64_t c = 0; c < columns; ++c) {
            values[c] = height_difference(newest[c], oldest[c], oldest_hidden[c], grid_);
            values[num_cells + c] = height_difference(oldest[c], newest[c], newest_hidden[c], grid_);
          }
        }
      }
    });
    // 3) each point reads its cell from its own window's side
    for (int64_t s = read_.start; s < read_.stop; ++s) {
      const int64_t first = row[s - read_.start];
      for (int64_t w = 0; w < W; ++w) {
        const Span older = older_[w];
        const float* values = space.values + 2 * w * num_cells;
        const bool is_new = newer_.start <= s && s < newer_.stop, is_old = older.start <= s && s < older.stop;
        const float* side = is_old ? values + num_cells : is_new ? values : nullptr;
        torch::stable::parallel_for(0, step.scans[s].size, kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int32_t cell = space.cells[first + i];
            write(s, i, first + i, w, side && cell >= 0 ? side[cell] : 0.0f);
          }
        });
      }
    }
  }

 private:
  ResidualGrid grid_;
  Span newer_;
  std::vector<Span> older_;
  Span read_;
  std::vector<Span> group_;               // scans of each bounds
  std::vector<std::vector<Part>> parts_;  // what goes into each bounds
};

ResidualGrid make_grid(const std::vector<int64_t>& bins, const std::vector<double>& limits) {
  STD_TORCH_CHECK(bins.size() == 2 && limits.size() == 6, "height_residual: 2 bins and 6 limits");
  return {int(bins[0]),     int(bins[1]),     float(limits[0]), float(limits[1]), float(limits[2]),
          float(limits[3]), float(limits[4]), float(limits[5])};
}

std::vector<Scan> make_scans(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "height_residual: no scans");
  std::vector<Scan> scans;
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(1) >= 3 && (tensor.stride(1) == 1 || tensor.size(0) == 0),
                    "height_residual: scans [n, >= 3], rows contiguous");
    scans.push_back({data<float>(tensor), tensor.size(0), tensor.stride(0)});
  }
  return scans;
}

Tensor height_residual(const std::vector<Tensor>& tensors, const Tensor& transforms, const std::vector<int64_t>& bins,
                       const std::vector<double>& limits, const std::vector<int64_t>& windows,
                       const std::vector<int64_t>& read) {
  const std::vector<Scan> scans = make_scans(tensors);
  const ResidualGrid grid = make_grid(bins, limits);
  std::vector<Span> older;
  for (size_t i = 2; i + 1 < windows.size(); i += 2) older.push_back({windows[i], windows[i + 1]});
  const int64_t W = int64_t(older.size());
  int64_t num_read = 0;
  for (int64_t s = read[0]; s < read[1]; ++s) num_read += scans[s].size;
  WindowStep step(grid, {windows[0], windows[1]}, std::move(older), {read[0], read[1]});
  step.plan(scans.data(), int64_t(scans.size()), num_threads());
  Workspace space(step.num_bounds(), int64_t(grid.rows) * grid.columns, W, num_read);
  Tensor residual = empty_as(tensors.at(0), {num_read, W}, ScalarType::Float);
  float* out = mutable_data<float>(residual);
  step.run({scans.data(), data<double>(transforms)}, space,
           [&](int64_t, int64_t, int64_t row, int64_t w, float value) { out[row * W + w] = value; });
  return residual;
}

// The published form of a whole sequence: step i compares scans [i + K/2, i + K) with [i, i + K/2), and what scan
// i + j reads is its channel K - 1 - j. One thread a step.
Tensor height_residual_sequence(const std::vector<Tensor>& tensors, const Tensor& transforms,
                                const std::vector<int64_t>& bins, const std::vector<double>& limits) {
  const std::vector<Scan> scans = make_scans(tensors);
  const ResidualGrid grid = make_grid(bins, limits);
  const int64_t T = transforms.size(0), K = transforms.size(1), S = int64_t(scans.size());
  STD_TORCH_CHECK(S == T + K - 1, "height_residual_sequence: K transforms for each of S - K + 1 steps");
  std::vector<int64_t> row(S + 1, 0);
  for (int64_t s = 0; s < S; ++s) row[s + 1] = row[s] + scans[s].size;
  Tensor residual = zeros_as(tensors.at(0), {row[S], K}, ScalarType::Float);
  float* out = mutable_data<float>(residual);
  int64_t most = 0;  // points of a step
  for (int64_t i = 0; i < T; ++i) most = std::max(most, row[i + K] - row[i]);
  const auto run = [&](int64_t begin, int64_t end, int64_t threads) {
    WindowStep step(grid, {K / 2, K}, {{0, K / 2}}, {0, K});
    step.plan(scans.data() + begin, K, threads);
    Workspace space(step.num_bounds(), int64_t(grid.rows) * grid.columns, 1, most);
    for (int64_t i = begin; i < end; ++i) {
      step.plan(scans.data() + i, K, threads);
      step.run({scans.data() + i, data<double>(transforms) + i * K * 16}, space,
               [&](int64_t s, int64_t point, int64_t, int64_t, float value) {
                 if (value != 0.0f) out[(row[i + s] + point) * K + (K - 1 - s)] = value;  // 2 % of them
               });
    }
  };
  if (T < num_threads()) {  // too few steps to share out whole
    run(0, T, num_threads());
  } else {
    torch::stable::parallel_for(0, T, 1, [&](int64_t begin, int64_t end) { run(begin, end, 1); });
  }
  return residual;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("height_residual", TORCH_BOX(&kdmos::height_residual));
  m.impl("height_residual_sequence", TORCH_BOX(&kdmos::height_residual_sequence));
}

// Height-range residuals: project the scans of a window, reduce min z and max z per cell, compare, read back.
//
// Least work for a window of 8 scans of 120 k points: 16 MB read, one transform, one atan2 and one update of a
// cell's (min, max) a point. The last two are what it takes; the points come from afar and must be asked for early.
#include <algorithm>
#include <bit>
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

// (largest -z, largest z) of a cell: one cache line and one maximum a point.
using Bounds = float __attribute__((vector_size(8)));
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Cells of points [begin, end) of a scan to `cells` (or not, if null), and their heights to `bounds`. What lies outside
// the grid goes into one more cell after the last.
template <int kStride>
void project(const Step& step, const Part& part, const ResidualGrid grid, Bounds* __restrict__ bounds,
             int32_t* __restrict__ cells) {
  const Scan& scan = step.scans[part.scan];
  const int64_t stride = kStride ? kStride : scan.stride;
  const int32_t outside = grid.rows * grid.columns;
  double m[12];
  std::copy_n(step.transforms + 16 * part.scan, 12, m);
  float x[kBlock], y[kBlock], z[kBlock];
  float heights[2 * kBlock];  // (-z, z) of each
  int32_t cell[kBlock];
  for (int64_t first = part.begin; first < part.end; first += kBlock) {
    const int size = int(std::min<int64_t>(kBlock, part.end - first));
    const float* p = scan.points + first * stride;
    for (int i = 0; i < size; ++i) x[i] = p[i * stride], y[i] = p[i * stride + 1], z[i] = p[i * stride + 2];
    for (int i = 0; i < size; ++i) {
      const double px = x[i], py = y[i], pz = z[i];
      const float height = transformed(m + 8, px, py, pz);
      const int32_t at = residual_cell(transformed(m, px, py, pz), transformed(m + 4, px, py, pz), height, grid);
      cell[i] = at < 0 ? outside : at;
      heights[2 * i] = -height, heights[2 * i + 1] = height;
    }
    for (int i = 0; i < size; ++i) {
      // A block is a page of memory, at whose end what the processor fetches ahead by itself ends.
      if (i % 4 == 0) __builtin_prefetch(p + (2 * kBlock + i) * stride);
      Bounds here, before = bounds[cell[i]];
      std::memcpy(&here, heights + 2 * i, sizeof(here));
      bounds[cell[i]] = here > before ? here : before;  // NaN lies outside and is not larger
    }
    if (cells) std::copy(cell, cell + size, cells + (first - part.begin));
  }
}

// Where a step's points and results lie between its stages. One thread's in the sequence form.
struct Workspace {
  Workspace(int64_t num_bounds, int64_t num_cells, int64_t num_windows, int64_t num_points)
      : bounds(num_bounds * (num_cells + 1)),
        values(2 * num_windows * 32 * words(num_cells)),
        bits(2 * num_windows * words(num_cells)),
        cells(num_points) {}
  static int64_t words(int64_t num_cells) { return num_cells / 32 + 1; }  // the cell outside is the last
  Scratch<Bounds> bounds;  // [part, cell]
  Scratch<float> values;   // [older window, side (newer - older, older - newer), cell]
  Scratch<uint32_t> bits;  // [older window, side, word of 32 cells]: which values are not 0
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

  // write(scan, point of the scan, row of the points read, older window, value) for each that is not 0.
  template <class Write>
  void run(const Step& step, Workspace& space, const Write& write) const {
    const int64_t num_cells = int64_t(grid_.rows) * grid_.columns, W = int64_t(older_.size());
    const int64_t num_words = Workspace::words(num_cells), size = 32 * num_words;  // of a side
    std::vector<int64_t> row(read_.stop - read_.start + 1, 0);  // first row of each scan that is read
    for (int64_t s = read_.start; s < read_.stop; ++s) {
      row[s - read_.start + 1] = row[s - read_.start] + step.scans[s].size;
    }
    // 1) heights per cell
    torch::stable::parallel_for(0, num_bounds(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        Bounds* bounds = space.bounds + b * (num_cells + 1);
        std::fill(bounds, bounds + num_cells, Bounds{kNone, kNone});
        for (const Part& part : parts_[b]) {
          const bool is_read = read_.start <= part.scan && part.scan < read_.stop;
          int32_t* cells = is_read ? space.cells + row[part.scan - read_.start] + part.begin : nullptr;
          step.scans[part.scan].stride == 4 ? project<4>(step, part, grid_, bounds, cells)
                                            : project<0>(step, part, grid_, bounds, cells);
        }
      }
    });
    // 2) the difference of the windows, ray by ray: columns run from far to near, and what lies before the first cell
    // of a ray that has a height is hidden
    for (int64_t side = 0; side < 2 * W; ++side) {  // outside the grid
      std::fill(space.values + side * size + num_cells, space.values + (side + 1) * size, 0.0f);
    }
    torch::stable::parallel_for(0, grid_.rows, 32, [&](int64_t begin, int64_t end) {
      const int64_t columns = grid_.columns;
      std::vector<float> both(2 * columns), newest(columns), oldest(columns);
      const auto height_range = [&](int64_t r, Span window, std::vector<float>& extent) {  // -> the first seen column
        bool any = false;
        for (int64_t b = 0; b < num_bounds(); ++b) {
          if (group_[b].start < window.start || group_[b].stop > window.stop) continue;
          const float* bounds = reinterpret_cast<const float*>(space.bounds + b * (num_cells + 1) + r * columns);
          for (int64_t i = 0; i < 2 * columns; ++i) both[i] = any && both[i] > bounds[i] ? both[i] : bounds[i];
          any = true;
        }
        for (int64_t c = 0; c < columns; ++c) {
          const float height = both[2 * c] + both[2 * c + 1];  // -min + max
          extent[c] = height > 0.0f ? height : 0.0f;
        }
        int64_t seen = 0;
        while (seen < columns && extent[seen] == 0.0f) ++seen;
        return seen;
      };
      for (int64_t r = begin; r < end; ++r) {
        const int64_t newest_seen = height_range(r, newer_, newest);
        for (int64_t w = 0; w < W; ++w) {
          const int64_t oldest_seen = height_range(r, older_[w], oldest);
          float* __restrict__ at_newer = space.values + 2 * w * size + r * columns;
          float* __restrict__ at_older = at_newer + size;
          for (int64_t c = 0; c < columns; ++c) {
            at_newer[c] = height_difference(newest[c], oldest[c], c < oldest_seen, grid_);
            at_older[c] = height_difference(oldest[c], newest[c], c < newest_seen, grid_);
          }
        }
      }
    });
    torch::stable::parallel_for(0, 2 * W * num_words, 1 << 10, [&](int64_t begin, int64_t end) {
      for (int64_t word = begin; word < end; ++word) {
        uint32_t bits = 0;
        for (int k = 0; k < 32; ++k) bits |= uint32_t(space.values[32 * word + k] != 0.0f) << k;
        space.bits[word] = bits;
      }
    });
    // 3) each point reads its cell from its own window's side: of 2 % a value, of the others one bit, which is near
    for (int64_t s = read_.start; s < read_.stop; ++s) {
      const int64_t first = row[s - read_.start];
      for (int64_t w = 0; w < W; ++w) {
        const bool is_new = newer_.start <= s && s < newer_.stop, is_old = older_[w].start <= s && s < older_[w].stop;
        if (!is_new && !is_old) continue;
        const int64_t side = 2 * w + is_old;
        const float* values = space.values + side * size;
        const uint32_t* bits = space.bits + side * num_words;
        torch::stable::parallel_for(0, step.scans[s].size, kGrain, [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i += 32) {
            const int count = int(std::min<int64_t>(32, end - i));
            const int32_t* cells = space.cells + first + i;
            uint32_t found = 0;
            for (int k = 0; k < count; ++k) found |= (bits[cells[k] >> 5] >> (cells[k] & 31) & 1u) << k;
            for (; found; found &= found - 1) {
              const int k = std::countr_zero(found);
              write(s, i + k, first + i + k, w, values[cells[k]]);
            }
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

// Values of scan read[0] + i go to out[i], columns channels[i] and on, where they are not 0.
void height_residual(const std::vector<Tensor>& tensors, const Tensor& transforms, const std::vector<int64_t>& bins,
                     const std::vector<double>& limits, const std::vector<int64_t>& windows,
                     const std::vector<int64_t>& read, const std::vector<Tensor>& outs,
                     const std::vector<int64_t>& channels) {
  const std::vector<Scan> scans = make_scans(tensors);
  const ResidualGrid grid = make_grid(bins, limits);
  std::vector<Span> older;
  for (size_t i = 2; i + 1 < windows.size(); i += 2) older.push_back({windows[i], windows[i + 1]});
  const int64_t W = int64_t(older.size());
  STD_TORCH_CHECK(int64_t(outs.size()) == read[1] - read[0] && channels.size() == outs.size(),
                  "height_residual: a place for each scan that is read");
  std::vector<float*> out;
  std::vector<int64_t> stride;
  int64_t num_read = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    const Tensor& to = outs[i];
    const int64_t size = scans[read[0] + i].size;
    STD_TORCH_CHECK(to.is_cpu() && to.scalar_type() == ScalarType::Float && to.dim() == 2 && to.size(0) == size &&
                        (to.stride(1) == 1 || size == 0) && channels[i] >= 0 && channels[i] + W <= to.size(1),
                    "height_residual: values go to float32 [points of the scan, >= channel + windows] on the CPU");
    out.push_back(mutable_data<float>(to) + channels[i]);
    stride.push_back(to.stride(0));
    num_read += size;
  }
  WindowStep step(grid, {windows[0], windows[1]}, std::move(older), {read[0], read[1]});
  step.plan(scans.data(), int64_t(scans.size()), num_threads());
  Workspace space(step.num_bounds(), int64_t(grid.rows) * grid.columns, W, num_read);
  step.run({scans.data(), data<double>(transforms)}, space,
           [&](int64_t s, int64_t point, int64_t, int64_t w, float value) {
             out[s - read[0]][point * stride[s - read[0]] + w] = value;
           });
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
                 out[(row[i + s] + point) * K + (K - 1 - s)] = value;
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

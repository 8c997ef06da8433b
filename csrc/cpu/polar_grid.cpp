// Points to polar voxels: features, then one stable sort by voxel that every later op uses.
//
// Least work: 16 bytes in and 84 out a point. The heights that have points are bits of one word a place: where a
// voxel stands among all is a count of bits, and the counting sort has a counter a voxel, not one a place.
#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "../geometry.h"
#include "parallel.h"

namespace kdmos {
namespace {

struct Axis {
  double lower, upper, interval;
};

// 32 heights of an occupied place: those that have points, its cell, and the voxel of the lowest.
struct Column {
  uint32_t heights;
  int32_t cell, voxel;
};

// A row of features a point; apart from the loop that makes them, so that the compiler writes it in vectors.
void write_rows(int size, const float* __restrict__ dr, const float* __restrict__ da, const float* __restrict__ dz,
                const float* __restrict__ r, const float* __restrict__ a, const float* __restrict__ p,
                float* __restrict__ row) {
  for (int i = 0; i < size; ++i, p += 4, row += 9) {
    row[0] = dr[i], row[1] = da[i], row[2] = dz[i], row[3] = r[i], row[4] = a[i];
    row[5] = p[2], row[6] = p[0], row[7] = p[1], row[8] = p[3];
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> polar_grid(
    const Tensor& points, const Tensor& offsets, const std::vector<double>& lower, const std::vector<double>& upper,
    const std::vector<double>& interval, const std::vector<int64_t>& bins, bool fixed_size, int64_t max_cells) {
  STD_TORCH_CHECK(points.dim() == 2 && points.size(1) == 4 && points.is_contiguous(), "polar_grid: points [N, 4]");
  const int64_t N = points.size(0), B = offsets.size(0) - 1;
  const int64_t R = bins[0], A = bins[1], Z = bins[2];
  STD_TORCH_CHECK(N < std::numeric_limits<int32_t>::max(), "polar_grid: more than 2^31 points");
  const Axis rho{lower[0], upper[0], interval[0]}, phi{lower[1], upper[1], interval[1]},
      height{lower[2], upper[2], interval[2]};
  const float* xyzr = data<float>(points);
  const int64_t* start = data<int64_t>(offsets);
  const int64_t num_points = start[B];  // the rows from there on are padding
  STD_TORCH_CHECK(start[0] == 0 && (num_points == N || (fixed_size && num_points < N)),
                  "polar_grid: offsets must run from 0 to the number of points");
  check_ascending("polar_grid: offsets", start, B + 1, N + 1);

  Tensor features = empty_as(points, {N, 9}, ScalarType::Float);
  Tensor cell_rank = empty_as(points, {N}, ScalarType::Long), voxel_rank = empty_as(points, {N}, ScalarType::Long);
  Tensor order = empty_as(points, {N}, ScalarType::Long);
  float* feature = mutable_data<float>(features);
  int64_t *point_cell = mutable_data<int64_t>(cell_rank), *point_voxel = mutable_data<int64_t>(voxel_rank);
  int64_t* sorted = mutable_data<int64_t>(order);

  // Each scan is shared among as many workers as there are threads for it: its points as well as its places.
  const int64_t places = R * A, workers = std::max<int64_t>(1, num_threads() / std::max<int64_t>(1, B));
  const auto for_workers = [&](const auto& work) {
    torch::stable::parallel_for(0, B * workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) work(task, task / workers, task % workers);
    });
  };
  const auto points_of = [&](int64_t b, int64_t worker) {  // the first one of this worker
    return start[b] + share(start[b + 1] - start[b], workers, worker);
  };

  // 1) features and bins of each point; which heights of a place have points, a bit each
  const int64_t words = (Z + 31) / 32, columns = places * words;
  STD_TORCH_CHECK(32 * columns < std::numeric_limits<int32_t>::max(), "polar_grid: more than 2^31 voxels a scan");
  Scratch<uint32_t> heights(B * workers * columns);  // of each worker's points
  Scratch<int32_t> bin(N);                           // word of a point's place and height, times 32, plus its bit
  for_workers([&](int64_t task, int64_t b, int64_t worker) {
    constexpr int kBlock = 256;
    float r[kBlock], a[kBlock], dr[kBlock], da[kBlock], dz[kBlock];
    uint32_t* occupied = heights + task * columns;
    std::memset(occupied, 0, columns * sizeof(uint32_t));
    const int64_t last = points_of(b, worker + 1);
    for (int64_t first = points_of(b, worker); first < last; first += kBlock) {
      const int size = int(std::min<int64_t>(kBlock, last - first));
      const float* __restrict__ p = xyzr + 4 * first;
      int32_t* __restrict__ to = bin + first;
      for (int i = 0; i < size; ++i) {
        const float x = p[4 * i], y = p[4 * i + 1], z = p[4 * i + 2];
        r[i] = std::sqrt(x * x + y * y);
        a[i] = angle<double>(y, x);
        const int ring = polar_index(r[i], rho.lower, rho.upper, rho.interval);
        const int sector = polar_index(a[i], phi.lower, phi.upper, phi.interval);
        const int up = polar_index(z, height.lower, height.upper, height.interval);
        to[i] = (ring * int(A) + sector) * int(32 * words) + up;
        dr[i] = float(r[i] - ((ring + 0.5) * rho.interval + rho.lower));
        da[i] = float(a[i] - ((sector + 0.5) * phi.interval + phi.lower));
        dz[i] = float(z - ((up + 0.5) * height.interval + height.lower));
      }
      write_rows(size, dr, da, dz, r, a, p, feature + 9 * first);
      for (int i = 0; i < size; ++i) occupied[to[i] >> 5] |= 1u << (to[i] & 31);
    }
  });

  // 2) the words that are not empty, and how many cells and voxels they are
  Scratch<int32_t> occupied(B * columns);
  Scratch<int64_t> first_word(B * workers), last_word(B * workers);
  Scratch<int64_t> first_cell(B * workers + 1), first_voxel(B * workers + 1);
  for_workers([&](int64_t task, int64_t b, int64_t worker) {
    uint32_t* all = heights + b * workers * columns;
    const int64_t first = share(places, workers, worker) * words, last = share(places, workers, worker + 1) * words;
    for (int64_t other = 1; other < workers; ++other) {
      const uint32_t* more = all + other * columns;
      for (int64_t w = first; w < last; ++w) all[w] |= more[w];
    }
    int64_t end = b * columns + first;
    first_word[task] = end;
    for (int64_t w = first; w < last; ++w) {
      occupied[end] = int32_t(w);
      end += all[w] != 0;  // no branch: few are
    }
    last_word[task] = end;
    int64_t cells = 0, voxels = 0, before = -1;
    for (int64_t i = first_word[task]; i < end; ++i) {
      const int64_t c = occupied[i] / int32_t(words);
      cells += c != before;
      voxels += std::popcount(all[occupied[i]]);
      before = c;
    }
    first_cell[task + 1] = cells, first_voxel[task + 1] = voxels;
  });
  first_cell[0] = first_voxel[0] = 0;
  for (int64_t task = 0; task < B * workers; ++task) {
    first_cell[task + 1] += first_cell[task], first_voxel[task + 1] += first_voxel[task];
  }
  const int64_t M = first_cell[B * workers], V = first_voxel[B * workers];
  const int64_t num_voxels = fixed_size ? N : V;  // with the padding
  // cells beyond as many have no place; the points of the first of them are where cell_start ends
  const int64_t num_cells = fixed_size ? (max_cells < 0 ? N : std::min(max_cells, N)) : M, placed = std::min(M, num_cells);
  Tensor cells = empty_as(points, {num_cells}, ScalarType::Long);
  Tensor cell_start = empty_as(points, {num_cells + 1}, ScalarType::Long);
  Tensor voxels = empty_as(points, {num_voxels}, ScalarType::Long);
  Tensor voxel_start = empty_as(points, {num_voxels + 1}, ScalarType::Long);
  int64_t *cell_id = mutable_data<int64_t>(cells), *cell_first = mutable_data<int64_t>(cell_start);
  int64_t *voxel_id = mutable_data<int64_t>(voxels), *voxel_first = mutable_data<int64_t>(voxel_start);

  // 3) the numbers of their cells and voxels
  Scratch<Column> column(B * columns);
  Scratch<int32_t> cell_voxel(M);  // lowest voxel of each cell
  for_workers([&](int64_t task, int64_t b, int64_t) {
    const uint32_t* all = heights + b * workers * columns;
    int64_t m = first_cell[task] - 1, v = first_voxel[task], before = -1;
    for (int64_t i = first_word[task]; i < last_word[task]; ++i) {
      const int32_t w = occupied[i], c = w / int32_t(words);
      if (c != before) {
        if (++m < num_cells) cell_id[m] = b * places + c;
        cell_voxel[m] = int32_t(v);
      }
      before = c;
      column[b * columns + w] = {all[w], int32_t(m), int32_t(v)};
      const int64_t bottom = (b * places + c) * Z + (w - c * words) * 32;
      for (uint32_t bits = all[w]; bits; bits &= bits - 1) voxel_id[v++] = bottom + std::countr_zero(bits);
    }
  });

  // 4) the ranks of each point, and how many points each worker has in a voxel
  Scratch<int32_t> next(workers * V);
  for_workers([&](int64_t, int64_t b, int64_t worker) {
    int32_t* count = next + worker * V;
    std::fill(count + first_voxel[b * workers], count + first_voxel[(b + 1) * workers], 0);
    const Column* of_scan = column + b * columns;
    const int64_t last = points_of(b, worker + 1);
    for (int64_t i = points_of(b, worker); i < last; ++i) {
      const Column at = of_scan[bin[i] >> 5];
      const int64_t voxel = at.voxel + std::popcount(at.heights & ((1u << (bin[i] & 31)) - 1));
      point_cell[i] = at.cell;
      point_voxel[i] = voxel;
      ++count[voxel];
    }
  });

  // 5) where the points of each voxel begin, and where the next one of each worker goes
  int32_t sum = 0;
  for (int64_t v = 0; v < V; ++v) {
    voxel_first[v] = sum;
    for (int64_t worker = 0; worker < workers; ++worker) sum += std::exchange(next[worker * V + v], sum);
  }
  for (int64_t m = 0; m < placed; ++m) cell_first[m] = voxel_first[cell_voxel[m]];
  std::fill(voxel_first + V, voxel_first + num_voxels + 1, num_points);
  std::fill(cell_first + placed, cell_first + num_cells + 1, M > num_cells ? voxel_first[cell_voxel[num_cells]] : num_points);

  // 6) the points sorted by voxel, those of a voxel in their order
  for_workers([&](int64_t, int64_t b, int64_t worker) {
    int32_t* to = next + worker * V;
    const int64_t last = points_of(b, worker + 1);
    for (int64_t i = points_of(b, worker); i < last; ++i) sorted[to[point_voxel[i]]++] = i;
  });

  // 7) the padding: cells and voxels outside the grid, and the points of none
  std::fill(cell_id + placed, cell_id + num_cells, B * places);
  std::fill(voxel_id + V, voxel_id + num_voxels, B * places * Z);
  std::fill(feature + 9 * num_points, feature + 9 * N, 0.0f);
  std::fill(point_cell + num_points, point_cell + N, N);
  std::fill(point_voxel + num_points, point_voxel + N, N - 1);
  std::iota(sorted + num_points, sorted + N, num_points);
  return {features, cell_rank, cells, cell_start, voxel_rank, voxels, voxel_start, order};
}

// The stable counting sort alone: rows whose cell is outside [0, num_cells) come last.
std::tuple<Tensor, Tensor> sort_by_cell(const Tensor& cell, int64_t num_cells) {
  const int64_t N = cell.size(0);
  Tensor order = empty_as(cell, {N}, ScalarType::Long), start = zeros_as(cell, {num_cells + 1}, ScalarType::Long);
  const int64_t* rank = data<int64_t>(cell);
  int64_t *sorted = mutable_data<int64_t>(order), *first = mutable_data<int64_t>(start);
  std::vector<int64_t> next(num_cells + 1);
  for (int64_t i = 0; i < N; ++i) {
    if (rank[i] >= 0 && rank[i] < num_cells) ++first[rank[i] + 1];
  }
  for (int64_t c = 0; c < num_cells; ++c) first[c + 1] += first[c];
  std::copy(first, first + num_cells + 1, next.begin());
  for (int64_t i = 0; i < N; ++i) {
    const bool inside = rank[i] >= 0 && rank[i] < num_cells;
    sorted[next[inside ? rank[i] : num_cells]++] = i;
  }
  return {order, start};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("polar_grid", TORCH_BOX(&kdmos::polar_grid));
  m.impl("sort_by_cell", TORCH_BOX(&kdmos::sort_by_cell));
}

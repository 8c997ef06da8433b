// Largest feature of the points of each cell, over points sorted by cell: every cell is one thread's.
//
// Least work forward: each feature read once. Backward: each gradient of a point written once, no zeroing, no
// atomics: a cell knows all its points.
#include <algorithm>
#include <cstring>
#include <string>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 17;  // features, about 50 us of work
constexpr int64_t kTile = 256;       // channels whose maxima stay in L1 while a cell's points go by

int64_t cell_grain(int64_t M, int64_t N, int64_t C) {
  return std::max<int64_t>(1, M * kGrain / std::max<int64_t>(1, N * C));
}

// Rows of a cell: order[i], or i itself where the points are sorted already.
struct Rows {
  const int64_t* order;
  int64_t operator[](int64_t i) const { return order ? order[i] : i; }
};

// What is read here: values [N, C], the order of points [N], the start of cells [M + 1]; and that these lie within.
void check_sorted(const char* op, const char* name, const Tensor& values, const std::optional<Tensor>& order,
                  const Tensor& start, int64_t N) {
  STD_TORCH_CHECK(values.dim() == 2, op, ": expected ", name, " of two dimensions");
  check_tensor(op, name, values, values.scalar_type(), {-1, -1}, values);
  if (order) check_tensor(op, "order", *order, ScalarType::Long, {N}, values);
  check_tensor(op, "start", start, ScalarType::Long, {-1}, values);
  STD_TORCH_CHECK(start.size(0) > 0 && N < (int64_t(1) << 31), op, ": start [M + 1], and at most 2^31 points");
  const std::string of = op;
  check_ascending((of + ": start").c_str(), data<int64_t>(start), start.size(0), N + 1);
  if (order) check_within((of + ": order").c_str(), data<int64_t>(*order), N, N);
}

// largest[c], point[c] of the points [first, last) in channels [0, C); equal values leave the lower point.
template <class T, bool kWithPoint>
void cell_maximum(const T* features, int64_t stride, int64_t C, const Rows& rows, int64_t first, int64_t last,
                  wide_t<T>* __restrict__ largest, int32_t* __restrict__ point) {
  const int64_t row = rows[first];
  for (int64_t c = 0; c < C; ++c) largest[c] = features[row * stride + c];
  if (kWithPoint) {
    for (int64_t c = 0; c < C; ++c) point[c] = int32_t(row);
  }
  for (int64_t i = first + 1; i < last; ++i) {
    const int32_t row = int32_t(rows[i]);
    const T* __restrict__ feature = features + int64_t(row) * stride;
    for (int64_t c = 0; c < C; ++c) {
      const wide_t<T> value = feature[c], before = largest[c];
      // NaN wins, as in torch; of equal values the lower point wins, whichever comes first
      bool wins = (value > before) | ((value != value) & (before == before));
      if (kWithPoint) {
        wins |= (value == before) & (row < point[c]);
        point[c] = wins ? row : point[c];
      }
      largest[c] = wins ? value : before;
    }
  }
}

std::tuple<Tensor, Tensor> polar_scatter(const Tensor& features, const std::optional<Tensor>& order,
                                         const Tensor& start) {
  check_sorted("polar_scatter", "features", features, order, start, features.size(0));
  const int64_t N = features.size(0), C = features.size(1), M = start.size(0) - 1;
  Tensor maximum = empty_as(features, {M, C}, features.scalar_type());
  Tensor argmax = empty_as(features, {M, C}, ScalarType::Long);
  const Rows rows{order ? data<int64_t>(*order) : nullptr};
  const int64_t* first = data<int64_t>(start);
  int64_t* arg = mutable_data<int64_t>(argmax);
  for_floating("polar_scatter", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* feature = data<T>(features);
    T* out = mutable_data<T>(maximum);
    torch::stable::parallel_for(0, M, cell_grain(M, N, C), [&](int64_t begin, int64_t end) {
      wide_t<T> largest[kTile];
      int32_t point[kTile];
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t c = 0; c < C; c += kTile) {
          const int64_t width = std::min(kTile, C - c);
          T* to = out + m * C + c;
          int64_t* to_arg = arg + m * C + c;
          if (first[m] == first[m + 1]) {
            for (int64_t k = 0; k < width; ++k) to[k] = T(0.0f), to_arg[k] = -1;
            continue;
          }
          cell_maximum<T, true>(feature + c, C, width, rows, first[m], first[m + 1], largest, point);
          for (int64_t k = 0; k < width; ++k) to[k] = narrow<T>(largest[k]);
          for (int64_t k = 0; k < width; ++k) to_arg[k] = point[k];
        }
      }
    });
  });
  return {maximum, argmax};
}

// out [C] = the largest features of the points [first, last), 0 without points.
template <class T>
void cell_row(const T* feature, int64_t C, const Rows& rows, int64_t first, int64_t last, T* out) {
  wide_t<T> largest[kTile];
  for (int64_t c = 0; c < C; c += kTile) {
    const int64_t width = std::min(kTile, C - c);
    if (first == last) {
      std::fill(out + c, out + c + width, T(0.0f));
      continue;
    }
    cell_maximum<T, false>(feature + c, C, width, rows, first, last, largest, nullptr);
    for (int64_t k = 0; k < width; ++k) out[c + k] = narrow<T>(largest[k]);
  }
}

// polar_scatter without argmax; [M, C].
Tensor cell_max(const Tensor& features, const std::optional<Tensor>& order, const Tensor& start) {
  check_sorted("cell_max", "features", features, order, start, features.size(0));
  const int64_t N = features.size(0), C = features.size(1), M = start.size(0) - 1;
  Tensor maximum = empty_as(features, {M, C}, features.scalar_type());
  const Rows rows{order ? data<int64_t>(*order) : nullptr};
  const int64_t* first = data<int64_t>(start);
  for_floating("cell_max", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* feature = data<T>(features);
    T* out = mutable_data<T>(maximum);
    torch::stable::parallel_for(0, M, cell_grain(M, N, C), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) cell_row(feature, C, rows, first[m], first[m + 1], out + m * C);
    });
  });
  return maximum;
}

// body(an unsigned integer as wide as a floating dtype): what is only moved and chosen needs no arithmetic of its own.
template <class Body>
void for_bits(size_t bytes, const Body& body) {
  return bytes == 2 ? body(uint16_t{}) : bytes == 4 ? body(uint32_t{}) : body(uint64_t{});
}

Tensor polar_scatter_backward(const Tensor& gradient, const Tensor& argmax, const std::optional<Tensor>& order,
                              const Tensor& start, int64_t num_points) {
  check_sorted("polar_scatter_backward", "gradient", gradient, order, start, num_points);
  const int64_t M = gradient.size(0), C = gradient.size(1), N = num_points;
  check_tensor("polar_scatter_backward", "argmax", argmax, ScalarType::Long, {M, C}, gradient);
  STD_TORCH_CHECK(start.size(0) == M + 1, "polar_scatter_backward: gradient and argmax [M, C], start [M + 1]");
  Tensor points = empty_as(gradient, {N, C}, gradient.scalar_type());
  const Rows rows{order ? data<int64_t>(*order) : nullptr};
  const int64_t *first = data<int64_t>(start), *arg = data<int64_t>(argmax);
  for_bits(gradient.element_size(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(gradient);
    T* to = mutable_data<T>(points);
    torch::stable::parallel_for(0, M, cell_grain(M, N, C), [&](int64_t begin, int64_t end) {
      int32_t point[kTile];
      for (int64_t m = begin; m < end; ++m) {
        for (int64_t c = 0; c < C; c += kTile) {
          const int64_t width = std::min(kTile, C - c);
          const T* __restrict__ g = from + m * C + c;
          for (int64_t k = 0; k < width; ++k) point[k] = int32_t(arg[m * C + c + k]);
          for (int64_t i = first[m]; i < first[m + 1]; ++i) {
            const int32_t row = int32_t(rows[i]);
            T* __restrict__ out = to + int64_t(row) * C + c;
            for (int64_t k = 0; k < width; ++k) out[k] = point[k] == row ? g[k] : T(0);
          }
        }
      }
    });
    // points outside all cells: the rest of the order, before the first cell and after the last
    const auto clear = [&](int64_t i) { std::fill(to + rows[i] * C, to + (rows[i] + 1) * C, T(0)); };
    for (int64_t i = 0; i < first[0]; ++i) clear(i);
    for (int64_t i = first[M]; i < N; ++i) clear(i);
  });
  return points;
}

// Zeroes [num_places, C] but for the rows of `cells`, which fill(m, row) writes: each row is touched once. The cells
// may end in padding, which is num_places.
template <class T, class Fill>
void fill_dense(T* out, int64_t num_places, int64_t C, const int64_t* cells, int64_t M, const Fill& fill) {
  M = check_padded("polar_scatter: cells", cells, M, num_places);
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, C));
  torch::stable::parallel_for(0, num_places, grain, [&](int64_t begin, int64_t end) {
    int64_t m = std::lower_bound(cells, cells + M, begin) - cells, place = begin;
    for (; m < M && cells[m] < end; ++m) {
      const int64_t gap = std::max<int64_t>(0, cells[m] - place);  // of a cell that occurs twice, the later one stays
      std::memset(static_cast<void*>(out + place * C), 0, gap * C * sizeof(T));
      fill(m, out + cells[m] * C);
      place = cells[m] + 1;
    }
    std::memset(static_cast<void*>(out + place * C), 0, (end - place) * C * sizeof(T));
  });
}

// polar_scatter into the dense places, without argmax; [num_places, C].
Tensor polar_scatter_bev(const Tensor& features, const std::optional<Tensor>& order, const Tensor& start,
                         const Tensor& cells, int64_t num_places) {
  check_sorted("polar_scatter_bev", "features", features, order, start, features.size(0));
  const int64_t C = features.size(1), M = start.size(0) - 1;
  check_tensor("polar_scatter_bev", "cells", cells, ScalarType::Long, {M}, features);
  Tensor dense = empty_as(features, {num_places, C}, features.scalar_type());
  const Rows rows{order ? data<int64_t>(*order) : nullptr};
  const int64_t* first = data<int64_t>(start);
  for_floating("polar_scatter_bev", features.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* feature = data<T>(features);
    fill_dense(mutable_data<T>(dense), num_places, C, data<int64_t>(cells), M,
               [&](int64_t m, T* to) { cell_row(feature, C, rows, first[m], first[m + 1], to); });
  });
  return dense;
}

Tensor cells_to_bev(const Tensor& values, const Tensor& cells, int64_t num_places) {
  STD_TORCH_CHECK(values.dim() == 2, "cells_to_bev: expected values [M, C]");
  const int64_t M = values.size(0), C = values.size(1);
  check_tensor("cells_to_bev", "values", values, values.scalar_type(), {M, C}, values);
  check_tensor("cells_to_bev", "cells", cells, ScalarType::Long, {M}, values);
  Tensor dense = empty_as(values, {num_places, C}, values.scalar_type());
  for_floating("cells_to_bev", values.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(values);
    fill_dense(mutable_data<T>(dense), num_places, C, data<int64_t>(cells), M,
               [&](int64_t m, T* to) { std::memcpy(static_cast<void*>(to), from + m * C, C * sizeof(T)); });
  });
  return dense;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("polar_scatter", TORCH_BOX(&kdmos::polar_scatter));
  m.impl("polar_scatter_backward", TORCH_BOX(&kdmos::polar_scatter_backward));
  m.impl("cell_max", TORCH_BOX(&kdmos::cell_max));
  m.impl("polar_scatter_bev", TORCH_BOX(&kdmos::polar_scatter_bev));
  m.impl("cells_to_bev", TORCH_BOX(&kdmos::cells_to_bev));
}

// Dense image [num_places, C]: values[m] * factor + background in row cells[m], the background in every other.
//
// Least work: each value read once, each row written once; a multiply-add a value: bytes decide. Each thread walks the
// cells of its own places and fills what lies between with rows of background, which are copied.
#include "../cells_to_image.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 17;     // values, about 50 us of work
constexpr int64_t kRepeated = 1 << 11;  // values of the repeated background, about: a few kilobytes, in L1

template <class S, class T>
void scaled_row(const S* __restrict__ values, const float* __restrict__ factor, const float* __restrict__ background,
                int64_t C, T* __restrict__ row) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) row[c] = narrow<T>(multiply_add(float(values[c]), factor[c], background[c]));
}

Tensor cells_to_image(const Tensor& values, const Tensor& cells, const Tensor& factor, const Tensor& background,
                      int64_t num_places, ScalarType dtype) {
  const ImageSizes n = image_sizes(values, cells, factor, background, num_places);
  Tensor image = empty_as(values, {n.places, n.C}, dtype);
  if (n.places == 0 || n.C == 0) return image;
  const int64_t* place = data<int64_t>(cells);
  int64_t M = n.M;
  while (M > 0 && place[M - 1] >= n.places) --M;  // padding
  check_ascending("cells_to_image: cells", place, M, n.places);
  for_types(values.scalar_type(), dtype, [&](auto from_type, auto to_type) {
    using S = decltype(from_type);
    using T = decltype(to_type);
    const S* from = data<S>(values);
    const float *scale = data<float>(factor), *shift = data<float>(background);
    const int64_t C = n.C, rows = std::max<int64_t>(1, kRepeated / C);  // of background that are copied together
    std::vector<T> repeated(rows * C);
    for (int64_t k = 0; k < rows * C; ++k) repeated[k] = narrow<T>(shift[k % C]);
    T* to = mutable_data<T>(image);
    const auto fill = [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += rows) {
        const int64_t size = std::min(rows, end - begin) * C;
        std::memcpy(static_cast<void*>(to + begin * C), repeated.data(), size * sizeof(T));
      }
    };
    torch::stable::parallel_for(0, n.places, std::max<int64_t>(1, kGrain / C), [&](int64_t begin, int64_t end) {
      int64_t m = std::lower_bound(place, place + M, begin) - place;
      for (; m < M && place[m] < end; ++m) {
        fill(begin, place[m]);  // of a cell that occurs twice the later one stays
        scaled_row(from + m * C, scale, shift, C, to + place[m] * C);
        begin = place[m] + 1;
      }
      fill(begin, end);
    });
  });
  return image;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("cells_to_image", TORCH_BOX(&kdmos::cells_to_image)); }

// Images that count as one, their channels one after the other.
#pragma once

#include <vector>

#include "parallel.h"

namespace kdmos {

// One of them, [B, R, A, C]; those smaller than the first end in zeros.
template <class T>
struct Part {
  const T* data;
  int64_t R, A, C;
};

// Throws unless they are channels last, of one type, no larger than the first, each of a multiple of `step` channels.
template <class T>
std::vector<Part<T>> parts_of(const char* op, const std::vector<Tensor>& images, int64_t step) {
  const Tensor& first = images[0];
  std::vector<Part<T>> parts;
  for (const Tensor& image : images) {
    STD_TORCH_CHECK(nhwc(image).is_contiguous() && image.scalar_type() == first.scalar_type() &&
                        image.size(0) == first.size(0) && image.size(2) <= first.size(2) &&
                        image.size(3) <= first.size(3) && image.size(1) % step == 0,
                    op, ": channels-last images of one dtype that fit the first, with a multiple of ", step, " channels");
    parts.push_back({data<T>(image), image.size(2), image.size(3), image.size(1)});
  }
  return parts;
}

}  // namespace kdmos

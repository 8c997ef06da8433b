// What CPU and GPU share of the dense image of the occupied cells: which types, and the sizes.
#pragma once

#include "common.h"

namespace kdmos {

struct ImageSizes {
  int64_t M, C, places;
};

inline ImageSizes image_sizes(const Tensor& values, const Tensor& cells, const Tensor& factor,
                              const Tensor& background, int64_t num_places) {
  check_tensor("cells_to_image", "values", values, values.scalar_type(), {-1, -1}, values);
  const int64_t M = values.size(0), C = values.size(1);
  check_tensor("cells_to_image", "cells", cells, ScalarType::Long, {M}, values);
  check_tensor("cells_to_image", "factor", factor, ScalarType::Float, {C}, values);
  check_tensor("cells_to_image", "background", background, ScalarType::Float, {C}, values);
  STD_TORCH_CHECK(num_places >= 0, "cells_to_image: a number of places");
  return {M, C, num_places};
}

// body(the type of the values, the image's type): the image is float32 or a half type, the values are too, or float32.
template <class Body>
void for_types(ScalarType values, ScalarType image, const Body& body) {
  STD_TORCH_CHECK(values == ScalarType::Float || values == image,
                  "cells_to_image: values are float32 or of the image's type");
  const bool wide = values == ScalarType::Float;
  switch (image) {
    case ScalarType::Float: return body(float{}, float{});
    case ScalarType::BFloat16: return wide ? body(float{}, BFloat16{}) : body(BFloat16{}, BFloat16{});
    case ScalarType::Half: return wide ? body(float{}, Half{}) : body(Half{}, Half{});
    default: STD_TORCH_CHECK(false, "cells_to_image: the image is float32, bfloat16 or float16");
  }
}

}  // namespace kdmos

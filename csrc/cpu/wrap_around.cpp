// Images joined along their channels, the phi axis closed, in one copy each way; channels last.
#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kGrain = 1 << 15;  // values a thread copies at least

// parts [B, C_i, R_i, A_i], R_i <= R_0 and A_i <= A_0, zeros after the smaller ones: [B, sum C_i, R_0, A_0 + 2 halo].
Tensor wrap_around(const std::vector<Tensor>& images, int64_t halo) {
  std::vector<Tensor> parts;
  int64_t C = 0;
  for (const Tensor& image : images) {
    parts.push_back(nhwc(image));
    STD_TORCH_CHECK(parts.back().is_contiguous() && image.scalar_type() == images[0].scalar_type(),
                    "wrap_around: channels-last images of one dtype");
    STD_TORCH_CHECK(image.size(0) == images[0].size(0) && image.size(2) <= images[0].size(2) &&
                        image.size(3) <= images[0].size(3),
                    "wrap_around: a part does not fit the first");
    C += image.size(1);
  }
  const int64_t B = parts[0].size(0), R = parts[0].size(1), A = parts[0].size(2), wide = A + 2 * halo;
  STD_TORCH_CHECK(halo >= 0 && halo <= A, "wrap_around: the halo is wider than the image");
  Tensor out = empty_as(parts[0], {B, R, wide, C}, images[0].scalar_type());
  const size_t bytes = images[0].element_size();
  char* to = mutable_data<char>(out);
  torch::stable::parallel_for(0, B * R, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, wide * C)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / R, r = row % R;
      char* line = to + row * wide * C * bytes;
      int64_t channel = 0;
      for (const Tensor& part : parts) {
        const int64_t size = part.size(3), rings = part.size(1), sectors = part.size(2);
        const char* from = data<char>(part) + (b * rings + r) * sectors * size * bytes;
        const int64_t filled = r < rings ? sectors : 0;
        char* place = line + (halo * C + channel) * bytes;
        if (size == C) {
          std::memcpy(place, from, filled * C * bytes);
        } else {
          for (int64_t a = 0; a < filled; ++a) std::memcpy(place + a * C * bytes, from + a * size * bytes, size * bytes);
        }
        for (int64_t a = filled; a < A; ++a) std::memset(place + a * C * bytes, 0, size * bytes);
        channel += size;
      }
      std::memcpy(line, line + A * C * bytes, halo * C * bytes);
      std::memcpy(line + (halo + A) * C * bytes, line + halo * C * bytes, halo * C * bytes);
    }
  });
  return channels_last(out);
}

// gradient [B, sum C_i, R, A + 2 halo] -> of each part [B, C_i, R_i, A_i]; halo columns add to those they copy.
// shapes: C_i, R_i, A_i of each part.
std::vector<Tensor> wrap_around_backward(const Tensor& image, const std::vector<int64_t>& shapes, int64_t halo) {
  const Tensor gradient = nhwc(image);
  STD_TORCH_CHECK(gradient.is_contiguous(), "wrap_around_backward: channels-last gradient");
  const int64_t B = gradient.size(0), R = gradient.size(1), wide = gradient.size(2), C = gradient.size(3);
  const int64_t A = wide - 2 * halo;
  std::vector<Tensor> parts, out;
  for (size_t i = 0; i + 2 < shapes.size(); i += 3) {
    parts.push_back(empty_as(gradient, {B, shapes[i + 1], shapes[i + 2], shapes[i]}, image.scalar_type()));
    out.push_back(channels_last(parts.back()));
  }
  for_floating("wrap_around_backward", image.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T* from = data<T>(gradient);
    torch::stable::parallel_for(0, B * R, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, wide * C)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t b = row / R, r = row % R;
        const T* line = from + row * wide * C;
        int64_t channel = 0;
        for (const Tensor& part : parts) {
          const int64_t rings = part.size(1), sectors = part.size(2), size = part.size(3);
          const int64_t from_channel = channel;
          channel += size;
          if (r >= rings) continue;  // zeros were put there
          T* to = mutable_data<T>(part) + (b * rings + r) * sectors * size;
          const auto add = [&](int64_t a, int64_t column) {
            if (a >= sectors) return;
            const T* more = line + column * C + from_channel;
            for (int64_t c = 0; c < size; ++c) to[a * size + c] = T(F(to[a * size + c]) + F(more[c]));
          };
          for (int64_t a = 0; a < sectors; ++a) {
            std::memcpy(static_cast<void*>(to + a * size), line + (halo + a) * C + from_channel, size * sizeof(T));
          }
          for (int64_t a = 0; a < halo; ++a) add(A - halo + a, a), add(a, halo + A + a);
        }
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("wrap_around", TORCH_BOX(&kdmos::wrap_around));
  m.impl("wrap_around_backward", TORCH_BOX(&kdmos::wrap_around_backward));
}

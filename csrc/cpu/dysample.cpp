// Learned upsampling, channels last: [B, H, W, C] -> [B, sH, sW, C].
//
// Least work forward: x and the offsets read once, the output written once; four multiply-adds a value. Backward:
// output gradient, x and offsets read, two gradients written; eight multiply-adds a value.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../dysample.h"
#include "parallel.h"

namespace kdmos {
namespace {

constexpr int64_t kRows = 8;        // input rows a thread takes at a time
constexpr int kLanes = 8;           // sums of every eighth channel, before they are added
constexpr int64_t kMostPlaces = 64;  // groups * scale^2 computed together

struct Shape {
  int64_t B, C, H, W, s, G, P;  // P = G * s * s places an input pixel
  bool circular;
};

// Places of one input pixel: group g, sub-pixel (i, j) is number (g * s + i) * s + j.
template <class F>
struct Places {
  int32_t top[kMostPlaces], bottom[kMostPlaces], left[kMostPlaces], right[kMostPlaces];
  F down[kMostPlaces], along[kMostPlaces];
  int32_t free_down[kMostPlaces], free_along[kMostPlaces];
};

template <class F, bool kCircular>
void find_places(const F* __restrict__ offset, int64_t P, int64_t h, int64_t w, int64_t H, int64_t W, Places<F>& out) {
  for (int64_t p = 0; p < P; ++p) {
    const auto x = kCircular ? wrapped(F(w) + offset[p], int(W)) : clamped(F(w) + offset[p], int(W));
    const auto y = clamped(F(h) + offset[P + p], int(H));
    out.left[p] = x.first, out.right[p] = x.second, out.along[p] = x.share, out.free_along[p] = x.free;
    out.top[p] = y.first, out.bottom[p] = y.second, out.down[p] = y.share, out.free_down[p] = y.free;
  }
}

template <class F>
void find_places(const Shape& n, const F* offset, int64_t h, int64_t w, Places<F>& out) {
  n.circular ? find_places<F, true>(offset, n.P, h, w, n.H, n.W, out)
             : find_places<F, false>(offset, n.P, h, w, n.H, n.W, out);
}

// The four corners a sub-pixel reads, as pixels of an image, with their weights.
template <class F>
struct Corners {
  Corners(const Places<F>& at, int64_t p, int64_t W) {
    const int64_t top = at.top[p] * W, bottom = at.bottom[p] * W;
    pixel[0] = top + at.left[p], pixel[1] = top + at.right[p];
    pixel[2] = bottom + at.left[p], pixel[3] = bottom + at.right[p];
    const F a = at.along[p], d = at.down[p];
    weight[0] = (1 - d) * (1 - a), weight[1] = (1 - d) * a, weight[2] = d * (1 - a), weight[3] = d * a;
  }
  int64_t pixel[4];
  F weight[4];
};

// body(std::integral_constant<int, width>) for the group widths of the decoder, 0 for any other.
template <class Body>
void for_width(int64_t width, const Body& body) {
  switch (width) {
    case 8: return body(std::integral_constant<int, 8>{});
    case 16: return body(std::integral_constant<int, 16>{});
    case 32: return body(std::integral_constant<int, 32>{});
    case 64: return body(std::integral_constant<int, 64>{});
    default: return body(std::integral_constant<int, 0>{});
  }
}

Shape shape_of(const Tensor& x, const Tensor& offset, int64_t scale, int64_t groups, bool circular) {
  const Shape n{x.size(0), x.size(3), x.size(1), x.size(2), scale, groups, groups * scale * scale, circular};
  STD_TORCH_CHECK(x.is_contiguous() && offset.is_contiguous() && offset.size(3) == 2 * n.P && n.C % groups == 0,
                  "dysample: x [B, H, W, C] and offset [B, H, W, 2 G s s], contiguous");
  STD_TORCH_CHECK(n.P <= kMostPlaces, "dysample: more than ", kMostPlaces, " places a pixel");
  return n;
}

Tensor dysample(const Tensor& x_nchw, const Tensor& offset_nchw, int64_t scale, int64_t groups, bool circular) {
  const Tensor x = nhwc(x_nchw), offset = nhwc(offset_nchw);
  const Shape n = shape_of(x, offset, scale, groups, circular);
  Tensor out = empty_as(x, {n.B, n.s * n.H, n.s * n.W, n.C}, x.scalar_type());
  for_floating("dysample", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    for_width(n.C / n.G, [&](auto constant) {
      const int64_t width = constant() ? constant() : n.C / n.G;
      const T* image = data<T>(x);
      const F* shift = data<F>(offset);
      T* to = mutable_data<T>(out);
      torch::stable::parallel_for(0, n.B * n.H, kRows, [&](int64_t begin, int64_t end) {
        Places<F> at;
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / n.H, h = row % n.H;
          const T* from = image + b * n.H * n.W * n.C;
          for (int64_t w = 0; w < n.W; ++w) {
            find_places(n, shift + (row * n.W + w) * 2 * n.P, h, w, at);
            for (int64_t i = 0; i < n.s; ++i) {
              for (int64_t j = 0; j < n.s; ++j) {
                T* pixel = to + (((b * n.H + h) * n.s + i) * n.s * n.W + n.s * w + j) * n.C;
                for (int64_t g = 0; g < n.G; ++g) {
                  const Corners<F> corner(at, (g * n.s + i) * n.s + j, n.W);
                  const T* a = from + corner.pixel[0] * n.C + g * width;
                  const T* b_ = from + corner.pixel[1] * n.C + g * width;
                  const T* c_ = from + corner.pixel[2] * n.C + g * width;
                  const T* d = from + corner.pixel[3] * n.C + g * width;
                  T* __restrict__ value = pixel + g * width;
                  const int64_t size = constant() ? constant() : width;
#pragma omp simd
                  for (int64_t c = 0; c < size; ++c) {
                    const F above = multiply_add(corner.weight[1], F(b_[c]), corner.weight[0] * F(a[c]));
                    const F most = multiply_add(corner.weight[2], F(c_[c]), above);
                    value[c] = narrow<T>(multiply_add(corner.weight[3], F(d[c]), most));
                  }
                }
              }
            }
          }
        }
      });
    });
  });
  return channels_last(out);
}

// sum[p] of the kLanes values of each place, 0 where it may not move: sums across lanes, for many places together.
template <class F>
void add_lanes(int64_t P, const F* __restrict__ lanes, const int32_t* __restrict__ free, F* __restrict__ sum) {
  for (int64_t p = 0; p < P; ++p, lanes += kLanes) {
    const F low = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), high = (lanes[4] + lanes[5]) + (lanes[6] + lanes[7]);
    sum[p] = free[p] ? low + high : F(0);
  }
}

// A sub-pixel with a corner in another band's rows.
struct Crossing {
  int32_t h, w, p;
};

std::tuple<Tensor, Tensor> dysample_backward(const Tensor& gradient_nchw, const Tensor& x_nchw,
                                             const Tensor& offset_nchw, int64_t scale, int64_t groups, bool circular) {
  const Tensor gradient = nhwc(gradient_nchw), x = nhwc(x_nchw), offset = nhwc(offset_nchw);
  const Shape n = shape_of(x, offset, scale, groups, circular);
  STD_TORCH_CHECK(gradient.is_contiguous(), "dysample_backward: gradient channels last");
  // Bands of input rows whose gradient one thread sums. Their number does not depend on that of the threads, and so
  // neither does the result.
  const int64_t rows = std::max<int64_t>(kRows, (n.H + 15) / 16), bands = (n.H + rows - 1) / rows;
  Tensor x_gradient = empty_as(x, {n.B, n.H, n.W, n.C}, x.scalar_type());
  Tensor offset_gradient = empty_as(offset, {n.B, n.H, n.W, 2 * n.P}, offset.scalar_type());
  for_floating("dysample_backward", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T *image = data<T>(x), *upstream = data<T>(gradient);
    const F* shift = data<F>(offset);
    F* to_shift = mutable_data<F>(offset_gradient);
    // half types are summed in float32
    Tensor sums = sizeof(T) == sizeof(F) ? x_gradient : empty_as(x, {n.B, n.H, n.W, n.C}, ScalarType::Float);
    F* to_image = mutable_data<F>(sums);
    std::vector<std::vector<Crossing>> crossings(n.B * bands);

    for_width(n.C / n.G, [&](auto constant) {
      const int64_t width = constant() ? constant() : n.C / n.G;
      const auto upstream_of = [&](int64_t b, int64_t h, int64_t w, int64_t p) {
        const int64_t g = p / (n.s * n.s), i = p / n.s % n.s, j = p % n.s;
        return upstream + (((b * n.H + h) * n.s + i) * n.s * n.W + n.s * w + j) * n.C + g * width;
      };
      // 1) each band: the gradient of its offsets, and of x in its own rows
      torch::stable::parallel_for(0, n.B * bands, 1, [&](int64_t begin, int64_t end) {
        Places<F> at;
        F sums_x[kMostPlaces * kLanes], sums_y[kMostPlaces * kLanes];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t b = task / bands, low = task % bands * rows, high = std::min(n.H, low + rows);
          const T* from = image + b * n.H * n.W * n.C;
          F* into = to_image + b * n.H * n.W * n.C;
          std::fill(into + low * n.W * n.C, into + high * n.W * n.C, F(0));
          for (int64_t h = low; h < high; ++h) {
            for (int64_t w = 0; w < n.W; ++w) {
              const int64_t pixel = (b * n.H + h) * n.W + w;
              find_places(n, shift + pixel * 2 * n.P, h, w, at);
              for (int64_t p = 0; p < n.P; ++p) {
                const Corners<F> corner(at, p, n.W);
                const int64_t channel = p / (n.s * n.s) * width;
                const T* __restrict__ up = upstream_of(b, h, w, p);
                const T *xa = from + corner.pixel[0] * n.C + channel, *xb = from + corner.pixel[1] * n.C + channel;
                const T *xc = from + corner.pixel[2] * n.C + channel, *xd = from + corner.pixel[3] * n.C + channel;
                const int64_t size = constant() ? constant() : width;
                const F along = at.along[p], down = at.down[p];
                F gx[kLanes] = {}, gy[kLanes] = {};
                for (int64_t first = 0; first < size; first += kLanes) {
                  const int64_t lanes = constant() ? kLanes : std::min<int64_t>(kLanes, size - first);
#pragma omp simd
                  for (int64_t l = 0; l < lanes; ++l) {
                    const int64_t k = first + l;
                    const F g = F(up[k]), a = F(xa[k]), b_ = F(xb[k]), c = F(xc[k]), d = F(xd[k]);
                    gx[l] = multiply_add(g, multiply_add(down, (d - c) - (b_ - a), b_ - a), gx[l]);
                    gy[l] = multiply_add(g, multiply_add(along, (d - b_) - (c - a), c - a), gy[l]);
                  }
                }
                std::memcpy(sums_x + p * kLanes, gx, sizeof(gx));
                std::memcpy(sums_y + p * kLanes, gy, sizeof(gy));
                bool crosses = false;
                for (int q = 0; q < 4; q += 2) {
                  const int64_t y = q ? at.bottom[p] : at.top[p];
                  if (y < low || y >= high) {
                    crosses = true;
                    continue;
                  }
                  F* __restrict__ first = into + corner.pixel[q] * n.C + channel;
                  F* __restrict__ second = into + corner.pixel[q + 1] * n.C + channel;
                  const F wa = corner.weight[q], wb = corner.weight[q + 1];
#pragma omp simd
                  for (int64_t k = 0; k < size; ++k) first[k] = multiply_add(wa, F(up[k]), first[k]);
#pragma omp simd
                  for (int64_t k = 0; k < size; ++k) second[k] = multiply_add(wb, F(up[k]), second[k]);
                }
                if (crosses) crossings[task].push_back({int32_t(h), int32_t(w), int32_t(p)});
              }
              F* to = to_shift + pixel * 2 * n.P;
              add_lanes(n.P, sums_x, at.free_along, to);
              add_lanes(n.P, sums_y, at.free_down, to + n.P);
            }
          }
        }
      });
      // 2) what crosses the seams, in the order of the bands
      torch::stable::parallel_for(0, n.B, 1, [&](int64_t begin, int64_t end) {
        Places<F> at;
        for (int64_t b = begin; b < end; ++b) {
          F* into = to_image + b * n.H * n.W * n.C;
          for (int64_t band = 0; band < bands; ++band) {
            const int64_t low = band * rows, high = std::min(n.H, low + rows);
            int64_t before = -1;
            for (const Crossing& crossing : crossings[b * bands + band]) {
              const int64_t h = crossing.h, w = crossing.w, p = crossing.p;
              const int64_t pixel = (b * n.H + h) * n.W + w;
              if (pixel != before) find_places(n, shift + pixel * 2 * n.P, h, w, at);
              before = pixel;
              const Corners<F> corner(at, p, n.W);
              const T* up = upstream_of(b, h, w, p);
              for (int q = 0; q < 4; ++q) {
                const int64_t y = q < 2 ? at.top[p] : at.bottom[p];
                if (y >= low && y < high) continue;
                F* __restrict__ sum = into + corner.pixel[q] * n.C + p / (n.s * n.s) * width;
                for (int64_t k = 0; k < width; ++k) sum[k] = multiply_add(corner.weight[q], F(up[k]), sum[k]);
              }
            }
          }
        }
      });
    });
    if (sizeof(T) != sizeof(F)) {
      T* halves = mutable_data<T>(x_gradient);
      torch::stable::parallel_for(0, n.B * n.H * n.W * n.C, 1 << 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) halves[i] = narrow<T>(to_image[i]);
      });
    }
  });
  return {channels_last(x_gradient), channels_last(offset_gradient)};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) {
  m.impl("dysample", TORCH_BOX(&kdmos::dysample));
  m.impl("dysample_backward", TORCH_BOX(&kdmos::dysample_backward));
}

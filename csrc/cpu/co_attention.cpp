// Co-attention and the 2x2 maxima of both branches, channels last; the equations stand in co_attention.h.
//
// Least work: `fused` and motion read once, appearance twice (the mean over the image stands between), the result and
// the maxima written once; a pixel takes 18 D + M + 3 C multiply-adds, two exponentials for the gates and one more.
#include "../co_attention.h"

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace kdmos {
namespace {

constexpr int kLanes = 16;           // pixels, or channels, worked on together
constexpr int kTaps = 9;             // of a 3x3 convolution
constexpr int64_t kGrain = 1 << 14;  // values of appearance a thread takes at least

template <class F>
inline F sigmoid(F x) {
  return F(1) / (F(1) + exponential(x < F(-87) ? F(87) : -x));  // so put, NaN remains
}

// out = in[0], in[size / 2], in[1], in[size / 2 + 1], ...: the highest bit of a value's place becomes its lowest.
template <class U>
inline void interleave(const U* __restrict__ in, int64_t size, U* __restrict__ out) {
  const U* __restrict__ other = in + size / 2;
#pragma omp simd
  for (int64_t i = 0; i < size / 2; ++i) out[2 * i] = in[i], out[2 * i + 1] = other[i];
}

// [kLanes, C] -> [C, kLanes]: the four bits of the pixel move from the top of a value's place to its bottom.
template <class T>
void transpose(const T* in, int64_t C, T* buffer, wide_t<T>* __restrict__ out) {
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, T>;  // half types as their bits, which compilers vectorise
  const int64_t size = kLanes * C;
  U *a = reinterpret_cast<U*>(buffer), *b = a + size;
  interleave(reinterpret_cast<const U*>(in), size, b);
  interleave(b, size, a);
  interleave(a, size, b);
  interleave(b, size, a);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) out[i] = wide_t<T>(buffer[i]);
}

// Each pixel of a row times each weight of the two gates: [2 * kTaps, stride], pixel w at column w + 1, the circle
// closed.
template <class T, class F>
void products_of_row(const T* row, const F* __restrict__ weight, int64_t W, int64_t D, int64_t stride, T* buffer,
                     F* __restrict__ x, F* __restrict__ out) {
  if (D < 1) return;  // never, but it lets the compiler put the pixels below into the lanes of vectors
  for (int64_t w = 0; w < W; w += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, W - w);
    const T* pixels = row + w * D;
    if (count < kLanes) std::copy(pixels, pixels + count * D, buffer), pixels = buffer;
    transpose(pixels, D, buffer, x);
    for (int64_t gate = 0; gate < 2; ++gate) {
      const F* __restrict__ of_gate = weight + gate * D * kTaps;
      F* __restrict__ to = out + gate * kTaps * stride + w + 1;
#pragma omp simd
      for (int p = 0; p < kLanes; ++p) {
        F sum[kTaps] = {};
        for (int64_t d = 0; d < D; ++d) {
          const F value = x[d * kLanes + p];
#pragma GCC unroll 9
          for (int tap = 0; tap < kTaps; ++tap) sum[tap] = multiply_add(value, of_gate[d * kTaps + tap], sum[tap]);
        }
#pragma GCC unroll 9
        for (int tap = 0; tap < kTaps; ++tap) to[tap * stride + p] = sum[tap];
      }
    }
  }
  for (int64_t line = 0; line < 2 * kTaps; ++line) {
    F* products = out + line * stride;
    products[0] = products[W], products[W + 1] = products[1];
  }
}

// Sum over a row of sigmoid(convolution), from the products of the row above, the row and the row below.
template <class F>
F gate_of_row(const F* const (&rows)[3], F bias, int64_t W, int64_t stride) {
  F sum = 0;
  const F *a = rows[0], *b = rows[1] + 3 * stride, *c = rows[2] + 6 * stride;
#pragma omp simd reduction(+ : sum)
  for (int64_t w = 0; w < W; ++w) {
    const F above = a[w] + a[stride + w + 1] + a[2 * stride + w + 2];
    const F here = b[w] + b[stride + w + 1] + b[2 * stride + w + 2];
    const F below = c[w] + c[stride + w + 1] + c[2 * stride + w + 2];
    sum += sigmoid(bias + above + here + below);
  }
  return sum;
}

// 1) the gates [B, 2]
template <class T, class F>
std::vector<F> gates_of(const AttentionShape& n, const T* fused, const F* weight, const F* bias) {
  const int64_t stride = (n.W + kLanes) / kLanes * kLanes + kLanes, size = 2 * kTaps * stride;
  std::vector<F> sums(n.B * n.H * 2);
  const int64_t grain = std::max<int64_t>(1, kGrain / (n.W * n.D));
  torch::stable::parallel_for(0, n.B * n.H, grain, [&](int64_t begin, int64_t end) {
    std::vector<F> products(4 * size, F(0));  // of three rows, and of the zeros beyond the first and last ring
    std::vector<T> buffer(2 * kLanes * n.D, T(0));
    Scratch<F> block(kLanes * n.D);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t h = row % n.H;
      const F* rows[3];
      for (int64_t k = 0; k < 3; ++k) {
        const int64_t r = h + k - 1;
        const bool inside = r >= 0 && r < n.H;
        F* place = products.data() + (inside ? r % 3 : 3) * size;
        if (inside && (k == 2 || row == begin || h == 0)) {  // the others are there from the row before
          products_of_row(fused + (row + k - 1) * n.W * n.D, weight, n.W, n.D, stride, buffer.data(), &block[0], place);
        }
        rows[k] = place;
      }
      sums[2 * row] = gate_of_row<F>(rows, bias[0], n.W, stride);
      for (const F*& place : rows) place += kTaps * stride;
      sums[2 * row + 1] = gate_of_row<F>(rows, bias[1], n.W, stride);
    }
  });
  std::vector<F> gates(n.B * 2);
  for (int64_t i = 0; i < n.B * 2; ++i) {
    double sum = 0;
    for (int64_t h = 0; h < n.H; ++h) sum += sums[(i / 2 * n.H + h) * 2 + i % 2];
    gates[i] = F(sum / double(n.H * n.W));
  }
  return gates;
}

// s of one row.
template <class T, class F>
void seen_of_row(const T* row, const F* __restrict__ weight, F gate, F bias, int64_t W, int64_t M,
                 F* __restrict__ seen) {
  const int64_t whole = M / kLanes * kLanes;
  F lanes[kLanes * kLanes] = {}, half[kLanes * kLanes / 2];
  for (int64_t w = 0; w < W; w += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, W - w);
    for (int64_t p = 0; p < count; ++p) {
      const T* __restrict__ pixel = row + (w + p) * M;
      F* __restrict__ sum = lanes + p * kLanes;
      std::fill(sum, sum + kLanes, F(0));
      for (int64_t m = 0; m < whole; m += kLanes) {
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) sum[l] = multiply_add(F(pixel[m + l]), weight[m + l], sum[l]);
      }
      for (int64_t m = whole; m < M; ++m) sum[m - whole] = multiply_add(F(pixel[m]), weight[m], sum[m - whole]);
    }
    // the sixteen lanes of sixteen pixels, added two by two
    const auto fold = [](const F* __restrict__ in, int size, F* __restrict__ out) {
#pragma omp simd
      for (int i = 0; i < size; ++i) out[i] = in[2 * i] + in[2 * i + 1];
    };
    fold(lanes, 8 * kLanes, half), fold(half, 4 * kLanes, lanes), fold(lanes, 2 * kLanes, half);
    fold(half, kLanes, lanes);
#pragma omp simd
    for (int p = 0; p < kLanes; ++p) half[p] = sigmoid(multiply_add(gate, lanes[p], bias));
    std::copy(half, half + count, seen + w);
  }
}

// sum[c] += s * appearance[c] over kCount pixels.
template <int kCount, class T, class F>
void add_seen(const T* __restrict__ pixels, const F* __restrict__ seen, int64_t C, F* __restrict__ sum) {
#pragma omp simd
  for (int64_t c = 0; c < C; ++c) {
    F s = sum[c];
#pragma GCC unroll 16
    for (int p = 0; p < kCount; ++p) s = multiply_add(seen[p], F(pixels[p * C + c]), s);
    sum[c] = s;
  }
}

// The largest of 2 x 2 pixels each, of two rows; W pixels of the result.
template <class T>
void halve(const T* first, const T* second, int64_t W, int64_t C, T* out) {
  using F = wide_t<T>;
  for (int64_t w = 0; w < W; ++w) {
    const T *__restrict__ a = first + 2 * w * C, *__restrict__ b = a + C;
    const T *__restrict__ c = second + 2 * w * C, *__restrict__ d = c + C;
    T* __restrict__ pixel = out + w * C;
#pragma omp simd
    for (int64_t k = 0; k < C; ++k) {
      const F above = F(a[k]) > F(b[k]) ? F(a[k]) : F(b[k]), below = F(c[k]) > F(d[k]) ? F(c[k]) : F(d[k]);
      pixel[k] = narrow<T>(above > below ? above : below);
    }
  }
}

template <class T, class F>
void attend_row(const T* row, const F* __restrict__ seen, F gate, const F* __restrict__ scale, int64_t W, int64_t C,
                T* out) {
  for (int64_t w = 0; w < W; ++w) {
    const T* __restrict__ from = row + w * C;
    T* __restrict__ pixel = out + w * C;
    const F s = seen[w];
#pragma omp simd
    for (int64_t c = 0; c < C; ++c) pixel[c] = narrow<T>(F(from[c]) * multiply_add(s, scale[c], gate));
  }
}

std::tuple<Tensor, Tensor, Tensor> co_attention(const Tensor& appearance, const Tensor& motion, const Tensor& fused,
                                                const Tensor& gate, const Tensor& gate_bias, const Tensor& spatial,
                                                const Tensor& spatial_bias, const Tensor& channel,
                                                const Tensor& channel_bias) {
  const AttentionShape n =
      attention_shape({appearance, motion, fused, gate, gate_bias, spatial, spatial_bias, channel, channel_bias});
  const ScalarType dtype = appearance.scalar_type();
  const int64_t half_height = n.H / 2, half_width = n.W / 2;
  Tensor attended = empty_as(appearance, {n.B, n.H, n.W, n.C}, dtype);
  Tensor half_appearance = empty_as(appearance, {n.B, half_height, half_width, n.C}, dtype);
  Tensor half_motion = empty_as(appearance, {n.B, half_height, half_width, n.M}, dtype);
  for_floating("co_attention", dtype, [&](auto type) {
    using T = decltype(type);
    using F = wide_t<T>;
    const T *from = data<T>(appearance), *moving = data<T>(motion);
    const std::vector<F> gates = gates_of(n, data<T>(fused), data<F>(gate), data<F>(gate_bias));
    // rows are taken in pairs, for the maxima; the last may be alone
    const int64_t pairs = (n.H + 1) / 2, grain = std::max<int64_t>(1, kGrain / (2 * n.W * n.C));
    const auto for_pairs = [&](const auto& body) {
      torch::stable::parallel_for(0, n.B * pairs, grain, [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) body(pair, pair / pairs, 2 * (pair % pairs));
      });
    };
    // 2) where to look, and the sums over what is seen; the maxima of motion in passing
    Scratch<F> seen(n.B * n.H * n.W), sums(n.B * pairs * n.C);
    for_pairs([&](int64_t pair, int64_t b, int64_t h) {
      F* sum = sums + pair * n.C;
      std::fill(sum, sum + n.C, F(0));
      for (int64_t row = b * n.H + h; row < b * n.H + std::min(h + 2, n.H); ++row) {
        seen_of_row(moving + row * n.W * n.M, data<F>(spatial), gates[2 * b + 1], *data<F>(spatial_bias), n.W, n.M,
                    seen + row * n.W);
        int64_t pixel = row * n.W, end = pixel + n.W;
        for (; pixel + kLanes <= end; pixel += kLanes) add_seen<kLanes>(from + pixel * n.C, seen + pixel, n.C, sum);
        for (; pixel < end; ++pixel) add_seen<1>(from + pixel * n.C, seen + pixel, n.C, sum);
      }
      if (h + 1 < n.H) {
        const T* first = moving + (b * n.H + h) * n.W * n.M;
        T* half = mutable_data<T>(half_motion) + (b * half_height + h / 2) * half_width * n.M;
        halve(first, first + n.W * n.M, half_width, n.M, half);
      }
    });
    // 3) in which channels
    std::vector<F> scale(n.B * n.C);
    std::vector<double> mean(n.C), weighed(n.C);
    for (int64_t b = 0; b < n.B; ++b) {
      const double gate_a = double(gates[2 * b]);
      std::fill(mean.begin(), mean.end(), 0);
      for (int64_t pair = b * pairs; pair < (b + 1) * pairs; ++pair) {
        for (int64_t c = 0; c < n.C; ++c) mean[c] += double(sums[pair * n.C + c]);
      }
      const F* line = data<F>(channel);
      for (int64_t c = 0; c < n.C; ++c, line += n.C) {
        double sum = 0;
        for (int64_t k = 0; k < n.C; ++k) sum += double(line[k]) * mean[k];
        weighed[c] = sum * gate_a / double(n.H * n.W) + double(data<F>(channel_bias)[c]);
      }
      const double largest = *std::max_element(weighed.begin(), weighed.end());
      double total = 0;
      for (double& value : weighed) total += value = std::exp(value - largest);
      for (int64_t c = 0; c < n.C; ++c) scale[b * n.C + c] = F(gate_a * double(n.C) * weighed[c] / total);
    }
    // 4) the result and its maxima
    for_pairs([&](int64_t, int64_t b, int64_t h) {
      T* out = mutable_data<T>(attended);
      for (int64_t r = h; r < std::min(h + 2, n.H); ++r) {
        const int64_t pixel = (b * n.H + r) * n.W;
        attend_row(from + pixel * n.C, seen + pixel, gates[2 * b], scale.data() + b * n.C, n.W, n.C, out + pixel * n.C);
      }
      if (h + 1 < n.H) {
        const T* first = out + (b * n.H + h) * n.W * n.C;
        T* half = mutable_data<T>(half_appearance) + (b * half_height + h / 2) * half_width * n.C;
        halve(first, first + n.W * n.C, half_width, n.C, half);
      }
    });
  });
  return {channels_last(attended), channels_last(half_appearance), channels_last(half_motion)};
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("co_attention", TORCH_BOX(&kdmos::co_attention)); }

// 3x3 convolution, circular in phi, with bias and LeakyReLU, after Winograd, F(2x2, 3x3): of 2x2 outputs at a time,
// from the 4x4 inputs d that they see,
//
//     Y = At [(G g Gt) * (Bt d B)] A,
//
// where the product in the middle is one of each of 16 places, summed over channels: 16 products of matrices,
// [tiles, C] by [C, O], instead of 9 for each of four outputs.
//
// Least work: 4 C O multiply-adds an output pixel, instead of 9; before and after them 8 C and 6 O additions, and a
// conversion each. Whole images: where much is background, masked_conv leaves out more.
//
// The CPU alone, and there AVX-512, see kdmos/ops/winograd_conv.py, which transforms the weights once.
#include "parts.h"
#include "products.h"

#if defined(__AVX512F__)
#include <algorithm>

namespace kdmos {
namespace {

constexpr int kRows = 14;               // tiles; of 32 outputs: 28 sums, two weights and an input fill the registers
constexpr int64_t kCache = 400 * 1024;  // bytes of transformed inputs at a time: with their sums they stay in L2
constexpr int64_t kPad = 64;            // bytes after each place's plane, or 16 stores would meet in one set of L1

struct Shape {
  int64_t B, R, A, C, O;
};

// Bt d B of 16 channels of a tile: d from pixel[row * 4 + sector] + c, place i * 4 + j to to + (i * 4 + j) * plane.
template <class T>
KDMOS_BOTH void transform_inputs(const T* const* pixel, int64_t c, T* to, int64_t plane) {
  __m512 column[4][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 d0 = load_sums(pixel[j] + c), d1 = load_sums(pixel[4 + j] + c);
    const __m512 d2 = load_sums(pixel[8 + j] + c), d3 = load_sums(pixel[12 + j] + c);
    column[0][j] = d0 - d2, column[1][j] = d1 + d2, column[2][j] = d2 - d1, column[3][j] = d1 - d3;
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i, to += 4 * plane) {
    store_sums(to, column[i][0] - column[i][2]);
    store_sums(to + plane, column[i][1] + column[i][2]);
    store_sums(to + 2 * plane, column[i][2] - column[i][1]);
    store_sums(to + 3 * plane, column[i][1] - column[i][3]);
  }
}

// At m A of 16 outputs of a tile, with bias and LeakyReLU; pixels beyond the image have no place to go.
template <class T>
KDMOS_BOTH void transform_outputs(const float* from, int64_t plane, const float* bias, const Activation& activation,
                                  T* const* pixel, int64_t o) {
  __m512 row[2][4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 m0 = load_sums(from + j * plane), m1 = load_sums(from + (4 + j) * plane);
    const __m512 m2 = load_sums(from + (8 + j) * plane), m3 = load_sums(from + (12 + j) * plane);
    row[0][j] = m0 + m1 + m2, row[1][j] = m1 - m2 - m3;
  }
  const __m512 shift = _mm512_loadu_ps(bias + o);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 y[2] = {row[i][0] + row[i][1] + row[i][2] + shift, row[i][1] - row[i][2] - row[i][3] + shift};
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      if (pixel[2 * i + j]) store_sums(pixel[2 * i + j] + o, activation(y[j]));
    }
  }
}

// The tiles [first, last) of an image, as many at a time as the cache takes.
template <class T>
class Convolver {
 public:
  using Block = Sums<T, kRows, 2>;

  Convolver(const std::vector<Part<T>>& parts, const Shape& n, const T* weight, const float* bias, float slope, T* out)
      : parts(parts), n(n), weight(weight), bias(bias), activation(slope), out(out), zeros(n.C, T(0.0f)) {}

  void compute(int64_t first, int64_t last) {
    const int64_t most = std::max<int64_t>(1, kCache / (16 * std::max<int64_t>(1, n.C) * sizeof(T)) / kRows) * kRows;
    const int64_t blocks = (last - first + most - 1) / most;
    rows = (((last - first) + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
    input_plane = rows * n.C + kPad / sizeof(T), sum_plane = rows * Block::kOutputs + kPad / sizeof(float);
    // zeros: a last block that is not full computes with what is there
    inputs.assign(16 * input_plane, T(0.0f)), sums.resize(16 * sum_plane), pixels.resize(4 * rows);
    for (; first < last; first += rows) {
      const int64_t tiles = std::min(rows, last - first);
      for (int64_t tile = 0; tile < tiles; ++tile) read(first + tile, tile);
      for (int64_t o = 0; o < n.O; o += Block::kOutputs) {
        multiply(o, tiles);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const float* from = sums.data() + tile * Block::kOutputs;
          transform_outputs(from, sum_plane, bias, activation, pixels.data() + 4 * tile, o);
          transform_outputs(from + kLanes, sum_plane, bias, activation, pixels.data() + 4 * tile, o + kLanes);
        }
      }
    }
  }

 private:
  // 1) The inputs of a tile, transformed; and where its outputs go.
  void read(int64_t number, int64_t tile) {
    const int64_t across = (n.A + 1) / 2, down = (n.R + 1) / 2;
    const int64_t a = number % across * 2, r = number / across % down * 2, b = number / (across * down);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t ring = r + i / 2, sector = a + i % 2;
      const bool inside = ring < n.R && sector < n.A;
      pixels[4 * tile + i] = inside ? out + ((b * n.R + ring) * n.A + sector) * n.O : nullptr;
    }
    T* to = inputs.data() + tile * n.C;
    for (const Part<T>& part : parts) {
      const T* pixel[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t ring = r - 1 + i / 4, beyond = a - 1 + i % 4;
        const int64_t sector = beyond < 0 ? n.A - 1 : beyond % n.A;
        const bool inside = ring >= 0 && ring < part.R && sector < part.A;
        pixel[i] = inside ? part.data + ((b * part.R + ring) * part.A + sector) * part.C : zeros.data();
      }
      for (int64_t c = 0; c < part.C; c += kLanes, to += kLanes) transform_inputs(pixel, c, to, input_plane);
    }
  }

  // 2) The products of 32 outputs at all places.
  void multiply(int64_t o, int64_t tiles) {
    static const float none[Block::kOutputs] = {};  // the bias comes after the transform
    for (int64_t place = 0; place < 16; ++place) {
      const T* weights = weight + (place * n.O + o) * n.C;
      for (int64_t tile = 0; tile < tiles; tile += kRows) {
        const T* from[kRows];
        float* to[kRows];
        for (int64_t row = 0; row < kRows; ++row) {
          from[row] = inputs.data() + place * input_plane + (tile + row) * n.C;
          to[row] = sums.data() + place * sum_plane + (tile + row) * Block::kOutputs;
        }
        Block block(none);
        block.add(from, n.C, weights);
        block.store(to, 0, 1.0f);
      }
    }
  }

  const std::vector<Part<T>>& parts;
  const Shape& n;
  const T* weight;
  const float* bias;
  const Activation activation;
  T* out;
  const std::vector<T> zeros;
  int64_t rows, input_plane, sum_plane;  // tiles at a time; values of a place
  std::vector<T> inputs;                 // [16][rows][C]
  std::vector<float> sums;               // [16][rows][32]
  std::vector<T*> pixels;                // [rows][4]
};

// parts [B, C_i, R_i, A_i], weight [16, O / 32, C / kStep, 32, kStep]: [B, O, R_0, A_0].
template <class T>
Tensor winograd_conv_of(const std::vector<Tensor>& images, const Tensor& weight, const Tensor& bias, float slope) {
  const Tensor& image = images[0];
  const std::vector<Part<T>> parts = parts_of<T>("winograd_conv", images, kLanes);
  Shape n{image.size(0), image.size(2), image.size(3), 0, bias.numel()};
  for (const Part<T>& part : parts) n.C += part.C;
  STD_TORCH_CHECK(weight.is_contiguous() && weight.scalar_type() == image.scalar_type() &&
                      weight.numel() == 16 * n.O * n.C && n.O % Convolver<T>::Block::kOutputs == 0,
                  "winograd_conv: transformed weight of the images' dtype, O a multiple of ", Convolver<T>::Block::kOutputs);
  STD_TORCH_CHECK(bias.is_contiguous() && bias.scalar_type() == ScalarType::Float, "winograd_conv: bias float32 [O]");
  Tensor out = empty_as(image, {n.B, n.R, n.A, n.O}, image.scalar_type());
  const int64_t tiles = n.B * ((n.R + 1) / 2) * ((n.A + 1) / 2), threads = num_threads();
  // What a pixel gives depends on its tile, not on the block, and so not on the number of threads.
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = share(tiles, threads, begin), last = share(tiles, threads, end);
    if (first < last) Convolver<T>(parts, n, data<T>(weight), data<float>(bias), slope, mutable_data<T>(out)).compute(first, last);
  });
  return channels_last(out);
}

Tensor winograd_conv(const std::vector<Tensor>& parts, const Tensor& weight, const Tensor& bias, double slope) {
  STD_TORCH_CHECK(!parts.empty(), "winograd_conv: no image");
#if defined(__AVX512BF16__)
  if (parts[0].scalar_type() == ScalarType::BFloat16) return winograd_conv_of<BFloat16>(parts, weight, bias, float(slope));
#endif
  STD_TORCH_CHECK(parts[0].scalar_type() == ScalarType::Float, "winograd_conv: not a type that this build computes in");
  return winograd_conv_of<float>(parts, weight, bias, float(slope));
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("winograd_conv", TORCH_BOX(&kdmos::winograd_conv)); }

#endif

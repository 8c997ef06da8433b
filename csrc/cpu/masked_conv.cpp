// 3x3 convolution, circular in phi, with bias and LeakyReLU, only where the image is more than background.
//
// Least work: 9 C O multiply-adds a pixel that is computed, its C inputs read and its O outputs written once; O written
// for a pixel that takes the background of its row. The computed pixels need not be neighbours: a block of them is a
// product of matrices, [pixels, 9 C] by [9 C, outputs], whose first factor is read where it lies: three runs of 3 C
// values a pixel, one in each ring.
//
// The CPU alone, and there AVX-512: elsewhere the convolution of a whole image is quicker, see kdmos/ops/masked_conv.py.
#include "parts.h"
#include "products.h"

#if defined(__AVX512F__)
#include <algorithm>

namespace kdmos {
namespace {

struct Shape {
  int64_t B, R, A, C, O;
};

// One ring of one part.
template <class T>
struct Line {
  const T* data;
  int64_t A, C;
};

// Where to compute: rows (scan * R + ring) and sectors.
struct Pixels {
  explicit Pixels(int64_t most) : row(most + 1), sector(most + 1) {}
  Scratch<int32_t> row, sector;
  int64_t count = 0;
};

// weight [O, C, 3, 3] as [O / outputs][3 rings][parts][3 sectors][C_i / kStep][outputs][kStep], as the sums read it.
template <class T>
void pack(const Tensor& weight, const std::vector<Part<T>>& parts, const Shape& n, int64_t outputs, T* __restrict__ to) {
  constexpr int64_t kStep = Vector<T>::kStep;
  const T* from = data<T>(weight);
  const int64_t by_o = weight.stride(0), by_c = weight.stride(1);
  const int64_t by_ring = weight.stride(2), by_sector = weight.stride(3);
  for (int64_t first = 0; first < n.O; first += outputs) {
    for (int64_t ring = 0; ring < 3; ++ring) {
      int64_t channel = 0;
      for (const Part<T>& part : parts) {
        for (int64_t sector = 0; sector < 3; ++sector) {
          for (int64_t c = channel; c < channel + part.C; c += kStep) {
            const T* pair = from + first * by_o + c * by_c + ring * by_ring + sector * by_sector;
            for (int64_t o = 0; o < outputs; ++o) {
              for (int64_t k = 0; k < kStep; ++k) *to++ = pair[o * by_o + k * by_c];
            }
          }
        }
        channel += part.C;
      }
    }
  }
}

// Computes kPixels at a time, while what the next ones read is fetched.
template <class T, int kPixels, int kVectors>
class Convolver {
 public:
  using Block = Sums<T, kPixels, kVectors>;

  Convolver(const std::vector<Part<T>>& parts, const Shape& n, const T* weight, const float* bias, float slope, T* out)
      : parts(parts),
        n(n),
        weight(weight),
        bias(bias),
        slope(slope),
        out(out),
        lines(3 * parts.size()),
        narrowest(n.A),
        runs{Scratch<const T*>(lines.size() * kPixels), Scratch<const T*>(lines.size() * kPixels)},
        patches{Scratch<T>(kPixels * 9 * n.C), Scratch<T>(kPixels * 9 * n.C)},
        zeros(n.A * n.C) {
    for (const Part<T>& part : parts) narrowest = std::min(narrowest, part.A);
    std::memset(static_cast<void*>(zeros), 0, n.A * n.C * sizeof(T));
  }

  void compute(const Pixels& pixels) {
    if (pixels.count) find(pixels, 0, 0);
    for (int64_t i = 0, odd = 0; i < pixels.count; i += kPixels, odd = !odd) {
      if (i + kPixels < pixels.count) find(pixels, i + kPixels, !odd);
      multiply(odd);
    }
  }

 private:
  // Where the three sectors begin that kPixels pixels from `begin` on read, of each ring and part; the last of a
  // shorter block again and again.
  void find(const Pixels& pixels, int64_t begin, int odd) {
    for (int64_t p = 0; p < kPixels; ++p) {
      const int64_t i = std::min(begin + p, pixels.count - 1), a = pixels.sector[i];
      if (pixels.row[i] != row) start(pixels.row[i]);
      to[odd][p] = out + (row * n.A + a) * n.O;
      const T** run = runs[odd] + p;
      if (a > 0 && a + 1 < narrowest) {
        for (const Line<T>& line : lines) {
          *run = line.data + (a - 1) * line.C;
          for (int64_t c = 0; c < 3 * line.C; c += 64 / sizeof(T)) __builtin_prefetch(*run + c);
          run += kPixels;
        }
        continue;
      }
      T* patch = patches[odd] + p * 9 * n.C;  // across the seam of the circle, or the end of a smaller part
      for (const Line<T>& line : lines) {
        *run = patch, run += kPixels;
        for (int64_t sector : {a ? a - 1 : n.A - 1, a, a + 1 < n.A ? a + 1 : 0}) {
          const T* values = sector < line.A ? line.data + sector * line.C : zeros;
          std::memcpy(static_cast<void*>(patch), values, line.C * sizeof(T));
          patch += line.C;
        }
      }
    }
  }

  // The rings above, at and below a row.
  void start(int64_t next) {
    row = next;
    const int64_t b = row / n.R, r = row % n.R;
    auto line = lines.begin();
    for (int64_t ring = r - 1; ring <= r + 1; ++ring) {
      for (const Part<T>& part : parts) {
        const bool inside = ring >= 0 && ring < part.R;
        *line++ = {inside ? part.data + (b * part.R + ring) * part.A * part.C : zeros, part.A, part.C};
      }
    }
  }

  void multiply(int odd) const {
    const T* weights = weight;
    for (int64_t first = 0; first < n.O; first += Block::kOutputs) {
      Block block(bias + first);
      const T* const* run = runs[odd];
      for (const Line<T>& line : lines) weights = block.add(run, 3 * line.C, weights), run += kPixels;
      block.store(to[odd], first, slope);
    }
  }

  const std::vector<Part<T>>& parts;
  const Shape& n;
  const T* weight;
  const float* bias;
  const float slope;
  T* out;
  int64_t row = -1;
  std::vector<Line<T>> lines;  // [3 rings][parts]
  int64_t narrowest;
  Scratch<const T*> runs[2];  // [3 rings][parts][kPixels], of this block and the next
  T* to[2][kPixels];
  Scratch<T> patches[2], zeros;
};

// Adds the pixels of a row that are to be computed: those near enough and, to fill the others, the first of these.
// Returns its sector, or -1.
int64_t add_row(const uint8_t* distance, int64_t A, int64_t row, int64_t near, bool fill, Pixels& pixels) {
  int64_t count = pixels.count, background = -1;
  for (int64_t a = 0; a < A; ++a) {
    pixels.row[count] = int32_t(row), pixels.sector[count] = int32_t(a);
    const bool beyond = distance[a] > near, first = beyond && fill && background < 0;
    if (first) background = a;
    count += !beyond || first;
  }
  pixels.count = count;
  return background;
}

// Copies the value of sector `background` to those beyond `near` after it.
template <class T>
void spread(const uint8_t* distance, const Shape& n, int64_t near, int64_t background, T* line) {
  const T* from = line + background * n.O;
  line += (background + 1) * n.O;
  for (int64_t a = background + 1; a < n.A; ++a, line += n.O) {
    if (distance[a] <= near) continue;
    for (int64_t o = 0; o < n.O; o += kLanes) std::memcpy(static_cast<void*>(line + o), from + o, kLanes * sizeof(T));
  }
}

template <class T, int kPixels, int kVectors>
void convolve(const std::vector<Part<T>>& parts, const Shape& n, const Tensor& weight, const float* bias, float slope,
              const uint8_t* distance, int64_t near, bool fill, T* out) {
  using Conv = Convolver<T, kPixels, kVectors>;
  Scratch<T> packed(n.O * 9 * n.C);
  pack(weight, parts, n, Conv::Block::kOutputs, static_cast<T*>(packed));
  // Each thread's rows have as many pixels to compute: near the sensor a row has far more of them. The value of a
  // pixel does not depend on the block it is in, and so not on the number of threads.
  const int64_t rows = n.B * n.R, threads = num_threads();
  std::vector<int64_t> before(rows + 1, 0);  // pixels before each row, at most
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = fill;
    for (int64_t a = 0; a < n.A; ++a) count += distance[row * n.A + a] <= near;
    before[row + 1] = before[row] + std::min(count, n.A);
  }
  const auto first_row = [&](int64_t thread) {
    return std::lower_bound(before.begin(), before.end(), share(before[rows], threads, thread)) - before.begin();
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = first_row(begin), last = first_row(end);
    // 1) the pixels
    Pixels pixels(before[last] - before[first]);
    std::vector<int64_t> background(last - first);
    for (int64_t row = first; row < last; ++row) {
      background[row - first] = add_row(distance + row * n.A, n.A, row, near, fill, pixels);
    }
    // 2) their values
    Conv(parts, n, packed, bias, slope, out).compute(pixels);
    // 3) those of the others
    for (int64_t row = first; row < last; ++row) {
      const int64_t sector = background[row - first];
      if (sector >= 0) spread(distance + row * n.A, n, near, sector, out + row * n.A * n.O);
    }
  });
}

// parts [B, C_i, R_i, A_i], R_i <= R_0 and A_i <= A_0, distance [B, R_0, A_0]: [B, O, R_0, A_0].
template <class T>
Tensor masked_conv_of(const std::vector<Tensor>& images, const Tensor& weight, const Tensor& bias, float slope,
                      const Tensor& distance, int64_t near, bool fill) {
  const Tensor& image = images[0];
  const Shape n{image.size(0), image.size(2), image.size(3), weight.size(1), weight.size(0)};
  const std::vector<Part<T>> parts = parts_of<T>("masked_conv", images, Vector<T>::kStep);
  int64_t C = 0;
  for (const Part<T>& part : parts) C += part.C;
  STD_TORCH_CHECK(C == n.C && n.O % kLanes == 0 && weight.size(2) == 3 && weight.size(3) == 3 &&
                      weight.scalar_type() == image.scalar_type(),
                  "masked_conv: weight [O, C, 3, 3] of the images' dtype, O a multiple of ", kLanes);
  STD_TORCH_CHECK(bias.is_contiguous() && bias.scalar_type() == ScalarType::Float && bias.numel() == n.O,
                  "masked_conv: bias float32 [O]");
  STD_TORCH_CHECK(distance.is_contiguous() && distance.scalar_type() == ScalarType::Byte && distance.dim() == 3 &&
                      distance.size(0) == n.B && distance.size(1) == n.R && distance.size(2) == n.A,
                  "masked_conv: distance uint8 [B, R, A]");
  Tensor out = empty_as(image, {n.B, n.R, n.A, n.O}, image.scalar_type());
  // 28 sums, two weights and an input: all registers but one
  const auto run = n.O % (2 * kLanes) == 0 ? &convolve<T, 14, 2> : &convolve<T, 24, 1>;
  run(parts, n, weight, data<float>(bias), slope, data<uint8_t>(distance), near, fill, mutable_data<T>(out));
  return channels_last(out);
}

Tensor masked_conv(const std::vector<Tensor>& parts, const Tensor& weight, const Tensor& bias, double slope,
                   const Tensor& distance, int64_t near, bool fill) {
  STD_TORCH_CHECK(!parts.empty(), "masked_conv: no image");
#if defined(__AVX512BF16__)
  if (parts[0].scalar_type() == ScalarType::BFloat16) {
    return masked_conv_of<BFloat16>(parts, weight, bias, float(slope), distance, near, fill);
  }
#endif
  STD_TORCH_CHECK(parts[0].scalar_type() == ScalarType::Float, "masked_conv: not a type that this build computes in");
  return masked_conv_of<float>(parts, weight, bias, float(slope), distance, near, fill);
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CPU, m) { m.impl("masked_conv", TORCH_BOX(&kdmos::masked_conv)); }

#endif

// Images joined along their channels, the phi axis closed, in one copy each way; channels last.
//
// Least work: forward the parts read once and the output written once; backward the reverse. An addition for each
// value of a halo column, nothing else.
#include <algorithm>
#include <vector>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;         // nothing is shared: as many blocks as fit hide the loads
constexpr int64_t kMost = 1LL << 30;  // rows or columns: they are counted in int

// One part's place: sizes and channels are in units of what a thread moves.
struct Part {
  int rings, sectors;
  int64_t size, channel;  // its channels, and the first of them in the joined image
};

struct Image {
  int rows, R, A, halo;  // rows = B * R; A + 2 * halo columns
  int64_t C;
};

// A block is (units of a pixel, pixels of a row); blockIdx.y is the row. Every extent walks on by its width.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    wrap_around_kernel(const Unit* __restrict__ from, const Part part, const Image n, Unit* __restrict__ out) {
  const int wide = n.A + 2 * n.halo;
  for (int row = blockIdx.y; row < n.rows; row += gridDim.y) {
    const int b = row / n.R, r = row % n.R;
    for (int column = blockIdx.x * blockDim.y + threadIdx.y; column < wide; column += gridDim.x * blockDim.y) {
      int a = column - n.halo;
      a = a < 0 ? a + n.A : a >= n.A ? a - n.A : a;
      const bool inside = r < part.rings && a < part.sectors;
      const int64_t pixel = inside ? ((int64_t(b) * part.rings + r) * part.sectors + a) * part.size : 0;
      Unit* place = out + (int64_t(row) * wide + column) * n.C + part.channel;
      for (int64_t c = threadIdx.x; c < part.size; c += blockDim.x) place[c] = inside ? from[pixel + c] : Unit{};
    }
  }
}

// Each value of a part is summed by one thread: what its column holds, its copy on the left, its copy on the right,
// rounded to T each time as the CPU does.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    wrap_around_backward_kernel(const T* __restrict__ gradient, const Part part, const Image n, int rows,
                                T* __restrict__ to) {
  using F = wide_t<T>;
  const int wide = n.A + 2 * n.halo;
  for (int row = blockIdx.y; row < rows; row += gridDim.y) {  // of the part
    const int b = row / part.rings, r = row % part.rings;
    const T* line = gradient + (int64_t(b) * n.R + r) * wide * n.C * V + part.channel * V;
    for (int a = blockIdx.x * blockDim.y + threadIdx.y; a < part.sectors; a += gridDim.x * blockDim.y) {
      const bool on_left = a >= n.A - n.halo, on_right = a < n.halo;
      for (int64_t c = threadIdx.x; c < part.size; c += blockDim.x) {
        const auto at = [&](int column) { return load<V>(line + (column * n.C + c) * V); };
        Vec<T, V> value = at(n.halo + a);
        const auto add = [&](const Vec<T, V>& more) {
#pragma unroll
          for (int v = 0; v < V; ++v) value.value[v] = T(F(value.value[v]) + F(more.value[v]));
        };
        if (on_left) add(at(a - (n.A - n.halo)));
        if (on_right) add(at(n.halo + n.A + a));
        store(to + ((int64_t(row) * part.sectors + a) * part.size + c) * V, value);
      }
    }
  }
}

dim3 block_for(int64_t units) {
  const unsigned across = unsigned(std::clamp<int64_t>(units, 1, kThreads));
  return dim3(across, kThreads / across);
}

dim3 grid_for(int64_t rows, int64_t columns, dim3 block) {
  return dim3(num_blocks(columns, block.y), num_blocks(rows, 1, 65535));
}

// Whether each of these, in bytes, is a multiple of `unit`.
bool divides(int64_t unit, std::initializer_list<int64_t> bytes) {
  return std::all_of(bytes.begin(), bytes.end(), [&](int64_t size) { return size % unit == 0; });
}

int64_t address(const void* pointer) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)); }

// parts [B, C_i, R_i, A_i], R_i <= R_0 and A_i <= A_0, zeros after the smaller ones: [B, sum C_i, R_0, A_0 + 2 halo].
Tensor wrap_around(const std::vector<Tensor>& images, int64_t halo) {
  STD_TORCH_CHECK(!images.empty(), "wrap_around: no images");
  std::vector<Tensor> parts;
  int64_t C = 0;
  for (const Tensor& image : images) {
    parts.push_back(nhwc(image));
    const Tensor &part = parts.back(), &first = parts[0];
    check_tensor("wrap_around", "an image (channels last)", part, images[0].scalar_type(), {first.size(0), -1, -1, -1},
                 first);
    STD_TORCH_CHECK(part.size(1) <= first.size(1) && part.size(2) <= first.size(2),
                    "wrap_around: an image is larger than the first");
    C += image.size(1);
  }
  const int64_t B = parts[0].size(0), R = parts[0].size(1), A = parts[0].size(2), wide = A + 2 * halo;
  STD_TORCH_CHECK(halo >= 0 && halo <= A, "wrap_around: the halo is wider than the image");
  STD_TORCH_CHECK(R <= kMost && B <= kMost / std::max<int64_t>(1, R) && wide <= kMost, "wrap_around: image too large");
  const OnDevice device(parts[0]);
  Tensor out = empty_as(parts[0], {B, R, wide, C}, images[0].scalar_type());
  if (out.numel() == 0) return channels_last(out);
  const int64_t bytes = int64_t(images[0].element_size());
  int64_t channel = 0;
  for (const Tensor& part : parts) {
    const int64_t size = part.size(3);
    const auto copy = [&](auto unit) {
      using Unit = decltype(unit);
      const int64_t scale = sizeof(Unit);
      const Part place{int(part.size(1)), int(part.size(2)), size * bytes / scale, channel * bytes / scale};
      const Image n{int(B * R), int(R), int(A), int(halo), C * bytes / scale};
      const dim3 block = block_for(place.size);
      wrap_around_kernel<Unit><<<grid_for(B * R, wide, block), block, 0, device.stream()>>>(
          data<Unit>(part), place, n, mutable_data<Unit>(out));
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    const auto fits = [&](int64_t unit) {
      return divides(unit, {size * bytes, C * bytes, channel * bytes, address(data<char>(part)),
                            address(data<char>(out))});
    };
    if (size > 0) {
      fits(16) ? copy(uint4{}) : fits(8) ? copy(uint2{}) : fits(4) ? copy(uint32_t{}) : fits(2) ? copy(uint16_t{})
                                                                                                : copy(uint8_t{});
    }
    channel += size;
  }
  return channels_last(out);
}

// gradient [B, sum C_i, R, A + 2 halo] -> of each part [B, C_i, R_i, A_i]; halo columns add to those they copy.
// shapes: C_i, R_i, A_i of each part.
std::vector<Tensor> wrap_around_backward(const Tensor& image, const std::vector<int64_t>& shapes, int64_t halo) {
  const Tensor gradient = nhwc(image);
  check_tensor("wrap_around_backward", "the gradient (channels last)", gradient, image.scalar_type(), {-1, -1, -1, -1},
               gradient);
  STD_TORCH_CHECK(shapes.size() % 3 == 0, "wrap_around_backward: shapes are channels, rings and sectors of each part");
  const int64_t B = gradient.size(0), R = gradient.size(1), wide = gradient.size(2), C = gradient.size(3);
  const int64_t A = wide - 2 * halo;
  STD_TORCH_CHECK(halo >= 0 && halo <= A, "wrap_around_backward: the halo is wider than the image");
  STD_TORCH_CHECK(R <= kMost && B <= kMost / std::max<int64_t>(1, R) && wide <= kMost,
                  "wrap_around_backward: image too large");
  const OnDevice device(gradient);
  std::vector<Tensor> parts, out;
  int64_t channels = 0;
  for (size_t i = 0; i + 2 < shapes.size(); i += 3) {
    channels += shapes[i];
    STD_TORCH_CHECK(channels <= C && shapes[i + 1] <= R && shapes[i + 2] <= A,
                    "wrap_around_backward: parts larger than the gradient");
    parts.push_back(empty_as(gradient, {B, shapes[i + 1], shapes[i + 2], shapes[i]}, image.scalar_type()));
    out.push_back(channels_last(parts.back()));
  }
  for_floating("wrap_around_backward", image.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* from = data<T>(gradient);
    int64_t channel = 0;
    for (const Tensor& part : parts) {
      const int64_t rings = part.size(1), sectors = part.size(2), size = part.size(3);
      const int64_t from_channel = channel;
      channel += size;
      if (part.numel() == 0) continue;
      T* to = mutable_data<T>(part);
      const auto sum = [&](auto constant) {
        constexpr int V = decltype(constant)::value;
        const Part place{int(rings), int(sectors), size / V, from_channel / V};
        const Image n{int(B * R), int(R), int(A), int(halo), C / V};
        const dim3 block = block_for(place.size);
        wrap_around_backward_kernel<T, V><<<grid_for(B * rings, sectors, block), block, 0, device.stream()>>>(
            from, place, n, int(B * rings), to);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      constexpr int V = 16 / int(sizeof(T));
      const bool whole = divides(V, {size, C, from_channel}) && divides(16, {address(from), address(to)});
      whole ? sum(std::integral_constant<int, V>{}) : sum(std::integral_constant<int, 1>{});
    }
  });
  return out;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) {
  m.impl("wrap_around", TORCH_BOX(&kdmos::wrap_around));
  m.impl("wrap_around_backward", TORCH_BOX(&kdmos::wrap_around_backward));
}

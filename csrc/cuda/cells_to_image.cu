// Dense image [num_places, C]: values[m] * factor + background in row cells[m], the background in every other.
//
// Least work: each value read once, each row written once; a multiply-add a value: bytes decide. A block owns a run of
// places, whatever lies there: it finds its cells by a search, notes which place has which, and writes every row once.
// Padding is never looked at, but for a probe of the search.
#include "../cells_to_image.h"

#include <algorithm>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // enough to hide the search of some blocks behind the stores of others
constexpr int kBlocks = 4;     // of a multiprocessor, at least: no registers spilled
constexpr int kPlaces = 256;   // of a block: 16 kB of 32 channels in bfloat16, and some hundred blocks an image

// How many of the ascending cells [0, M) lie before `place`: a whole warp asks 32 of them at a time, 3 or 4 times.
__device__ int64_t count_before(const int64_t* __restrict__ cells, int64_t M, int64_t place, int lane) {
  int64_t first = 0, size = M;  // it is first, or up to `size` more
  while (size > 0) {
    const int64_t part = (size + 31) / 32, last = (lane + 1) * part - 1;
    const bool before = last < size && cells[first + last] < place;
    const int64_t whole = __popc(__ballot_sync(0xffffffff, before)) * part;  // parts that lie before it
    first += whole;
    size = min(part - 1, size - whole);
  }
  return first;
}

// A block is (vectors of a row, rows); more vectors than threads are walked over.
template <class S, class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks)
    cells_to_image_kernel(const S* __restrict__ values, const int64_t* __restrict__ cells,
                          const float* __restrict__ factor, const float* __restrict__ background, const ImageSizes n,
                          T* __restrict__ image) {
  __shared__ int found[kPlaces];  // the cell of each place, counted from the block's first one; -1: none
  __shared__ int64_t bounds[2];   // of the block's cells
  const int across = int(blockDim.x), threads = across * int(blockDim.y);
  const int thread = int(threadIdx.y) * across + int(threadIdx.x), warp = thread / 32;
  const int64_t step = int64_t(gridDim.x) * kPlaces;
  for (int64_t base = int64_t(blockIdx.x) * kPlaces; base < n.places; base += step) {
    const int64_t end = min(base + kPlaces, n.places);
    // 1) the block's cells: one warp looks for the first, another one for the end
    for (int p = thread; p < kPlaces; p += threads) found[p] = -1;
    if (warp < 2) {
      const int64_t bound = count_before(cells, n.M, warp == 0 ? base : end, thread % 32);
      if (thread % 32 == 0) bounds[warp] = bound;
    }
    __syncthreads();
    // 2) which place has which; of a cell that occurs twice the later one stays
    const int64_t first = bounds[0], last = bounds[1];
    for (int64_t m = first + thread; m < last; m += threads) {
      const int64_t place = cells[m];
      if (place >= base && place < end) atomicMax(&found[place - base], int(m - first));
    }
    __syncthreads();
    // 3) every row once
    for (int64_t c = int64_t(threadIdx.x) * V; c < n.C; c += int64_t(across) * V) {
      float scale[V], shift[V];
      Vec<T, V> empty;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        scale[v] = factor[c + v], shift[v] = background[c + v];
        empty.value[v] = T(shift[v]);
      }
#pragma unroll 4
      for (int p = int(threadIdx.y); p < int(end - base); p += int(blockDim.y)) {
        Vec<T, V> row = empty;
        if (found[p] >= 0) {
          const Vec<S, V> value = load<V>(values + (first + found[p]) * n.C + c);
#pragma unroll
          for (int v = 0; v < V; ++v) row.value[v] = T(multiply_add(float(value.value[v]), scale[v], shift[v]));
        }
        store(image + (base + p) * n.C + c, row);
      }
    }
    __syncthreads();  // before the next places take the memory
  }
}

Tensor cells_to_image(const Tensor& values, const Tensor& cells, const Tensor& factor, const Tensor& background,
                      int64_t num_places, ScalarType dtype) {
  const ImageSizes n = image_sizes(values, cells, factor, background, num_places);
  const OnDevice device(values);
  Tensor image = empty_as(values, {n.places, n.C}, dtype);
  if (n.places == 0 || n.C == 0) return image;
  for_types(values.scalar_type(), dtype, [&](auto from_type, auto to_type) {
    using S = decltype(from_type);
    using T = decltype(to_type);
    const S* from = data<S>(values);
    for_vector<T>(n.C, {from}, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      const unsigned across = unsigned(std::min<int64_t>(n.C / V, kThreads));
      const dim3 block(across, kThreads / across);  // more than two warps, whatever the channels
      cells_to_image_kernel<S, T, V><<<num_blocks(n.places, kPlaces), block, 0, device.stream()>>>(
          from, data<int64_t>(cells), data<float>(factor), data<float>(background), n, mutable_data<T>(image));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return image;
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("cells_to_image", TORCH_BOX(&kdmos::cells_to_image)); }

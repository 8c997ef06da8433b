// labels = raw[argmax of logits], probability = softmax(logits)[moving], in one pass.
//
// Least work: 4 C bytes a point read, 8 written, over PCIe if they go into host memory, where these 8 bytes decide; C
// exponentials and comparisons and a division. A thread takes a point: a warp writes 128 bytes of each result at once,
// which is what a bus wants. Nothing is copied afterwards.
#include <vector>

#include "vectors.cuh"

namespace kdmos {
namespace {

constexpr int kThreads = 256;  // nothing is shared: as many blocks as fit hide the loads
constexpr int kMostClasses = 32;

// The label of each class: an argument of the kernel, so that it needs no memory on the device.
struct RawIds {
  uint32_t of[kMostClasses];
};

// kClasses = 0: any number, each logit read twice.
template <int kClasses>
__global__ void __launch_bounds__(kThreads)
    label_points_kernel(const float* __restrict__ logits, int64_t n, int num_classes, int moving, const RawIds raw,
                        uint32_t* __restrict__ labels, float* __restrict__ probability) {
  const int C = kClasses ? kClasses : num_classes;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const float* row = logits + i * C;
    float held[kClasses ? kClasses : 1];
    if constexpr (kClasses == 2 || kClasses == 4) {
      const auto vec = load<kClasses>(row);
#pragma unroll
      for (int c = 0; c < kClasses; ++c) held[c] = vec.value[c];
    } else {
#pragma unroll
      for (int c = 0; c < kClasses; ++c) held[c] = row[c];
    }
    const auto logit = [&](int c) { return kClasses ? held[c] : row[c]; };
    float most = logit(0), sum = 0.0f, own = 0.0f;
    uint32_t label = raw.of[0];
#pragma unroll(kClasses ? kClasses : 4)
    for (int c = 1; c < C; ++c) {
      // NaN above all, as in torch; of equal ones the first stays
      const float value = logit(c);
      const bool better = value > most || (value != value && most == most);
      most = better ? value : most;
      label = better ? raw.of[c] : label;
    }
#pragma unroll(kClasses ? kClasses : 4)
    for (int c = 0; c < C; ++c) {
      const float e = expf(logit(c) - most);
      sum += e;
      own = c == moving ? e : own;
    }
    labels[i] = label;
    probability[i] = own / sum;
  }
}

// Where a kernel writes a tensor that lies on its device, or in pinned host memory.
template <class T>
T* writable(const char* name, const Tensor& tensor) {
  T* address = mutable_data<T>(tensor);
  if (tensor.is_cuda()) return address;
  cudaPointerAttributes is{};
  STD_CUDA_CHECK(cudaPointerGetAttributes(&is, address));
  STD_TORCH_CHECK(is.type == cudaMemoryTypeHost, "label_points: ", name,
                  " lies in host memory that is not pinned, where the GPU cannot write");
  return static_cast<T*>(is.devicePointer);
}

void label_points(const Tensor& logits, int64_t moving, std::vector<int64_t> raw, const Tensor& labels,
                  const Tensor& probability) {
  const int64_t C = int64_t(raw.size());
  STD_TORCH_CHECK(logits.is_cuda(), "label_points: logits must lie on the GPU that the results lie on");
  check_tensor("label_points", "logits", logits, ScalarType::Float, {-1, C}, logits);
  STD_TORCH_CHECK(C >= 1 && C <= kMostClasses && moving >= 0 && moving < C,
                  "label_points: 1 to 32 classes, the moving one among them");
  const int64_t n = logits.size(0);
  // those in host memory are beside themselves
  check_tensor("label_points", "labels", labels, ScalarType::UInt32, {n}, labels.is_cuda() ? logits : labels);
  check_tensor("label_points", "probability", probability, ScalarType::Float, {n},
               probability.is_cuda() ? logits : probability);
  if (n == 0) return;
  const OnDevice device(logits);
  RawIds ids{};
  for (int64_t c = 0; c < C; ++c) ids.of[c] = uint32_t(raw[c]);
  const float* from = data<float>(logits);
  uint32_t* to = writable<uint32_t>("labels", labels);
  float* own = writable<float>("probability", probability);
  const auto launch = [&](auto classes) {
    label_points_kernel<decltype(classes)::value><<<num_blocks(n, kThreads), kThreads, 0, device.stream()>>>(
        from, n, int(C), int(moving), ids, to, own);
  };
  const uintptr_t place = reinterpret_cast<uintptr_t>(from);
  if (C == 2 && place % 8 == 0) {
    launch(std::integral_constant<int, 2>{});
  } else if (C == 3) {
    launch(std::integral_constant<int, 3>{});
  } else if (C == 4 && place % 16 == 0) {
    launch(std::integral_constant<int, 4>{});
  } else {
    launch(std::integral_constant<int, 0>{});
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace kdmos

STABLE_TORCH_LIBRARY_IMPL(kdmos, CUDA, m) { m.impl("label_points", TORCH_BOX(&kdmos::label_points)); }

// What every launcher needs: the device, the stream, and the check after a launch.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common.h"

namespace kdmos {

// The device of a tensor, for as long as this lives, and torch's current stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    // the check that torch has for this is another macro in each of its versions
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                    "no current stream of GPU ", tensor.get_device_index());
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Blocks for `work` items, `per_block` each, at most `most`: kernels walk on by the grid's width.
inline unsigned int num_blocks(int64_t work, int64_t per_block, int64_t most = 1 << 20) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return static_cast<unsigned int>(blocks < 1 ? 1 : blocks > most ? most : blocks);
}

}  // namespace kdmos

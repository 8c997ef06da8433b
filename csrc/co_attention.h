// Motion says where, and in which channels, to look in the appearance: the co-attention of MotionBEV, for inference.
//
//   gates   g = mean over all pixels of sigmoid(3x3 convolution of `fused`): g_a of appearance, g_m of motion
//   where   s = sigmoid(<spatial, g_m motion> + bias), a value a pixel
//   which   c = C softmax(channel mean(s g_a appearance) + bias), a value a channel
//   result  s c g_a appearance + g_a appearance = appearance (g_a + s (g_a c))
//
// Sums are float32 (float64 for float64), those over the image in parts that are joined in order in float64.
#pragma once

#include <utility>

#include "common.h"

namespace kdmos {

struct AttentionShape {
  int64_t B, H, W, C, M, D;  // C channels of appearance, M of motion, D of what the gates are made of
};

struct AttentionInputs {
  const Tensor &appearance, &motion, &fused;  // channels last
  const Tensor &gate, &gate_bias, &spatial, &spatial_bias, &channel, &channel_bias;
};

inline AttentionShape attention_shape(const AttentionInputs& in) {
  const Tensor& a = in.appearance;
  const AttentionShape n{a.size(0), a.size(2), a.size(3), a.size(1), in.motion.size(1), in.fused.size(1)};
  const auto beside = [&](const Tensor& other) {
    return other.is_cuda() == a.is_cuda() && other.get_device_index() == a.get_device_index();
  };
  for (const Tensor* image : {&in.appearance, &in.motion, &in.fused}) {
    STD_TORCH_CHECK(nhwc(*image).is_contiguous() && image->scalar_type() == a.scalar_type() && beside(*image) &&
                        image->size(0) == n.B && image->size(2) == n.H && image->size(3) == n.W,
                    "co_attention: channels-last images of one size and dtype, on one device");
  }
  const auto wide = a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const std::pair<const Tensor*, int64_t> weights[] = {{&in.gate, 2 * n.D * 9}, {&in.gate_bias, 2},
                                                       {&in.spatial, n.M},      {&in.spatial_bias, 1},
                                                       {&in.channel, n.C * n.C}, {&in.channel_bias, n.C}};
  for (const auto& [weight, size] : weights) {
    STD_TORCH_CHECK(weight->numel() == size && weight->is_contiguous() && weight->scalar_type() == wide &&
                        beside(*weight),
                    "co_attention: weights are contiguous, float32, or float64 as the images, and on their device");
  }
  STD_TORCH_CHECK(n.H >= 2 && n.W >= 2 && n.C > 0 && n.M > 0 && n.D > 0,
                  "co_attention: images that have channels and a half");
  return n;
}

}  // namespace kdmos

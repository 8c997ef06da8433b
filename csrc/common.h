// What every op needs, on the CPU and on the GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#ifdef __CUDACC__
#define KDMOS_BOTH __host__ __device__ __forceinline__
#else
#define KDMOS_BOTH inline __attribute__((always_inline))
#endif

namespace kdmos {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using BFloat16 = c10::BFloat16;
using Half = c10::Half;

// What a type is summed in.
template <class T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};
template <class T>
using wide_t = typename Wide<T>::type;

// a * b + c, fused where the processor can.
KDMOS_BOTH double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return fma(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

KDMOS_BOTH float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return fmaf(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Round a sum to T: to nearest, ties to even. Of bfloat16 without branches, so that compilers vectorise it.
template <class T>
KDMOS_BOTH T narrow(wide_t<T> value) {
  return T(value);
}
#ifndef __CUDACC__
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(uint16_t(value == value ? rounded : 0x7fc0u), BFloat16::from_bits());
}
#endif

// body(T{}) with the C++ type of a floating dtype.
template <class Body>
void for_floating(const char* op, ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    case ScalarType::Half: return body(Half{});
    default: STD_TORCH_CHECK(false, op, ": not a floating point type");
  }
}

// Refuses a tensor that a kernel would read wrongly: on another device than `beside`, of another type or size (-1: any),
// or with holes.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> size, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.is_cuda() == beside.is_cuda() && tensor.get_device_index() == beside.get_device_index(), op,
                  ": ", name, " lies on another device than the rest");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": ", name, " is of another type than it must be");
  bool fits = tensor.dim() == int64_t(size.size()) && tensor.is_contiguous();
  int64_t axis = 0;
  for (int64_t wanted : size) fits = fits && (wanted < 0 || tensor.size(axis) == wanted), ++axis;
  STD_TORCH_CHECK(fits, op, ": ", name, " is of another shape than it must be, or not contiguous");
}

inline Tensor empty_as(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>(size), dtype);
}

inline Tensor zeros_as(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
  return torch::stable::new_zeros(like, std::vector<int64_t>(size), dtype);
}

// A [B, C, H, W] view of memory that holds [B, H, W, C].
inline Tensor channels_last(const Tensor& nhwc) {
  return torch::stable::transpose(torch::stable::transpose(nhwc, 2, 3), 1, 2);
}

// The other way: [B, H, W, C] of a [B, C, H, W], contiguous if that is channels last.
inline Tensor nhwc(const Tensor& nchw) {
  return torch::stable::transpose(torch::stable::transpose(nchw, 1, 2), 2, 3);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace kdmos

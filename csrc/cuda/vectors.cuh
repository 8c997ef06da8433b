// Loads and stores of 16 bytes, and the teams of lanes that make them.
#pragma once

#include <cstring>
#include <initializer_list>
#include <type_traits>

#include "launch.cuh"

namespace kdmos {

// kSize values that are loaded and stored together: 16 bytes, or several times 16, where kSize > 1.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize < 16 ? sizeof(T) * kSize : 16) Vec {
  T value[kSize];
};

template <int kSize, class T>
__device__ Vec<T, kSize> load(const T* __restrict__ from) {
  return *reinterpret_cast<const Vec<T, kSize>*>(from);
}

// By an intrinsic: the compiler stores elements that were put together one by one also one by one.
template <class T, int kSize>
__device__ void store(T* to, const Vec<T, kSize>& vec) {
  if constexpr (sizeof(vec) % sizeof(uint4) == 0) {
    uint4 part[sizeof(vec) / sizeof(uint4)];
    memcpy(part, &vec, sizeof(vec));
#pragma unroll
    for (int i = 0; i < int(sizeof(vec) / sizeof(uint4)); ++i) __stwb(reinterpret_cast<uint4*>(to) + i, part[i]);
  } else {
    *reinterpret_cast<Vec<T, kSize>*>(to) = vec;
  }
}

// body(the number of elements in 16 bytes), or body(1) where rows of C elements from these addresses do not divide.
template <class T, class Body>
void for_vector(int64_t C, std::initializer_list<const void*> addresses, const Body& body) {
  constexpr int kVector = 16 / sizeof(T);
  bool aligned = C % kVector == 0;
  for (const void* address : addresses) aligned = aligned && reinterpret_cast<uintptr_t>(address) % 16 == 0;
  if (aligned) return body(std::integral_constant<int, kVector>{});
  return body(std::integral_constant<int, 1>{});
}

// Lanes of a team: a power of two, at most a warp, no more than a row has vectors.
inline int team_width(int64_t vectors) {
  int width = 1;
  while (width < 32 && width < vectors) width *= 2;
  return width;
}

}  // namespace kdmos

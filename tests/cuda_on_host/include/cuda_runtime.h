// What the kernels use of CUDA, for C++ on the host; device.cpp runs them.
#pragma once
#include <math.h>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToDevice };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { std::memset(p, v, n); return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* a, const void* b, size_t n, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(a, b, n);
  return cudaSuccess;
}
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes { cudaMemoryType type; int device; void *devicePointer, *hostPointer; };
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* to, const void* p) {
  *to = {cudaMemoryTypeHost, 0, const_cast<void*>(p), const_cast<void*>(p)};  // there is no other memory
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace host {
enum Exchange { kShuffle, kShuffleXor, kBallot, kSyncWarp };

extern uint3 thread_idx, block_idx;
extern dim3 block_dim, grid_dim;
uint64_t exchange(Exchange op, unsigned mask, uint64_t value, int argument, int line);  // between the lanes of a warp
int barrier(int value, int line);  // of a block; the sum of its threads' values
void begin_shared(void* at, size_t size);
void* dynamic_shared();
void run(const char* name, dim3 grid, dim3 block, size_t shared, const std::function<void()>& body);
[[noreturn]] void fail(const std::string& what);

template <class K, class... A>
void launch(const char* name, dim3 grid, dim3 block, size_t shared, cudaStream_t, const K& kernel, A&&... args) {
  const std::tuple<std::decay_t<A>...> held(std::forward<A>(args)...);
  run(name, grid, block, shared, [&] { std::apply(kernel, held); });
}
template <class T>
uint64_t pack(T v) { static_assert(sizeof(T) <= 8); uint64_t u = 0; std::memcpy(&u, &v, sizeof(v)); return u; }
template <class T>
T unpack(uint64_t u) { T v; std::memcpy(&v, &u, sizeof(v)); return v; }
template <class T>
T rounded(T v) { asm volatile("" : "+x"(v)); return v; }
}  // namespace host

#define threadIdx (host::thread_idx)
#define blockIdx (host::block_idx)
#define blockDim (host::block_dim)
#define gridDim (host::grid_dim)
#define __syncthreads() ((void)host::barrier(0, __LINE__))
#define __syncthreads_count(x) (host::barrier((x) ? 1 : 0, __LINE__))
#define __syncthreads_or(x) (host::barrier((x) ? 1 : 0, __LINE__))
#define __syncwarp() ((void)host::exchange(host::kSyncWarp, 0xffffffffu, 0, 0, __LINE__))

template <class T>
T host_shuffle(host::Exchange op, unsigned mask, T v, int arg, int line) { return host::unpack<T>(host::exchange(op, mask, host::pack(v), arg, line)); }
#define __shfl_sync(m, v, s) host_shuffle(host::kShuffle, m, v, s, __LINE__)
#define __shfl_xor_sync(m, v, s) host_shuffle(host::kShuffleXor, m, v, s, __LINE__)
#define __ballot_sync(m, p) ((unsigned)host::exchange(host::kBallot, m, (p) ? 1 : 0, 0, __LINE__))

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) { using T = std::common_type_t<A, B>; return T(b) < T(a) ? T(b) : T(a); }
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) { using T = std::common_type_t<A, B>; return T(a) < T(b) ? T(b) : T(a); }

template <class T> T __ldg(const T* p) { return *p; }
inline void __stwb(uint4* to, uint4 v) { *to = v; }
inline int __ffs(unsigned v) { return __builtin_ffs(int(v)); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __float_as_uint(float v) { unsigned u; std::memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(unsigned u) { float v; std::memcpy(&v, &u, 4); return v; }
inline float __fadd_rn(float a, float b) { return host::rounded(host::rounded(a) + host::rounded(b)); }
inline float __fmul_rn(float a, float b) { return host::rounded(host::rounded(a) * host::rounded(b)); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline double __dadd_rn(double a, double b) { return host::rounded(host::rounded(a) + host::rounded(b)); }
inline double __dmul_rn(double a, double b) { return host::rounded(host::rounded(a) * host::rounded(b)); }

template <class T, class U> T atomicAdd(T* p, U v) { T o = *p; *p = T(o + T(v)); return o; }
template <class T, class U> T atomicMax(T* p, U v) { T o = *p; if (T(v) > o) *p = T(v); return o; }
template <class T, class U> T atomicMin(T* p, U v) { T o = *p; if (T(v) < o) *p = T(v); return o; }
template <class T> T atomicCAS(T* p, T c, T v) { T o = *p; if (o == c) *p = v; return o; }
inline void host_add_four(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16) host::fail("red.v4 at an address that is no multiple of 16");
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

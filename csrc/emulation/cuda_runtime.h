// What csrc/cuda uses of CUDA, for a C++ compiler: the same sources run on a CPU, in tests.
//
// tests/kernels/emulated.py turns `kernel<<<grid, block, bytes, stream>>>(...)` into a call of emulation::launch and gives
// __shared__ arrays their memory; the rest is in these headers. Where CUDA's functions differ from C's they do so here.
#pragma once
#include <cmath>

#include "block.h"

#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_dim
#define gridDim emulation::grid_dim
#define __syncthreads() emulation::sync_threads()
#define __shfl_xor_sync(mask, value, lanes) emulation::shuffle_xor(mask, value, lanes)

namespace emulation {

// 16 bytes that a GPU reads and writes at multiples of 16 alone.
inline void check_aligned(const void* p) {
  asm("" : "+r"(p));  // the compiler knows what alignas says of p, and would leave the question out
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("a misaligned access of 16 bytes");
}
template <class T, int kCount>
struct alignas(16) Sixteen;
template <class T>
struct alignas(16) Sixteen<T, 4> {
  T x, y, z, w;
  Sixteen(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  Sixteen(const Sixteen& o) { *this = o; }
  Sixteen& operator=(const Sixteen& o) {
    check_aligned(this), check_aligned(&o);
    x = o.x, y = o.y, z = o.z, w = o.w;
    return *this;
  }
};
template <class T>
struct alignas(16) Sixteen<T, 2> {
  T x, y;
  Sixteen(T x, T y) : x(x), y(y) {}
  Sixteen(const Sixteen& o) { *this = o; }
  Sixteen& operator=(const Sixteen& o) {
    check_aligned(this), check_aligned(&o);
    x = o.x, y = o.y;
    return *this;
  }
};

}  // namespace emulation

using float4 = emulation::Sixteen<float, 4>;
using uint4 = emulation::Sixteen<unsigned, 4>;
using longlong2 = emulation::Sixteen<long long, 2>;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline cudaError_t cudaGetLastError() {
  cudaError_t error = emulation::last_error;
  emulation::last_error = cudaSuccess;
  return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : error == cudaErrorInvalidValue       ? "invalid argument"
                                                : "no error";
}

inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
// The CUDA C++ Programming Guide: for 2^126 < |y| < 2^128 the quotient is 0, and NaN for an infinite x. (y = infinity: 0.)
inline float __fdividef(float x, float y) { return x * (std::fabs(y) > 0x1p126f ? 0.0f : 1.0f / y); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

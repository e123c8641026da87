// What the CUDA kernels share: rows of bf16 or fp32 in vectors of eight columns, sums over a warp, the grid.
//
// A lane owns vectors of eight neighbouring columns: one 16-byte access in bf16, two in fp32. Where a row is not a
// multiple of eight columns, or a pointer not aligned to 16 bytes, the same code goes element by element (`whole` false).
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../kernels.h"
#include "../row_math.h"

namespace cmt {

using bf16 = __nv_bfloat16;
constexpr int kWarps = 4;     // of a block
constexpr int kVector = 8;    // columns of a lane's vector
constexpr int kTile = 32 * kVector;  // columns of a warp's vector

CMT_FN float to_float(float x) { return x; }
CMT_FN float to_float(bf16 x) { return __bfloat162float(x); }
CMT_FN void from_float(float* p, float x) { *p = x; }
CMT_FN void from_float(bf16* p, float x) { *p = __float2bfloat16_rn(x); }

struct Vec {
  float v[kVector];
};

// The vector of columns [i, i + 8) of a row of D; columns beyond D are `beyond`.
CMT_FN Vec load(const float* row, int i, int D, bool whole, float beyond = 0.0f) {
  Vec x;
  if (whole && i < D) {
    float4 a = *reinterpret_cast<const float4*>(row + i), b = *reinterpret_cast<const float4*>(row + i + 4);
    x = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x.v[j] = i + j < D ? row[i + j] : beyond;
  }
  return x;
}
CMT_FN Vec load(const bf16* row, int i, int D, bool whole, float beyond = 0.0f) {
  Vec x;
  if (whole && i < D) {
    uint4 raw = *reinterpret_cast<const uint4*>(row + i);
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x.v[2 * j] = __uint_as_float(words[j] << 16);
      x.v[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kVector; ++j) x.v[j] = i + j < D ? to_float(row[i + j]) : beyond;
  }
  return x;
}
CMT_FN void store(float* row, int i, int D, bool whole, const Vec& x) {
  if (whole) {
    if (i >= D) return;
    *reinterpret_cast<float4*>(row + i) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    *reinterpret_cast<float4*>(row + i + 4) = make_float4(x.v[4], x.v[5], x.v[6], x.v[7]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (i + j < D) row[i + j] = x.v[j];
}
CMT_FN void store(bf16* row, int i, int D, bool whole, const Vec& x) {
  if (whole) {
    if (i >= D) return;
    unsigned words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(x.v[2 * j], x.v[2 * j + 1]);
      words[j] = *reinterpret_cast<unsigned*>(&pair);
    }
    *reinterpret_cast<uint4*>(row + i) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kVector; ++j)
    if (i + j < D) from_float(row + i + j, x.v[j]);
}

// Sum over the warp, the same bits on every lane: a butterfly adds the same pairs on both sides.
CMT_FN float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}
CMT_FN float sum(const Vec& x) {
  return ((x.v[0] + x.v[1]) + (x.v[2] + x.v[3])) + ((x.v[4] + x.v[5]) + (x.v[6] + x.v[7]));
}

inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool aligned(const Rows& m) { return aligned(m.data) && m.stride % kVector == 0; }

inline void check_launch(const char* op) {
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

// out[group, i] = the sum over chunks of partials[group, chunk, i], chunk after chunk: no atomics, the same bits always.
template <class T>
static __global__ void sum_chunks(const float* partials, T* out, int64_t groups, int64_t chunks, int64_t stride,
                                  int64_t offset, int64_t D) {
  int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (at >= groups * D) return;
  const float* p = partials + at / D * chunks * stride + offset + at % D;
  float total = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += p[chunk * stride];
  from_float(out + at, total);
}
template <class T>
static void launch_sum_chunks(const float* partials, T* out, int64_t groups, int64_t chunks, int64_t stride,
                              int64_t offset, int64_t D, cudaStream_t stream) {
  int64_t n = groups * D;
  if (n) sum_chunks<T><<<(n + 127) / 128, 128, 0, stream>>>(partials, out, groups, chunks, stride, offset, D);
}

}  // namespace cmt

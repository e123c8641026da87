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

// Long sums of columns: a block has 32 columns and kSummers threads for each, whose sums are added one after the other. No
// atomics, the same bits always. One thread a column would wait for memory once for each of its numbers.
constexpr int kSummers = 16;
CMT_FN float added(float mine, float (&shared)[kSummers][32]) {  // the whole sum, on the threads of row 0; all threads call
  shared[threadIdx.y][threadIdx.x] = mine;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.y == 0)
    for (int i = 0; i < kSummers; ++i) total += shared[i][threadIdx.x];
  return total;
}

// out[group, i] = the sum over chunks of partials[group, chunk, i], for few chunks by one thread, for many by kSummers.
template <class T>
static __global__ void sum_chunks(const float* partials, T* out, int64_t groups, int64_t chunks, int64_t stride,
                                  int64_t offset, int64_t D) {
  __shared__ float shared[kSummers][32];
  int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  bool inside = at < groups * D;
  float total = 0.0f;
  if (inside) {
    const float* p = partials + at / D * chunks * stride + offset + at % D;
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += blockDim.y) total += p[chunk * stride];
  }
  if (blockDim.y > 1) total = added(total, shared);
  if (inside && threadIdx.y == 0) from_float(out + at, total);
}

// The same of two sums that lie side by side in a partial of 2 D, in one launch.
template <class T>
static __global__ void sum_chunk_pairs(const float* partials, T* first, T* second, int64_t groups, int64_t chunks,
                                       int64_t D) {
  int64_t at = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (at >= groups * 2 * D) return;
  int64_t group = at / (2 * D), column = at % (2 * D);
  const float* p = partials + group * chunks * 2 * D + column;
  float total = 0.0f;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += p[chunk * 2 * D];
  from_float((column < D ? first + column : second + column - D) + group * D, total);
}
template <class T>
static void launch_sum_chunk_pairs(const float* partials, T* first, T* second, int64_t groups, int64_t chunks,
                                   int64_t D, cudaStream_t stream) {
  int64_t n = groups * 2 * D;
  if (n) sum_chunk_pairs<T><<<(n + 127) / 128, 128, 0, stream>>>(partials, first, second, groups, chunks, D);
}
template <class T>
static void launch_sum_chunks(const float* partials, T* out, int64_t groups, int64_t chunks, int64_t stride,
                              int64_t offset, int64_t D, cudaStream_t stream) {
  int64_t n = groups * D;
  dim3 block = chunks > 2 * kSummers ? dim3(32, kSummers) : dim3(128, 1);
  if (n)
    sum_chunks<T><<<(n + block.x - 1) / block.x, block, 0, stream>>>(partials, out, groups, chunks, stride, offset, D);
}

}  // namespace cmt

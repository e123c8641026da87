// Kernels with the faults that the emulation is there to find, and one that is right. The argument picks what runs.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <string>

constexpr int kThreads = 64;

__global__ void mirror(float* out, bool barrier) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}
__global__ void unwritten(float* out) {
  extern __shared__ float shared[];
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void barrier_of_half(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 16);
}
__global__ void shuffle_of_half(float* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 16);
}
// Half of the lanes return right after a shuffle; the others still have to get its value. Then the block waits without them.
__global__ void early_leavers(float* out) {
  float got = __shfl_xor_sync(0xffffffffu, float(threadIdx.x), 16);
  out[threadIdx.x] = got;
  if (threadIdx.x % 2) return;
  __syncthreads();
  out[threadIdx.x] += 0.5f;
}
__global__ void misaligned(float* out, bool store) {
  float4* p = reinterpret_cast<float4*>(out + 1);
  if (store) {
    *p = make_float4(1, 2, 3, 4);
  } else {
    float4 x = *p;
    out[0] = x.x;
  }
}
__global__ void nothing() {}

static void show(const float* out, int n) {
  for (int i = 0; i < n; ++i) std::printf("%g ", out[i]);
}

static void launches() {
  struct {
    dim3 grid, block;
    size_t bytes;
  } all[] = {{1, 1, 0},          {0, 1, 0},           {dim3(1, 65535), 1, 0}, {dim3(1, 65536), 1, 0}, {1, 1024, 0},
             {1, 1025, 0},       {1, dim3(1, 1, 65), 0}, {1, 1, 48 * 1024},     {1, 1, 48 * 1024 + 4}};
  for (auto& l : all) {
    nothing<<<l.grid, l.block, l.bytes, nullptr>>>();
    std::printf("%d ", int(cudaGetLastError()));
  }
}

int main(int, char** arguments) {
  alignas(16) float memory[kThreads + 4] = {};
  float* out = memory;
  std::string what = arguments[1];
  if (what == "right") mirror<<<1, kThreads, 0, nullptr>>>(out, true);
  if (what == "race") mirror<<<1, kThreads, 0, nullptr>>>(out, false);
  if (what == "unwritten") unwritten<<<1, 4, 16, nullptr>>>(out);
  if (what == "barrier_of_half") barrier_of_half<<<1, 32, 0, nullptr>>>(out);
  if (what == "shuffle_of_half") shuffle_of_half<<<1, 32, 0, nullptr>>>(out);
  if (what == "early_leavers") early_leavers<<<1, 32, 0, nullptr>>>(out);
  if (what == "load") misaligned<<<1, 1, 0, nullptr>>>(out, false);
  if (what == "store") misaligned<<<1, 1, 0, nullptr>>>(out, true);
  if (what == "launches") return launches(), 0;
  if (what == "maths") {
    volatile float x = 88.8f, y = 0x1p127f, z = 0x1p126f, infinity = INFINITY;
    float found[] = {expf(x),  __fdividef(1.0f, y), __fdividef(1.0f, z) / 0x1p-126f, __fdividef(infinity, y), rsqrtf(x - x),
                     __fdividef(1.0f, -infinity)};
    return show(found, 6), 0;
  }
  show(out, kThreads);
}

// unit_weight on a GPU: a block owns a row. It is read twice, the second time from the cache, and turned channels-last by way of
// shared memory, a tile of whole parts at a time: memory sees neighbours side by side on both ways.
#include "row.cuh"

namespace cmt::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCells = 2304;  // numbers of a tile: 256 parts of a 3 x 3 kernel

CMT_FN float block_sum(float x, float (&shared)[kThreads / 32]) {  // on every thread; all of them call
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < kThreads / 32; ++warp) total += shared[warp];
  return total;
}

CMT_FN float mean_square(const float* w, int N, float size, float (&shared)[kThreads / 32]) {
  float total = 0.0f;
  for (int i = threadIdx.x; i < N; i += kThreads) total += (w[i] * size) * (w[i] * size);
  return block_sum(total, shared) / float(N);
}

// The tile of parts [first, first + count) in the order of the weight, from what lies channels-last or not.
template <class T>
CMT_FN void gather(const T* from, float* tile, int first, int count, int D, int S, bool last) {
  for (int i = threadIdx.x; i < count * S; i += kThreads)
    if (last) tile[i % count * S + i / count] = to_float(from[i / count * D + first + i % count]);
    else tile[i] = to_float(from[first * S + i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads) unit_kernel(UnitWeight a) {
  __shared__ float sums[kThreads / 32];
  __shared__ float tile[kCells];
  int D = a.D, S = a.S, N = D * S, parts = kCells / S;
  const float* w = a.weight + blockIdx.x * int64_t(N);
  T* y = static_cast<T*>(a.y) + blockIdx.x * int64_t(N);
  float square = mean_square(w, N, 1.0f, sums), size = 1.0f;
  if (!(square <= kLargest)) square = mean_square(w, N, kShrunk, sums), size = kShrunk;  // the same for the whole block
  Length l = length_of(square, size, a.eps);
  if (threadIdx.x == 0) a.stats[2 * blockIdx.x] = l.eighth_r, a.stats[2 * blockIdx.x + 1] = l.ratio;
  for (int first = 0; first < D; first += parts) {
    int count = D - first < parts ? D - first : parts;
    __syncthreads();
    gather(w, tile, first, count, D, S, false);
    __syncthreads();
    for (int i = threadIdx.x; i < count * S; i += kThreads) {
      float x = tile[a.last ? i % count * S + i / count : i];
      from_float(y + (a.last ? i / count * D + first + i % count : first * S + i), over_length(x, l) * a.gain);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) unit_backward_kernel(UnitWeightBackward a) {
  __shared__ float sums[kThreads / 32];
  __shared__ float tile[kCells];
  int D = a.D, S = a.S, N = D * S, parts = kCells / S;
  const float* w = a.weight + blockIdx.x * int64_t(N);
  const T* grad = static_cast<const T*>(a.grad) + blockIdx.x * int64_t(N);
  float* dw = a.dweight + blockIdx.x * int64_t(N);
  Length l{a.stats[2 * blockIdx.x], a.stats[2 * blockIdx.x + 1]};
  float mean = 0.0f;
  for (int turn = 0; turn < 2; ++turn) {  // the mean over the row first
    float total = 0.0f;
    for (int first = 0; first < D; first += parts) {
      int count = D - first < parts ? D - first : parts;
      __syncthreads();
      gather(grad, tile, first, count, D, S, a.last);
      __syncthreads();
      for (int i = threadIdx.x; i < count * S; i += kThreads) {
        float y = over_length(w[first * S + i], l), v = tile[i] * a.gain;
        if (turn) dw[first * S + i] = over_length_along(v, y, l, mean);
        else total += y * v;
      }
    }
    if (!turn) mean = block_sum(total, sums) / float(N);
  }
}

}  // namespace

void unit_weight(const UnitWeight& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.bf16) unit_kernel<bf16><<<dim3(a.E), kThreads, 0, stream>>>(a);
  else unit_kernel<float><<<dim3(a.E), kThreads, 0, stream>>>(a);
  check_launch("unit_weight");
}
void unit_weight_backward(const UnitWeightBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.bf16) unit_backward_kernel<bf16><<<dim3(a.E), kThreads, 0, stream>>>(a);
  else unit_backward_kernel<float><<<dim3(a.E), kThreads, 0, stream>>>(a);
  check_launch("unit_weight_backward");
}

}  // namespace cmt::cuda

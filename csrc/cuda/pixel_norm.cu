// pixel_norm on a GPU: 8 or 32 lanes own a row, however long; they read it twice, the second time from the cache.
#include "row.cuh"

namespace cmt::cuda {
namespace {

// Sum over kLanes neighbouring lanes, the same bits on each of them. Every lane of the warp calls.
template <int kLanes>
CMT_FN float lanes_sum(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

// The row of this group of lanes; the last ones of a grid have none and go along: they read and write nothing.
template <int kLanes>
struct Group {
  __device__ __forceinline__ explicit Group(int64_t rows)
      : row((blockIdx.x * int64_t(kWarps) + threadIdx.y) * (32 / kLanes) + threadIdx.x / kLanes),
        there(row < rows),
        first(int(threadIdx.x) % kLanes * kVector) {}
  int64_t row;
  bool there;
  int first;  // column of the first vector of this lane; the next ones are kLanes * kVector apart
};

template <int kLanes, class T>
CMT_FN float mean_square(const T* x, const Group<kLanes>& g, int D, bool whole, float size) {
  float total = 0.0f;
  for (int i = g.first; g.there && i < D; i += kLanes * kVector) {
    Vec v = load(x, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v.v[j] = (v.v[j] * size) * (v.v[j] * size);
    total += sum(v);
  }
  return lanes_sum<kLanes>(total) / float(D);
}

template <int kLanes, class T>
__global__ void __launch_bounds__(32 * kWarps) pixel_kernel(PixelNorm a, bool whole) {
  Group<kLanes> g(a.rows);
  int D = a.D;
  const T* x = static_cast<const T*>(a.x) + g.row * D;
  float square = mean_square<kLanes>(x, g, D, whole, 1.0f), size = 1.0f;
  float shrunk = mean_square<kLanes>(x, g, square <= kLargest ? 0 : D, whole, kShrunk);  // no columns but where it is needed
  if (!(square <= kLargest)) square = shrunk, size = kShrunk;
  Length l = length_of(square, size, a.eps);
  if (g.there && g.first == 0) a.stats[2 * g.row] = l.eighth_r, a.stats[2 * g.row + 1] = l.ratio;
  bool dual = g.there && g.row < a.rows_dot;
  const T* x_dot = static_cast<const T*>(a.x_dot) + g.row * D;
  float total = 0.0f;
  for (int i = g.first; g.there && i < D; i += kLanes * kVector) {
    Vec y = load(x, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) y.v[j] = over_length(y.v[j], l);
    store(static_cast<T*>(a.y) + g.row * D, i, D, whole, y);
    if (!dual) continue;
    Vec v = load(x_dot, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v.v[j] *= y.v[j];
    total += sum(v);
  }
  if (!a.rows_dot) return;
  float mean = lanes_sum<kLanes>(total) / float(D);
  for (int i = g.first; dual && i < D; i += kLanes * kVector) {
    Vec y = load(x, i, D, whole), v = load(x_dot, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v.v[j] = over_length_along(v.v[j], over_length(y.v[j], l), l, mean);
    store(static_cast<T*>(a.y_dot) + g.row * D, i, D, whole, v);
  }
}

template <int kLanes, class T>
__global__ void __launch_bounds__(32 * kWarps) pixel_backward_kernel(PixelNormBackward a, bool whole) {
  Group<kLanes> g(a.rows);
  int D = a.D;
  const T *grad = static_cast<const T*>(a.grad) + g.row * D, *y = static_cast<const T*>(a.y) + g.row * D;
  float total = 0.0f;
  for (int i = g.first; g.there && i < D; i += kLanes * kVector) {
    Vec v = load(grad, i, D, whole), w = load(y, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v.v[j] *= w.v[j];
    total += sum(v);
  }
  float mean = lanes_sum<kLanes>(total) / float(D);
  if (!g.there) return;
  Length l{a.stats[2 * g.row], a.stats[2 * g.row + 1]};
  for (int i = g.first; i < D; i += kLanes * kVector) {
    Vec v = load(grad, i, D, whole), w = load(y, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v.v[j] = over_length_along(v.v[j], w.v[j], l, mean);
    store(static_cast<T*>(a.dx) + g.row * D, i, D, whole, v);
  }
}

dim3 grid_of(int64_t rows, int lanes) {
  int64_t each = kWarps * (32 / lanes);
  return dim3((rows + each - 1) / each);
}

template <class T>
void forward(const PixelNorm& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.x_dot) && aligned(a.y) && aligned(a.y_dot);
  dim3 block(32, kWarps);
  if (a.D <= 8 * kVector) pixel_kernel<8, T><<<grid_of(a.rows, 8), block, 0, stream>>>(a, whole);
  else pixel_kernel<32, T><<<grid_of(a.rows, 32), block, 0, stream>>>(a, whole);
}
template <class T>
void backward(const PixelNormBackward& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.grad) && aligned(a.y) && aligned(a.dx);
  dim3 block(32, kWarps);
  if (a.D <= 8 * kVector) pixel_backward_kernel<8, T><<<grid_of(a.rows, 8), block, 0, stream>>>(a, whole);
  else pixel_backward_kernel<32, T><<<grid_of(a.rows, 32), block, 0, stream>>>(a, whole);
}

}  // namespace

void pixel_norm(const PixelNorm& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? forward<bf16>(a, stream) : forward<float>(a, stream);
  check_launch("pixel_norm");
}
void pixel_norm_backward(const PixelNormBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? backward<bf16>(a, stream) : backward<float>(a, stream);
  check_launch("pixel_norm_backward");
}

}  // namespace cmt::cuda

// mp_silu on a GPU. A block owns 256 columns of a run of rows of one image: the scale stays in registers, and so do the sums
// over T for its gradient.
#include "row.cuh"

namespace cmt::cuda {
namespace {

struct Tile {
  int column;           // of this lane's vector
  int64_t b, row, last;  // the image; rows of this warp: row, row + kWarps, ...
};
CMT_FN Tile tile_of(int64_t T, int64_t chunk_rows, int64_t chunks) {
  int64_t b = blockIdx.x / chunks, from = blockIdx.x % chunks * chunk_rows;
  int64_t to = from + chunk_rows < T ? from + chunk_rows : T;
  return {int(blockIdx.y) * kTile + int(threadIdx.x) * kVector, b, b * T + from + threadIdx.y, b * T + to};
}

template <class T>
CMT_FN Vec vector_of(const Rows& m, int64_t b, int i, int D, bool whole) {
  return m.data ? load(static_cast<const T*>(m.data) + b * m.stride, i, D, whole) : Vec{};
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) silu_kernel(MpSilu a, int64_t chunk_rows, int64_t chunks, bool whole) {
  Tile tile = tile_of(a.T, chunk_rows, chunks);
  int i = tile.column, D = a.D;
  if (i >= D) return;
  bool dual = tile.b < a.k;
  Vec m = vector_of<T>(a.scale, tile.b, i, D, whole), scale_dot{};
#pragma unroll
  for (int j = 0; j < kVector; ++j) m.v[j] = 1.0f + m.v[j];
  if (dual) scale_dot = vector_of<T>(a.scale_dot, tile.b, i, D, whole);
  for (int64_t row = tile.row; row < tile.last; row += kWarps) {
    Vec x = load(static_cast<const T*>(a.x) + row * D, i, D, whole), y;
#pragma unroll
    for (int j = 0; j < kVector; ++j) y.v[j] = silu_of(x.v[j] * m.v[j]);
    store(static_cast<T*>(a.y) + row * D, i, D, whole, y);
    if (!dual) continue;
    Vec along{};
    if (a.x_dot) along = load(static_cast<const T*>(a.x_dot) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float s_dot = along.v[j] * m.v[j];
      if (a.scale_dot.data) s_dot = mad(scale_dot.v[j], x.v[j], s_dot);
      along.v[j] = silu_slope(x.v[j] * m.v[j]) * s_dot;
    }
    store(static_cast<T*>(a.y_dot) + row * D, i, D, whole, along);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) silu_backward_kernel(MpSiluBackward a, bool whole) {
  __shared__ float shared[kWarps][kTile];
  Tile tile = tile_of(a.T, a.chunk_rows, a.chunks);
  int i = tile.column, D = a.D;
  Vec m = vector_of<T>(a.scale, tile.b, i, D, whole), dscale{};
#pragma unroll
  for (int j = 0; j < kVector; ++j) m.v[j] = 1.0f + m.v[j];
  for (int64_t row = tile.row; row < tile.last && i < D; row += kWarps) {
    Vec x = load(static_cast<const T*>(a.x) + row * D, i, D, whole);
    Vec ds = load(static_cast<const T*>(a.grad) + row * D, i, D, whole), through{};
    if (a.through) through = load(static_cast<const T*>(a.through) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      ds.v[j] *= silu_slope(x.v[j] * m.v[j]);
      dscale.v[j] += ds.v[j] * x.v[j];
      ds.v[j] = a.through ? mad(ds.v[j], m.v[j], through.v[j]) : ds.v[j] * m.v[j];
    }
    store(static_cast<T*>(a.dx) + row * D, i, D, whole, ds);
  }
  if (!a.scale.data) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j) shared[threadIdx.y][threadIdx.x * kVector + j] = dscale.v[j];
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < kTile; c += 32 * kWarps) {
    int column = blockIdx.y * kTile + c;
    if (column >= D) break;
    float all = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) all += shared[warp][c];
    a.partials[blockIdx.x * int64_t(D) + column] = all;
  }
}

template <class T>
void forward(const MpSilu& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.x_dot) && aligned(a.scale) && aligned(a.scale_dot) &&
               aligned(a.y) && aligned(a.y_dot);
  int64_t chunk_rows = 4 * kWarps, chunks = (a.T + chunk_rows - 1) / chunk_rows;
  dim3 grid(a.B * chunks, (a.D + kTile - 1) / kTile);
  silu_kernel<T><<<grid, dim3(32, kWarps), 0, stream>>>(a, chunk_rows, chunks, whole);
}
template <class T>
void backward(const MpSiluBackward& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.grad) && aligned(a.through) && aligned(a.scale) &&
               aligned(a.dx);
  dim3 grid(a.B * a.chunks, (a.D + kTile - 1) / kTile);
  if (grid.x) silu_backward_kernel<T><<<grid, dim3(32, kWarps), 0, stream>>>(a, whole);
  if (a.scale.data) launch_sum_chunks(a.partials, static_cast<T*>(a.dscale), a.B, a.chunks, a.D, 0, a.D, stream);
}

}  // namespace

void mp_silu(const MpSilu& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? forward<bf16>(a, stream) : forward<float>(a, stream);
  check_launch("mp_silu");
}
void mp_silu_backward(const MpSiluBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? backward<bf16>(a, stream) : backward<float>(a, stream);
  check_launch("mp_silu_backward");
}

}  // namespace cmt::cuda

// gelu on a GPU. A block owns 256 columns of a run of rows: the bias stays in registers, and so do the sums for it.
#include "row.cuh"

namespace cmt::cuda {
namespace {

struct Tile {
  int column;          // of this lane's vector
  int64_t row, last;   // of this warp: row, row + kWarps, ...
};
CMT_FN Tile tile_of(int64_t rows, int64_t chunk_rows) {
  int64_t from = blockIdx.x * chunk_rows;
  int64_t to = from + chunk_rows < rows ? from + chunk_rows : rows;
  return {int(blockIdx.y) * kTile + int(threadIdx.x) * kVector, from + threadIdx.y, to};
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) gelu_kernel(Gelu a, int64_t chunk_rows, bool whole) {
  Tile tile = tile_of(a.rows, chunk_rows);
  int i = tile.column, D = a.D;
  if (i >= D) return;
  Vec bias{};
  if (a.bias) bias = load(a.bias, i, D, false);
  for (int64_t row = tile.row; row < tile.last; row += kWarps) {
    Vec x = load(static_cast<const T*>(a.x) + row * D, i, D, whole), y;
#pragma unroll
    for (int j = 0; j < kVector; ++j) y.v[j] = gelu_of(x.v[j] += bias.v[j]);
    store(static_cast<T*>(a.y) + row * D, i, D, whole, y);
    if (row >= a.rows_dot) continue;
    Vec x_dot = load(static_cast<const T*>(a.x_dot) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) x_dot.v[j] *= gelu_slope(x.v[j]);
    store(static_cast<T*>(a.y_dot) + row * D, i, D, whole, x_dot);
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) gelu_backward_kernel(GeluBackward a, bool whole) {
  __shared__ float shared[kWarps][kTile];
  Tile tile = tile_of(a.rows, a.chunk_rows);
  int i = tile.column, D = a.D;
  Vec bias{}, total{};
  if (a.bias) bias = load(a.bias, i, D, false);
  for (int64_t row = tile.row; row < tile.last && i < D; row += kWarps) {
    Vec x = load(static_cast<const T*>(a.x) + row * D, i, D, whole);
    Vec grad = load(static_cast<const T*>(a.grad) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      grad.v[j] *= gelu_slope(x.v[j] + bias.v[j]);
      total.v[j] += grad.v[j];
    }
    store(static_cast<T*>(a.dx) + row * D, i, D, whole, grad);
  }
  if (!a.bias) return;
#pragma unroll
  for (int j = 0; j < kVector; ++j) shared[threadIdx.y][threadIdx.x * kVector + j] = total.v[j];
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
void forward(const Gelu& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.y) && aligned(a.x_dot) && aligned(a.y_dot);
  int64_t chunk_rows = 4 * kWarps;
  dim3 grid((a.rows + chunk_rows - 1) / chunk_rows, (a.D + kTile - 1) / kTile);
  gelu_kernel<T><<<grid, dim3(32, kWarps), 0, stream>>>(a, chunk_rows, whole);
}
template <class T>
void backward(const GeluBackward& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.grad) && aligned(a.dx);
  dim3 grid(a.chunks, (a.D + kTile - 1) / kTile);
  if (a.chunks) gelu_backward_kernel<T><<<grid, dim3(32, kWarps), 0, stream>>>(a, whole);
  if (a.bias) launch_sum_chunks(a.partials, a.dbias, 1, a.chunks, a.D, 0, a.D, stream);
}

}  // namespace

void gelu(const Gelu& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? forward<bf16>(a, stream) : forward<float>(a, stream);
  check_launch("gelu");
}
void gelu_backward(const GeluBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? backward<bf16>(a, stream) : backward<float>(a, stream);
  check_launch("gelu_backward");
}

}  // namespace cmt::cuda

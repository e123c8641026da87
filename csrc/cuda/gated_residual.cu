// gated_residual on a GPU. A block owns 256 columns of a run of rows of one image: gate and bias stay in registers, and so
// do the sums over T.
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

// S: the residual stream, T: all else.
template <class S, class T>
__global__ void __launch_bounds__(32 * kWarps) gated_kernel(GatedResidual a, int64_t chunk_rows, int64_t chunks,
                                                            bool whole) {
  Tile tile = tile_of(a.T, chunk_rows, chunks);
  int i = tile.column, D = a.D;
  if (i >= D) return;
  bool dual = tile.b < a.k;
  Vec gate = vector_of<T>(a.gate, tile.b, i, D, whole), gate_dot{}, bias{};
  if (dual) gate_dot = vector_of<T>(a.gate_dot, tile.b, i, D, whole);
  if (a.bias) bias = load(a.bias, i, D, false);
  for (int64_t row = tile.row; row < tile.last; row += kWarps) {
    Vec x = load(static_cast<const S*>(a.x) + row * D, i, D, whole);
    Vec branch = load(static_cast<const T*>(a.branch) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      branch.v[j] += bias.v[j];
      x.v[j] = mad(gate.v[j], branch.v[j], x.v[j]);
    }
    store(static_cast<S*>(a.y) + row * D, i, D, whole, x);
    if (!dual) continue;
    Vec along{}, branch_dot{};
    if (a.x_dot) along = load(static_cast<const S*>(a.x_dot) + row * D, i, D, whole);
    if (a.branch_dot) branch_dot = load(static_cast<const T*>(a.branch_dot) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      along.v[j] = mad(gate_dot.v[j], branch.v[j], mad(gate.v[j], branch_dot.v[j], along.v[j]));
    store(static_cast<S*>(a.y_dot) + row * D, i, D, whole, along);
  }
}

// The block's sums of one kind, warp after warp, into its row of the partials.
CMT_FN void write_sums(const Vec& sums, float (&shared)[kWarps][kTile], float* out, int D) {
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kVector; ++j) shared[threadIdx.y][threadIdx.x * kVector + j] = sums.v[j];
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < kTile; c += 32 * kWarps) {
    int column = blockIdx.y * kTile + c;
    if (column >= D) break;
    float all = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) all += shared[warp][c];
    out[column] = all;
  }
}

template <class S, class T>
__global__ void __launch_bounds__(32 * kWarps) gated_backward_kernel(GatedResidualBackward a, bool whole) {
  __shared__ float shared[kWarps][kTile];
  Tile tile = tile_of(a.T, a.chunk_rows, a.chunks);
  int i = tile.column, D = a.D;
  Vec gate = vector_of<T>(a.gate, tile.b, i, D, whole), bias{}, dgate{}, total{};
  if (a.bias) bias = load(a.bias, i, D, false);
  for (int64_t row = tile.row; row < tile.last; row += kWarps) {
    Vec grad = load(static_cast<const S*>(a.grad) + row * D, i, D, whole);
    Vec branch = load(static_cast<const T*>(a.branch) + row * D, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      dgate.v[j] += grad.v[j] * (branch.v[j] + bias.v[j]);
      total.v[j] += grad.v[j];
      grad.v[j] *= gate.v[j];
    }
    store(static_cast<T*>(a.dbranch) + row * D, i, D, whole, grad);
  }
  write_sums(dgate, shared, a.partials + blockIdx.x * int64_t(2) * D, D);
  write_sums(total, shared, a.partials + (blockIdx.x * int64_t(2) + 1) * D, D);
}

// dgate[b] = the sum over chunks of the first partials, and dbias = the sum over images of gate[b] times the second's.
template <class T>
__global__ void bias_kernel(GatedResidualBackward a) {
  __shared__ float shared[kSummers][32];
  int64_t i = blockIdx.x * int64_t(32) + threadIdx.x;
  float dbias = 0.0f;
  for (int64_t b = threadIdx.y; b < a.B && i < a.D; b += kSummers) {
    const float* p = a.partials + (b * a.chunks * 2 + 1) * a.D + i;
    float total = 0.0f;
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += p[chunk * 2 * a.D];
    dbias = mad(to_float(static_cast<const T*>(a.gate.data)[b * a.gate.stride + i]), total, dbias);
  }
  dbias = added(dbias, shared);
  if (i < a.D && threadIdx.y == 0) a.dbias[i] = dbias;
}

template <class S, class T>
void forward(const GatedResidual& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.branch) && aligned(a.x_dot) && aligned(a.branch_dot) &&
               aligned(a.gate) && aligned(a.gate_dot) && aligned(a.y) && aligned(a.y_dot);
  int64_t chunk_rows = 4 * kWarps, chunks = (a.T + chunk_rows - 1) / chunk_rows;
  dim3 grid(a.B * chunks, (a.D + kTile - 1) / kTile);
  gated_kernel<S, T><<<grid, dim3(32, kWarps), 0, stream>>>(a, chunk_rows, chunks, whole);
}
template <class S, class T>
void backward(const GatedResidualBackward& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.grad) && aligned(a.branch) && aligned(a.gate) && aligned(a.dbranch);
  dim3 grid(a.B * a.chunks, (a.D + kTile - 1) / kTile);
  if (grid.x) gated_backward_kernel<S, T><<<grid, dim3(32, kWarps), 0, stream>>>(a, whole);
  launch_sum_chunks(a.partials, static_cast<T*>(a.dgate), a.B, a.chunks, 2 * a.D, 0, a.D, stream);
  if (a.bias) bias_kernel<T><<<(a.D + 31) / 32, dim3(32, kSummers), 0, stream>>>(a);
}

}  // namespace

void gated_residual(const GatedResidual& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.stream_bf16) forward<bf16, bf16>(a, stream);
  else a.bf16 ? forward<float, bf16>(a, stream) : forward<float, float>(a, stream);
  check_launch("gated_residual");
}
void gated_residual_backward(const GatedResidualBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  if (a.stream_bf16) backward<bf16, bf16>(a, stream);
  else a.bf16 ? backward<float, bf16>(a, stream) : backward<float, float>(a, stream);
  check_launch("gated_residual_backward");
}

}  // namespace cmt::cuda

// mp_cat on a GPU. A block owns 256 columns of one of the two parts in a run of rows.
#include "row.cuh"

namespace cmt::cuda {
namespace {

constexpr int kRun = 4 * kWarps;  // rows of a block

struct Part {  // the columns of one part: those of a wide row from `offset` on
  const void* from;  // null: zeros
  void* to;
  int64_t stride_from, stride_to;
  int D, i;
  float weight;
};

template <class T>
CMT_FN void copy_scaled(const Part& p, int64_t rows, bool whole) {
  if (p.i >= p.D) return;
  int64_t first = blockIdx.x * int64_t(kRun), last = first + kRun < rows ? first + kRun : rows;
  for (int64_t row = first + threadIdx.y; row < last; row += kWarps) {
    Vec x{};
    if (p.from) x = load(static_cast<const T*>(p.from) + row * p.stride_from, p.i, p.D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) x.v[j] *= p.weight;
    store(static_cast<T*>(p.to) + row * p.stride_to, p.i, p.D, whole, x);
  }
}

CMT_FN int tiles_of(int64_t D) { return int((D + kTile - 1) / kTile); }

template <class T>
__global__ void __launch_bounds__(32 * kWarps) cat_kernel(MpCat a, bool tangents, bool whole) {
  int64_t D = a.Da + a.Db;
  bool second = int(blockIdx.y) >= tiles_of(a.Da);
  int tile = int(blockIdx.y) - (second ? tiles_of(a.Da) : 0), i = tile * kTile + int(threadIdx.x) * kVector;
  const void* from = second ? (tangents ? a.b_dot : a.b) : (tangents ? a.a_dot : a.a);
  T* to = static_cast<T*>(tangents ? a.y_dot : a.y) + (second ? a.Da : 0);
  copy_scaled<T>({from, to, second ? a.Db : a.Da, D, int(second ? a.Db : a.Da), i, second ? a.weight_b : a.weight_a},
                 tangents ? a.rows_dot : a.rows, whole);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) cat_backward_kernel(MpCatBackward a, bool whole) {
  int64_t D = a.Da + a.Db;
  bool second = int(blockIdx.y) >= tiles_of(a.Da);
  int tile = int(blockIdx.y) - (second ? tiles_of(a.Da) : 0), i = tile * kTile + int(threadIdx.x) * kVector;
  const T* from = static_cast<const T*>(a.grad) + (second ? a.Da : 0);
  copy_scaled<T>({from, second ? a.db : a.da, D, second ? a.Db : a.Da, int(second ? a.Db : a.Da), i,
                  second ? a.weight_b : a.weight_a},
                 a.rows, whole);
}

dim3 grid_of(int64_t rows, int64_t Da, int64_t Db) {
  return dim3((rows + kRun - 1) / kRun, (Da + kTile - 1) / kTile + (Db + kTile - 1) / kTile);
}

template <class T>
void forward(const MpCat& a, cudaStream_t stream) {
  bool whole = a.Da % kVector == 0 && a.Db % kVector == 0;
  bool one = whole && aligned(a.a) && aligned(a.b) && aligned(a.y);
  cat_kernel<T><<<grid_of(a.rows, a.Da, a.Db), dim3(32, kWarps), 0, stream>>>(a, false, one);
  if (!a.rows_dot) return;
  one = whole && aligned(a.a_dot) && aligned(a.b_dot) && aligned(a.y_dot);
  cat_kernel<T><<<grid_of(a.rows_dot, a.Da, a.Db), dim3(32, kWarps), 0, stream>>>(a, true, one);
}
template <class T>
void backward(const MpCatBackward& a, cudaStream_t stream) {
  bool whole = a.Da % kVector == 0 && a.Db % kVector == 0 && aligned(a.grad) && aligned(a.da) && aligned(a.db);
  cat_backward_kernel<T><<<grid_of(a.rows, a.Da, a.Db), dim3(32, kWarps), 0, stream>>>(a, whole);
}

}  // namespace

void mp_cat(const MpCat& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? forward<bf16>(a, stream) : forward<float>(a, stream);
  check_launch("mp_cat");
}
void mp_cat_backward(const MpCatBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? backward<bf16>(a, stream) : backward<float>(a, stream);
  check_launch("mp_cat_backward");
}

}  // namespace cmt::cuda

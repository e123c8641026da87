// mp_sum on a GPU: numbers in any order, eight to a thread.
#include "row.cuh"

namespace cmt::cuda {
namespace {

constexpr int kPiece = kWarps * kTile;  // numbers of a block

CMT_FN int left(int64_t n, int64_t from) {  // of a block's numbers, those before n
  return n <= from ? 0 : n - from < kPiece ? int(n - from) : kPiece;
}

template <class T>
CMT_FN Vec weighted(const void* a, const void* b, int64_t from, int i, int D, bool whole, float weight_a,
                    float weight_b) {
  Vec x{}, y{};
  if (a) x = load(static_cast<const T*>(a) + from, i, D, whole);
  if (b) y = load(static_cast<const T*>(b) + from, i, D, whole);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float right = y.v[j] * weight_b;
    x.v[j] = a ? mad(weight_a, x.v[j], right) : right;
  }
  return x;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) sum_kernel(MpSum a, bool aligned) {
  int64_t from = blockIdx.x * int64_t(kPiece);
  int i = (threadIdx.y * 32 + threadIdx.x) * kVector, D = left(a.n, from), D_dot = left(a.n_dot, from);
  if (i >= D) return;
  bool whole = aligned && D % kVector == 0;
  Vec sum = weighted<T>(a.a, a.b, from, i, D, whole, a.weight_a, a.weight_b), y;
#pragma unroll
  for (int j = 0; j < kVector; ++j) y.v[j] = clipped(sum.v[j], a.limit);
  store(static_cast<T*>(a.y) + from, i, D, whole, y);
  if (i >= D_dot) return;
  whole = aligned && D_dot % kVector == 0;
  Vec along = weighted<T>(a.a_dot, a.b_dot, from, i, D_dot, whole, a.weight_a, a.weight_b);
#pragma unroll
  for (int j = 0; j < kVector; ++j) along.v[j] = where_within(sum.v[j], a.limit, along.v[j]);
  store(static_cast<T*>(a.y_dot) + from, i, D_dot, whole, along);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) sum_backward_kernel(MpSumBackward a, bool aligned) {
  int64_t from = blockIdx.x * int64_t(kPiece);
  int i = (threadIdx.y * 32 + threadIdx.x) * kVector, D = left(a.n, from);
  if (i >= D) return;
  bool whole = aligned && D % kVector == 0;
  Vec g = load(static_cast<const T*>(a.grad) + from, i, D, whole), y{}, da, db;
  if (a.y) y = load(static_cast<const T*>(a.y) + from, i, D, whole);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    float v = a.y ? where_inside(y.v[j], a.limit, g.v[j]) : g.v[j];
    da.v[j] = v * a.weight_a;
    db.v[j] = v * a.weight_b;
  }
  store(static_cast<T*>(a.da) + from, i, D, whole, da);
  store(static_cast<T*>(a.db) + from, i, D, whole, db);
}

dim3 blocks(int64_t n) { return dim3((n + kPiece - 1) / kPiece); }

template <class T>
void forward(const MpSum& a, cudaStream_t stream) {
  bool whole = aligned(a.a) && aligned(a.b) && aligned(a.a_dot) && aligned(a.b_dot) && aligned(a.y) && aligned(a.y_dot);
  sum_kernel<T><<<blocks(a.n), dim3(32, kWarps), 0, stream>>>(a, whole);
}
template <class T>
void backward(const MpSumBackward& a, cudaStream_t stream) {
  bool whole = aligned(a.grad) && aligned(a.y) && aligned(a.da) && aligned(a.db);
  sum_backward_kernel<T><<<blocks(a.n), dim3(32, kWarps), 0, stream>>>(a, whole);
}

}  // namespace

void mp_sum(const MpSum& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? forward<bf16>(a, stream) : forward<float>(a, stream);
  check_launch("mp_sum");
}
void mp_sum_backward(const MpSumBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  a.bf16 ? backward<bf16>(a, stream) : backward<float>(a, stream);
  check_launch("mp_sum_backward");
}

}  // namespace cmt::cuda

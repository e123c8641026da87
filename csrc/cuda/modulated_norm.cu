// modulated_norm on a GPU: a warp owns a row and keeps it in registers, N vectors of eight columns a lane (D <= 256 N).
// In the backward a block owns a run of rows of one image, so the sums over T stay in registers until its end.
#include "row.cuh"

namespace cmt::cuda {
namespace {

template <class T>
CMT_FN const T* row_of(const Rows& m, int64_t b) {
  return m.data ? static_cast<const T*>(m.data) + b * m.stride : nullptr;
}

// No xh of a row is larger than sqrt(D), D <= 1280. Beyond the row, where w is 0, it may be infinite: of numbers of 1e37 that
// are all but equal.
constexpr float kMost = 64.0f;

// S: the residual stream, T: all else.
template <class S, class T, int N>
CMT_FN void tangent_row(const ModulatedNorm& a, int64_t row, const Vec (&xh)[N], float r, bool whole) {  // r: of x itself
  int64_t b = row / a.T;
  int D = a.D;
  const S* x_dot = a.x_dot ? static_cast<const S*>(a.x_dot) + row * D : nullptr;
  const T *scale = row_of<T>(a.scale, b), *scale_dot = row_of<T>(a.scale_dot, b), *shift_dot = row_of<T>(a.shift_dot, b);
  Vec v[N] = {};
  float m1 = 0.0f, m2 = 0.0f;
  if (x_dot) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      v[n] = load(x_dot, (n * 32 + threadIdx.x) * kVector, D, whole);
      m1 += sum(v[n]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) m2 += xh[n].v[j] * v[n].v[j];
    }
    m1 = warp_sum(m1) / D;
    m2 = warp_sum(m2) / D;
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    int i = (n * 32 + threadIdx.x) * kVector;
    Vec along{}, m{};
    if (shift_dot) along = load(shift_dot, i, D, whole);
    if (scale_dot) m = load(scale_dot, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) along.v[j] = mad(xh[n].v[j], m.v[j], along.v[j]);
    if (x_dot) {
      m = load(scale, i, D, whole);
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        along.v[j] = mad(normalise_along(v[n].v[j], xh[n].v[j], r, m1, m2), 1.0f + m.v[j], along.v[j]);
    }
    store(static_cast<T*>(a.y_dot) + row * D, i, D, whole, along);
  }
}

// Of a row in registers, beyond D filled with its first number, `origin`, about which the mean is taken: of a row of equal
// numbers it is that number, and the variance 0.
template <int N>
CMT_FN void moments_of(const Vec (&x)[N], float origin, int D, float& mean, float& squares) {
  float total = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < kVector; ++j) total += x[n].v[j] - origin;
  mean = origin + warp_sum(total) / D;
  squares = 0.0f;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      float centred = (n * 32 + int(threadIdx.x)) * kVector + j < D ? x[n].v[j] - mean : 0.0f;
      squares += centred * centred;
    }
  squares = warp_sum(squares);
}

// The blocks a multiprocessor must hold leave 128 registers a thread, 168 for the widest rows and for those of 1024 where
// 128 are a few too few: none spills.
constexpr int held(int n, bool wide) { return n < (wide ? 4 : 5) ? 4 : 3; }
template <class S, class T>
constexpr bool kStream = sizeof(S) != sizeof(T);

// Rows [first, last): with tangents or without, two instances, so that plain rows do not pay registers for tangents.
template <class S, class T, int N, bool kDual>
__global__ void __launch_bounds__(32 * kWarps, held(N, kDual && kStream<S, T>)) norm_kernel(ModulatedNorm a, int64_t first, int64_t last, bool whole) {
  int64_t row = first + blockIdx.x * int64_t(kWarps) + threadIdx.y;
  if (row >= last) return;
  int64_t b = row / a.T;
  int D = a.D;
  const S* x = static_cast<const S*>(a.x) + row * D;
  const T *shift = row_of<T>(a.shift, b), *scale = row_of<T>(a.scale, b);
  Vec xh[N];
  float origin = to_float(x[0]), size = 1.0f;
#pragma unroll
  for (int n = 0; n < N; ++n) xh[n] = load(x, (n * 32 + threadIdx.x) * kVector, D, whole, origin);
  float mean, r, squares;
#pragma unroll 1
  while (true) {
    moments_of(xh, origin, D, mean, squares);
    r = rsqrt_of(squares / D + a.eps * size * size);
    if (squares <= kLargest || size != 1.0f) break;  // the same on every lane
    size = kShrunk, origin *= size;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int j = 0; j < kVector; ++j) xh[n].v[j] *= size;
  }
  Kept k = kept(size, mean, r);
  if (threadIdx.x == 0) a.stats[2 * row] = k.half_mean, a.stats[2 * row + 1] = k.twice_r;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    int i = (n * 32 + threadIdx.x) * kVector;
    Vec s = load(scale, i, D, whole), h = load(shift, i, D, whole);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      xh[n].v[j] = normalised(xh[n].v[j], 1.0f, mean, r);
      h.v[j] = modulated(xh[n].v[j], s.v[j], h.v[j]);
    }
    store(static_cast<T*>(a.y) + row * D, i, D, whole, h);
  }
  if constexpr (kDual) tangent_row<S, T, N>(a, row, xh, 0.5f * k.twice_r, whole);
}

// The block's sums of one kind, warp after warp, into its row of the partials.
template <int N>
CMT_FN void write_sums(const Vec (&sums)[N], float* shared, float* out, int D) {
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      shared[threadIdx.y * N * kTile + (n * 32 + threadIdx.x) * kVector + j] = sums[n].v[j];
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < D; c += 32 * kWarps) {
    float all = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) all += shared[warp * N * kTile + c];
    out[c] = all;
  }
}

template <class S, class T, int N>
__global__ void __launch_bounds__(32 * kWarps, held(N, sizeof(T) == 4)) norm_backward_kernel(ModulatedNormBackward a, bool whole) {
  extern __shared__ float shared[];  // (kWarps, 256 N)
  int64_t b = blockIdx.x / a.chunks, from = blockIdx.x % a.chunks * a.chunk_rows;
  int64_t to = from + a.chunk_rows < a.T ? from + a.chunk_rows : a.T;
  int D = a.D;
  const T* scale = row_of<T>(a.scale, b);
  Vec dshift[N] = {}, dscale[N] = {};
  for (int64_t t = from + threadIdx.y; t < to; t += kWarps) {
    int64_t row = b * a.T + t;
    const S* x = static_cast<const S*>(a.x) + row * D;
    const T* grad = static_cast<const T*>(a.grad) + row * D;
    Kept k{a.stats[2 * row], a.stats[2 * row + 1]};
    float m1 = 0.0f, m2 = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      int i = (n * 32 + threadIdx.x) * kVector;
      Vec v = load(x, i, D, whole), g = load(grad, i, D, whole), s = load(scale, i, D, whole);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float xh = normalised_again(v.v[j], k), w = g.v[j] * (1.0f + s.v[j]);
        m1 += w;
        m2 += w * within(xh, kMost);
        dshift[n].v[j] += g.v[j];
        dscale[n].v[j] += g.v[j] * xh;
      }
    }
    m1 = warp_sum(m1) / D;
    m2 = warp_sum(m2) / D;
#pragma unroll
    for (int n = 0; n < N; ++n) {  // the row again, out of the cache: registers are for the sums
      int i = (n * 32 + threadIdx.x) * kVector;
      Vec v = load(x, i, D, whole), g = load(grad, i, D, whole), s = load(scale, i, D, whole);
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        v.v[j] = 0.5f * normalise_along(g.v[j] * (1.0f + s.v[j]), normalised_again(v.v[j], k), k.twice_r, m1, m2);
      if (a.through) {
        g = load(static_cast<const S*>(a.through) + row * D, i, D, whole);
#pragma unroll
        for (int j = 0; j < kVector; ++j) v.v[j] = g.v[j] + v.v[j];
      }
      store(static_cast<S*>(a.dx) + row * D, i, D, whole, v);
    }
  }
  write_sums<N>(dshift, shared, a.partials + blockIdx.x * int64_t(2) * D, D);
  write_sums<N>(dscale, shared, a.partials + (blockIdx.x * int64_t(2) + 1) * D, D);
}

template <class S, class T, int N>
void forward(const ModulatedNorm& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.x_dot) && aligned(a.y) && aligned(a.y_dot) &&
               aligned(a.shift) && aligned(a.scale) && aligned(a.shift_dot) && aligned(a.scale_dot);
  int64_t dual = a.k * a.T, all = a.B * a.T;
  dim3 block(32, kWarps);
  if (dual) norm_kernel<S, T, N, true><<<(dual + kWarps - 1) / kWarps, block, 0, stream>>>(a, 0, dual, whole);
  if (all > dual)
    norm_kernel<S, T, N, false><<<(all - dual + kWarps - 1) / kWarps, block, 0, stream>>>(a, dual, all, whole);
}

template <class S, class T, int N>
void backward(const ModulatedNormBackward& a, cudaStream_t stream) {
  bool whole = a.D % kVector == 0 && aligned(a.x) && aligned(a.grad) && aligned(a.through) && aligned(a.dx) &&
               aligned(a.scale);
  if (a.chunks)
    norm_backward_kernel<S, T, N><<<a.B * a.chunks, dim3(32, kWarps), kWarps * N * kTile * sizeof(float), stream>>>(a, whole);
  launch_sum_chunk_pairs(a.partials, static_cast<T*>(a.dshift), static_cast<T*>(a.dscale), a.B, a.chunks, a.D, stream);
}

// f<N>() for the fewest vectors that hold a row: widths 384, 768, 1024, 1152 are 2, 3, 4, 5.
template <class F>
void by_width(int64_t D, F f) {
  int64_t n = (D + kTile - 1) / kTile;
  if (n <= 2) return f.template operator()<2>();
  if (n <= 3) return f.template operator()<3>();
  if (n <= 4) return f.template operator()<4>();
  if (n <= 5) return f.template operator()<5>();
  throw std::runtime_error("modulated_norm: the CUDA kernels take rows of at most 1280 numbers");
}

}  // namespace

void modulated_norm(const ModulatedNorm& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  by_width(a.D, [&]<int N>() {
    if (a.stream_bf16) return forward<bf16, bf16, N>(a, stream);
    a.bf16 ? forward<float, bf16, N>(a, stream) : forward<float, float, N>(a, stream);
  });
  check_launch("modulated_norm");
}
void modulated_norm_backward(const ModulatedNormBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  by_width(a.D, [&]<int N>() {
    if (a.stream_bf16) return backward<bf16, bf16, N>(a, stream);
    a.bf16 ? backward<float, bf16, N>(a, stream) : backward<float, float, N>(a, stream);
  });
  check_launch("modulated_norm_backward");
}

}  // namespace cmt::cuda

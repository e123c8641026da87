// qk_norm on a GPU: 16 lanes own a head. A lane holds the pairs (i, i + d/2), i = lane, lane + 16, ..., which is what RoPE
// turns; P pairs a lane (d <= 32 P). An odd d has one more column than pairs: the last lane's pair has no second half.
#include "row.cuh"

namespace cmt::cuda {
namespace {

constexpr int kLanes = 16;
constexpr int kGroups = 32 * kWarps / kLanes;  // heads of a block at a time

CMT_FN float group_sum(float x) {
#pragma unroll
  for (int lane = kLanes / 2; lane; lane >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

template <int P>
struct Head {
  float a[P], b[P];
};

struct Shape {
  int d, half;  // half: pairs, (d + 1) / 2
};

template <int P, class F>
CMT_FN void each(Shape s, F f) {  // f(p, i, has_b)
#pragma unroll
  for (int p = 0; p < P; ++p) {
    int i = threadIdx.x + p * kLanes;
    if (i < s.half) f(p, i, s.half + i < s.d);
  }
}

template <int P, class T>
CMT_FN Head<P> load_head(const T* x, Shape s) {
  Head<P> h{};
  each<P>(s, [&](int p, int i, bool has_b) {
    h.a[p] = to_float(x[i]);
    h.b[p] = has_b ? to_float(x[s.half + i]) : 0.0f;
  });
  return h;
}
template <int P, class T>
CMT_FN void store_head(T* x, const Head<P>& h, Shape s) {
  each<P>(s, [&](int p, int i, bool has_b) {
    from_float(x + i, h.a[p]);
    if (has_b) from_float(x + s.half + i, h.b[p]);
  });
}
template <int P>
CMT_FN float dot(const Head<P>& x, const Head<P>& y) {
  float total = 0.0f;
#pragma unroll
  for (int p = 0; p < P; ++p) total += x.a[p] * y.a[p] + x.b[p] * y.b[p];
  return group_sum(total);
}
// x <- x / rms; 1/rms of x. Of a head whose squares overflow, x is taken smaller first. Both heads of a warp go through the
// shuffles when one of them has to.
template <int P>
CMT_FN float normalise(Head<P>& x, float d, float eps) {
  float squares = dot(x, x), size = 1.0f;
  float others = __shfl_xor_sync(0xffffffffu, squares, kLanes);
  if (!(squares <= kLargest && others <= kLargest)) {
    if (!(squares <= kLargest)) size = kShrunk;
#pragma unroll
    for (int p = 0; p < P; ++p) x.a[p] *= size, x.b[p] *= size;
    squares = dot(x, x);
  }
  float r = rsqrt_of(squares / d + eps * size * size);
#pragma unroll
  for (int p = 0; p < P; ++p) x.a[p] *= r, x.b[p] *= r;
  return r * size;
}
template <int P>
CMT_FN void turn(Head<P>& h, const float* cos, const float* sin, float direction, Shape s) {
  if (cos) each<P>(s, [&](int p, int i, bool) { rotate(h.a[p], h.b[p], cos[i], direction * sin[i]); });
}

// One group of lanes a head of (B, T, 3, H); heads of the values are copied.
template <class T, int P>
__global__ void __launch_bounds__(32 * kWarps) qk_kernel(QkNorm a, int64_t heads) {
  int64_t head = blockIdx.x * int64_t(kGroups) + threadIdx.y;
  bool live = head < heads;  // every lane stays for the shuffles
  if (!live) head = heads - 1;
  int64_t row = head / (3 * a.H), t = row % a.T, at = head * a.d;
  int which = int(head / a.H % 3);
  bool dual = row / a.T < a.k;
  Shape s{int(a.d), int(a.d + 1) / 2};
  const float* w = which == 0 ? a.q_weight : which == 1 ? a.k_weight : nullptr;
  const float* cos = a.cos && which < 2 ? a.cos + t * (a.d / 2) : nullptr;
  const float* sin = cos ? a.sin + t * (a.d / 2) : nullptr;
  Head<P> x = load_head<P>(static_cast<const T*>(a.qkv) + at, s), weight{}, x_dot{};
  if (w) weight = load_head<P>(w, s);
  if (dual) x_dot = load_head<P>(static_cast<const T*>(a.qkv_dot) + at, s);
  Head<P> y = x;
  float r = normalise(x, a.d, a.eps);  // of every head: the lanes of a warp stay together
  if (w) {
#pragma unroll
    for (int p = 0; p < P; ++p) y.a[p] = x.a[p] * weight.a[p], y.b[p] = x.b[p] * weight.b[p];
  }
  turn(y, cos, sin, 1.0f, s);
  if (live) store_head(static_cast<T*>(a.y) + at, y, s);
  float m = dot(x, x_dot) / a.d;
  if (!dual || !live) return;
  if (w) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      x_dot.a[p] = weight.a[p] * rms_along(x_dot.a[p], x.a[p], r, m);
      x_dot.b[p] = weight.b[p] * rms_along(x_dot.b[p], x.b[p], r, m);
    }
  }
  turn(x_dot, cos, sin, 1.0f, s);
  store_head(static_cast<T*>(a.y_dot) + at, x_dot, s);
}

// A block owns the queries or the keys (blockIdx.y) of a run of rows, or copies the gradient of their values; the sum for
// the weight stays in registers until its end.
template <class T, int P>
__global__ void __launch_bounds__(32 * kWarps) qk_backward_kernel(QkNormBackward a) {
  __shared__ float shared[kGroups][2 * P * kLanes];
  int64_t from = blockIdx.x * a.chunk_rows, rows = a.B * a.T;
  int64_t to = from + a.chunk_rows < rows ? from + a.chunk_rows : rows, heads = (to - from) * a.H;
  int which = blockIdx.y;
  Shape s{int(a.d), int(a.d + 1) / 2};
  const float* w = which == 0 ? a.q_weight : which == 1 ? a.k_weight : nullptr;
  Head<P> weight{}, dw{};
  if (w) weight = load_head<P>(w, s);
  for (int64_t start = 0; start < heads; start += kGroups) {
    bool live = start + threadIdx.y < heads;
    int64_t head = live ? start + threadIdx.y : heads - 1, row = from + head / a.H, t = row % a.T;
    int64_t at = ((row * 3 + which) * a.H + head % a.H) * a.d;
    const float* cos = a.cos && which < 2 ? a.cos + t * (a.d / 2) : nullptr;
    const float* sin = cos ? a.sin + t * (a.d / 2) : nullptr;
    Head<P> g = load_head<P>(static_cast<const T*>(a.grad) + at, s);
    turn(g, cos, sin, -1.0f, s);
    if (w) {
      Head<P> x = load_head<P>(static_cast<const T*>(a.qkv) + at, s);
      float r = normalise(x, a.d, a.eps);
#pragma unroll
      for (int p = 0; p < P; ++p) {
        if (live) dw.a[p] += g.a[p] * x.a[p], dw.b[p] += g.b[p] * x.b[p];
        g.a[p] *= weight.a[p], g.b[p] *= weight.b[p];
      }
      float m = dot(g, x) / a.d;
#pragma unroll
      for (int p = 0; p < P; ++p) {
        g.a[p] = rms_along(g.a[p], x.a[p], r, m);
        g.b[p] = rms_along(g.b[p], x.b[p], r, m);
      }
    }
    if (live) store_head(static_cast<T*>(a.dqkv) + at, g, s);
  }
  if (!w) return;
  each<P>(s, [&](int p, int i, bool has_b) {
    shared[threadIdx.y][i] = dw.a[p];
    if (has_b) shared[threadIdx.y][s.half + i] = dw.b[p];
  });
  __syncthreads();
  for (int c = threadIdx.y * kLanes + threadIdx.x; c < s.d; c += 32 * kWarps) {
    float all = 0.0f;
    for (int group = 0; group < kGroups; ++group) all += shared[group][c];
    a.partials[(blockIdx.x * int64_t(3) + which) * a.d + c] = all;
  }
}

template <class F>
void by_head_dim(int64_t d, F f) {
  if (d <= 64) return f.template operator()<2>();
  if (d <= 96) return f.template operator()<3>();
  if (d <= 128) return f.template operator()<4>();
  if (d <= 256) return f.template operator()<8>();
  throw std::runtime_error("qk_norm: the CUDA kernels take head dims up to 256");
}

}  // namespace

void qk_norm(const QkNorm& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  int64_t heads = a.B * a.T * 3 * a.H;
  dim3 grid((heads + kGroups - 1) / kGroups), block(kLanes, kGroups);
  by_head_dim(a.d, [&]<int P>() {
    a.bf16 ? qk_kernel<bf16, P><<<grid, block, 0, stream>>>(a, heads)
           : qk_kernel<float, P><<<grid, block, 0, stream>>>(a, heads);
  });
  check_launch("qk_norm");
}
void qk_norm_backward(const QkNormBackward& a, const Context& context) {
  auto stream = static_cast<cudaStream_t>(context.stream);
  dim3 grid(a.chunks, 3), block(kLanes, kGroups);
  if (a.chunks && a.H)
    by_head_dim(a.d, [&]<int P>() {
      a.bf16 ? qk_backward_kernel<bf16, P><<<grid, block, 0, stream>>>(a)
             : qk_backward_kernel<float, P><<<grid, block, 0, stream>>>(a);
    });
  if (a.q_weight) {
    launch_sum_chunks(a.partials, a.dq_weight, 1, a.H ? a.chunks : 0, 3 * a.d, 0, a.d, stream);
    launch_sum_chunks(a.partials, a.dk_weight, 1, a.H ? a.chunks : 0, 3 * a.d, a.d, a.d, stream);
  }
  check_launch("qk_norm_backward");
}

}  // namespace cmt::cuda

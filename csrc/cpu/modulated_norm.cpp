// modulated_norm on a CPU: a row stays in the first cache through its passes (mean, variance, result).
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
const T* row_of(const Rows& m, int64_t b) {
  return m.data ? static_cast<const T*>(m.data) + b * m.stride : nullptr;
}

struct Moments {
  float mean, r, size;
};
// The mean is taken about the first number of the row: of a row of equal numbers it is that number, and the variance 0.
template <class T>
CMT_FN Moments moments_of(const T* x, int64_t D, float eps) {
  Moments of{0.0f, 0.0f, 1.0f};
  while (true) {
    float size = of.size, origin = load(x, 1)[0] * size;
    V total{}, squares{};
    columns(D, [&](int64_t i, int64_t n) { total += first(load(x + i, n) * size - origin, n); });
    float mean = origin + sum(total) / D;
    columns(D, [&](int64_t i, int64_t n) {
      V centred = first(load(x + i, n) * size - mean, n);
      squares += centred * centred;
    });
    float all = sum(squares);
    of = {mean, rsqrt_of(all / D + eps * size * size), size};
    if (all <= kLargest || size != 1.0f) return of;
    of.size = kShrunk;
  }
}

// S: the residual stream, T: all else.
template <class S, class T>
void tangent_row(const ModulatedNorm& a, int64_t row, Moments of) {
  int64_t b = row / a.T, D = a.D;
  auto x = static_cast<const S*>(a.x) + row * D;
  auto x_dot = a.x_dot ? static_cast<const S*>(a.x_dot) + row * D : nullptr;
  auto y_dot = static_cast<T*>(a.y_dot) + row * D;
  auto scale = row_of<T>(a.scale, b), scale_dot = row_of<T>(a.scale_dot, b), shift_dot = row_of<T>(a.shift_dot, b);
  V s1{}, s2{};
  if (x_dot)
    columns(D, [&](int64_t i, int64_t n) {
      V v = load(x_dot + i, n);
      s1 += v;
      s2 += first(normalised(load(x + i, n), of.size, of.mean, of.r) * v, n);  // beyond the row xh may be infinite
    });
  float m1 = sum(s1) / D, m2 = sum(s2) / D;
  columns(D, [&](int64_t i, int64_t n) {
    V xh = normalised(load(x + i, n), of.size, of.mean, of.r), along{};
    if (shift_dot) along = load(shift_dot + i, n);
    if (scale_dot) along = mad(xh, load(scale_dot + i, n), along);
    if (x_dot)
      along = mad(normalise_along(load(x_dot + i, n), xh, of.r * of.size, m1, m2), 1.0f + load(scale + i, n), along);
    store(y_dot + i, along, n);
  });
}

template <class S, class T>
void forward(const ModulatedNorm& a, const Context& context) {
  parallel(context, a.B * a.T, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t b = row / a.T, D = a.D;
      auto x = static_cast<const S*>(a.x) + row * D;
      auto y = static_cast<T*>(a.y) + row * D;
      auto shift = row_of<T>(a.shift, b), scale = row_of<T>(a.scale, b);
      Moments of = moments_of(x, D, a.eps);
      Kept k = kept(of.size, of.mean, of.r);
      a.stats[2 * row] = k.half_mean, a.stats[2 * row + 1] = k.twice_r;
      columns(D, [&](int64_t i, int64_t n) {
        V xh = normalised(load(x + i, n), of.size, of.mean, of.r);
        store(y + i, modulated(xh, load(scale + i, n), load(shift + i, n)), n);
      });
      if (b < a.k) tangent_row<S, T>(a, row, of);
    }
  });
}

template <class S, class T>
void backward_row(const ModulatedNormBackward& a, int64_t row, float* dshift, float* dscale) {
  int64_t D = a.D;
  auto x = static_cast<const S*>(a.x) + row * D, through = a.through ? static_cast<const S*>(a.through) + row * D : nullptr;
  auto grad = static_cast<const T*>(a.grad) + row * D, scale = row_of<T>(a.scale, row / a.T);
  auto dx = static_cast<S*>(a.dx) + row * D;
  Kept k{a.stats[2 * row], a.stats[2 * row + 1]};
  V s1{}, s2{};
  columns(D, [&](int64_t i, int64_t n) {
    V g = load(grad + i, n), xh = normalised_again(load(x + i, n), k), w = g * (1.0f + load(scale + i, n));
    s1 += w;
    s2 += first(w * xh, n);
    store(dshift + i, load(dshift + i, n) + g, n);
    store(dscale + i, load(dscale + i, n) + g * xh, n);
  });
  float m1 = sum(s1) / D, m2 = sum(s2) / D;
  columns(D, [&](int64_t i, int64_t n) {
    V xh = normalised_again(load(x + i, n), k), w = load(grad + i, n) * (1.0f + load(scale + i, n));
    V d = 0.5f * normalise_along(w, xh, k.twice_r, m1, m2);
    store(dx + i, through ? load(through + i, n) + d : d, n);
  });
}

template <class S, class T>
void backward(const ModulatedNormBackward& a, const Context& context) {
  int64_t D = a.D;
  parallel(context, a.B * a.chunks, 1 + grain_of(D) / (a.chunk_rows + 1), [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / a.chunks, from = task % a.chunks * a.chunk_rows;
      int64_t to = from + a.chunk_rows < a.T ? from + a.chunk_rows : a.T;
      float* sums = a.partials + task * 2 * D;
      std::memset(sums, 0, 2 * D * sizeof(float));
      for (int64_t t = from; t < to; ++t) backward_row<S, T>(a, b * a.T + t, sums, sums + D);
    }
  });
  for (int64_t b = 0; b < a.B; ++b) {
    const float* sums = a.partials + b * a.chunks * 2 * D;
    columns(D, [&](int64_t i, int64_t n) {
      V shift{}, scale{};
      for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
        shift += load(sums + chunk * 2 * D + i, n);
        scale += load(sums + chunk * 2 * D + D + i, n);
      }
      store(static_cast<T*>(a.dshift) + b * D + i, shift, n);
      store(static_cast<T*>(a.dscale) + b * D + i, scale, n);
    });
  }
}

}  // namespace

void modulated_norm(const ModulatedNorm& a, const Context& context) {
  if (a.stream_bf16) return forward<bf16, bf16>(a, context);
  a.bf16 ? forward<float, bf16>(a, context) : forward<float, float>(a, context);
}
void modulated_norm_backward(const ModulatedNormBackward& a, const Context& context) {
  if (a.stream_bf16) return backward<bf16, bf16>(a, context);
  a.bf16 ? backward<float, bf16>(a, context) : backward<float, float>(a, context);
}

}  // namespace cmt::CMT_ISA

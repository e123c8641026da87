// qk_norm on a CPU. A head is two halves (a, b) of d/2 that RoPE turns into one another; without RoPE d may be odd, and
// the second half is the longer one.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

struct Scale {
  float r, size;  // xh = x size r
};
// Of a head; 1 if there is no norm.
template <class T>
CMT_FN Scale scale_of(const T* x, int64_t d, float eps, bool norm) {
  float size = 1.0f, r = 1.0f, all;
  while (norm) {
    V squares{};
    columns(d, [&](int64_t i, int64_t n) {
      V v = load(x + i, n) * size;
      squares += v * v;
    });
    all = sum(squares);
    r = rsqrt_of(all / d + eps * size * size);
    if (all <= kLargest || size != 1.0f) break;
    size = kShrunk;
  }
  return {r, size};
}

template <class T>
CMT_FN float mean_of_product(const T* x, const T* v, Scale s, int64_t d) {
  V total{};
  columns(d, [&](int64_t i, int64_t n) { total += load(x + i, n) * s.size * s.r * load(v + i, n); });
  return sum(total) / d;
}

template <class T>
CMT_FN void head(const T* x, const T* x_dot, T* y, T* y_dot, const float* w, const float* cos, const float* sin, int64_t d,
                 float eps) {
  Scale of = scale_of(x, d, eps, w != nullptr);
  float m = w && x_dot ? mean_of_product(x, x_dot, of, d) : 0.0f;
  auto value = [&](int64_t i, int64_t n) {
    V v = load(x + i, n);
    return w ? v * of.size * of.r * load(w + i, n) : v;
  };
  auto along = [&](int64_t i, int64_t n) {
    V v = load(x_dot + i, n);
    return w ? load(w + i, n) * rms_along(v, load(x + i, n) * of.size * of.r, of.r * of.size, m) : v;
  };
  if (!cos) {
    columns(d, [&](int64_t i, int64_t n) {
      store(y + i, value(i, n), n);
      if (x_dot) store(y_dot + i, along(i, n), n);
    });
    return;
  }
  int64_t half = d / 2;
  columns(half, [&](int64_t i, int64_t n) {
    V c = load(cos + i, n), s = load(sin + i, n);
    V a = value(i, n), b = value(half + i, n);
    rotate(a, b, c, s);
    store(y + i, a, n);
    store(y + half + i, b, n);
    if (!x_dot) return;
    a = along(i, n), b = along(half + i, n);
    rotate(a, b, c, s);
    store(y_dot + i, a, n);
    store(y_dot + half + i, b, n);
  });
}

template <class T>
void forward(const QkNorm& a, const Context& context) {
  int64_t width = a.H * a.d;
  parallel(context, a.B * a.T, grain_of(3 * width), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t at = row * 3 * width, t = row % a.T;
      bool dual = row / a.T < a.k;
      auto x = static_cast<const T*>(a.qkv) + at, x_dot = dual ? static_cast<const T*>(a.qkv_dot) + at : nullptr;
      auto y = static_cast<T*>(a.y) + at, y_dot = static_cast<T*>(a.y_dot) + at;
      auto cos = a.cos ? a.cos + t * (a.d / 2) : nullptr, sin = a.sin ? a.sin + t * (a.d / 2) : nullptr;
      for (int64_t h = 0; h < 2 * a.H; ++h) {
        int64_t i = h * a.d;
        head(x + i, x_dot ? x_dot + i : nullptr, y + i, y_dot + i, h < a.H ? a.q_weight : a.k_weight, cos, sin, a.d,
             a.eps);
      }
      std::memcpy(y + 2 * width, x + 2 * width, width * sizeof(T));
      if (dual) std::memcpy(y_dot + 2 * width, x_dot + 2 * width, width * sizeof(T));
    }
  });
}

// g <- the gradient before RoPE, in fp32; then dx and the sum for the weight.
template <class T>
CMT_FN void head_backward(const T* x, const T* grad, T* dx, const float* w, float* dw, const float* cos, const float* sin,
                          int64_t d, float eps, float* g) {
  int64_t half = cos ? d / 2 : 0;
  columns(half, [&](int64_t i, int64_t n) {
    V a = load(grad + i, n), b = load(grad + half + i, n);
    rotate(a, b, load(cos + i, n), -load(sin + i, n));
    store(g + i, a, n);
    store(g + half + i, b, n);
  });
  columns(d - 2 * half, [&](int64_t i, int64_t n) { store(g + i, load(grad + i, n), n); });
  Scale of = scale_of(x, d, eps, w != nullptr);
  float m = 0.0f;
  if (w) {
    V total{};
    columns(d, [&](int64_t i, int64_t n) {
      V xh = load(x + i, n) * of.size * of.r, v = load(g + i, n);
      total += xh * v * load(w + i, n);
      store(dw + i, load(dw + i, n) + v * xh, n);
    });
    m = sum(total) / d;
  }
  columns(d, [&](int64_t i, int64_t n) {
    V v = load(g + i, n);
    V xh = load(x + i, n) * of.size * of.r;
    store(dx + i, w ? rms_along(v * load(w + i, n), xh, of.r * of.size, m) : v, n);
  });
}

template <class T>
void backward(const QkNormBackward& a, const Context& context) {
  int64_t width = a.H * a.d, d = a.d;
  parallel(context, a.chunks, 1 + grain_of(3 * width) / (a.chunk_rows + 1), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float *sums = a.partials + chunk * 3 * d, *g = sums + 2 * d;
      std::memset(sums, 0, 2 * d * sizeof(float));
      int64_t last = (chunk + 1) * a.chunk_rows < a.B * a.T ? (chunk + 1) * a.chunk_rows : a.B * a.T;
      for (int64_t row = chunk * a.chunk_rows; row < last; ++row) {
        int64_t at = row * 3 * width, t = row % a.T;
        auto x = static_cast<const T*>(a.qkv) + at, grad = static_cast<const T*>(a.grad) + at;
        auto dx = static_cast<T*>(a.dqkv) + at;
        auto cos = a.cos ? a.cos + t * (d / 2) : nullptr, sin = a.sin ? a.sin + t * (d / 2) : nullptr;
        for (int64_t h = 0; h < 2 * a.H; ++h) {
          int64_t i = h * d, which = h < a.H ? 0 : 1;
          head_backward(x + i, grad + i, dx + i, which ? a.k_weight : a.q_weight, sums + which * d, cos, sin, d, a.eps, g);
        }
        std::memcpy(dx + 2 * width, grad + 2 * width, width * sizeof(T));
      }
    }
  });
  if (!a.q_weight) return;
  for (int64_t which = 0; which < 2; ++which)
    columns(d, [&](int64_t i, int64_t n) {
      V total{};
      for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += load(a.partials + (chunk * 3 + which) * d + i, n);
      store((which ? a.dk_weight : a.dq_weight) + i, total, n);
    });
}

}  // namespace

void qk_norm(const QkNorm& a, const Context& context) {
  a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context);
}
void qk_norm_backward(const QkNormBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

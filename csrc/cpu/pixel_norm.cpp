// pixel_norm on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
CMT_FN float mean_product(const T* p, const T* q, int64_t D, float size, float also) {  // of (p size) (q also)
  V total{};
  columns(D, [&](int64_t i, int64_t n) { total += (load(p + i, n) * size) * (load(q + i, n) * also); });
  return sum(total) / float(D);
}

template <class T>
void forward(const PixelNorm& a, const Context& context) {
  parallel(context, a.rows, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t D = a.D;
      auto x = static_cast<const T*>(a.x) + row * D;
      auto y = static_cast<T*>(a.y) + row * D;
      float square = mean_product(x, x, D, 1.0f, 1.0f), size = 1.0f;
      if (!(square <= kLargest)) square = mean_product(x, x, D, kShrunk, kShrunk), size = kShrunk;
      Length l = length_of(square, size, a.eps);
      a.stats[2 * row] = l.eighth_r, a.stats[2 * row + 1] = l.ratio;
      columns(D, [&](int64_t i, int64_t n) { store(y + i, over_length(load(x + i, n), l), n); });
      if (row >= a.rows_dot) continue;
      auto x_dot = static_cast<const T*>(a.x_dot) + row * D;
      auto y_dot = static_cast<T*>(a.y_dot) + row * D;
      V total{};
      columns(D, [&](int64_t i, int64_t n) { total += over_length(load(x + i, n), l) * load(x_dot + i, n); });
      float mean = sum(total) / float(D);
      columns(D, [&](int64_t i, int64_t n) {
        store(y_dot + i, over_length_along(load(x_dot + i, n), over_length(load(x + i, n), l), l, mean), n);
      });
    }
  });
}

template <class T>
void backward(const PixelNormBackward& a, const Context& context) {
  parallel(context, a.rows, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t D = a.D;
      auto grad = static_cast<const T*>(a.grad) + row * D, y = static_cast<const T*>(a.y) + row * D;
      auto dx = static_cast<T*>(a.dx) + row * D;
      Length l{a.stats[2 * row], a.stats[2 * row + 1]};
      float mean = mean_product(grad, y, D, 1.0f, 1.0f);
      columns(D, [&](int64_t i, int64_t n) {
        store(dx + i, over_length_along(load(grad + i, n), load(y + i, n), l, mean), n);
      });
    }
  });
}

}  // namespace

void pixel_norm(const PixelNorm& a, const Context& context) {
  a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context);
}
void pixel_norm_backward(const PixelNormBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

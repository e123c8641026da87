// gelu on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
void forward(const Gelu& a, const Context& context) {
  auto x = static_cast<const T*>(a.x), x_dot = static_cast<const T*>(a.x_dot);
  auto y = static_cast<T*>(a.y), y_dot = static_cast<T*>(a.y_dot);
  parallel(context, a.rows, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t at = row * a.D;
      bool along = row < a.rows_dot;
      columns(a.D, [&](int64_t i, int64_t n) {
        V v = load(x + at + i, n);
        if (a.bias) v += load(a.bias + i, n);
        store(y + at + i, gelu_of(v), n);
        if (along) store(y_dot + at + i, gelu_slope(v) * load(x_dot + at + i, n), n);
      });
    }
  });
}

template <class T>
void backward(const GeluBackward& a, const Context& context) {
  auto x = static_cast<const T*>(a.x), grad = static_cast<const T*>(a.grad);
  auto dx = static_cast<T*>(a.dx);
  parallel(context, a.chunks, 1 + grain_of(a.D) / (a.chunk_rows + 1), [=](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* sums = a.bias ? a.partials + chunk * a.D : nullptr;
      if (sums) std::memset(sums, 0, a.D * sizeof(float));
      int64_t last = (chunk + 1) * a.chunk_rows < a.rows ? (chunk + 1) * a.chunk_rows : a.rows;
      for (int64_t row = chunk * a.chunk_rows; row < last; ++row) {
        int64_t at = row * a.D;
        columns(a.D, [&](int64_t i, int64_t n) {
          V v = load(x + at + i, n);
          if (a.bias) v += load(a.bias + i, n);
          V g = load(grad + at + i, n) * gelu_slope(v);
          store(dx + at + i, g, n);
          if (sums) store(sums + i, load(sums + i, n) + g, n);
        });
      }
    }
  });
  if (!a.bias) return;
  columns(a.D, [&](int64_t i, int64_t n) {
    V total{};
    for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += load(a.partials + chunk * a.D + i, n);
    store(a.dbias + i, total, n);
  });
}

}  // namespace

void gelu(const Gelu& a, const Context& context) { a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context); }
void gelu_backward(const GeluBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

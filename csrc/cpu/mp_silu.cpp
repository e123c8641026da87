// mp_silu on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
const T* row_of(const void* x, int64_t row, int64_t stride) {
  return x ? static_cast<const T*>(x) + row * stride : nullptr;
}

template <class T>
CMT_FN V one_plus(const T* scale, int64_t i, int64_t n) {
  return scale ? 1.0f + load(scale + i, n) : V{} + 1.0f;
}

template <class T>
void forward(const MpSilu& a, const Context& context) {
  parallel(context, a.B * a.T, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t b = row / a.T, D = a.D;
      auto x = row_of<T>(a.x, row, D), scale = row_of<T>(a.scale.data, b, a.scale.stride);
      auto y = static_cast<T*>(a.y) + row * D;
      columns(D, [&](int64_t i, int64_t n) { store(y + i, silu_of(load(x + i, n) * one_plus(scale, i, n)), n); });
      if (b >= a.k) continue;
      auto x_dot = row_of<T>(a.x_dot, row, D), scale_dot = row_of<T>(a.scale_dot.data, b, a.scale_dot.stride);
      auto y_dot = static_cast<T*>(a.y_dot) + row * D;
      columns(D, [&](int64_t i, int64_t n) {
        V v = load(x + i, n), m = one_plus(scale, i, n), along{};
        if (x_dot) along = load(x_dot + i, n) * m;
        if (scale_dot) along = mad(load(scale_dot + i, n), v, along);
        store(y_dot + i, silu_slope(v * m) * along, n);
      });
    }
  });
}

template <class T>
void backward(const MpSiluBackward& a, const Context& context) {
  int64_t D = a.D;
  parallel(context, a.B * a.chunks, 1 + grain_of(D) / (a.chunk_rows + 1), [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / a.chunks, from = task % a.chunks * a.chunk_rows;
      int64_t to = from + a.chunk_rows < a.T ? from + a.chunk_rows : a.T;
      auto scale = row_of<T>(a.scale.data, b, a.scale.stride);
      float* sums = scale ? a.partials + task * D : nullptr;
      if (sums) std::memset(sums, 0, D * sizeof(float));
      for (int64_t row = b * a.T + from; row < b * a.T + to; ++row) {
        auto x = row_of<T>(a.x, row, D), grad = row_of<T>(a.grad, row, D), through = row_of<T>(a.through, row, D);
        auto dx = static_cast<T*>(a.dx) + row * D;
        columns(D, [&](int64_t i, int64_t n) {
          V v = load(x + i, n), m = one_plus(scale, i, n), ds = load(grad + i, n) * silu_slope(v * m);
          store(dx + i, through ? mad(ds, m, load(through + i, n)) : ds * m, n);
          if (sums) store(sums + i, load(sums + i, n) + ds * v, n);
        });
      }
    }
  });
  if (!a.scale.data) return;
  for (int64_t b = 0; b < a.B; ++b)
    columns(D, [&](int64_t i, int64_t n) {
      V total{};
      for (int64_t chunk = 0; chunk < a.chunks; ++chunk) total += load(a.partials + (b * a.chunks + chunk) * D + i, n);
      store(static_cast<T*>(a.dscale) + b * D + i, total, n);
    });
}

}  // namespace

void mp_silu(const MpSilu& a, const Context& context) { a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context); }
void mp_silu_backward(const MpSiluBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

// gated_residual on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
const T* row_of(const void* x, int64_t row, int64_t stride) {
  return x ? static_cast<const T*>(x) + row * stride : nullptr;
}

// S: the residual stream, T: all else.
template <class S, class T>
void forward(const GatedResidual& a, const Context& context) {
  parallel(context, a.B * a.T, grain_of(a.D), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      int64_t b = row / a.T, D = a.D;
      auto x = row_of<S>(a.x, row, D);
      auto branch = row_of<T>(a.branch, row, D);
      auto gate = row_of<T>(a.gate.data, b, a.gate.stride);
      auto y = static_cast<S*>(a.y) + row * D;
      columns(D, [&](int64_t i, int64_t n) {
        V o = load(branch + i, n) + load_or(a.bias, i, n, 0.0f);
        store(y + i, mad(load(gate + i, n), o, load(x + i, n)), n);
      });
      if (b >= a.k) continue;
      auto x_dot = row_of<S>(a.x_dot, row, D);
      auto branch_dot = row_of<T>(a.branch_dot, row, D);
      auto gate_dot = row_of<T>(a.gate_dot.data, b, a.gate_dot.stride);
      auto y_dot = static_cast<S*>(a.y_dot) + row * D;
      columns(D, [&](int64_t i, int64_t n) {
        V along{};
        if (x_dot) along = load(x_dot + i, n);
        if (branch_dot) along = mad(load(gate + i, n), load(branch_dot + i, n), along);
        if (gate_dot)
          along = mad(load(gate_dot + i, n), load(branch + i, n) + load_or(a.bias, i, n, 0.0f), along);
        store(y_dot + i, along, n);
      });
    }
  });
}

template <class S, class T>
void backward(const GatedResidualBackward& a, const Context& context) {
  int64_t D = a.D;
  parallel(context, a.B * a.chunks, 1 + grain_of(D) / (a.chunk_rows + 1), [=](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      int64_t b = task / a.chunks, from = task % a.chunks * a.chunk_rows;
      int64_t to = from + a.chunk_rows < a.T ? from + a.chunk_rows : a.T;
      auto gate = row_of<T>(a.gate.data, b, a.gate.stride);
      float *dgate = a.partials + task * 2 * D, *total = dgate + D;
      std::memset(dgate, 0, 2 * D * sizeof(float));
      for (int64_t row = b * a.T + from; row < b * a.T + to; ++row) {
        auto grad = row_of<S>(a.grad, row, D);
        auto branch = row_of<T>(a.branch, row, D);
        auto dbranch = static_cast<T*>(a.dbranch) + row * D;
        columns(D, [&](int64_t i, int64_t n) {
          V g = load(grad + i, n), o = load(branch + i, n) + load_or(a.bias, i, n, 0.0f);
          store(dbranch + i, load(gate + i, n) * g, n);
          store(dgate + i, load(dgate + i, n) + g * o, n);
          if (a.bias) store(total + i, load(total + i, n) + g, n);
        });
      }
    }
  });
  if (a.bias) std::memset(a.dbias, 0, D * sizeof(float));
  for (int64_t b = 0; b < a.B; ++b) {
    const float* sums = a.partials + b * a.chunks * 2 * D;
    auto gate = row_of<T>(a.gate.data, b, a.gate.stride);
    columns(D, [&](int64_t i, int64_t n) {
      V dgate{}, total{};
      for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
        dgate += load(sums + chunk * 2 * D + i, n);
        total += load(sums + chunk * 2 * D + D + i, n);
      }
      store(static_cast<T*>(a.dgate) + b * D + i, dgate, n);
      if (a.bias) store(a.dbias + i, mad(load(gate + i, n), total, load(a.dbias + i, n)), n);
    });
  }
}

}  // namespace

void gated_residual(const GatedResidual& a, const Context& context) {
  if (a.stream_bf16) return forward<bf16, bf16>(a, context);
  a.bf16 ? forward<float, bf16>(a, context) : forward<float, float>(a, context);
}
void gated_residual_backward(const GatedResidualBackward& a, const Context& context) {
  if (a.stream_bf16) return backward<bf16, bf16>(a, context);
  a.bf16 ? backward<float, bf16>(a, context) : backward<float, float>(a, context);
}

}  // namespace cmt::CMT_ISA

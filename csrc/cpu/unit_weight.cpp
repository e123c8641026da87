// unit_weight on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

CMT_FN float get(const float* p) { return *p; }
CMT_FN float get(const bf16* p) { return bits_of<float>(uint32_t(p->bits) << 16); }
CMT_FN void put(float* p, float x) { *p = x; }
CMT_FN void put(bf16* p, float x) {
  V v{};
  v[0] = x;
  store(p, v, 1);
}

CMT_FN float mean_square(const float* w, int64_t N, float size) {
  V total{};
  columns(N, [&](int64_t i, int64_t n) { total += (load(w + i, n) * size) * (load(w + i, n) * size); });
  return sum(total) / float(N);
}

template <class T>
void forward(const UnitWeight& a, const Context& context) {
  int64_t N = a.D * a.S;
  parallel(context, a.E, grain_of(N), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* w = a.weight + row * N;
      T* y = static_cast<T*>(a.y) + row * N;
      float square = mean_square(w, N, 1.0f), size = 1.0f;
      if (!(square <= kLargest)) square = mean_square(w, N, kShrunk), size = kShrunk;
      Length l = length_of(square, size, a.eps);
      a.stats[2 * row] = l.eighth_r, a.stats[2 * row + 1] = l.ratio;
      if (!a.last || a.S == 1) {
        columns(N, [&](int64_t i, int64_t n) { store(y + i, over_length(load(w + i, n), l) * a.gain, n); });
        continue;
      }
      for (int64_t s = 0; s < a.S; ++s)
        for (int64_t d = 0; d < a.D; ++d) put(y + s * a.D + d, over_length(w[d * a.S + s], l) * a.gain);
    }
  });
}

template <class T>
void backward(const UnitWeightBackward& a, const Context& context) {
  int64_t N = a.D * a.S;
  parallel(context, a.E, grain_of(N), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* w = a.weight + row * N;
      const T* grad = static_cast<const T*>(a.grad) + row * N;
      float* dw = a.dweight + row * N;
      Length l{a.stats[2 * row], a.stats[2 * row + 1]};
      for (int64_t s = 0; s < a.S; ++s)  // dw holds gain grad in the order of the weight
        for (int64_t d = 0; d < a.D; ++d) {
          int64_t at = d * a.S + s;
          dw[at] = get(grad + (a.last ? s * a.D + d : at)) * a.gain;
        }
      V total{};
      columns(N, [&](int64_t i, int64_t n) { total += over_length(load(w + i, n), l) * load(dw + i, n); });
      float mean = sum(total) / float(N);
      columns(N, [&](int64_t i, int64_t n) {
        store(dw + i, over_length_along(load(dw + i, n), over_length(load(w + i, n), l), l, mean), n);
      });
    }
  });
}

}  // namespace

void unit_weight(const UnitWeight& a, const Context& context) {
  a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context);
}
void unit_weight_backward(const UnitWeightBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

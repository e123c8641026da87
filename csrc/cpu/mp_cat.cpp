// mp_cat on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

template <class T>
CMT_FN void scaled(const T* from, T* to, int64_t D, float weight) {  // from null: zeros
  columns(D, [&](int64_t i, int64_t n) { store(to + i, from ? load(from + i, n) * weight : V{}, n); });
}

template <class T>
void join(const MpCat& a, const void* one, const void* two, void* out, int64_t rows, const Context& context) {
  int64_t D = a.Da + a.Db;
  parallel(context, rows, grain_of(D), [=](int64_t begin, int64_t end) {
    auto p = static_cast<const T*>(one), q = static_cast<const T*>(two);
    auto y = static_cast<T*>(out);
    for (int64_t row = begin; row < end; ++row) {
      scaled(p ? p + row * a.Da : p, y + row * D, a.Da, a.weight_a);
      scaled(q ? q + row * a.Db : q, y + row * D + a.Da, a.Db, a.weight_b);
    }
  });
}

template <class T>
void forward(const MpCat& a, const Context& context) {
  join<T>(a, a.a, a.b, a.y, a.rows, context);
  if (a.rows_dot) join<T>(a, a.a_dot, a.b_dot, a.y_dot, a.rows_dot, context);
}

template <class T>
void backward(const MpCatBackward& a, const Context& context) {
  int64_t D = a.Da + a.Db;
  parallel(context, a.rows, grain_of(D), [=](int64_t begin, int64_t end) {
    auto grad = static_cast<const T*>(a.grad);
    for (int64_t row = begin; row < end; ++row) {
      scaled(grad + row * D, static_cast<T*>(a.da) + row * a.Da, a.Da, a.weight_a);
      scaled(grad + row * D + a.Da, static_cast<T*>(a.db) + row * a.Db, a.Db, a.weight_b);
    }
  });
}

}  // namespace

void mp_cat(const MpCat& a, const Context& context) { a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context); }
void mp_cat_backward(const MpCatBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

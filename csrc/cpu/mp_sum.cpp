// mp_sum on a CPU.
#include "../kernels.h"
#include "../row_math.h"

namespace cmt::CMT_ISA {
namespace {

constexpr int64_t kPiece = 4096;  // numbers that a task takes at least

// body(i, n) over [begin, end), n at a time.
template <class Body>
CMT_FN void numbers(int64_t begin, int64_t end, Body body) {
  columns(end - begin, [&](int64_t i, int64_t n) { body(begin + i, n); });
}

template <class T>
void forward(const MpSum& a, const Context& context) {
  auto one = static_cast<const T*>(a.a), two = static_cast<const T*>(a.b);
  auto one_dot = static_cast<const T*>(a.a_dot), two_dot = static_cast<const T*>(a.b_dot);
  auto y = static_cast<T*>(a.y), y_dot = static_cast<T*>(a.y_dot);
  auto sum = [=](const T* p, const T* q, int64_t i, int64_t n) {
    V right = q ? load(q + i, n) * a.weight_b : V{};
    return p ? mad(V{} + a.weight_a, load(p + i, n), right) : right;
  };
  parallel(context, (a.n + kPiece - 1) / kPiece, 8, [=](int64_t begin, int64_t end) {
    int64_t first = begin * kPiece, last = end * kPiece < a.n ? end * kPiece : a.n;
    numbers(first, last, [&](int64_t i, int64_t n) { store(y + i, clipped(sum(one, two, i, n), a.limit), n); });
    numbers(first, last < a.n_dot ? last : a.n_dot, [&](int64_t i, int64_t n) {
      store(y_dot + i, where_within(sum(one, two, i, n), a.limit, sum(one_dot, two_dot, i, n)), n);
    });
  });
}

template <class T>
void backward(const MpSumBackward& a, const Context& context) {
  auto grad = static_cast<const T*>(a.grad), y = static_cast<const T*>(a.y);
  auto da = static_cast<T*>(a.da), db = static_cast<T*>(a.db);
  parallel(context, (a.n + kPiece - 1) / kPiece, 8, [=](int64_t begin, int64_t end) {
    numbers(begin * kPiece, end * kPiece < a.n ? end * kPiece : a.n, [&](int64_t i, int64_t n) {
      V g = load(grad + i, n);
      if (y) g = where_inside(load(y + i, n), a.limit, g);
      store(da + i, g * a.weight_a, n);
      store(db + i, g * a.weight_b, n);
    });
  });
}

}  // namespace

void mp_sum(const MpSum& a, const Context& context) { a.bf16 ? forward<bf16>(a, context) : forward<float>(a, context); }
void mp_sum_backward(const MpSumBackward& a, const Context& context) {
  a.bf16 ? backward<bf16>(a, context) : backward<float>(a, context);
}

}  // namespace cmt::CMT_ISA

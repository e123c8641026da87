// The native ops: every schema on this screen, and below it how each one's tensors reach a backend.
//
// `*_dot` are tangents of the first k rows; the results named y_dot have k rows, 0 when there is no tangent. A gradient
// of something absent has no elements. x of modulated_norm and gated_residual, its tangent and its gradient may be
// float32 where all else is bfloat16; y of the norm is as shift, y of the residual as x. The CPU key is always there, the CUDA key where the build has its kernels.
#include "tensors.h"

STABLE_TORCH_LIBRARY(cmt, m) {
  m.def("gelu(Tensor x, Tensor? bias, Tensor? x_dot) -> (Tensor y, Tensor y_dot)");
  m.def("gelu_backward(Tensor grad, Tensor x, Tensor? bias) -> (Tensor dx, Tensor dbias)");
  m.def(
      "modulated_norm(Tensor x, Tensor shift, Tensor scale, Tensor? x_dot, Tensor? shift_dot, Tensor? scale_dot, "
      "float eps) -> (Tensor y, Tensor y_dot, Tensor stats)");
  m.def(
      "modulated_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor stats, Tensor? through) "
      "-> (Tensor dx, Tensor dshift, Tensor dscale)");
  m.def(
      "gated_residual(Tensor x, Tensor branch, Tensor gate, Tensor? bias, Tensor? x_dot, Tensor? branch_dot, "
      "Tensor? gate_dot) -> (Tensor y, Tensor y_dot)");
  m.def(
      "gated_residual_backward(Tensor grad, Tensor branch, Tensor gate, Tensor? bias) "
      "-> (Tensor dbranch, Tensor dgate, Tensor dbias)");
  m.def(
      "qk_norm(Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? qkv_dot, float eps) "
      "-> (Tensor y, Tensor y_dot)");
  m.def(
      "qk_norm_backward(Tensor grad, Tensor qkv, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
      "float eps) -> (Tensor dqkv, Tensor dq_weight, Tensor dk_weight)");
  m.def("mp_silu(Tensor x, Tensor? scale, Tensor? x_dot, Tensor? scale_dot) -> (Tensor y, Tensor y_dot)");
  m.def("mp_silu_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? through) -> (Tensor dx, Tensor dscale)");
  m.def(
      "mp_sum(Tensor a, Tensor b, Tensor? a_dot, Tensor? b_dot, float weight_a, float weight_b, float limit) "
      "-> (Tensor y, Tensor y_dot)");
  m.def(
      "mp_sum_backward(Tensor grad, Tensor? y, float weight_a, float weight_b, float limit) -> (Tensor da, Tensor db)");
  m.def(
      "mp_cat(Tensor a, Tensor b, Tensor? a_dot, Tensor? b_dot, float weight_a, float weight_b) "
      "-> (Tensor y, Tensor y_dot)");
  m.def("mp_cat_backward(Tensor grad, int first, float weight_a, float weight_b) -> (Tensor da, Tensor db)");
  m.def("pixel_norm(Tensor x, Tensor? x_dot, float eps) -> (Tensor y, Tensor y_dot, Tensor stats)");
  m.def("pixel_norm_backward(Tensor grad, Tensor y, Tensor stats) -> Tensor dx");
  m.def("unit_weight(Tensor weight, float gain, float eps, bool low, bool last) -> (Tensor y, Tensor stats)");
  m.def("unit_weight_backward(Tensor grad, Tensor weight, Tensor stats, float gain, bool last) -> Tensor dweight");
  m.def("random_bits(Tensor sample, int blocks, int seed, int stage, int step, int stream) -> Tensor");
}

namespace cmt {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

constexpr int64_t kChunks = 256;  // at most this many partial sums of one column, of chunks of at least 32 rows

Tensor tangent_like(const Tensor& x, int64_t k) {
  Shape shape = shape_of(x);
  shape[0] = k;
  return empty(x, shape);
}

Two gelu_op(const Tensor& x_in, const Maybe& bias_in, const Maybe& x_dot_in) {
  const char* op = "gelu";
  bool half = is_bf16(x_in, op);
  STD_TORCH_CHECK(x_in.dim() >= 1, op, ": x must have a dimension");
  int64_t D = x_in.size(x_in.dim() - 1), k = tangent_rows({&x_dot_in}, x_in.size(0), op);
  Tensor x = dense(x_in);
  Maybe bias = parameter(bias_in, x, {D}, op, "bias"), x_dot = activation(x_dot_in, x, k, op, "the tangent of x");
  Tensor y = empty(x, shape_of(x)), y_dot = tangent_like(x, k);
  if (x.numel()) {
    Place place(x);
    place.backend->gelu({x.const_data_ptr(), pointer(x_dot), floats(bias), y.mutable_data_ptr(),
                         y_dot.mutable_data_ptr(), x.numel() / D, y_dot.numel() / D, D, half},
                        place.context);
  }
  return {y, y_dot};
}

Two gelu_backward_op(const Tensor& grad_in, const Tensor& x_in, const Maybe& bias_in) {
  const char* op = "gelu_backward";
  bool half = is_bf16(x_in, op);
  int64_t D = x_in.size(x_in.dim() - 1);
  Tensor x = dense(x_in), grad = *activation(grad_in, x, x.size(0), op, "grad");
  Maybe bias = parameter(bias_in, x, {D}, op, "bias");
  int64_t n = D ? x.numel() / D : 0;
  Chunks chunks(n, kChunks);
  Tensor dx = empty(x, shape_of(x)), dbias = empty_floats(x, {bias ? D : 0});
  Tensor partials = empty_floats(x, {bias ? chunks.count : 0, D});
  if (D) {
    Place place(x);
    place.backend->gelu_backward({grad.const_data_ptr(), x.const_data_ptr(), floats(bias), dx.mutable_data_ptr(),
                                  floats(dbias), floats(partials), n, D, chunks.rows, chunks.count, half},
                                 place.context);
  }
  return {dx, dbias};
}

Three modulated_norm_op(const Tensor& x_in, const Tensor& shift_in, const Tensor& scale_in, const Maybe& x_dot_in,
                        const Maybe& shift_dot_in, const Maybe& scale_dot_in, double eps) {
  const char* op = "modulated_norm";
  bool stream_half = is_bf16(x_in, op), half = is_bf16_beside(shift_in, x_in, op, "shift");
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2);
  int64_t k = tangent_rows({&x_dot_in, &shift_dot_in, &scale_dot_in}, B, op);
  Tensor x = dense(x_in);
  Maybe x_dot = activation(x_dot_in, x, k, op, "the tangent of x");
  const Tensor* as = &shift_in;
  Maybe shift = modulation(shift_in, x, B, op, "shift", as), scale = modulation(scale_in, x, B, op, "scale", as);
  Maybe shift_dot = modulation(shift_dot_in, x, k, op, "the tangent of shift", as);
  Maybe scale_dot = modulation(scale_dot_in, x, k, op, "the tangent of scale", as);
  Tensor y = empty(*as, {B, T, D}), y_dot = empty(*as, {k, T, D}), stats = empty_floats(x, {B, T, 2});
  if (x.numel()) {
    Place place(x);
    place.backend->modulated_norm(
        {x.const_data_ptr(), pointer(x_dot), rows(shift), rows(scale), rows(shift_dot), rows(scale_dot),
         y.mutable_data_ptr(), y_dot.mutable_data_ptr(), floats(stats), B, T, D, k, float(eps), stream_half, half},
        place.context);
  }
  return {y, y_dot, stats};
}

Three modulated_norm_backward_op(const Tensor& grad_in, const Tensor& x_in, const Tensor& scale_in,
                                 const Tensor& stats_in, const Maybe& through_in) {
  const char* op = "modulated_norm_backward";
  bool stream_half = is_bf16(x_in, op), half = is_bf16_beside(scale_in, x_in, op, "scale");
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2);
  Tensor x = dense(x_in), grad = *activation(grad_in, x, B, op, "grad", &scale_in);
  Maybe through = activation(through_in, x, B, op, "the gradient that goes through");
  Maybe scale = modulation(scale_in, x, B, op, "scale", &scale_in);
  Maybe stats = parameter(stats_in, x, {B, T, 2}, op, "stats");
  Chunks chunks(T, kChunks);
  Tensor dx = empty(x, {B, T, D}), dshift = empty(scale_in, {B, D}), dscale = empty(scale_in, {B, D});
  Tensor partials = empty_floats(x, {B, chunks.count, 2, D});
  if (B && D) {
    Place place(x);
    place.backend->modulated_norm_backward(
        {grad.const_data_ptr(), x.const_data_ptr(), pointer(through), rows(scale), floats(stats),
         dx.mutable_data_ptr(), dshift.mutable_data_ptr(), dscale.mutable_data_ptr(), floats(partials), B, T, D,
         chunks.rows, chunks.count, stream_half, half},
        place.context);
  }
  return {dx, dshift, dscale};
}

Two gated_residual_op(const Tensor& x_in, const Tensor& branch_in, const Tensor& gate_in, const Maybe& bias_in,
                      const Maybe& x_dot_in, const Maybe& branch_dot_in, const Maybe& gate_dot_in) {
  const char* op = "gated_residual";
  bool stream_half = is_bf16(x_in, op), half = is_bf16_beside(branch_in, x_in, op, "branch");
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2);
  int64_t k = tangent_rows({&x_dot_in, &branch_dot_in, &gate_dot_in}, B, op);
  const Tensor* as = &branch_in;
  Tensor x = dense(x_in), branch = *activation(branch_in, x, B, op, "branch", as);
  Maybe gate = modulation(gate_in, x, B, op, "gate", as), bias = parameter(bias_in, x, {D}, op, "bias");
  Maybe x_dot = activation(x_dot_in, x, k, op, "the tangent of x");
  Maybe branch_dot = activation(branch_dot_in, x, k, op, "the tangent of branch", as);
  Maybe gate_dot = modulation(gate_dot_in, x, k, op, "the tangent of gate", as);
  Tensor y = empty(x, {B, T, D}), y_dot = empty(x, {k, T, D});
  if (x.numel()) {
    Place place(x);
    place.backend->gated_residual(
        {x.const_data_ptr(), branch.const_data_ptr(), pointer(x_dot), pointer(branch_dot), rows(gate), rows(gate_dot),
         floats(bias), y.mutable_data_ptr(), y_dot.mutable_data_ptr(), B, T, D, k, stream_half, half},
        place.context);
  }
  return {y, y_dot};
}

Three gated_residual_backward_op(const Tensor& grad_in, const Tensor& branch_in, const Tensor& gate_in,
                                 const Maybe& bias_in) {
  const char* op = "gated_residual_backward";
  bool stream_half = is_bf16(grad_in, op), half = is_bf16_beside(branch_in, grad_in, op, "branch");
  STD_TORCH_CHECK(branch_in.dim() == 3, op, ": branch must be (B, T, D)");
  int64_t B = branch_in.size(0), T = branch_in.size(1), D = branch_in.size(2);
  Tensor branch = dense(branch_in), grad = *activation(grad_in, branch, B, op, "grad", &grad_in);
  Maybe gate = modulation(gate_in, branch, B, op, "gate"), bias = parameter(bias_in, branch, {D}, op, "bias");
  Chunks chunks(T, kChunks);
  Tensor dbranch = empty(branch, {B, T, D}), dgate = empty(branch, {B, D});
  Tensor dbias = empty_floats(branch, {bias ? D : 0}), partials = empty_floats(branch, {B, chunks.count, 2, D});
  if (D) {
    Place place(branch);
    place.backend->gated_residual_backward(
        {grad.const_data_ptr(), branch.const_data_ptr(), rows(gate), floats(bias), dbranch.mutable_data_ptr(),
         dgate.mutable_data_ptr(), floats(dbias), floats(partials), B, T, D, chunks.rows, chunks.count, stream_half, half},
        place.context);
  }
  return {dbranch, dgate, dbias};
}

struct Heads {  // (B, T, 3, H, d) and the tables of its norm and its rotation
  Heads(const Tensor& qkv_in, const Maybe& q_in, const Maybe& k_in, const Maybe& cos_in, const Maybe& sin_in,
        const char* op)
      : half(is_bf16(qkv_in, op)), qkv(dense(qkv_in)) {
    STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, op, ": qkv must be (B, T, 3, H, d)");
    STD_TORCH_CHECK(q_in.has_value() == k_in.has_value(), op, ": q_weight and k_weight come together");
    STD_TORCH_CHECK(cos_in.has_value() == sin_in.has_value(), op, ": cos and sin come together");
    B = qkv.size(0), T = qkv.size(1), H = qkv.size(3), d = qkv.size(4);
    STD_TORCH_CHECK(!cos_in || d % 2 == 0, op, ": RoPE needs an even head dim");
    q_weight = parameter(q_in, qkv, {d}, op, "q_weight"), k_weight = parameter(k_in, qkv, {d}, op, "k_weight");
    cos = parameter(cos_in, qkv, {T, d / 2}, op, "cos"), sin = parameter(sin_in, qkv, {T, d / 2}, op, "sin");
  }
  bool half;
  Tensor qkv;
  Maybe q_weight, k_weight, cos, sin;
  int64_t B, T, H, d;
};

Two qk_norm_op(const Tensor& qkv, const Maybe& q_weight, const Maybe& k_weight, const Maybe& cos, const Maybe& sin,
               const Maybe& qkv_dot_in, double eps) {
  const char* op = "qk_norm";
  Heads x(qkv, q_weight, k_weight, cos, sin, op);
  int64_t k = tangent_rows({&qkv_dot_in}, x.B, op);
  Maybe qkv_dot = activation(qkv_dot_in, x.qkv, k, op, "the tangent of qkv");
  Tensor y = empty(x.qkv, shape_of(x.qkv)), y_dot = tangent_like(x.qkv, k);
  if (y.numel()) {
    Place place(x.qkv);
    place.backend->qk_norm({x.qkv.const_data_ptr(), pointer(qkv_dot), floats(x.q_weight), floats(x.k_weight),
                            floats(x.cos), floats(x.sin), y.mutable_data_ptr(), y_dot.mutable_data_ptr(), x.B, x.T,
                            x.H, x.d, k, float(eps), x.half},
                           place.context);
  }
  return {y, y_dot};
}

Three qk_norm_backward_op(const Tensor& grad_in, const Tensor& qkv, const Maybe& q_weight, const Maybe& k_weight,
                          const Maybe& cos, const Maybe& sin, double eps) {
  const char* op = "qk_norm_backward";
  Heads x(qkv, q_weight, k_weight, cos, sin, op);
  Tensor grad = *activation(grad_in, x.qkv, x.B, op, "grad");
  Chunks chunks(x.B * x.T, kChunks);
  Tensor dqkv = empty(x.qkv, shape_of(x.qkv)), partials = empty_floats(x.qkv, {chunks.count, 3, x.d});
  Tensor dq = empty_floats(x.qkv, {x.q_weight ? x.d : 0}), dk = empty_floats(x.qkv, {x.q_weight ? x.d : 0});
  if (x.d) {
    Place place(x.qkv);
    place.backend->qk_norm_backward(
        {grad.const_data_ptr(), x.qkv.const_data_ptr(), floats(x.q_weight), floats(x.k_weight), floats(x.cos),
         floats(x.sin), dqkv.mutable_data_ptr(), floats(dq), floats(dk), floats(partials), x.B, x.T, x.H, x.d,
         chunks.rows, chunks.count, float(eps), x.half},
        place.context);
  }
  return {dqkv, dq, dk};
}

Two mp_silu_op(const Tensor& x_in, const Maybe& scale_in, const Maybe& x_dot_in, const Maybe& scale_dot_in) {
  const char* op = "mp_silu";
  bool half = is_bf16(x_in, op);
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  STD_TORCH_CHECK(scale_in || !scale_dot_in, op, ": a tangent of a scale that is not there");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2), k = tangent_rows({&x_dot_in, &scale_dot_in}, B, op);
  Tensor x = dense(x_in);
  Maybe x_dot = activation(x_dot_in, x, k, op, "the tangent of x"), scale = modulation(scale_in, x, B, op, "scale");
  Maybe scale_dot = modulation(scale_dot_in, x, k, op, "the tangent of scale");
  Tensor y = empty(x, {B, T, D}), y_dot = empty(x, {k, T, D});
  if (x.numel()) {
    Place place(x);
    place.backend->mp_silu({x.const_data_ptr(), pointer(x_dot), rows(scale), rows(scale_dot), y.mutable_data_ptr(),
                            y_dot.mutable_data_ptr(), B, T, D, k, half},
                           place.context);
  }
  return {y, y_dot};
}

Two mp_silu_backward_op(const Tensor& grad_in, const Tensor& x_in, const Maybe& scale_in, const Maybe& through_in) {
  const char* op = "mp_silu_backward";
  bool half = is_bf16(x_in, op);
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2);
  Tensor x = dense(x_in), grad = *activation(grad_in, x, B, op, "grad");
  Maybe through = activation(through_in, x, B, op, "the gradient that goes through");
  Maybe scale = modulation(scale_in, x, B, op, "scale");
  Chunks chunks(T, kChunks);
  Tensor dx = empty(x, {B, T, D}), dscale = empty(x, scale ? Shape{B, D} : Shape{0});
  Tensor partials = empty_floats(x, {scale ? B : 0, chunks.count, D});
  if (B && D) {
    Place place(x);
    place.backend->mp_silu_backward({grad.const_data_ptr(), x.const_data_ptr(), pointer(through), rows(scale),
                                     dx.mutable_data_ptr(), dscale.mutable_data_ptr(), floats(partials), B, T, D,
                                     chunks.rows, chunks.count, half},
                                    place.context);
  }
  return {dx, dscale};
}

Two mp_sum_op(const Tensor& a_in, const Tensor& b_in, const Maybe& a_dot_in, const Maybe& b_dot_in, double weight_a,
              double weight_b, double limit) {
  const char* op = "mp_sum";
  bool half = is_bf16(a_in, op);
  STD_TORCH_CHECK(a_in.dim() >= 1, op, ": a must have a dimension");
  int64_t k = tangent_rows({&a_dot_in, &b_dot_in}, a_in.size(0), op);
  Tensor a = dense(a_in), b = *activation(b_in, a, a.size(0), op, "b");
  Maybe a_dot = activation(a_dot_in, a, k, op, "the tangent of a");
  Maybe b_dot = activation(b_dot_in, a, k, op, "the tangent of b");
  Tensor y = empty(a, shape_of(a)), y_dot = tangent_like(a, k);
  if (a.numel()) {
    Place place(a);
    place.backend->mp_sum({a.const_data_ptr(), b.const_data_ptr(), pointer(a_dot), pointer(b_dot),
                           y.mutable_data_ptr(), y_dot.mutable_data_ptr(), a.numel(), y_dot.numel(), float(weight_a),
                           float(weight_b), float(limit), half},
                          place.context);
  }
  return {y, y_dot};
}

Two mp_sum_backward_op(const Tensor& grad_in, const Maybe& y_in, double weight_a, double weight_b, double limit) {
  const char* op = "mp_sum_backward";
  bool half = is_bf16(grad_in, op);
  Tensor grad = dense(grad_in);
  Maybe y = activation(y_in, grad, grad.size(0), op, "y");
  Tensor da = empty(grad, shape_of(grad)), db = empty(grad, shape_of(grad));
  if (grad.numel()) {
    Place place(grad);
    place.backend->mp_sum_backward({grad.const_data_ptr(), pointer(y), da.mutable_data_ptr(), db.mutable_data_ptr(),
                                    grad.numel(), float(weight_a), float(weight_b), float(limit), half},
                                   place.context);
  }
  return {da, db};
}

Two mp_cat_op(const Tensor& a_in, const Tensor& b_in, const Maybe& a_dot_in, const Maybe& b_dot_in, double weight_a,
              double weight_b) {
  const char* op = "mp_cat";
  bool half = is_bf16(a_in, op);
  STD_TORCH_CHECK(a_in.dim() == 3 && b_in.dim() == 3, op, ": a and b must be (B, T, D)");
  int64_t B = a_in.size(0), T = a_in.size(1), Da = a_in.size(2), Db = b_in.size(2);
  check_same(b_in, a_in, op, "b");
  check_shape(b_in, {B, T, Db}, op, "b");
  int64_t k = tangent_rows({&a_dot_in, &b_dot_in}, B, op);
  Tensor a = dense(a_in), b = dense(b_in);
  Maybe a_dot = activation(a_dot_in, a, k, op, "the tangent of a");
  Maybe b_dot = activation(b_dot_in, b, k, op, "the tangent of b");
  Tensor y = empty(a, {B, T, Da + Db}), y_dot = empty(a, {k, T, Da + Db});
  if (y.numel()) {
    Place place(a);
    place.backend->mp_cat({a.const_data_ptr(), b.const_data_ptr(), pointer(a_dot), pointer(b_dot),
                           y.mutable_data_ptr(), y_dot.mutable_data_ptr(), B * T, k * T, Da, Db, float(weight_a),
                           float(weight_b), half},
                          place.context);
  }
  return {y, y_dot};
}

Two mp_cat_backward_op(const Tensor& grad_in, int64_t first, double weight_a, double weight_b) {
  const char* op = "mp_cat_backward";
  bool half = is_bf16(grad_in, op);
  STD_TORCH_CHECK(grad_in.dim() == 3 && first >= 0 && first <= grad_in.size(2), op, ": grad must be (B, T, D)");
  Tensor grad = dense(grad_in);
  int64_t B = grad.size(0), T = grad.size(1), second = grad.size(2) - first;
  Tensor da = empty(grad, {B, T, first}), db = empty(grad, {B, T, second});
  if (grad.numel()) {
    Place place(grad);
    place.backend->mp_cat_backward({grad.const_data_ptr(), da.mutable_data_ptr(), db.mutable_data_ptr(), B * T, first,
                                    second, float(weight_a), float(weight_b), half},
                                   place.context);
  }
  return {da, db};
}

Three pixel_norm_op(const Tensor& x_in, const Maybe& x_dot_in, double eps) {
  const char* op = "pixel_norm";
  bool half = is_bf16(x_in, op);
  STD_TORCH_CHECK(x_in.dim() == 3, op, ": x must be (B, T, D)");
  int64_t B = x_in.size(0), T = x_in.size(1), D = x_in.size(2), k = tangent_rows({&x_dot_in}, B, op);
  Tensor x = dense(x_in);
  Maybe x_dot = activation(x_dot_in, x, k, op, "the tangent of x");
  Tensor y = empty(x, {B, T, D}), y_dot = empty(x, {k, T, D}), stats = empty_floats(x, {B, T, 2});
  if (x.numel()) {
    Place place(x);
    place.backend->pixel_norm({x.const_data_ptr(), pointer(x_dot), y.mutable_data_ptr(), y_dot.mutable_data_ptr(),
                               floats(stats), B * T, k * T, D, float(eps), half},
                              place.context);
  }
  return {y, y_dot, stats};
}

Tensor pixel_norm_backward_op(const Tensor& grad_in, const Tensor& y_in, const Tensor& stats_in) {
  const char* op = "pixel_norm_backward";
  bool half = is_bf16(y_in, op);
  STD_TORCH_CHECK(y_in.dim() == 3, op, ": y must be (B, T, D)");
  Tensor y = dense(y_in), grad = *activation(grad_in, y, y.size(0), op, "grad");
  Maybe stats = parameter(stats_in, y, {y.size(0), y.size(1), 2}, op, "stats");
  Tensor dx = empty(y, shape_of(y));
  if (y.numel()) {
    Place place(y);
    place.backend->pixel_norm_backward({grad.const_data_ptr(), y.const_data_ptr(), floats(stats),
                                        dx.mutable_data_ptr(), y.size(0) * y.size(1), y.size(2), half},
                                       place.context);
  }
  return dx;
}

constexpr int64_t kMostCells = 1024;  // numbers of a kernel, n x n

Two unit_weight_op(const Tensor& weight_in, double gain, double eps, bool low, bool last) {
  const char* op = "unit_weight";
  STD_TORCH_CHECK(weight_in.dim() == 3, op, ": weight must be (E, D, cells)");
  STD_TORCH_CHECK(!is_bf16(weight_in, op), op, ": weight must be float32");
  int64_t E = weight_in.size(0), D = weight_in.size(1), S = weight_in.size(2);
  STD_TORCH_CHECK(S <= kMostCells, op, ": a kernel of more than ", kMostCells, " numbers");
  Tensor weight = dense(weight_in), stats = empty_floats(weight, {E, 2});
  Shape shape = last ? Shape{E, S, D} : Shape{E, D, S};
  Tensor y = low ? allocated(shape, [&] { return torch::stable::new_empty(weight, shape, ScalarType::BFloat16); })
                 : empty(weight, shape);
  if (weight.numel()) {
    Place place(weight);
    place.backend->unit_weight({static_cast<const float*>(weight.const_data_ptr()), y.mutable_data_ptr(), floats(stats),
                                E, D, S, float(gain), float(eps), last, low},
                               place.context);
  }
  return {y, stats};
}

Tensor unit_weight_backward_op(const Tensor& grad_in, const Tensor& weight_in, const Tensor& stats_in, double gain,
                               bool last) {
  const char* op = "unit_weight_backward";
  bool half = is_bf16(grad_in, op);
  STD_TORCH_CHECK(weight_in.dim() == 3 && !is_bf16(weight_in, op), op, ": weight must be (E, D, cells) in float32");
  int64_t E = weight_in.size(0), D = weight_in.size(1), S = weight_in.size(2);
  check_shape(grad_in, last ? Shape{E, S, D} : Shape{E, D, S}, op, "grad");
  Tensor weight = dense(weight_in), grad = dense(grad_in), dweight = empty(weight, {E, D, S});
  Maybe stats = parameter(stats_in, weight, {E, 2}, op, "stats");
  if (weight.numel()) {
    Place place(weight);
    place.backend->unit_weight_backward({grad.const_data_ptr(), static_cast<const float*>(weight.const_data_ptr()),
                                         floats(stats), floats(dweight), E, D, S, float(gain), last, half},
                                        place.context);
  }
  return dweight;
}

Tensor random_bits_op(const Tensor& sample_in, int64_t blocks, int64_t seed, int64_t stage, int64_t step,
                      int64_t stream) {
  const char* op = "random_bits";
  STD_TORCH_CHECK(sample_in.scalar_type() == ScalarType::Long, op, ": sample must be int64");
  STD_TORCH_CHECK(sample_in.dim() == 1 && blocks >= 0, op, ": sample must be (B,), blocks not negative");
  Tensor sample = dense(sample_in), out = empty(sample, {sample.size(0), blocks, 4});
  if (out.numel()) {
    Place place(sample);
    place.backend->random_bits({static_cast<const int64_t*>(sample.const_data_ptr()),
                                static_cast<int64_t*>(out.mutable_data_ptr()), sample.size(0), blocks, uint32_t(seed),
                                uint32_t(stage), uint32_t(step), uint32_t(stream)},
                               place.context);
  }
  return out;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("gelu", TORCH_BOX(&gelu_op));
  m.impl("gelu_backward", TORCH_BOX(&gelu_backward_op));
  m.impl("modulated_norm", TORCH_BOX(&modulated_norm_op));
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward_op));
  m.impl("gated_residual", TORCH_BOX(&gated_residual_op));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_op));
  m.impl("qk_norm", TORCH_BOX(&qk_norm_op));
  m.impl("qk_norm_backward", TORCH_BOX(&qk_norm_backward_op));
  m.impl("mp_silu", TORCH_BOX(&mp_silu_op));
  m.impl("mp_silu_backward", TORCH_BOX(&mp_silu_backward_op));
  m.impl("mp_sum", TORCH_BOX(&mp_sum_op));
  m.impl("mp_sum_backward", TORCH_BOX(&mp_sum_backward_op));
  m.impl("mp_cat", TORCH_BOX(&mp_cat_op));
  m.impl("mp_cat_backward", TORCH_BOX(&mp_cat_backward_op));
  m.impl("pixel_norm", TORCH_BOX(&pixel_norm_op));
  m.impl("pixel_norm_backward", TORCH_BOX(&pixel_norm_backward_op));
  m.impl("unit_weight", TORCH_BOX(&unit_weight_op));
  m.impl("unit_weight_backward", TORCH_BOX(&unit_weight_backward_op));
  m.impl("random_bits", TORCH_BOX(&random_bits_op));
}

}  // namespace
}  // namespace cmt

// For cmt_kernels/_native, by ctypes: whether CUDA kernels could be launched beside the torch that is loaded.
extern "C" __attribute__((visibility("default"))) int cmt_finds_cuda_stream() {
  return cmt::current_cuda_stream() != nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(cmt, CPU, m) { cmt::implement(m); }
#ifdef CMT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(cmt, CUDA, m) { cmt::implement(m); }
#endif

// What the C++ ops hand to a backend: raw pointers, sizes, a stream or a way to run in parallel. No torch in here.
//
// A pointer may be null where a schema says `?`. Activations are bf16 or fp32 (`bf16`) and contiguous; the modulation
// vectors (B, D) are of the same dtype with a row stride; biases, weights, angles, statistics and sums are fp32.
// The residual stream may be fp32 beside branches in bf16: `stream_bf16` is its dtype, of what is marked (stream).
// `partials` is scratch of `chunks` partial column sums: a chunk is a run of `chunk_rows` rows, whatever the number of
// threads or multiprocessors, so the sums have the same bits everywhere on one machine.
#pragma once
#include <cstdint>

namespace cmt {

struct Context {
  void* stream;                                                                               // CUDA
  void (*parallel)(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);  // CPU
};

struct Rows {  // (B, D) with a row stride, in the dtype of the activations
  const void* data;
  int64_t stride;
};

struct Gelu {
  const void *x, *x_dot;
  const float* bias;
  void *y, *y_dot;
  int64_t rows, rows_dot, D;
  bool bf16;
};
struct GeluBackward {
  const void *grad, *x;
  const float* bias;
  void* dx;
  float *dbias, *partials;  // (D), (chunks, D)
  int64_t rows, D, chunk_rows, chunks;
  bool bf16;
};

struct ModulatedNorm {
  const void *x, *x_dot;  // (stream)
  Rows shift, scale, shift_dot, scale_dot;
  void *y, *y_dot;
  float* stats;  // (B, T, 2): mean / 2, 2 r (row_math.h, Kept)
  int64_t B, T, D, k;
  float eps;
  bool stream_bf16, bf16;
};
struct ModulatedNormBackward {
  const void *grad, *x, *through;  // x (stream); through: what else goes to x's gradient, null or (stream)
  Rows scale;
  const float* stats;
  void *dx, *dshift, *dscale;  // (B, T, D) (stream), (B, D), (B, D)
  float* partials;             // (B, chunks, 2, D)
  int64_t B, T, D, chunk_rows, chunks;
  bool stream_bf16, bf16;
};

struct GatedResidual {
  const void *x, *branch, *x_dot, *branch_dot;  // x, x_dot (stream)
  Rows gate, gate_dot;
  const float* bias;
  void *y, *y_dot;  // (stream)
  int64_t B, T, D, k;
  bool stream_bf16, bf16;
};
struct GatedResidualBackward {
  const void *grad, *branch;  // grad (stream)
  Rows gate;
  const float* bias;
  void *dbranch, *dgate;  // (B, T, D), (B, D)
  float *dbias, *partials;  // (D), (B, chunks, 2, D)
  int64_t B, T, D, chunk_rows, chunks;
  bool stream_bf16, bf16;
};

struct QkNorm {
  const void *qkv, *qkv_dot;
  const float *q_weight, *k_weight, *cos, *sin;
  void *y, *y_dot;
  int64_t B, T, H, d, k;
  float eps;
  bool bf16;
};
struct QkNormBackward {
  const void *grad, *qkv;
  const float *q_weight, *k_weight, *cos, *sin;
  void* dqkv;
  float *dq_weight, *dk_weight, *partials;  // (d), (d), (chunks, 3, d): the third is room for a head
  int64_t B, T, H, d, chunk_rows, chunks;
  float eps;
  bool bf16;
};

struct MpSilu {  // x (B, T, D), scale (B, D) or null
  const void *x, *x_dot;
  Rows scale, scale_dot;
  void *y, *y_dot;
  int64_t B, T, D, k;
  bool bf16;
};
struct MpSiluBackward {
  const void *grad, *x, *through;  // through: what else goes to x's gradient, or null
  Rows scale;
  void *dx, *dscale;  // (B, T, D), (B, D)
  float* partials;    // (B, chunks, D), of a scale
  int64_t B, T, D, chunk_rows, chunks;
  bool bf16;
};

struct MpSum {  // n numbers, of which the first n_dot have tangents; limit: infinity for none
  const void *a, *b, *a_dot, *b_dot;
  void *y, *y_dot;
  int64_t n, n_dot;
  float weight_a, weight_b, limit;
  bool bf16;
};
struct MpSumBackward {
  const void *grad, *y;  // y: null without a limit
  void *da, *db;
  int64_t n;
  float weight_a, weight_b, limit;
  bool bf16;
};

struct MpCat {  // rows of Da and of Db numbers
  const void *a, *b, *a_dot, *b_dot;
  void *y, *y_dot;
  int64_t rows, rows_dot, Da, Db;
  float weight_a, weight_b;
  bool bf16;
};
struct MpCatBackward {
  const void* grad;
  void *da, *db;
  int64_t rows, Da, Db;
  float weight_a, weight_b;
  bool bf16;
};

struct PixelNorm {
  const void *x, *x_dot;
  void *y, *y_dot;
  float* stats;  // (rows, 2): row_math.h, Length
  int64_t rows, rows_dot, D;
  float eps;
  bool bf16;
};
struct PixelNormBackward {
  const void *grad, *y;
  const float* stats;
  void* dx;
  int64_t rows, D;
  bool bf16;
};

struct UnitWeight {  // rows of D parts of S numbers; y: the same, or with `last` S parts of D, float or bf16
  const float* weight;
  void* y;
  float* stats;  // (E, 2): row_math.h, Length
  int64_t E, D, S;
  float gain, eps;
  bool last, bf16;
};
struct UnitWeightBackward {
  const void* grad;  // as y
  const float *weight, *stats;
  float* dweight;
  int64_t E, D, S;
  float gain;
  bool last, bf16;
};

struct RandomBits {
  const int64_t* sample;
  int64_t* out;  // (rows, blocks, 4)
  int64_t rows, blocks;
  uint32_t seed, stage, step, stream;
};

struct Backend {
  const char* name;
  void (*gelu)(const Gelu&, const Context&);
  void (*gelu_backward)(const GeluBackward&, const Context&);
  void (*modulated_norm)(const ModulatedNorm&, const Context&);
  void (*modulated_norm_backward)(const ModulatedNormBackward&, const Context&);
  void (*gated_residual)(const GatedResidual&, const Context&);
  void (*gated_residual_backward)(const GatedResidualBackward&, const Context&);
  void (*qk_norm)(const QkNorm&, const Context&);
  void (*qk_norm_backward)(const QkNormBackward&, const Context&);
  void (*mp_silu)(const MpSilu&, const Context&);
  void (*mp_silu_backward)(const MpSiluBackward&, const Context&);
  void (*mp_sum)(const MpSum&, const Context&);
  void (*mp_sum_backward)(const MpSumBackward&, const Context&);
  void (*mp_cat)(const MpCat&, const Context&);
  void (*mp_cat_backward)(const MpCatBackward&, const Context&);
  void (*pixel_norm)(const PixelNorm&, const Context&);
  void (*pixel_norm_backward)(const PixelNormBackward&, const Context&);
  void (*unit_weight)(const UnitWeight&, const Context&);
  void (*unit_weight_backward)(const UnitWeightBackward&, const Context&);
  void (*random_bits)(const RandomBits&, const Context&);
};

#define CMT_BACKEND(ns)                                                         \
  namespace ns {                                                                \
  void gelu(const Gelu&, const Context&);                                       \
  void gelu_backward(const GeluBackward&, const Context&);                      \
  void modulated_norm(const ModulatedNorm&, const Context&);                    \
  void modulated_norm_backward(const ModulatedNormBackward&, const Context&);   \
  void gated_residual(const GatedResidual&, const Context&);                    \
  void gated_residual_backward(const GatedResidualBackward&, const Context&);   \
  void qk_norm(const QkNorm&, const Context&);                                  \
  void qk_norm_backward(const QkNormBackward&, const Context&);                 \
  void mp_silu(const MpSilu&, const Context&);                                  \
  void mp_silu_backward(const MpSiluBackward&, const Context&);                 \
  void mp_sum(const MpSum&, const Context&);                                    \
  void mp_sum_backward(const MpSumBackward&, const Context&);                   \
  void mp_cat(const MpCat&, const Context&);                                    \
  void mp_cat_backward(const MpCatBackward&, const Context&);                   \
  void pixel_norm(const PixelNorm&, const Context&);                            \
  void pixel_norm_backward(const PixelNormBackward&, const Context&);           \
  void unit_weight(const UnitWeight&, const Context&);                          \
  void unit_weight_backward(const UnitWeightBackward&, const Context&);         \
  void random_bits(const RandomBits&, const Context&);                          \
  constexpr Backend backend{#ns,                                                \
                            gelu,           gelu_backward,                      \
                            modulated_norm, modulated_norm_backward,            \
                            gated_residual, gated_residual_backward,            \
                            qk_norm,        qk_norm_backward,                   \
                            mp_silu,        mp_silu_backward,                   \
                            mp_sum,         mp_sum_backward,                    \
                            mp_cat,         mp_cat_backward,                    \
                            pixel_norm,     pixel_norm_backward,                \
                            unit_weight,    unit_weight_backward,               \
                            random_bits};                                       \
  }

CMT_BACKEND(cpu_base)
#ifdef __x86_64__
CMT_BACKEND(cpu_v3)
CMT_BACKEND(cpu_v4)
#endif
CMT_BACKEND(cuda)
#undef CMT_BACKEND

}  // namespace cmt

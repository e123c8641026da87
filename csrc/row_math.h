// The arithmetic of the native ops, once: the CPU instantiates it with a vector of floats, CUDA with one float.
//
// Everything is fp32 whatever is stored. Compilers must not contract a*b+c by themselves (-ffp-contract=off,
// --fmad=false): where it is wanted it says `mad`, so that a value has the same bits in every kernel that computes it,
// with tangents beside it or not.
#pragma once

#ifdef __CUDACC__
#define CMT_FN static __device__ __forceinline__
#else
#define CMT_FN static inline __attribute__((always_inline))
#include "cpu/vector.h"
#endif

namespace cmt {

#ifdef __CUDACC__
CMT_FN float mad(float a, float b, float c) { return fmaf(a, b, c); }
CMT_FN float exponential(float x) { return expf(x); }               // inf from 88.7 on
CMT_FN float reciprocal(float x) { return __fdividef(1.0f, x); }    // 0 from 2^126 on
CMT_FN float within(float x, float limit) { return fminf(fmaxf(x, -limit), limit); }  // NaN is -limit
CMT_FN float rsqrt_of(float x) { return rsqrtf(x); }
CMT_FN float root_of(float x) { return sqrtf(x); }
CMT_FN float minus_size(float x) { return -fabsf(x); }
CMT_FN float where_negative(float x, float y, float otherwise) { return x < 0.0f ? y : otherwise; }
CMT_FN float clipped(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }  // NaN stays
CMT_FN float where_within(float x, float limit, float y) { return x <= limit && x >= -limit ? y : 0.0f; }
CMT_FN float where_inside(float x, float limit, float y) { return x < limit && x > -limit ? y : 0.0f; }
#else
CMT_FN float root_of(float x) { return __builtin_sqrtf(x); }
CMT_FN V minus_size(V x) { return x < 0.0f ? x : 0.0f - x; }
CMT_FN V where_negative(V x, V y, V otherwise) { return x < 0.0f ? y : otherwise; }
CMT_FN V clipped(V x, float limit) { return within(x, limit); }
CMT_FN V where_within(V x, float limit, V y) { return ((x <= limit) & (x >= -limit)) ? y : V{}; }
CMT_FN V where_inside(V x, float limit, V y) { return ((x < limit) & (x > -limit)) ? y : V{}; }
#endif

// One round of Philox4x32 (Salmon et al. 2011) on a counter, with this round's key.
constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57, kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

CMT_FN void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
  uint64_t a = uint64_t(kPhiloxM0) * c0, b = uint64_t(kPhiloxM1) * c2;
  c0 = uint32_t(b >> 32) ^ c1 ^ k0, c1 = uint32_t(b);
  c2 = uint32_t(a >> 32) ^ c3 ^ k1, c3 = uint32_t(a);
}

// gelu, tanh form: y = x p with p = (1 + tanh u) / 2 = 1 / (1 + e), e = exp(-2u), u = sqrt(2/pi) (x + c x^3).
constexpr float kSqrt2OverPi = 0.7978845608028654f;
constexpr float kCubic = 0.044715f;

template <class F>
CMT_FN F gelu_e(F x) {
  return exponential(x * mad(x * x, F{} + -2.0f * kSqrt2OverPi * kCubic, F{} + -2.0f * kSqrt2OverPi));
}
template <class F>
CMT_FN F gelu_of(F x) {
  return x * reciprocal(1.0f + gelu_e(x));
}
// dy/dx = p + 2 x p (1 - p) du/dx; 1 - p is e p, which does not cancel. Beyond +-10 the slope is 0 and 1 to fp32, so it is
// taken there: e and du stay finite for every finite x (inf times 0 would be NaN). Of an infinite x it is NaN, as in the
// formula. The value needs no such limit, and must not have it: where e is inf, p is 0 and so is y.
template <class F>
CMT_FN F gelu_slope(F x) {
  x = mad(x, F{}, within(x, 10.0f));  // 0 x: NaN for an infinite x and for NaN
  F e = gelu_e(x);
  F p = reciprocal(1.0f + e);
  F du = mad(x * x, F{} + 3.0f * kSqrt2OverPi * kCubic, F{} + kSqrt2OverPi);
  return mad(2.0f * x * du, e * p * p, p);
}

// Of a row whose sum of squares overflows fp32, `size` is 2^-80, else 1: the norms take mean and 1/std of x size. There
// the largest of the row is between 2^-27 and 2^48 (of up to 4096 numbers), so that no square overflows or vanishes, and
// eps size^2 is nothing beside their mean. A row with an infinity or a NaN has no finite sum at any size.
constexpr float kShrunk = 0x1p-80f;
constexpr float kLargest = 3.402823466e38f;

// modulated_norm: xh = (x size - mean) r, y = xh (1 + scale) + shift; r size is 1/std of x.
template <class F>
CMT_FN F normalised(F x, float size, float mean, float r) {
  return mad(x, F{} + size, F{} - mean) * r;
}
// What is kept for the backward is mean and 1/std of x itself, as half the mean and twice 1/std: x - mean may be twice the
// largest number, half of it is not.
struct Kept {
  float half_mean, twice_r;
};
CMT_FN Kept kept(float size, float mean, float r) { return {mean * (0.5f / size), 2.0f * r * size}; }
template <class F>
CMT_FN F normalised_again(F x, Kept k) {
  return mad(x, F{} + 0.5f, F{} - k.half_mean) * k.twice_r;
}
template <class F>
CMT_FN F modulated(F xh, F scale, F shift) {
  return mad(xh, 1.0f + scale, shift);
}
// The Jacobian of x -> xh is symmetric: the same line is the tangent (v = x_dot) and the backward (v = w = dy (1 + scale)).
// r: 1/std of x itself.
// mean_v, mean_xh_v: means over the row.
template <class F>
CMT_FN F normalise_along(F v, F xh, float r, float mean_v, float mean_xh_v) {
  return r * (v - mean_v - xh * mean_xh_v);
}

// mp_silu: y = s q / 0.596 with s = x (1 + scale) and q = sigmoid(s). Of e = exp(-|s|), which is never infinite, and
// p = 1 / (1 + e) are q and 1 - q made: p and e p, the one or the other.
constexpr float kOverMagnitude = 1.0f / 0.596f;

template <class F>
CMT_FN F silu_of(F s) {
  F e = exponential(minus_size(s)), p = reciprocal(1.0f + e);
  return s * where_negative(s, e * p, p) * kOverMagnitude;
}
template <class F>
CMT_FN F silu_slope(F s) {  // dy/ds = (q + s q (1 - q)) / 0.596
  F e = exponential(minus_size(s)), p = reciprocal(1.0f + e);
  return mad(s * p, e * p, where_negative(s, e * p, p)) * kOverMagnitude;
}

// pixel_norm: n = eps + |x| / sqrt(D), y = x / n. What is kept is 8 / n, which is a normal number for every finite n, and
// n over the length alone, 0 where that is 0: its gradient is taken as 0 there.
struct Length {
  float eighth_r, ratio;
};
CMT_FN Length length_of(float mean_square, float size, float eps) {  // of x size; size is 1 or kShrunk
  float length = root_of(mean_square), n = length + eps * size;
  return {8.0f * size / n, length > 0.0f ? n / length : 0.0f};
}
template <class F>
CMT_FN F over_length(F x, Length l) {
  return x * l.eighth_r * 0.125f;
}
// The Jacobian of x -> y is symmetric: the same line is the tangent and the backward. mean_y_v: mean of y v over the row.
template <class F>
CMT_FN F over_length_along(F v, F y, Length l, float mean_y_v) {
  return over_length(v - y * (mean_y_v * l.ratio), l);
}

// qk_norm: xh = x size r, y = w xh; the same Jacobian without the mean.
template <class F>
CMT_FN F rms_along(F v, F xh, float r, float mean_xh_v) {
  return r * (v - xh * mean_xh_v);
}
// RoPE turns (a, b) by the angle; its transpose turns back.
template <class F>
CMT_FN void rotate(F& a, F& b, F cos, F sin) {
  F turned = a * cos - b * sin;
  b = b * cos + a * sin;
  a = turned;
}

}  // namespace cmt

// A vector of floats as the compiler's own vector type: as wide as the instruction set of this translation unit
// (CMT_LANES floats). Every function is static and always inlined: the same source is compiled once per instruction set.
#pragma once
#include <cstdint>
#include <cstring>

#ifndef CMT_ISA
#define CMT_ISA cpu_base
#define CMT_LANES 4
#endif

namespace cmt {

struct bf16 {
  uint16_t bits;
};

typedef float V __attribute__((vector_size(4 * CMT_LANES)));
typedef int32_t VInt __attribute__((vector_size(4 * CMT_LANES)));
typedef uint32_t VUint __attribute__((vector_size(4 * CMT_LANES)));
typedef uint16_t VHalf __attribute__((vector_size(2 * CMT_LANES)));

template <class To, class From>
static inline __attribute__((always_inline)) To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

CMT_FN V load(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof(V));
  return x;
}
CMT_FN V load(const bf16* p) {
  VHalf h;
  std::memcpy(&h, p, sizeof(VHalf));
  return bits_of<V>(__builtin_convertvector(h, VUint) << 16);
}
CMT_FN void store(float* p, V x) { std::memcpy(p, &x, sizeof(V)); }
CMT_FN void store(bf16* p, V x) {  // to nearest, ties to even; a NaN stays one
  VUint u = bits_of<VUint>(x);
  VUint rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  VUint nan = (u >> 16) | 0x40u;
  VUint is_nan = bits_of<VUint>(VInt(x != x));
  VHalf h = __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), VHalf);
  std::memcpy(p, &h, sizeof(VHalf));
}
// The last n < CMT_LANES columns of a row: the lanes beyond are 0 and are not stored.
template <class T>
CMT_FN V load(const T* p, int64_t n) {
  if (n == CMT_LANES) return load(p);
  T buffer[CMT_LANES] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
CMT_FN void store(T* p, V x, int64_t n) {
  if (n == CMT_LANES) return store(p, x);
  T buffer[CMT_LANES];
  store(buffer, x);
  std::memcpy(p, buffer, n * sizeof(T));
}
CMT_FN V load_or(const float* p, int64_t i, int64_t n, float otherwise) {
  return p ? load(p + i, n) : V{} + otherwise;
}
// Lanes beyond n set to 0, before a sum over a row.
CMT_FN V first(V x, int64_t n) {
  if (n == CMT_LANES) return x;
  for (int64_t i = n; i < CMT_LANES; ++i) x[i] = 0.0f;
  return x;
}
CMT_FN float sum(V x) {
  float lanes[CMT_LANES];
  std::memcpy(lanes, &x, sizeof(V));
  for (int width = CMT_LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// body(i, n) over the columns of a row, n at a time.
template <class Body>
CMT_FN void columns(int64_t D, Body body) {
  int64_t i = 0;
  for (; i + CMT_LANES <= D; i += CMT_LANES) body(i, int64_t(CMT_LANES));
  if (i < D) body(i, D - i);
}

CMT_FN V mad(V a, V b, V c) { return a * b + c; }
CMT_FN V reciprocal(V x) { return 1.0f / x; }
CMT_FN float rsqrt_of(float x) { return 1.0f / __builtin_sqrtf(x); }
CMT_FN V within(V x, float limit) {  // NaN stays
  x = x > limit ? V{} + limit : x;
  return x < -limit ? V{} - limit : x;
}
// exp(x) = 2^n exp(r), |r| <= ln2 / 2: Taylor to r^7 / 7!, off by under 2e-9 there. Infinite from 88.4 on (n = 128) and 0
// from -87.7 on (n = -127), as fp32's own exponents end; NaN stays.
CMT_FN V exponential(V x) {
  x = x > 89.0f ? V{} + 89.0f : x;
  x = x < -88.0f ? V{} - 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer, in the low bits
  V shifted = x * 1.44269504088896341f + magic;
  V n = shifted - magic;
  V r = x - n * 0.693359375f - n * -2.12194440e-4f;
  V p = V{} + 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  VInt power = (bits_of<VInt>(shifted) - 0x4b400000 + 127) << 23;
  return p * bits_of<V>(power);
}

// Runs body(begin, end) over n tasks on torch's threads.
template <class Context, class Body>
CMT_FN void parallel(const Context& context, int64_t n, int64_t grain, const Body& body) {
  context.parallel(
      n, grain, [](int64_t begin, int64_t end, void* f) { (*static_cast<const Body*>(f))(begin, end); },
      const_cast<Body*>(&body));
}
// The rows worth a thread of their own: about 32768 numbers.
CMT_FN int64_t grain_of(int64_t D) { return 1 + 32768 / (D + 1); }

}  // namespace cmt

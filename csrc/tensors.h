// From tensors of the stable ABI to the raw pointers of kernels.h: checks, layouts, scratch, and which backend runs.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_stream.h"
#include "kernels.h"

namespace cmt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// The instruction set of the CPU kernels: the widest this processor has, or what CMT_ISA (base, v3, v4) asks for. A
// library built for tests (CMT_EMULATED) has one more: csrc/cuda, compiled for the CPU.
inline const Backend& cpu_backend() {
  static const Backend& chosen = []() -> const Backend& {
    const char* asked = std::getenv("CMT_ISA");
    std::string isa = asked ? asked : "";
#ifdef CMT_EMULATED
    if (isa == "emu") return cuda::backend;
#endif
#ifdef __x86_64__
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512cd");
    STD_TORCH_CHECK(isa != "v4" || v4, "CMT_ISA=v4 asks for AVX-512, which this processor does not have");
    STD_TORCH_CHECK(isa != "v3" || v3, "CMT_ISA=v3 asks for AVX2, which this processor does not have");
    if (isa == "v4" || (isa.empty() && v4)) return cpu_v4::backend;
    if (isa == "v3" || (isa.empty() && v3)) return cpu_v3::backend;
#endif
    STD_TORCH_CHECK(isa.empty() || isa == "base", "CMT_ISA=", isa, ": this build has base, and v3 and v4 on x86-64");
    return cpu_base::backend;
  }();
  return chosen;
}

inline void run_parallel(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, body, context));
}

// Where one call runs. Holds the device guard while it does.
struct Place {
  explicit Place(const Tensor& x) : backend(x.is_cuda() ? nullptr : &cpu_backend()), context{nullptr, run_parallel} {
    if (!x.is_cuda()) return;
#if defined(CMT_EMULATED)
    STD_TORCH_CHECK(false, "the CUDA kernels of this library were compiled for the CPU");
#elif defined(CMT_WITH_CUDA)
    CurrentCudaStream current = current_cuda_stream();
    STD_TORCH_CHECK(current, "a CUDA tensor, and no library that is loaded tells torch's CUDA stream");
    backend = &cuda::backend;
    guard.emplace(x.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(current(x.get_device_index(), &context.stream));
#else
    STD_TORCH_CHECK(false, "the native ops were built without CUDA");
#endif
  }
  const Backend* backend;
  Context context;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

inline bool is_bf16(const Tensor& x, const char* op) {
  bool yes = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(yes || x.scalar_type() == ScalarType::Float, op, ": the native op takes float32 and bfloat16");
  return yes;
}

// The dtype of what stands beside a residual stream: the stream's own, or bf16 beside fp32.
inline bool is_bf16_beside(const Tensor& y, const Tensor& stream, const char* op, const char* name) {
  bool half = is_bf16(y, op);
  STD_TORCH_CHECK(half || !is_bf16(stream, op), op, ": ", name, " in float32 beside a stream in bfloat16");
  return half;
}

inline void check_same(const Tensor& y, const Tensor& x, const char* op, const char* name, const Tensor* of = nullptr) {
  STD_TORCH_CHECK(y.scalar_type() == (of ? *of : x).scalar_type(), op, ": ", name,
                  of ? " has another dtype than the argument it goes with" : " has another dtype than the first argument");
  STD_TORCH_CHECK(y.device() == x.device(), op, ": ", name, " is on another device than the first argument");
}

inline void check_shape(const Tensor& x, const Shape& shape, const char* op, const char* name) {
  bool same = x.dim() == int64_t(shape.size());
  for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape");
}

inline Shape shape_of(const Tensor& x) {
  Shape shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  return shape;
}

// What `make` allocates. The stable ABI passes on that a call failed, not why: no memory, or an earlier error of the GPU.
// `_native.told` (Python) tells which.
template <class Make>
Tensor allocated(const Shape& shape, Make make) {
  try {
    return make();
  } catch (const std::exception&) {
    std::string text;
    for (int64_t size : shape) text += (text.empty() ? "" : " x ") + std::to_string(size);
    throw std::runtime_error("cmt: not allocated: a tensor of " + text + " numbers");
  }
}
inline Tensor dense(const Tensor& x) {
  return allocated(shape_of(x), [&] { return torch::stable::contiguous(x); });
}

// An activation shaped like `x`, contiguous, of the dtype of x or of `of`; a tangent has k rows instead.
inline Maybe activation(const Maybe& y, const Tensor& x, int64_t rows, const char* op, const char* name,
                        const Tensor* of = nullptr) {
  if (!y) return std::nullopt;
  check_same(*y, x, op, name, of);
  Shape shape = shape_of(x);
  shape[0] = rows;
  check_shape(*y, shape, op, name);
  return dense(*y);
}

// A modulation vector (rows, D) whose last dimension is dense: the chunks of one adaLN output are taken as they are.
inline Maybe modulation(const Maybe& m, const Tensor& x, int64_t rows, const char* op, const char* name,
                        const Tensor* of = nullptr) {
  if (!m) return std::nullopt;
  check_same(*m, x, op, name, of);
  check_shape(*m, {rows, x.size(x.dim() - 1)}, op, name);
  return m->stride(1) == 1 || m->size(1) <= 1 ? *m : dense(*m);
}

// A parameter or table in fp32, contiguous.
inline Maybe parameter(const Maybe& p, const Tensor& x, const Shape& shape, const char* op, const char* name) {
  if (!p) return std::nullopt;
  STD_TORCH_CHECK(p->scalar_type() == ScalarType::Float, op, ": ", name, " must be float32 here");
  STD_TORCH_CHECK(p->device() == x.device(), op, ": ", name, " is on another device than the first argument");
  check_shape(*p, shape, op, name);
  return dense(*p);
}

// k: rows of the tangents, which must agree; 0 if there are none.
inline int64_t tangent_rows(std::initializer_list<const Maybe*> tangents, int64_t B, const char* op) {
  int64_t k = -1;
  for (const Maybe* t : tangents)
    if (*t) {
      int64_t rows = (*t)->dim() ? (*t)->size(0) : -1;
      STD_TORCH_CHECK(rows >= 0 && rows <= B && (k < 0 || rows == k), op, ": tangents must share k <= B rows");
      k = rows;
    }
  return k < 0 ? 0 : k;
}

inline const void* pointer(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }
inline const float* floats(const Maybe& x) { return static_cast<const float*>(pointer(x)); }
inline Rows rows(const Maybe& m) { return {pointer(m), m ? m->stride(0) : 0}; }

inline Tensor empty(const Tensor& like, const Shape& shape) {
  return allocated(shape, [&] { return torch::stable::new_empty(like, shape); });
}
inline Tensor empty_floats(const Tensor& like, const Shape& shape) {
  return allocated(shape, [&] { return torch::stable::new_empty(like, shape, ScalarType::Float); });
}
inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

// Rows of one partial sum and how many there are: a function of the shape alone.
struct Chunks {
  Chunks(int64_t n, int64_t at_most) : rows(n / at_most + 1 > 32 ? n / at_most + 1 : 32), count((n + rows - 1) / rows) {}
  int64_t rows, count;
};

}  // namespace cmt

// The CUDA stream that torch is using now, by a function that is looked up when it is first wanted.
//
// `aoti_torch_get_current_cuda_stream` lies in libtorch_cuda.so. The library is linked beside any torch, one without CUDA
// too, so it cannot name that as a library it needs; and Python loads it with RTLD_LOCAL, where a weak symbol does not
// see it. So the library that is loaded already is asked by its name; nothing is ever loaded for it. (From torch 2.13 on
// the stable ABI has a stream's native handle; this builds for 2.11.)
#pragma once
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace cmt {

using CurrentCudaStream = AOTITorchError (*)(int32_t device, void** stream);

inline CurrentCudaStream find_current_cuda_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  void* symbol = dlsym(RTLD_DEFAULT, name);  // loaded with RTLD_GLOBAL, or linked into the program
  if (!symbol)
    if (void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY)) symbol = dlsym(library, name);
  return reinterpret_cast<CurrentCudaStream>(symbol);
}

// Null where it is in no library that is loaded. Looked up once.
inline CurrentCudaStream current_cuda_stream() {
  static const CurrentCudaStream found = find_current_cuda_stream();
  return found;
}

}  // namespace cmt

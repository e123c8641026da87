// A fiber: a function on a stack of its own that gives the processor back where it likes and goes on from there later.
//
// ucontext begins one; after that _setjmp and _longjmp switch, which are no system calls. One scheduler at a time
// (block.h holds a lock). AddressSanitizer is told of every switch: it has to know which stack is in use.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

constexpr size_t kPage = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 * 1024;  // redzones around every local
#else
constexpr size_t kStack = 64 * 1024;
#endif

struct Fiber {
  char* stack = nullptr;
  bool begun = false;
  ucontext_t first;
  jmp_buf here;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

inline Fiber* running = nullptr;
inline void (*fiber_body)() = nullptr;  // never returns: it yields for the last time instead
inline jmp_buf scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;

inline void leaving(void** fake_stack, const void* next, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, next, bytes);
#endif
}
inline void arrived(void* fake_stack, const void** from, size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, from, bytes);
#endif
}

// Back to the scheduler, until it resumes this fiber.
__attribute__((noinline)) inline void yield() {
  leaving(&running->fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (!_setjmp(running->here)) _longjmp(scheduler, 1);
  arrived(running->fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

inline void begin() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  fiber_body();
}

// Run a fiber until it yields.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  running = &fiber;
  leaving(&scheduler_fake_stack, fiber.stack, kStack);
  if (!_setjmp(scheduler)) {
    if (running->begun) _longjmp(running->here, 1);
    running->begun = true;
    getcontext(&running->first);
    running->first.uc_stack.ss_sp = running->stack;
    running->first.uc_stack.ss_size = kStack;
    makecontext(&running->first, begin, 0);
    setcontext(&running->first);
  }
  arrived(scheduler_fake_stack, nullptr, nullptr);
}

// A stack with a page below it that faults: a kernel that overflows it stops at once.
inline char* new_stack() {
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) {
    perror("emulated kernel: no stack for a thread");
    abort();
  }
  return static_cast<char*>(memory) + kPage;
}

}  // namespace emulation

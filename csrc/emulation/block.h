// A CUDA launch on a CPU: block after block, a block's threads as fibers that run one after another between the points
// where they wait for each other.
//
// It is deterministic, and looks for what a GPU does not say:
//   * CMT_EMULATED_ORDER=reverse runs blocks and threads from the last to the first, it is read at every launch: a kernel
//     without races gives the same bits both ways;
//   * shared memory is NaNs at the start of a block;
//   * a shuffle that not every lane of the warp reaches, a barrier that not every thread reaches, and a 16-byte access
//     at another address than a multiple of 16 stop the process and say where;
//   * a launch that a GPU refuses is refused: cudaGetLastError() says so.
// Not emulated: partial shuffle masks (refused), atomics, the timing of real races.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kSharedBytes = 48 * 1024;  // without cudaFuncSetAttribute

enum class State { kReady, kInShuffle, kAtBarrier, kReturned };
struct Thread {
  Fiber fiber;
  dim3 index;
  State state = State::kReady;
  unsigned partner = 0;            // lane whose value this one gets
  uint32_t sent = 0, received = 0;
};

// One launch at a time: what a kernel sees is global, as __shared__ arrays are.
inline std::mutex one_launch;
inline const char* kernel = "";
inline dim3 thread_index, block_index, block_dim, grid_dim;
inline std::deque<Thread> pool;  // fibers are kept from launch to launch
inline unsigned threads = 0, live = 0, at_barrier = 0, current = 0;
inline const std::function<void()>* kernel_body = nullptr;
inline std::vector<const void*> poisoned;
inline std::vector<float> dynamic;
inline cudaError_t last_error = cudaSuccess;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated kernel %s, block (%u, %u, %u), thread (%u, %u, %u): %s\n", kernel, block_index.x,
          block_index.y, block_index.z, thread_index.x, thread_index.y, thread_index.z, what);
  abort();
}

inline void open_barrier_if_full() {  // a thread that has returned counts as arrived
  if (!at_barrier || at_barrier < live) return;
  at_barrier = 0;
  for (unsigned i = 0; i < threads; ++i)
    if (pool[i].state == State::kAtBarrier) pool[i].state = State::kReady;
}
inline void sync_threads() {
  ++at_barrier;
  pool[current].state = State::kAtBarrier;
  open_barrier_if_full();
  if (pool[current].state == State::kAtBarrier) yield();
}

inline unsigned first_of_warp() { return current / kLanes * kLanes; }
inline unsigned lanes_of_warp() { return std::min(kLanes, threads - first_of_warp()); }

// The last lane to come hands every lane its value, so a lane may go on, and even return, before the others wake.
inline void exchange(unsigned first, unsigned lanes) {
  unsigned waiting = 0, returned = 0;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    waiting += pool[first + lane].state == State::kInShuffle;
    returned += pool[first + lane].state == State::kReturned;
  }
  if (waiting && returned) fail("a shuffle after a lane of the warp has returned");
  if (waiting < lanes) return;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    Thread& t = pool[first + lane];
    t.received = t.partner < lanes ? pool[first + t.partner].sent : 0xffffffffu;
    t.state = State::kReady;
  }
}
template <class T>
T shuffle_xor(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) == 4, "a shuffle of 4 bytes");
  if (mask != 0xffffffffu) fail("a shuffle with a partial mask, which is not emulated");
  Thread& t = pool[current];
  std::memcpy(&t.sent, &value, 4);
  t.partner = (current - first_of_warp()) ^ unsigned(lane_mask);
  t.state = State::kInShuffle;
  exchange(first_of_warp(), lanes_of_warp());
  if (t.state == State::kInShuffle) yield();
  std::memcpy(&value, &t.received, 4);
  return value;
}

template <class T>
T& shared_memory(T& memory) {  // filled with NaNs by the first thread of a block that asks
  for (const void* p : poisoned)
    if (p == &memory) return memory;
  poisoned.push_back(&memory);
  std::memset(static_cast<void*>(&memory), 0xff, sizeof(T));
  return memory;
}
inline float* dynamic_shared() { return dynamic.data(); }

inline void run_threads() {  // the body of every fiber
  for (;;) {
    (*kernel_body)();
    --live;
    pool[current].state = State::kReturned;
    exchange(first_of_warp(), lanes_of_warp());  // whoever waits in a shuffle waits for this lane
    open_barrier_if_full();
    yield();
  }
}

inline void run_block(dim3 index, bool reverse) {
  block_index = index, live = threads, at_barrier = 0;
  poisoned.clear();
  std::fill(dynamic.begin(), dynamic.end(), __builtin_nanf(""));
  for (unsigned i = 0; i < threads; ++i) pool[i].state = State::kReady;
  while (live) {
    bool progress = false;
    for (unsigned i = 0; i < threads; ++i) {
      current = reverse ? threads - 1 - i : i;
      if (pool[current].state != State::kReady) continue;
      thread_index = pool[current].index;
      progress = true;
      resume(pool[current].fiber);
    }
    if (!progress) fail("threads wait for each other: a barrier or a shuffle that not all of them reach");
  }
}

inline void run_blocks(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, const std::function<void()>& body) {
  std::lock_guard<std::mutex> held(one_launch);
  const char* order = std::getenv("CMT_EMULATED_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse");
  if (order && !reverse && std::strcmp(order, "forward")) fail("CMT_EMULATED_ORDER may be forward or reverse");
  unsigned n = block.x * block.y * block.z;
  bool some = grid.x && grid.y && grid.z && n;
  if (!some || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535 || n > 1024 || block.z > 64) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (dynamic_bytes > kSharedBytes) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  kernel = name, kernel_body = &body, fiber_body = run_threads;
  threads = n, block_dim = block, grid_dim = grid;
  dynamic.assign((dynamic_bytes + 3) / 4, 0.0f);
  while (pool.size() < n) pool.emplace_back().fiber.stack = new_stack();
  for (unsigned i = 0; i < n; ++i) pool[i].index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t k = 0; k < blocks; ++k) {
    uint64_t i = reverse ? blocks - 1 - k : k;
    run_block(dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t(grid.x) * grid.y)), reverse);
  }
}

// Every kernel that the sources can launch, each instance of a template its own, known when the library is loaded. At the
// end of the process `launches<tab>kernel` of each is added to the file that CMT_EMULATED_LAUNCHES names: a test sees what
// it left out.
struct Instance {
  const std::string name;
  uint64_t launches = 0;
  explicit Instance(std::string name) : name(std::move(name)) {}
  Instance(const Instance&) = delete;
  ~Instance() {
    const char* path = std::getenv("CMT_EMULATED_LAUNCHES");
    FILE* file = path ? std::fopen(path, "a") : nullptr;
    if (!file) return;
    std::fprintf(file, "%llu\t%s\n", static_cast<unsigned long long>(launches), name.c_str());
    std::fclose(file);
  }
};
template <auto kKernel>
struct InstanceOf {
  static std::string name() {  // "... [with auto kKernel = norm_kernel<float, 2, true>; ...]"
    std::string all = __PRETTY_FUNCTION__;
    size_t from = all.find("kKernel = ") + 10;
    return all.substr(from, all.find_first_of(";]", from) - from);
  }
  static inline Instance instance{name()};
};

// kernel<<<grid, block, dynamic_bytes, stream>>>(arguments): body calls the kernel.
template <auto kKernel, class Body>
void launch(dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t, const Body& body) {
  Instance& instance = InstanceOf<kKernel>::instance;
  ++instance.launches;
  run_blocks(instance.name.c_str(), grid, block, dynamic_bytes, body);
}

}  // namespace emulation

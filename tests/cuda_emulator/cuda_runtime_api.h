// What the kernels of csrc/cuda need of the CUDA runtime, on a CPU: to compare them with the reference
// without a GPU.
//
// Blocks run one after the other in random order. A block's threads are fibers: between two points at which
// they wait for one another they run one at a time, in random order. Shared memory holds random bytes when a
// block begins. What CUDA leaves undefined ends the process: a warp operation or a barrier that not all
// threads reach at one place, a deadlock, a launch of impossible size. One argument a kernel, full masks and
// whole warps are all that is supported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))

enum cudaError_t { cudaSuccess = 0 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The linker's names for the ends of the section; absent where no kernel has shared memory.
extern "C" __attribute__((weak, visibility("hidden"))) char __start_emulated_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) char __stop_emulated_shared[];

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 1 << 16;

enum class State { kReady, kAtBarrier, kAtWarp, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  int line;          // where it waits
  uint64_t offered;  // to the other lanes of its warp
};

struct Warp {
  uint64_t values[kWarp];  // what its lanes offered at the last warp operation
};

struct Machine {
  dim3 grid, block, block_index;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned current = 0;
  ucontext_t scheduler;
  uint64_t random = 1;
  void (*run_thread)(const void*) = nullptr;
  const void* work = nullptr;
};
inline Machine machine;

[[noreturn]] inline void stop(const char* reason) {
  std::fprintf(stderr, "cuda_emulator: %s\n", reason);
  std::abort();
}

// xorshift64 (Marsaglia 2003).
inline uint64_t next_random() {
  uint64_t& x = machine.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

inline void wait_at(State state, int line) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  fiber.line = line;
  swapcontext(&fiber.context, &machine.scheduler);
}

inline void run_fiber() {
  machine.run_thread(machine.work);
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = State::kDone;
  swapcontext(&fiber.context, &machine.scheduler);
}

// Fibers that wait with one another go on, where all of them are there; returns how many do.
inline unsigned release(unsigned begin, unsigned end, State state, const char* reason) {
  unsigned waiting = 0;
  int line = -1;
  for (unsigned i = begin; i < end; ++i) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state != state) continue;
    if (line >= 0 && line != fiber.line) stop(reason);
    line = fiber.line;
    ++waiting;
  }
  if (waiting == 0) return 0;
  if (waiting < end - begin) stop(reason);
  for (unsigned i = begin; i < end; ++i) {
    machine.warps[i / kWarp].values[i % kWarp] = machine.fibers[i].offered;
    machine.fibers[i].state = State::kReady;
  }
  return waiting;
}

inline void begin_fibers(unsigned threads) {
  machine.fibers.resize(std::max<size_t>(machine.fibers.size(), threads));
  machine.warps.resize(machine.fibers.size() / kWarp);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
    fiber.state = State::kReady;
  }
  for (char* p = __start_emulated_shared; p < __stop_emulated_shared; ++p)
    *p = static_cast<char>(next_random());
}

inline void run_block() {
  const unsigned threads = machine.block.x;
  begin_fibers(threads);
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    for (unsigned i = 0; i < threads; ++i)
      if (machine.fibers[i].state == State::kReady) ready.push_back(i);
    while (!ready.empty()) {
      std::swap(ready[next_random() % ready.size()], ready.back());
      machine.current = ready.back();
      ready.pop_back();
      swapcontext(&machine.scheduler, &machine.fibers[machine.current].context);
    }
    unsigned released = 0;
    for (unsigned first = 0; first < threads; first += kWarp)
      released += release(first, first + kWarp, State::kAtWarp,
                          "a warp operation that its lanes do not all reach together");
    if (released == 0)
      released =
          release(0, threads, State::kAtBarrier, "a barrier that the threads do not all reach together");
    if (released == 0) return;
  }
}

template <typename Argument>
void launch(void (*kernel)(Argument), dim3 grid, dim3 block, const Argument& argument) {
  const bool fits = grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 &&
                    grid.z <= 65535 && block.x >= kWarp && block.x <= 1024 && block.x % kWarp == 0 &&
                    block.y == 1 && block.z == 1;
  if (!fits) stop("a launch of impossible size");
  using Work = std::pair<void (*)(Argument), Argument>;
  const Work work{kernel, argument};
  machine.grid = grid;
  machine.block = block;
  machine.work = &work;
  machine.run_thread = [](const void* given) {
    const Work& one = *static_cast<const Work*>(given);
    one.first(one.second);
  };
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = i;
  for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[next_random() % i]);
  for (const uint64_t b : blocks) {
    machine.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block();
  }
}

inline unsigned lane() { return machine.current % kWarp; }

// Offers a value to the other lanes and waits for theirs.
inline const uint64_t* exchange(unsigned mask, uint64_t value, int line) {
  if (mask != 0xffffffffu) stop("a warp operation of some lanes only");
  machine.fibers[machine.current].offered = value;
  wait_at(State::kAtWarp, line);
  return machine.warps[machine.current / kWarp].values;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, line)[from % kWarp];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define threadIdx (dim3(emulator::machine.current, 0, 0))
#define blockIdx (emulator::machine.block_index)
#define gridDim (emulator::machine.grid)
#define blockDim (emulator::machine.block)

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int line = __builtin_LINE()) {
  return emulator::shuffle(mask, value, static_cast<unsigned>(lane), line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle(mask, value, lane >= delta ? lane - delta : lane, line);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, int line = __builtin_LINE()) {
  const uint64_t* values = emulator::exchange(mask, predicate, line);
  unsigned bits = 0;
  for (unsigned i = 0; i < emulator::kWarp; ++i) bits |= static_cast<unsigned>(values[i] != 0) << i;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emulator::exchange(mask, 0, line);
}
inline void __syncthreads(int line = __builtin_LINE()) {
  emulator::wait_at(emulator::State::kAtBarrier, line);
}

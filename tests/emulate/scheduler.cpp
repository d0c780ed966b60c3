// The scheduler.  Every thread of a block is a fiber; blocks run one after another, those of a
// cooperative launch together, all on one thread of the host.  Fibers change only where a thread
// waits for others or returns.  The order of threads and blocks is chosen from outside, so that a
// result that depends on it is found, and so is the most blocks of a grid, so that loops over a
// grid's items run more than once.
//
// Shared memory holds garbage and comes from the heap, for the address sanitizer.  For the thread
// sanitizer every thread of every block is one of its own, which only barriers order.  This file
// itself is compiled without sanitizers: what it does between fibers is no race.

#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "traffic.h"

extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
void cuda_on_cpu_switch(void** from, void* to);
}

#ifndef __x86_64__
#error "written for x86-64"
#endif
__asm__(
    ".text\n.type cuda_on_cpu_switch,@function\ncuda_on_cpu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size cuda_on_cpu_switch,.-cuda_on_cpu_switch\n");

namespace cuda_on_cpu {

Registers registers;
int guards = 0;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kWarp = 32;
constexpr int64_t kShared = 48 << 10;

enum class Waits { kNot, kForWarp, kForBlock, kForGrid, kDone };

struct Fiber {
  char* stack = nullptr;  // null: the host's own
  void *position = nullptr, *fake = nullptr, *tsan = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
  Waits waits = Waits::kNot;
  const char* file = "";  // where it waits
  int line = 0;
  size_t variables = 0, exchanges = 0;
};

struct Block {
  Dim3 index;
  std::vector<Fiber> threads;  // their stacks are used again
  std::vector<std::array<std::array<uint64_t, kWarp>, 2>> exchanged;  // of every warp
  std::vector<std::unique_ptr<char[]>> shared;
  int64_t shared_bytes = 0;
  int votes = 0, result = 0;
  unsigned phase = 0;
  char barriers[2] = {};  // some threads wait at the next one while others leave the last
};

struct State {
  uint64_t order = 0, most_blocks = UINT64_MAX;
  std::string skipped;  // file:line of a barrier that does nothing
  std::mt19937_64 random;
  Fiber host;
  std::deque<Block> blocks;
  Block* block = nullptr;
  Fiber* current = nullptr;
  void (*call)(void*) = nullptr;
  void* kernel = nullptr;
  unsigned threads = 0, grid_phase = 0;
  char grid_barriers[2] = {}, end = 0;
  bool running = false;
  std::string error;  // of a fiber, which cannot throw
  int64_t synchronisations = 0;
} state;

template <typename... Parts>
void check(bool right, const Parts&... parts) {
  if (right) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string place(const char* file, int line) {
  const char* name = std::strrchr(file, '/');
  return std::string(name == nullptr ? file : name + 1) + ":" + std::to_string(line);
}

std::vector<unsigned> permutation(unsigned count) {
  std::vector<unsigned> out(count);
  for (unsigned i = 0; i < count; ++i) out[i] = state.order == 1 ? count - 1 - i : i;
  if (state.order > 1) std::shuffle(out.begin(), out.end(), state.random);
  return out;
}

void switch_to(Fiber& from, Fiber& to) {
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(from.waits == Waits::kDone ? nullptr : &from.fake, to.bottom,
                                   to.size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);
  cuda_on_cpu_switch(&from.position, to.position);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

void acquire(void* what) {
  if (__tsan_acquire) __tsan_acquire(what);
}

void release(void* what) {
  if (__tsan_release) __tsan_release(what);
}

[[noreturn]] void leave() {
  Fiber& self = *state.current;
  self.waits = Waits::kDone;
  switch_to(self, state.host);
  std::abort();
}

void enter() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &state.host.bottom, &state.host.size);
  acquire(&state.host);
  state.call(state.kernel);
  release(&state.end);
  leave();
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(stack != MAP_FAILED, "no memory for a stack");
    fiber.stack = static_cast<char*>(stack);
    fiber.bottom = stack;
    fiber.size = kStack;
  }
  fiber.waits = Waits::kNot;
  fiber.variables = fiber.exchanges = 0;
  if (__tsan_create_fiber) {
    fiber.tsan = __tsan_create_fiber(0);
    // The sanitizer forgets what the last thread with this stack did there.
    constexpr size_t used = 16 << 10;
    mmap(fiber.stack + kStack - used, used, PROT_READ | PROT_WRITE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  }
  void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 1;  // aligned as after a call
  *--top = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.position = top;
}

void resume(Block& block, unsigned t) {
  Fiber& fiber = block.threads[t];
  const Dim3& size = registers.block_dim;
  registers.thread_index = Dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
  registers.block_index = block.index;
  state.block = &block;
  state.current = &fiber;
  fiber.waits = Waits::kNot;
  traffic::begin_thread(t, fiber.stack, fiber.stack + kStack);
  switch_to(state.host, fiber);
  traffic::end_thread();
  check(state.error.empty(), state.error);
}

// Runs on those warps whose threads are all at an exchange; false if there is none.
bool release_warps(Block& block) {
  bool released = false;
  for (unsigned first = 0; first < state.threads; first += kWarp) {
    const auto begin = block.threads.begin() + first;
    const auto end = block.threads.begin() + std::min<unsigned>(first + kWarp, state.threads);
    const auto waiting = std::count_if(
        begin, end, [](const Fiber& fiber) { return fiber.waits == Waits::kForWarp; });
    if (waiting == 0) continue;
    check(waiting == end - begin, "some threads of a warp wait at ",
                place(begin->file, begin->line), ", others do not");
    for (auto fiber = begin; fiber != end; ++fiber) fiber->waits = Waits::kNot;
    released = true;
  }
  return released;
}

// Until all threads wait at one barrier or are done; which of them.
Waits run_to_barrier(Block& block) {
  block.votes = 0;
  ++block.phase;
  std::vector<bool> ready(state.threads, true);
  do {
    for (const unsigned t : permutation(state.threads)) {
      if (!ready[t]) continue;
      resume(block, t);
    }
    traffic::end_phase();
    for (unsigned t = 0; t < state.threads; ++t)
      ready[t] = block.threads[t].waits == Waits::kForWarp;
  } while (release_warps(block));
  const Fiber& first = block.threads[0];
  for (unsigned t = 1; t < state.threads; ++t) {
    const Fiber& other = block.threads[t];
    check(other.waits == first.waits, "some threads of a block returned or wait at ",
                place(first.file, first.line), ", others wait at ", place(other.file, other.line));
    check(first.waits == Waits::kDone || first.line == other.line,
                "threads of a block wait at ", place(first.file, first.line), " and ",
                place(other.file, other.line));
  }
  block.result = block.votes;
  return first.waits;
}

// Until all threads wait for the grid or are done.
Waits run_block(Block& block) {
  Waits waits;
  do waits = run_to_barrier(block);
  while (waits == Waits::kForBlock);
  return waits;
}

void begin_block(Block& block, unsigned index) {
  const Dim3& grid = registers.grid_dim;
  block.index = Dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  block.shared.clear();
  block.shared_bytes = 0;
  block.threads.resize(std::max<size_t>(block.threads.size(), state.threads));
  block.exchanged.resize((state.threads + kWarp - 1) / kWarp);
  for (unsigned t = 0; t < state.threads; ++t) prepare(block.threads[t]);
  release(&state.host);
}

void end_block(Block& block) {
  if (!__tsan_destroy_fiber) return;
  for (unsigned t = 0; t < state.threads; ++t) __tsan_destroy_fiber(block.threads[t].tsan);
}

void run_one_by_one(unsigned count) {
  state.blocks.resize(std::max<size_t>(state.blocks.size(), 1));
  for (const unsigned b : permutation(count)) {
    begin_block(state.blocks[0], b);
    check(run_block(state.blocks[0]) == Waits::kDone,
                "a launch that is not cooperative waits for the grid");
    end_block(state.blocks[0]);
  }
}

void run_together(unsigned count) {
  state.blocks.resize(std::max<size_t>(state.blocks.size(), count));
  for (unsigned b = 0; b < count; ++b) begin_block(state.blocks[b], b);
  for (unsigned done = 0; done < count;) {
    done = 0;
    ++state.grid_phase;
    for (const unsigned b : permutation(count)) done += run_block(state.blocks[b]) == Waits::kDone;
    check(done == 0 || done == count, done, " blocks returned, others wait for the grid");
  }
  for (unsigned b = 0; b < count; ++b) end_block(state.blocks[b]);
}

void wait(Waits waits, const char* file, int line, char* barrier) {
  Fiber& self = *state.current;
  self.waits = waits;
  self.file = file;
  self.line = line;
  if (barrier != nullptr) release(barrier);
  switch_to(self, state.host);
  if (barrier != nullptr) acquire(barrier);
}

}  // namespace

void run(const Launch& shape, void (*call)(void*), void* kernel) {
  const Dim3 &grid = shape.grid, &block = shape.block;
  check(guards > 0, "a kernel is launched without a CUDAGuard");
  check(!state.running, "launches may not nest");
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  check(blocks > 0 && grid.x < (1u << 31) && grid.y < (1u << 16) && grid.z < (1u << 16),
              "a launch of ", grid.x, " x ", grid.y, " x ", grid.z, " blocks");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  check(threads > 0 && threads <= 1024 && block.z <= 64, "a launch of ", threads,
              " threads per block");
  check(shape.shared == 0, "shared memory of a launch is not emulated");
  struct Running {
    Running() { state.running = true; }
    ~Running() {
      state.running = false;
      state.error.clear();
    }
  } const running;
  registers.block_dim = block;
  registers.grid_dim = grid;
  // Kernels loop over the first dimension only.
  registers.grid_dim.x = static_cast<unsigned>(std::min<uint64_t>(grid.x, state.most_blocks));
  state.threads = static_cast<unsigned>(threads);
  state.call = call;
  state.kernel = kernel;
  if (__tsan_get_current_fiber) state.host.tsan = __tsan_get_current_fiber();
  traffic::begin_kernel(shape.kernel);
  release(&state.host);
  const unsigned count = registers.grid_dim.x * grid.y * grid.z;
  if (shape.cooperative) {
    run_together(count);
  } else {
    run_one_by_one(count);
  }
  acquire(&state.end);
}

int wait_for_block(const char* file, int line, bool vote) {
  Block& block = *state.block;
  if (!state.skipped.empty() && place(file, line) == state.skipped) return block.result;
  block.votes += vote;
  wait(Waits::kForBlock, file, line, block.barriers + block.phase % 2);
  return block.result;
}

void wait_for_grid(const char* file, int line) {
  if (!state.skipped.empty() && place(file, line) == state.skipped) return;
  wait(Waits::kForGrid, file, line, state.grid_barriers + state.grid_phase % 2);
}

const uint64_t* exchange(const char* file, int line, uint64_t value) {
  Fiber& self = *state.current;
  const size_t thread = &self - state.block->threads.data();
  // Two sets: the next exchange may begin before all threads have read this one.
  auto& values = state.block->exchanged[thread / kWarp][self.exchanges++ % 2];
  values[thread % kWarp] = value;
  wait(Waits::kForWarp, file, line, nullptr);
  return values.data();
}

void* shared_memory(int64_t bytes) {
  Block& block = *state.block;
  const size_t which = state.current->variables++;
  if (which == block.shared.size()) {
    block.shared_bytes += bytes;
    if (block.shared_bytes > kShared) {
      state.error = "more than " + std::to_string(kShared) + " bytes of shared memory";
      leave();
    }
    block.shared.emplace_back(new char[bytes]);
    std::memset(block.shared.back().get(), state.order % 2 == 0 ? 0xff : 0x5a, bytes);
    traffic::exclude(block.shared.back().get(), bytes);
  }
  return block.shared[which].get();
}

void count_synchronisation() { ++state.synchronisations; }

}  // namespace cuda_on_cpu

// `order`: 0 ascending, 1 descending, others shuffle; `skipped`: file:line of a barrier, or "".
extern "C" void cuda_on_cpu_configure(uint64_t order, uint64_t most_blocks, const char* skipped) {
  using cuda_on_cpu::state;
  state.order = order;
  state.most_blocks = most_blocks == 0 ? UINT64_MAX : most_blocks;
  state.skipped = skipped;
  state.random.seed(order);
}

// How often the host waited for the device since the last call.
extern "C" int64_t cuda_on_cpu_synchronisations() {
  return std::exchange(cuda_on_cpu::state.synchronisations, 0);
}

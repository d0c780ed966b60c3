// Counts the traffic of kernels with global memory.
//
// Kernels are compiled with -fsanitize=thread, which calls a function before every access to
// memory; here are those functions, in place of the sanitizer.  What one instruction of the 32
// threads of a warp reads or writes, the n-th time that each of them comes to it, is one request,
// and a request moves the sectors of 32 bytes that it touches.  They go through a cache of the size
// of an H200's L2, cold at the start of a count, whose misses and write-backs are the traffic with
// DRAM.  Blocks run one after another, where a GPU runs hundreds at once; there is no L1.

#ifdef CUDA_ON_CPU_TRAFFIC

#include "traffic.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace cuda_on_cpu::traffic {
namespace {

constexpr uint64_t kSector = 32, kLine = 128;
constexpr unsigned kWarp = 32;
constexpr size_t kWays = 16, kCacheBytes = size_t{50} << 20, kSets = kCacheBytes / kLine / kWays;

struct Count {
  int64_t launches = 0, requests = 0, sectors = 0, read_bytes = 0, written_bytes = 0;
};

class Cache {
 public:
  Cache() : lines_(kSets * kWays) {}

  void access(uint64_t sector, bool write, Count& count) {
    const uint64_t line = sector / (kLine / kSector), set = line % kSets;
    const auto bit = static_cast<uint8_t>(1u << sector % (kLine / kSector));
    Line* const ways = lines_.data() + set * kWays;
    Line* way = std::find_if(ways, ways + kWays, [&](const Line& l) { return l.number == line; });
    if (way == ways + kWays) {
      way = std::min_element(ways, ways + kWays,
                             [](const Line& a, const Line& b) { return a.used < b.used; });
      write_back(*way, count);
      *way = {line, 0, 0, 0};
    }
    way->used = ++clock_;
    if (!write && (way->valid & bit) == 0) count.read_bytes += kSector;
    way->valid |= bit;
    if (write) way->dirty |= bit;
  }

  void flush(Count& count) {
    for (Line& line : lines_) {
      write_back(line, count);
      line = {};
    }
  }

 private:
  struct Line {
    uint64_t number = ~uint64_t{0}, used = 0;
    uint8_t valid = 0, dirty = 0;
  };

  static void write_back(const Line& line, Count& count) {
    count.written_bytes += static_cast<int64_t>(kSector) * __builtin_popcount(line.dirty);
  }

  std::vector<Line> lines_;
  uint64_t clock_ = 0;
};

struct Request {
  unsigned size = 0;
  bool write = false;
  std::array<uint64_t, 2 * kWarp> sectors;
};

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t address) const { return address >= begin && address < end; }
};

struct State {
  bool counting = false;  // a thread of a kernel runs
  unsigned warp = 0, lane = 0;
  Range stack, host_stack;
  std::vector<Range> shared;
  std::vector<Request> requests;  // of the warp, in order of their first access
  std::unordered_map<const void*, size_t> instructions;
  std::vector<std::vector<size_t>> executions;  // of every instruction, numbers of requests
  std::vector<size_t> executed;                 // by this thread, of every instruction
  std::vector<std::pair<std::string, Count>> kernels;
  size_t kernel = 0;
  Cache cache;
};

State& state() {
  static State only;
  return only;
}

void end_warp(State& s) {
  Count& count = s.kernels[s.kernel].second;
  for (const Request& request : s.requests) {
    ++count.requests;
    count.sectors += request.size;
    for (unsigned i = 0; i < request.size; ++i)
      s.cache.access(request.sectors[i], request.write, count);
  }
  s.requests.clear();
  for (auto& numbers : s.executions) numbers.clear();
}

void record(const void* memory, size_t bytes, bool write, const void* instruction) {
  State& s = state();
  if (!s.counting) return;
  const auto address = reinterpret_cast<uintptr_t>(memory);
  const auto registers_at = reinterpret_cast<uintptr_t>(&registers);
  if (s.stack.holds(address) || s.host_stack.holds(address) ||
      Range{registers_at, registers_at + sizeof(registers)}.holds(address))
    return;
  for (const Range& range : s.shared)
    if (range.holds(address)) return;
  const size_t which = s.instructions.emplace(instruction, s.instructions.size()).first->second;
  if (which >= s.executions.size()) s.executions.resize(which + 1);
  if (which >= s.executed.size()) s.executed.resize(which + 1);
  auto& numbers = s.executions[which];
  const size_t execution = s.executed[which]++;
  if (execution == numbers.size()) {
    numbers.push_back(s.requests.size());
    s.requests.emplace_back();
  }
  Request& request = s.requests[numbers[execution]];
  request.write |= write;
  for (uint64_t sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector) {
    const auto begin = request.sectors.begin(), end = begin + request.size;
    if (std::find(begin, end, sector) == end && request.size < request.sectors.size())
      request.sectors[request.size++] = sector;
  }
}

}  // namespace

void begin_kernel(const char* name) {
  State& s = state();
  const auto same = std::find_if(s.kernels.begin(), s.kernels.end(),
                                 [&](const auto& kernel) { return kernel.first == name; });
  s.kernel = same - s.kernels.begin();
  if (same == s.kernels.end()) s.kernels.emplace_back(name, Count{});
  ++s.kernels[s.kernel].second.launches;
  const auto here = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  s.host_stack = {here - (64 << 10), here + (1 << 20)};  // where the arguments are
}

void begin_thread(unsigned thread, const void* stack, const void* stack_end) {
  State& s = state();
  if (thread / kWarp != s.warp) end_warp(s);
  s.warp = thread / kWarp;
  s.stack = {reinterpret_cast<uintptr_t>(stack), reinterpret_cast<uintptr_t>(stack_end)};
  std::fill(s.executed.begin(), s.executed.end(), 0);
  s.counting = true;
}

void end_thread() { state().counting = false; }

void end_phase() { end_warp(state()); }

void exclude(const void* memory, int64_t bytes) {
  State& s = state();
  if (s.shared.size() >= 16) s.shared.erase(s.shared.begin());  // of blocks that are gone
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  s.shared.push_back({begin, begin + static_cast<uintptr_t>(bytes)});
}

}  // namespace cuda_on_cpu::traffic

// Writes a line "kernel launches requests sectors read written" for each kernel since the last call
// into `text`.
extern "C" void cuda_on_cpu_traffic(char* text, int64_t size) {
  auto& s = cuda_on_cpu::traffic::state();
  if (!s.kernels.empty()) s.cache.flush(s.kernels.back().second);
  std::string lines;
  for (const auto& [name, c] : s.kernels) {
    char line[512];
    std::snprintf(line, sizeof line, "%s %lld %lld %lld %lld %lld\n", name.c_str(),
                  static_cast<long long>(c.launches), static_cast<long long>(c.requests),
                  static_cast<long long>(c.sectors), static_cast<long long>(c.read_bytes),
                  static_cast<long long>(c.written_bytes));
    lines += line;
  }
  std::snprintf(text, static_cast<size_t>(size), "%s", lines.c_str());
  s.kernels.clear();
}

// What -fsanitize=thread calls.
using cuda_on_cpu::traffic::record;
#define ACCESS(BYTES)                                                            \
  extern "C" void __tsan_read##BYTES(void* at) {                                 \
    record(at, BYTES, false, __builtin_return_address(0));                       \
  }                                                                              \
  extern "C" void __tsan_write##BYTES(void* at) {                                \
    record(at, BYTES, true, __builtin_return_address(0));                        \
  }                                                                              \
  extern "C" void __tsan_unaligned_read##BYTES(void* at) {                       \
    record(at, BYTES, false, __builtin_return_address(0));                       \
  }                                                                              \
  extern "C" void __tsan_unaligned_write##BYTES(void* at) {                      \
    record(at, BYTES, true, __builtin_return_address(0));                        \
  }                                                                              \
  extern "C" void __tsan_volatile_read##BYTES(void* at) {                        \
    record(at, BYTES, false, __builtin_return_address(0));                       \
  }                                                                              \
  extern "C" void __tsan_volatile_write##BYTES(void* at) {                       \
    record(at, BYTES, true, __builtin_return_address(0));                        \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
extern "C" void __tsan_read_range(void* at, unsigned long bytes) {
  if (bytes != 0) record(at, bytes, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, unsigned long bytes) {
  if (bytes != 0) record(at, bytes, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
extern "C" void __tsan_atomic_signal_fence(int) {}

// Atomic operations of kernels are a read and a write; those of the host are not counted.
#define UPDATE(BITS, TYPE, NAME)                                                          \
  extern "C" TYPE __tsan_atomic##BITS##_##NAME(volatile TYPE* at, TYPE value, int) {      \
    record(const_cast<TYPE*>(at), sizeof(TYPE), true, __builtin_return_address(0));       \
    return __atomic_##NAME(at, value, __ATOMIC_SEQ_CST);                                  \
  }
#define COMPARE(BITS, TYPE, NAME)                                                              \
  extern "C" int __tsan_atomic##BITS##_compare_exchange_##NAME(volatile TYPE* at,              \
                                                               TYPE* expected, TYPE value,     \
                                                               int, int) {                     \
    record(const_cast<TYPE*>(at), sizeof(TYPE), true, __builtin_return_address(0));            \
    return __atomic_compare_exchange_n(at, expected, value, false, __ATOMIC_SEQ_CST,           \
                                       __ATOMIC_SEQ_CST);                                      \
  }
#define ATOMIC(BITS, TYPE)                                                                \
  extern "C" TYPE __tsan_atomic##BITS##_load(const volatile TYPE* at, int) {              \
    record(const_cast<TYPE*>(at), sizeof(TYPE), false, __builtin_return_address(0));      \
    return __atomic_load_n(at, __ATOMIC_SEQ_CST);                                         \
  }                                                                                       \
  extern "C" void __tsan_atomic##BITS##_store(volatile TYPE* at, TYPE value, int) {       \
    record(const_cast<TYPE*>(at), sizeof(TYPE), true, __builtin_return_address(0));       \
    __atomic_store_n(at, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                       \
  extern "C" TYPE __tsan_atomic##BITS##_exchange(volatile TYPE* at, TYPE value, int) {    \
    return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);                              \
  }                                                                                       \
  UPDATE(BITS, TYPE, fetch_add)                                                           \
  UPDATE(BITS, TYPE, fetch_sub)                                                           \
  UPDATE(BITS, TYPE, fetch_and)                                                           \
  UPDATE(BITS, TYPE, fetch_or)                                                            \
  UPDATE(BITS, TYPE, fetch_xor)                                                           \
  COMPARE(BITS, TYPE, strong)                                                             \
  COMPARE(BITS, TYPE, weak)
ATOMIC(8, unsigned char)
ATOMIC(16, unsigned short)
ATOMIC(32, unsigned)
ATOMIC(64, unsigned long)

#endif  // CUDA_ON_CPU_TRAFFIC

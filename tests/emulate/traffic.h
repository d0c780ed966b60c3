// Counts how kernels read and write global memory; nothing unless compiled for that (traffic.cpp).

#pragma once

#include <cstdint>

namespace cuda_on_cpu::traffic {

#ifdef CUDA_ON_CPU_TRAFFIC
void begin_kernel(const char* name);
// From here on the thread's accesses are counted, but for those to its stack.
void begin_thread(unsigned thread, const void* stack, const void* stack_end);
void end_thread();
// All threads of a block wait for each other.
void end_phase();
// Shared memory of the block that runs.
void exclude(const void* memory, int64_t bytes);
#else
inline void begin_kernel(const char*) {}
inline void begin_thread(unsigned, const void*, const void*) {}
inline void end_thread() {}
inline void end_phase() {}
inline void exclude(const void*, int64_t) {}
#endif

}  // namespace cuda_on_cpu::traffic

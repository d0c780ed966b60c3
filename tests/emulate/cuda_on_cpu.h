// Lets the source of CUDA kernels run on the CPU: the part of the language and of the runtime that
// they use.  scheduler.cpp runs its threads; build.py rewrites what C++ cannot parse.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scheduler.h"

namespace cuda_on_cpu {

// As a kernel launch: arguments are copied once.
template <typename F, typename... Args>
void launch(const Launch& shape, const F& kernel, Args... args) {
  const auto thread = [&] { kernel(args...); };
  run(
      shape, [](void* what) { (*static_cast<decltype(thread)*>(what))(); },
      const_cast<void*>(static_cast<const void*>(&thread)));
}

// A variable in shared memory: the same for the n-th call of every thread of a block.
template <typename T>
T& shared() {
  return *static_cast<T*>(shared_memory(sizeof(T)));
}

template <typename T, typename F>
T atomically(T* at, const F& change) {
  T old, now;
  __atomic_load(at, &old, __ATOMIC_RELAXED);
  do now = change(old);
  while (!__atomic_compare_exchange(at, &old, &now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

// Compiled with -ffp-contract=fast, a product or sum is fused as on the GPU unless rounded alone.
template <typename T>
T alone(T value) {
  __asm__("" : "+x"(value));
  return value;
}

}  // namespace cuda_on_cpu

template <typename T>
T atomicAdd(T* at, std::common_type_t<T> value) {
  return cuda_on_cpu::atomically(at, [=](T old) { return T(old + value); });
}
template <typename T>
T atomicMin(T* at, std::common_type_t<T> value) {
  return cuda_on_cpu::atomically(at, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicMax(T* at, std::common_type_t<T> value) {
  return cuda_on_cpu::atomically(at, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicOr(T* at, std::common_type_t<T> value) {
  return cuda_on_cpu::atomically(at, [=](T old) { return T(old | value); });
}
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::wait_for_block(file, line, false);
}
inline int __syncthreads_count(bool vote, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  return cuda_on_cpu::wait_for_block(file, line, vote);
}
// Every thread of the warp takes part.
inline unsigned __ballot_sync(unsigned /*all*/, bool vote, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
  const uint64_t* votes = cuda_on_cpu::exchange(file, line, vote);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(votes[lane] != 0) << lane;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __fmul_rn(float a, float b) { return cuda_on_cpu::alone(a * b); }
inline float __fadd_rn(float a, float b) { return cuda_on_cpu::alone(a) + cuda_on_cpu::alone(b); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return cuda_on_cpu::alone(a * b); }
inline double __dadd_rn(double a, double b) { return cuda_on_cpu::alone(a) + cuda_on_cpu::alone(b); }

namespace cooperative_groups {
struct GridGroup {
  void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE()) const {
    cuda_on_cpu::wait_for_grid(file, line);
  }
};
inline GridGroup this_grid() { return {}; }
}  // namespace cooperative_groups

// The runtime, and torch's wrappers of it.
using dim3 = cuda_on_cpu::Dim3;
using cudaStream_t = int;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline int cudaStreamSynchronize(cudaStream_t) {
  cuda_on_cpu::count_synchronisation();
  return 0;
}
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 4;
  return 0;
}
template <typename... P>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int, size_t) {
  *blocks = 1;
  return 0;
}

namespace cuda_on_cpu {
template <typename... P, size_t... I>
void launch_listed(const Launch& shape, void (*kernel)(P...), void** list,
                   std::index_sequence<I...>) {
  launch(shape, kernel, *static_cast<std::remove_const_t<P>*>(list[I])...);
}
}  // namespace cuda_on_cpu

template <typename... P>
int cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** list,
                                size_t shared, cudaStream_t) {
  cuda_on_cpu::Launch shape("cooperative", grid, block, static_cast<int64_t>(shared));
  shape.cooperative = true;
  cuda_on_cpu::launch_listed(shape, kernel, list, std::index_sequence_for<P...>());
  return 0;
}

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == 0)
#define C10_CUDA_KERNEL_LAUNCH_CHECK() (void)0

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(const c10::Device&) { ++cuda_on_cpu::guards; }
  ~CUDAGuard() { --cuda_on_cpu::guards; }
  CUDAGuard(const CUDAGuard&) = delete;
};
inline cudaStream_t getCurrentCUDAStream() { return 0; }
inline int current_device() { return 0; }
}  // namespace c10::cuda

// From here on, because torch's headers look at some of these too.
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define threadIdx cuda_on_cpu::registers.thread_index
#define blockIdx cuda_on_cpu::registers.block_index
#define blockDim cuda_on_cpu::registers.block_dim
#define gridDim cuda_on_cpu::registers.grid_dim
#define __CUDACC__
#define __CUDA_ARCH__ 900

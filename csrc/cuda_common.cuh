// Shared by all CUDA operators: the number of threads, and the items that each of them takes.

#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

namespace instseg {

constexpr int kThreads = 256;  // of a block
constexpr int kWarp = 32;
constexpr int64_t kMostBlocks = 1 << 16;  // kernels loop over the rest

// For a kernel whose blocks take one task each.
inline unsigned blocks_for_tasks(int64_t tasks, int64_t most = kMostBlocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(tasks, 1, most));
}

// For a kernel whose threads, kThreads in a block, take one item each.
inline unsigned blocks_for(int64_t items, int64_t most = kMostBlocks) {
  return blocks_for_tasks((items + kThreads - 1) / kThreads, most);
}

// The first item of this thread; the next ones follow item_step() after each other.
__device__ __forceinline__ int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int64_t item_step() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace instseg

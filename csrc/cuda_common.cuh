// Shared by all CUDA operators: the number of threads, and the items that each of them takes.

#pragma once

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
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

template <typename T>
struct Same {
  using type = T;  // of which nothing is deduced
};

// Launches blocks of kThreads that may wait for each other: as many as the GPU runs at once, `most`
// at most.
template <typename... P>
void launch_together(void (*kernel)(P...), int64_t most, cudaStream_t stream,
                     typename Same<P>::type... arguments) {
  int blocks = 0, processors = 0;
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount,
                                        c10::cuda::current_device()));
  void* list[] = {&arguments...};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(
      kernel, dim3(blocks_for_tasks(std::min<int64_t>(most, int64_t{blocks} * processors))),
      dim3(kThreads), list, 0, stream));
}

}  // namespace instseg

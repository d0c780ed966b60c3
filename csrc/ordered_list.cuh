// Which of many items concern a block, in their order: the sums over them are then the same every
// time, and those of the CPU.

#pragma once

#include <cstdint>

#include "cuda_common.cuh"

namespace instseg {

constexpr int kListed = 256;  // items that a block looks at together

// In shared memory.
struct OrderedList {
  unsigned bits[kListed / kWarp];
  int items[kListed];
};

// Lists those of the items first .. first + kListed - 1, below `count`, that are `wanted`, as
// distances from the first; returns their number.  All threads of the block call it, and have then
// read the list before.
template <typename F>
__device__ int list_items(OrderedList& list, int64_t first, int64_t count, const F& wanted) {
  constexpr int words = kListed / kWarp;
  __syncthreads();
  for (int w = threadIdx.x; w < words; w += blockDim.x) list.bits[w] = 0;
  __syncthreads();
  for (int k = threadIdx.x; k < kListed && first + k < count; k += blockDim.x)
    if (wanted(first + k)) atomicOr(list.bits + k / kWarp, 1u << k % kWarp);
  __syncthreads();
  for (int k = threadIdx.x; k < kListed; k += blockDim.x) {
    if ((list.bits[k / kWarp] >> k % kWarp & 1u) == 0) continue;
    int before = __popc(list.bits[k / kWarp] & ((1u << k % kWarp) - 1));
    for (int w = 0; w < k / kWarp; ++w) before += __popc(list.bits[w]);
    list.items[before] = k;
  }
  __syncthreads();
  int listed = 0;
  for (int w = 0; w < words; ++w) listed += __popc(list.bits[w]);
  return listed;
}

}  // namespace instseg

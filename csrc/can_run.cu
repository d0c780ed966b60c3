// Whether the kernels of this build can run on a GPU, which they cannot if it was compiled for
// others.

#include "can_run.h"

#include <c10/cuda/CUDAGuard.h>

namespace instseg {

namespace {

__global__ void probe() {}

}  // namespace

bool can_run_on(int device) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  cudaFuncAttributes attributes;
  const bool found = cudaFuncGetAttributes(&attributes, probe) == cudaSuccess;
  (void)cudaGetLastError();  // the next call must not report it
  return found;
}

}  // namespace instseg

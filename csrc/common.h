// Shared by all operators: argument checks, the SIMD attribute, arithmetic that all devices share.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

// Index arithmetic that host and device code share.
#ifdef __CUDACC__
#define INSTSEG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define INSTSEG_HOST_DEVICE inline
#endif

// One copy of a function per instruction set, chosen when the program starts.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && defined(__gnu_linux__)
#define INSTSEG_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define INSTSEG_SIMD
#endif

// For the pieces of an INSTSEG_SIMD function: only inside of it they get its instruction set.
#ifdef __GNUC__
#define INSTSEG_INLINE inline __attribute__((always_inline))
#else
#define INSTSEG_INLINE __forceinline
#endif

namespace instseg {

// Products and sums that no device contracts with each other.
INSTSEG_HOST_DEVICE float rounded_product(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

INSTSEG_HOST_DEVICE double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

INSTSEG_HOST_DEVICE float rounded_sum(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

INSTSEG_HOST_DEVICE double rounded_sum(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

constexpr int64_t kMostCells =
    1 << 15;  // a side of windows, parts and bins: products stay in 64 bits
constexpr int64_t kMostPixels = 1 << 24;  // a side of images: float32 tells them apart
constexpr int64_t kOperationsPerTask = 16384;

// How many items a thread must get for its start to pay, where one takes `operations`.
inline int64_t grain_size(int64_t operations) {
  return std::max<int64_t>(1, kOperationsPerTask / std::max<int64_t>(1, operations));
}

// Device, rank and dtype of one argument; `op` and `name` go into the message.
inline void check_floating(const char* op, const char* name, const at::Tensor& tensor,
                           int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, op, ": ", name, " has ", tensor.dim(),
                    " dimensions; expected ", rank);
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
      ": ", name, " is ", type, "; expected float32, float64, float16 or bfloat16");
}

inline void check_same_device(const char* op, const char* first_name, const at::Tensor& first,
                              const char* name, const at::Tensor& tensor) {
  TORCH_CHECK(first.device() == tensor.device(), op, ": ", first_name, " is on ", first.device(),
              " and ", name, " on ", tensor.device(), "; move one of them");
}

}  // namespace instseg

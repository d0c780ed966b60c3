// Checks of the arguments of assemble_masks, on the host.

#pragma once

#include <string>

#include "common.h"

namespace instseg {

inline void check_assemble_masks(const at::Tensor& prototypes, const at::Tensor& coefficients,
                                 const at::Tensor& boxes, int64_t height, int64_t width) {
  const char* op = "assemble_masks";
  check_floating(op, "prototypes", prototypes, 3);
  check_floating(op, "coefficients", coefficients, 2);
  check_floating(op, "boxes", boxes, 2);
  check_same_device(op, "prototypes", prototypes, "coefficients", coefficients);
  check_same_device(op, "prototypes", prototypes, "boxes", boxes);
  TORCH_CHECK_VALUE(prototypes.size(0) > 0 && prototypes.size(1) > 0, op, ": prototypes has shape ",
                    prototypes.sizes(), "; expected (h, w, K) with at least one cell");
  TORCH_CHECK_VALUE(coefficients.size(1) == prototypes.size(2), op, ": coefficients has shape ",
                    coefficients.sizes(), "; expected (N, ", prototypes.size(2),
                    "), one for each of the prototypes");
  TORCH_CHECK_VALUE(boxes.size(0) == coefficients.size(0) && boxes.size(1) == 4, op,
                    ": boxes has shape ", boxes.sizes(), "; expected (", coefficients.size(0),
                    ", 4)");
  TORCH_CHECK_VALUE(height > 0 && height <= kMostPixels && width > 0 && width <= kMostPixels, op,
                    ": size is (", height, ", ", width, "); expected 1 to ", kMostPixels,
                    " pixels each");
}

// For masks that no memory holds, on any device.
inline std::string no_memory_for_masks(int64_t count, int64_t height, int64_t width) {
  return c10::str("assemble_masks: there is no memory for ", count, " masks of ", height, " x ",
                  width, " pixels; ask for a smaller size or fewer masks");
}

}  // namespace instseg

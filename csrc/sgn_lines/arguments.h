// Checks of the arguments of the operators on lines, on the host.

#pragma once

#include <algorithm>

#include "common.h"

namespace instseg {

inline void check_decode_lines(const at::Tensor& labels, const at::Tensor& semantic) {
  const char* op = "decode_lines";
  TORCH_CHECK_TYPE(labels.scalar_type() == at::kByte, op, ": labels is ", labels.scalar_type(),
                   "; expected uint8");
  TORCH_CHECK_TYPE(semantic.scalar_type() == at::kLong, op, ": semantic is ",
                   semantic.scalar_type(), "; expected int64");
  TORCH_CHECK_VALUE(labels.dim() == 2, op, ": labels has shape ", labels.sizes(),
                    "; expected (H, W)");
  TORCH_CHECK_VALUE(semantic.sizes() == labels.sizes(), op, ": semantic has shape ",
                    semantic.sizes(), "; expected that of labels, ", labels.sizes());
}

inline void check_group_lines(const at::Tensor& pairs, const at::Tensor& touches) {
  const char* op = "group_lines";
  TORCH_CHECK_TYPE(pairs.scalar_type() == at::kLong, op, ": pairs is ", pairs.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_TYPE(touches.scalar_type() == at::kBool, op, ": touches is ", touches.scalar_type(),
                   "; expected bool");
  TORCH_CHECK_VALUE(pairs.dim() == 2 && pairs.size(1) == 2, op, ": pairs has shape ", pairs.sizes(),
                    "; expected (P, 2)");
  TORCH_CHECK_VALUE(touches.dim() == 1, op, ": touches has shape ", touches.sizes(),
                    "; expected (N,)");
}

inline void check_touches(const bool* touches, int64_t count) {
  TORCH_CHECK_VALUE(count == 0 || !touches[count - 1],
                    "group_lines: the last line touches one after it");
}

inline void check_pair(int64_t number, int64_t first, int64_t second, int64_t count) {
  const char* op = "group_lines";
  TORCH_CHECK_VALUE(std::min(first, second) >= 0 && std::max(first, second) < count, op, ": pair ",
                    number, " is (", first, ", ", second, "); expected lines 0 to ", count - 1);
}

}  // namespace instseg

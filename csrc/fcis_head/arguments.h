// Checks of the arguments of the FCIS head, on the host.

#pragma once

#include <ATen/core/Tensor.h>

#include "psroi_pool/arguments.h"

namespace instseg {

inline void check_fcis_arguments(const char* op, const at::Tensor& maps, const at::Tensor& rois,
                                 const at::Tensor* classes, double spatial_scale,
                                 int64_t group_size, int64_t pooled_size) {
  check_psroi_arguments(op, "maps", maps, rois, spatial_scale, group_size, pooled_size);
  check_channels(op, maps.size(1), group_size, 2);
  if (classes == nullptr) {
    TORCH_CHECK_VALUE(maps.size(1) >= 4 * group_size * group_size, op, ": maps has ", maps.size(1),
                      " channels; expected at least ", 4 * group_size * group_size,
                      " (background and one class) where classes is None");
    return;
  }
  check_same_device(op, "maps", maps, "classes", *classes);
  TORCH_CHECK_TYPE(classes->scalar_type() == at::kLong, op, ": classes is ", classes->scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(classes->dim() == 1 && classes->size(0) == rois.size(0), op, ": classes is ",
                    classes->sizes(), "; expected one number for each of the ", rois.size(0),
                    " rois");
}

inline void check_fcis_gradients(const char* op, const at::Tensor& grad_scores,
                                 const at::Tensor& grad_logits, const at::Tensor& maps,
                                 const at::Tensor& rois, int64_t group_size, int64_t pooled_size) {
  check_same_device(op, "maps", maps, "grad_scores", grad_scores);
  check_same_device(op, "maps", maps, "grad_logits", grad_logits);
  const int64_t count = rois.size(0), num_classes = maps.size(1) / (2 * group_size * group_size);
  TORCH_CHECK_VALUE(grad_scores.sizes() == at::IntArrayRef({count, num_classes}), op,
                    ": grad_scores is ", grad_scores.sizes(), "; expected (", count, ", ",
                    num_classes, ")");
  TORCH_CHECK_VALUE(grad_logits.sizes() == at::IntArrayRef({count, 2, pooled_size, pooled_size}),
                    op, ": grad_logits is ", grad_logits.sizes(), "; expected (", count, ", 2, ",
                    pooled_size, ", ", pooled_size, ")");
}

// On the host alone: reading the values of a GPU would wait for it.
inline void check_class_values(const char* op, const at::Tensor& classes, int64_t num_classes) {
  const int64_t* values = classes.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < classes.size(0); ++r) {
    TORCH_CHECK_INDEX(values[r] >= -1 && values[r] < num_classes, op, ": classes[", r, "] is ",
                      values[r], "; expected -1 (none) to ", num_classes - 1);
  }
}

}  // namespace instseg

// Checks of the arguments of mask voting, on the host.

#pragma once

#include "common.h"

namespace instseg {

constexpr int64_t kMostSamples = 4096;    // a side of a mask
constexpr int64_t kMostVoters = 1 << 22;  // 64 bits hold the sum of their votes

inline void check_boxes(const char* op, const at::Tensor& boxes) {
  TORCH_CHECK_TYPE(boxes.scalar_type() == at::kFloat, op, ": boxes is ", boxes.scalar_type(),
                   "; expected float32");
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4, op, ": boxes has shape ", boxes.sizes(),
                    "; expected (R, 4)");
}

inline void check_nms_per_class(const at::Tensor& boxes, const at::Tensor& scores,
                                int64_t max_kept) {
  const char* op = "nms_per_class";
  check_boxes(op, boxes);
  TORCH_CHECK_TYPE(scores.scalar_type() == at::kFloat, op, ": scores is ", scores.scalar_type(),
                   "; expected float32");
  TORCH_CHECK_VALUE(scores.dim() == 2 && scores.size(1) == boxes.size(0), op, ": scores has shape ",
                    scores.sizes(), "; expected (classes, ", boxes.size(0), ")");
  TORCH_CHECK_VALUE(max_kept >= 0, op, ": max_kept is ", max_kept, "; expected at least 0");
  check_same_device(op, "boxes", boxes, "scores", scores);
}

inline void check_average_masks(const at::Tensor& boxes, const at::Tensor& masks,
                                const at::Tensor& weights, double threshold, int64_t height,
                                int64_t width) {
  const char* op = "average_masks";
  check_boxes(op, boxes);
  TORCH_CHECK_TYPE(masks.scalar_type() == at::kFloat, op, ": masks is ", masks.scalar_type(),
                   "; expected float32");
  TORCH_CHECK_VALUE(masks.dim() == 3 && masks.size(0) == boxes.size(0) &&
                        masks.size(1) == masks.size(2) && masks.size(1) > 0 &&
                        masks.size(1) <= kMostSamples,
                    op, ": masks has shape ", masks.sizes(), "; expected (", boxes.size(0),
                    ", P, P) with P from 1 to ", kMostSamples);
  TORCH_CHECK_TYPE(weights.scalar_type() == at::kFloat, op, ": weights is ", weights.scalar_type(),
                   "; expected float32");
  TORCH_CHECK_VALUE(weights.dim() == 2 && weights.size(1) == boxes.size(0), op,
                    ": weights has shape ", weights.sizes(), "; expected (N, ", boxes.size(0), ")");
  TORCH_CHECK_VALUE(boxes.size(0) <= kMostVoters, op, ": boxes holds ", boxes.size(0),
                    " rows; sums of votes are exact up to ", kMostVoters);
  TORCH_CHECK_VALUE(threshold > 0 && threshold <= 1, op, ": mask_threshold is ", threshold,
                    "; expected more than 0 and at most 1");
  TORCH_CHECK_VALUE(height > 0 && width > 0 && height <= kMostPixels && width <= kMostPixels, op,
                    ": the image is ", height, " x ", width, "; expected 1 to ", kMostPixels,
                    " pixels a side");
  check_same_device(op, "boxes", boxes, "masks", masks);
  check_same_device(op, "boxes", boxes, "weights", weights);
}

}  // namespace instseg

// Checks of the arguments of fast_nms, on the host.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>

#include "common.h"

namespace instseg {

constexpr int64_t kMostRanked = int64_t(1) << 24;  // boxes of a class: their numbers fit 32 bits

inline void check_fast_nms(const at::Tensor& boxes, const at::Tensor& scores, double iou_threshold,
                           int64_t top_k, double min_score) {
  const char* op = "fast_nms";
  check_floating(op, "boxes", boxes, 2);
  check_floating(op, "scores", scores, 2);
  TORCH_CHECK_VALUE(boxes.size(1) == 4, op, ": boxes has shape ", boxes.sizes(),
                    "; expected (N, 4)");
  TORCH_CHECK_VALUE(scores.size(1) == boxes.size(0), op, ": scores has shape ", scores.sizes(),
                    "; expected (C, ", boxes.size(0), ")");
  TORCH_CHECK_VALUE(boxes.size(0) < kMostRanked, op, ": boxes holds ", boxes.size(0),
                    " rows; expected fewer than ", kMostRanked);
  TORCH_CHECK_VALUE(!std::isnan(iou_threshold), op, ": iou_threshold is ", iou_threshold,
                    "; expected a number");
  TORCH_CHECK_VALUE(!std::isnan(min_score), op, ": min_score is ", min_score,
                    "; expected a number");
  TORCH_CHECK_VALUE(top_k >= 0, op, ": top_k is ", top_k, "; expected at least 0");
  check_same_device(op, "boxes", boxes, "scores", scores);
}

}  // namespace instseg

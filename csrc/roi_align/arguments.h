// Checks of the arguments of roi_align and its backward pass, on the host.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>

#include "common.h"
#include "psroi_pool/arguments.h"
#include "roi_align/roi_align.h"

namespace instseg {

constexpr int64_t kMostSamples = 256;  // of a bin, along each axis

// `name` is what is on the device of the RoIs: maps or grad.
inline void check_regions(const char* name, const at::Tensor& tensor, const at::Tensor& rois,
                          const std::optional<at::Tensor>& levels, at::ArrayRef<double> scales,
                          const Sampling& sampling) {
  const char* op = "roi_align";
  check_floating(op, name, tensor, 4);
  check_roi_rows(op, name, tensor, rois);
  for (const double scale : scales) check_spatial_scale(op, scale);
  TORCH_CHECK_VALUE(levels.has_value() || scales.size() == 1, op,
                    ": levels is missing; expected the map of each RoI, as there are ",
                    scales.size(), " maps");
  if (levels.has_value()) {
    TORCH_CHECK_TYPE(levels->scalar_type() == at::kLong, op, ": levels is ", levels->scalar_type(),
                     "; expected int64");
    TORCH_CHECK_VALUE(levels->dim() == 1 && levels->size(0) == rois.size(0), op,
                      ": levels has shape ", levels->sizes(), "; expected (", rois.size(0), ",)");
    check_same_device(op, name, tensor, "levels", *levels);
  }
  for (const int64_t size : {sampling.rows, sampling.columns}) {
    TORCH_CHECK_VALUE(size > 0 && size <= kMostCells, op, ": pooled_size is ", size,
                      "; expected 1 to ", kMostCells);
  }
  TORCH_CHECK_VALUE(sampling.per_bin >= 0 && sampling.per_bin <= kMostSamples, op,
                    ": sampling_ratio is ", sampling.per_bin, "; expected 0 to ", kMostSamples);
}

inline void check_maps(at::TensorList maps, size_t scales) {
  const char* op = "roi_align";
  TORCH_CHECK_VALUE(!maps.empty() && maps.size() == scales, op, ": maps are ", maps.size(),
                    " and spatial_scale ", scales, "; expected one of each, or more of both");
  for (const at::Tensor& map : maps) {
    check_floating(op, "maps", map, 4);
    check_same_device(op, "maps[0]", maps[0], "another", map);
    TORCH_CHECK_TYPE(map.scalar_type() == maps[0].scalar_type(), op, ": maps are ",
                     maps[0].scalar_type(), " and ", map.scalar_type(), "; expected one dtype");
    TORCH_CHECK_VALUE(map.size(0) == maps[0].size(0) && map.size(1) == maps[0].size(1), op,
                      ": maps have shapes ", maps[0].sizes(), " and ", map.sizes(),
                      "; expected the same images and channels");
  }
}

// The maps by their sizes, and the gradient (R, C, P, P) of the result.
inline void check_pooled_gradient(const at::Tensor& grad, const at::Tensor& rois, size_t scales,
                                  at::IntArrayRef heights, at::IntArrayRef widths, int64_t images) {
  const char* op = "roi_align";
  TORCH_CHECK_VALUE(scales > 0 && heights.size() == scales && widths.size() == scales, op,
                    ": heights are ", heights, " and widths ", widths, "; expected ", scales);
  for (size_t i = 0; i < scales; ++i) {
    TORCH_CHECK_VALUE(heights[i] >= 0 && widths[i] >= 0 && images >= 0, op, ": a map has shape (",
                      images, ", C, ", heights[i], ", ", widths[i], "); expected no negative side");
  }
  TORCH_CHECK_VALUE(grad.size(0) == rois.size(0), op, ": grad is ", grad.sizes(), "; expected (",
                    rois.size(0), ", C, pooled height, pooled width)");
}

inline void check_levels(const int64_t* levels, int64_t count, int64_t maps) {
  for (int64_t r = 0; r < count; ++r) {
    TORCH_CHECK_INDEX(levels[r] >= 0 && levels[r] < maps, "roi_align: levels[", r, "] is ",
                      levels[r], "; expected 0 to ", maps - 1);
  }
}

}  // namespace instseg

// Checks of the arguments of psroi_pool and fcis_head, on the host.

#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common.h"
#include "psroi_pool/psroi_pool.h"

namespace instseg {

// Type, shape and device of RoIs; `name` is the tensor that they belong to.
inline void check_roi_rows(const char* op, const char* name, const at::Tensor& tensor,
                           const at::Tensor& rois) {
  check_floating(op, "rois", rois, 2);
  TORCH_CHECK_TYPE(rois.scalar_type() == at::kFloat || rois.scalar_type() == at::kDouble, op,
                   ": rois is ", rois.scalar_type(),
                   "; expected float32 or float64, half loses whole pixels");
  TORCH_CHECK_VALUE(rois.size(1) == kRoiNumbers, op, ": rois has ", rois.size(1),
                    " columns; expected 5 (batch index, x1, y1, x2, y2)");
  check_same_device(op, name, tensor, "rois", rois);
}

inline void check_spatial_scale(const char* op, double spatial_scale) {
  TORCH_CHECK_VALUE(std::isfinite(spatial_scale) && spatial_scale > 0, op, ": spatial_scale is ",
                    spatial_scale, "; expected cells per pixel, a positive number");
}

// All checks that do not need the values of the RoIs.
inline void check_psroi_arguments(const char* op, const char* name, const at::Tensor& tensor,
                                  const at::Tensor& rois, double spatial_scale, int64_t group_size,
                                  int64_t pooled_size) {
  check_floating(op, name, tensor, 4);
  check_roi_rows(op, name, tensor, rois);
  check_spatial_scale(op, spatial_scale);
  TORCH_CHECK_VALUE(group_size > 0 && group_size <= kMostCells, op, ": group_size is ", group_size,
                    "; expected 1 to ", kMostCells);
  TORCH_CHECK_VALUE(pooled_size > 0 && pooled_size <= kMostCells, op, ": pooled_size is ",
                    pooled_size, "; expected 1 to ", kMostCells);
}

// `per_part` is 1, or 2 where outside and inside maps come in pairs.
inline void check_channels(const char* op, int64_t channels, int64_t group_size, int64_t per_part) {
  const int64_t unit = per_part * group_size * group_size;
  TORCH_CHECK_VALUE(
      channels % unit == 0, op, ": maps has ", channels, " channels; expected a multiple of ", unit,
      per_part == 1 ? " (group_size * group_size)" : " (2 * group_size * group_size)");
}

// The gradient (R, D, P, P) of psroi_pool against the shape of its maps.
inline void check_pooled_shape(const char* op, const at::Tensor& grad, const at::Tensor& rois,
                               int64_t group_size, at::IntArrayRef maps_shape) {
  TORCH_CHECK_VALUE(maps_shape.size() == 4, op, ": maps_shape is ", maps_shape,
                    "; expected four numbers");
  check_channels(op, maps_shape[1], group_size, 1);
  const int64_t dims = maps_shape[1] / (group_size * group_size);
  TORCH_CHECK_VALUE(
      grad.size(0) == rois.size(0) && grad.size(1) == dims && grad.size(2) == grad.size(3), op,
      ": grad is ", grad.sizes(), "; expected (", rois.size(0), ", ", dims,
      ", pooled_size, pooled_size)");
}

// Checks the values of the RoIs, on the host alone: reading those of a GPU would wait for it.
template <typename T>
void check_roi_values(const char* op, const T* rows, int64_t count, int64_t images) {
  for (int64_t r = 0; r < count; ++r) {
    const T* row = rows + kRoiNumbers * r;
    TORCH_CHECK_INDEX(row[0] >= T(0) && row[0] < T(images) && std::floor(row[0]) == row[0], op,
                      ": rois[", r, "] has batch index ", row[0],
                      "; expected a whole number from 0 to ", images - 1);
    for (int i = 1; i < kRoiNumbers; ++i) {
      TORCH_CHECK_VALUE(std::isfinite(row[i]), op, ": rois[", r, "] has coordinate ", row[i],
                        "; expected finite numbers");
    }
  }
}

// The edges of every bin of every RoI, computed once: the bins of a row of RoIs share few numbers.
struct BinTable {
  int64_t pooled;
  std::vector<int64_t> image;  // of every RoI
  std::vector<int64_t> edges;  // (R, 4, pooled): y0, y1, x0, x1

  Bin bin(int64_t roi, int64_t py, int64_t px) const {
    const int64_t* row = edges.data() + 4 * pooled * roi;
    return {row[py], row[pooled + py], row[2 * pooled + px], row[3 * pooled + px]};
  }
};

// Checks the values of `rois`, which are (R, 5) and contiguous.
template <typename T>
BinTable tabulate_bins(const char* op, const at::Tensor& rois, int64_t images, int64_t height,
                       int64_t width, double spatial_scale, int64_t pooled) {
  const int64_t count = rois.size(0);
  const T* rows = rois.const_data_ptr<T>();
  check_roi_values(op, rows, count, images);
  BinTable table{pooled, std::vector<int64_t>(count), std::vector<int64_t>(count * 4 * pooled)};
  for (int64_t r = 0; r < count; ++r) {
    const Roi<T> roi(rows + kRoiNumbers * r, images, static_cast<T>(spatial_scale), pooled);
    table.image[r] = roi.image;
    int64_t* row = table.edges.data() + 4 * pooled * r;
    for (int64_t p = 0; p < pooled; ++p) {
      const Bin bin = roi.bin(p, p, height, width);
      row[p] = bin.y0;
      row[pooled + p] = bin.y1;
      row[2 * pooled + p] = bin.x0;
      row[3 * pooled + p] = bin.x1;
    }
  }
  return table;
}

}  // namespace instseg

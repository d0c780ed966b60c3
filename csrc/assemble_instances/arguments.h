// Checks of the arguments of assemble_instances, on the host.

#pragma once

#include <optional>

#include "common.h"

namespace instseg {

inline void check_assembling(const char* op, const at::Tensor& tensor,
                             const std::optional<at::Tensor>& windows, int64_t parts,
                             int64_t size) {
  TORCH_CHECK_VALUE(parts > 0 && parts <= kMostCells, op, ": parts is ", parts, "; expected 1 to ",
                    kMostCells);
  TORCH_CHECK_VALUE(size > 0 && size <= kMostCells, op, ": size is ", size, "; expected 1 to ",
                    kMostCells);
  if (!windows) return;
  TORCH_CHECK_VALUE(windows->dim() == 2 && windows->size(1) == 3, op, ": windows has shape ",
                    windows->sizes(), "; expected (N, 3), rows of image, y0, x0");
  TORCH_CHECK_TYPE(windows->scalar_type() == at::kLong, op, ": windows is ", windows->scalar_type(),
                   "; expected int64");
  check_same_device(op, "the first tensor", tensor, "windows", *windows);
}

inline void check_maps(const char* op, const at::Tensor& maps, int64_t parts) {
  check_floating(op, "maps", maps, 4);
  TORCH_CHECK_VALUE(maps.size(1) == parts * parts, op, ": maps has ", maps.size(1),
                    " channels; expected parts * parts = ", parts * parts);
}

inline void check_maps_gradient(const char* op, const at::Tensor& grad,
                                const std::optional<at::Tensor>& windows, int64_t parts,
                                at::IntArrayRef shape) {
  check_floating(op, "grad", grad, 3);
  TORCH_CHECK_VALUE(shape.size() == 4 && shape[1] == parts * parts && shape[0] >= 0 &&
                        shape[2] >= 0 && shape[3] >= 0,
                    op, ": maps_shape is ", shape, "; expected (B, parts * parts, H, W)");
  const int64_t count = windows ? windows->size(0) : shape[0] * shape[2] * shape[3];
  TORCH_CHECK_VALUE(grad.size(0) == count && grad.size(1) == grad.size(2), op, ": grad has shape ",
                    grad.sizes(), "; expected (", count, ", size, size)");
}

inline void check_images(const char* op, const std::optional<at::Tensor>& windows, int64_t images) {
  if (!windows) return;
  const int64_t* rows = windows->const_data_ptr<int64_t>();
  for (int64_t n = 0; n < windows->size(0); ++n)
    TORCH_CHECK_INDEX(rows[3 * n] >= 0 && rows[3 * n] < images, op, ": windows[", n,
                      "] has the batch index ", rows[3 * n], "; the maps hold ", images, " images");
}

}  // namespace instseg

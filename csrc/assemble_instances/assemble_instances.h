// Index arithmetic of InstanceFCN's instance assembling (paper section 3.1), for all four kernels.
//
// A window of size x size cells is split into parts x parts; the mask value at (i, j) is a copy of
// map part(i) * parts + part(j) at cell (y0 + i, x0 + j).

#pragma once

#include <optional>

#include "../common.h"

namespace instseg {

// The part that holds the centre of cell `i`; mirror-symmetric when `parts` is odd.
INSTSEG_HOST_DEVICE int64_t part_of_cell(int64_t i, int64_t parts, int64_t size) {
  return ((2 * i + 1) * parts) / (2 * size);
}

// First cell of a window centred at `centre`; of two middle cells the second is the centre.
INSTSEG_HOST_DEVICE int64_t first_cell_around(int64_t centre, int64_t size) {
  return centre - size / 2;
}

// A corner so far away that sums would overflow, moved to where the window is just outside as well.
INSTSEG_HOST_DEVICE int64_t bounded_corner(int64_t corner, int64_t size, int64_t length) {
  return corner < -size ? -size : (corner > length ? length : corner);
}

// Top-left cell of one window and the image it lies in (-1: in none, all of it is fill).
struct Window {
  int64_t image, y0, x0;
};

// Window number `n`: row n of `windows` (image, y0, x0), or without them the n-th centre.
INSTSEG_HOST_DEVICE Window window_at(const int64_t* windows, int64_t n, int64_t size,
                                     int64_t images, int64_t height, int64_t width) {
  if (windows == nullptr) {
    const int64_t cell = n % (height * width);
    return {n / (height * width), first_cell_around(cell / width, size),
            first_cell_around(cell % width, size)};
  }
  const int64_t image = windows[3 * n];
  return {image >= 0 && image < images ? image : -1,
          bounded_corner(windows[3 * n + 1], size, height),
          bounded_corner(windows[3 * n + 2], size, width)};
}

inline void check_assembling(const char* op, const at::Tensor& tensor,
                             const std::optional<at::Tensor>& windows, int64_t parts,
                             int64_t size) {
  constexpr int64_t most = 1 << 15;  // keeps every product below in 64 bits
  TORCH_CHECK_VALUE(parts > 0 && parts <= most, op, ": parts is ", parts, "; expected 1 to ", most);
  TORCH_CHECK_VALUE(size > 0 && size <= most, op, ": size is ", size, "; expected 1 to ", most);
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

}  // namespace instseg

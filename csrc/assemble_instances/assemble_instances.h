// Index arithmetic of InstanceFCN's instance assembling (paper section 3.1), for all four kernels.
//
// A window of size x size cells is split into parts x parts; the mask value at (i, j) is a copy of
// map part(i) * parts + part(j) at cell (y0 + i, x0 + j).

#pragma once

#include "common.h"

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

}  // namespace instseg

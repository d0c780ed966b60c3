// Bins of position-sensitive RoI pooling (FCIS, section 2.2; R-FCN), for every kernel of psroi_pool
// and fcis_head.  An operation is rounded before the next one starts, on every device: nvcc would
// fuse a * b + c, which moves some bin edges by a whole cell.

#pragma once

#include <cmath>
#include <cstdint>

#include "common.h"

namespace instseg {

// The number of whole cells before `edge`, within the map; 0 for NaN.
template <typename T>
INSTSEG_HOST_DEVICE int64_t clip_edge(T edge, int64_t length) {
  return edge > T(0) ? (edge < T(length) ? static_cast<int64_t>(edge) : length) : 0;
}

// One axis of one RoI in cells of the map; `first` and `last` are inclusive pixels.
template <typename T>
struct RoiAxis {
  T start;
  T bin;

  INSTSEG_HOST_DEVICE RoiAxis(T first, T last, T scale, int64_t pooled)
      : start(rounded_product(std::round(first), scale)) {
    const T end = rounded_product(rounded_sum(std::round(last), T(1)), scale);
    const T size = rounded_sum(end, -start);
    bin = (size > T(0.1) ? size : T(0.1)) / T(pooled);
  }

  // First cell of bin `p`.
  INSTSEG_HOST_DEVICE int64_t lower(int64_t p, int64_t length) const {
    return clip_edge(std::floor(rounded_sum(rounded_product(T(p), bin), start)), length);
  }

  // One past the last cell of bin `p`.
  INSTSEG_HOST_DEVICE int64_t upper(int64_t p, int64_t length) const {
    return clip_edge(std::ceil(rounded_sum(rounded_product(T(p + 1), bin), start)), length);
  }
};

// The cells of one bin: rows y0 .. y1 - 1 and columns x0 .. x1 - 1.
struct Bin {
  int64_t y0, y1, x0, x1;

  INSTSEG_HOST_DEVICE int64_t cells() const {
    return y1 > y0 && x1 > x0 ? (y1 - y0) * (x1 - x0) : 0;
  }
};

constexpr int kRoiNumbers = 5;

// One row (batch index, x1, y1, x2, y2) of the RoIs.  A row that cannot be used, with a number that
// is not finite or a batch index that no image has, has no cells.
template <typename T>
struct Roi {
  int64_t image;
  bool usable;
  RoiAxis<T> x, y;

  INSTSEG_HOST_DEVICE Roi(const T* row, int64_t images, T scale, int64_t pooled)
      : image(0),
        usable(row[0] >= T(0) && row[0] < T(images) && std::floor(row[0]) == row[0]),
        x(row[1], row[3], scale, pooled),
        y(row[2], row[4], scale, pooled) {
    for (int i = 1; i < kRoiNumbers; ++i) usable = usable && row[i] - row[i] == T(0);
    if (usable) image = static_cast<int64_t>(row[0]);
  }

  INSTSEG_HOST_DEVICE Bin bin(int64_t py, int64_t px, int64_t height, int64_t width) const {
    if (!usable) return {0, 0, 0, 0};
    return {y.lower(py, height), y.upper(py, height), x.lower(px, width), x.upper(px, width)};
  }
};

// The part, 0 .. group - 1, that bin `p` of `pooled` reads.
INSTSEG_HOST_DEVICE int64_t part_of_bin(int64_t p, int64_t group, int64_t pooled) {
  return p * group / pooled;
}

// The first bin that reads `part`; those before the first bin of the next part follow it.
INSTSEG_HOST_DEVICE int64_t first_bin_of_part(int64_t part, int64_t group, int64_t pooled) {
  return (part * pooled + group - 1) / group;
}

}  // namespace instseg

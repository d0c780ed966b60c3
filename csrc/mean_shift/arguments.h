// Checks of the arguments of mean shift, on the host.

#pragma once

#include <cmath>

#include "common.h"
#include "mean_shift/mean_shift.h"

namespace instseg {

inline void check_walk(const char* op, const Walk& walk) {
  TORCH_CHECK_VALUE(walk.bandwidth > 0 && std::isfinite(walk.bandwidth), op, ": bandwidth is ",
                    walk.bandwidth, "; expected a finite number above 0");
  TORCH_CHECK_VALUE(walk.max_iterations >= 0, op, ": max_iterations is ", walk.max_iterations,
                    "; expected at least 0");
  TORCH_CHECK_VALUE(walk.tolerance >= 0, op, ": tolerance is ", walk.tolerance,
                    "; expected at least 0");
}

inline void check_points(const char* op, const at::Tensor& points) {
  check_floating(op, "embeddings", points, 2);
  TORCH_CHECK_VALUE(points.size(1) > 0 && points.size(1) <= kMostDimensions, op,
                    ": embeddings has shape ", points.sizes(),
                    "; expected (N, D) with D from 1 to ", kMostDimensions);
  TORCH_CHECK_VALUE(points.size(0) < kMostPoints, op, ": embeddings has ", points.size(0),
                    " points; expected fewer than 2^31");
}

// `rows` is as wide as `points`, and on the same device.
inline void check_rows(const char* op, const char* name, const at::Tensor& rows,
                       const at::Tensor& points) {
  check_points(op, points);
  check_floating(op, name, rows, 2);
  check_same_device(op, "embeddings", points, name, rows);
  TORCH_CHECK_VALUE(rows.size(1) == points.size(1), op, ": ", name, " has shape ", rows.sizes(),
                    "; expected (any, ", points.size(1), ")");
}

inline void check_peel(const at::Tensor& points, const at::Tensor& bins, const Walk& walk,
                       int64_t min_points, int64_t max_clusters) {
  const char* op = "peel_clusters";
  check_points(op, points);
  check_walk(op, walk);
  check_same_device(op, "embeddings", points, "bins", bins);
  TORCH_CHECK_TYPE(bins.scalar_type() == at::kLong, op, ": bins is ", bins.scalar_type(),
                   "; expected int64");
  TORCH_CHECK_VALUE(bins.dim() == 1 && bins.size(0) == points.size(0), op, ": bins has shape ",
                    bins.sizes(), "; expected (", points.size(0), ",)");
  TORCH_CHECK_VALUE(min_points >= 1, op, ": min_points is ", min_points, "; expected at least 1");
  TORCH_CHECK_VALUE(max_clusters >= 0, op, ": max_clusters is ", max_clusters,
                    "; expected at least 0");
}

// Bins are fewer than points, so that as many counters as points are enough.
inline void check_bin_range(int64_t least, int64_t greatest, int64_t points) {
  TORCH_CHECK_VALUE(least >= 0 && greatest < points, "peel_clusters: bins are ", least, " to ",
                    greatest, "; expected 0 to ", points - 1);
}

inline void check_nearest(const at::Tensor& points, const at::Tensor& centres, double radius) {
  check_rows("nearest_centres", "centres", centres, points);
  TORCH_CHECK_VALUE(radius >= 0, "nearest_centres: radius is ", radius, "; expected at least 0");
}

}  // namespace instseg

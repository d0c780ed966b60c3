// What mean shift on the CPU and with CUDA share: the distance, the end of a walk, the checks.

#pragma once

#include <cmath>

#include "../common.h"

namespace instseg {

constexpr int64_t kMostDimensions = 64;
// Clusters in a row with too few points after which nothing is left but stragglers.
constexpr int64_t kMostFailures = 20;
// Labels of points while clusters are peeled off.
constexpr int64_t kUntouched = -2, kNone = -1;

// How a centre moves: to the mean of the points in its ball, until it stays or has moved often
// enough.
struct Walk {
  double bandwidth;
  int64_t max_iterations;
  double tolerance;  // as a share of the bandwidth
};

// Added in this order everywhere: rounded sums grow with every term, so a box that lies inside a
// ball by this arithmetic holds no point that lies outside by it.
template <typename T>
INSTSEG_HOST_DEVICE T squared_step(T sum, T a, T b) {
  const T difference = a - b;
  return sum + rounded_product(difference, difference);
}

// Moves `centre` to the mean of `count` points; false if it is to stay there.
INSTSEG_HOST_DEVICE bool walk_on(const Walk& walk, int64_t completed, int64_t dimensions,
                                 const double* sums, int64_t count, double* centre) {
  double moved = 0;
  for (int64_t d = 0; d < dimensions; ++d) {
    const double mean = sums[d] / static_cast<double>(count);
    moved = squared_step(moved, mean, centre[d]);
    centre[d] = mean;
  }
  return sqrt(moved) > rounded_product(walk.tolerance, walk.bandwidth) &&
         completed < walk.max_iterations;
}

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
  TORCH_CHECK_VALUE(points.size(0) < (int64_t{1} << 31), op, ": embeddings has ", points.size(0),
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

// So that as many counters as points are enough.
inline void check_bin_range(int64_t least, int64_t greatest, int64_t points) {
  TORCH_CHECK_VALUE(least >= 0 && greatest < points, "peel_clusters: bins are ", least, " to ",
                    greatest, "; expected 0 to ", points - 1);
}

inline at::ScalarType computed_type(const at::Tensor& points) {
  return points.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace instseg

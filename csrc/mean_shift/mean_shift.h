// Shared by mean shift on the CPU and with CUDA: the distance, the end of a walk.

#pragma once

#include <cmath>

#include "common.h"

namespace instseg {

constexpr int64_t kMostDimensions = 64;
constexpr int64_t kMostPoints = int64_t{1} << 31;  // fewer, so that an index has 32 bits
// After so many clusters in a row with too few points, only stragglers are left.
constexpr int64_t kMostFailures = 20;
// Labels of points while clusters are peeled off.
constexpr int64_t kUntouched = -2, kNone = -1;

// A centre moves to the mean of the points in its ball, until it stays or has moved
// `max_iterations` times.
struct Walk {
  double bandwidth;
  int64_t max_iterations;
  double tolerance;  // as a share of the bandwidth
};

// Terms are added in this order everywhere.  Rounded sums grow with every term, so a box that lies
// inside a ball by this arithmetic holds no point that lies outside by it.
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

inline at::ScalarType computed_type(const at::Tensor& points) {
  return points.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace instseg

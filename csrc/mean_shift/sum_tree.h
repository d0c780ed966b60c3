// A tree over points that tells their number and sum inside a ball, for the CPU.
//
// Every node knows the box, the number and the sum of its points, so a ball reads points only of
// the leaves that its surface cuts.  Nodes lie as in a heap: those of one level halve the points
// evenly.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "mean_shift/mean_shift.h"

namespace instseg {

constexpr int64_t kLeafPoints = 64;  // at most

// `values` is D planes of `count` points; `inside` is 1 for those in the ball, 0 for others.
template <typename T>
INSTSEG_INLINE void mark_inside(int64_t count, int64_t dimensions, const T* values, const T* centre,
                                T squared_radius, const T* present, T* inside) {
  std::array<T, kLeafPoints> distances{};
  for (int64_t d = 0; d < dimensions; ++d) {
    const T position = centre[d];
    const T* plane = values + d * count;
    for (int64_t i = 0; i < count; ++i)
      distances[i] = squared_step(distances[i], plane[i], position);
  }
  for (int64_t i = 0; i < count; ++i)
    inside[i] = distances[i] <= squared_radius ? present[i] : T(0);
}

template <typename T>
INSTSEG_INLINE double masked_sum(int64_t count, const T* values, const T* mask) {
  double sum = 0;
#ifndef _MSC_VER  // its OpenMP is older than simd
#pragma omp simd reduction(+ : sum)
#endif
  for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(mask[i]) * static_cast<double>(values[i]);
  return sum;
}

// Adds the points of a leaf that are in the ball to `sums`, and returns their number.
template <typename T>
INSTSEG_INLINE int64_t add_leaf(int64_t count, int64_t dimensions, const T* values, const T* centre,
                                T squared_radius, const T* present, double* sums) {
  std::array<T, kLeafPoints> inside;
  mark_inside(count, dimensions, values, centre, squared_radius, present, inside.data());
  const auto found = static_cast<int64_t>(masked_sum(count, present, inside.data()));
  if (found == 0) return 0;
  for (int64_t d = 0; d < dimensions; ++d)
    sums[d] += masked_sum(count, values + d * count, inside.data());
  return found;
}

// One copy per instruction set needs functions that are no templates.
#define INSTSEG_LEAVES(T)                                                                   \
  INSTSEG_SIMD inline int64_t leaf_sum(int64_t count, int64_t dimensions, const T* values,  \
                                       const T* centre, T squared_radius, const T* present, \
                                       double* sums) {                                      \
    return add_leaf(count, dimensions, values, centre, squared_radius, present, sums);      \
  }                                                                                         \
  INSTSEG_SIMD inline void leaf_mask(int64_t count, int64_t dimensions, const T* values,    \
                                     const T* centre, T squared_radius, const T* present,   \
                                     T* inside) {                                           \
    mark_inside(count, dimensions, values, centre, squared_radius, present, inside);        \
  }
INSTSEG_LEAVES(float)
INSTSEG_LEAVES(double)
#undef INSTSEG_LEAVES

template <typename T>
struct Ball {
  std::array<T, kMostDimensions> centre;
  T squared_radius;

  Ball(const double* position, int64_t dimensions, double radius)
      : squared_radius(static_cast<T>(radius) * static_cast<T>(radius)) {
    for (int64_t d = 0; d < dimensions; ++d) centre[d] = static_cast<T>(position[d]);
  }
};

template <typename T>
class SumTree {
 public:
  // `points` is (count, dimensions).
  SumTree(const T* points, int64_t count, int64_t dimensions)
      : count_(count),
        dimensions_(dimensions),
        order_(count),
        values_(count * dimensions),
        present_(count, T(1)) {
    while (count > leaves_ * kLeafPoints) leaves_ *= 2;
    boxes_.resize(2 * leaves_ * 2 * dimensions);
    sums_.resize(2 * leaves_ * dimensions);
    counts_.resize(2 * leaves_);
    for (int64_t i = 0; i < count; ++i) order_[i] = static_cast<int32_t>(i);
    for (int64_t first = 1; first <= leaves_; first *= 2)
      at::parallel_for(first, 2 * first, 1, [&](int64_t begin, int64_t end) {
        for (int64_t node = begin; node < end; ++node) split(points, node, first);
      });
    for (int64_t node = leaves_ - 1; node > 0; --node) join(node);
  }

  // The number of points in the ball; `sums` becomes their sum.
  int64_t sum(const Ball<T>& ball, double* sums) const {
    std::fill_n(sums, dimensions_, 0.0);
    return sum_below(1, ball, sums);
  }

  // Removes the points in the ball, after `taken(index)` of each; returns their number.
  template <typename F>
  int64_t take(const Ball<T>& ball, const F& taken) {
    return take_below(1, ball, taken);
  }

 private:
  struct Range {
    int64_t begin, end;
  };

  Range leaf_range(int64_t node) const { return range(node, leaves_); }

  // Points of a node in the level whose nodes are `first` to 2 * `first` - 1.
  Range range(int64_t node, int64_t first) const {
    return {count_ * (node - first) / first, count_ * (node - first + 1) / first};
  }

  void split(const T* points, int64_t node, int64_t first) {
    const Range all = range(node, first);
    T* low = boxes_.data() + node * 2 * dimensions_;
    T* high = low + dimensions_;
    std::fill_n(low, dimensions_, std::numeric_limits<T>::max());
    std::fill_n(high, dimensions_, std::numeric_limits<T>::lowest());
    for (int64_t i = all.begin; i < all.end; ++i) {
      const T* point = points + order_[i] * dimensions_;
      for (int64_t d = 0; d < dimensions_; ++d) {
        low[d] = std::min(low[d], point[d]);
        high[d] = std::max(high[d], point[d]);
      }
    }
    if (first == leaves_) {
      fill_leaf(points, node);
    } else {
      halve(points, all, range(2 * node, 2 * first).end, low, high);
    }
  }

  // Orders the points of a node such that those before `middle` come first along the longest side.
  void halve(const T* points, const Range& all, int64_t middle, const T* low, const T* high) {
    int64_t longest = 0;
    for (int64_t d = 1; d < dimensions_; ++d)
      if (high[d] - low[d] > high[longest] - low[longest]) longest = d;
    std::vector<std::pair<T, int32_t>> keys;
    keys.reserve(all.end - all.begin);
    // NaN, which has no place in an order, counts as the lowest.
    for (int64_t i = all.begin; i < all.end; ++i) {
      const T value = points[order_[i] * dimensions_ + longest];
      keys.emplace_back(std::max(std::numeric_limits<T>::lowest(), value), order_[i]);
    }
    std::nth_element(keys.begin(), keys.begin() + (middle - all.begin), keys.end());
    for (int64_t i = all.begin; i < all.end; ++i) order_[i] = keys[i - all.begin].second;
  }

  void fill_leaf(const T* points, int64_t node) {
    const Range leaf = leaf_range(node);
    const int64_t size = leaf.end - leaf.begin;
    T* values = values_.data() + leaf.begin * dimensions_;
    for (int64_t i = 0; i < size; ++i)
      for (int64_t d = 0; d < dimensions_; ++d)
        values[d * size + i] = points[order_[leaf.begin + i] * dimensions_ + d];
    count_leaf(node);
  }

  void count_leaf(int64_t node) {
    const Range leaf = leaf_range(node);
    const int64_t size = leaf.end - leaf.begin;
    const T* present = present_.data() + leaf.begin;
    counts_[node] = std::count(present, present + size, T(1));
    for (int64_t d = 0; d < dimensions_; ++d)
      sums_[node * dimensions_ + d] =
          masked_sum(size, values_.data() + leaf.begin * dimensions_ + d * size, present);
  }

  void join(int64_t node) {
    const int64_t left = 2 * node, right = left + 1;
    counts_[node] = counts_[left] + counts_[right];
    for (int64_t d = 0; d < dimensions_; ++d)
      sums_[node * dimensions_ + d] =
          sums_[left * dimensions_ + d] + sums_[right * dimensions_ + d];
  }

  enum class Overlap { kNone, kPart, kAll };

  Overlap overlap(int64_t node, const Ball<T>& ball) const {
    const T* low = boxes_.data() + node * 2 * dimensions_;
    const T* high = low + dimensions_;
    T nearest = 0, farthest = 0;
    for (int64_t d = 0; d < dimensions_; ++d) {
      const T position = ball.centre[d];
      nearest = squared_step(nearest, std::min(std::max(position, low[d]), high[d]), position);
      farthest = squared_step(farthest, position - low[d] > high[d] - position ? low[d] : high[d],
                              position);
    }
    if (!(nearest <= ball.squared_radius)) return Overlap::kNone;
    return farthest <= ball.squared_radius ? Overlap::kAll : Overlap::kPart;
  }

  int64_t sum_below(int64_t node, const Ball<T>& ball, double* sums) const {
    if (counts_[node] == 0) return 0;
    const Overlap part = overlap(node, ball);
    if (part == Overlap::kNone) return 0;
    if (part == Overlap::kAll) {
      for (int64_t d = 0; d < dimensions_; ++d) sums[d] += sums_[node * dimensions_ + d];
      return counts_[node];
    }
    if (node < leaves_) {
      const int64_t left = sum_below(2 * node, ball, sums);
      return left + sum_below(2 * node + 1, ball, sums);
    }
    const Range leaf = leaf_range(node);
    return leaf_sum(leaf.end - leaf.begin, dimensions_, values_.data() + leaf.begin * dimensions_,
                    ball.centre.data(), ball.squared_radius, present_.data() + leaf.begin, sums);
  }

  template <typename F>
  int64_t take_below(int64_t node, const Ball<T>& ball, const F& taken) {
    if (counts_[node] == 0 || overlap(node, ball) == Overlap::kNone) return 0;
    if (node < leaves_) {
      const int64_t left = take_below(2 * node, ball, taken);
      const int64_t both = left + take_below(2 * node + 1, ball, taken);
      if (both > 0) join(node);
      return both;
    }
    const Range leaf = leaf_range(node);
    const int64_t size = leaf.end - leaf.begin, before = counts_[node];
    std::array<T, kLeafPoints> inside;
    leaf_mask(size, dimensions_, values_.data() + leaf.begin * dimensions_, ball.centre.data(),
              ball.squared_radius, present_.data() + leaf.begin, inside.data());
    for (int64_t i = 0; i < size; ++i) {
      if (inside[i] == 0) continue;
      taken(order_[leaf.begin + i]);
      present_[leaf.begin + i] = 0;
    }
    count_leaf(node);
    return before - counts_[node];
  }

  int64_t count_, dimensions_, leaves_ = 1;
  std::vector<int32_t> order_;   // of the points, leaf by leaf
  std::vector<T> values_;        // leaf by leaf, D planes each
  std::vector<T> present_;       // 1, or 0 for points that were taken
  std::vector<T> boxes_;         // per node: D lower, D upper ends
  std::vector<double> sums_;     // per node
  std::vector<int64_t> counts_;  // per node
};

}  // namespace instseg

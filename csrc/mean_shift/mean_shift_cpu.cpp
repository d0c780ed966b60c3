// Mean shift on the CPU: seeds walk in parallel over one tree of sums; clusters are peeled off it
// one after the other.

#include <ATen/ops/aminmax.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/full.h>
#include <torch/library.h>

#include "mean_shift/arguments.h"
#include "mean_shift/sum_tree.h"

namespace instseg {
namespace {

// Walks from `centre` on; the number of points whose mean it is in the end, 0 if it met none.
template <typename T>
int64_t walk_from(const SumTree<T>& tree, const Walk& walk, int64_t dimensions, double* centre) {
  std::array<double, kMostDimensions> sums;
  for (int64_t completed = 0;; ++completed) {
    const int64_t count = tree.sum({centre, dimensions, walk.bandwidth}, sums.data());
    if (count == 0 || !walk_on(walk, completed, dimensions, sums.data(), count, centre))
      return count;
  }
}

template <typename T>
void shift(const at::Tensor& points, const Walk& walk, const at::Tensor& modes,
           const at::Tensor& counts) {
  const int64_t dimensions = points.size(1);
  const SumTree<T> tree(points.const_data_ptr<T>(), points.size(0), dimensions);
  auto* positions = modes.mutable_data_ptr<double>();
  auto* found = counts.mutable_data_ptr<int64_t>();
  at::parallel_for(0, modes.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      found[i] = walk_from(tree, walk, dimensions, positions + i * dimensions);
  });
}

std::tuple<at::Tensor, at::Tensor> shift_seeds_cpu(const at::Tensor& embeddings,
                                                   const at::Tensor& seeds, double bandwidth,
                                                   int64_t max_iterations, double tolerance) {
  const Walk walk{bandwidth, max_iterations, tolerance};
  check_rows("mean_shift", "seeds", seeds, embeddings);
  check_walk("mean_shift", walk);
  auto modes = seeds.to(at::kDouble, false, /*copy=*/true).contiguous();
  auto counts = at::full({seeds.size(0)}, 0, at::kLong);
  if (embeddings.size(0) == 0 || seeds.size(0) == 0) return {modes, counts};
  const auto points = embeddings.to(computed_type(embeddings)).contiguous();
  if (points.scalar_type() == at::kDouble) {
    shift<double>(points, walk, modes, counts);
  } else {
    shift<float>(points, walk, modes, counts);
  }
  return {modes, counts};
}

constexpr int64_t kBlockPoints = 64;

// Labels of up to kBlockPoints points, D planes of `count`; the first of equally near centres.
template <typename T>
INSTSEG_INLINE void label_points(int64_t count, int64_t dimensions, const T* planes,
                                 const T* centres, int64_t centre_count, T squared_radius,
                                 int64_t* labels) {
  std::array<T, kBlockPoints> best, distances;
  std::array<int32_t, kBlockPoints> found;
  best.fill(std::numeric_limits<T>::infinity());
  found.fill(-1);
  for (int64_t c = 0; c < centre_count; ++c) {
    distances.fill(T(0));
    for (int64_t d = 0; d < dimensions; ++d) {
      const T position = centres[c * dimensions + d];
      for (int64_t i = 0; i < kBlockPoints; ++i)
        distances[i] = squared_step(distances[i], planes[d * kBlockPoints + i], position);
    }
    for (int64_t i = 0; i < kBlockPoints; ++i) {
      found[i] = distances[i] < best[i] ? static_cast<int32_t>(c) : found[i];
      best[i] = distances[i] < best[i] ? distances[i] : best[i];
    }
  }
  for (int64_t i = 0; i < count; ++i) labels[i] = best[i] <= squared_radius ? found[i] : kNone;
}

#define INSTSEG_LABELS(T)                                                                     \
  INSTSEG_SIMD void labels_of_block(int64_t count, int64_t dimensions, const T* planes,       \
                                    const T* centres, int64_t centre_count, T squared_radius, \
                                    int64_t* labels) {                                        \
    label_points(count, dimensions, planes, centres, centre_count, squared_radius, labels);   \
  }
INSTSEG_LABELS(float)
INSTSEG_LABELS(double)
#undef INSTSEG_LABELS

template <typename T>
void label_all(const at::Tensor& points, const at::Tensor& centres, double radius,
               const at::Tensor& labels) {
  const int64_t count = points.size(0), dimensions = points.size(1);
  const T* values = points.const_data_ptr<T>();
  const T squared_radius = static_cast<T>(radius) * static_cast<T>(radius);
  const int64_t blocks = (count + kBlockPoints - 1) / kBlockPoints;
  at::parallel_for(0, blocks, 16, [&](int64_t begin, int64_t end) {
    std::array<T, kBlockPoints * kMostDimensions> planes{};
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockPoints, size = std::min(kBlockPoints, count - first);
      for (int64_t i = 0; i < size; ++i)
        for (int64_t d = 0; d < dimensions; ++d)
          planes[d * kBlockPoints + i] = values[(first + i) * dimensions + d];
      labels_of_block(size, dimensions, planes.data(), centres.const_data_ptr<T>(), centres.size(0),
                      squared_radius, labels.mutable_data_ptr<int64_t>() + first);
    }
  });
}

at::Tensor nearest_centres_cpu(const at::Tensor& embeddings, const at::Tensor& centres,
                               double radius) {
  check_nearest(embeddings, centres, radius);
  auto labels = at::full({embeddings.size(0)}, kNone, at::kLong);
  if (embeddings.size(0) == 0 || centres.size(0) == 0) return labels;
  const auto type = computed_type(embeddings);
  const auto points = embeddings.to(type).contiguous(), rows = centres.to(type).contiguous();
  if (type == at::kDouble) {
    label_all<double>(points, rows, radius, labels);
  } else {
    label_all<float>(points, rows, radius, labels);
  }
  return labels;
}

// The points of each bin in order of their index, and how many of them are untouched.
class Bins {
 public:
  Bins(const int64_t* bins, int64_t points, std::vector<int64_t> counts)
      : bins_(bins), members_(points), next_(counts.size()), untouched_(std::move(counts)) {
    int64_t begin = 0;
    for (size_t bin = 0; bin < next_.size(); ++bin) {
      next_[bin] = begin;
      begin += untouched_[bin];
    }
    std::vector<int64_t> end = next_;
    for (int64_t i = 0; i < points; ++i) members_[end[bins[i]]++] = static_cast<int32_t>(i);
  }

  void touch(int64_t point) { --untouched_[bins_[point]]; }

  // The first untouched point of the fullest bin, -1 if all are touched.
  int64_t seed(const int64_t* labels) {
    const auto fullest = std::max_element(untouched_.begin(), untouched_.end());
    if (fullest == untouched_.end() || *fullest == 0) return -1;
    int64_t& next = next_[fullest - untouched_.begin()];
    while (labels[members_[next]] != kUntouched) ++next;
    return members_[next];
  }

 private:
  const int64_t* bins_;
  std::vector<int32_t> members_;
  std::vector<int64_t> next_, untouched_;
};

struct Limits {
  int64_t min_points, max_clusters;
};

template <typename T>
void peel(const at::Tensor& points, Bins* bins, const Walk& walk, const Limits& limits,
          const at::Tensor& label_tensor, const at::Tensor& centre_tensor) {
  const int64_t dimensions = points.size(1);
  const T* values = points.const_data_ptr<T>();
  SumTree<T> tree(values, points.size(0), dimensions);
  auto* labels = label_tensor.mutable_data_ptr<int64_t>();
  auto* centres = centre_tensor.mutable_data_ptr<double>();
  std::array<double, kMostDimensions> centre, sums;
  for (int64_t clusters = 0, failures = 0;
       clusters < limits.max_clusters && failures < kMostFailures;) {
    const int64_t seed = bins->seed(labels);
    if (seed < 0) break;
    std::copy_n(values + seed * dimensions, dimensions, centre.data());
    walk_from(tree, walk, dimensions, centre.data());
    Ball<T> ball(centre.data(), dimensions, walk.bandwidth);
    const int64_t count = tree.sum(ball, sums.data());
    const bool enough = count >= limits.min_points;
    // A ball without a point would be met again: the seed goes by itself.
    if (count == 0) {
      std::copy_n(values + seed * dimensions, dimensions, centre.data());
      ball = Ball<T>(centre.data(), dimensions, 0);
    }
    const int64_t label = enough ? clusters : kNone;
    tree.take(ball, [&](int64_t point) {
      labels[point] = label;
      bins->touch(point);
    });
    if (enough) std::copy_n(centre.data(), dimensions, centres + clusters++ * dimensions);
    failures = enough ? 0 : failures + 1;
  }
  std::replace(labels, labels + points.size(0), kUntouched, kNone);
}

std::tuple<at::Tensor, at::Tensor> peel_clusters_cpu(const at::Tensor& embeddings,
                                                     const at::Tensor& bins, double bandwidth,
                                                     int64_t max_iterations, double tolerance,
                                                     int64_t min_points, int64_t max_clusters) {
  const Walk walk{bandwidth, max_iterations, tolerance};
  check_peel(embeddings, bins, walk, min_points, max_clusters);
  const int64_t count = embeddings.size(0);
  auto labels = at::full({count}, kUntouched, at::kLong);
  auto centres = at::full({max_clusters, embeddings.size(1)},
                          std::numeric_limits<double>::quiet_NaN(), at::kDouble);
  if (count == 0) return {labels, centres};
  const auto [least, greatest] = at::aminmax(bins);
  check_bin_range(least.item<int64_t>(), greatest.item<int64_t>(), count);
  const auto numbers = bins.contiguous(), counts = at::bincount(numbers);
  const auto* first = counts.const_data_ptr<int64_t>();
  Bins members(numbers.const_data_ptr<int64_t>(), count, {first, first + counts.size(0)});
  const auto points = embeddings.to(computed_type(embeddings)).contiguous();
  const Limits limits{min_points, max_clusters};
  if (points.scalar_type() == at::kDouble) {
    peel<double>(points, &members, walk, limits, labels, centres);
  } else {
    peel<float>(points, &members, walk, limits, labels, centres);
  }
  return {labels, centres};
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("shift_seeds", instseg::shift_seeds_cpu);
  m.impl("nearest_centres", instseg::nearest_centres_cpu);
  m.impl("peel_clusters", instseg::peel_clusters_cpu);
}

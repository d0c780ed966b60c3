// Mean shift on a GPU, without a tree: a block goes through all points for its seed; clusters are
// peeled off by all blocks together, in one launch that the host does not wait for.  No sum depends
// on which thread comes first, or on the number of blocks.
//
// A step of a centre reads every point and label once: N * (D * sizeof(T) + 8) bytes.

#include <ATen/ops/aminmax.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "cuda_common.cuh"
#include "mean_shift/arguments.h"
#include "mean_shift/mean_shift.h"

namespace instseg {
namespace {

constexpr int64_t kShares = 256;  // of the points, at most: each leaves a sum to be added up
using Packed = unsigned long long;
constexpr Packed kLowHalf = 0xffffffffull;

template <typename T>
struct Points {
  const T* planes;  // (D, N)
  int64_t count, dimensions;
  const int64_t* labels;  // only the untouched count; null: all
};

// Shared memory of a block that sums a ball.
template <typename T>
struct Scratch {
  T centre[kMostDimensions];
  bool inside[kThreads];
  double totals[kThreads];
};

template <typename T>
__device__ __forceinline__ bool is_inside(const Points<T>& points, int64_t i, const T* centre,
                                          T squared_radius) {
  if (i >= points.count || (points.labels != nullptr && points.labels[i] != kUntouched))
    return false;
  T distance = 0;
  for (int64_t d = 0; d < points.dimensions; ++d)
    distance = squared_step(distance, points.planes[d * points.count + i], centre[d]);
  return distance <= squared_radius;
}

// Adds up what the threads hold, `parts` rows of `columns` threads, row after row; the sum of each
// column comes to `totals`, for all threads of the block.
__device__ inline void sum_rows(double sum, int64_t parts, int64_t columns, double* totals) {
  totals[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  if (threadIdx.x < columns)
    for (int64_t k = 0; k < parts; ++k) sum += totals[k * columns + threadIdx.x];
  __syncthreads();
  if (threadIdx.x < columns) totals[threadIdx.x] = sum;
  __syncthreads();
}

// Number of the points begin..end-1 that are in the ball, for all threads of the block; their sum
// comes to scratch.totals, D numbers.  A thread adds up one dimension of every `parts`-th point.
template <typename T>
__device__ int64_t sum_ball(const Points<T>& points, int64_t begin, int64_t end,
                            const double* centre, double radius, Scratch<T>& scratch) {
  const int64_t dimensions = points.dimensions, parts = kThreads / dimensions;
  const int64_t part = threadIdx.x / dimensions, d = threadIdx.x % dimensions;
  const T squared_radius = static_cast<T>(radius) * static_cast<T>(radius);
  __syncthreads();
  if (threadIdx.x < dimensions) scratch.centre[threadIdx.x] = static_cast<T>(centre[threadIdx.x]);
  __syncthreads();
  int64_t count = 0;
  double sum = 0;
  for (int64_t tile = begin; tile < end; tile += kThreads) {
    const int64_t i = tile + threadIdx.x;
    const bool inside = i < end && is_inside(points, i, scratch.centre, squared_radius);
    scratch.inside[threadIdx.x] = inside;
    const int found = __syncthreads_count(inside);
    if (found == 0) continue;
    count += found;
    if (part < parts)
      for (int64_t k = part; k < kThreads; k += parts)
        if (scratch.inside[k])
          sum += static_cast<double>(points.planes[d * points.count + tile + k]);
    __syncthreads();
  }
  sum_rows(sum, parts, dimensions, scratch.totals);
  return count;
}

template <typename T>
__global__ void shift_kernel(Points<T> points, Walk walk, int64_t seeds, double* modes,
                             int64_t* counts) {
  __shared__ Scratch<T> scratch;
  __shared__ bool walking;
  for (int64_t seed = blockIdx.x; seed < seeds; seed += gridDim.x) {
    double* centre = modes + seed * points.dimensions;
    for (int64_t completed = 0;; ++completed) {
      const int64_t count = sum_ball(points, 0, points.count, centre, walk.bandwidth, scratch);
      if (threadIdx.x == 0) {
        walking =
            count > 0 && walk_on(walk, completed, points.dimensions, scratch.totals, count, centre);
        counts[seed] = count;
      }
      __syncthreads();
      if (!walking) break;
    }
    __syncthreads();
  }
}

template <typename T>
__global__ void label_kernel(Points<T> points, const T* centres, int64_t centre_count,
                             T squared_radius, int64_t* labels) {
  for (int64_t i = first_item(); i < points.count; i += item_step()) {
    T best = std::numeric_limits<T>::infinity();
    int64_t found = kNone;
    for (int64_t c = 0; c < centre_count; ++c) {
      T distance = 0;
      for (int64_t d = 0; d < points.dimensions; ++d)
        distance = squared_step(distance, points.planes[d * points.count + i],
                                centres[c * points.dimensions + d]);
      if (distance < best) {
        best = distance;
        found = c;
      }
    }
    labels[i] = best <= squared_radius ? found : kNone;
  }
}

// What blocks tell each other to choose the seed of a cluster.  The count of the fullest bin, with
// the complement of its number, so that the first of equals is the greatest; and the first point.
struct Choice {
  Packed fullest, seed;
};

INSTSEG_HOST_DEVICE Choice no_choice() { return {0, ~Packed{0}}; }

// What peel_kernel works on; `partial` is (2, shares, D + 1), the number last.
struct Peeling {
  const int64_t* bins;
  int64_t bin_count, shares;
  Walk walk;
  int64_t min_points, max_clusters;
  Choice* choices;  // two
  double* partial;
  int64_t *untouched, *labels;
  double* centres;
};

// Of all blocks: the first untouched point of the fullest bin, -1 if all are touched.
template <typename T>
__device__ int64_t choose_seed(const Points<T>& points, const Peeling& p, Choice* choice,
                               Choice& in_block) {
  const auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) in_block = no_choice();
  __syncthreads();
  Packed best = 0;
  for (int64_t i = first_item(); i < p.bin_count; i += item_step())
    best =
        max(best, static_cast<Packed>(p.untouched[i]) << 32 | (kLowHalf - static_cast<Packed>(i)));
  atomicMax(&in_block.fullest, best);
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(&choice->fullest, in_block.fullest);
  grid.sync();
  const Packed fullest = choice->fullest;
  if (fullest >> 32 == 0) return -1;
  const auto bin = static_cast<int64_t>(kLowHalf - (fullest & kLowHalf));
  for (int64_t i = first_item(); i < points.count; i += item_step()) {
    if (p.bins[i] != bin || p.labels[i] != kUntouched) continue;
    atomicMin(&in_block.seed, static_cast<Packed>(i));
    break;
  }
  __syncthreads();
  if (threadIdx.x == 0) atomicMin(&choice->seed, in_block.seed);
  grid.sync();
  return static_cast<int64_t>(choice->seed);
}

// Of all blocks: number of untouched points in the ball around `centre`, and their sum in
// `scratch.totals`.  A share of the points is summed by one block, and the shares are added in one
// order, by every block for itself.
template <typename T>
__device__ int64_t sum_shares(const Points<T>& points, const Peeling& p, const double* centre,
                              int64_t step, Scratch<T>& scratch) {
  const int64_t columns = points.dimensions + 1;
  double* const partial = p.partial + step % 2 * p.shares * columns;
  const int64_t tiles = (points.count + kThreads - 1) / kThreads;
  const int64_t size = (tiles + p.shares - 1) / p.shares * kThreads;
  for (int64_t share = blockIdx.x; share < p.shares; share += gridDim.x) {
    const int64_t begin = share * size, end = min(begin + size, points.count);
    const int64_t count = sum_ball(points, begin, end, centre, p.walk.bandwidth, scratch);
    if (threadIdx.x < points.dimensions)
      partial[share * columns + threadIdx.x] = scratch.totals[threadIdx.x];
    if (threadIdx.x == 0) partial[share * columns + points.dimensions] = static_cast<double>(count);
  }
  cooperative_groups::this_grid().sync();
  const int64_t parts = kThreads / columns;
  const int64_t part = threadIdx.x / columns, column = threadIdx.x % columns;
  double sum = 0;
  if (part < parts)
    for (int64_t share = part; share < p.shares; share += parts)
      sum += partial[share * columns + column];
  sum_rows(sum, parts, columns, scratch.totals);
  return static_cast<int64_t>(scratch.totals[points.dimensions]);
}

// Labels the points of the ball.
template <typename T>
__device__ void take(const Points<T>& points, const Peeling& p, const double* centre, double radius,
                     int64_t label, Scratch<T>& scratch) {
  const T squared_radius = static_cast<T>(radius) * static_cast<T>(radius);
  if (threadIdx.x < points.dimensions)
    scratch.centre[threadIdx.x] = static_cast<T>(centre[threadIdx.x]);
  __syncthreads();
  for (int64_t i = first_item(); i < points.count; i += item_step()) {
    if (!is_inside(points, i, scratch.centre, squared_radius)) continue;
    p.labels[i] = label;
    atomicAdd(reinterpret_cast<Packed*>(p.untouched + p.bins[i]), ~Packed{0});  // minus one
  }
}

// All blocks peel off the clusters together; every one of them computes each centre by itself, from
// the same sums.
template <typename T>
__global__ void peel_kernel(Points<T> points, Peeling p) {
  __shared__ Scratch<T> scratch;
  __shared__ double centre[kMostDimensions];
  __shared__ Choice in_block;
  __shared__ bool walking;
  const auto grid = cooperative_groups::this_grid();
  int64_t step = 0, clusters = 0, failures = 0;
  for (int64_t attempt = 0; clusters < p.max_clusters && failures < kMostFailures; ++attempt) {
    const int64_t seed = choose_seed(points, p, p.choices + attempt % 2, in_block);
    if (seed < 0) break;
    // All blocks have read that of the last cluster.
    if (blockIdx.x == 0 && threadIdx.x == 0) p.choices[(attempt + 1) % 2] = no_choice();
    const auto start_at_seed = [&] {
      if (threadIdx.x < points.dimensions)
        centre[threadIdx.x] = static_cast<double>(points.planes[threadIdx.x * points.count + seed]);
      __syncthreads();
    };
    start_at_seed();
    for (int64_t completed = 0;; ++completed) {
      const int64_t count = sum_shares(points, p, centre, step++, scratch);
      if (threadIdx.x == 0)
        walking = count > 0 &&
                  walk_on(p.walk, completed, points.dimensions, scratch.totals, count, centre);
      __syncthreads();
      if (!walking) break;
    }
    const int64_t count = sum_shares(points, p, centre, step++, scratch);
    const bool enough = count >= p.min_points;
    // A ball without a point would be met again: the seed goes by itself.
    if (count == 0) start_at_seed();
    if (enough && blockIdx.x == 0 && threadIdx.x < points.dimensions)
      p.centres[clusters * points.dimensions + threadIdx.x] = centre[threadIdx.x];
    take(points, p, centre, count == 0 ? 0 : p.walk.bandwidth, enough ? clusters : kNone, scratch);
    clusters += enough;
    failures = enough ? 0 : failures + 1;
    grid.sync();
  }
}

template <typename T>
Points<T> planes_of(const at::Tensor& planes, const int64_t* labels = nullptr) {
  return {planes.const_data_ptr<T>(), planes.size(1), planes.size(0), labels};
}

template <typename T>
void peel(const at::Tensor& planes, const at::Tensor& bins, const Walk& walk, int64_t min_points,
          int64_t max_clusters, const at::Tensor& labels, const at::Tensor& centres) {
  auto untouched = at::bincount(bins);
  const auto choices = at::empty({2, 2}, bins.options());
  choices.select(1, 0).fill_(0);
  choices.select(1, 1).fill_(-1);  // as no_choice()
  const int64_t shares = blocks_for(planes.size(1), kShares);
  const auto partial =
      at::empty({2, shares, planes.size(0) + 1}, planes.options().dtype(at::kDouble));
  const Peeling peeling{bins.const_data_ptr<int64_t>(),
                        untouched.numel(),
                        shares,
                        walk,
                        min_points,
                        max_clusters,
                        reinterpret_cast<Choice*>(choices.mutable_data_ptr<int64_t>()),
                        partial.mutable_data_ptr<double>(),
                        untouched.mutable_data_ptr<int64_t>(),
                        labels.mutable_data_ptr<int64_t>(),
                        centres.mutable_data_ptr<double>()};
  const auto points = planes_of<T>(planes, labels.const_data_ptr<int64_t>());
  launch_together(peel_kernel<T>, shares, c10::cuda::getCurrentCUDAStream(), points, peeling);
}

std::tuple<at::Tensor, at::Tensor> shift_seeds_cuda(const at::Tensor& embeddings,
                                                    const at::Tensor& seeds, double bandwidth,
                                                    int64_t max_iterations, double tolerance) {
  const Walk walk{bandwidth, max_iterations, tolerance};
  check_rows("mean_shift", "seeds", seeds, embeddings);
  check_walk("mean_shift", walk);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  auto modes = seeds.to(at::kDouble, false, /*copy=*/true).contiguous();
  auto counts = at::zeros({seeds.size(0)}, seeds.options().dtype(at::kLong));
  if (embeddings.size(0) == 0 || seeds.size(0) == 0) return {modes, counts};
  const auto planes = embeddings.to(computed_type(embeddings)).t().contiguous();
  const auto launch = [&](auto points) {
    shift_kernel<<<blocks_for_tasks(seeds.size(0)), kThreads, 0,
                   c10::cuda::getCurrentCUDAStream()>>>(points, walk, seeds.size(0),
                                                        modes.mutable_data_ptr<double>(),
                                                        counts.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (planes.scalar_type() == at::kDouble) {
    launch(planes_of<double>(planes));
  } else {
    launch(planes_of<float>(planes));
  }
  return {modes, counts};
}

template <typename T>
void label_all(const at::Tensor& planes, const at::Tensor& centres, double radius,
               const at::Tensor& labels) {
  label_kernel<<<blocks_for(planes.size(1)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      planes_of<T>(planes), centres.const_data_ptr<T>(), centres.size(0),
      static_cast<T>(radius) * static_cast<T>(radius), labels.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor nearest_centres_cuda(const at::Tensor& embeddings, const at::Tensor& centres,
                                double radius) {
  check_nearest(embeddings, centres, radius);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  auto labels = at::full({embeddings.size(0)}, kNone, embeddings.options().dtype(at::kLong));
  if (embeddings.size(0) == 0 || centres.size(0) == 0) return labels;
  const auto type = computed_type(embeddings);
  const auto planes = embeddings.to(type).t().contiguous(), rows = centres.to(type).contiguous();
  if (type == at::kDouble) {
    label_all<double>(planes, rows, radius, labels);
  } else {
    label_all<float>(planes, rows, radius, labels);
  }
  return labels;
}

std::tuple<at::Tensor, at::Tensor> peel_clusters_cuda(const at::Tensor& embeddings,
                                                      const at::Tensor& bins, double bandwidth,
                                                      int64_t max_iterations, double tolerance,
                                                      int64_t min_points, int64_t max_clusters) {
  const Walk walk{bandwidth, max_iterations, tolerance};
  check_peel(embeddings, bins, walk, min_points, max_clusters);
  const c10::cuda::CUDAGuard guard(embeddings.device());
  const int64_t count = embeddings.size(0);
  auto labels = at::full({count}, kUntouched, embeddings.options().dtype(at::kLong));
  auto centres =
      at::full({max_clusters, embeddings.size(1)}, std::numeric_limits<double>::quiet_NaN(),
               embeddings.options().dtype(at::kDouble));
  if (count == 0) return {labels, centres};
  const auto [least, greatest] = at::aminmax(bins);
  check_bin_range(least.item<int64_t>(), greatest.item<int64_t>(), count);
  const auto planes = embeddings.to(computed_type(embeddings)).t().contiguous();
  if (planes.scalar_type() == at::kDouble) {
    peel<double>(planes, bins.contiguous(), walk, min_points, max_clusters, labels, centres);
  } else {
    peel<float>(planes, bins.contiguous(), walk, min_points, max_clusters, labels, centres);
  }
  labels.clamp_(kNone);
  return {labels, centres};
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("shift_seeds", instseg::shift_seeds_cuda);
  m.impl("nearest_centres", instseg::nearest_centres_cuda);
  m.impl("peel_clusters", instseg::peel_clusters_cuda);
}

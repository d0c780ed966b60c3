// Mean shift on a GPU, without a tree: a block goes through all points for its seed; clusters are
// peeled off by all blocks together.  No sum depends on which thread comes first.

#include <ATen/ops/aminmax.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "cuda_common.cuh"
#include "mean_shift/arguments.h"
#include "mean_shift/mean_shift.h"

namespace instseg {
namespace {

constexpr int64_t kPeelingBlocks = 1024;  // at most: each leaves a sum to be added up
constexpr int64_t kStepsAtOnce = 8;       // between two looks of the host
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
  scratch.totals[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  if (threadIdx.x < dimensions)
    for (int64_t k = 0; k < parts; ++k) sum += scratch.totals[k * dimensions + threadIdx.x];
  __syncthreads();
  if (threadIdx.x < dimensions) scratch.totals[threadIdx.x] = sum;
  __syncthreads();
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

// State that the kernels of a peeling hand to each other.
struct State {
  double centre[kMostDimensions];
  double radius;
  Packed
      fullest;  // count, and the complement of the bin so that the first of equals is the greatest
  Packed seed;  // a point
  int64_t count;  // of the last ball
  bool walking;
};

__global__ void fullest_kernel(const int64_t* untouched, int64_t bins, State* state) {
  Packed best = 0;
  for (int64_t i = first_item(); i < bins; i += item_step())
    best = max(best, static_cast<Packed>(untouched[i]) << 32 | (kLowHalf - static_cast<Packed>(i)));
  atomicMax(&state->fullest, best);
}

__global__ void seed_kernel(const int64_t* bins, const int64_t* labels, int64_t points,
                            State* state) {
  const auto bin = static_cast<int64_t>(kLowHalf - (state->fullest & kLowHalf));
  for (int64_t i = first_item(); i < points; i += item_step())
    if (bins[i] == bin && labels[i] == kUntouched) atomicMin(&state->seed, static_cast<Packed>(i));
}

template <typename T>
__global__ void begin_kernel(Points<T> points, double radius, State* state) {
  for (int64_t d = threadIdx.x; d < points.dimensions; d += blockDim.x)
    state->centre[d] =
        static_cast<double>(points.planes[d * points.count + static_cast<int64_t>(state->seed)]);
  if (threadIdx.x == 0) {
    state->radius = radius;
    state->walking = true;
  }
}

// Every block sums its share of the ball; `partial` is (blocks, D + 1), the number last.
template <typename T>
__global__ void partial_kernel(Points<T> points, const State* state, bool always, double* partial) {
  __shared__ Scratch<T> scratch;
  if (!always && !state->walking) return;
  const int64_t tiles = (points.count + kThreads - 1) / kThreads;
  const int64_t share = (tiles + gridDim.x - 1) / gridDim.x * kThreads;
  const int64_t begin = blockIdx.x * share, end = min(begin + share, points.count);
  const int64_t count = sum_ball(points, begin, end, state->centre, state->radius, scratch);
  double* out = partial + blockIdx.x * (points.dimensions + 1);
  if (threadIdx.x < points.dimensions) out[threadIdx.x] = scratch.totals[threadIdx.x];
  if (threadIdx.x == 0) out[points.dimensions] = static_cast<double>(count);
}

// One block: adds up the shares; with `completed` moves the centre, without only counts.
__global__ void finish_kernel(const double* partial, int64_t blocks, int64_t dimensions, Walk walk,
                              int64_t completed, State* state) {
  __shared__ double sums[kMostDimensions + 1];
  if (completed >= 0 && !state->walking) return;
  if (threadIdx.x <= dimensions) {
    double sum = 0;
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * (dimensions + 1) + threadIdx.x];
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  state->count = static_cast<int64_t>(sums[dimensions]);
  if (completed >= 0)
    state->walking =
        state->count > 0 && walk_on(walk, completed, dimensions, sums, state->count, state->centre);
}

template <typename T>
__global__ void take_kernel(Points<T> points, const State* state, const int64_t* bins,
                            int64_t label, int64_t* labels, int64_t* untouched) {
  const T squared_radius = static_cast<T>(state->radius) * static_cast<T>(state->radius);
  __shared__ T centre[kMostDimensions];
  if (threadIdx.x < points.dimensions)
    centre[threadIdx.x] = static_cast<T>(state->centre[threadIdx.x]);
  __syncthreads();
  for (int64_t i = first_item(); i < points.count; i += item_step()) {
    if (!is_inside(points, i, centre, squared_radius)) continue;
    labels[i] = label;
    atomicAdd(reinterpret_cast<Packed*>(untouched + bins[i]), ~Packed{0});  // minus one
  }
}

__global__ void keep_kernel(const State* state, int64_t dimensions, double* centre) {
  if (threadIdx.x < dimensions) centre[threadIdx.x] = state->centre[threadIdx.x];
}

template <typename T>
Points<T> planes_of(const at::Tensor& planes, const int64_t* labels = nullptr) {
  return {planes.const_data_ptr<T>(), planes.size(1), planes.size(0), labels};
}

template <typename T>
class Peeling {
 public:
  Peeling(const at::Tensor& planes, const at::Tensor& bins, const Walk& walk,
          const at::Tensor& labels)
      : walk_(walk),
        bins_(bins),
        untouched_(at::bincount(bins)),
        labels_(labels.mutable_data_ptr<int64_t>()),
        points_(planes_of<T>(planes, labels_)),
        blocks_(blocks_for(points_.count, kPeelingBlocks)),
        partial_(at::empty({blocks_, points_.dimensions + 1}, planes.options().dtype(at::kDouble))),
        state_tensor_(
            at::zeros({static_cast<int64_t>(sizeof(State))}, planes.options().dtype(at::kByte))),
        state_(reinterpret_cast<State*>(state_tensor_.mutable_data_ptr<uint8_t>())),
        stream_(c10::cuda::getCurrentCUDAStream()) {}

  // Walks from the first untouched point of the fullest bin; false if all are touched.
  bool find() {
    host_.fullest = 0;
    host_.seed = ~Packed{0};
    write();
    fullest_kernel<<<blocks_for(untouched_.numel(), kPeelingBlocks), kThreads, 0, stream_>>>(
        untouched_.const_data_ptr<int64_t>(), untouched_.numel(), state_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    seed_kernel<<<blocks_, kThreads, 0, stream_>>>(bins_.const_data_ptr<int64_t>(), labels_,
                                                   points_.count, state_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    read();
    if (host_.fullest >> 32 == 0) return false;
    begin(walk_.bandwidth);
    for (int64_t completed = 0; completed == 0 || host_.walking; read())
      for (int64_t i = 0; i < kStepsAtOnce; ++i) step(completed++);
    step(-1);
    read();
    return true;
  }

  int64_t count() const { return host_.count; }

  // Labels the points of the ball; an empty one would be met again, so the seed goes by itself.
  void take(int64_t label) {
    if (host_.count == 0) begin(0);
    take_kernel<<<blocks_, kThreads, 0, stream_>>>(points_, state_, bins_.const_data_ptr<int64_t>(),
                                                   label, labels_,
                                                   untouched_.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void keep(double* centre) {
    keep_kernel<<<1, kMostDimensions, 0, stream_>>>(state_, points_.dimensions, centre);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  void begin(double radius) {
    begin_kernel<<<1, kMostDimensions, 0, stream_>>>(points_, radius, state_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void step(int64_t completed) {
    partial_kernel<<<blocks_, kThreads, 0, stream_>>>(points_, state_, completed < 0,
                                                      partial_.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    finish_kernel<<<1, 2 * kMostDimensions, 0, stream_>>>(
        partial_.const_data_ptr<double>(), blocks_, points_.dimensions, walk_, completed, state_);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void write() {
    C10_CUDA_CHECK(cudaMemcpyAsync(state_, &host_, sizeof(State), cudaMemcpyHostToDevice, stream_));
  }

  void read() {
    C10_CUDA_CHECK(cudaMemcpyAsync(&host_, state_, sizeof(State), cudaMemcpyDeviceToHost, stream_));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream_));
  }

  Walk walk_;
  at::Tensor bins_, untouched_;
  int64_t* labels_;
  Points<T> points_;
  unsigned blocks_;
  at::Tensor partial_, state_tensor_;
  State* state_;
  State host_{};
  cudaStream_t stream_;
};

template <typename T>
void peel(const at::Tensor& planes, const at::Tensor& bins, const Walk& walk, int64_t min_points,
          int64_t max_clusters, const at::Tensor& labels, const at::Tensor& centres) {
  Peeling<T> peeling(planes, bins, walk, labels);
  for (int64_t clusters = 0, failures = 0; clusters < max_clusters && failures < kMostFailures;) {
    if (!peeling.find()) break;
    const bool enough = peeling.count() >= min_points;
    peeling.take(enough ? clusters : kNone);
    if (enough) peeling.keep(centres.mutable_data_ptr<double>() + clusters++ * planes.size(0));
    failures = enough ? 0 : failures + 1;
  }
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

// FCIS's mask voting on a GPU.
//
// No mask is rendered to memory: whether a RoI covers a pixel is computed where it is asked.  Votes
// are whole numbers, so that the order in which threads find the voters does not matter.

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <climits>

#include "cuda_common.cuh"
#include "vote_masks/arguments.h"
#include "vote_masks/vote_masks.h"

namespace instseg {
namespace {

constexpr int kTileWidth = 32, kTileHeight = kThreads / kTileWidth;
constexpr int64_t kTileBlocks = 1 << 13;  // of all detections, about

// One block per class walks down the sorted scores; its threads share out the boxes below.
__global__ void nms_kernel(const float* boxes, const float* scores, const int64_t* order,
                           int64_t classes, int64_t count, float threshold, double score_threshold,
                           int64_t max_kept, bool* suppressed, bool* keep) {
  for (int64_t c = blockIdx.x; c < classes; c += gridDim.x) {
    const int64_t* ranks = order + c * count;
    bool* out = suppressed + c * count;
    int64_t kept = 0;
    for (int64_t i = 0; i < count && kept < max_kept; ++i) {
      const float score = scores[c * count + i];
      if (score < score_threshold) break;
      const float* box = boxes + 4 * ranks[i];
      if (!(score >= score_threshold) || out[i] || !pixel_box(box).valid) continue;
      ++kept;
      if (threadIdx.x == 0) keep[c * count + ranks[i]] = true;
      const float area = inclusive_area(box[0], box[1], box[2], box[3]);
      for (int64_t j = i + 1 + threadIdx.x; j < count; j += blockDim.x) {
        const float* other = boxes + 4 * ranks[j];
        const float width = fminf(box[2], other[2]) - fmaxf(box[0], other[0]) + 1.0f;
        const float height = fminf(box[3], other[3]) - fmaxf(box[1], other[1]) + 1.0f;
        if (overlaps(width, height, area, inclusive_area(other[0], other[1], other[2], other[3]),
                     threshold))
          out[j] = true;
      }
      __syncthreads();
    }
  }
}

at::Tensor nms_per_class_cuda(const at::Tensor& boxes, const at::Tensor& scores,
                              double iou_threshold, double score_threshold, int64_t max_kept) {
  check_nms_per_class(boxes, scores, max_kept);
  const c10::cuda::CUDAGuard guard(boxes.device());
  auto keep = at::zeros(scores.sizes(), scores.options().dtype(at::kBool));
  if (keep.numel() == 0) return keep;
  const auto corners = boxes.contiguous();
  const auto [sorted, order] =
      at::sort(scores.contiguous(), /*stable=*/true, /*dim=*/1, /*descending=*/true);
  const auto values = sorted.contiguous(), ranks = order.contiguous();
  auto suppressed = at::zeros(scores.sizes(), keep.options());
  nms_kernel<<<blocks_for_tasks(scores.size(0)), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      corners.const_data_ptr<float>(), values.const_data_ptr<float>(),
      ranks.const_data_ptr<int64_t>(), scores.size(0), scores.size(1),
      static_cast<float>(iou_threshold), score_threshold, max_kept,
      suppressed.mutable_data_ptr<bool>(), keep.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return keep;
}

struct Scene {
  const float *boxes, *masks, *weights;
  int64_t rois, count, size, height, width;
  float threshold;
  bool from_image;
};

__device__ bool covers(const Scene& s, int64_t roi, const PixelBox& box, int64_t y, int64_t x) {
  if (y < box.y1 || y > box.y2 || x < box.x1 || x > box.x2) return false;
  const Sample sy = mask_sample(y - box.y1, box.y2 - box.y1 + 1, s.size);
  const Sample sx = mask_sample(x - box.x1, box.x2 - box.x1 + 1, s.size);
  const float* upper = s.masks + (roi * s.size + sy.low) * s.size;
  const float* lower = s.masks + (roi * s.size + min(sy.low + 1, s.size - 1)) * s.size;
  const int64_t right = min(sx.low + 1, s.size - 1);
  return reaches(interpolate(upper[sx.low], lower[sx.low], sy.fraction),
                 interpolate(upper[right], lower[right], sy.fraction), sx.fraction, s.threshold);
}

// The regions that vote for each detection, and the pixels that they can cover.
struct Voters {
  int* numbers;  // (N, R): the first counts[n] of a row, in any order
  int* counts;   // (N,)
  int* bounds;   // (N, 4): x1, y1, x2, y2, inclusive; x2 < x1 for none
};

// One block for one detection.  What a thread reads at the end, it alone sets at the beginning.
__global__ void voters_kernel(Scene s, Voters voters) {
  __shared__ int num_voters;
  __shared__ int bounds[4];
  for (int64_t n = blockIdx.x; n < s.count; n += gridDim.x) {
    if (threadIdx.x == 0) num_voters = 0;
    if (threadIdx.x < 4) bounds[threadIdx.x] = threadIdx.x < 2 ? INT_MAX : -1;
    __syncthreads();
    for (int64_t r = threadIdx.x; r < s.rois; r += blockDim.x) {
      if (vote_of(s.weights[n * s.rois + r]) == 0) continue;
      const PixelBox box = pixel_box(s.boxes + 4 * r);
      if (!box.valid || box.x2 < 0 || box.y2 < 0 || box.x1 >= s.width || box.y1 >= s.height)
        continue;
      voters.numbers[n * s.rois + atomicAdd(&num_voters, 1)] = static_cast<int>(r);
      atomicMin(bounds, static_cast<int>(max(box.x1, int64_t{0})));
      atomicMin(bounds + 1, static_cast<int>(max(box.y1, int64_t{0})));
      atomicMax(bounds + 2, static_cast<int>(min(box.x2, s.width - 1)));
      atomicMax(bounds + 3, static_cast<int>(min(box.y2, s.height - 1)));
    }
    __syncthreads();
    if (threadIdx.x == 0) voters.counts[n] = num_voters;
    if (threadIdx.x < 4) voters.bounds[4 * n + threadIdx.x] = bounds[threadIdx.x];
  }
}

// A voter whose box reaches a tile, in shared memory.
struct TileVoter {
  PixelBox box;
  int64_t vote;
  int roi;
};

// Tight box of every average: some blocks for one detection, each of which goes through tiles of
// 32 x 8 pixels inside the bounds of the voters, a thread per pixel.
__global__ void tight_kernel(Scene s, Voters voters, int64_t enough, int64_t blocks_each,
                             int* lowest, int* highest) {
  __shared__ TileVoter held[kThreads];
  __shared__ int num_held;
  __shared__ int bounds[4];
  for (int64_t task = blockIdx.x; task < s.count * blocks_each; task += gridDim.x) {
    const int64_t n = task / blocks_each;
    const int* const reach = voters.bounds + 4 * n;
    const int num_voters = voters.counts[n];
    const int tiles_x = reach[2] < reach[0] ? 0 : (reach[2] - reach[0]) / kTileWidth + 1;
    const int tiles_y = reach[3] < reach[1] ? 0 : (reach[3] - reach[1]) / kTileHeight + 1;
    if (threadIdx.x < 4) bounds[threadIdx.x] = threadIdx.x < 2 ? INT_MAX : -1;
    for (int64_t t = task % blocks_each; t < int64_t{tiles_x} * tiles_y; t += blocks_each) {
      const int64_t left = reach[0] + t % tiles_x * kTileWidth;
      const int64_t top = reach[1] + t / tiles_x * kTileHeight;
      const int64_t x = left + threadIdx.x % kTileWidth, y = top + threadIdx.x / kTileWidth;
      int64_t votes = 0;
      for (int first = 0; first < num_voters; first += kThreads) {
        __syncthreads();
        if (threadIdx.x == 0) num_held = 0;
        __syncthreads();
        if (first + threadIdx.x < num_voters) {
          const int roi = voters.numbers[n * s.rois + first + threadIdx.x];
          const PixelBox box = pixel_box(s.boxes + 4 * roi);
          if (box.x1 < left + kTileWidth && box.x2 >= left && box.y1 < top + kTileHeight &&
              box.y2 >= top)
            held[atomicAdd(&num_held, 1)] = {box, vote_of(s.weights[n * s.rois + roi]), roi};
        }
        __syncthreads();
        for (int v = 0; v < num_held; ++v)
          if (covers(s, held[v].roi, held[v].box, y, x)) votes += held[v].vote;
      }
      if (votes >= enough && x < s.width && y < s.height) {
        atomicMin(bounds, static_cast<int>(x));
        atomicMin(bounds + 1, static_cast<int>(y));
        atomicMax(bounds + 2, static_cast<int>(x));
        atomicMax(bounds + 3, static_cast<int>(y));
      }
    }
    __syncthreads();
    if (threadIdx.x < 2 && bounds[2] >= 0) {
      atomicMin(lowest + 2 * n + threadIdx.x, bounds[threadIdx.x]);
      atomicMax(highest + 2 * n + threadIdx.x, bounds[2 + threadIdx.x]);
    }
    __syncthreads();
  }
}

// A thread per sample of the output masks; it sums the votes of the four pixels around it.
__global__ void resample_kernel(Scene s, Voters voters, const int* lowest, const int* highest,
                                float* out_boxes, float* out_masks) {
  const int64_t area = s.size * s.size;
  for (int64_t v = first_item(); v < s.count * area; v += item_step()) {
    const int64_t n = v / area, i = v % area / s.size, j = v % s.size;
    const bool found = highest[2 * n] >= 0;
    const int64_t x1 = found ? lowest[2 * n] : s.width / 2,
                  y1 = found ? lowest[2 * n + 1] : s.height / 2;
    const int64_t x2 = found ? highest[2 * n] : x1, y2 = found ? highest[2 * n + 1] : y1;
    if (v % area == 0) {
      const int64_t corners[] = {x1, y1, x2, y2};
      for (int c = 0; c < 4; ++c) out_boxes[4 * n + c] = static_cast<float>(corners[c]);
    }
    const Sample y = image_sample(i, s.size, y1, y2, s.height, s.from_image);
    const Sample x = image_sample(j, s.size, x1, x2, s.width, s.from_image);
    const int64_t below = min(y.low + 1, s.from_image ? s.height - 1 : y2);
    const int64_t right = min(x.low + 1, s.from_image ? s.width - 1 : x2);
    int64_t votes[4] = {0, 0, 0, 0};
    for (int k = 0; k < voters.counts[n]; ++k) {
      const int64_t r = voters.numbers[n * s.rois + k];
      const PixelBox box = pixel_box(s.boxes + 4 * r);
      if (box.x1 > right || box.x2 < x.low || box.y1 > below || box.y2 < y.low) continue;
      const int64_t vote = vote_of(s.weights[n * s.rois + r]);
      if (covers(s, r, box, y.low, x.low)) votes[0] += vote;
      if (covers(s, r, box, y.low, right)) votes[1] += vote;
      if (covers(s, r, box, below, x.low)) votes[2] += vote;
      if (covers(s, r, box, below, right)) votes[3] += vote;
    }
    out_masks[v] = bilinear(average_of(votes[0]), average_of(votes[1]), average_of(votes[2]),
                            average_of(votes[3]), y.fraction, x.fraction);
  }
}

std::tuple<at::Tensor, at::Tensor> average_masks_cuda(const at::Tensor& boxes,
                                                      const at::Tensor& masks,
                                                      const at::Tensor& weights,
                                                      double mask_threshold, int64_t height,
                                                      int64_t width, bool from_image) {
  check_average_masks(boxes, masks, weights, mask_threshold, height, width);
  const c10::cuda::CUDAGuard guard(boxes.device());
  const int64_t count = weights.size(0), size = masks.size(1);
  const auto contiguous = at::MemoryFormat::Contiguous;
  auto out_boxes = at::empty({count, 4}, boxes.options().memory_format(contiguous));
  auto out_masks = at::empty({count, size, size}, masks.options().memory_format(contiguous));
  if (count == 0) return {out_boxes, out_masks};
  const auto corners = boxes.contiguous(), values = masks.contiguous(),
             shares = weights.contiguous();
  const float threshold = static_cast<float>(mask_threshold);
  const Scene scene{corners.const_data_ptr<float>(),
                    values.const_data_ptr<float>(),
                    shares.const_data_ptr<float>(),
                    boxes.size(0),
                    count,
                    size,
                    height,
                    width,
                    threshold,
                    from_image};
  auto lowest = at::full({count, 2}, INT_MAX, boxes.options().dtype(at::kInt));
  auto highest = at::full({count, 2}, -1, boxes.options().dtype(at::kInt));
  auto numbers = at::empty({count, boxes.size(0)}, lowest.options());
  auto counts = at::empty({count}, lowest.options()),
       bounds = at::empty({count, 4}, lowest.options());
  const Voters voters{numbers.mutable_data_ptr<int>(), counts.mutable_data_ptr<int>(),
                      bounds.mutable_data_ptr<int>()};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  voters_kernel<<<blocks_for_tasks(count), kThreads, 0, stream>>>(scene, voters);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  // Tiles of a detection are known to the GPU only; there are no more blocks than tiles.
  const int64_t tiles =
      ((width + kTileWidth - 1) / kTileWidth) * ((height + kTileHeight - 1) / kTileHeight);
  const int64_t blocks_each = std::clamp<int64_t>(kTileBlocks / count, 1, tiles);
  tight_kernel<<<blocks_for_tasks(count * blocks_each), kThreads, 0, stream>>>(
      scene, voters, votes_for(threshold), blocks_each, lowest.mutable_data_ptr<int>(),
      highest.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  resample_kernel<<<blocks_for(out_masks.numel()), kThreads, 0, stream>>>(
      scene, voters, lowest.const_data_ptr<int>(), highest.const_data_ptr<int>(),
      out_boxes.mutable_data_ptr<float>(), out_masks.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out_boxes, out_masks};
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("nms_per_class", instseg::nms_per_class_cuda);
  m.impl("average_masks", instseg::average_masks_cuda);
}

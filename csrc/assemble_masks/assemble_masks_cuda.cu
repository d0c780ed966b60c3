// YOLACT's mask assembly on a GPU: a block makes a tile of one mask.  It computes the few cells
// that the tile reads in shared memory, then the pixels; tiles outside of the crop are left as they
// are.

#include <ATen/ops/zeros.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <algorithm>
#include <array>

#include "assemble_masks/arguments.h"
#include "assemble_masks/assemble_masks.h"
#include "cuda_common.cuh"

namespace instseg {
namespace {

constexpr int64_t kTilePixels = 32;  // per side at most
constexpr int64_t kTileCells = 34;   // per side at most, see tile_side

struct Scene {
  int64_t masks, prototypes, cells_y, cells_x, height, width;
  int64_t tile_height, tile_width, tiles_y, tiles_x;
};

// Pixels per side of a tile such that they read kTileCells cells at most: pixel t - 1 lies
// (t - 1) * cells / pixels behind the first, which together with roundings and neighbours is three
// more.
inline int64_t tile_side(int64_t pixels, int64_t cells) {
  return std::max<int64_t>(1, std::min(kTilePixels, (kTileCells - 3) * pixels / cells));
}

// Cells that the pixels begin..end-1 read.
template <typename T>
__device__ __forceinline__ Span cells_of_pixels(const Span& pixels, int64_t size, int64_t cells) {
  return {blend_at<T>(pixels.begin, size, cells).low,
          blend_at<T>(pixels.end - 1, size, cells).high + 1};
}

__device__ __forceinline__ bool overlap(const Span& a, const Span& b) {
  return a.begin < b.end && b.begin < a.end;
}

// Probability of one cell; `planes` is (K, h, w).
template <typename T>
__device__ __forceinline__ T cell_probability(const T* planes, const T* coefficients, int64_t y,
                                              int64_t x, const Scene& s) {
  T logit = 0;
  const T* at = planes + y * s.cells_x + x;
  for (int64_t k = 0; k < s.prototypes; ++k, at += s.cells_y * s.cells_x)
    logit += rounded_product(*at, coefficients[k]);
  return probability_of(logit);
}

template <typename T>
__global__ void assemble_kernel(Scene s, const T* planes, const T* coefficients, const T* boxes,
                                bool* out) {
  __shared__ T cells[kTileCells * kTileCells];
  const int64_t tiles = s.tiles_y * s.tiles_x;
  for (int64_t item = blockIdx.x; item < s.masks * tiles; item += gridDim.x) {
    const int64_t n = item / tiles, top = item % tiles / s.tiles_x * s.tile_height;
    const int64_t left = item % s.tiles_x * s.tile_width;
    const Span pixels_y{top, min(top + s.tile_height, s.height)};
    const Span pixels_x{left, min(left + s.tile_width, s.width)};
    const T* box = boxes + 4 * n;
    const Span crop_x = cropped_cells(box[0], box[2], s.width, s.cells_x);
    const Span crop_y = cropped_cells(box[1], box[3], s.height, s.cells_y);
    const Span read_y = cells_of_pixels<T>(pixels_y, s.height, s.cells_y);
    const Span read_x = cells_of_pixels<T>(pixels_x, s.width, s.cells_x);
    // The same for all threads, so that all of them reach the barrier.
    if (!overlap(crop_x, read_x) || !overlap(crop_y, read_y)) continue;
    const int columns = static_cast<int>(read_x.end - read_x.begin);
    const int rows = static_cast<int>(read_y.end - read_y.begin);
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) {
      const int row = i / columns;
      const int64_t y = read_y.begin + row, x = read_x.begin + (i - row * columns);
      const bool kept = y >= crop_y.begin && y < crop_y.end && x >= crop_x.begin && x < crop_x.end;
      cells[i] = kept ? cell_probability(planes, coefficients + n * s.prototypes, y, x, s) : T(0);
    }
    __syncthreads();
    // A thread owns a column.
    const int64_t column = left + threadIdx.x % kTilePixels;
    if (column < pixels_x.end) {
      const Blend<T> x = blend_at<T>(column, s.width, s.cells_x);
      const int x_low = static_cast<int>(x.low - read_x.begin);
      const int x_high = static_cast<int>(x.high - read_x.begin);
      bool* const to = out + n * s.height * s.width + column;
      for (int64_t row = top + threadIdx.x / kTilePixels; row < pixels_y.end;
           row += kThreads / kTilePixels) {
        const Blend<T> y = blend_at<T>(row, s.height, s.cells_y);
        const T* low = cells + static_cast<int>(y.low - read_y.begin) * columns;
        const T* high = cells + static_cast<int>(y.high - read_y.begin) * columns;
        const T value =
            blended(blended(low[x_low], x.low_weight, low[x_high], x.high_weight), y.low_weight,
                    blended(high[x_low], x.low_weight, high[x_high], x.high_weight), y.high_weight);
        to[row * s.width] = value > static_cast<T>(0.5);
      }
    }
    __syncthreads();
  }
}

template <typename T>
void assemble(const Scene& scene, const at::Tensor& planes, const at::Tensor& coefficients,
              const at::Tensor& boxes, const at::Tensor& masks) {
  const unsigned blocks = blocks_for_tasks(scene.masks * scene.tiles_y * scene.tiles_x);
  assemble_kernel<T><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      scene, planes.const_data_ptr<T>(), coefficients.const_data_ptr<T>(),
      boxes.const_data_ptr<T>(), masks.mutable_data_ptr<bool>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor zeros_for_masks(int64_t count, int64_t height, int64_t width, at::Device device) {
  uint64_t bytes = 0;
  const std::array<uint64_t, 3> sizes{static_cast<uint64_t>(count), static_cast<uint64_t>(height),
                                      static_cast<uint64_t>(width)};
  if (!c10::safe_multiplies_u64(sizes, &bytes)) {
    try {
      return at::zeros({count, height, width}, at::TensorOptions(at::kBool).device(device));
    } catch (const c10::OutOfMemoryError&) {  // with a message that names no argument
    }
  }
  TORCH_CHECK_WITH(OutOfMemoryError, false, no_memory_for_masks(count, height, width));
  return {};
}

at::Tensor assemble_masks_cuda(const at::Tensor& prototypes, const at::Tensor& coefficients,
                               const at::Tensor& boxes, int64_t height, int64_t width) {
  check_assemble_masks(prototypes, coefficients, boxes, height, width);
  const c10::cuda::CUDAGuard guard(prototypes.device());
  auto masks = zeros_for_masks(coefficients.size(0), height, width, prototypes.device());
  if (masks.numel() == 0) return masks;
  const auto type = prototypes.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto planes = prototypes.permute({2, 0, 1}).to(type).contiguous();
  const auto factors = coefficients.to(type).contiguous(), corners = boxes.to(type).contiguous();
  const int64_t cells_y = planes.size(1), cells_x = planes.size(2);
  const int64_t tile_height = tile_side(height, cells_y), tile_width = tile_side(width, cells_x);
  const Scene scene{masks.size(0),
                    planes.size(0),
                    cells_y,
                    cells_x,
                    height,
                    width,
                    tile_height,
                    tile_width,
                    (height + tile_height - 1) / tile_height,
                    (width + tile_width - 1) / tile_width};
  if (type == at::kDouble) {
    assemble<double>(scene, planes, factors, corners, masks);
  } else {
    assemble<float>(scene, planes, factors, corners, masks);
  }
  return masks;
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CUDA, m) { m.impl("assemble_masks", instseg::assemble_masks_cuda); }

// InstanceFCN's instance assembling on a GPU: a block copies windows; a thread sums the gradients
// of a cell, in the order of the windows, so the result is deterministic.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "assemble_instances/arguments.h"
#include "assemble_instances/assemble_instances.h"
#include "cuda_common.cuh"
#include "ordered_list.cuh"

namespace instseg {
namespace {

struct Shape {
  int64_t images, parts, size, height, width;
};

constexpr int kHeldCells = 256;  // of a side, whose parts are held in shared memory

// Offsets of a window's rows and columns into the maps, which are the same for all windows.
struct Offsets {
  int64_t rows[kHeldCells], columns[kHeldCells];
};

__device__ __forceinline__ int64_t row_offset(const Shape& s, int64_t i) {
  return part_of_cell(i, s.parts, s.size) * s.parts * s.height * s.width + i * s.width;
}

__device__ __forceinline__ int64_t column_offset(const Shape& s, int64_t j) {
  return part_of_cell(j, s.parts, s.size) * s.height * s.width + j;
}

// A block copies one window after the other.  A window has less than 2^31 values; there is one
// division of 32 bits for each.
template <typename scalar_t>
__global__ void assemble_kernel(int64_t count, const scalar_t* maps, const int64_t* windows,
                                Shape s, scalar_t fill, scalar_t* out) {
  __shared__ Offsets offsets;
  const auto size = static_cast<unsigned>(s.size);
  const bool held = s.size <= kHeldCells;
  if (held) {
    for (unsigned i = threadIdx.x; i < size; i += blockDim.x) {
      offsets.rows[i] = row_offset(s, i);
      offsets.columns[i] = column_offset(s, i);
    }
  }
  __syncthreads();
  for (int64_t n = blockIdx.x; n < count; n += gridDim.x) {
    const Window window = window_at(windows, n, s.size, s.images, s.height, s.width);
    const int64_t corner =
        window.image * s.parts * s.parts * s.height * s.width + window.y0 * s.width + window.x0;
    scalar_t* const to = out + n * s.size * s.size;
    for (unsigned v = threadIdx.x; v < size * size; v += blockDim.x) {
      const unsigned i = v / size, j = v - i * size;
      const int64_t y = window.y0 + i, x = window.x0 + j;
      const bool none = window.image < 0 || y < 0 || y >= s.height || x < 0 || x >= s.width;
      const int64_t row = held ? offsets.rows[i] : row_offset(s, i);
      to[v] = none ? fill : maps[corner + row + (held ? offsets.columns[j] : column_offset(s, j))];
    }
  }
}

// First cell of `part`; those before the first cell of the next part follow it.
INSTSEG_HOST_DEVICE int64_t first_cell_of_part(int64_t part, int64_t parts, int64_t size) {
  // The least i with (2 i + 1) * parts >= 2 * size * part.
  const int64_t i = (2 * size * part + parts - 1) / parts;  // of 2 i + 1
  return i / 2 < size ? i / 2 : size;
}

constexpr int64_t kTileSide = 16;  // cells of a block, one for each of its threads
static_assert(kTileSide * kTileSide == kThreads);

// Gradient of chosen windows, which may overlap in any way.  A block owns a tile of one map and
// lists the windows whose part reaches it, in their order.
template <typename scalar_t, typename sum_t>
__global__ void collect_kernel(int64_t count, const scalar_t* grad, const int64_t* windows, Shape s,
                               scalar_t* out) {
  __shared__ OrderedList list;
  __shared__ int64_t corners[kListed][2];
  const int64_t channels = s.parts * s.parts, tiles_x = (s.width + kTileSide - 1) / kTileSide;
  const int64_t tiles = (s.height + kTileSide - 1) / kTileSide * tiles_x;
  for (int64_t task = blockIdx.x; task < s.images * channels * tiles; task += gridDim.x) {
    const int64_t map = task / tiles, part = map % channels, image = map / channels;
    const int64_t top = task % tiles / tiles_x * kTileSide, left = task % tiles_x * kTileSide;
    const int64_t y = top + threadIdx.x / kTileSide, x = left + threadIdx.x % kTileSide;
    const int64_t i0 = first_cell_of_part(part / s.parts, s.parts, s.size);
    const int64_t i1 = first_cell_of_part(part / s.parts + 1, s.parts, s.size);
    const int64_t j0 = first_cell_of_part(part % s.parts, s.parts, s.size);
    const int64_t j1 = first_cell_of_part(part % s.parts + 1, s.parts, s.size);
    sum_t sum = 0;
    for (int64_t first = 0; first < count; first += kListed) {
      const int listed = list_items(list, first, count, [&](int64_t n) {
        const Window window = window_at(windows, n, s.size, s.images, s.height, s.width);
        return window.image == image && window.y0 + i0 < top + kTileSide && window.y0 + i1 > top &&
               window.x0 + j0 < left + kTileSide && window.x0 + j1 > left;
      });
      for (int k = threadIdx.x; k < listed; k += blockDim.x) {
        const Window window =
            window_at(windows, first + list.items[k], s.size, s.images, s.height, s.width);
        corners[k][0] = window.y0;
        corners[k][1] = window.x0;
      }
      __syncthreads();
      for (int k = 0; k < listed; ++k) {
        const int64_t i = y - corners[k][0], j = x - corners[k][1];
        if (i < i0 || i >= i1 || j < j0 || j >= j1) continue;
        const int64_t n = first + list.items[k];
        sum += static_cast<sum_t>(grad[(n * s.size + i) * s.size + j]);
      }
    }
    if (y < s.height && x < s.width)
      out[(map * s.height + y) * s.width + x] = static_cast<scalar_t>(sum);
  }
}

constexpr int kColumns = 64, kHeldSize = 32;
constexpr int kOutputs = 2;  // of a thread

// Gradient of a window around every cell: a block sums a part of a row of cells for a row of parts.
// The windows that a row of cells lies in are neighbours in memory but for one row of each: these
// are read in order, and the cells of a thread are not.  Up to 8 parts, every gradient is read
// once, and (size - 1) of kColumns twice; more parts read them again.
template <typename scalar_t, typename sum_t>
__global__ void gather_kernel(const scalar_t* grad, Shape s, scalar_t* out) {
  __shared__ sum_t held[(kColumns + kHeldSize - 1) * kHeldSize];
  const int size = static_cast<int>(s.size), half = size / 2, values = (kColumns + size - 1) * size;
  const int64_t tiles = (s.width + kColumns - 1) / kColumns;
  const int64_t outputs = s.parts * kColumns;
  const int column_step = kThreads / size, cell_step = kThreads % size;
  for (int64_t task = blockIdx.x; task < s.images * s.height * s.parts * tiles; task += gridDim.x) {
    const int64_t left = task % tiles * kColumns, row_of_parts = task / tiles % s.parts;
    const int64_t y = task / tiles / s.parts % s.height, image = task / tiles / s.parts / s.height;
    const int64_t i0 =
        max(first_cell_of_part(row_of_parts, s.parts, s.size), y + half - s.height + 1);
    const int64_t i1 = min(first_cell_of_part(row_of_parts + 1, s.parts, s.size), y + half + 1);
    for (int64_t first = 0; first < outputs; first += kOutputs * kThreads) {
      sum_t sums[kOutputs] = {};
      // The windows in their order.
      for (int64_t i = i1 - 1; i >= i0; --i) {
        const int64_t row = (image * s.height + y - i + half) * s.width;
        int column = threadIdx.x / size, j = threadIdx.x % size;
        __syncthreads();
        for (int v = threadIdx.x; v < values; v += kThreads) {
          const int64_t centre = left + half - (size - 1) + column;
          held[v] = centre < 0 || centre >= s.width
                        ? sum_t(0)
                        : static_cast<sum_t>(grad[((row + centre) * size + i) * size + j]);
          column += column_step;
          j += cell_step;
          if (j >= size) {
            j -= size;
            ++column;
          }
        }
        __syncthreads();
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          const int64_t output = first + o * kThreads + threadIdx.x;
          if (output >= outputs) continue;
          const int64_t part = output / kColumns;
          const int x = static_cast<int>(output % kColumns);
          const int j0 = static_cast<int>(first_cell_of_part(part, s.parts, s.size));
          const int j1 = static_cast<int>(first_cell_of_part(part + 1, s.parts, s.size));
          for (int k = j1 - 1; k >= j0; --k) sums[o] += held[(x + size - 1 - k) * size + k];
        }
      }
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        const int64_t output = first + o * kThreads + threadIdx.x;
        const int64_t x = left + output % kColumns;
        if (output >= outputs || x >= s.width) continue;
        const int64_t map = (image * s.parts + row_of_parts) * s.parts + output / kColumns;
        out[(map * s.height + y) * s.width + x] = static_cast<scalar_t>(sums[o]);
      }
    }
  }
}

// The same for windows with more than kHeldSize cells per side: a thread reads what it sums.
template <typename scalar_t, typename sum_t>
__global__ void gather_large_kernel(int64_t cells, const scalar_t* grad, Shape s, scalar_t* out) {
  for (int64_t c = first_item(); c < cells; c += item_step()) {
    const int64_t x = c % s.width, y = c / s.width % s.height, map = c / s.width / s.height;
    const int64_t part = map % (s.parts * s.parts), image = map / (s.parts * s.parts);
    const int64_t half = s.size / 2, py = part / s.parts, px = part % s.parts;
    const int64_t i0 = max(first_cell_of_part(py, s.parts, s.size), y + half - s.height + 1);
    const int64_t i1 = min(first_cell_of_part(py + 1, s.parts, s.size), y + half + 1);
    const int64_t j0 = max(first_cell_of_part(px, s.parts, s.size), x + half - s.width + 1);
    const int64_t j1 = min(first_cell_of_part(px + 1, s.parts, s.size), x + half + 1);
    sum_t sum = 0;
    for (int64_t i = i1 - 1; i >= i0; --i) {
      const int64_t row = (image * s.height + y - i + half) * s.width + x + half;
      for (int64_t j = j1 - 1; j >= j0; --j)
        sum += static_cast<sum_t>(grad[((row - j) * s.size + i) * s.size + j]);
    }
    out[c] = static_cast<scalar_t>(sum);
  }
}

// Threads of a block for one window: whole warps.
unsigned threads_for(int64_t size) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((size * size + kWarp - 1) / kWarp * kWarp, kWarp, kThreads));
}

at::Tensor assemble_instances_cuda(const at::Tensor& maps, const std::optional<at::Tensor>& windows,
                                   int64_t parts, int64_t size, double fill) {
  const char* op = "assemble_instances";
  check_assembling(op, maps, windows, parts, size);
  check_maps(op, maps, parts);
  const c10::cuda::CUDAGuard guard(maps.device());
  const Shape s{maps.size(0), parts, size, maps.size(2), maps.size(3)};
  const int64_t count = windows ? windows->size(0) : s.images * s.height * s.width;
  auto out =
      at::empty({count, size, size}, maps.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const auto input = maps.contiguous();
  const auto rows = windows ? windows->contiguous() : at::Tensor();
  const int64_t* row_data = windows ? rows.const_data_ptr<int64_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "assemble_instances", [&] {
        assemble_kernel<<<blocks_for_tasks(count), threads_for(size), 0,
                          c10::cuda::getCurrentCUDAStream()>>>(
            count, input.const_data_ptr<scalar_t>(), row_data, s, static_cast<scalar_t>(fill),
            out.mutable_data_ptr<scalar_t>());
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return out;
}

at::Tensor assemble_instances_backward_cuda(const at::Tensor& grad,
                                            const std::optional<at::Tensor>& windows, int64_t parts,
                                            at::IntArrayRef shape) {
  const char* op = "assemble_instances_backward";
  check_assembling(op, grad, windows, parts,
                   grad.dim() == 3 ? std::max<int64_t>(1, grad.size(1)) : 1);
  check_maps_gradient(op, grad, windows, parts, shape);
  const c10::cuda::CUDAGuard guard(grad.device());
  const Shape s{shape[0], parts, grad.size(1), shape[2], shape[3]};
  if (grad.numel() == 0) return at::zeros(shape, grad.options());
  auto out = at::empty(shape, grad.options().memory_format(at::MemoryFormat::Contiguous));
  if (out.numel() == 0) return out;
  const auto input = grad.contiguous();
  const auto rows = windows ? windows->contiguous() : at::Tensor();
  const int64_t tiles =
      (s.height + kTileSide - 1) / kTileSide * ((s.width + kTileSide - 1) / kTileSide);
  const int64_t strips = s.images * s.height * s.parts * ((s.width + kColumns - 1) / kColumns);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "assemble_instances", [&] {
        using sum_t = at::opmath_type<scalar_t>;
        const scalar_t* data = input.const_data_ptr<scalar_t>();
        scalar_t* const result = out.mutable_data_ptr<scalar_t>();
        if (windows) {
          collect_kernel<scalar_t, sum_t>
              <<<blocks_for_tasks(s.images * parts * parts * tiles), kThreads, 0, stream>>>(
                  rows.size(0), data, rows.const_data_ptr<int64_t>(), s, result);
        } else if (s.size <= kHeldSize) {
          gather_kernel<scalar_t, sum_t>
              <<<blocks_for_tasks(strips), kThreads, 0, stream>>>(data, s, result);
        } else {
          gather_large_kernel<scalar_t, sum_t>
              <<<blocks_for(out.numel()), kThreads, 0, stream>>>(out.numel(), data, s, result);
        }
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
  return out;
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("assemble_instances", instseg::assemble_instances_cuda);
  m.impl("assemble_instances_backward", instseg::assemble_instances_backward_cuda);
}

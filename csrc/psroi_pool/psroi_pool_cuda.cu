// Position-sensitive RoI pooling on a GPU; the arithmetic and its order are those of the CPU.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda_common.cuh"
#include "psroi_pool/arguments.h"
#include "psroi_pool/bin_table.cuh"

namespace instseg {
namespace {

constexpr const char* kOp = "psroi_pool";
struct Sizes {
  int64_t images, channels, height, width, rois, dims, group, pooled;
};

// One thread for one output.
template <typename T, typename A>
__global__ void pool_kernel(const T* maps, const A* rois, Sizes sizes, A scale, T* out) {
  const int64_t pooled = sizes.pooled, group = sizes.group;
  const int64_t count = sizes.rois * sizes.dims * pooled * pooled;
  for (int64_t i = first_item(); i < count; i += item_step()) {
    const int64_t px = i % pooled, py = i / pooled % pooled,
                  dim = i / (pooled * pooled) % sizes.dims;
    const Roi<A> roi(rois + kRoiNumbers * (i / (pooled * pooled * sizes.dims)), sizes.images, scale,
                     pooled);
    const Bin bin = roi.bin(py, px, sizes.height, sizes.width);
    const int64_t part = part_of_bin(py, group, pooled) * group + part_of_bin(px, group, pooled);
    const T* plane = maps + (roi.image * sizes.channels + dim * group * group + part) *
                                sizes.height * sizes.width;
    A total = 0;
    for (int64_t y = bin.y0; y < bin.y1; ++y) {
      for (int64_t x = bin.x0; x < bin.x1; ++x)
        total = rounded_sum(total, static_cast<A>(plane[y * sizes.width + x]));
    }
    const int64_t cells = bin.cells();
    out[i] = cells == 0 ? T(0) : static_cast<T>(total / A(cells));
  }
}

constexpr int64_t kTileSide = 16;  // cells of a block, one for each of its threads
static_assert(kTileSide * kTileSide == kThreads);
constexpr int kDims = 8;  // that a thread sums at once

// Adds the gradients of those bins of one RoI that hold the cell; `from` is that of the first bin.
template <typename T, typename A>
__device__ void add_bins(const T* from, const PartEdges& edges, const BinsOfPart& part, int64_t y,
                         int64_t x, int64_t pooled, int64_t dims, A* totals) {
  for (int64_t j = 0; j < part.y_end - part.y_begin; ++j) {
    const int y0 = edges.y[j], y1 = edges.y[edges.pitch + j];
    if (y < y0 || y >= y1) continue;
    for (int64_t i = 0; i < part.x_end - part.x_begin; ++i) {
      const int x0 = edges.x[i], x1 = edges.x[edges.pitch + i];
      if (x < x0 || x >= x1) continue;
      const A cells = A(static_cast<int64_t>(y1 - y0) * (x1 - x0));
      const T* bin = from + j * pooled + i;
#pragma unroll
      for (int d = 0; d < kDims; ++d)
        if (d < dims)
          totals[d] = rounded_sum(totals[d], static_cast<A>(bin[d * pooled * pooled]) / cells);
    }
  }
}

// One block for a tile of cells of one part, all dims after each other; a thread sums, for its
// cell, the gradients of the bins over it in the order of the RoIs: no two threads add to one
// number, so the result is deterministic.
//
// It reads every gradient once for each tile that its bin reaches, and writes every cell once.
template <typename T, typename A>
__global__ void collect_kernel(const T* grad, DeviceBins bins, Sizes sizes, T* out) {
  __shared__ TileRois rois;
  const int64_t parts = sizes.group * sizes.group, pooled = sizes.pooled;
  const int64_t tiles_x = (sizes.width + kTileSide - 1) / kTileSide;
  const int64_t tiles = (sizes.height + kTileSide - 1) / kTileSide * tiles_x;
  for (int64_t task = blockIdx.x; task < sizes.images * parts * tiles; task += gridDim.x) {
    const int64_t part = task / tiles % parts, image = task / tiles / parts;
    const int64_t top = task % tiles / tiles_x * kTileSide, left = task % tiles_x * kTileSide;
    const int64_t y = top + threadIdx.x / kTileSide, x = left + threadIdx.x % kTileSide;
    const Bin tile{top, top + kTileSide, left, left + kTileSide};
    const BinsOfPart part_bins(part, sizes.group, pooled);
    for (int64_t dim = 0; dim < sizes.dims; dim += kDims) {
      A totals[kDims] = {};
      for (int64_t first = 0; first < sizes.rois; first += kListed) {
        const int listed = list_rois(rois, bins, first, sizes.rois, image, part_bins, tile);
        for (int k = 0; k < listed; ++k) {
          const int64_t r = first + rois.list.items[k];
          const T* from = grad + ((r * sizes.dims + dim) * pooled + part_bins.y_begin) * pooled +
                          part_bins.x_begin;
          add_bins<T, A>(from, edges_of(rois, bins, first, k, part_bins), part_bins, y, x, pooled,
                         sizes.dims - dim, totals);
        }
      }
      if (y >= sizes.height || x >= sizes.width) continue;
      T* to = out +
              ((image * sizes.channels + dim * parts + part) * sizes.height + y) * sizes.width + x;
#pragma unroll
      for (int d = 0; d < kDims; ++d)
        if (dim + d < sizes.dims)
          to[d * parts * sizes.height * sizes.width] = static_cast<T>(totals[d]);
    }
  }
}

at::Tensor psroi_pool_cuda(const at::Tensor& maps_any, const at::Tensor& rois, double spatial_scale,
                           int64_t group_size, int64_t pooled_size) {
  check_psroi_arguments(kOp, "maps", maps_any, rois, spatial_scale, group_size, pooled_size);
  check_channels(kOp, maps_any.size(1), group_size, 1);
  const c10::cuda::CUDAGuard guard(maps_any.device());
  const int64_t dims = maps_any.size(1) / (group_size * group_size);
  at::Tensor out = at::empty({rois.size(0), dims, pooled_size, pooled_size}, maps_any.options());
  if (out.numel() == 0) return out;
  const at::Tensor maps = maps_any.contiguous();
  const Sizes sizes{maps.size(0), maps.size(1), maps.size(2), maps.size(3),
                    rois.size(0), dims,         group_size,   pooled_size};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    const at::Tensor rows = rois.to(c10::CppTypeToScalarType<A>::value).contiguous();
    pool_kernel<scalar_t, A>
        <<<blocks_for(out.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            maps.const_data_ptr<scalar_t>(), rows.const_data_ptr<A>(), sizes,
            static_cast<A>(spatial_scale), out.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

at::Tensor psroi_pool_backward_cuda(const at::Tensor& grad_any, const at::Tensor& rois,
                                    double spatial_scale, int64_t group_size,
                                    at::IntArrayRef maps_shape) {
  check_psroi_arguments(kOp, "grad", grad_any, rois, spatial_scale, group_size,
                        grad_any.dim() == 4 ? grad_any.size(2) : 1);
  check_pooled_shape(kOp, grad_any, rois, group_size, maps_shape);
  const c10::cuda::CUDAGuard guard(grad_any.device());
  at::Tensor out = at::empty(maps_shape, grad_any.options());
  if (out.numel() == 0) return out;
  const at::Tensor grad = grad_any.contiguous();
  const Sizes sizes{maps_shape[0], maps_shape[1], maps_shape[2], maps_shape[3],
                    rois.size(0),  grad.size(1),  group_size,    grad.size(2)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    const at::Tensor rows = rois.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const BinTensors table = tabulate_bins_on_gpu<A>(kOp, rows, sizes.images, sizes.height,
                                                     sizes.width, spatial_scale, sizes.pooled);
    const int64_t tiles =
        (sizes.height + kTileSide - 1) / kTileSide * ((sizes.width + kTileSide - 1) / kTileSide);
    collect_kernel<scalar_t, A><<<blocks_for_tasks(sizes.images * group_size * group_size * tiles),
                                  kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        grad.const_data_ptr<scalar_t>(), table.view(), sizes, out.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("psroi_pool", psroi_pool_cuda);
  m.impl("psroi_pool_backward", psroi_pool_backward_cuda);
}

}  // namespace instseg

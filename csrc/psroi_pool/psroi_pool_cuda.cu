// Position-sensitive RoI pooling on a GPU; the arithmetic and its order are those of the CPU.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "cuda_common.cuh"
#include "psroi_pool/arguments.h"

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

// One thread for one cell of the maps, which sums the gradients of the bins of its part over it, in
// the order of the RoIs: no two threads add to one number, so the result is deterministic.
template <typename T, typename A>
__global__ void collect_kernel(const T* grad, const A* rois, Sizes sizes, A scale, T* out) {
  const int64_t pooled = sizes.pooled, group = sizes.group;
  const int64_t count = sizes.images * sizes.channels * sizes.height * sizes.width;
  for (int64_t i = first_item(); i < count; i += item_step()) {
    const int64_t x = i % sizes.width, y = i / sizes.width % sizes.height;
    const int64_t channel = i / (sizes.width * sizes.height) % sizes.channels;
    const int64_t image = i / (sizes.width * sizes.height * sizes.channels);
    const int64_t dim = channel / (group * group), gy = channel / group % group,
                  gx = channel % group;
    const int64_t y_begin = first_bin_of_part(gy, group, pooled),
                  y_end = first_bin_of_part(gy + 1, group, pooled);
    const int64_t x_begin = first_bin_of_part(gx, group, pooled),
                  x_end = first_bin_of_part(gx + 1, group, pooled);
    A total = 0;
    for (int64_t r = 0; r < sizes.rois; ++r) {
      const Roi<A> roi(rois + kRoiNumbers * r, sizes.images, scale, pooled);
      if (!roi.usable || roi.image != image) continue;
      const T* from = grad + (r * sizes.dims + dim) * pooled * pooled;
      for (int64_t py = y_begin; py < y_end; ++py) {
        if (y < roi.y.lower(py, sizes.height) || y >= roi.y.upper(py, sizes.height)) continue;
        for (int64_t px = x_begin; px < x_end; ++px) {
          const Bin bin = roi.bin(py, px, sizes.height, sizes.width);
          if (x < bin.x0 || x >= bin.x1) continue;
          total = rounded_sum(total, static_cast<A>(from[py * pooled + px]) / A(bin.cells()));
        }
      }
    }
    out[i] = static_cast<T>(total);
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
    collect_kernel<scalar_t, A>
        <<<blocks_for(out.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            grad.const_data_ptr<scalar_t>(), rows.const_data_ptr<A>(), sizes,
            static_cast<A>(spatial_scale), out.mutable_data_ptr<scalar_t>());
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

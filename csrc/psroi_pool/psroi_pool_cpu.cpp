// Position-sensitive RoI pooling on the CPU.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "psroi_pool/arguments.h"

namespace instseg {
namespace {

constexpr const char* kOp = "psroi_pool";

// Sum over the cells of one bin, row by row.
template <typename T, typename A>
A sum_cells(const T* plane, const Bin& bin, int64_t width) {
  A total = 0;
  for (int64_t y = bin.y0; y < bin.y1; ++y) {
    for (int64_t x = bin.x0; x < bin.x1; ++x) total += static_cast<A>(plane[y * width + x]);
  }
  return total;
}

template <typename T, typename A>
void pool(const at::Tensor& maps, const at::Tensor& rois, double spatial_scale, int64_t group,
          at::Tensor& out) {
  const int64_t images = maps.size(0), channels = maps.size(1), height = maps.size(2),
                width = maps.size(3);
  const int64_t dims = out.size(1), pooled = out.size(2);
  const BinTable table = tabulate_bins<A>(kOp, rois, images, height, width, spatial_scale, pooled);
  const T* in = maps.const_data_ptr<T>();
  T* const to = out.mutable_data_ptr<T>();
  at::parallel_for(
      0, rois.size(0) * dims, grain_size(4 * pooled * pooled), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t roi = i / dims, dim = i % dims;
          const T* first =
              in + (table.image[roi] * channels + dim * group * group) * height * width;
          T* cell = to + i * pooled * pooled;
          for (int64_t py = 0; py < pooled; ++py) {
            const int64_t row = part_of_bin(py, group, pooled) * group;
            for (int64_t px = 0; px < pooled; ++px, ++cell) {
              const Bin bin = table.bin(roi, py, px);
              const T* plane = first + (row + part_of_bin(px, group, pooled)) * height * width;
              const int64_t count = bin.cells();
              *cell =
                  count == 0 ? T(0) : static_cast<T>(sum_cells<T, A>(plane, bin, width) / A(count));
            }
          }
        }
      });
}

// A thread owns channels and adds to them in the order of the RoIs, so the result is deterministic.
template <typename T, typename A>
void spread(const at::Tensor& grad, const at::Tensor& rois, double spatial_scale, int64_t group,
            at::Tensor& out) {
  const int64_t images = out.size(0), channels = out.size(1), height = out.size(2),
                width = out.size(3);
  const int64_t dims = grad.size(1), pooled = grad.size(2);
  const BinTable table = tabulate_bins<A>(kOp, rois, images, height, width, spatial_scale, pooled);
  const T* in = grad.const_data_ptr<T>();
  A* const to = out.mutable_data_ptr<A>();
  at::parallel_for(0, channels, grain_size(rois.size(0) * 4 * pooled * pooled / (group * group)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t channel = begin; channel < end; ++channel) {
                       const int64_t dim = channel / (group * group);
                       const int64_t gy = channel / group % group, gx = channel % group;
                       const int64_t y_end = first_bin_of_part(gy + 1, group, pooled);
                       const int64_t x_end = first_bin_of_part(gx + 1, group, pooled);
                       for (int64_t roi = 0; roi < grad.size(0); ++roi) {
                         const T* from = in + (roi * dims + dim) * pooled * pooled;
                         A* plane = to + (table.image[roi] * channels + channel) * height * width;
                         for (int64_t py = first_bin_of_part(gy, group, pooled); py < y_end; ++py) {
                           for (int64_t px = first_bin_of_part(gx, group, pooled); px < x_end;
                                ++px) {
                             const Bin bin = table.bin(roi, py, px);
                             const int64_t cells = bin.cells();
                             if (cells == 0) continue;
                             const A share = static_cast<A>(from[py * pooled + px]) / A(cells);
                             for (int64_t y = bin.y0; y < bin.y1; ++y) {
                               for (int64_t x = bin.x0; x < bin.x1; ++x)
                                 plane[y * width + x] += share;
                             }
                           }
                         }
                       }
                     }
                   });
}

at::Tensor psroi_pool_cpu(const at::Tensor& maps, const at::Tensor& rois, double spatial_scale,
                          int64_t group_size, int64_t pooled_size) {
  check_psroi_arguments(kOp, "maps", maps, rois, spatial_scale, group_size, pooled_size);
  check_channels(kOp, maps.size(1), group_size, 1);
  const int64_t dims = maps.size(1) / (group_size * group_size);
  at::Tensor out = at::empty({rois.size(0), dims, pooled_size, pooled_size}, maps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    const at::Tensor rows = rois.to(c10::CppTypeToScalarType<A>::value).contiguous();
    pool<scalar_t, A>(maps.contiguous(), rows, spatial_scale, group_size, out);
  });
  return out;
}

at::Tensor psroi_pool_backward_cpu(const at::Tensor& grad, const at::Tensor& rois,
                                   double spatial_scale, int64_t group_size,
                                   at::IntArrayRef maps_shape) {
  check_psroi_arguments(kOp, "grad", grad, rois, spatial_scale, group_size,
                        grad.dim() == 4 ? grad.size(2) : 1);
  check_pooled_shape(kOp, grad, rois, group_size, maps_shape);
  at::Tensor out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    out = at::zeros(maps_shape, grad.options().dtype(type));
    spread<scalar_t, A>(grad.contiguous(), rois.to(type).contiguous(), spatial_scale, group_size,
                        out);
  });
  return out.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("psroi_pool", psroi_pool_cpu);
  m.impl("psroi_pool_backward", psroi_pool_backward_cpu);
}

}  // namespace instseg

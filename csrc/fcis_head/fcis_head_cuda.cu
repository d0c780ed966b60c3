// The FCIS head on a GPU; the arithmetic and its order are those of the CPU.

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cuda_common.cuh"
#include "fcis_head/arguments.h"
#include "fcis_head/fcis_head.h"

namespace instseg {
namespace {

constexpr const char* kOp = "fcis_head";
constexpr int kFinishThreads = 128;

struct Sizes {
  int64_t images, height, width, rois, classes, group, pooled;

  Sizes(const at::Tensor& maps, const at::Tensor& rows, int64_t group_size, int64_t pooled_size)
      : images(maps.size(0)),
        height(maps.size(2)),
        width(maps.size(3)),
        rois(rows.size(0)),
        classes(maps.size(1) / (2 * group_size * group_size)),
        group(group_size),
        pooled(pooled_size) {}

  INSTSEG_HOST_DEVICE int64_t parts() const { return group * group; }
  INSTSEG_HOST_DEVICE int64_t bins() const { return pooled * pooled; }
  INSTSEG_HOST_DEVICE int64_t cell_stride() const { return parts() * 2 * classes; }
  INSTSEG_HOST_DEVICE int64_t image_stride() const { return height * width * cell_stride(); }
};

// Sums over a bin of the outside and the inside map of one class; `from` is outside at cell (0, 0).
template <typename T, typename A>
__device__ void sum_bin(const T* from, const Bin& bin, const Sizes& sizes, A& outside, A& inside) {
  outside = inside = A(0);
  for (int64_t y = bin.y0; y < bin.y1; ++y) {
    for (int64_t x = bin.x0; x < bin.x1; ++x) {
      const T* cell = from + (y * sizes.width + x) * sizes.cell_stride();
      outside = rounded_sum(outside, static_cast<A>(cell[0]));
      inside = rounded_sum(inside, static_cast<A>(cell[sizes.classes]));
    }
  }
}

// One block for one RoI and slice of the parts, one thread for one class: neighbouring threads read
// neighbouring numbers.
template <typename T, typename A>
__global__ void share_kernel(const T* maps, const A* rois, Sizes sizes, A scale, A* shares) {
  const int64_t slices = count_slices(sizes.parts());
  for (int64_t task = blockIdx.x; task < sizes.rois * slices; task += gridDim.x) {
    const int64_t r = task / slices, slice = task % slices;
    const Roi<A> roi(rois + kRoiNumbers * r, sizes.images, scale, sizes.pooled);
    const int64_t part_end = first_part_of_slice(slice + 1, sizes.parts());
    for (int64_t c = threadIdx.x; c < sizes.classes; c += blockDim.x) {
      A score = 0;
      for (int64_t part = first_part_of_slice(slice, sizes.parts()); part < part_end; ++part) {
        const T* from = maps + roi.image * sizes.image_stride() + part * 2 * sizes.classes + c;
        const int64_t gy = part / sizes.group, gx = part % sizes.group;
        const int64_t y_end = first_bin_of_part(gy + 1, sizes.group, sizes.pooled);
        const int64_t x_end = first_bin_of_part(gx + 1, sizes.group, sizes.pooled);
        for (int64_t py = first_bin_of_part(gy, sizes.group, sizes.pooled); py < y_end; ++py) {
          for (int64_t px = first_bin_of_part(gx, sizes.group, sizes.pooled); px < x_end; ++px) {
            const Bin bin = roi.bin(py, px, sizes.height, sizes.width);
            const int64_t cells = bin.cells();
            if (cells == 0) continue;
            A outside, inside;
            sum_bin(from, bin, sizes, outside, inside);
            score = rounded_sum(score, rounded_product(larger(outside, inside), A(1) / A(cells)));
          }
        }
      }
      shares[(slice * sizes.rois + r) * sizes.classes + c] = score;
    }
  }
}

// One block for one RoI: adds the slices, chooses the class if `choose`, and computes its logits.
template <typename T, typename A>
__global__ void finish_kernel(const T* maps, const A* rois, const A* shares, Sizes sizes, A scale,
                              bool choose, T* scores, T* logits, int64_t* classes) {
  for (int64_t r = blockIdx.x; r < sizes.rois; r += gridDim.x) {
    T* const own = scores + r * sizes.classes;
    for (int64_t c = threadIdx.x; c < sizes.classes; c += blockDim.x) {
      A total = 0;
      for (int64_t slice = 0; slice < count_slices(sizes.parts()); ++slice) {
        total = rounded_sum(total, shares[(slice * sizes.rois + r) * sizes.classes + c]);
      }
      own[c] = static_cast<T>(total / A(sizes.bins()));
    }
    __syncthreads();
    if (choose && threadIdx.x == 0) {
      int64_t best = 1;
      for (int64_t c = 2; c < sizes.classes; ++c) {
        if (static_cast<A>(own[c]) > static_cast<A>(own[best])) best = c;
      }
      classes[r] = best;
    }
    __syncthreads();
    const int64_t chosen = classes[r];
    const bool none = chosen < 0 || chosen >= sizes.classes;
    const Roi<A> roi(rois + kRoiNumbers * r, sizes.images, scale, sizes.pooled);
    for (int64_t i = threadIdx.x; i < sizes.bins(); i += blockDim.x) {
      const int64_t py = i / sizes.pooled, px = i % sizes.pooled;
      const Bin bin = roi.bin(py, px, sizes.height, sizes.width);
      const int64_t cells = bin.cells();
      const int64_t part = part_of_bin(py, sizes.group, sizes.pooled) * sizes.group +
                           part_of_bin(px, sizes.group, sizes.pooled);
      A outside = 0, inside = 0;
      if (cells > 0 && !none) {
        const T* from = maps + roi.image * sizes.image_stride() + part * 2 * sizes.classes + chosen;
        sum_bin(from, bin, sizes, outside, inside);
        outside /= A(cells);
        inside /= A(cells);
      }
      T* const to = logits + r * 2 * sizes.bins() + i;
      to[0] = static_cast<T>(outside);
      to[sizes.bins()] = static_cast<T>(inside);
    }
  }
}

// One block for one part of one image and a few classes, one thread for one class, which owns its
// two maps of that part and adds to them in the order of the RoIs: there are no atomic additions,
// and the result is deterministic.  `out` is zero.
template <typename T, typename A>
__global__ void spread_kernel(const T* maps, const A* rois, const int64_t* classes,
                              const T* grad_scores, const T* grad_logits, Sizes sizes, A scale,
                              A* out) {
  const int64_t groups = (sizes.classes + blockDim.x - 1) / blockDim.x;
  for (int64_t task = blockIdx.x; task < sizes.images * sizes.parts() * groups; task += gridDim.x) {
    const int64_t c = task % groups * blockDim.x + threadIdx.x;
    const int64_t part = task / groups % sizes.parts(), image = task / groups / sizes.parts();
    if (c >= sizes.classes) continue;
    const int64_t offset = image * sizes.image_stride() + part * 2 * sizes.classes + c;
    const int64_t gy = part / sizes.group, gx = part % sizes.group;
    const int64_t y_end = first_bin_of_part(gy + 1, sizes.group, sizes.pooled);
    const int64_t x_end = first_bin_of_part(gx + 1, sizes.group, sizes.pooled);
    for (int64_t r = 0; r < sizes.rois; ++r) {
      const Roi<A> roi(rois + kRoiNumbers * r, sizes.images, scale, sizes.pooled);
      if (!roi.usable || roi.image != image) continue;
      const A grad_score = static_cast<A>(grad_scores[r * sizes.classes + c]);
      for (int64_t py = first_bin_of_part(gy, sizes.group, sizes.pooled); py < y_end; ++py) {
        for (int64_t px = first_bin_of_part(gx, sizes.group, sizes.pooled); px < x_end; ++px) {
          const Bin bin = roi.bin(py, px, sizes.height, sizes.width);
          const int64_t cells = bin.cells();
          if (cells == 0) continue;
          A outside, inside;
          sum_bin(maps + offset, bin, sizes, outside, inside);
          const A weight = rounded_product(grad_score, A(1) / A(sizes.bins() * cells));
          const bool wins = inside_wins(outside, inside);
          outside = wins ? A(0) : weight;
          inside = wins ? weight : A(0);
          if (classes[r] == c) {
            const T* from = grad_logits + r * 2 * sizes.bins() + py * sizes.pooled + px;
            outside = rounded_sum(outside, static_cast<A>(from[0]) / A(cells));
            inside = rounded_sum(inside, static_cast<A>(from[sizes.bins()]) / A(cells));
          }
          for (int64_t y = bin.y0; y < bin.y1; ++y) {
            for (int64_t x = bin.x0; x < bin.x1; ++x) {
              A* const cell = out + offset + (y * sizes.width + x) * sizes.cell_stride();
              cell[0] = rounded_sum(cell[0], outside);
              cell[sizes.classes] = rounded_sum(cell[sizes.classes], inside);
            }
          }
        }
      }
    }
  }
}

// Threads of a block with one class each: whole warps.
unsigned threads_for(int64_t classes, int64_t most) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((classes + kWarp - 1) / kWarp * kWarp, kWarp, most));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_head_cuda(
    const at::Tensor& maps_any, const at::Tensor& rois, const std::optional<at::Tensor>& classes,
    double spatial_scale, int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, classes ? &*classes : nullptr, spatial_scale,
                       group_size, pooled_size);
  const c10::cuda::CUDAGuard guard(maps_any.device());
  const Sizes sizes(maps_any, rois, group_size, pooled_size);
  at::Tensor scores = at::empty({sizes.rois, sizes.classes}, maps_any.options());
  at::Tensor logits = at::empty({sizes.rois, 2, pooled_size, pooled_size}, maps_any.options());
  at::Tensor chosen = at::empty({sizes.rois}, maps_any.options().dtype(at::kLong));
  if (classes) chosen.copy_(*classes);
  if (sizes.rois == 0) return {scores, logits, chosen};
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t slices = count_slices(sizes.parts());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    const at::Tensor rows = rois.to(type).contiguous();
    at::Tensor shares = at::empty({slices, sizes.rois, sizes.classes}, maps.options().dtype(type));
    const scalar_t* in = maps.const_data_ptr<scalar_t>();
    const A scale = static_cast<A>(spatial_scale);
    share_kernel<scalar_t, A>
        <<<blocks_for_tasks(sizes.rois * slices), threads_for(sizes.classes, kThreads), 0,
           stream>>>(in, rows.const_data_ptr<A>(), sizes, scale, shares.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    finish_kernel<scalar_t, A><<<blocks_for_tasks(sizes.rois), kFinishThreads, 0, stream>>>(
        in, rows.const_data_ptr<A>(), shares.const_data_ptr<A>(), sizes, scale, !classes,
        scores.mutable_data_ptr<scalar_t>(), logits.mutable_data_ptr<scalar_t>(),
        chosen.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {scores, logits, chosen};
}

at::Tensor fcis_head_backward_cuda(const at::Tensor& grad_scores, const at::Tensor& grad_logits,
                                   const at::Tensor& maps_any, const at::Tensor& rois,
                                   const at::Tensor& classes, double spatial_scale,
                                   int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, &classes, spatial_scale, group_size, pooled_size);
  check_fcis_gradients(kOp, grad_scores, grad_logits, maps_any, rois, group_size, pooled_size);
  const c10::cuda::CUDAGuard guard(maps_any.device());
  const Sizes sizes(maps_any, rois, group_size, pooled_size);
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor chosen = classes.contiguous();
  at::Tensor grad;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    grad =
        at::empty(maps.sizes(), maps.options().dtype(type), at::MemoryFormat::ChannelsLast).zero_();
    if (grad.numel() == 0 || sizes.rois == 0) return;
    const at::Tensor rows = rois.to(type).contiguous();
    const at::Tensor from_scores = grad_scores.to(maps.scalar_type()).contiguous();
    const at::Tensor from_logits = grad_logits.to(maps.scalar_type()).contiguous();
    const int64_t tasks = sizes.images * sizes.parts() * ((sizes.classes + kWarp - 1) / kWarp);
    spread_kernel<scalar_t, A>
        <<<blocks_for_tasks(tasks), kWarp, 0, c10::cuda::getCurrentCUDAStream()>>>(
            maps.const_data_ptr<scalar_t>(), rows.const_data_ptr<A>(),
            chosen.const_data_ptr<int64_t>(), from_scores.const_data_ptr<scalar_t>(),
            from_logits.const_data_ptr<scalar_t>(), sizes, static_cast<A>(spatial_scale),
            grad.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad.to(maps.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("fcis_head", fcis_head_cuda);
  m.impl("fcis_head_backward", fcis_head_backward_cuda);
}

}  // namespace instseg

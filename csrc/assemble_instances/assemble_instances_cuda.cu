// InstanceFCN's instance assembling on a GPU: one thread per mask value, or per cell of the maps.

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "assemble_instances/arguments.h"
#include "assemble_instances/assemble_instances.h"
#include "cuda_common.cuh"

namespace instseg {
namespace {

struct Shape {
  int64_t images, parts, size, height, width;
};

// Offset into the maps of mask value (n, i, j), or -1 where the window has no cell.
__device__ __forceinline__ int64_t cell_of_value(const int64_t* windows, int64_t n, int64_t i,
                                                 int64_t j, const Shape& s) {
  const Window window = window_at(windows, n, s.size, s.images, s.height, s.width);
  const int64_t y = window.y0 + i, x = window.x0 + j;
  if (window.image < 0 || y < 0 || y >= s.height || x < 0 || x >= s.width) return -1;
  const int64_t part =
      part_of_cell(i, s.parts, s.size) * s.parts + part_of_cell(j, s.parts, s.size);
  return ((window.image * s.parts * s.parts + part) * s.height + y) * s.width + x;
}

template <typename scalar_t>
__global__ void assemble_kernel(int64_t values, const scalar_t* maps, const int64_t* windows,
                                Shape s, scalar_t fill, scalar_t* out) {
  for (int64_t v = first_item(); v < values; v += item_step()) {
    const int64_t cell =
        cell_of_value(windows, v / s.size / s.size, v / s.size % s.size, v % s.size, s);
    out[v] = cell < 0 ? fill : maps[cell];
  }
}

// Chosen windows may overlap in any way, so sums are atomic.
template <typename scalar_t, typename sum_t>
__global__ void scatter_kernel(int64_t values, const scalar_t* grad, const int64_t* windows,
                               Shape s, sum_t* sums) {
  for (int64_t v = first_item(); v < values; v += item_step()) {
    const int64_t cell =
        cell_of_value(windows, v / s.size / s.size, v / s.size % s.size, v % s.size, s);
    if (cell >= 0) atomicAdd(sums + cell, static_cast<sum_t>(grad[v]));
  }
}

// With a window around every cell the terms of each sum are known: no atomics.
template <typename scalar_t, typename sum_t>
__global__ void gather_kernel(int64_t cells, const scalar_t* grad, Shape s, scalar_t* out) {
  for (int64_t c = first_item(); c < cells; c += item_step()) {
    const int64_t x = c % s.width, y = c / s.width % s.height, map = c / s.width / s.height;
    const int64_t part = map % (s.parts * s.parts), image = map / (s.parts * s.parts);
    sum_t sum = 0;
    for (int64_t i = 0; i < s.size; ++i) {
      const int64_t centre_y = y - i + s.size / 2;
      if (part_of_cell(i, s.parts, s.size) != part / s.parts || centre_y < 0 ||
          centre_y >= s.height)
        continue;
      for (int64_t j = 0; j < s.size; ++j) {
        const int64_t centre_x = x - j + s.size / 2;
        if (part_of_cell(j, s.parts, s.size) != part % s.parts || centre_x < 0 ||
            centre_x >= s.width)
          continue;
        const int64_t n = (image * s.height + centre_y) * s.width + centre_x;
        sum += static_cast<sum_t>(grad[(n * s.size + i) * s.size + j]);
      }
    }
    out[c] = static_cast<scalar_t>(sum);
  }
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
        assemble_kernel<<<blocks_for(out.numel()), kThreads, 0,
                          c10::cuda::getCurrentCUDAStream()>>>(
            out.numel(), input.const_data_ptr<scalar_t>(), row_data, s, static_cast<scalar_t>(fill),
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
  if (windows)
    at::globalContext().alertNotDeterministic("instseg::assemble_instances_backward (CUDA)");
  const c10::cuda::CUDAGuard guard(grad.device());
  const Shape s{shape[0], parts, grad.size(1), shape[2], shape[3]};
  auto out = at::zeros(shape, grad.options());
  if (out.numel() == 0 || grad.numel() == 0) return out;
  const auto input = grad.contiguous();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "assemble_instances", [&] {
        using sum_t = at::opmath_type<scalar_t>;
        const scalar_t* data = input.const_data_ptr<scalar_t>();
        if (!windows) {
          gather_kernel<scalar_t, sum_t><<<blocks_for(out.numel()), kThreads, 0, stream>>>(
              out.numel(), data, s, out.mutable_data_ptr<scalar_t>());
        } else {
          const auto rows = windows->contiguous();
          auto sums = at::zeros(shape, out.options().dtype(c10::CppTypeToScalarType<sum_t>::value));
          scatter_kernel<scalar_t, sum_t><<<blocks_for(input.numel()), kThreads, 0, stream>>>(
              input.numel(), data, rows.const_data_ptr<int64_t>(), s,
              sums.template mutable_data_ptr<sum_t>());
          out = sums.to(out.scalar_type());
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

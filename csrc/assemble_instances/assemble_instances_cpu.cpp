// InstanceFCN's instance assembling on the CPU: rows are copied in runs of one part each.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "assemble_instances/arguments.h"
#include "assemble_instances/assemble_instances.h"

namespace instseg {
namespace {

// A call of memcpy costs more than a run of four cells: two overlapping moves of a fixed size
// instead, which reach no byte outside the run.
template <size_t kBytes>
inline void copy_overlapping(char* to, const char* from, size_t bytes) {
  char first[kBytes], last[kBytes];
  std::memcpy(first, from, kBytes);
  std::memcpy(last, from + bytes - kBytes, kBytes);
  std::memcpy(to, first, kBytes);
  std::memcpy(to + bytes - kBytes, last, kBytes);
}

inline void copy_run(char* to, const char* from, size_t bytes) {
  if (bytes > 32) {
    std::memcpy(to, from, bytes);
  } else if (bytes >= 16) {
    copy_overlapping<16>(to, from, bytes);
  } else if (bytes >= 8) {
    copy_overlapping<8>(to, from, bytes);
  } else if (bytes >= 4) {
    copy_overlapping<4>(to, from, bytes);
  } else if (bytes != 0) {
    copy_overlapping<2>(to, from, bytes);  // no element is smaller
  }
}

// starts[p] is the first cell of a window that lies in part p or later.
std::vector<int64_t> starts_of_parts(int64_t parts, int64_t size) {
  std::vector<int64_t> starts(parts + 1, size);
  for (int64_t i = size - 1; i >= 0; --i) starts[part_of_cell(i, parts, size)] = i;
  for (int64_t p = parts - 1; p >= 0; --p) starts[p] = std::min(starts[p], starts[p + 1]);
  return starts;
}

template <typename scalar_t>
void assemble_window(const scalar_t* maps, const Window& window, const int64_t* starts,
                     int64_t parts, int64_t size, int64_t height, int64_t width, scalar_t fill,
                     scalar_t* out) {
  const int64_t top = std::max<int64_t>(0, -window.y0), bottom = std::min(size, height - window.y0);
  const int64_t left = std::max<int64_t>(0, -window.x0), right = std::min(size, width - window.x0);
  if (top > 0 || left > 0 || bottom < size || right < size) std::fill_n(out, size * size, fill);
  for (int64_t py = 0; py < parts; ++py) {
    const int64_t end = std::min(bottom, starts[py + 1]);
    for (int64_t i = std::max(top, starts[py]); i < end; ++i) {
      const scalar_t* row = maps + (py * parts * height + window.y0 + i) * width + window.x0;
      for (int64_t px = 0; px < parts; ++px) {
        const int64_t from = std::max(left, starts[px]), to = std::min(right, starts[px + 1]);
        if (from < to)
          copy_run(reinterpret_cast<char*>(out + i * size + from),
                   reinterpret_cast<const char*>(row + px * height * width + from),
                   (to - from) * sizeof(scalar_t));
      }
    }
  }
}

at::Tensor assemble_instances_cpu(const at::Tensor& maps, const std::optional<at::Tensor>& windows,
                                  int64_t parts, int64_t size, double fill) {
  const char* op = "assemble_instances";
  check_assembling(op, maps, windows, parts, size);
  check_maps(op, maps, parts);
  const auto input = maps.contiguous();
  const auto rows = windows ? std::optional(windows->contiguous()) : std::nullopt;
  const int64_t images = maps.size(0), height = maps.size(2), width = maps.size(3);
  check_images(op, rows, images);
  const int64_t count = rows ? rows->size(0) : images * height * width;
  auto out = at::empty({count, size, size}, input.options());
  if (out.numel() == 0) return out;
  const auto starts = starts_of_parts(parts, size);
  const int64_t* row_data = rows ? rows->const_data_ptr<int64_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "assemble_instances", [&] {
        const scalar_t* data = input.const_data_ptr<scalar_t>();
        scalar_t* result = out.mutable_data_ptr<scalar_t>();
        const int64_t image_size = parts * parts * height * width;
        at::parallel_for(0, count, grain_size(size * size), [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const Window window = window_at(row_data, n, size, images, height, width);
            assemble_window(data + window.image * image_size, window, starts.data(), parts, size,
                            height, width, static_cast<scalar_t>(fill), result + n * size * size);
          }
        });
      });
  return out;
}

// Numbers of the windows that lie in each image.
std::vector<std::vector<int64_t>> windows_of_images(const int64_t* rows, int64_t count,
                                                    int64_t images, int64_t cells) {
  std::vector<std::vector<int64_t>> numbers(images);
  for (int64_t n = 0; n < count; ++n) numbers[rows ? rows[3 * n] : n / cells].push_back(n);
  return numbers;
}

// Gradient of one map: every cell is the sum over the windows, in their order.
template <typename scalar_t, typename sum_t>
void add_windows(const scalar_t* grad, const int64_t* rows, const std::vector<int64_t>& numbers,
                 const int64_t* y_range, const int64_t* x_range, int64_t size, int64_t images,
                 int64_t height, int64_t width, sum_t* sums) {
  for (const int64_t n : numbers) {
    const Window window = window_at(rows, n, size, images, height, width);
    const int64_t bottom = std::min(y_range[1], height - window.y0);
    const int64_t left = std::max(x_range[0], -window.x0),
                  right = std::min(x_range[1], width - window.x0);
    for (int64_t i = std::max(y_range[0], -window.y0); i < bottom; ++i) {
      const scalar_t* from = grad + (n * size + i) * size;
      sum_t* to = sums + (window.y0 + i) * width + window.x0;
      for (int64_t j = left; j < right; ++j) to[j] += static_cast<sum_t>(from[j]);
    }
  }
}

at::Tensor assemble_instances_backward_cpu(const at::Tensor& grad,
                                           const std::optional<at::Tensor>& windows, int64_t parts,
                                           at::IntArrayRef shape) {
  const char* op = "assemble_instances_backward";
  check_assembling(op, grad, windows, parts,
                   grad.dim() == 3 ? std::max<int64_t>(1, grad.size(1)) : 1);
  check_maps_gradient(op, grad, windows, parts, shape);
  const auto input = grad.contiguous();
  const auto rows = windows ? std::optional(windows->contiguous()) : std::nullopt;
  const int64_t images = shape[0], height = shape[2], width = shape[3], size = grad.size(1);
  check_images(op, rows, images);
  auto out = at::empty(shape, input.options());
  if (out.numel() == 0) return out;
  const int64_t count = input.size(0), channels = parts * parts, cells = height * width;
  const auto starts = starts_of_parts(parts, std::max<int64_t>(1, size));
  const int64_t* row_data = rows ? rows->const_data_ptr<int64_t>() : nullptr;
  const auto numbers = windows_of_images(row_data, count, images, cells);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, input.scalar_type(), "assemble_instances", [&] {
        using sum_t = at::opmath_type<scalar_t>;
        const scalar_t* data = input.const_data_ptr<scalar_t>();
        scalar_t* result = out.mutable_data_ptr<scalar_t>();
        // A map belongs to one thread: no atomics, and the same sums for any number of threads.
        at::parallel_for(0, images * channels, 1, [&](int64_t begin, int64_t end) {
          std::vector<sum_t> sums(cells);
          for (int64_t map = begin; map < end; ++map) {
            const int64_t channel = map % channels;
            std::fill(sums.begin(), sums.end(), sum_t(0));
            add_windows(data, row_data, numbers[map / channels], &starts[channel / parts],
                        &starts[channel % parts], size, images, height, width, sums.data());
            std::transform(sums.begin(), sums.end(), result + map * cells,
                           [](sum_t sum) { return static_cast<scalar_t>(sum); });
          }
        });
      });
  return out;
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("assemble_instances", instseg::assemble_instances_cpu);
  m.impl("assemble_instances_backward", instseg::assemble_instances_backward_cpu);
}

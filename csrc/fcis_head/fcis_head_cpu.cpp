// The FCIS head on the CPU: position-sensitive pooling, scores of all classes and the logits of one
// class, in one pass over the maps.  A part is visited for all RoIs before the next one, because
// its share of one image (some 1.5 MB) stays in the cache while the maps (76 MB) do not.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>

#include "fcis_head/arguments.h"
#include "fcis_head/fcis_head.h"

namespace instseg {
namespace {

constexpr const char* kOp = "fcis_head";
constexpr int64_t kScoresPerTask = 4096;

struct Sizes {
  int64_t images, height, width, classes, group, pooled;

  Sizes(const at::Tensor& maps, int64_t group_size, int64_t pooled_size)
      : images(maps.size(0)),
        height(maps.size(2)),
        width(maps.size(3)),
        classes(maps.size(1) / (2 * group_size * group_size)),
        group(group_size),
        pooled(pooled_size) {}

  int64_t parts() const { return group * group; }
  int64_t bins() const { return pooled * pooled; }
  int64_t cell_stride() const { return parts() * 2 * classes; }
  int64_t image_stride() const { return height * width * cell_stride(); }
};

// The bins, rows and columns, that read one part.
struct PartBins {
  int64_t y_begin, y_end, x_begin, x_end;

  PartBins(int64_t part, const Sizes& sizes)
      : y_begin(first_bin_of_part(part / sizes.group, sizes.group, sizes.pooled)),
        y_end(first_bin_of_part(part / sizes.group + 1, sizes.group, sizes.pooled)),
        x_begin(first_bin_of_part(part % sizes.group, sizes.group, sizes.pooled)),
        x_end(first_bin_of_part(part % sizes.group + 1, sizes.group, sizes.pooled)) {}
};

// The sums over one bin of 2 * C neighbouring channels; `part` is their first number at cell (0,
// 0).
template <typename T, typename A>
INSTSEG_INLINE void sum_bin(const T* part, const Bin& bin, int64_t width, int64_t stride,
                            int64_t count, A* __restrict sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] = A(0);
  for (int64_t y = bin.y0; y < bin.y1; ++y) {
    const T* __restrict cell = part + (y * width + bin.x0) * stride;
    int64_t left = bin.x1 - bin.x0;
    for (; left > 1; left -= 2, cell += 2 * stride) {
      const T* __restrict next = cell + stride;
      for (int64_t i = 0; i < count; ++i) {
        sums[i] = sums[i] + static_cast<A>(cell[i]) + static_cast<A>(next[i]);
      }
    }
    if (left > 0) {
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<A>(cell[i]);
    }
  }
}

// Adds the share of one part to the scores of one RoI, and, if `logits` is there, writes the logits
// of `chosen`.  `sums` is room for 2 * C numbers.
template <typename T, typename A>
INSTSEG_SIMD void score_part(const T* part, const Sizes& sizes, const BinTable& table, int64_t roi,
                             const PartBins& bins, A* __restrict sums, A* __restrict scores,
                             int64_t chosen, T* logits) {
  const int64_t classes = sizes.classes;
  for (int64_t py = bins.y_begin; py < bins.y_end; ++py) {
    for (int64_t px = bins.x_begin; px < bins.x_end; ++px) {
      const Bin bin = table.bin(roi, py, px);
      const int64_t cells = bin.cells();
      if (cells == 0) continue;
      sum_bin(part, bin, sizes.width, sizes.cell_stride(), 2 * classes, sums);
      const A share = A(1) / A(cells);
      for (int64_t c = 0; c < classes; ++c) scores[c] += larger(sums[c], sums[classes + c]) * share;
      if (logits != nullptr) {
        T* at = logits + py * sizes.pooled + px;
        at[0] = static_cast<T>(sums[chosen] / A(cells));
        at[sizes.bins()] = static_cast<T>(sums[classes + chosen] / A(cells));
      }
    }
  }
}

// The logits of one class of one RoI, where the class became known after the scores.
template <typename T, typename A>
void write_logits(const T* image, const Sizes& sizes, const BinTable& table, int64_t roi,
                  int64_t chosen, T* logits) {
  const int64_t stride = sizes.cell_stride(), classes = sizes.classes;
  for (int64_t py = 0; py < sizes.pooled; ++py) {
    const int64_t row = part_of_bin(py, sizes.group, sizes.pooled) * sizes.group;
    for (int64_t px = 0; px < sizes.pooled; ++px, ++logits) {
      const Bin bin = table.bin(roi, py, px);
      const int64_t cells = bin.cells();
      if (cells == 0) continue;
      const T* part =
          image + (row + part_of_bin(px, sizes.group, sizes.pooled)) * 2 * classes + chosen;
      A outside = 0, inside = 0;
      for (int64_t y = bin.y0; y < bin.y1; ++y) {
        for (int64_t x = bin.x0; x < bin.x1; ++x) {
          const T* cell = part + (y * sizes.width + x) * stride;
          outside += static_cast<A>(cell[0]);
          inside += static_cast<A>(cell[classes]);
        }
      }
      logits[0] = static_cast<T>(outside / A(cells));
      logits[sizes.bins()] = static_cast<T>(inside / A(cells));
    }
  }
}

// The RoIs of each image, in their order, one image after the other.
std::vector<int64_t> sort_by_image(const BinTable& table) {
  std::vector<int64_t> order(table.image.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return table.image[a] < table.image[b]; });
  return order;
}

// The slices' shares (slices, R, C) of the scores; logits of `chosen` where that is not null.
template <typename T, typename A>
void visit_parts(const T* maps, const Sizes& sizes, const BinTable& table, const int64_t* chosen,
                 A* shares, T* logits) {
  const std::vector<int64_t> order = sort_by_image(table);
  const int64_t count = static_cast<int64_t>(order.size()), slices = count_slices(sizes.parts());
  // More threads than slices share the RoIs as well.
  const int64_t blocks = std::max<int64_t>(1, at::get_num_threads() / slices);
  const int64_t work = count * sizes.bins() * sizes.classes / (slices * blocks);
  at::parallel_for(0, slices * blocks, grain_size(work), [&](int64_t begin, int64_t end) {
    std::vector<A> sums(2 * sizes.classes);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / blocks, block = task % blocks;
      const int64_t part_end = first_part_of_slice(slice + 1, sizes.parts());
      for (int64_t part = first_part_of_slice(slice, sizes.parts()); part < part_end; ++part) {
        const PartBins bins(part, sizes);
        for (int64_t i = block * count / blocks; i < (block + 1) * count / blocks; ++i) {
          const int64_t roi = order[i], choice = chosen == nullptr ? -1 : chosen[roi];
          const T* from = maps + table.image[roi] * sizes.image_stride() + part * 2 * sizes.classes;
          A* to = shares + (slice * count + roi) * sizes.classes;
          score_part<T, A>(from, sizes, table, roi, bins, sums.data(), to, choice,
                           choice < 0 ? nullptr : logits + roi * 2 * sizes.bins());
        }
      }
    }
  });
}

// Scores from their shares.
template <typename T, typename A>
void add_slices(const A* shares, const Sizes& sizes, int64_t count, T* scores) {
  const int64_t slices = count_slices(sizes.parts()), size = count * sizes.classes;
  at::parallel_for(0, size, kScoresPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A total = 0;
      for (int64_t slice = 0; slice < slices; ++slice) total += shares[slice * size + i];
      scores[i] = static_cast<T>(total / A(sizes.bins()));
    }
  });
}

// The class 1 .. C - 1 of the highest score, the lowest one on a tie.
template <typename T>
int64_t best_class(const T* scores, int64_t classes) {
  return std::max_element(scores + 1, scores + classes) - scores;
}

// Adds the share of one RoI to the gradient of one part, `grad`, (H, W, 2 * C) and contiguous.
template <typename T, typename A>
INSTSEG_SIMD void spread_part(const T* part, const Sizes& sizes, const BinTable& table, int64_t roi,
                              const PartBins& bins, A* __restrict sums,
                              const T* __restrict grad_scores, int64_t chosen, const T* grad_logits,
                              A* grad) {
  const int64_t classes = sizes.classes;
  for (int64_t py = bins.y_begin; py < bins.y_end; ++py) {
    for (int64_t px = bins.x_begin; px < bins.x_end; ++px) {
      const Bin bin = table.bin(roi, py, px);
      const int64_t cells = bin.cells();
      if (cells == 0) continue;
      sum_bin(part, bin, sizes.width, sizes.cell_stride(), 2 * classes, sums);
      const A share = A(1) / A(sizes.bins() * cells);
      for (int64_t c = 0; c < classes; ++c) {
        const A weight = static_cast<A>(grad_scores[c]) * share;
        const bool inside = inside_wins(sums[c], sums[classes + c]);
        sums[c] = inside ? A(0) : weight;
        sums[classes + c] = inside ? weight : A(0);
      }
      if (chosen >= 0) {
        const T* at = grad_logits + py * sizes.pooled + px;
        sums[chosen] += static_cast<A>(at[0]) / A(cells);
        sums[classes + chosen] += static_cast<A>(at[sizes.bins()]) / A(cells);
      }
      for (int64_t y = bin.y0; y < bin.y1; ++y) {
        for (int64_t x = bin.x0; x < bin.x1; ++x) {
          A* __restrict cell = grad + (y * sizes.width + x) * 2 * classes;
          for (int64_t i = 0; i < 2 * classes; ++i) cell[i] += sums[i];
        }
      }
    }
  }
}

// A thread owns the parts of an image and adds to them in the order of the RoIs, so the result is
// deterministic.
template <typename T, typename A>
void spread(const T* maps, const Sizes& sizes, const BinTable& table, const int64_t* chosen,
            const T* grad_scores, const T* grad_logits, T* grad_maps) {
  const int64_t count = static_cast<int64_t>(table.image.size()), width = 2 * sizes.classes;
  const int64_t cells = sizes.height * sizes.width;
  const int64_t work = cells * width + count * sizes.bins() * sizes.classes / sizes.parts();
  at::parallel_for(
      0, sizes.images * sizes.parts(), grain_size(work), [&](int64_t begin, int64_t end) {
        std::vector<A> sums(width), grad(cells * width);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t image = task / sizes.parts(), part = task % sizes.parts();
          const int64_t offset = image * sizes.image_stride() + part * width;
          const PartBins bins(part, sizes);
          std::fill(grad.begin(), grad.end(), A(0));
          for (int64_t roi = 0; roi < count; ++roi) {
            if (table.image[roi] != image) continue;
            spread_part<T, A>(maps + offset, sizes, table, roi, bins, sums.data(),
                              grad_scores + roi * sizes.classes, chosen[roi],
                              grad_logits + roi * 2 * sizes.bins(), grad.data());
          }
          for (int64_t cell = 0; cell < cells; ++cell) {
            const A* from = grad.data() + cell * width;
            std::transform(from, from + width, grad_maps + offset + cell * sizes.cell_stride(),
                           [](A value) { return static_cast<T>(value); });
          }
        }
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_head_cpu(
    const at::Tensor& maps_any, const at::Tensor& rois, const std::optional<at::Tensor>& classes,
    double spatial_scale, int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, classes ? &*classes : nullptr, spatial_scale,
                       group_size, pooled_size);
  const Sizes sizes(maps_any, group_size, pooled_size);
  const int64_t count = rois.size(0);
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor scores = at::empty({count, sizes.classes}, maps.options());
  at::Tensor logits = at::zeros({count, 2, pooled_size, pooled_size}, maps.options());
  at::Tensor chosen = at::empty({count}, maps.options().dtype(at::kLong));
  if (classes) {
    chosen.copy_(*classes);
    check_class_values(kOp, chosen, sizes.classes);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    const BinTable table = tabulate_bins<A>(kOp, rois.to(type).contiguous(), sizes.images,
                                            sizes.height, sizes.width, spatial_scale, pooled_size);
    const scalar_t* in = maps.const_data_ptr<scalar_t>();
    scalar_t* const to_scores = scores.mutable_data_ptr<scalar_t>();
    scalar_t* const to_logits = logits.mutable_data_ptr<scalar_t>();
    int64_t* const to_classes = chosen.mutable_data_ptr<int64_t>();
    at::Tensor shares =
        at::zeros({count_slices(sizes.parts()), count, sizes.classes}, maps.options().dtype(type));
    visit_parts<scalar_t, A>(in, sizes, table, classes ? to_classes : nullptr,
                             shares.mutable_data_ptr<A>(), to_logits);
    add_slices<scalar_t, A>(shares.const_data_ptr<A>(), sizes, count, to_scores);
    if (classes) return;
    at::parallel_for(0, count, grain_size(4 * sizes.bins()), [&](int64_t begin, int64_t end) {
      for (int64_t roi = begin; roi < end; ++roi) {
        to_classes[roi] = best_class(to_scores + roi * sizes.classes, sizes.classes);
        write_logits<scalar_t, A>(in + table.image[roi] * sizes.image_stride(), sizes, table, roi,
                                  to_classes[roi], to_logits + roi * 2 * sizes.bins());
      }
    });
  });
  return {scores, logits, chosen};
}

at::Tensor fcis_head_backward_cpu(const at::Tensor& grad_scores, const at::Tensor& grad_logits,
                                  const at::Tensor& maps_any, const at::Tensor& rois,
                                  const at::Tensor& classes, double spatial_scale,
                                  int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, &classes, spatial_scale, group_size, pooled_size);
  check_fcis_gradients(kOp, grad_scores, grad_logits, maps_any, rois, group_size, pooled_size);
  const Sizes sizes(maps_any, group_size, pooled_size);
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor chosen = classes.contiguous();
  check_class_values(kOp, chosen, sizes.classes);
  at::Tensor grad = at::empty(maps.sizes(), maps.options(), at::MemoryFormat::ChannelsLast);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    const BinTable table = tabulate_bins<A>(kOp, rois.to(type).contiguous(), sizes.images,
                                            sizes.height, sizes.width, spatial_scale, pooled_size);
    const at::Tensor from_scores = grad_scores.to(maps.scalar_type()).contiguous();
    const at::Tensor from_logits = grad_logits.to(maps.scalar_type()).contiguous();
    spread<scalar_t, A>(maps.const_data_ptr<scalar_t>(), sizes, table,
                        chosen.const_data_ptr<int64_t>(), from_scores.const_data_ptr<scalar_t>(),
                        from_logits.const_data_ptr<scalar_t>(), grad.mutable_data_ptr<scalar_t>());
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("fcis_head", fcis_head_cpu);
  m.impl("fcis_head_backward", fcis_head_backward_cpu);
}

}  // namespace instseg

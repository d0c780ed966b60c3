// RoIAlign on the CPU.  Cells are read with their channels side by side, so that one instruction
// serves several channels; maps in planes are turned, whole or as far as the regions reach.
//
// The order of the operations on every number is torchvision's, forward and backward.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "roi_align/arguments.h"

namespace instseg {
namespace {

constexpr const char* kOp = "roi_align";
constexpr int64_t kLine = 16;   // float32 numbers of a cache line
constexpr int64_t kSlice = 64;  // channels that one task of the backward pass owns

// Cells with their channels side by side; the first one is that of row `y0` and column `x0`.
template <typename T>
struct Cells {
  T* data;
  int64_t row, pixel;  // numbers from one row or column to the next
  int64_t y0, x0;

  INSTSEG_INLINE T* at(int64_t y, int64_t x) const {
    return data + (y - y0) * row + (x - x0) * pixel;
  }
};

template <typename A>
struct Bin2d {
  const AxisSample<A>*y, *y_end, *x, *x_end;
  A count;
};

template <typename T, typename A>
INSTSEG_INLINE void add_sample(int64_t channels, const T* a, const T* b, const T* c, const T* d,
                               A wa, A wb, A wc, A wd, A* __restrict sums) {
  for (int64_t i = 0; i < channels; ++i) {
    sums[i] += wa * static_cast<A>(a[i]) + wb * static_cast<A>(b[i]) + wc * static_cast<A>(c[i]) +
               wd * static_cast<A>(d[i]);
  }
}

template <typename T, typename A>
INSTSEG_INLINE void pool_bin(int64_t channels, const Cells<const T>& cells, const Bin2d<A>& bin,
                             A* sums) {
  std::fill_n(sums, channels, A(0));
  for (const AxisSample<A>* y = bin.y; y < bin.y_end; ++y) {
    for (const AxisSample<A>* x = bin.x; x < bin.x_end; ++x) {
      add_sample(channels, cells.at(y->low, x->low), cells.at(y->low, x->high),
                 cells.at(y->high, x->low), cells.at(y->high, x->high),
                 y->low_weight * x->low_weight, y->low_weight * x->high_weight,
                 y->high_weight * x->low_weight, y->high_weight * x->high_weight, sums);
    }
  }
  for (int64_t i = 0; i < channels; ++i) sums[i] /= bin.count;
}

// Multiplying by 1 / count gives the same bits where that is a power of two, and is faster.
template <typename A>
INSTSEG_INLINE void add_share(int64_t channels, const A* grad, A weight, A count, bool exact,
                              A* __restrict cell) {
  const A inverse = A(1) / count;
  if (exact) {
    for (int64_t i = 0; i < channels; ++i) cell[i] += grad[i] * weight * inverse;
  } else {
    for (int64_t i = 0; i < channels; ++i) cell[i] += grad[i] * weight / count;
  }
}

template <typename A>
INSTSEG_INLINE void spread_bin(int64_t channels, const Cells<A>& cells, const Bin2d<A>& bin,
                               const A* grad) {
  int exponent = 0;
  const bool exact = std::frexp(bin.count, &exponent) == A(0.5);
  for (const AxisSample<A>* y = bin.y; y < bin.y_end; ++y) {
    for (const AxisSample<A>* x = bin.x; x < bin.x_end; ++x) {
      add_share(channels, grad, y->low_weight * x->low_weight, bin.count, exact,
                cells.at(y->low, x->low));
      add_share(channels, grad, y->low_weight * x->high_weight, bin.count, exact,
                cells.at(y->low, x->high));
      add_share(channels, grad, y->high_weight * x->low_weight, bin.count, exact,
                cells.at(y->high, x->low));
      add_share(channels, grad, y->high_weight * x->high_weight, bin.count, exact,
                cells.at(y->high, x->high));
    }
  }
}

// One copy per instruction set needs functions that are no templates.
#define INSTSEG_POOL(T, A)                                                                         \
  INSTSEG_SIMD void pooled_bin(int64_t channels, const Cells<const T>& cells, const Bin2d<A>& bin, \
                               A* sums) {                                                          \
    pool_bin<T, A>(channels, cells, bin, sums);                                                    \
  }
#define INSTSEG_SPREAD(A)                                                                     \
  INSTSEG_SIMD void spread_over(int64_t channels, const Cells<A>& cells, const Bin2d<A>& bin, \
                                const A* grad) {                                              \
    spread_bin<A>(channels, cells, bin, grad);                                                \
  }
INSTSEG_POOL(float, float)
INSTSEG_POOL(double, double)
INSTSEG_POOL(c10::Half, float)
INSTSEG_POOL(c10::BFloat16, float)
INSTSEG_SPREAD(float)
INSTSEG_SPREAD(double)
#undef INSTSEG_POOL
#undef INSTSEG_SPREAD

template <typename A>
Bin2d<A> bin_of(const SampledRoi<A>& roi, int64_t row, int64_t column) {
  return {roi.y.bin_begin(row), roi.y.bin_end(row), roi.x.bin_begin(column), roi.x.bin_end(column),
          roi.count};
}

// The regions of one map.
template <typename A>
struct Regions {
  const A* rois;              // all of them, (R, 5)
  std::vector<int64_t> rows;  // those of this map, in ascending order
  A scale;
};

// Cells that the regions cover, where a cell counts once for each of them; an estimate.
template <typename A>
double covered_cells(const Regions<A>& regions, int64_t height, int64_t width) {
  double total = 0;
  for (const int64_t r : regions.rows) {
    const A* row = regions.rois + kRoiNumbers * r;
    const auto side = [&](int axis, int64_t length) {
      const double low = std::max<double>(row[axis] * regions.scale - 1, 0);
      const double high = std::min<double>(row[axis + 2] * regions.scale + 2, length);
      return std::max(high - low, 0.0);
    };
    total += side(1, width) * side(2, height);
  }
  return total;
}

// A map for the regions to read: turned already, or turned for each region by itself.
template <typename T, typename A>
class Source {
 public:
  Source(const at::Tensor& map, const Regions<A>& regions)
      : channels_(map.size(1)), height_(map.size(2)), width_(map.size(3)) {
    const auto format = at::MemoryFormat::ChannelsLast;
    const double cells = static_cast<double>(map.size(0)) * height_ * width_;
    turned_ = map.is_contiguous(format) || covered_cells(regions, height_, width_) > cells;
    map_ = map.contiguous(turned_ ? format : at::MemoryFormat::Contiguous);
  }

  int64_t height() const { return height_; }
  int64_t width() const { return width_; }

  // The cells of a region that has samples; `buffer` holds them where they have to be turned.
  Cells<const T> of(int64_t image, const SampledRoi<A>& roi, std::vector<T>* buffer) const {
    const T* data = map_.template const_data_ptr<T>() + image * channels_ * height_ * width_;
    if (turned_) return {data, width_ * channels_, channels_, 0, 0};
    const int64_t y0 = roi.y.first_cell(), rows = roi.y.last_cell() + 1 - y0;
    const int64_t x0 = roi.x.first_cell(), columns = roi.x.last_cell() + 1 - x0;
    const int64_t pixel = channels_ + kLine;  // a power of two would use few sets of the cache
    buffer->resize(rows * columns * pixel);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < columns; x += kLine) {
        const int64_t count = std::min(kLine, columns - x);
        const T* from = data + (y0 + y) * width_ + x0 + x;
        T* to = buffer->data() + (y * columns + x) * pixel;
        for (int64_t c = 0; c < channels_; ++c, from += height_ * width_) {
          for (int64_t i = 0; i < count; ++i) to[i * pixel + c] = from[i];
        }
      }
    }
    return {buffer->data(), columns * pixel, pixel, y0, x0};
  }

 private:
  int64_t channels_, height_, width_;
  bool turned_;
  at::Tensor map_;
};

template <typename T, typename A>
void pool(const at::Tensor& map, const Regions<A>& regions, const Sampling& sampling,
          at::Tensor& out) {
  const int64_t channels = map.size(1), bins = sampling.bins(), pixel = channels + kLine;
  if (regions.rows.empty() || channels == 0) return;
  const Source<T, A> source(map, regions);
  T* const results = out.mutable_data_ptr<T>();
  const auto pool_some = [&](int64_t begin, int64_t end) {
    SampledRoi<A> roi;
    std::vector<T> buffer;
    std::vector<A> sums(sampling.columns * pixel);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t r = regions.rows[n];
      const A* row = regions.rois + kRoiNumbers * r;
      T* to = results + r * channels * bins;
      roi.begin(row, regions.scale, sampling, source.height(), source.width());
      if (roi.y.empty() || roi.x.empty()) {
        std::fill_n(to, channels * bins, T(0));
        continue;
      }
      const Cells<const T> cells = source.of(static_cast<int64_t>(row[0]), roi, &buffer);
      for (int64_t p = 0; p < sampling.rows; ++p, to += sampling.columns) {
        for (int64_t q = 0; q < sampling.columns; ++q)
          pooled_bin(channels, cells, bin_of(roi, p, q), sums.data() + q * pixel);
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t q = 0; q < sampling.columns; ++q)
            to[c * bins + q] = static_cast<T>(sums[q * pixel + c]);
        }
      }
    }
  };
  at::parallel_for(0, static_cast<int64_t>(regions.rows.size()), grain_size(16 * channels * bins),
                   pool_some);
}

// A task owns some channels of one image and adds to them in the order of the RoIs.
template <typename T, typename A>
void spread(const at::Tensor& grad, const Regions<A>& regions, const Sampling& sampling,
            at::Tensor& turned) {
  const int64_t images = turned.size(0), height = turned.size(1), width = turned.size(2),
                channels = turned.size(3), bins = sampling.bins();
  const int64_t slices = (channels + kSlice - 1) / kSlice;
  const T* const from = grad.const_data_ptr<T>();
  A* const to = turned.mutable_data_ptr<A>();
  at::parallel_for(0, images * slices, 1, [&](int64_t begin, int64_t end) {
    SampledRoi<A> roi;
    std::vector<A> shares(sampling.columns * kSlice);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / slices, first = task % slices * kSlice;
      const int64_t count = std::min(kSlice, channels - first);
      const Cells<A> cells{to + image * height * width * channels + first, width * channels,
                           channels, 0, 0};
      for (const int64_t r : regions.rows) {
        const A* row = regions.rois + kRoiNumbers * r;
        if (static_cast<int64_t>(row[0]) != image) continue;
        roi.begin(row, regions.scale, sampling, height, width);
        if (roi.y.empty() || roi.x.empty()) continue;
        const T* of_region = from + (r * channels + first) * bins;
        for (int64_t p = 0; p < sampling.rows; ++p, of_region += sampling.columns) {
          for (int64_t c = 0; c < count; ++c) {
            for (int64_t q = 0; q < sampling.columns; ++q)
              shares[q * kSlice + c] = static_cast<A>(of_region[c * bins + q]);
          }
          for (int64_t q = 0; q < sampling.columns; ++q)
            spread_over(count, cells, bin_of(roi, p, q), shares.data() + q * kSlice);
        }
      }
    }
  });
}

// The regions of every map; checks the values of RoIs and levels.
template <typename A>
std::vector<Regions<A>> regions_of_maps(const at::Tensor& rois,
                                        const std::optional<at::Tensor>& levels,
                                        at::ArrayRef<double> scales, int64_t images) {
  const A* rows = rois.const_data_ptr<A>();
  check_roi_values(kOp, rows, rois.size(0), images);
  std::vector<Regions<A>> regions;
  for (const double scale : scales) regions.push_back({rows, {}, static_cast<A>(scale)});
  const at::Tensor numbers = levels.has_value() ? levels->contiguous() : at::Tensor();
  const int64_t* data = numbers.defined() ? numbers.const_data_ptr<int64_t>() : nullptr;
  if (data != nullptr) check_levels(data, rois.size(0), static_cast<int64_t>(scales.size()));
  for (int64_t r = 0; r < rois.size(0); ++r)
    regions[data == nullptr ? 0 : data[r]].rows.push_back(r);
  return regions;
}

at::Tensor roi_align_cpu(at::TensorList maps, const at::Tensor& rois,
                         const std::optional<at::Tensor>& levels, at::ArrayRef<double> scales,
                         int64_t height, int64_t width, int64_t sampling_ratio, bool aligned) {
  const Sampling sampling{height, width, sampling_ratio, aligned};
  check_maps(maps, scales.size());
  check_regions("maps", maps[0], rois, levels, scales, sampling);
  at::Tensor out = at::empty({rois.size(0), maps[0].size(1), height, width},
                             maps[0].options().memory_format(at::MemoryFormat::Contiguous));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, out.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    const at::Tensor rows = rois.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const auto regions = regions_of_maps<A>(rows, levels, scales, maps[0].size(0));
    for (size_t i = 0; i < regions.size(); ++i)
      pool<scalar_t, A>(maps[i], regions[i], sampling, out);
  });
  return out;
}

std::vector<at::Tensor> roi_align_backward_cpu(const at::Tensor& grad, const at::Tensor& rois,
                                               const std::optional<at::Tensor>& levels,
                                               at::ArrayRef<double> scales, at::IntArrayRef heights,
                                               at::IntArrayRef widths, int64_t images,
                                               int64_t sampling_ratio, bool aligned,
                                               bool channels_last) {
  const bool has_rank = grad.dim() == 4;
  const Sampling sampling{has_rank ? grad.size(2) : 1, has_rank ? grad.size(3) : 1, sampling_ratio,
                          aligned};
  check_regions("grad", grad, rois, levels, scales, sampling);
  check_pooled_gradient(grad, rois, scales.size(), heights, widths, images);
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  std::vector<at::Tensor> out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    const at::Tensor rows = rois.to(type).contiguous(), dense = grad.contiguous();
    const auto regions = regions_of_maps<A>(rows, levels, scales, images);
    for (size_t i = 0; i < regions.size(); ++i) {
      at::Tensor turned =
          at::zeros({images, heights[i], widths[i], grad.size(1)}, grad.options().dtype(type));
      spread<scalar_t, A>(dense, regions[i], sampling, turned);
      out.push_back(turned.permute({0, 3, 1, 2}).to(grad.scalar_type()).contiguous(format));
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("roi_align", roi_align_cpu);
  m.impl("roi_align_backward", roi_align_backward_cpu);
}

}  // namespace instseg

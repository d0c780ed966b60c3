// YOLACT's mask assembly on the CPU, row by row: a row of cells is multiplied, made probabilities
// and stretched to the width of the result once; rows of the result blend two such rows.  Nothing
// larger than rows is kept.

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/safe_numerics.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <vector>

#include "assemble_masks/arguments.h"
#include "assemble_masks/assemble_masks.h"

namespace instseg {
namespace {

// The blends of all pixels of one axis, one array per member so that loops over them are
// vectorised.
template <typename T>
struct Blends {
  std::vector<int32_t> low, high;
  std::vector<T> low_weight, high_weight;

  Blends(int64_t pixels, int64_t cells) {
    low.reserve(pixels), high.reserve(pixels), low_weight.reserve(pixels),
        high_weight.reserve(pixels);
    for (int64_t i = 0; i < pixels; ++i) {
      const Blend<T> blend = blend_at<T>(i, pixels, cells);
      low.push_back(static_cast<int32_t>(blend.low));
      high.push_back(static_cast<int32_t>(blend.high));
      low_weight.push_back(blend.low_weight);
      high_weight.push_back(blend.high_weight);
    }
  }

  // Pixels that read one of `cells` at least.
  Span readers_of(const Span& cells) const {
    if (cells.begin == cells.end) return {0, 0};
    return {std::lower_bound(high.begin(), high.end(), cells.begin) - high.begin(),
            std::lower_bound(low.begin(), low.end(), cells.end) - low.begin()};
  }
};

// `cells` of one row: the first of them in each plane is at `planes`, a plane apart.
template <typename T>
INSTSEG_INLINE void add_planes(int64_t cells, const T* planes, int64_t plane, const T* coefficients,
                               int64_t count, T* sums) {
  std::fill_n(sums, cells, T(0));
  for (int64_t k = 0; k < count; ++k) {
    const T coefficient = coefficients[k];
    const T* row = planes + k * plane;
    for (int64_t i = 0; i < cells; ++i) sums[i] += row[i] * coefficient;
  }
}

template <typename T>
INSTSEG_INLINE void stretch_row(int64_t pixels, const T* cells, const int32_t* low,
                                const T* low_weight, const int32_t* high, const T* high_weight,
                                T* out) {
  for (int64_t i = 0; i < pixels; ++i)
    out[i] = blended(cells[low[i]], low_weight[i], cells[high[i]], high_weight[i]);
}

template <typename T>
INSTSEG_INLINE void threshold_row(int64_t pixels, const T* low, T low_weight, const T* high,
                                  T high_weight, bool* out) {
  for (int64_t i = 0; i < pixels; ++i)
    out[i] = blended(low[i], low_weight, high[i], high_weight) > static_cast<T>(0.5);
}

// One copy per instruction set needs functions that are no templates.
#define INSTSEG_ROWS(T)                                                                       \
  INSTSEG_SIMD void logits_of_row(int64_t cells, const T* planes, int64_t plane,              \
                                  const T* coefficients, int64_t count, T* sums) {            \
    add_planes(cells, planes, plane, coefficients, count, sums);                              \
  }                                                                                           \
  INSTSEG_SIMD void stretched(int64_t pixels, const T* cells, const int32_t* low,             \
                              const T* low_weight, const int32_t* high, const T* high_weight, \
                              T* out) {                                                       \
    stretch_row(pixels, cells, low, low_weight, high, high_weight, out);                      \
  }                                                                                           \
  INSTSEG_SIMD void thresholded(int64_t pixels, const T* low, T low_weight, const T* high,    \
                                T high_weight, bool* out) {                                   \
    threshold_row(pixels, low, low_weight, high, high_weight, out);                           \
  }
INSTSEG_ROWS(float)
INSTSEG_ROWS(double)
#undef INSTSEG_ROWS

// The input that all masks share.
template <typename T>
struct Image {
  const T* planes;  // (K, h, w)
  int64_t count, cells_y, cells_x;
  int64_t height, width;
  Blends<T> y, x;
};

// Rows of cells stretched to the pixels of one mask; the two that were asked for last are kept.
template <typename T>
class StretchedRows {
 public:
  explicit StretchedRows(const Image<T>& image)
      : image_(image), cells_(image.cells_x + 2), rows_{std::vector<T>(image.width), rows_[0]} {}

  // The mask with these coefficients, cropped to `rows` and `columns` of cells, at `pixels` of each
  // row.
  void begin(const T* coefficients, const Span& rows, const Span& columns, const Span& pixels) {
    coefficients_ = coefficients;
    crop_rows_ = rows;
    crop_columns_ = columns;
    pixels_ = pixels;
    numbers_[0] = numbers_[1] = -1;
    // The cells beside the crop, which its outermost pixels read as well.
    cells_[columns.begin] = cells_[columns.end + 1] = 0;
  }

  // Neighbouring rows use different buffers, so computing row y + 1 leaves row y alone.
  const T* row(int64_t y) {
    T* out = rows_[y % 2].data();
    if (numbers_[y % 2] == y) return out;
    numbers_[y % 2] = y;
    const int64_t count = pixels_.end - pixels_.begin;
    if (y < crop_rows_.begin || y >= crop_rows_.end) {
      std::fill_n(out, count, T(0));
      return out;
    }
    T* cells = cells_.data() + 1;
    const int64_t first = crop_columns_.begin, size = crop_columns_.end - first;
    logits_of_row(size, image_.planes + y * image_.cells_x + first, image_.cells_y * image_.cells_x,
                  coefficients_, image_.count, cells + first);
    for (int64_t i = first; i < crop_columns_.end; ++i) cells[i] = probability_of(cells[i]);
    const Blends<T>& x = image_.x;
    stretched(count, cells, x.low.data() + pixels_.begin, x.low_weight.data() + pixels_.begin,
              x.high.data() + pixels_.begin, x.high_weight.data() + pixels_.begin, out);
    return out;
  }

 private:
  const Image<T>& image_;
  std::vector<T> cells_;  // cell -1 is the first
  std::vector<T> rows_[2];
  int64_t numbers_[2] = {-1, -1};
  const T* coefficients_ = nullptr;
  Span crop_rows_{0, 0}, crop_columns_{0, 0}, pixels_{0, 0};
};

// Pixels of one mask in its rows `band`; `out` is the whole mask, zeros so far.
template <typename T>
void assemble_band(const Image<T>& image, const T* coefficients, const T* box, const Span& band,
                   StretchedRows<T>* stretched_rows, bool* out) {
  const Span columns = cropped_cells(box[0], box[2], image.width, image.cells_x);
  const Span rows = cropped_cells(box[1], box[3], image.height, image.cells_y);
  const Span pixels_x = image.x.readers_of(columns), pixels_y = image.y.readers_of(rows);
  const int64_t begin = std::max(band.begin, pixels_y.begin),
                end = std::min(band.end, pixels_y.end);
  if (begin >= end || pixels_x.begin >= pixels_x.end) return;
  stretched_rows->begin(coefficients, rows, columns, pixels_x);
  for (int64_t i = begin; i < end; ++i) {
    const T* low = stretched_rows->row(image.y.low[i]);
    const T* high = stretched_rows->row(image.y.high[i]);
    thresholded(pixels_x.end - pixels_x.begin, low, image.y.low_weight[i], high,
                image.y.high_weight[i], out + i * image.width + pixels_x.begin);
  }
}

// Zeros that take memory only where they are written: most of a mask stays zero.
at::Tensor untouched_zeros(int64_t count, int64_t height, int64_t width,
                           const at::TensorOptions& options) {
  const std::array<uint64_t, 3> sizes{static_cast<uint64_t>(count), static_cast<uint64_t>(height),
                                      static_cast<uint64_t>(width)};
  uint64_t bytes = 0;
  void* data = nullptr;
  if (!c10::safe_multiplies_u64(sizes, &bytes)) data = std::calloc(std::max<uint64_t>(bytes, 1), 1);
  TORCH_CHECK(data != nullptr, no_memory_for_masks(count, height, width));
  return at::from_blob(
      data, {count, height, width}, [](void* pointer) { std::free(pointer); }, options);
}

constexpr int64_t kBandRows = 64;  // the unit of work: a single large mask keeps all threads busy

template <typename T>
void assemble(const at::Tensor& planes, const at::Tensor& coefficients, const at::Tensor& boxes,
              const at::Tensor& masks) {
  const int64_t cells_y = planes.size(1), cells_x = planes.size(2);
  const int64_t height = masks.size(1), width = masks.size(2);
  const Image<T> image{
      planes.const_data_ptr<T>(), planes.size(0),           cells_y, cells_x, height, width,
      Blends<T>(height, cells_y), Blends<T>(width, cells_x)};
  const T* coefficient_data = coefficients.const_data_ptr<T>();
  const T* box_data = boxes.const_data_ptr<T>();
  bool* out = masks.mutable_data_ptr<bool>();
  const int64_t bands = (height + kBandRows - 1) / kBandRows;
  at::parallel_for(0, masks.size(0) * bands, 4, [&](int64_t begin, int64_t end) {
    StretchedRows<T> rows(image);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / bands, first = i % bands * kBandRows;
      assemble_band(image, coefficient_data + n * image.count, box_data + 4 * n,
                    {first, std::min(first + kBandRows, height)}, &rows, out + n * height * width);
    }
  });
}

at::Tensor assemble_masks_cpu(const at::Tensor& prototypes, const at::Tensor& coefficients,
                              const at::Tensor& boxes, int64_t height, int64_t width) {
  check_assemble_masks(prototypes, coefficients, boxes, height, width);
  auto masks = untouched_zeros(coefficients.size(0), height, width, at::TensorOptions(at::kBool));
  if (masks.numel() == 0) return masks;
  const auto type = prototypes.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const auto planes = prototypes.permute({2, 0, 1}).to(type).contiguous();
  const auto factors = coefficients.to(type).contiguous(), corners = boxes.to(type).contiguous();
  if (type == at::kDouble) {
    assemble<double>(planes, factors, corners, masks);
  } else {
    assemble<float>(planes, factors, corners, masks);
  }
  return masks;
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) { m.impl("assemble_masks", instseg::assemble_masks_cpu); }

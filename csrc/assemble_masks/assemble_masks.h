// Arithmetic of YOLACT's mask assembly (Bolya et al., ICCV 2019, section 3.2, and the authors'
// code), for the CPU and for CUDA; T is float or double.
//
// Every product and sum is rounded by itself, but for the position of a sample: PyTorch's bilinear
// resize contracts that one, and at cell 100 the difference is larger than all others.

#pragma once

#include <cmath>

#include "common.h"

namespace instseg {

// Overloads, because plain fma and exp on the host compute floats in double.
INSTSEG_HOST_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
INSTSEG_HOST_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }
INSTSEG_HOST_DEVICE float exponential(float x) { return expf(x); }
INSTSEG_HOST_DEVICE double exponential(double x) { return exp(x); }

// Cells or pixels begin..end-1.
struct Span {
  int64_t begin, end;
};

// The cells of one axis that a box leaves: `first` and `second` are its ends in pixels, in any
// order, of a result with `pixels`.  None for NaN.
template <typename T>
INSTSEG_HOST_DEVICE Span cropped_cells(T first, T second, int64_t pixels, int64_t cells) {
  constexpr T padding = 1;
  const T length = static_cast<T>(cells);
  first = rounded_product(first / static_cast<T>(pixels), length);
  second = rounded_product(second / static_cast<T>(pixels), length);
  if (first != first || second != second) return {0, 0};
  const T low = (first < second ? first : second) - padding,
          high = (first < second ? second : first) + padding;
  if (low >= length || high <= 0) return {0, 0};
  const Span span{low > 0 ? static_cast<int64_t>(ceil(low)) : 0,
                  high < length ? static_cast<int64_t>(ceil(high)) : cells};
  return span.begin < span.end ? span : Span{0, 0};
}

// The two cells that a pixel of the result lies between, and their weights.
template <typename T>
struct Blend {
  int64_t low, high;
  T low_weight, high_weight;
};

// Half-pixel centres, edges repeated: bilinear with align_corners=False.
template <typename T>
INSTSEG_HOST_DEVICE Blend<T> blend_at(int64_t pixel, int64_t pixels, int64_t cells) {
  const T scale = static_cast<T>(cells) / static_cast<T>(pixels);
  T position = fused(scale, static_cast<T>(pixel) + static_cast<T>(0.5), static_cast<T>(-0.5));
  if (position < 0) position = 0;
  int64_t low = static_cast<int64_t>(position);
  if (low > cells - 1) low = cells - 1;
  T fraction = position - static_cast<T>(low);
  if (fraction > 1) fraction = 1;
  return {low, low < cells - 1 ? low + 1 : low, 1 - fraction, fraction};
}

template <typename T>
INSTSEG_HOST_DEVICE T blended(T low, T low_weight, T high, T high_weight) {
  return rounded_product(low_weight, low) + rounded_product(high_weight, high);
}

template <typename T>
INSTSEG_HOST_DEVICE T probability_of(T logit) {
  return 1 / (1 + exponential(-logit));
}

}  // namespace instseg

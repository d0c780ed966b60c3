// Arithmetic of FCIS's mask voting (spec: Li et al., CVPR 2017, and the authors' mask_transform),
// for the CPU and for CUDA: both give the same bits.
//
// Votes are whole numbers: a weight of 1 is 2^40.  Sums are then exact, whatever their order.

#pragma once

#include <cmath>

#include "common.h"

namespace instseg {

constexpr double kOne = 1099511627776.0;  // 2^40

INSTSEG_HOST_DEVICE int64_t vote_of(float weight) {
  if (!(weight > 0)) return 0;  // also NaN
  return static_cast<int64_t>((weight < 1 ? static_cast<double>(weight) : 1.0) * kOne);
}

INSTSEG_HOST_DEVICE float average_of(int64_t votes) {
  return static_cast<float>(static_cast<double>(votes) / kOne);
}

// The smallest sum of votes that is at least `threshold` in float32.
inline int64_t votes_for(float threshold) {
  int64_t below = 0, enough = int64_t(1) << 62;
  while (enough - below > 1) {
    const int64_t middle = below + (enough - below) / 2;
    (average_of(middle) >= threshold ? enough : below) = middle;
  }
  return enough;
}

// Pixels of a box, inclusive; `valid` is false for corners that are not finite or inverted.
struct PixelBox {
  int64_t x1, y1, x2, y2;
  bool valid;
};

INSTSEG_HOST_DEVICE int64_t nearest_pixel(float value) {
  constexpr float far = 1073741824.0f;  // 2^30; beyond any image
  return static_cast<int64_t>(rintf(value < -far ? -far : (value > far ? far : value)));
}

INSTSEG_HOST_DEVICE PixelBox pixel_box(const float* box) {
  for (int i = 0; i < 4; ++i)
    if (!(box[i] - box[i] == 0)) return {0, 0, -1, -1, false};
  const PixelBox out{nearest_pixel(box[0]), nearest_pixel(box[1]), nearest_pixel(box[2]),
                     nearest_pixel(box[3]), true};
  return {out.x1, out.y1, out.x2, out.y2, out.x1 <= out.x2 && out.y1 <= out.y2};
}

// Where a linear resize reads: `low` and the next sample, the latter with weight `fraction`.
struct Sample {
  int64_t low;
  float fraction;
};

INSTSEG_HOST_DEVICE Sample clamped_sample(float position, int64_t first, int64_t last) {
  if (!(position > static_cast<float>(first))) return {first, 0};
  const int64_t low = static_cast<int64_t>(floorf(position));
  return low >= last ? Sample{last, 0} : Sample{low, position - static_cast<float>(low)};
}

// Mask sample of pixel `offset` of a box side of `length` pixels (half-pixel centres, edges
// repeated).
INSTSEG_HOST_DEVICE Sample mask_sample(int64_t offset, int64_t length, int64_t mask_size) {
  const float ratio = static_cast<float>(mask_size) / static_cast<float>(length);
  const float centre = static_cast<float>(offset) + 0.5f;
  return clamped_sample(rounded_sum(rounded_product(centre, ratio), -0.5f), 0, mask_size - 1);
}

// Pixel of the image that mask sample `i` of the tight side first..last reads: inside that side, or
// with `from_image` half a pixel beyond it, up to the border of the image (`size` pixels).
INSTSEG_HOST_DEVICE Sample image_sample(int64_t i, int64_t mask_size, int64_t first, int64_t last,
                                        int64_t size, bool from_image) {
  if (!from_image) {
    const double ratio = static_cast<double>(last - first + 1) / static_cast<double>(mask_size);
    const double centre = static_cast<double>(i) + 0.5;
    const float offset = static_cast<float>(rounded_sum(rounded_product(centre, ratio), -0.5));
    const Sample sample = clamped_sample(offset, 0, last - first);
    return {first + sample.low, sample.fraction};
  }
  // float32 throughout, as on the authors' GPU: at pixel 1000 the rounding is visible in the
  // result.
  const float ratio = static_cast<float>(last - first + 1) / static_cast<float>(mask_size);
  const float centre = static_cast<float>(i) + 0.5f;
  const float shifted = rounded_sum(static_cast<float>(first), rounded_product(centre, ratio));
  const float position = rounded_sum(shifted, -0.5f);
  return clamped_sample(position, 0, size - 1);
}

INSTSEG_HOST_DEVICE float interpolate(float a, float b, float fraction) {
  return rounded_sum(a, rounded_product(fraction, rounded_sum(b, -a)));
}

// Does the value between `a` and `b` reach the threshold?  Monotone in `fraction` but for NaN.
INSTSEG_HOST_DEVICE bool reaches(float a, float b, float fraction, float threshold) {
  const bool from = a >= threshold, to = b >= threshold;
  return from == to ? from : interpolate(a, b, fraction) >= threshold;
}

INSTSEG_HOST_DEVICE float bilinear(float a, float b, float c, float d, float fy, float fx) {
  return interpolate(interpolate(a, b, fx), interpolate(c, d, fx), fy);
}

INSTSEG_HOST_DEVICE float inclusive_area(float x1, float y1, float x2, float y2) {
  return (x2 - x1 + 1.0f) * (y2 - y1 + 1.0f);
}

// Does the IoU of boxes of areas `a` and `b`, which share `width` x `height`, pass the threshold?
INSTSEG_HOST_DEVICE bool overlaps(float width, float height, float a, float b, float threshold) {
  const float inter = (width > 0 ? width : 0.0f) * (height > 0 ? height : 0.0f);
#ifdef __CUDA_ARCH__
  return __fdiv_rn(inter, __fadd_rn(__fadd_rn(a, b), -inter)) > threshold;
#else
  return inter / ((a + b) - inter) > threshold;
#endif
}

}  // namespace instseg

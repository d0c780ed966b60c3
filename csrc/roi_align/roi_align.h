// Where RoIAlign samples a map (He et al., ICCV 2017, section 3), for forward and backward.
//
// The arithmetic is torchvision's, operation by operation, so that results have the same bits.
// Torchvision visits every sample; here those that lie outside the map, which are zero, are left
// out, so that enormous RoIs cost no more than the map.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace instseg {

// A sample between cells `low` and `high` of one axis.
template <typename T>
struct AxisSample {
  int64_t low, high;
  T low_weight, high_weight;
};

// One axis of one RoI: its samples inside the map, bin by bin.
template <typename T>
class SampledAxis {
 public:
  // `first` and `last` are pixels; `sampling` samples per bin, 0 for one per cell.
  void begin(T first, T last, T scale, bool aligned, int64_t bins, int64_t sampling,
             int64_t length) {
    const T offset = aligned ? T(0.5) : T(0);
    start_ = first * scale - offset;
    T size = last * scale - offset - start_;
    if (!aligned) size = std::max(size, T(1));
    bin_ = size / T(bins);
    grid_ = sampling > 0 ? sampling : whole(bin_);
    samples_.clear();
    ends_.clear();
    first_cell_ = length;
    last_cell_ = -1;
    for (int64_t p = 0; p < bins; ++p) {
      append_bin(p, length);
      ends_.push_back(static_cast<int64_t>(samples_.size()));
    }
  }

  // Samples of a bin, whether inside the map or not.
  int64_t grid() const { return grid_; }
  const AxisSample<T>* bin_begin(int64_t p) const {
    return samples_.data() + (p == 0 ? 0 : ends_[p - 1]);
  }
  const AxisSample<T>* bin_end(int64_t p) const { return samples_.data() + ends_[p]; }

  bool empty() const { return samples_.empty(); }
  int64_t first_cell() const { return first_cell_; }
  int64_t last_cell() const { return last_cell_; }

 private:
  // Smallest whole number of at least `value`, 0 for NaN; more than 2^31 samples are never needed.
  static int64_t whole(T value) {
    constexpr int64_t most = int64_t(1) << 31;
    if (!(value > T(0))) return 0;
    return value < T(most) ? static_cast<int64_t>(std::ceil(value)) : most;
  }

  T position(int64_t p, int64_t i) const {
    return start_ + T(p) * bin_ + (T(i) + T(0.5)) * bin_ / T(grid_);
  }

  // The first sample of bin `p` of which `reached` holds; it holds for all behind it.
  template <typename F>
  int64_t first_where(int64_t p, const F& reached) const {
    int64_t low = 0, high = grid_;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (reached(position(p, middle))) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  void append_bin(int64_t p, int64_t length) {
    if (length == 0 || !std::isfinite(start_) || !std::isfinite(bin_)) return;
    const T far = T(length);
    int64_t begin = 0, end = grid_;
    if (bin_ >= T(0)) {  // else samples go backwards, and are as few as were asked for
      begin = first_where(p, [](T x) { return !(x < T(-1)); });
      end = first_where(p, [far](T x) { return x > far; });
    }
    for (int64_t i = begin; i < end; ++i) {
      T x = position(p, i);
      if (x < T(-1) || x > far) continue;
      x = std::max(x, T(0));
      const int64_t low = std::min(static_cast<int64_t>(x), length - 1);
      const int64_t high = std::min(low + 1, length - 1);
      if (low == high) x = T(low);
      const T high_weight = x - T(low);
      samples_.push_back({low, high, T(1) - high_weight, high_weight});
      first_cell_ = std::min(first_cell_, low);
      last_cell_ = std::max(last_cell_, high);
    }
  }

  T start_ = 0, bin_ = 0;
  int64_t grid_ = 0, first_cell_ = 0, last_cell_ = 0;
  std::vector<AxisSample<T>> samples_;
  std::vector<int64_t> ends_;
};

// How the regions are sampled, the same for all of them.
struct Sampling {
  int64_t rows, columns;  // bins
  int64_t per_bin;        // samples along each axis, 0 for one per cell
  bool aligned;

  int64_t bins() const { return rows * columns; }
};

// Both axes of one RoI.
template <typename T>
struct SampledRoi {
  SampledAxis<T> y, x;
  T count = 1;  // samples of a bin

  // `row` is (batch index, x1, y1, x2, y2).
  void begin(const T* row, T scale, const Sampling& sampling, int64_t height, int64_t width) {
    x.begin(row[1], row[3], scale, sampling.aligned, sampling.columns, sampling.per_bin, width);
    y.begin(row[2], row[4], scale, sampling.aligned, sampling.rows, sampling.per_bin, height);
    count = T(std::max<int64_t>(y.grid() * x.grid(), 1));
  }
};

}  // namespace instseg

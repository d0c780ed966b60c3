// FCIS's mask voting on the CPU.
//
// A binary mask is kept as the runs of its rows.  Adding it to the average of a detection then
// means two additions per run, +votes at its start and -votes behind its end, and one running sum
// per row at last: the work goes with the outlines of the voters, not with their areas.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "vote_masks/arguments.h"
#include "vote_masks/vote_masks.h"

namespace instseg {
namespace {

// Boxes of one class, best first, one array per corner so that the loop below is vectorised.
struct Candidates {
  std::vector<float> x1, y1, x2, y2, area;
  std::vector<uint8_t> suppressed;

  Candidates(const float* boxes, const std::vector<int64_t>& order) : suppressed(order.size()) {
    for (const int64_t r : order) {
      const float* box = boxes + 4 * r;
      x1.push_back(box[0]);
      y1.push_back(box[1]);
      x2.push_back(box[2]);
      y2.push_back(box[3]);
      area.push_back(inclusive_area(box[0], box[1], box[2], box[3]));
    }
  }
};

INSTSEG_SIMD void suppress_after(int64_t kept, int64_t count, const float* x1, const float* y1,
                                 const float* x2, const float* y2, const float* area,
                                 float threshold, uint8_t* suppressed) {
  const float left = x1[kept], top = y1[kept], right = x2[kept], bottom = y2[kept],
              own = area[kept];
  for (int64_t i = kept + 1; i < count; ++i) {
    const float width = std::min(right, x2[i]) - std::max(left, x1[i]) + 1.0f;
    const float height = std::min(bottom, y2[i]) - std::max(top, y1[i]) + 1.0f;
    suppressed[i] |= static_cast<uint8_t>(overlaps(width, height, own, area[i], threshold));
  }
}

void nms_of_class(const float* boxes, const float* scores, int64_t count, float threshold,
                  double score_threshold, int64_t max_kept, bool* keep) {
  std::vector<int64_t> order;
  for (int64_t r = 0; r < count; ++r)
    if (scores[r] >= score_threshold && pixel_box(boxes + 4 * r).valid) order.push_back(r);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  Candidates c(boxes, order);
  const int64_t candidates = static_cast<int64_t>(order.size());
  for (int64_t i = 0, kept = 0; i < candidates && kept < max_kept; ++i) {
    if (c.suppressed[i]) continue;
    keep[order[i]] = true;
    ++kept;
    suppress_after(i, candidates, c.x1.data(), c.y1.data(), c.x2.data(), c.y2.data(), c.area.data(),
                   threshold, c.suppressed.data());
  }
}

at::Tensor nms_per_class_cpu(const at::Tensor& boxes, const at::Tensor& scores,
                             double iou_threshold, double score_threshold, int64_t max_kept) {
  check_nms_per_class(boxes, scores, max_kept);
  const auto corners = boxes.contiguous(), probabilities = scores.contiguous();
  auto keep = at::zeros(scores.sizes(), scores.options().dtype(at::kBool));
  const int64_t count = scores.size(1);
  const float* box_data = corners.const_data_ptr<float>();
  const float* score_data = probabilities.const_data_ptr<float>();
  bool* keep_data = keep.mutable_data_ptr<bool>();
  at::parallel_for(0, scores.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      nms_of_class(box_data, score_data + c * count, count, static_cast<float>(iou_threshold),
                   score_threshold, max_kept, keep_data + c * count);
  });
  return keep;
}

// The binary mask of one RoI inside the image: row `y` consists of the runs edges[i]..edges[i+1]-1
// (columns of the image), i = starts[y - box.y1], starts[y - box.y1] + 2, ...
struct Runs {
  PixelBox box{0, 0, -1, -1, false};
  std::vector<size_t> starts;
  std::vector<int64_t> edges;
};

// First pixel in begin..end-1 where the mask row is no longer as at `begin`; it changes once at
// most.
int64_t crossing(const std::vector<Sample>& samples, int64_t begin, int64_t end, float a, float b,
                 float threshold) {
  const bool first = reaches(a, b, samples[begin].fraction, threshold);
  int64_t same = begin, other = end;
  while (other - same > 1) {
    const int64_t middle = same + (other - same) / 2;
    (reaches(a, b, samples[middle].fraction, threshold) == first ? same : other) = middle;
  }
  return other;
}

// Runs of one row: between two neighbouring mask samples the row is monotone.
void append_row(const std::vector<float>& values, const std::vector<Sample>& samples,
                const std::vector<int64_t>& segments, int64_t left, float threshold,
                std::vector<int64_t>* edges) {
  bool inside = false;
  for (size_t s = 0; s + 1 < segments.size(); ++s) {
    const int64_t begin = segments[s], end = segments[s + 1], low = samples[begin].low;
    const float a = values[low], b = values[std::min<int64_t>(low + 1, values.size() - 1)];
    if (reaches(a, b, samples[begin].fraction, threshold) != inside) {
      edges->push_back(left + begin);
      inside = !inside;
    }
    if ((a >= threshold) == (b >= threshold)) continue;
    const int64_t change = crossing(samples, begin, end, a, b, threshold);
    if (change < end) {
      edges->push_back(left + change);
      inside = !inside;
    }
  }
  if (inside) edges->push_back(left + static_cast<int64_t>(samples.size()));
}

Runs render(const float* corners, const float* mask, int64_t size, float threshold, int64_t height,
            int64_t width) {
  Runs runs;
  const PixelBox box = pixel_box(corners);
  if (!box.valid) return runs;
  const int64_t left = std::max<int64_t>(box.x1, 0), right = std::min(box.x2, width - 1);
  const int64_t top = std::max<int64_t>(box.y1, 0), bottom = std::min(box.y2, height - 1);
  if (left > right || top > bottom) return runs;
  runs.box = {left, top, right, bottom, true};
  std::vector<Sample> samples;
  std::vector<int64_t>
      segments;  // first pixels of the stretches between two mask samples, and the end
  for (int64_t x = left; x <= right; ++x) {
    samples.push_back(mask_sample(x - box.x1, box.x2 - box.x1 + 1, size));
    if (x == left || samples.back().low != samples[samples.size() - 2].low)
      segments.push_back(x - left);
  }
  segments.push_back(right - left + 1);
  std::vector<float> values(size);
  for (int64_t y = top; y <= bottom; ++y) {
    runs.starts.push_back(runs.edges.size());
    const Sample sample = mask_sample(y - box.y1, box.y2 - box.y1 + 1, size);
    const float* upper = mask + sample.low * size;
    const float* lower = mask + std::min(sample.low + 1, size - 1) * size;
    for (int64_t i = 0; i < size; ++i) values[i] = interpolate(upper[i], lower[i], sample.fraction);
    append_row(values, samples, segments, left, threshold, &runs.edges);
  }
  runs.starts.push_back(runs.edges.size());
  return runs;
}

// Sums of votes inside the union of the voters' boxes; zero elsewhere.
class Votes {
 public:
  Votes(const std::vector<Runs>& runs, const float* weights) {
    for (size_t r = 0; r < runs.size(); ++r)
      if (runs[r].box.valid && vote_of(weights[r]) != 0) unite(runs[r].box);
    if (!box_.valid) return;
    stride_ = box_.x2 - box_.x1 + 2;
    sums_.assign(stride_ * (box_.y2 - box_.y1 + 1), 0);
    for (size_t r = 0; r < runs.size(); ++r)
      if (runs[r].box.valid && vote_of(weights[r]) != 0) add(runs[r], vote_of(weights[r]));
    for (size_t row = 0; row < sums_.size(); row += stride_)
      std::partial_sum(sums_.begin() + row, sums_.begin() + row + stride_, sums_.begin() + row);
  }

  float average(int64_t y, int64_t x) const {
    const bool outside = !box_.valid || y < box_.y1 || y > box_.y2 || x < box_.x1 || x > box_.x2;
    return outside ? 0.0f : average_of(sums_[(y - box_.y1) * stride_ + x - box_.x1]);
  }

  // Tight box of the pixels with at least `enough` votes.
  PixelBox tight(int64_t enough) const {
    PixelBox out{box_.x2 + 1, box_.y2 + 1, -1, -1, false};
    for (int64_t y = box_.y1; y <= box_.y2; ++y) {
      const int64_t* row = sums_.data() + (y - box_.y1) * stride_;
      const int64_t* end = row + stride_ - 1;
      const int64_t* first = std::find_if(row, end, [&](int64_t votes) { return votes >= enough; });
      if (first == end) continue;
      const int64_t* last = end - 1;
      while (*last < enough) --last;
      const int64_t x1 = box_.x1 + (first - row), x2 = box_.x1 + (last - row);
      out = {std::min(out.x1, x1), std::min(out.y1, y), std::max(out.x2, x2), y, true};
    }
    return out;
  }

 private:
  void unite(const PixelBox& box) {
    box_ = !box_.valid ? box
                       : PixelBox{std::min(box_.x1, box.x1), std::min(box_.y1, box.y1),
                                  std::max(box_.x2, box.x2), std::max(box_.y2, box.y2), true};
  }

  void add(const Runs& runs, int64_t votes) {
    for (int64_t y = runs.box.y1; y <= runs.box.y2; ++y) {
      int64_t* row = sums_.data() + (y - box_.y1) * stride_;
      const size_t end = runs.starts[y - runs.box.y1 + 1];
      for (size_t e = runs.starts[y - runs.box.y1]; e < end; e += 2) {
        row[runs.edges[e] - box_.x1] += votes;
        row[runs.edges[e + 1] - box_.x1] -= votes;
      }
    }
  }

  PixelBox box_{0, 0, -1, -1, false};
  int64_t stride_ = 0;  // one more than the box is wide, where the last runs end
  std::vector<int64_t> sums_;
};

void resample(const Votes& votes, const PixelBox& tight, int64_t size, int64_t height,
              int64_t width, bool from_image, float* out) {
  const int64_t last_y = from_image ? height - 1 : tight.y2,
                last_x = from_image ? width - 1 : tight.x2;
  for (int64_t i = 0; i < size; ++i) {
    const Sample y = image_sample(i, size, tight.y1, tight.y2, height, from_image);
    for (int64_t j = 0; j < size; ++j) {
      const Sample x = image_sample(j, size, tight.x1, tight.x2, width, from_image);
      const int64_t below = std::min(y.low + 1, last_y), right = std::min(x.low + 1, last_x);
      out[i * size + j] = bilinear(votes.average(y.low, x.low), votes.average(y.low, right),
                                   votes.average(below, x.low), votes.average(below, right),
                                   y.fraction, x.fraction);
    }
  }
}

std::vector<Runs> render_voters(const float* boxes, const float* masks, const float* weights,
                                int64_t rois, int64_t count, int64_t size, float threshold,
                                int64_t height, int64_t width) {
  std::vector<uint8_t> votes(rois, 0);
  for (int64_t n = 0; n < count; ++n)
    for (int64_t r = 0; r < rois; ++r)
      votes[r] |= static_cast<uint8_t>(vote_of(weights[n * rois + r]) != 0);
  std::vector<Runs> runs(rois);
  at::parallel_for(0, rois, 4, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      if (votes[r])
        runs[r] = render(boxes + 4 * r, masks + r * size * size, size, threshold, height, width);
  });
  return runs;
}

std::tuple<at::Tensor, at::Tensor> average_masks_cpu(const at::Tensor& boxes,
                                                     const at::Tensor& masks,
                                                     const at::Tensor& weights,
                                                     double mask_threshold, int64_t height,
                                                     int64_t width, bool from_image) {
  check_average_masks(boxes, masks, weights, mask_threshold, height, width);
  const auto corners = boxes.contiguous(), values = masks.contiguous(),
             shares = weights.contiguous();
  const int64_t count = weights.size(0), rois = boxes.size(0), size = masks.size(1);
  auto out_boxes = at::empty({count, 4}, corners.options());
  auto out_masks = at::empty({count, size, size}, values.options());
  if (count == 0) return {out_boxes, out_masks};
  const float threshold = static_cast<float>(mask_threshold);
  const float* weight_data = shares.const_data_ptr<float>();
  const auto runs = render_voters(corners.const_data_ptr<float>(), values.const_data_ptr<float>(),
                                  weight_data, rois, count, size, threshold, height, width);
  const int64_t enough = votes_for(threshold);
  float* box_data = out_boxes.mutable_data_ptr<float>();
  float* mask_data = out_masks.mutable_data_ptr<float>();
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Votes votes(runs, weight_data + n * rois);
      PixelBox tight = votes.tight(enough);
      if (!tight.valid) tight = {width / 2, height / 2, width / 2, height / 2, true};
      const int64_t tight_corners[] = {tight.x1, tight.y1, tight.x2, tight.y2};
      std::copy_n(tight_corners, 4, box_data + 4 * n);
      resample(votes, tight, size, height, width, from_image, mask_data + n * size * size);
    }
  });
  return {out_boxes, out_masks};
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("nms_per_class", instseg::nms_per_class_cpu);
  m.impl("average_masks", instseg::average_masks_cpu);
}

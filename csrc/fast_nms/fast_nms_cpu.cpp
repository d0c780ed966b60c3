// YOLACT's Fast NMS on the CPU, class by class: the best boxes of a class are found without sorting
// the others, and each is compared with those before it.  No matrix of overlaps is kept.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "fast_nms/arguments.h"

namespace instseg {
namespace {

constexpr int64_t kColumns = 4;  // columns of scores for each box wanted, see ranked()

template <typename T>
struct Candidate {
  T score;
  int32_t row;
};

template <typename T>
INSTSEG_INLINE void keep_larger(int64_t count, const T* values, T* largest) {
  for (int64_t i = 0; i < count; ++i) largest[i] = values[i] > largest[i] ? values[i] : largest[i];
}

// Boxes of one class, best first, one array per number so that the loop below is vectorised.
template <typename T>
struct Corners {
  std::vector<T> x1, y1, x2, y2, area;
  std::vector<int32_t> removed;

  void assign(const T* boxes, const int64_t* rows, int64_t count) {
    for (std::vector<T>* values : {&x1, &y1, &x2, &y2, &area}) values->resize(count);
    removed.assign(count, 0);
    for (int64_t i = 0; i < count; ++i) {
      const T* box = boxes + 4 * rows[i];
      x1[i] = box[0], y1[i] = box[1], x2[i] = box[2], y2[i] = box[3];
      area[i] = (box[2] - box[0]) * (box[3] - box[1]);
    }
  }
};

// Mark the boxes behind box `i` that overlap it.  Boxes without area overlap nothing: 0 / 0 is
// above no threshold.
template <typename T>
INSTSEG_INLINE void compare_with(int64_t i, int64_t count, const T* x1, const T* y1, const T* x2,
                                 const T* y2, const T* area, T threshold,
                                 int32_t* __restrict removed) {
  const T left = x1[i], top = y1[i], right = x2[i], bottom = y2[i], own = area[i];
  for (int64_t j = i + 1; j < count; ++j) {
    const T width = std::min(right, x2[j]) - std::max(left, x1[j]);
    const T height = std::min(bottom, y2[j]) - std::max(top, y1[j]);
    const T shared = std::max(width, T(0)) * std::max(height, T(0));
    removed[j] |= static_cast<int32_t>(shared / ((own + area[j]) - shared) > threshold);
  }
}

// One copy per instruction set needs functions that are no templates.
#define INSTSEG_NMS(T)                                                                             \
  INSTSEG_SIMD void larger(int64_t count, const T* values, T* largest) {                           \
    keep_larger(count, values, largest);                                                           \
  }                                                                                                \
  INSTSEG_SIMD void remove_behind(int64_t i, int64_t count, const T* x1, const T* y1, const T* x2, \
                                  const T* y2, const T* area, T threshold, int32_t* removed) {     \
    compare_with(i, count, x1, y1, x2, y2, area, threshold, removed);                              \
  }
INSTSEG_NMS(float)
INSTSEG_NMS(double)
#undef INSTSEG_NMS

// A score that at least `wanted` of the scores reach: the scores are laid out in many columns, and
// that many columns have a largest score of at least this.
template <typename T>
T score_to_reach(const T* scores, int64_t count, int64_t wanted, std::vector<T>* largest) {
  constexpr T nothing = -std::numeric_limits<T>::infinity();
  const int64_t columns = kColumns * wanted;
  if (count < 2 * columns) return nothing;
  largest->assign(columns, nothing);
  for (int64_t i = 0; i < count; i += columns)
    larger(std::min(columns, count - i), scores + i, largest->data());
  std::nth_element(largest->begin(), largest->begin() + (wanted - 1), largest->end(),
                   [](T a, T b) { return a > b; });
  return (*largest)[wanted - 1];
}

// The rows of the best scores above `min_score` in descending order, at most `wanted`; false if
// scores are equal or not numbers, so that the order is torch's to say.
template <typename T>
bool ranked(const T* scores, int64_t count, int64_t wanted, T min_score,
            std::vector<Candidate<T>>* found, std::vector<T>* largest) {
  const T enough = score_to_reach(scores, count, wanted, largest);
  found->clear();
  for (int64_t r = 0; r < count; ++r) {
    const T score = scores[r];
    if (score < enough || score <= min_score) continue;
    if (score != score) return false;
    found->push_back({score, static_cast<int32_t>(r)});
  }
  const auto better = [](const Candidate<T>& a, const Candidate<T>& b) {
    return a.score > b.score;
  };
  const int64_t ordered = std::min<int64_t>(wanted + 1, found->size());
  std::partial_sort(found->begin(), found->begin() + ordered, found->end(), better);
  for (int64_t i = 1; i < ordered; ++i)
    if ((*found)[i - 1].score == (*found)[i].score) return false;
  found->resize(std::min<int64_t>(wanted, found->size()));
  return true;
}

// What is kept of each class: `count` of the `wanted` numbers in each row of `rows`.
struct Ranking {
  int64_t wanted;
  int64_t* rows;
  std::vector<int64_t> count;
};

template <typename T>
void rank_classes(const at::Tensor& scores, double min_score, Ranking* ranking) {
  const int64_t classes = scores.size(0), boxes = scores.size(1), wanted = ranking->wanted;
  const T* data = scores.const_data_ptr<T>();
  // Without a least score also -infinity is ranked.
  const T least = min_score > 0 ? static_cast<T>(min_score) : -std::numeric_limits<T>::infinity();
  std::vector<uint8_t> decided(classes);
  at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
    std::vector<Candidate<T>> found;
    std::vector<T> largest;
    for (int64_t c = begin; c < end; ++c) {
      decided[c] = ranked(data + c * boxes, boxes, wanted, least, &found, &largest);
      const bool all = min_score > 0 || static_cast<int64_t>(found.size()) == wanted;
      decided[c] = decided[c] && all;
      if (!decided[c]) continue;
      ranking->count[c] = static_cast<int64_t>(found.size());
      for (size_t i = 0; i < found.size(); ++i) ranking->rows[c * wanted + i] = found[i].row;
    }
  });
  for (int64_t c = 0; c < classes; ++c) {
    if (decided[c]) continue;
    const at::Tensor order = std::get<1>(at::topk(scores[c], wanted));
    std::copy_n(order.const_data_ptr<int64_t>(), wanted, ranking->rows + c * wanted);
    ranking->count[c] = wanted;
  }
}

template <typename T>
void remove_overlapped(const at::Tensor& boxes, double iou_threshold, const Ranking& ranking,
                       bool* survives) {
  const T* data = boxes.const_data_ptr<T>();
  const T threshold = static_cast<T>(iou_threshold);
  const auto classes = static_cast<int64_t>(ranking.count.size());
  at::parallel_for(0, classes, 1, [&](int64_t begin, int64_t end) {
    Corners<T> b;
    for (int64_t c = begin; c < end; ++c) {
      const int64_t count = ranking.count[c];
      b.assign(data, ranking.rows + c * ranking.wanted, count);
      for (int64_t i = 0; i + 1 < count; ++i) {
        remove_behind(i, count, b.x1.data(), b.y1.data(), b.x2.data(), b.y2.data(), b.area.data(),
                      threshold, b.removed.data());
      }
      for (int64_t i = 0; i < count; ++i) survives[c * ranking.wanted + i] = b.removed[i] == 0;
    }
  });
}

std::tuple<at::Tensor, at::Tensor> fast_nms_cpu(const at::Tensor& boxes, const at::Tensor& scores,
                                                double iou_threshold, int64_t top_k,
                                                double min_score) {
  check_fast_nms(boxes, scores, iou_threshold, top_k, min_score);
  const int64_t classes = scores.size(0), wanted = std::min(top_k, scores.size(1));
  const auto wide = [](const at::Tensor& values) {
    return values.to(values.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  };
  const at::Tensor corners = wide(boxes), ranked_scores = wide(scores);
  at::Tensor rows = at::zeros({classes, wanted}, at::TensorOptions(at::kLong));
  at::Tensor survives = at::zeros({classes, wanted}, at::TensorOptions(at::kBool));
  if (rows.numel() == 0) return {rows, survives};
  Ranking ranking{wanted, rows.mutable_data_ptr<int64_t>(), std::vector<int64_t>(classes)};
  if (ranked_scores.scalar_type() == at::kDouble) {
    rank_classes<double>(ranked_scores, min_score, &ranking);
  } else {
    rank_classes<float>(ranked_scores, min_score, &ranking);
  }
  bool* out = survives.mutable_data_ptr<bool>();
  if (corners.scalar_type() == at::kDouble) {
    remove_overlapped<double>(corners, iou_threshold, ranking, out);
  } else {
    remove_overlapped<float>(corners, iou_threshold, ranking, out);
  }
  return {rows, survives};
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) { m.impl("fast_nms", instseg::fast_nms_cpu); }

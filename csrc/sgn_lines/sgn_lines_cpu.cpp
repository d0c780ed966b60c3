// Lines of SGN on the CPU: cut out of rows by their breakpoints, then grouped by their links.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "common.h"
#include "sgn_lines/arguments.h"

namespace instseg {
namespace {

constexpr int64_t kNone = -1;
constexpr uint8_t kStart = 2, kEnd = 3;
constexpr int64_t kPixelsPerTask = 1 << 15;

enum Code : uint8_t { kOutside, kGoesOn, kBegins };

// Whether a line ends between two neighbours of a row.  No branches, so that rows are compared at
// once.
template <bool kWidened>
INSTSEG_INLINE bool separated(uint8_t left, uint8_t right) {
  if (kWidened) return ((left == kEnd) & (right != kEnd)) | ((right == kStart) & (left != kStart));
  return (left == kEnd) | (right == kStart);
}

// Codes the pixels of a row by what they are to lines; returns how many lines begin.
template <bool kWidened>
INSTSEG_INLINE int64_t code_pixels(int64_t width, const uint8_t* labels, const int64_t* classes,
                                   uint8_t* codes) {
  codes[0] = classes[0] > 0 ? kBegins : kOutside;
  for (int64_t x = 1; x < width; ++x) {
    const bool inside = classes[x] > 0;
    const bool cut = (classes[x - 1] != classes[x]) | separated<kWidened>(labels[x - 1], labels[x]);
    codes[x] = static_cast<uint8_t>(inside + (inside & cut));
  }
  int64_t count = 0;
  for (int64_t x = 0; x < width; ++x) count += codes[x] == kBegins;
  return count;
}

INSTSEG_SIMD int64_t code_row(int64_t width, const uint8_t* labels, const int64_t* classes,
                              bool widened, uint8_t* codes) {
  return widened ? code_pixels<true>(width, labels, classes, codes)
                 : code_pixels<false>(width, labels, classes, codes);
}

// Numbers the lines of a row from `first` on.
void number_row(int64_t width, const uint8_t* codes, int64_t first, int64_t* lines) {
  int64_t number = first - 1;
  for (int64_t x = 0; x < width; ++x) {
    number += codes[x] == kBegins;
    lines[x] = codes[x] == kOutside ? kNone : number;
  }
}

at::Tensor decode_lines_cpu(const at::Tensor& labels, const at::Tensor& semantic, bool widened) {
  check_decode_lines(labels, semantic);
  const int64_t height = labels.size(0), width = labels.size(1);
  auto result = at::empty(labels.sizes(), semantic.options());
  if (result.numel() == 0) return result;
  const auto label_rows = labels.contiguous(), class_rows = semantic.contiguous();
  const auto* label = label_rows.const_data_ptr<uint8_t>();
  const auto* kind = class_rows.const_data_ptr<int64_t>();
  auto* lines = result.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, kPixelsPerTask / width);
  std::vector<uint8_t> codes(result.numel());
  // The number of the first line of each row, once summed up.
  std::vector<int64_t> first(height + 1, 0);
  at::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      first[y + 1] =
          code_row(width, label + y * width, kind + y * width, widened, codes.data() + y * width);
  });
  std::partial_sum(first.begin(), first.end(), first.begin());
  at::parallel_for(0, height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y)
      number_row(width, codes.data() + y * width, first[y], lines + y * width);
  });
  return result;
}

// Sets of lines; the smaller of two that join is renamed, so that n lines cost n log n steps.
class Groups {
 public:
  Groups(int64_t count, const bool* touches) : touches_(touches), group_(count), members_(count) {
    std::iota(group_.begin(), group_.end(), 0);
    for (int64_t i = 0; i < count; ++i) members_[i] = {i};
  }

  int64_t group(int64_t line) const { return group_[line]; }

  // Joins the groups of two lines unless lines that touch in a row would come together.
  void join(int64_t first, int64_t second) {
    int64_t kept = group_[first], gone = group_[second];
    if (kept == gone) return;
    if (members_[kept].size() < members_[gone].size()) std::swap(kept, gone);
    for (const int64_t line : members_[gone])
      if (touches(line, kept)) return;
    for (const int64_t line : members_[gone]) group_[line] = kept;
    members_[kept].insert(members_[kept].end(), members_[gone].begin(), members_[gone].end());
    members_[gone] = {};
  }

 private:
  // Whether a neighbour of `line` across a breakpoint is in `group`.
  bool touches(int64_t line, int64_t group) const {
    const bool after = touches_[line] && group_[line + 1] == group;
    const bool before = line > 0 && touches_[line - 1] && group_[line - 1] == group;
    return before || after;
  }

  const bool* touches_;
  std::vector<int64_t> group_;
  std::vector<std::vector<int64_t>> members_;
};

at::Tensor group_lines_cpu(const at::Tensor& pairs, const at::Tensor& touches) {
  check_group_lines(pairs, touches);
  const auto rows = pairs.contiguous(), flags = touches.contiguous();
  const int64_t count = touches.size(0);
  const auto* line = rows.const_data_ptr<int64_t>();
  const auto* flag = flags.const_data_ptr<bool>();
  check_touches(flag, count);
  Groups groups(count, flag);
  for (int64_t i = 0; i < rows.size(0); ++i) {
    const int64_t first = line[2 * i], second = line[2 * i + 1];
    check_pair(i, first, second, count);
    groups.join(first, second);
  }
  auto result = at::empty({count}, pairs.options());
  auto* component = result.mutable_data_ptr<int64_t>();
  std::vector<int64_t> names(count, kNone);
  int64_t named = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t& name = names[groups.group(i)];
    if (name == kNone) name = named++;
    component[i] = name;
  }
  return result;
}

}  // namespace
}  // namespace instseg

TORCH_LIBRARY_IMPL(instseg, CPU, m) {
  m.impl("decode_lines", instseg::decode_lines_cpu);
  m.impl("group_lines", instseg::group_lines_cpu);
}

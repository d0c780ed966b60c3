// The FCIS head on a GPU; the arithmetic and its order are those of the CPU.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "cuda_common.cuh"
#include "fcis_head/arguments.h"
#include "fcis_head/fcis_head.h"
#include "psroi_pool/bin_table.cuh"

namespace instseg {
namespace {

constexpr const char* kOp = "fcis_head";
constexpr int kFinishThreads = 128;

struct Sizes {
  int64_t images, height, width, rois, classes, group, pooled;

  Sizes(const at::Tensor& maps, const at::Tensor& rows, int64_t group_size, int64_t pooled_size)
      : images(maps.size(0)),
        height(maps.size(2)),
        width(maps.size(3)),
        rois(rows.size(0)),
        classes(maps.size(1) / (2 * group_size * group_size)),
        group(group_size),
        pooled(pooled_size) {}

  INSTSEG_HOST_DEVICE int64_t parts() const { return group * group; }
  INSTSEG_HOST_DEVICE int64_t bins() const { return pooled * pooled; }
  INSTSEG_HOST_DEVICE int64_t class_words() const { return (classes + kWarp - 1) / kWarp; }
  INSTSEG_HOST_DEVICE int64_t cell_stride() const { return parts() * 2 * classes; }
  INSTSEG_HOST_DEVICE int64_t image_stride() const { return height * width * cell_stride(); }
};

// Sums over a bin of the outside and the inside map of one class; `from` is outside at cell (0, 0).
template <typename T, typename A>
__device__ void sum_bin(const T* from, const Bin& bin, const Sizes& sizes, A& outside, A& inside) {
  outside = inside = A(0);
  for (int64_t y = bin.y0; y < bin.y1; ++y) {
    for (int64_t x = bin.x0; x < bin.x1; ++x) {
      const T* cell = from + (y * sizes.width + x) * sizes.cell_stride();
      outside = rounded_sum(outside, static_cast<A>(cell[0]));
      inside = rounded_sum(inside, static_cast<A>(cell[sizes.classes]));
    }
  }
}

// One block for one RoI and slice of the parts, one thread for one class: neighbouring threads read
// neighbouring numbers.  A slice is visited for all RoIs before the next one, because its share of
// one image (some 10 MB) stays in the L2 cache while the maps (76 MB) do not.
template <typename T, typename A>
__global__ void share_kernel(const T* maps, DeviceBins bins, Sizes sizes, A* shares) {
  for (int64_t task = blockIdx.x; task < sizes.rois * count_slices(sizes.parts());
       task += gridDim.x) {
    const int64_t r = task % sizes.rois, slice = task / sizes.rois;
    const int64_t image = bins.images[r];
    const int64_t part_end = image < 0 ? 0 : first_part_of_slice(slice + 1, sizes.parts());
    for (int64_t c = threadIdx.x; c < sizes.classes; c += blockDim.x) {
      A score = 0;
      for (int64_t part = first_part_of_slice(slice, sizes.parts()); part < part_end; ++part) {
        const T* from = maps + image * sizes.image_stride() + part * 2 * sizes.classes + c;
        const BinsOfPart part_bins(part, sizes.group, sizes.pooled);
        for (int64_t py = part_bins.y_begin; py < part_bins.y_end; ++py) {
          for (int64_t px = part_bins.x_begin; px < part_bins.x_end; ++px) {
            const Bin bin = bins.bin(r, py, px);
            const int64_t cells = bin.cells();
            if (cells == 0) continue;
            A outside, inside;
            sum_bin(from, bin, sizes, outside, inside);
            score = rounded_sum(score, rounded_product(larger(outside, inside), A(1) / A(cells)));
          }
        }
      }
      shares[(slice * sizes.rois + r) * sizes.classes + c] = score;
    }
  }
}

// The class 1 .. C - 1 of the highest score, the lowest one on a tie, for all threads of a block of
// kFinishThreads; `best` is shared memory.  A score that is not a number is never higher.
template <typename T>
__device__ int64_t best_class(const T* scores, int64_t classes, int64_t* best) {
  const auto score = [&](int64_t c) { return static_cast<at::opmath_type<T>>(scores[c]); };
  int64_t mine = 1;
  for (int64_t c = 2 + threadIdx.x; c < classes; c += kFinishThreads)
    if (score(c) > score(mine)) mine = c;
  best[threadIdx.x] = mine;
  for (int step = kFinishThreads / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.x >= step) continue;
    const int64_t other = best[threadIdx.x + step], one = best[threadIdx.x];
    if (score(other) > score(one) || (score(other) == score(one) && other < one))
      best[threadIdx.x] = other;
  }
  __syncthreads();
  return best[0];
}

// One block for one RoI: adds the slices, chooses the class if `choose`, and computes its logits.
template <typename T, typename A>
__global__ void finish_kernel(const T* maps, DeviceBins bins, const A* shares, Sizes sizes,
                              bool choose, T* scores, T* logits, int64_t* classes) {
  __shared__ int64_t best[kFinishThreads];
  for (int64_t r = blockIdx.x; r < sizes.rois; r += gridDim.x) {
    T* const own = scores + r * sizes.classes;
    for (int64_t c = threadIdx.x; c < sizes.classes; c += blockDim.x) {
      A total = 0;
      for (int64_t slice = 0; slice < count_slices(sizes.parts()); ++slice) {
        total = rounded_sum(total, shares[(slice * sizes.rois + r) * sizes.classes + c]);
      }
      own[c] = static_cast<T>(total / A(sizes.bins()));
    }
    __syncthreads();
    const int64_t chosen = choose ? best_class(own, sizes.classes, best) : classes[r];
    if (choose && threadIdx.x == 0) classes[r] = chosen;
    const bool none = chosen < 0 || chosen >= sizes.classes || bins.images[r] < 0;
    for (int64_t i = threadIdx.x; i < sizes.bins(); i += blockDim.x) {
      const int64_t py = i / sizes.pooled, px = i % sizes.pooled;
      const Bin bin = bins.bin(r, py, px);
      const int64_t cells = bin.cells();
      const int64_t part = part_of_bin(py, sizes.group, sizes.pooled) * sizes.group +
                           part_of_bin(px, sizes.group, sizes.pooled);
      A outside = 0, inside = 0;
      if (cells > 0 && !none) {
        const T* from =
            maps + bins.images[r] * sizes.image_stride() + part * 2 * sizes.classes + chosen;
        sum_bin(from, bin, sizes, outside, inside);
        outside /= A(cells);
        inside /= A(cells);
      }
      T* const to = logits + r * 2 * sizes.bins() + i;
      to[0] = static_cast<T>(outside);
      to[sizes.bins()] = static_cast<T>(inside);
    }
  }
}

// Backward, first pass: which of both maps wins, a bit for each RoI, bin and class, in words of
// kWarp classes.  One block for one part and RoI; a part is visited for all RoIs before the next
// one, so the maps are read from memory once.
template <typename T, typename A>
__global__ void winner_kernel(const T* maps, DeviceBins bins, Sizes sizes, unsigned* winners) {
  const int64_t words = sizes.class_words();
  for (int64_t task = blockIdx.x; task < sizes.parts() * sizes.rois; task += gridDim.x) {
    const int64_t part = task / sizes.rois, r = task % sizes.rois, image = bins.images[r];
    if (image < 0) continue;
    const BinsOfPart part_bins(part, sizes.group, sizes.pooled);
    for (int64_t word = threadIdx.x / kWarp; word < words; word += blockDim.x / kWarp) {
      const int64_t c = word * kWarp + threadIdx.x % kWarp;
      const T* from = maps + image * sizes.image_stride() + part * 2 * sizes.classes + c;
      for (int64_t py = part_bins.y_begin; py < part_bins.y_end; ++py) {
        for (int64_t px = part_bins.x_begin; px < part_bins.x_end; ++px) {
          A outside = 0, inside = 0;
          if (c < sizes.classes) sum_bin(from, bins.bin(r, py, px), sizes, outside, inside);
          const unsigned bits = __ballot_sync(0xffffffffu, inside_wins(outside, inside));
          if (threadIdx.x % kWarp == 0)
            winners[(r * sizes.bins() + py * sizes.pooled + px) * words + word] = bits;
        }
      }
    }
  }
}

constexpr int kTileCells = 8;  // of a row, which a block of the second pass fills

// Gradients of one class at the cells of a tile.
template <typename A>
struct TileSums {
  A outside[kTileCells], inside[kTileCells];
};

// What the second pass reads.
template <typename T>
struct Upstream {
  const int64_t* classes;
  const T *scores, *logits;
  const unsigned* winners;
};

// Adds those bins of RoI `r` that reach the tile, in their order.
template <typename T, typename A>
__device__ void add_bins(const Upstream<T>& grad, const PartEdges& edges, const BinsOfPart& part,
                         const Sizes& sizes, int64_t r, int64_t c, const Bin& tile,
                         TileSums<A>& sums) {
  const A grad_score = static_cast<A>(grad.scores[r * sizes.classes + c]);
  const bool chosen = grad.classes[r] == c;
  for (int64_t j = 0; j < part.y_end - part.y_begin; ++j) {
    const int y0 = edges.y[j], y1 = edges.y[edges.pitch + j];
    if (tile.y0 < y0 || tile.y0 >= y1) continue;
    for (int64_t i = 0; i < part.x_end - part.x_begin; ++i) {
      const int x0 = edges.x[i], x1 = edges.x[edges.pitch + i];
      if (x0 >= tile.x1 || x1 <= tile.x0 || x0 >= x1) continue;
      const int64_t cells = static_cast<int64_t>(y1 - y0) * (x1 - x0);
      const int64_t bin = (part.y_begin + j) * sizes.pooled + part.x_begin + i;
      const unsigned word =
          grad.winners[(r * sizes.bins() + bin) * sizes.class_words() + c / kWarp];
      const bool wins = (word >> c % kWarp & 1u) != 0;
      const A weight = rounded_product(grad_score, A(1) / A(sizes.bins() * cells));
      A outside = wins ? A(0) : weight, inside = wins ? weight : A(0);
      if (chosen) {
        const T* from = grad.logits + r * 2 * sizes.bins() + bin;
        outside = rounded_sum(outside, static_cast<A>(from[0]) / A(cells));
        inside = rounded_sum(inside, static_cast<A>(from[sizes.bins()]) / A(cells));
      }
#pragma unroll
      for (int t = 0; t < kTileCells; ++t) {
        if (tile.x0 + t < x0 || tile.x0 + t >= x1) continue;
        sums.outside[t] = rounded_sum(sums.outside[t], outside);
        sums.inside[t] = rounded_sum(sums.inside[t], inside);
      }
    }
  }
}

// Backward, second pass: one block for one part and some cells of a row, one thread for one class,
// which sums its two maps of that part in registers in the order of the RoIs: there are no atomic
// additions, and the result is deterministic.  Every number of `out` is written once.
template <typename T, typename A>
__global__ void spread_kernel(DeviceBins bins, Upstream<T> grad, Sizes sizes, T* out) {
  __shared__ TileRois rois;
  const int64_t tiles = (sizes.width + kTileCells - 1) / kTileCells;
  const int64_t rows = sizes.images * sizes.parts() * sizes.height;
  for (int64_t task = blockIdx.x; task < rows * tiles; task += gridDim.x) {
    const int64_t left = task % tiles * kTileCells, y = task / tiles % sizes.height;
    const int64_t part = task / tiles / sizes.height % sizes.parts();
    const int64_t image = task / tiles / sizes.height / sizes.parts();
    const Bin tile{y, y + 1, left, min(left + kTileCells, sizes.width)};
    const BinsOfPart part_bins(part, sizes.group, sizes.pooled);
    for (int64_t first_class = 0; first_class < sizes.classes; first_class += blockDim.x) {
      const int64_t c = first_class + threadIdx.x;
      TileSums<A> sums = {};
      for (int64_t first = 0; first < sizes.rois; first += kListed) {
        const int listed = list_rois(rois, bins, first, sizes.rois, image, part_bins, tile);
        for (int k = 0; k < listed && c < sizes.classes; ++k)
          add_bins<T, A>(grad, edges_of(rois, bins, first, k, part_bins), part_bins, sizes,
                         first + rois.list.items[k], c, tile, sums);
      }
      if (c >= sizes.classes) continue;
      T* to = out + image * sizes.image_stride() + part * 2 * sizes.classes + c;
#pragma unroll
      for (int t = 0; t < kTileCells; ++t) {
        if (left + t >= sizes.width) continue;
        T* const cell = to + (y * sizes.width + left + t) * sizes.cell_stride();
        cell[0] = static_cast<T>(sums.outside[t]);
        cell[sizes.classes] = static_cast<T>(sums.inside[t]);
      }
    }
  }
}

// Threads of a block with one class each: whole warps.
unsigned threads_for(int64_t classes, int64_t most) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((classes + kWarp - 1) / kWarp * kWarp, kWarp, most));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fcis_head_cuda(
    const at::Tensor& maps_any, const at::Tensor& rois, const std::optional<at::Tensor>& classes,
    double spatial_scale, int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, classes ? &*classes : nullptr, spatial_scale,
                       group_size, pooled_size);
  const c10::cuda::CUDAGuard guard(maps_any.device());
  const Sizes sizes(maps_any, rois, group_size, pooled_size);
  at::Tensor scores = at::empty({sizes.rois, sizes.classes}, maps_any.options());
  at::Tensor logits = at::empty({sizes.rois, 2, pooled_size, pooled_size}, maps_any.options());
  at::Tensor chosen = at::empty({sizes.rois}, maps_any.options().dtype(at::kLong));
  if (classes) chosen.copy_(*classes);
  if (sizes.rois == 0) return {scores, logits, chosen};
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t slices = count_slices(sizes.parts());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    constexpr auto type = c10::CppTypeToScalarType<A>::value;
    const at::Tensor rows = rois.to(type).contiguous();
    at::Tensor shares = at::empty({slices, sizes.rois, sizes.classes}, maps.options().dtype(type));
    const scalar_t* in = maps.const_data_ptr<scalar_t>();
    const BinTensors table = tabulate_bins_on_gpu<A>(kOp, rows, sizes.images, sizes.height,
                                                     sizes.width, spatial_scale, pooled_size);
    share_kernel<scalar_t, A>
        <<<blocks_for_tasks(sizes.rois * slices), threads_for(sizes.classes, kThreads), 0,
           stream>>>(in, table.view(), sizes, shares.mutable_data_ptr<A>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    finish_kernel<scalar_t, A><<<blocks_for_tasks(sizes.rois), kFinishThreads, 0, stream>>>(
        in, table.view(), shares.const_data_ptr<A>(), sizes, !classes,
        scores.mutable_data_ptr<scalar_t>(), logits.mutable_data_ptr<scalar_t>(),
        chosen.mutable_data_ptr<int64_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {scores, logits, chosen};
}

at::Tensor fcis_head_backward_cuda(const at::Tensor& grad_scores, const at::Tensor& grad_logits,
                                   const at::Tensor& maps_any, const at::Tensor& rois,
                                   const at::Tensor& classes, double spatial_scale,
                                   int64_t group_size, int64_t pooled_size) {
  check_fcis_arguments(kOp, maps_any, rois, &classes, spatial_scale, group_size, pooled_size);
  check_fcis_gradients(kOp, grad_scores, grad_logits, maps_any, rois, group_size, pooled_size);
  const c10::cuda::CUDAGuard guard(maps_any.device());
  const Sizes sizes(maps_any, rois, group_size, pooled_size);
  const at::Tensor maps = maps_any.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor chosen = classes.contiguous();
  at::Tensor grad = at::empty(maps.sizes(), maps.options(), at::MemoryFormat::ChannelsLast);
  if (grad.numel() == 0) return grad;
  const int64_t tiles = (sizes.width + kTileCells - 1) / kTileCells;
  const unsigned threads = threads_for(sizes.classes, kThreads);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, maps.scalar_type(), kOp, [&] {
    using A = at::opmath_type<scalar_t>;
    const at::Tensor rows = rois.to(c10::CppTypeToScalarType<A>::value).contiguous();
    const BinTensors table = tabulate_bins_on_gpu<A>(kOp, rows, sizes.images, sizes.height,
                                                     sizes.width, spatial_scale, pooled_size);
    const at::Tensor from_scores = grad_scores.to(maps.scalar_type()).contiguous();
    const at::Tensor from_logits = grad_logits.to(maps.scalar_type()).contiguous();
    at::Tensor winners =
        at::empty({sizes.rois, sizes.bins(), sizes.class_words()}, maps.options().dtype(at::kInt));
    auto* const bits = reinterpret_cast<unsigned*>(winners.mutable_data_ptr<int>());
    winner_kernel<scalar_t, A>
        <<<blocks_for_tasks(sizes.parts() * sizes.rois), threads, 0, stream>>>(
            maps.const_data_ptr<scalar_t>(), table.view(), sizes, bits);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    const Upstream<scalar_t> upstream{chosen.const_data_ptr<int64_t>(),
                                      from_scores.const_data_ptr<scalar_t>(),
                                      from_logits.const_data_ptr<scalar_t>(), bits};
    const int64_t tasks = sizes.images * sizes.parts() * sizes.height * tiles;
    spread_kernel<scalar_t, A><<<blocks_for_tasks(tasks), threads, 0, stream>>>(
        table.view(), upstream, sizes, grad.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(instseg, CUDA, m) {
  m.impl("fcis_head", fcis_head_cuda);
  m.impl("fcis_head_backward", fcis_head_backward_cuda);
}

}  // namespace instseg

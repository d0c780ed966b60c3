// The bins of all RoIs, computed once on a GPU, and those that reach a tile of the maps.

#pragma once

#include <ATen/ops/empty.h>

#include <climits>

#include "ordered_list.cuh"
#include "psroi_pool/arguments.h"
#include "psroi_pool/psroi_pool.h"

namespace instseg {

struct DeviceBins {
  const int* images;  // (R,): -1 for a RoI that cannot be used
  const int* edges;   // (R, 4, pooled): y0, y1, x0, x1
  int64_t pooled;

  __device__ Bin bin(int64_t roi, int64_t py, int64_t px) const {
    const int* row = edges + 4 * pooled * roi;
    return {row[py], row[pooled + py], row[2 * pooled + px], row[3 * pooled + px]};
  }
};

template <typename A>
__global__ void tabulate_kernel(const A* rois, int64_t count, int64_t images, int64_t height,
                                int64_t width, A scale, int64_t pooled, int* image_of, int* edges) {
  for (int64_t i = first_item(); i < count * pooled; i += item_step()) {
    const int64_t r = i / pooled, p = i % pooled;
    const Roi<A> roi(rois + kRoiNumbers * r, images, scale, pooled);
    const Bin bin = roi.bin(p, p, height, width);
    int* const row = edges + 4 * pooled * r + p;
    row[0] = static_cast<int>(bin.y0);
    row[pooled] = static_cast<int>(bin.y1);
    row[2 * pooled] = static_cast<int>(bin.x0);
    row[3 * pooled] = static_cast<int>(bin.x1);
    if (p == 0) image_of[r] = roi.usable ? static_cast<int>(roi.image) : -1;
  }
}

// The memory of DeviceBins.
struct BinTensors {
  at::Tensor images, edges;
  int64_t pooled;

  DeviceBins view() const {
    return {images.const_data_ptr<int>(), edges.const_data_ptr<int>(), pooled};
  }
};

// `rois` is (R, 5), contiguous, of type A.
template <typename A>
BinTensors tabulate_bins_on_gpu(const char* op, const at::Tensor& rois, int64_t images,
                                int64_t height, int64_t width, double scale, int64_t pooled) {
  TORCH_CHECK_VALUE(images <= INT_MAX && height <= INT_MAX && width <= INT_MAX, op, ": maps are ",
                    images, " images of ", height, " x ", width, " cells; a GPU takes up to ",
                    INT_MAX, " each");
  const auto options = rois.options().dtype(at::kInt);
  BinTensors table{at::empty({rois.size(0)}, options),
                   at::empty({rois.size(0), 4, pooled}, options), pooled};
  tabulate_kernel<A>
      <<<blocks_for(rois.size(0) * pooled), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
          rois.const_data_ptr<A>(), rois.size(0), images, height, width, static_cast<A>(scale),
          pooled, table.images.mutable_data_ptr<int>(), table.edges.mutable_data_ptr<int>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return table;
}

// The bins, rows and columns, that read one part.
struct BinsOfPart {
  int64_t y_begin, y_end, x_begin, x_end;

  INSTSEG_HOST_DEVICE BinsOfPart(int64_t part, int64_t group, int64_t pooled)
      : y_begin(first_bin_of_part(part / group, group, pooled)),
        y_end(first_bin_of_part(part / group + 1, group, pooled)),
        x_begin(first_bin_of_part(part % group, group, pooled)),
        x_end(first_bin_of_part(part % group + 1, group, pooled)) {}

  INSTSEG_HOST_DEVICE bool none() const { return y_begin == y_end || x_begin == x_end; }
};

constexpr int kHeldBins = 4;  // of a part, per side: those of more bins are read from the table

// The RoIs that reach a tile, and the edges of their bins of one part, in shared memory.
struct TileRois {
  OrderedList list;
  int edges[kListed][4][kHeldBins];
};

// Where the edges of a part's bins are: those of its i-th column begin at x[i], end at x[pitch +
// i].
struct PartEdges {
  const int *y, *x;
  int64_t pitch;
};

__device__ __forceinline__ bool is_held(const BinsOfPart& part) {
  return part.y_end - part.y_begin <= kHeldBins && part.x_end - part.x_begin <= kHeldBins;
}

// Lists the RoIs first .. first + kListed - 1 of an image whose bins of one part reach the cells
// `tile`; returns their number.  See list_items.
__device__ inline int list_rois(TileRois& rois, const DeviceBins& bins, int64_t first,
                                int64_t count, int64_t image, const BinsOfPart& part,
                                const Bin& tile) {
  const int64_t pooled = bins.pooled;
  const int listed = list_items(rois.list, first, count, [&](int64_t r) {
    if (part.none() || bins.images[r] != image) return false;
    const int* row = bins.edges + 4 * pooled * r;
    return row[part.y_begin] < tile.y1 && row[pooled + part.y_end - 1] > tile.y0 &&
           row[2 * pooled + part.x_begin] < tile.x1 && row[3 * pooled + part.x_end - 1] > tile.x0;
  });
  if (!is_held(part)) return listed;
  for (int i = threadIdx.x; i < listed * 4 * kHeldBins; i += blockDim.x) {
    const int k = i / (4 * kHeldBins), side = i / kHeldBins % 4, b = i % kHeldBins;
    const int64_t begin = side < 2 ? part.y_begin : part.x_begin;
    const int64_t end = side < 2 ? part.y_end : part.x_end;
    if (begin + b < end)
      rois.edges[k][side][b] =
          bins.edges[(4 * (first + rois.list.items[k]) + side) * pooled + begin + b];
  }
  __syncthreads();
  return listed;
}

// Edges of the k-th listed RoI.
__device__ __forceinline__ PartEdges edges_of(const TileRois& rois, const DeviceBins& bins,
                                              int64_t first, int k, const BinsOfPart& part) {
  if (is_held(part)) return {rois.edges[k][0], rois.edges[k][2], kHeldBins};
  const int* row = bins.edges + 4 * bins.pooled * (first + rois.list.items[k]);
  return {row + part.y_begin, row + 2 * bins.pooled + part.x_begin, bins.pooled};
}

}  // namespace instseg

// Arithmetic of the FCIS head that its kernels on all devices share.  Channels of the maps are
// ((gy * G + gx) * 2 + t) * C + c: at a cell, a part (gy, gx) owns 2 * C neighbouring numbers,
// first those of outside (t = 0), then those of inside.

#pragma once

#include "psroi_pool/psroi_pool.h"

namespace instseg {

// The scores are summed slice by slice of the parts and the slices then added, whoever computes
// them: the result depends neither on the device nor on the number of threads.
constexpr int64_t kMaxSlices = 8;

INSTSEG_HOST_DEVICE int64_t count_slices(int64_t parts) {
  return parts < kMaxSlices ? parts : kMaxSlices;
}

INSTSEG_HOST_DEVICE int64_t first_part_of_slice(int64_t slice, int64_t parts) {
  return slice * parts / count_slices(parts);
}

// Whether inside wins; outside does on a tie, and a number that is not finite is never hidden.
template <typename T>
INSTSEG_HOST_DEVICE bool inside_wins(T outside, T inside) {
  return (inside > outside) | (inside != inside);
}

template <typename T>
INSTSEG_HOST_DEVICE T larger(T outside, T inside) {
  return inside_wins(outside, inside) ? inside : outside;
}

}  // namespace instseg

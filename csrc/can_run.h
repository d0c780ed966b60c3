#pragma once

namespace instseg {

// Whether the kernels of this build can run on the GPU of that index.
bool can_run_on(int device);

}  // namespace instseg

// Runs the threads of kernels; see scheduler.cpp.

#pragma once

#include <cstdint>

namespace cuda_on_cpu {

struct Dim3 {
  unsigned x, y, z;
  Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// What a thread reads without touching memory on a GPU.
struct Registers {
  Dim3 thread_index, block_index, block_dim, grid_dim;
};
extern Registers registers;
extern int guards;  // CUDAGuards alive

struct Launch {
  const char* kernel;
  Dim3 grid, block;
  int64_t shared;
  bool cooperative = false;
  Launch(const char* name, Dim3 grid_, Dim3 block_, int64_t shared_ = 0, int /*stream*/ = 0)
      : kernel(name), grid(grid_), block(block_), shared(shared_) {}
};

void run(const Launch& shape, void (*call)(void*), void* kernel);
int wait_for_block(const char* file, int line, bool vote);
void wait_for_grid(const char* file, int line);
// The values that the 32 threads of a warp give, once all of them are here.
const uint64_t* exchange(const char* file, int line, uint64_t value);
void* shared_memory(int64_t bytes);
void count_synchronisation();

}  // namespace cuda_on_cpu

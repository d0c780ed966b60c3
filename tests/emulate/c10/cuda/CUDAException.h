// Nothing: cuda_on_cpu.h has what kernels need of it.

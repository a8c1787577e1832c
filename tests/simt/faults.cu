// Kernels that are wrong, one way each: what the runtime must report. They are never compiled for a GPU.
#include <cooperative_groups.h>

#include "cuda/memory.cuh"
#include "toy.h"

namespace toy {
namespace {

namespace cg = cooperative_groups;
using bn_ext::load;
using bn_ext::store;
using bn_ext::Vec;

__global__ void read_past_end(float* x, int64_t n) { x[threadIdx.x] = x[n + threadIdx.x % 4]; }

__global__ void write_before_begin(float* x, int64_t) { x[-1 - static_cast<int>(threadIdx.x)] = 1; }

__global__ void load_past_end(float* x, int64_t n) { x[0] = load<1>(x + n)[0]; }

__global__ void load_misaligned(float* x, int64_t) { x[0] = load<4>(x + 1)[0]; }

__global__ void half_reach_barrier(float* x, int64_t) {
  if (threadIdx.x < 16) __syncthreads();
  x[threadIdx.x] = 0;
}

__global__ void two_barriers(float* x, int64_t) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  x[threadIdx.x] = 0;
}

__global__ void half_a_warp(float* x, int64_t) {
  if (threadIdx.x % 32 < 16) x[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x[threadIdx.x], 1);
}

__global__ void shared_never_written(float* x, int64_t) {
  __shared__ float s[32];
  if (threadIdx.x == 32) s[0] = 1;
  __syncthreads();
  x[threadIdx.x] = s[threadIdx.x % 32];
}

__global__ void dynamic_past_end(float* x, int64_t) { x[0] = bn_ext::dynamic_shared<float>()[64 + threadIdx.x]; }

__global__ void static_past_end(float* x, int64_t n) {
  __shared__ float s[32];
  s[threadIdx.x % 32] = 0;
  x[0] = s[static_cast<int>(n)];
}

__global__ void int_overflow(float* x, int64_t n) { x[0] = static_cast<float>(static_cast<int>(n) * (1 << 30)); }

__global__ void wait_for_nobody(float* x, int64_t) {
  while (bn_ext::ld_acquire(reinterpret_cast<unsigned*>(x)) != 7u) {
  }
}

__global__ void lock_never_free(float* x, int64_t) {
  while (atomicCAS(reinterpret_cast<unsigned*>(x), 7u, 1u) != 7u) {
  }
}

__global__ void grid_barrier_uncooperative(float*, int64_t) { cg::this_grid().sync(); }

__global__ void copy_without_wait(float* x, int64_t) {
  auto* s = bn_ext::dynamic_shared<float>();
  bn_ext::copy_async(s, x);
  bn_ext::copy_async_commit();
  x[threadIdx.x] = s[0];
}

using Kernel = void (*)(float*, int64_t);
constexpr Kernel kKernels[] = {
    read_past_end,
    write_before_begin,
    load_past_end,
    load_misaligned,
    half_reach_barrier,
    two_barriers,
    half_a_warp,
    dynamic_past_end,
    static_past_end,
    int_overflow,
    wait_for_nobody,
    lock_never_free,
    grid_barrier_uncooperative,
    shared_never_written,
    copy_without_wait,
};

}  // namespace

cudaError_t fault(int kind, float* x, int64_t n, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(2);
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 256;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kKernels[kind], x, n);
}

}  // namespace toy

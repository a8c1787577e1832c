// Toy kernels that show the conventions (README.md) and that test_simt_runtime.py and test_cuda_compile.py run.
#include <cooperative_groups.h>

#include "core/welford.h"
#include "cuda/memory.cuh"
#include "toy.h"

namespace toy {
namespace {

namespace cg = cooperative_groups;
using bn_ext::load;
using bn_ext::store;
using bn_ext::Vec;

constexpr int kThreads = 128;

template <typename T>
__device__ T warp_sum(T value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Every thread of the block gets the sum; `scratch` may be reused after the next barrier.
__device__ float block_sum(float value, float* scratch) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();  // the warps' sums are written
  value = 0;
  for (int i = 0; i < kThreads / 32; ++i) value += scratch[i];
  __syncthreads();  // and read
  return value;
}

__device__ bn_ext::Moments<float> from_lane(const bn_ext::Moments<float>& m, int lanes) {
  bn_ext::Moments<float> r;
  r.count = __shfl_down_sync(0xffffffffu, m.count, lanes);
  r.mean_hi = __shfl_down_sync(0xffffffffu, m.mean_hi, lanes);
  r.mean_lo = __shfl_down_sync(0xffffffffu, m.mean_lo, lanes);
  r.m2 = __shfl_down_sync(0xffffffffu, m.m2, lanes);
  return r;
}

// One block a row: Welford in the thread, merges in the warp and in the block.
__global__ void __launch_bounds__(kThreads) moments_kernel(Moments args) {
  __shared__ float count[kThreads / 32], hi[kThreads / 32], lo[kThreads / 32], m2[kThreads / 32];
  bn_ext::Moments<float> m;
  const float* row = args.x + blockIdx.x * args.n;
  for (int64_t i = 4 * threadIdx.x; i < args.n; i += 4 * kThreads) {
    const auto v = load<4>(row + i);
    for (int k = 0; k < 4; ++k) bn_ext::add(&m, v[k]);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const auto other = from_lane(m, lanes);
    if (threadIdx.x % 32 + lanes < 32) m = bn_ext::merge(m, other);
  }
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) {
    count[warp] = m.count;
    hi[warp] = m.mean_hi;
    lo[warp] = m.mean_lo;
    m2[warp] = m.m2;
  }
  __syncthreads();  // the warps' moments are written
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) {
      bn_ext::Moments<float> other;
      other.count = count[i];
      other.mean_hi = hi[i];
      other.mean_lo = lo[i];
      other.m2 = m2[i];
      m = bn_ext::merge(m, other);
    }
    store(args.mean + blockIdx.x, Vec<float, 1>{{m.mean_hi + m.mean_lo}});
    store(args.m2 + blockIdx.x, Vec<float, 1>{{m.m2}});
  }
}

// The last block to arrive re-zeroes the counter and lets the others go: nothing is left for the next launch.
__device__ void arrive_and_wait(unsigned* arrivals) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    // bit 31 flips when all have arrived; the counter below it starts at zero again
    const unsigned last = gridDim.x - 1, before = bn_ext::atom_add_acq_rel(arrivals, 1);
    const unsigned side = before & 0x80000000u;
    if ((before & 0x7fffffffu) == last) {
      bn_ext::st_release(arrivals, side ^ 0x80000000u);
    } else {
      while ((bn_ext::ld_acquire(arrivals) & 0x80000000u) == side) __nanosleep(20);
    }
  }
  __syncthreads();
}

// Reads x once: each block keeps its part in shared memory over the barrier.
__global__ void __launch_bounds__(kThreads) center_kernel(Center args) {
  __shared__ float scratch[kThreads / 32];
  auto* kept = bn_ext::dynamic_shared<Vec<float, 4>>();
  const int64_t groups = args.n / 4;
  float sum = 0;
  int64_t k = threadIdx.x;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < groups; i += gridDim.x * kThreads, k += kThreads) {
    bn_ext::copy_async(&kept[k], args.x + 4 * i);
  }
  bn_ext::copy_async_commit();
  bn_ext::copy_async_wait<0>();  // own copies only are read below: no barrier
  for (int64_t j = threadIdx.x; j < k; j += kThreads) sum += kept[j][0] + kept[j][1] + kept[j][2] + kept[j][3];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) store(args.partial + blockIdx.x, Vec<float, 1>{{sum}});
  if (args.arrivals == nullptr) {
    cg::this_grid().sync();
  } else {
    arrive_and_wait(args.arrivals);
  }
  sum = 0;
  for (unsigned b = threadIdx.x; b < gridDim.x; b += kThreads) sum += bn_ext::load_coherent<1>(args.partial + b)[0];
  const float mean = block_sum(sum, scratch) / static_cast<float>(args.n);
  k = threadIdx.x;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < groups; i += gridDim.x * kThreads, k += kThreads) {
    Vec<float, 4> v = kept[k];
    for (int j = 0; j < 4; ++j) v[j] -= mean;
    store<bn_ext::Cache::kLastUse>(args.y + 4 * i, v);
  }
}

// The same with one cluster as the whole grid: partial sums travel by distributed shared memory.
__global__ void __launch_bounds__(kThreads) cluster_kernel(Center args) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ float scratch[kThreads / 32], total;
  const auto cluster = cg::this_cluster();
  float sum = 0;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < args.n; i += gridDim.x * kThreads) {
    sum += load<1>(args.x + i)[0];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) total = sum;
  cluster.sync();
  sum = 0;
  for (unsigned rank = 0; rank < cluster.num_blocks(); ++rank) sum += *cluster.map_shared_rank(&total, rank);
  cluster.sync();  // no block ends while another reads its shared memory
  const float mean = sum / static_cast<float>(args.n);
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < args.n; i += gridDim.x * kThreads) {
    store(args.y + i, Vec<float, 1>{{load<1, bn_ext::Cache::kLastUse>(args.x + i)[0] - mean}});
  }
#endif
}

__global__ void copy_kernel(Copy args) {
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (i < args.n) store(args.y + i * args.stride, load<1>(args.x + i * args.stride));
}

cudaLaunchConfig_t configure(unsigned blocks, size_t dynamic_bytes, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = dynamic_bytes;
  config.stream = stream;
  return config;
}

}  // namespace

cudaError_t moments(const Moments& args, cudaStream_t stream) {
  const auto config = configure(static_cast<unsigned>(args.rows), 0, stream);
  return cudaLaunchKernelEx(&config, moments_kernel, args);
}

int center_blocks(int64_t n) {
  int device = 0, sms = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  const int64_t wanted = (n / 4 + kThreads - 1) / kThreads;
  return static_cast<int>(wanted < sms ? wanted : sms);
}

cudaError_t center(const Center& args, cudaStream_t stream) {
  const int blocks = center_blocks(args.n);
  const int64_t rounds = (args.n / 4 + int64_t{blocks} * kThreads - 1) / (int64_t{blocks} * kThreads);
  auto config = configure(blocks, rounds * kThreads * 16, stream);
  const auto error = cudaFuncSetAttribute(center_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(config.dynamicSmemBytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  config.attrs = &cooperative;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, center_kernel, args);
}

cudaError_t center_by_clusters(const Center& args, int cluster, cudaStream_t stream) {
  auto config = configure(cluster, 0, stream);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, cluster_kernel, args);
}

cudaError_t copy(const Copy& args, cudaStream_t stream) {
  const auto config = configure(static_cast<unsigned>((args.n + kThreads - 1) / kThreads), 0, stream);
  return cudaLaunchKernelEx(&config, copy_kernel, args);
}

}  // namespace toy

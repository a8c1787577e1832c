// The groups that have a barrier of their own: block, cluster, grid.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

inline unsigned simt_rank(uint3 at, dim3 size) { return (at.z * size.y + at.y) * size.x + at.x; }

class thread_block {
 public:
  static void sync(SIMT_HERE) { simt_block_barrier("thread_block::sync", 0, site); }
  static unsigned thread_rank() { return simt_rank(threadIdx, blockDim); }
  static unsigned num_threads() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned size() { return num_threads(); }
};
inline thread_block this_thread_block() { return {}; }

class cluster_group {
 public:
  static void barrier_arrive(SIMT_HERE) { simt::arrive(simt::Scope::kCluster, "cluster barrier", 0, site); }
  static void barrier_wait(SIMT_HERE) { simt::wait(simt::Scope::kCluster, "cluster barrier", site); }
  static void sync(SIMT_HERE) {
    simt::arrive(simt::Scope::kCluster, "cluster sync", 0, site);
    simt::wait(simt::Scope::kCluster, "cluster sync", site);
  }
  static unsigned block_rank() { return simt::cluster_rank(); }
  static unsigned num_blocks() { return simt::cluster_size(); }
  static unsigned num_threads() { return simt::cluster_size() * thread_block::num_threads(); }
  static unsigned thread_rank() { return block_rank() * thread_block::num_threads() + thread_block::thread_rank(); }
  template <typename T>
  static T* map_shared_rank(T* pointer, unsigned rank) {
    return static_cast<T*>(simt::map_shared(pointer, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

class grid_group {
 public:
  static bool is_valid() { return true; }
  static void sync(SIMT_HERE) {
    simt::arrive(simt::Scope::kGrid, "grid sync", 0, site);
    simt::wait(simt::Scope::kGrid, "grid sync", site);
  }
  static unsigned long long num_blocks() { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long block_rank() {
    return (1ull * blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  }
  static unsigned long long thread_rank() {
    return block_rank() * thread_block::num_threads() + thread_block::thread_rank();
  }
  static unsigned long long num_threads() { return num_blocks() * thread_block::num_threads(); }
  static unsigned long long size() { return num_threads(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

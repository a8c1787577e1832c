// Which elements a thread sees, and how it comes by them: through registers, or through the shared memory in which the
// first rows of a block stay until they are needed again.
#pragma once

#include "plan.h"
#include "types.cuh"

namespace bn_ext {
namespace cuda {

// A thread's place in the plan.
template <int V>
struct Place {
  int64_t tile, split;
  int64_t begin;   // first row
  int64_t vector;  // vector column
  int tx, ty;
  int rows;  // begin, begin + plan.ty, ...
  int tail;  // columns of this thread in the incomplete last row
  bool active;

  __device__ explicit Place(const Plan& p) {
    const int t = static_cast<int>(threadIdx.x);
    tile = blockIdx.x / p.splits;
    split = blockIdx.x % p.splits;
    tx = p.planes ? t / p.ty : t % p.tx;
    ty = p.planes ? t % p.ty : t / p.tx;
    vector = tile * p.tx + tx;
    active = t < p.tx * p.ty && vector < p.vectors;
    const int64_t first = split * p.split_rows, last = min(first + p.split_rows, p.rows);
    begin = first + ty;
    rows = active && begin < last ? static_cast<int>((last - begin + p.ty - 1) / p.ty) : 0;
    const bool holds_tail = active && split == 0 && (last - first) % p.ty == ty;
    tail = holds_tail ? max(0, min(V, p.tail - tx * V)) : 0;
  }
  // Channel of column i, within the tile.
  __device__ int local(const Plan& p, int i) const { return (tx * V + i) / p.span % p.modulo; }
  __device__ int64_t channel(const Plan& p, int i) const { return tile * p.tile_channels + local(p, i); }
};

__device__ inline int tile_channels(const Plan& p, int64_t tile) {
  return static_cast<int>(min(static_cast<int64_t>(p.tile_channels), p.channels - tile * p.tile_channels));
}

// Offsets of a thread's vector, row after row: in the first K inputs, and With so many of the operands behind them, the
// output and the position.
template <int K, int With>
struct Cursor {
  static constexpr int kCount = K + With;
  int64_t inner;
  int64_t offset[kCount];

  static __device__ __forceinline__ const Operand& operand(const Plan& p, int k) {
    return p.operand[k < K ? k : kOutput + (k - K)];
  }
  template <int V>
  __device__ Cursor(const Plan& p, const Place<V>& place, int64_t row) {
    const int64_t outer = row < p.inner ? 0 : row / p.inner, column = place.vector * p.column_step;
    inner = row - outer * p.inner;
    const int64_t slow = column < p.fast ? 0 : column / p.fast, fast = column - slow * p.fast;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Operand& o = operand(p, k);
      offset[k] = outer * o.outer + inner * o.inner + slow * o.slow + fast * o.fast;
    }
  }
  __device__ __forceinline__ int64_t output() const { return offset[K]; }
  __device__ __forceinline__ int64_t position() const { return offset[K + 1]; }
  __device__ __forceinline__ void advance(const Plan& p) {
    inner += p.step_inner;
    const bool carry = inner >= p.inner;
    if (carry) inner -= p.inner;
#pragma unroll
    for (int k = 0; k < kCount; ++k) offset[k] += operand(p, k).step + (carry ? operand(p, k).wrap : 0);
  }
  __device__ __forceinline__ void retreat(const Plan& p) {
    inner -= p.step_inner;
    const bool borrow = inner < 0;
    if (borrow) inner += p.inner;
#pragma unroll
    for (int k = 0; k < kCount; ++k) offset[k] -= operand(p, k).step + (borrow ? operand(p, k).wrap : 0);
  }
};

// What several outputs get at a thread's vector.
template <typename T, int V, int Outputs>
struct Results {
  Vec<T, V> v[Outputs];
};

// A few rows of a thread in registers.
template <typename T, int V, int K, int U>
struct Chunk {
  Vec<T, V> v[U][K];
};

// A thread's slots in the block's shared memory: row, input, thread; nobody else reads them.
template <typename T, int V, int K>
struct Slots {
  Vec<T, V>* base;
  __device__ Vec<T, V>& at(int row, int input) const { return base[(row * K + input) * kThreads + threadIdx.x]; }
};

}  // namespace cuda
}  // namespace bn_ext

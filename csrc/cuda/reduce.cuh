// From the threads' partial results to a channel's: within the block through shared memory, between blocks through
// distributed shared memory or the workspace. Every order is fixed, so results repeat bit by bit.
#pragma once

#include <cooperative_groups.h>

#include "padded.h"
#include "pieces.h"
#include "walk.cuh"

namespace bn_ext {
namespace cuda {

// A channel's partial result: count, mean_hi, mean_lo, M2 in forward; two sums as hi, lo in backward.
template <typename A>
using Partial = Vec<A, 4>;

constexpr unsigned kAllLanes = 0xffffffffu;

// What this block's virtual batch leaves of a channel: worked out late, as registers are short.
template <class Args>
__device__ inline void leave(const PieceArgs<Args>& a, int64_t channel, double first, double second) {
  double* const left = a.left + (a.first + blockIdx.y) * 2 * a.shape.c + channel;
  left[0] = first;
  left[a.shape.c] = second;
}

// Adds up over groups of `lanes` neighbouring lanes; every lane of the group gets the sum.
template <typename A>
__device__ __forceinline__ A group_sum(A value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// hi + lo summed over groups of lanes. The first lane has the result; another's lo may differ in its last bit.
template <typename A>
__device__ __forceinline__ void group_sum_compensated(A* hi, A* lo, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const A other_hi = __shfl_xor_sync(kAllLanes, *hi, step), other_lo = __shfl_xor_sync(kAllLanes, *lo, step);
    add_compensated(hi, lo, other_hi, other_lo);
  }
}

// Merges moments in W. The count is only a weight here: the number of values is the plan's.
template <typename A, typename W>
struct MomentsPool {
  Pool<W> pool;
  __device__ void begin(const Partial<A>& some) { pool.shift = is_finite(some[1]) ? static_cast<W>(some[1]) : W(0); }
  // A first pass over all that is merged moves the shift to the mean: a shift far from it would cost digits of M2.
  __device__ void survey(const Partial<A>& p) {
    pool.count += p[0];
    pool.s1 += p[0] * (p[1] - pool.shift);
  }
  __device__ void center(int lanes) {
    const W shift = pool.shift + group_sum(pool.s1, lanes) / group_sum(pool.count, lanes);
    if (is_finite(shift)) pool.shift = shift;
    pool.count = pool.s1 = 0;
  }
  __device__ void take(const Partial<A>& p) {
    Moments<W> m;
    m.count = p[0];
    m.mean_hi = p[1];
    m.mean_lo = p[2];
    m.m2 = p[3];
    add(&pool, m);
  }
  __device__ void combine(int lanes) {
    pool.count = group_sum(pool.count, lanes);
    pool.s2 = group_sum(pool.s2, lanes);
    group_sum_compensated(&pool.s1, &pool.s1_lo, lanes);
  }
  __device__ Partial<W> result() const {
    const Moments<W> m = moments_of(pool);
    return {{m.count, m.mean_hi, m.mean_lo, m.m2}};
  }
};

// Two sums, each hi + lo. In a W wider than A nothing is left for lo to hold.
template <typename A, typename W>
struct SumsPool {
  Partial<W> sum{{0, 0, 0, 0}};
  __device__ void begin(const Partial<A>&) {}
  __device__ void take(const Partial<A>& p) {
    for (int k = 0; k < 4; k += 2) {
      if constexpr (sizeof(W) > sizeof(A)) {
        sum[k] += static_cast<W>(p[k]) + static_cast<W>(p[k + 1]);
      } else {
        add_compensated(&sum[k], &sum[k + 1], p[k], p[k + 1]);
      }
    }
  }
  __device__ void combine(int lanes) {
    for (int k = 0; k < 4; k += 2) group_sum_compensated(&sum[k], &sum[k + 1], lanes);
  }
  __device__ Partial<W> result() const { return sum; }
};

template <typename A>
__device__ __forceinline__ Partial<A> load_partial(const A* p) {
  if constexpr (sizeof(A) == 4) {
    return load_coherent<4>(p);
  } else {
    const auto a = load_coherent<2>(p), b = load_coherent<2>(p + 2);
    return {{a[0], a[1], b[0], b[1]}};
  }
}
template <typename A>
__device__ __forceinline__ void store_partial(A* p, const Partial<A>& v) {
  if constexpr (sizeof(A) == 4) {
    store(p, v);
  } else {
    store(p, Vec<A, 2>{{v[0], v[1]}});
    store(p + 2, Vec<A, 2>{{v[2], v[3]}});
  }
}

template <typename A, typename W>
__device__ __forceinline__ Partial<A> rounded(const Partial<W>& p) {
  return {{static_cast<A>(p[0]), static_cast<A>(p[1]), static_cast<A>(p[2]), static_cast<A>(p[3])}};
}
// Moments in the wide type, the mean as two of the narrow one; sums likewise.
template <class Op, typename A, typename W>
__device__ __forceinline__ Partial<A> narrowed(const Partial<W>& p) {
  if constexpr (sizeof(A) == sizeof(W)) {
    return rounded<A>(p);
  } else if constexpr (Op::kMoments) {
    Partial<A> r = rounded<A>(p);
    split(p[1], p[2], &r[1], &r[2]);
    return r;
  } else {
    Partial<A> r;
    split(p[0], p[1], &r[0], &r[1]);
    split(p[2], p[3], &r[2], &r[3]);
    return r;
  }
}

// The block's partial results of its channels, from `scratch`: partial i of thread (tx, ty) at [i][ty * tx_size + tx].
template <class Op, int V, typename A>
__device__ void pool_block(const Plan& p, const Partial<A>* scratch, int channels, Partial<A>* results) {
  const int lanes = p.lanes, groups = kThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int columns = p.tx * V / p.modulo / p.span * p.span;  // of one channel
  const int members = columns * p.ty;
  for (int base = 0; base < channels; base += groups) {
    const int j = base + group;
    const auto member = [&](int q) -> const Partial<A>& {
      const int row = q / columns, rest = q % columns;
      const int v = (rest / p.span * p.modulo + j) * p.span + rest % p.span;
      return scratch[v % V * kThreads + row * p.tx + v / V];
    };
    typename Op::template Merge<A, A> pool;
    if constexpr (Op::kMoments) {
      if (j < channels) {
        pool.begin(member(0));
        for (int q = lane; q < members; q += lanes) pool.survey(member(q));
      }
      pool.center(lanes);
    }
    if (j < channels) {
      for (int q = lane; q < members; q += lanes) pool.take(member(q));
    }
    pool.combine(lanes);
    if (j < channels && lane == 0) results[j] = pool.result();
  }
}

}  // namespace cuda
}  // namespace bn_ext

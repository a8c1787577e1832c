// CUDA's keywords, built-in variables and device intrinsics for g++.
//
// __shared__ is thread_local: all such variables of the library then lie in one block of memory, which the scheduler
// poisons for a fresh block and swaps when it goes from one block to another. Dynamic shared memory comes from
// bn_ext::dynamic_shared (csrc/cuda/memory.cuh); `extern __shared__` does not link here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "hooks.h"
#include "vectors.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __maxnreg__(n)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define SIMT_HERE simt::Site site = simt::Site::here()

// ---- barriers ----
inline simt::Votes simt_block_barrier(const char* what, int predicate, simt::Site site) {
  simt::arrive(simt::Scope::kBlock, what, predicate, site);
  return simt::wait(simt::Scope::kBlock, what, site);
}
inline void __syncthreads(SIMT_HERE) { simt_block_barrier("__syncthreads", 0, site); }
inline int __syncthreads_or(int p, SIMT_HERE) { return simt_block_barrier("__syncthreads_or", p, site).any; }
inline int __syncthreads_and(int p, SIMT_HERE) { return simt_block_barrier("__syncthreads_and", p, site).all; }
inline int __syncthreads_count(int p, SIMT_HERE) { return simt_block_barrier("__syncthreads_count", p, site).count; }

// Sequentially consistent memory: a missing fence does not show, but the point where it stands is a scheduling point.
inline void __threadfence() { simt::preempt(); }
inline void __threadfence_block() { simt::preempt(); }
inline void __threadfence_system() { simt::preempt(); }
inline void __nanosleep(unsigned) { simt::preempt(); }
[[noreturn]] inline void __trap() { simt::fail("__trap"); }

// ---- warps ----
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) { simt::ballot("__syncwarp", mask, false, site); }
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
  return simt::ballot("__ballot_sync", mask, p != 0, site);
}
inline int __any_sync(unsigned mask, int p, SIMT_HERE) { return simt::ballot("__any_sync", mask, p != 0, site) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_HERE) { return simt::ballot("__all_sync", mask, p == 0, site) == 0; }
// CUDA promises no convergence, so a lane may find itself alone: here it always does.
inline unsigned __activemask() { return 1u << simt::lane(); }

template <typename T>
T simt_shuffle(const char* what, unsigned mask, T value, int source_lane, simt::Site site) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = simt::exchange(what, mask, bits, source_lane, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
// Lanes are grouped in segments of `width`; a source outside the own segment means the own value.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const int base = simt::lane() & ~(width - 1);
  return simt_shuffle("__shfl_sync", mask, value, base + (source & (width - 1)), site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int own = simt::lane(), at = own - static_cast<int>(delta);
  return simt_shuffle("__shfl_up_sync", mask, value, at < (own & ~(width - 1)) ? own : at, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_HERE) {
  const int own = simt::lane(), at = own + static_cast<int>(delta);
  return simt_shuffle("__shfl_down_sync", mask, value, at > (own | (width - 1)) ? own : at, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  const int own = simt::lane(), at = own ^ lanes;
  return simt_shuffle("__shfl_xor_sync", mask, value, at > (own | (width - 1)) ? own : at, site);
}

// ---- atomics: one thread runs at a time, so plain updates are atomic ----
template <typename T, typename F>
T simt_atomic(T* address, simt::Site site, F update) {
  simt::preempt();
  const T old = *address;
  *address = update(old);
  // An update that changes nothing may be one turn of a waiting loop.
  if (*address == old) {
    simt::poll(address, "atomic", site);
  } else {
    simt::changed();
  }
  return old;
}
#define SIMT_ATOMIC(T, name, result)                                 \
  inline T name(T* p, T v, SIMT_HERE) {                              \
    return simt_atomic(p, site, [=](T old) -> T { return result; }); \
  }
#define SIMT_ATOMIC_INTEGER(T)                                                    \
  SIMT_ATOMIC(T, atomicAdd, old + v)                                              \
  SIMT_ATOMIC(T, atomicSub, old - v)                                              \
  SIMT_ATOMIC(T, atomicExch, (static_cast<void>(old), v))                         \
  SIMT_ATOMIC(T, atomicMax, std::max(old, v))                                     \
  SIMT_ATOMIC(T, atomicMin, std::min(old, v))                                     \
  SIMT_ATOMIC(T, atomicOr, old | v)                                               \
  SIMT_ATOMIC(T, atomicAnd, old& v)                                               \
  inline T atomicCAS(T* p, T compare, T v, SIMT_HERE) {                           \
    return simt_atomic(p, site, [=](T old) { return old == compare ? v : old; }); \
  }
SIMT_ATOMIC_INTEGER(int)
SIMT_ATOMIC_INTEGER(unsigned int)
SIMT_ATOMIC_INTEGER(unsigned long long)
SIMT_ATOMIC(float, atomicAdd, old + v)
SIMT_ATOMIC(double, atomicAdd, old + v)
SIMT_ATOMIC(unsigned int, atomicInc, old >= v ? 0u : old + 1u)
SIMT_ATOMIC(unsigned int, atomicDec, old == 0u || old > v ? v : old - 1u)
#undef SIMT_ATOMIC_INTEGER
#undef SIMT_ATOMIC

// ---- cached loads and stores of values that the traffic counters leave out ----
#define SIMT_LOAD(name) \
  template <typename T> \
  T name(const T* p) {  \
    return *p;          \
  }
#define SIMT_STORE(name) \
  template <typename T>  \
  void name(T* p, T v) { \
    *p = v;              \
  }
SIMT_LOAD(__ldg)
SIMT_LOAD(__ldca)
SIMT_LOAD(__ldcs)
SIMT_LOAD(__ldcg)
SIMT_LOAD(__ldlu)
SIMT_STORE(__stcs)
SIMT_STORE(__stcg)
SIMT_STORE(__stwb)
#undef SIMT_LOAD
#undef SIMT_STORE

// ---- arithmetic ----
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline float rsqrt(float a) { return rsqrtf(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }

#define SIMT_MIN_MAX(T)                            \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
SIMT_MIN_MAX(int)
SIMT_MIN_MAX(unsigned int)
SIMT_MIN_MAX(long)
SIMT_MIN_MAX(unsigned long)
SIMT_MIN_MAX(long long)
SIMT_MIN_MAX(unsigned long long)
#undef SIMT_MIN_MAX
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

#define SIMT_BITS(To, From, name)   \
  inline To name(From v) {          \
    To r;                           \
    std::memcpy(&r, &v, sizeof(r)); \
    return r;                       \
  }
SIMT_BITS(int, float, __float_as_int)
SIMT_BITS(float, int, __int_as_float)
SIMT_BITS(unsigned, float, __float_as_uint)
SIMT_BITS(float, unsigned, __uint_as_float)
SIMT_BITS(long long, double, __double_as_longlong)
SIMT_BITS(double, long long, __longlong_as_double)
#undef SIMT_BITS

// ---- programmatic launches: kernels run one after the other ----
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

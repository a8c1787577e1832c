// How kernels touch memory that other blocks or other kernels see: vector loads and stores with a cache hint, loads and
// adds with acquire and release order, copies into shared memory behind the thread's back, dynamic shared memory.
//
// Tensors are reached only through load, load_coherent, store and copy_async. Under BN_EXT_SIMT (tests/simt: the same
// source compiled by g++) these report every access, so that tests can assert what a kernel reads and writes.
// A pointer given to a helper is aligned to the bytes it moves, and a group of at most 16 bytes moves as one.
#pragma once

#include <cuda_runtime.h>

namespace bn_ext {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
};

// What the caches are told: kDefault  keep; kStreaming  not in the first level, it is read again later and elsewhere;
// kLastUse  evict first, nobody reads it again (for a store: nobody reads it soon).
enum class Cache { kDefault, kStreaming, kLastUse };

#ifdef BN_EXT_SIMT
#define BN_EXT_SITE , simt::Site site = simt::Site::here()
#else
#define BN_EXT_SITE

namespace detail {

template <int Bytes>
struct Word;  // the registers of a vector of that many bytes
template <>
struct Word<16> {
  using Type = uint4;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<1> {
  using Type = unsigned char;
};

__device__ __forceinline__ size_t global_address(const void* p) { return __cvta_generic_to_global(p); }

// Volatile keeps loads behind a grid dependency or a barrier that stands before them.
#define BN_EXT_LOAD(NAME, PTX, ...)                                                                           \
  __device__ __forceinline__ void NAME(const void* p, uint4* r) {                                             \
    asm volatile(PTX ".v4.u32 {%0, %1, %2, %3}, [%4];"                                                        \
                 : "=r"(r->x), "=r"(r->y), "=r"(r->z), "=r"(r->w)                                             \
                 : "l"(global_address(p))__VA_ARGS__);                                                        \
  }                                                                                                           \
  __device__ __forceinline__ void NAME(const void* p, uint2* r) {                                             \
    asm volatile(PTX ".v2.u32 {%0, %1}, [%2];" : "=r"(r->x), "=r"(r->y) : "l"(global_address(p))__VA_ARGS__); \
  }                                                                                                           \
  __device__ __forceinline__ void NAME(const void* p, unsigned int* r) {                                      \
    asm volatile(PTX ".u32 %0, [%1];" : "=r"(*r) : "l"(global_address(p))__VA_ARGS__);                        \
  }                                                                                                           \
  __device__ __forceinline__ void NAME(const void* p, unsigned short* r) {                                    \
    asm volatile(PTX ".u16 %0, [%1];" : "=h"(*r) : "l"(global_address(p))__VA_ARGS__);                        \
  }                                                                                                           \
  __device__ __forceinline__ void NAME(const void* p, unsigned char* r) {                                     \
    unsigned short wide;                                                                                      \
    asm volatile(PTX ".u8 %0, [%1];" : "=h"(wide) : "l"(global_address(p))__VA_ARGS__);                       \
    *r = static_cast<unsigned char>(wide);                                                                    \
  }
#define BN_EXT_STORE(NAME, PTX)                                                                          \
  __device__ __forceinline__ void NAME(void* p, uint4 r) {                                               \
    asm volatile(PTX ".v4.u32 [%4], {%0, %1, %2, %3};" ::"r"(r.x), "r"(r.y), "r"(r.z), "r"(r.w),         \
                 "l"(global_address(p))                                                                  \
                 : "memory");                                                                            \
  }                                                                                                      \
  __device__ __forceinline__ void NAME(void* p, uint2 r) {                                               \
    asm volatile(PTX ".v2.u32 [%2], {%0, %1};" ::"r"(r.x), "r"(r.y), "l"(global_address(p)) : "memory"); \
  }                                                                                                      \
  __device__ __forceinline__ void NAME(void* p, unsigned int r) {                                        \
    asm volatile(PTX ".u32 [%1], %0;" ::"r"(r), "l"(global_address(p)) : "memory");                      \
  }                                                                                                      \
  __device__ __forceinline__ void NAME(void* p, unsigned short r) {                                      \
    asm volatile(PTX ".u16 [%1], %0;" ::"h"(r), "l"(global_address(p)) : "memory");                      \
  }                                                                                                      \
  __device__ __forceinline__ void NAME(void* p, unsigned char r) {                                       \
    const unsigned short wide = r;                                                                       \
    asm volatile(PTX ".u8 [%1], %0;" ::"h"(wide), "l"(global_address(p)) : "memory");                    \
  }

BN_EXT_LOAD(load_default, "ld.global.nc")
BN_EXT_LOAD(load_streaming, "ld.global.nc.L1::no_allocate")
BN_EXT_LOAD(load_last_use, "ld.global.cs.nc")
BN_EXT_LOAD(load_visible, "ld.global", : "memory")
BN_EXT_STORE(store_default, "st.global")
BN_EXT_STORE(store_last_use, "st.global.cs")
#undef BN_EXT_LOAD
#undef BN_EXT_STORE

template <typename To, typename From>
__device__ __forceinline__ To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a bit copy keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace detail
#endif

// N elements of a tensor that nobody writes while this kernel runs (the read-only path of the caches).
template <int N, Cache C = Cache::kDefault, typename T>
__device__ __forceinline__ Vec<T, N> load(const T* p BN_EXT_SITE) {
#ifdef BN_EXT_SIMT
  Vec<T, N> r;
  simt::touch(p, sizeof(r), false, site, C == Cache::kLastUse);
  memcpy(&r, p, sizeof(r));
  return r;
#else
  typename detail::Word<sizeof(T) * N>::Type word;
  if constexpr (C == Cache::kDefault) detail::load_default(p, &word);
  if constexpr (C == Cache::kStreaming) detail::load_streaming(p, &word);
  if constexpr (C == Cache::kLastUse) detail::load_last_use(p, &word);
  return detail::bits_of<Vec<T, N> >(word);
#endif
}

// N elements that this kernel writes too: partial results, read after a barrier or an acquire, and a thread's own
// elements of a tensor that is written in place.
template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_coherent(const T* p BN_EXT_SITE) {
#ifdef BN_EXT_SIMT
  return load<N>(p, site);
#else
  typename detail::Word<sizeof(T) * N>::Type word;
  detail::load_visible(p, &word);
  return detail::bits_of<Vec<T, N> >(word);
#endif
}

template <Cache C = Cache::kDefault, typename T, int N>
__device__ __forceinline__ void store(T* p, const Vec<T, N>& v BN_EXT_SITE) {
#ifdef BN_EXT_SIMT
  simt::touch(p, sizeof(v), true, site, C == Cache::kLastUse);
  memcpy(p, &v, sizeof(v));
#else
  const auto word = detail::bits_of<typename detail::Word<sizeof(T) * N>::Type>(v);
  if constexpr (C == Cache::kDefault) {
    detail::store_default(p, word);
  } else {
    detail::store_last_use(p, word);
  }
#endif
}

// ---- 8 or 16 bytes from global into shared memory without passing through registers (sm_80 and later; else load,
// store) --
template <int Bytes = 16>
__device__ __forceinline__ void copy_async(void* shared, const void* global BN_EXT_SITE) {
#ifdef BN_EXT_SIMT
  simt::copy_async(shared, global, Bytes, site);
#elif __CUDA_ARCH__ >= 800
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const auto from = detail::global_address(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
  }
#else
  detail::load_streaming(global, static_cast<typename detail::Word<Bytes>::Type*>(shared));
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#ifdef BN_EXT_SIMT
  simt::copy_async_commit();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// All but the newest `Left` groups of this thread have arrived; other threads see them after a barrier.
template <int Left>
__device__ __forceinline__ void copy_async_wait() {
#ifdef BN_EXT_SIMT
  simt::copy_async_wait(Left);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
#endif
}

// ---- order between blocks: what was written before a release is seen after an acquire that reads its value ----
__device__ __forceinline__ unsigned ld_acquire(const unsigned* p BN_EXT_SITE) {
#ifdef BN_EXT_SIMT
  simt::poll(p, "ld_acquire", site);
  return *p;
#else
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(detail::global_address(p)) : "memory");
  return v;
#endif
}

__device__ __forceinline__ void st_release(unsigned* p, unsigned v) {
#ifdef BN_EXT_SIMT
  simt::preempt();
  *p = v;
  simt::changed();
#else
  asm volatile("st.release.gpu.global.u32 [%1], %0;" ::"r"(v), "l"(detail::global_address(p)) : "memory");
#endif
}

__device__ __forceinline__ void red_release_add(unsigned* p, unsigned v) {
#ifdef BN_EXT_SIMT
  atomicAdd(p, v);
#else
  asm volatile("red.release.gpu.global.add.u32 [%1], %0;" ::"r"(v), "l"(detail::global_address(p)) : "memory");
#endif
}

// Adds v and returns what was there before; orders both ways.
__device__ __forceinline__ unsigned atom_add_acq_rel(unsigned* p, unsigned v) {
#ifdef BN_EXT_SIMT
  return atomicAdd(p, v);
#else
  unsigned old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%2], %1;"
               : "=r"(old)
               : "r"(v), "l"(detail::global_address(p))
               : "memory");
  return old;
#endif
}

// The block's dynamic shared memory, 16-byte aligned. One type per kernel is not needed: it is the same memory.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef BN_EXT_SIMT
  return static_cast<T*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(16) unsigned char bn_ext_dynamic_shared[];
  return reinterpret_cast<T*>(bn_ext_dynamic_shared);
#endif
}

}  // namespace bn_ext

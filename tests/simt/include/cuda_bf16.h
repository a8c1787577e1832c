// __nv_bfloat16: the upper half of a float; conversions round to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  __nv_bfloat16(float value) {
    const unsigned u = __float_as_uint(value);
    bits = value != value ? 0x7fff : static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __float2bfloat16(float v) { return v; }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return v; }
// Through float rounded to odd, so that the second rounding is the only one.
inline __nv_bfloat16 __double2bfloat16(double v) {
  float f = static_cast<float>(v);
  if (f != v && v == v && !(__float_as_uint(f) & 1u) && std::isfinite(f)) {
    f = __uint_as_float(__float_as_uint(f) + (std::fabs(static_cast<double>(f)) < std::fabs(v) ? 1u : -1u));
  }
  return f;
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {a, b}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {v.x, v.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16_raw{v}; }

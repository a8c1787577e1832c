// __half: IEEE binary16 with gradual underflow; conversions round to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

inline unsigned short simt_half_bits(double value) {
  const uint64_t u = static_cast<uint64_t>(__double_as_longlong(value));
  const unsigned short sign = static_cast<unsigned short>(u >> 48 & 0x8000u);
  const double size = std::fabs(value);
  if (size != size) return 0x7fff;
  if (size >= 65520.0) return static_cast<unsigned short>(sign | 0x7c00u);
  int exponent = 0;
  std::frexp(size, &exponent);
  const int lowest = size == 0 ? -24 : std::max(exponent - 11, -24);  // exponent of the last bit kept
  const unsigned kept = static_cast<unsigned>(std::nearbyint(std::ldexp(size, -lowest)));
  // A normal number's `kept` carries the implicit bit, and a carry out of it moves the exponent up by itself.
  return static_cast<unsigned short>(sign | ((static_cast<unsigned>(lowest + 24) << 10) + kept));
}
inline float simt_half_value(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size =
      std::ldexp(static_cast<float>(exponent == 0 ? fraction : fraction + 1024), exponent < 2 ? -24 : exponent - 25);
  if (exponent == 31) size = fraction == 0 ? HUGE_VALF : NAN;
  return bits & 0x8000 ? -size : size;
}

struct alignas(2) __half {
  unsigned short bits;
  __half() = default;
  __half(__half_raw raw) : bits(raw.x) {}
  __half(float value) : bits(simt_half_bits(value)) {}
  __half(double value) : bits(simt_half_bits(value)) {}
  operator float() const { return simt_half_value(bits); }
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline float __half2float(__half v) { return v; }
inline __half __float2half(float v) { return v; }
inline __half __float2half_rn(float v) { return v; }
inline __half __double2half(double v) { return v; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float a, float b) { return {a, b}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __ushort_as_half(unsigned short v) { return __half_raw{v}; }

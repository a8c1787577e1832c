// CUDA's built-in vector types, with the alignment that 128-bit accesses rely on.
#pragma once

#define SIMT_VECTOR(base, name, align2, align4)                               \
  struct name##1 { base x; };                                                 \
  struct alignas(align2) name##2 { base x, y; };                              \
  struct name##3 { base x, y, z; };                                           \
  struct alignas(align4) name##4 { base x, y, z, w; };                        \
  inline name##1 make_##name##1(base x) { return {x}; }                       \
  inline name##2 make_##name##2(base x, base y) { return {x, y}; }            \
  inline name##3 make_##name##3(base x, base y, base z) { return {x, y, z}; } \
  inline name##4 make_##name##4(base x, base y, base z, base w) { return {x, y, z, w}; }

SIMT_VECTOR(signed char, char, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 2, 4)
SIMT_VECTOR(short, short, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 4, 8)
SIMT_VECTOR(int, int, 8, 16)
SIMT_VECTOR(unsigned int, uint, 8, 16)
SIMT_VECTOR(long long, longlong, 16, 16)
SIMT_VECTOR(unsigned long long, ulonglong, 16, 16)
SIMT_VECTOR(float, float, 8, 16)
SIMT_VECTOR(double, double, 16, 16)
#undef SIMT_VECTOR

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int vx = 1, unsigned int vy = 1, unsigned int vz = 1) : x(vx), y(vy), z(vz) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

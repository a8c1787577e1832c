// Everything that a level's body needs from outside, included before its instruction set is switched on, so that no
// inline function of a system header is ever compiled for an instruction set that the machine may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define BN_EXT_X86 1
#endif

#include "core/activation.h"
#include "core/double_formulas.h"
#include "core/formulas.h"
#include "core/kernels.h"
#include "core/layout.h"

namespace bn_ext {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace cpu {

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }
inline double to_double(bfloat16 value) { return from_bits(uint32_t(value.bits) << 16); }
inline double to_double(float16 value) {
  // Exponent and mantissa moved into place, then scaled by 2^112 to correct the bias; exact for subnormals too.
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const bool special = magnitude >= 0x0f800000;
  const float scaled = special ? from_bits(magnitude | 0x7f800000) : from_bits(magnitude) * 0x1p112f;
  return from_bits(bits_of(scaled) | uint32_t(value.bits & 0x8000) << 16);
}

inline bfloat16 float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float16 float_to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                   // subnormal: the adder rounds at 2^-24
    return {uint16_t(sign | (bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

template <class T>
inline T from_double(double value);
template <>
inline float from_double<float>(double value) {
  return static_cast<float>(value);
}
template <>
inline double from_double<double>(double value) {
  return value;
}
template <>
inline bfloat16 from_double<bfloat16>(double value) {
  return float_to_bfloat16(static_cast<float>(value));
}
template <>
inline float16 from_double<float16>(double value) {
  return float_to_float16(static_cast<float>(value));
}

// A tensor may begin at any byte (a view of a file's or a message's memory), so its elements are read and written by
// these alone.
template <class T>
inline T load_one(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}
template <class T>
inline void store_one(void* p, T value) {
  std::memcpy(p, &value, sizeof value);
}

// Element i of a per-channel vector, whatever its type.
inline double load_element(const VectorRef& v, int64_t i) {
  const char* p = static_cast<const char*>(v.data) + i * v.stride * element_bytes(v.dtype);
  switch (v.dtype) {
    case DType::kFloat64:
      return load_one<double>(p);
    case DType::kBFloat16:
      return to_double(load_one<bfloat16>(p));
    case DType::kFloat16:
      return to_double(load_one<float16>(p));
    default:
      return load_one<float>(p);
  }
}
inline double load_element(const VectorRef& v, int64_t i, double absent) { return v ? load_element(v, i) : absent; }

inline void store_element(const VectorRef& v, int64_t i, double value) {
  char* p = static_cast<char*>(v.data) + i * v.stride * element_bytes(v.dtype);
  switch (v.dtype) {
    case DType::kFloat64:
      return store_one(p, value);
    case DType::kBFloat16:
      return store_one(p, from_double<bfloat16>(value));
    case DType::kFloat16:
      return store_one(p, from_double<float16>(value));
    default:
      return store_one(p, static_cast<float>(value));
  }
}

// Uninitialised memory for a call's intermediate results, aligned for any vector. Small requests share one buffer a
// thread: a small allocation beside the large output makes the C library's next output land on colder memory. At most
// one lives at a time in a thread, as kernels do not call each other.
class Scratch {
 public:
  explicit Scratch(int64_t doubles) {
    if (doubles <= kKept) {
      static thread_local std::unique_ptr<double[]> kept(new double[kKept + 8]);
      data_ = align(kept.get());
    } else {
      own_.reset(new double[doubles + 8]);
      data_ = align(own_.get());
    }
  }
  double* data() const { return data_; }

 private:
  static constexpr int64_t kKept = 16384;
  static double* align(double* p) {
    return reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t(63));
  }
  std::unique_ptr<double[]> own_;
  double* data_;
};

constexpr int64_t kParallelElements = 32768;  // less work than this a thread does not repay waking it

// body(begin, end) over [0, tasks), each task about `elements` elements of a tensor.
template <class Body>
inline void parallel_for(const Parallel& parallel, int64_t tasks, int64_t elements, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kParallelElements / std::max<int64_t>(1, elements));
  if (tasks <= grain || parallel.threads == 1) {
    if (tasks > 0) body(0, tasks);
    return;
  }
  parallel.run(
      tasks, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace cpu
}  // namespace bn_ext

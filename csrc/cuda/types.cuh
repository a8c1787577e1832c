// Element types: what they accumulate in, conversions, per-channel vectors of any floating type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/formulas.h"
#include "core/kernels.h"
#include "memory.cuh"

namespace bn_ext {
namespace cuda {

template <typename T>
struct Accumulate {
  using Type = float;
};
template <>
struct Accumulate<double> {
  using Type = double;
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T, typename A>
__device__ __forceinline__ T narrow(A v) {
  return static_cast<T>(v);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float v) {
  return __float2bfloat16_rn(v);
}

// One value of a per-channel vector; `missing` where the module has none.
__device__ inline double read(const VectorRef& v, int64_t i, double missing) {
  if (!v) return missing;
  const int64_t at = i * v.stride;
  switch (v.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(v.data)[at];
    case DType::kFloat64:
      return static_cast<const double*>(v.data)[at];
    case DType::kBFloat16:
      return widen(static_cast<const __nv_bfloat16*>(v.data)[at]);
    default:
      return widen(static_cast<const __half*>(v.data)[at]);
  }
}

__device__ inline void write(const VectorRef& v, int64_t i, double value) {
  if (!v) return;
  const int64_t at = i * v.stride;
  switch (v.dtype) {
    case DType::kFloat32:
      static_cast<float*>(v.data)[at] = static_cast<float>(value);
      break;
    case DType::kFloat64:
      static_cast<double*>(v.data)[at] = value;
      break;
    case DType::kBFloat16:
      static_cast<__nv_bfloat16*>(v.data)[at] = __double2bfloat16(value);
      break;
    default:
      static_cast<__half*>(v.data)[at] = __double2half(value);
  }
}

// What `write` then `read` would make of it.
__device__ inline double rounded_to(DType dtype, double value) {
  switch (dtype) {
    case DType::kFloat32:
      return static_cast<float>(value);
    case DType::kFloat64:
      return value;
    case DType::kBFloat16:
      return widen(__double2bfloat16(value));
    default:
      return widen(__double2half(value));
  }
}

// 1 / sqrt(var + eps). Float arithmetic is within two units in the last place of a float; double only where the
// variance of float values is beyond float's normal numbers.
template <typename A>
__device__ inline double inverse_std(double variance, double eps) {
  const double v = variance + eps;
  if (sizeof(A) == sizeof(double) || v > 1e37 || v < 1e-37) return 1.0 / sqrt(v);
  return 1.0f / sqrtf(static_cast<float>(v));
}

}  // namespace cuda
}  // namespace bn_ext

// What a kernel sees of a tensor: a plain pointer, sizes and strides (in elements), a type.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace bn_ext {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

BN_HD int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// float64 tensors keep float64 statistics; every other type keeps float32 ones.
BN_HD DType accumulate_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// (N, C, L); an (N, C) tensor has l = 1.
struct Shape {
  int64_t n = 0, c = 0, l = 1;
  BN_HD int64_t count() const { return n * l; }
  BN_HD int64_t numel() const { return n * c * l; }
};

struct TensorRef {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_l = 0;
  BN_HD explicit operator bool() const { return data != nullptr; }
};

// A per-channel vector of any floating type; data == nullptr where the module has none.
struct VectorRef {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 1;
  BN_HD explicit operator bool() const { return data != nullptr; }
};

}  // namespace bn_ext

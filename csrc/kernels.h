// The torch-free interface between glue and kernels: plain pointers, sizes and strides (in elements).
// Kernels trust what they are given; every check is made at the op's entry (ops.cpp).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace bn_ext {

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

BN_HD int element_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// float64 tensors keep float64 statistics; every other type keeps float32 ones.
inline DType accumulate_type(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

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

struct ForwardArgs {
  Shape shape;
  DType dtype;
  TensorRef x, y;
  VectorRef weight, bias, running_mean, running_var;
  int64_t* num_batches_tracked = nullptr;
  bool cumulative = false;  // momentum=None: 1 / num_batches_tracked after this batch
  double momentum = 0;
  double eps = 0;
  void* saved = nullptr;  // (3, C): mean_hi, mean_lo, invstd in accumulate_type(dtype)
};

struct InferenceArgs {
  Shape shape;
  DType dtype;
  TensorRef x, y;
  VectorRef weight, bias, running_mean, running_var;
  double eps = 0;
};

struct BackwardArgs {
  Shape shape;
  DType dtype;
  TensorRef dy, x, dx;  // dx absent: only the reductions are wanted
  VectorRef weight, grad_weight, grad_bias;
  const void* saved = nullptr;          // training: forward's (3, C); evaluation: nullptr
  VectorRef running_mean, running_var;  // evaluation
  double eps = 0;
};

// Derivatives of the gradients above: dx and grad_weight are here what flows on to the input and to the weight, and
// grad_bias is not used.
struct DoubleBackwardArgs : BackwardArgs {
  TensorRef gg_x;                // what arrives at backward's dx; absent: zero
  TensorRef grad_dy;             // what flows on to dy; absent: not wanted
  VectorRef gg_weight, gg_bias;  // what arrives at backward's grad_weight and grad_bias; absent: zero
};

// A parallel loop lent by the glue: body(context, begin, end) over [0, tasks), at least `grain` tasks a thread.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) = nullptr;
};

struct ActivatedForwardArgs;  // activation.h
struct ActivatedInferenceArgs;
struct ActivatedBackwardArgs;

namespace cpu {

struct Kernels {
  void (*forward)(const ForwardArgs&, const Parallel&);
  void (*inference)(const InferenceArgs&, const Parallel&);
  void (*backward)(const BackwardArgs&, const Parallel&);
  void (*double_backward)(const DoubleBackwardArgs&, const Parallel&);
  void (*forward_activated)(const ActivatedForwardArgs&, const Parallel&);
  void (*inference_activated)(const ActivatedInferenceArgs&, const Parallel&);
  void (*backward_activated)(const ActivatedBackwardArgs&, const Parallel&);
};

// The same body compiled once per instruction-set level; a level that this build lacks is nullptr.
const Kernels* kernels_default();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace cpu
}  // namespace bn_ext

// What follows batch norm in the same pass: y = act(bn(x) + residual). Torch-free, as kernels.h.
#pragma once

#include "kernels.h"

namespace bn_ext {

enum class Activation : int { kIdentity, kReLU, kLeakyReLU, kSiLU, kGELU };

// Activations whose derivative depends on the sign of their argument alone.
BN_HD bool by_sign(Activation a) { return a == Activation::kReLU || a == Activation::kLeakyReLU; }

// Where there is a residual and the activation goes by_sign, forward leaves one bit an element in `mask`, set where the
// derivative is 1: backward then reads neither residual nor bn(x). Otherwise backward computes the activation's
// argument anew. The bit of element i of the output's memory is bit i % n of byte i / n, n elements a byte.
struct Epilogue {
  Activation activation = Activation::kIdentity;
  double negative_slope = 0;
  TensorRef residual;
  uint8_t* mask = nullptr;
};

// Elements of a byte: on CUDA those of 16 bytes, which one thread has in its hands, so that no two write one byte.
constexpr int kCpuMaskElements = 8;
BN_HD constexpr int cuda_mask_elements(int element_bytes) { return 16 / element_bytes; }

// Bytes of a mask; the CPU reads bits eight bytes at a time, up to two vectors behind the last.
inline int64_t mask_bytes(int64_t numel, int elements) { return (numel + elements - 1) / elements + 16; }

// Rows of `saved` in these calls: mean_hi, mean_lo, invstd, then formulas.h's Normalise: mean_hi, scale, shift.
constexpr int kSavedRows = 6, kSavedCoefficients = 3;

struct ActivatedForwardArgs : ForwardArgs {
  Epilogue epilogue;
};

struct ActivatedInferenceArgs : InferenceArgs {
  Epilogue epilogue;
  void* saved = nullptr;  // as forward's, for backward; nullptr where there will be none
};

// `saved` is given for both kinds, the running statistics are not. dx.stride_* are the output's even where dx is
// absent; grad_residual has them too.
struct ActivatedBackwardArgs : BackwardArgs {
  Epilogue epilogue;
  bool training = false;
  TensorRef grad_residual;
  // Whether sums over the channels are needed, for the parameters or for training's dx.
  BN_HD bool sums() const { return grad_weight || grad_bias || (training && dx); }
};

// What tells CUDA's backward the activation's derivative: its argument, from x and, as one more input, the residual; or
// forward's mask, which also stands for an identity that needs neither.
enum class Source { kArgument, kSum, kMask };

inline Source source_of(const ActivatedBackwardArgs& a) {
  const bool identity = a.epilogue.activation == Activation::kIdentity;
  if (a.epilogue.mask || (identity && !a.sums())) return Source::kMask;
  return a.epilogue.residual && !identity ? Source::kSum : Source::kArgument;
}

}  // namespace bn_ext

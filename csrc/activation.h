// What follows batch norm in the same pass: y = act(bn(x) + residual). Torch-free, as kernels.h.
#pragma once

#include "kernels.h"

namespace bn_ext {

enum class Activation : int { kIdentity, kReLU, kLeakyReLU, kSiLU, kGELU };

// Activations whose derivative depends on the sign of their argument alone.
BN_HD bool by_sign(Activation a) { return a == Activation::kReLU || a == Activation::kLeakyReLU; }

// Where there is a residual and the activation goes by_sign, the CPU's forward leaves one bit an element in
// `mask`, set where the derivative is 1, at the element's offset in the output: backward then reads neither residual
// nor bn(x). Otherwise backward computes the activation's argument anew.
struct Epilogue {
  Activation activation = Activation::kIdentity;
  double negative_slope = 0;
  TensorRef residual;
  uint8_t* mask = nullptr;
};

// Bytes of a mask; bits are read eight bytes at a time, up to two vectors behind the last.
inline int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8 + 16; }

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
};

}  // namespace bn_ext

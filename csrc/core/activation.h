// What follows batch norm in the same pass: y = act(bn(x) + residual).
#pragma once

#include "tensors.h"

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
  int64_t mask_step = 0;  // bytes from the mask of one virtual batch to that of the next

  BN_HD bool activates() const { return activation != Activation::kIdentity; }
  // Whether anything follows the normalisation.
  BN_HD explicit operator bool() const { return activates() || residual; }
};

// Elements of a byte: on CUDA those of 16 bytes, which one thread has in its hands, so that no two write one byte.
constexpr int kCpuMaskElements = 8;
BN_HD constexpr int cuda_mask_elements(int element_bytes) { return 16 / element_bytes; }

// Bytes of a mask; the CPU reads bits eight bytes at a time, up to two vectors behind the last.
inline int64_t mask_bytes(int64_t numel, int64_t elements) { return (numel + elements - 1) / elements + 16; }
// The same of a virtual batch, aligned as a tensor is; and of up to `batches` of them, with `numel` elements together.
inline int64_t mask_step(int64_t numel, int64_t elements) { return (mask_bytes(numel, elements) + 15) / 16 * 16; }
inline int64_t mask_bytes_cut(int64_t numel, int64_t batches, int64_t elements) {
  return (numel + elements - 1) / elements + 32 * batches;
}

// What tells backward the activation's derivative: its argument, from x (kSign: the argument's sign is enough) and, as
// one more input, the residual; or forward's mask.
enum class Source { kSign, kArgument, kSum, kMask };

inline Source source_of(const Epilogue& e) {
  if (e.mask) return Source::kMask;
  if (e.residual) return Source::kSum;
  return by_sign(e.activation) ? Source::kSign : Source::kArgument;
}

}  // namespace bn_ext

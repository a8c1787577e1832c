// Launches for one element type, each defined in the .cu of that type, so that the types compile side by side.
#pragma once

#include "launch.h"
#include "padded.h"
#include "pieces.h"

namespace bn_ext {
namespace cuda {

enum class PaddedPass : int { kMoments, kSums };

#define BN_EXT_DECLARE_ENTRIES(NAME)                                                                    \
  cudaError_t forward_##NAME(const ForwardArgs&, const Plan&, void*, cudaStream_t);                     \
  cudaError_t backward_##NAME(const BackwardArgs&, const Plan&, void*, cudaStream_t);                   \
  cudaError_t double_backward_##NAME(const DoubleBackwardArgs&, const Plan&, void*, cudaStream_t);      \
  cudaError_t forward_pieces_##NAME(const PieceArgs<ForwardArgs>&, const Plan&, void*, cudaStream_t);   \
  cudaError_t backward_pieces_##NAME(const PieceArgs<BackwardArgs>&, const Plan&, void*, cudaStream_t); \
  cudaError_t padded_##NAME(PaddedPass, const PaddedArgs&, cudaStream_t);

BN_EXT_DECLARE_ENTRIES(float32)
BN_EXT_DECLARE_ENTRIES(float64)
BN_EXT_DECLARE_ENTRIES(bfloat16)
BN_EXT_DECLARE_ENTRIES(float16)
#undef BN_EXT_DECLARE_ENTRIES

template <class Entry>
Entry* of_type(DType dtype, Entry* float32, Entry* float64, Entry* bfloat16, Entry* float16) {
  switch (dtype) {
    case DType::kFloat32:
      return float32;
    case DType::kFloat64:
      return float64;
    case DType::kBFloat16:
      return bfloat16;
    default:
      return float16;
  }
}

}  // namespace cuda
}  // namespace bn_ext

// Launches for one element type, each defined in the .cu of that type, so that the types compile side by side.
#pragma once

#include "launch.h"

namespace bn_ext {
namespace cuda {

#define BN_EXT_DECLARE_ENTRIES(NAME)                                                  \
  cudaError_t forward_##NAME(const ForwardArgs&, const Plan&, void*, cudaStream_t);   \
  cudaError_t backward_##NAME(const BackwardArgs&, const Plan&, void*, cudaStream_t); \
  cudaError_t double_backward_##NAME(const DoubleBackwardArgs&, const Plan&, void*, cudaStream_t);

BN_EXT_DECLARE_ENTRIES(float32)
BN_EXT_DECLARE_ENTRIES(float64)
BN_EXT_DECLARE_ENTRIES(bfloat16)
BN_EXT_DECLARE_ENTRIES(float16)
#undef BN_EXT_DECLARE_ENTRIES

}  // namespace cuda
}  // namespace bn_ext

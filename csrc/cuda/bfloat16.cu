#include "instantiate.cuh"

namespace bn_ext {
namespace cuda {
BN_EXT_DEFINE_ENTRIES(bfloat16, __nv_bfloat16)
}  // namespace cuda
}  // namespace bn_ext

#include "instantiate.cuh"

namespace bn_ext {
namespace cuda {
BN_EXT_DEFINE_ENTRIES(float16, __half)
}  // namespace cuda
}  // namespace bn_ext

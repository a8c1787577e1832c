#include "instantiate.cuh"

namespace bn_ext {
namespace cuda {
BN_EXT_DEFINE_ENTRIES(float32, float)
}  // namespace cuda
}  // namespace bn_ext

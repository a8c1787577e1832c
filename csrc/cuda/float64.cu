#include "instantiate.cuh"

namespace bn_ext {
namespace cuda {
BN_EXT_DEFINE_ENTRIES(float64, double)
}  // namespace cuda
}  // namespace bn_ext

// In the place of cpu/level_avx2.cpp and cpu/level_avx512.cpp where only the default level is built, which is quicker.
#include "core/kernels.h"

namespace bn_ext {
namespace cpu {
const Kernels* kernels_avx2() { return nullptr; }
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace cpu
}  // namespace bn_ext

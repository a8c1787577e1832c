// AVX2 with FMA and F16C; where the compiler or the machine has no such thing, the level is absent.
#include "prelude.h"

#if defined(BN_EXT_X86) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define BN_LEVEL 1
#define BN_VECTOR_BYTES 32
#include "body.h"
#pragma GCC pop_options

namespace bn_ext {
namespace cpu {
const Kernels* kernels_avx2() { return &kKernels; }
}  // namespace cpu
}  // namespace bn_ext
#else
namespace bn_ext {
namespace cpu {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace cpu
}  // namespace bn_ext
#endif

// AVX-512 (F, BW, DQ, VL); where the compiler or the machine has no such thing, the level is absent.
#include "prelude.h"

#if defined(BN_EXT_X86) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#define BN_LEVEL 2
#define BN_VECTOR_BYTES 64
#include "body.h"
#pragma GCC pop_options

namespace bn_ext {
namespace cpu {
const Kernels* kernels_avx512() { return &kKernels; }
}  // namespace cpu
}  // namespace bn_ext
#else
namespace bn_ext {
namespace cpu {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace cpu
}  // namespace bn_ext
#endif

// Baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#include "prelude.h"

#define BN_LEVEL 0
#define BN_VECTOR_BYTES 16
#include "body.h"

namespace bn_ext {
namespace cpu {
const Kernels* kernels_default() { return &kKernels; }
}  // namespace cpu
}  // namespace bn_ext

// The one body of the CPU kernels, included once per instruction-set level between the level's target pragmas.
// The anonymous namespace keeps one level's inline code from standing in for another's.
namespace bn_ext {
namespace cpu {
namespace {
// clang-format off: each file builds on the ones before it
#include "vec.h"
#include "reader.h"
#include "statistics.h"
#include "statistics_float.h"
#include "normalise.h"
#include "activated.h"
#include "activated_gradient.h"
#include "gradient.h"
#include "gradient_float.h"
#include "grad_input.h"
#include "channels.h"
#include "drivers.h"
#include "double_backward.h"
#include "drivers_activated.h"
#include "virtual_batches.h"
#include "entries.h"
// clang-format on

const Kernels kKernels = {forward, backward, double_backward};
}  // namespace
}  // namespace cpu
}  // namespace bn_ext

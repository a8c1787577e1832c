// The one body of the CPU kernels, included once per instruction-set level between the level's target pragmas.
// The anonymous namespace keeps one level's inline code from standing in for another's.
namespace bn_ext {
namespace cpu {
namespace {
// clang-format off: each file builds on the ones before it
#include "cpu/vec.h"
#include "cpu/reader.h"
#include "cpu/statistics.h"
#include "cpu/statistics_float.h"
#include "cpu/normalise.h"
#include "cpu/activated.h"
#include "cpu/activated_gradient.h"
#include "cpu/gradient.h"
#include "cpu/gradient_float.h"
#include "cpu/grad_input.h"
#include "cpu/drivers.h"
#include "cpu/double_backward.h"
#include "cpu/drivers_activated.h"
#include "cpu/entries.h"
// clang-format on

const Kernels kKernels = {forward,           inference,           backward,          double_backward,
                          forward_activated, inference_activated, backward_activated};
}  // namespace
}  // namespace cpu
}  // namespace bn_ext

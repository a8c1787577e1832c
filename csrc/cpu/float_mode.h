// How a thread treats subnormal numbers. torch.set_flush_denormal sets that of the thread that calls it; the threads
// that help it in a parallel loop take it over meanwhile, so that results do not depend on how many there are.
#pragma once

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace bn_ext {
namespace cpu {

#if defined(__x86_64__) || defined(_M_X64)
using FloatControl = uint32_t;
constexpr FloatControl kSubnormalBits = 0x8040;  // of MXCSR: flush results to zero, take inputs for zero
inline FloatControl float_control() { return _mm_getcsr(); }
inline void set_float_control(FloatControl control) { _mm_setcsr(control); }
#elif defined(__aarch64__) && defined(__GNUC__)
using FloatControl = uint64_t;
constexpr FloatControl kSubnormalBits = 1u << 24;  // of FPCR: flush both to zero
inline FloatControl float_control() {
  FloatControl control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
}
inline void set_float_control(FloatControl control) { asm volatile("msr fpcr, %0" : : "r"(control)); }
#else
using FloatControl = uint32_t;
constexpr FloatControl kSubnormalBits = 0;
inline FloatControl float_control() { return 0; }
inline void set_float_control(FloatControl) {}
#endif

// Gives this thread the mode of another one, which had `control`, and its own back at the end.
class FloatModeOf {
 public:
  explicit FloatModeOf(FloatControl control) : own_(float_control()), changed_((own_ ^ control) & kSubnormalBits) {
    if (changed_) set_float_control(own_ ^ changed_);
  }
  ~FloatModeOf() {
    if (changed_) set_float_control(own_);
  }
  FloatModeOf(const FloatModeOf&) = delete;
  FloatModeOf& operator=(const FloatModeOf&) = delete;

 private:
  FloatControl own_, changed_;
};

}  // namespace cpu
}  // namespace bn_ext

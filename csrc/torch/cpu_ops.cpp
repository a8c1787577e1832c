// CPU kernels of the operators: level of instruction set, threads, huge pages.
#include <ATen/Parallel.h>
#include <ATen/Version.h>

#include <cstdint>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "cpu/float_mode.h"
#include "cpu/huge_pages.h"
#include "operators.h"

namespace bn_ext {
namespace cpu {
namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
};

#if defined(__x86_64__) && defined(__GNUC__)
// Not every clang knows it by this name in __builtin_cpu_supports.
bool supports_f16c() {
  unsigned a, b, c = 0, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// torch's own choice, which honours ATEN_CPU_CAPABILITY, so that both run at one level and tests can force it.
Level choose_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  const std::string capability = at::get_cpu_capability();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && kernels_avx512() && capability.rfind("AVX512", 0) == 0) return {"avx512", kernels_avx512()};
  if (avx2 && kernels_avx2() && capability.rfind("AVX", 0) == 0) return {"avx2", kernels_avx2()};
#endif
  return {"default", kernels_default()};
}

const Level& level() {
  static const Level chosen = choose_level();
  return chosen;
}

Parallel parallel() {
  Parallel p;
  p.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  p.run = [](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    const FloatControl control = float_control();
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      const FloatModeOf caller(control);
      body(context, begin, end);
    });
  };
  return p;
}

void advise(const Tensor& t) { advise_huge_pages(t.mutable_data_ptr(), t.nbytes()); }

struct Cpu {
  static constexpr bool kGathers = true;
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static void forward(const Tensor& input, const ForwardCall& call) {
    if (!call.output.is_same(input)) advise(call.output);
    level().kernels->forward(call.args, parallel());
  }
  static void backward(const Tensor&, const BackwardCall& call) {
    if (call.args.dx) advise(call.grad_input);
    if (call.args.grad_residual) advise(call.grad_residual);
    level().kernels->backward(call.args, parallel());
  }
  static void double_backward(const Tensor&, const OptionalTensor&, const Tensor&, const Arriving&,
                              const DoubleBackwardCall& call) {
    if (call.args.grad_dy) advise(call.grad_grad_output);
    if (call.args.dx) advise(call.grad_input);
    level().kernels->double_backward(call.args, parallel());
  }
};

TORCH_LIBRARY_IMPL(bn_ext, CPU, m) { Operators<Cpu>::add_to(m); }

}  // namespace
}  // namespace cpu

const char* isa_level() { return cpu::level().name; }

}  // namespace bn_ext

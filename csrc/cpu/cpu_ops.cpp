// CPU kernels of the operators: level of instruction set, threads, huge pages.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <cstdint>
#include <string>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#endif

#include "cpu/float_mode.h"
#include "cpu/huge_pages.h"
#include "glue_activated.h"

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

std::tuple<Tensor, Tensor> batch_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var,
                                              const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                              double eps) {
  const ForwardCall call =
      prepare_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
  if (!call.empty) {
    advise(call.output);
    level().kernels->forward(call.args, parallel());
  }
  call.count_batch();
  return {call.output, call.saved};
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const Tensor& running_mean, const Tensor& running_var, double eps) {
  const InferenceCall call = prepare_inference(input, weight, bias, running_mean, running_var, eps);
  if (!call.empty) {
    advise(call.output);
    level().kernels->inference(call.args, parallel());
  }
  return call.output;
}

Gradients run_backward(const BackwardCall& call) {
  if (!call.empty) {
    if (call.args.dx) advise(call.grad_input);
    level().kernels->backward(call.args, parallel());
  }
  return call.gradients();
}

Gradients batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  return run_backward(prepare_backward(grad_output, input, weight, saved, output_mask, bias_dtype));
}

Gradients batch_norm_inference_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                        const Tensor& running_mean, const Tensor& running_var, double eps,
                                        std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  return run_backward(
      prepare_inference_backward(grad_output, input, weight, running_mean, running_var, eps, output_mask, bias_dtype));
}

Gradients run_double_backward(const DoubleBackwardCall& call) {
  if (!call.empty) {
    if (call.args.grad_dy) advise(call.grad_grad_output);
    if (call.args.dx) advise(call.grad_input);
    level().kernels->double_backward(call.args, parallel());
  }
  return call.gradients();
}

ActivatedTensors batch_norm_act_forward(const Tensor& input, const OptionalTensor& residual,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                        double eps, std::string_view activation, double negative_slope,
                                        bool save_mask) {
  const auto call =
      prepare_activated_forward(input, residual, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                eps, activation, negative_slope, save_mask);
  if (!call.plain.empty) {
    advise(call.plain.output);
    level().kernels->forward_activated(call.args, parallel());
  }
  call.plain.count_batch();
  return {call.plain.output, call.plain.saved, call.mask};
}

ActivatedTensors batch_norm_act_inference(const Tensor& input, const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& running_mean, const Tensor& running_var, double eps,
                                          std::string_view activation, double negative_slope, bool save) {
  const auto call = prepare_activated_inference(input, residual, weight, bias, running_mean, running_var, eps,
                                                activation, negative_slope, save);
  if (!call.empty) {
    advise(call.output);
    level().kernels->inference_activated(call.args, parallel());
  }
  return {call.output, call.saved, call.mask};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                               double eps, std::string_view activation, double negative_slope) {
  const OptionalTensor mean = running_mean, var = running_var;
  const Tensor output = output_in_place(input, residual, {&weight, &bias, &mean, &var});
  const auto call = prepare_activated_inference(input, residual, weight, bias, running_mean, running_var, eps,
                                                activation, negative_slope, false, output);
  if (!call.empty) level().kernels->inference_activated(call.args, parallel());
  if (!call.output.is_same(input)) input.copy_(call.output);
}

ActivatedGradients batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& residual, const Tensor& mask,
                                           const OptionalTensor& weight, const Tensor& saved, bool training,
                                           std::string_view activation, double negative_slope,
                                           std::array<bool, 4> output_mask, OptionalType bias_dtype) {
  const auto call = prepare_activated_backward(grad_output, input, residual, mask, weight, saved, training, activation,
                                               negative_slope, output_mask, bias_dtype);
  if (!call.plain.empty) {
    if (call.args.dx) advise(call.plain.grad_input);
    if (call.args.grad_residual) advise(call.grad_residual);
    level().kernels->backward_activated(call.args, parallel());
  }
  return call.gradients();
}

Gradients batch_norm_double_backward(const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
                                     const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                     const Tensor& input, const OptionalTensor& weight, const Tensor& saved,
                                     std::array<bool, 3> output_mask) {
  return run_double_backward(prepare_double_backward({grad_grad_input, grad_grad_weight, grad_grad_bias}, grad_output,
                                                     input, weight, saved, output_mask));
}

Gradients batch_norm_inference_double_backward(const OptionalTensor& grad_grad_input,
                                               const OptionalTensor& grad_grad_weight,
                                               const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                               const Tensor& input, const OptionalTensor& weight,
                                               const Tensor& running_mean, const Tensor& running_var, double eps,
                                               std::array<bool, 3> output_mask) {
  return run_double_backward(prepare_inference_double_backward({grad_grad_input, grad_grad_weight, grad_grad_bias},
                                                               grad_output, input, weight, running_mean, running_var,
                                                               eps, output_mask));
}

TORCH_LIBRARY_IMPL(bn_ext, CPU, m) {
  m.impl("batch_norm_forward", batch_norm_forward);
  m.impl("batch_norm_inference", batch_norm_inference);
  m.impl("batch_norm_backward", batch_norm_backward);
  m.impl("batch_norm_inference_backward", batch_norm_inference_backward);
  m.impl("batch_norm_double_backward", batch_norm_double_backward);
  m.impl("batch_norm_inference_double_backward", batch_norm_inference_double_backward);
  m.impl("batch_norm_act_forward", batch_norm_act_forward);
  m.impl("batch_norm_act_inference", batch_norm_act_inference);
  m.impl("batch_norm_act_inference_", batch_norm_act_inference_);
  m.impl("batch_norm_act_backward", batch_norm_act_backward);
}

}  // namespace
}  // namespace cpu

const char* isa_level() { return cpu::level().name; }

}  // namespace bn_ext

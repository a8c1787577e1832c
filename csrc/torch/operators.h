// The operators of ops.cpp in C++: their signatures, calls of them through the dispatcher, and, for a device, their
// bodies around its kernels.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"

namespace bn_ext {

namespace schema {
using BatchNorm = Tensor(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                         double eps, const OptionalTensor& residual, std::string_view activation, double slope,
                         int64_t virtual_batch_size);
using Forward = Forwarded(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                          const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual,
                          std::string_view activation, double slope, const OptionalTensor& moments,
                          int64_t virtual_batch_size);
using Inference = Tensor(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps,
                         const OptionalTensor& residual, std::string_view activation, double slope);
using InPlace = void(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& running_mean, const Tensor& running_var, double eps, const OptionalTensor& residual,
                     std::string_view activation, double slope);
using Backward = Gradients(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                           const Tensor& saved, bool training, std::array<bool, 4> output_mask, OptionalType bias_dtype,
                           const OptionalTensor& residual, const OptionalTensor& mask, std::string_view activation,
                           double slope, const OptionalTensor& sums, int64_t virtual_batch_size);
using DoubleBackward = ThreeTensors(const OptionalTensor& gg_input, const OptionalTensor& gg_weight,
                                    const OptionalTensor& gg_bias, const Tensor& grad_output, const Tensor& input,
                                    const OptionalTensor& weight, const Tensor& saved, bool training,
                                    std::array<bool, 3> output_mask);
}  // namespace schema

// An operator through the dispatcher, so that every device and every mode that listens to operators is reached.
template <class Schema>
c10::TypedOperatorHandle<Schema> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// `Device` runs checked calls that are not empty: forward, backward and double_backward; a Device::Guard of the input
// lives as long as an operator runs.
template <class Device>
struct Operators {
  using Guard = typename Device::Guard;

  static Forwarded forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                           const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual,
                           std::string_view activation, double slope, const OptionalTensor& moments,
                           int64_t virtual_batch_size) {
    const Guard guard(input);
    if (virtual_batch_size > 0 && input.defined() && !samples_lie_apart(input)) {
      auto results = forward(input.contiguous(), weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                             eps, mean, var, dense(residual), activation, slope, moments, virtual_batch_size);
      std::get<0>(results) = at::empty_like(input).copy_(std::get<0>(results));
      return results;
    }
    const After after{residual, activation, slope};
    ForwardCall call;
    if (has(mean) || has(var)) {
      TORCH_CHECK(!has(running_mean) && !has(running_var) && !has(num_batches_tracked),
                  "with mean and var given there are no running statistics to move");
      TORCH_CHECK(!has(moments), "statistics are either mean and var or those of moments");
      TORCH_CHECK(virtual_batch_size == 0, "with mean and var given there are no virtual batches");
      call = prepare_evaluation(input, weight, bias, mean.value_or(Tensor()), var.value_or(Tensor()), eps, after, true);
    } else {
      call = prepare_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, after,
                              moments, virtual_batch_size);
    }
    if (!call.empty) Device::forward(input, call);
    call.count_batch();
    return call.results();
  }

  static Tensor moments(const Tensor& input) {
    const Guard guard(input);
    ForwardCall call = prepare_moments(input);
    if (!call.empty) Device::forward(input, call);
    return call.output;
  }

  static Tensor inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const Tensor& running_mean, const Tensor& running_var, double eps,
                          const OptionalTensor& residual, std::string_view activation, double slope) {
    const Guard guard(input);
    ForwardCall call =
        prepare_evaluation(input, weight, bias, running_mean, running_var, eps, {residual, activation, slope}, false);
    if (!call.empty) Device::forward(input, call);
    return call.output;
  }

  static void inference_(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps,
                         const OptionalTensor& residual, std::string_view activation, double slope) {
    const Guard guard(input);
    const OptionalTensor mean = running_mean, var = running_var;
    const Tensor output = output_in_place(input, residual, {&weight, &bias, &mean, &var});
    ForwardCall call = prepare_evaluation(input, weight, bias, running_mean, running_var, eps,
                                          {residual, activation, slope}, false, output);
    if (!call.empty) Device::forward(input, call);
    if (!output.is_same(input)) input.copy_(output);
  }

  static Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                            const Tensor& saved, bool training, std::array<bool, 4> output_mask,
                            OptionalType bias_dtype, const OptionalTensor& residual, const OptionalTensor& mask,
                            std::string_view activation, double slope, const OptionalTensor& sums,
                            int64_t virtual_batch_size) {
    const Guard guard(input);
    if (virtual_batch_size > 0 && input.defined() && !samples_lie_apart(input)) {
      auto results = backward(grad_output, input.contiguous(), weight, saved, training, output_mask, bias_dtype,
                              dense(residual), mask, activation, slope, sums, virtual_batch_size);
      if (output_mask[0]) std::get<0>(results) = at::empty_like(input).copy_(std::get<0>(results));
      if (output_mask[3]) std::get<3>(results) = at::empty_like(input).copy_(std::get<3>(results));
      return results;
    }
    const BackwardCall call = prepare_backward(grad_output, input, weight, saved, training, output_mask, bias_dtype,
                                               mask, {residual, activation, slope}, sums, virtual_batch_size);
    const BackwardArgs& a = call.args;
    if (!call.empty && (a.dx || a.grad_residual || a.sums())) Device::backward(input, call);
    return call.gradients();
  }

  static Tensor gradient_sums(const Tensor& grad_output, const Tensor& input, const Tensor& saved,
                              const OptionalTensor& residual, const OptionalTensor& mask, std::string_view activation,
                              double slope) {
    const Guard guard(input);
    const BackwardCall call = prepare_sums(grad_output, input, saved, mask, {residual, activation, slope});
    if (!call.empty) Device::backward(input, call);
    return call.sums;
  }

  static ThreeTensors double_backward(const OptionalTensor& gg_input, const OptionalTensor& gg_weight,
                                      const OptionalTensor& gg_bias, const Tensor& grad_output, const Tensor& input,
                                      const OptionalTensor& weight, const Tensor& saved, bool training,
                                      std::array<bool, 3> output_mask) {
    const Guard guard(input);
    const Arriving arriving{gg_input, gg_weight, gg_bias};
    const DoubleBackwardCall call =
        prepare_double_backward(arriving, grad_output, input, weight, saved, training, output_mask);
    const DoubleBackwardArgs& a = call.args;
    if (!call.empty && (a.grad_dy || a.dx || a.grad_weight))
      Device::double_backward(input, weight, saved, arriving, call);
    return call.gradients();
  }

  static OptionalTensor dense(const OptionalTensor& t) { return has(t) ? OptionalTensor(t->contiguous()) : t; }

  static void add_to(torch::Library& m) {
    m.impl("batch_norm_forward", forward);
    m.impl("batch_norm_moments", moments);
    m.impl("batch_norm_inference", inference);
    m.impl("batch_norm_inference_", inference_);
    m.impl("batch_norm_backward", backward);
    m.impl("batch_norm_gradient_sums", gradient_sums);
    m.impl("batch_norm_double_backward", double_backward);
  }
};

}  // namespace bn_ext

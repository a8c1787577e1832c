// The operators of ops.cpp in C++: their signatures, calls of them through the dispatcher, and, for a device, their
// bodies around its kernels.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "checks.h"
#include "padding.h"

namespace bn_ext {

namespace schema {
using BatchNorm = Tensor(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& running_mean, const OptionalTensor& running_var,
                         const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                         double eps, const OptionalTensor& residual, std::string_view activation, double slope,
                         int64_t virtual_batch_size, const OptionalTensor& valid, bool allow_single_value,
                         OptionalNumbers renorm);
using Forward = Forwarded(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& running_mean, const OptionalTensor& running_var,
                          const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                          const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual,
                          std::string_view activation, double slope, const OptionalTensor& moments,
                          int64_t virtual_batch_size, const OptionalTensor& valid, OptionalNumbers renorm);
using Inference = Tensor(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps,
                         const OptionalTensor& residual, std::string_view activation, double slope,
                         const OptionalTensor& valid);
using InPlace = void(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& running_mean, const Tensor& running_var, double eps, const OptionalTensor& residual,
                     std::string_view activation, double slope, const OptionalTensor& valid);
using Backward = Gradients(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                           const Tensor& saved, bool training, std::array<bool, 4> output_mask, OptionalType bias_dtype,
                           const OptionalTensor& residual, const OptionalTensor& mask, std::string_view activation,
                           double slope, const OptionalTensor& sums, int64_t virtual_batch_size,
                           const OptionalTensor& valid, bool renorm);
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
// lives as long as an operator runs. Device::kGathers: whether what counts of a padded batch is better taken out first.
template <class Device>
struct Operators {
  using Guard = typename Device::Guard;

  static Forwarded forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                           const OptionalTensor& mean, const OptionalTensor& var, const OptionalTensor& residual,
                           std::string_view activation, double slope, const OptionalTensor& moments,
                           int64_t virtual_batch_size, const OptionalTensor& valid, OptionalNumbers renorm) {
    const Guard guard(input);
    if (virtual_batch_size > 0 && input.defined() && !samples_lie_apart(input)) {
      auto results =
          forward(input.contiguous(), weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, mean,
                  var, dense(residual), activation, slope, moments, virtual_batch_size, valid, renorm);
      std::get<0>(results) = at::empty_like(input).copy_(std::get<0>(results));
      return results;
    }
    if (gathered(valid, input, virtual_batch_size, residual, activation)) {
      const Tensor places = places_of(*valid, input);
      auto results =
          forward(line_at(input, places), weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                  mean, var, line(residual, places), activation, slope, moments, 0, {}, renorm);
      std::get<0>(results) = line_put(std::get<0>(results), places, input);
      return results;
    }
    const After after{residual, activation, slope};
    ForwardCall call;
    if (has(mean) || has(var)) {
      TORCH_CHECK(!has(running_mean) && !has(running_var) && !has(num_batches_tracked),
                  "with mean and var given there are no running statistics to move");
      TORCH_CHECK(!has(moments), "statistics are either mean and var or those of moments");
      TORCH_CHECK(virtual_batch_size == 0, "with mean and var given there are no virtual batches");
      TORCH_CHECK(!renorm.has_value(), "with mean and var given nothing is renormalised");
      call = prepare_evaluation(input, weight, bias, mean.value_or(Tensor()), var.value_or(Tensor()), eps, after, true,
                                valid);
    } else {
      call = prepare_training(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, after,
                              moments, virtual_batch_size, valid, renorm);
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
                          const OptionalTensor& residual, std::string_view activation, double slope,
                          const OptionalTensor& valid) {
    const Guard guard(input);
    if (gathered(valid, input, 0, residual, activation)) {
      const Tensor places = places_of(*valid, input);
      const Tensor output = inference(line_at(input, places), weight, bias, running_mean, running_var, eps,
                                      line(residual, places), activation, slope, {});
      return line_put(output, places, input);
    }
    ForwardCall call = prepare_evaluation(input, weight, bias, running_mean, running_var, eps,
                                          {residual, activation, slope}, false, valid);
    if (!call.empty) Device::forward(input, call);
    return call.output;
  }

  static void inference_(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const Tensor& running_mean, const Tensor& running_var, double eps,
                         const OptionalTensor& residual, std::string_view activation, double slope,
                         const OptionalTensor& valid) {
    const Guard guard(input);
    const OptionalTensor mean = running_mean, var = running_var;
    const Tensor output = output_in_place(input, residual, {&weight, &bias, &mean, &var});
    ForwardCall call = prepare_evaluation(input, weight, bias, running_mean, running_var, eps,
                                          {residual, activation, slope}, false, valid, output);
    if (!call.empty) Device::forward(input, call);
    if (!output.is_same(input)) input.copy_(output);
  }

  static Gradients backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                            const Tensor& saved, bool training, std::array<bool, 4> output_mask,
                            OptionalType bias_dtype, const OptionalTensor& residual, const OptionalTensor& mask,
                            std::string_view activation, double slope, const OptionalTensor& sums,
                            int64_t virtual_batch_size, const OptionalTensor& valid, bool renorm) {
    const Guard guard(input);
    if (virtual_batch_size > 0 && input.defined() && !samples_lie_apart(input)) {
      auto results = backward(grad_output, input.contiguous(), weight, saved, training, output_mask, bias_dtype,
                              dense(residual), mask, activation, slope, sums, virtual_batch_size, valid, renorm);
      if (output_mask[0]) std::get<0>(results) = at::empty_like(input).copy_(std::get<0>(results));
      if (output_mask[3]) std::get<3>(results) = at::empty_like(input).copy_(std::get<3>(results));
      return results;
    }
    const bool masked = has(mask) && mask->numel() > 0;
    if (!masked && !has(sums) && grad_output.defined() && grad_output.sizes() == input.sizes() &&
        gathered(valid, input, virtual_batch_size, residual, activation)) {
      const Tensor places = places_of(*valid, input);
      auto results =
          backward(line_at(grad_output, places), line_at(input, places), weight, saved, training, output_mask,
                   bias_dtype, line(residual, places), mask, activation, slope, sums, 0, {}, renorm);
      if (output_mask[0]) std::get<0>(results) = line_put(std::get<0>(results), places, input);
      if (output_mask[3]) std::get<3>(results) = line_put(std::get<3>(results), places, input);
      return results;
    }
    const BackwardCall call =
        prepare_backward(grad_output, input, weight, saved, training, output_mask, bias_dtype, mask,
                         {residual, activation, slope}, sums, virtual_batch_size, valid, renorm);
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

  // Not where there is a mask of forward's for backward, which lies as the whole output does.
  static bool gathered(const OptionalTensor& valid, const Tensor& input, int64_t virtual_batch_size,
                       const OptionalTensor& residual, std::string_view activation) {
    if (!has(valid) || !Device::kGathers || virtual_batch_size != 0 || !input.defined() || input.numel() == 0)
      return false;
    if (has(residual) && (by_sign(activation_of(activation)) || residual->sizes() != input.sizes())) return false;
    return is_scattered(*valid, input);
  }
  static OptionalTensor line(const OptionalTensor& t, const Tensor& places) {
    return has(t) ? OptionalTensor(line_at(*t, places)) : t;
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

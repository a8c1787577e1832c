// glue.h's checks and allocations for batch norm with a residual and an activation.
#pragma once

#include <string_view>

#include "activation.h"
#include "glue.h"

namespace bn_ext {

using ActivatedTensors = std::tuple<Tensor, Tensor, Tensor>;            // output, saved, mask
using ActivatedGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, residual, weight, bias

struct ActivatedForwardCall {
  ActivatedForwardArgs args;
  ForwardCall plain;
  Tensor mask;
};
struct ActivatedInferenceCall {
  ActivatedInferenceArgs args;
  Tensor output, saved, mask;
  bool empty = false;
};
struct ActivatedBackwardCall {
  ActivatedBackwardArgs args;
  BackwardCall plain;
  Tensor grad_residual;
  ActivatedGradients gradients() const { return {plain.grad_input, grad_residual, plain.grad_weight, plain.grad_bias}; }
};

// Elements of input's dtype that a byte of a mask holds on its device.
int64_t mask_elements(const Tensor& input);

// "identity", "relu", "leaky_relu", "silu" or "gelu"; anything else is a ValueError.
Activation activation_of(std::string_view name);
// Forward's mask: for this input and a function that goes by a sign, or without elements.
void check_mask(const Tensor& mask, const Tensor& input, Activation activation);

ActivatedForwardCall prepare_activated_forward(const Tensor& input, const OptionalTensor& residual,
                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               const OptionalTensor& num_batches_tracked,
                                               std::optional<double> momentum, double eps, std::string_view activation,
                                               double negative_slope, bool save_mask);

// With `output` that is written, else a new tensor.
ActivatedInferenceCall prepare_activated_inference(const Tensor& input, const OptionalTensor& residual,
                                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const Tensor& running_mean, const Tensor& running_var, double eps,
                                                   std::string_view activation, double negative_slope, bool save,
                                                   const OptionalTensor& output = {});

// residual itself where it lies in memory as output does, aligned for vectors, else a copy that does.
Tensor laid_as(const Tensor& residual, const Tensor& output);

// What an operator that writes into its input should give to the kernels as output: the input where it is dense and
// nothing else that they read lies in its memory, element on element apart, else a new tensor, to be copied. Raises for
// an input whose elements share memory with each other or with parts of residual, as torch's operators in place do.
Tensor output_in_place(const Tensor& input, const OptionalTensor& residual,
                       std::initializer_list<const OptionalTensor*> vectors);

ActivatedBackwardCall prepare_activated_backward(const Tensor& grad_output, const Tensor& input,
                                                 const OptionalTensor& residual, const Tensor& mask,
                                                 const OptionalTensor& weight, const Tensor& saved, bool training,
                                                 std::string_view activation, double negative_slope,
                                                 std::array<bool, 4> output_mask, OptionalType bias_dtype);

}  // namespace bn_ext

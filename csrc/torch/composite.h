// Gradients made of differentiable operations: for derivatives of higher order than the kernels', and for vmap.
#pragma once

#include "checks.h"

namespace bn_ext {

// Batch norm in the type of its statistics. `saved` holds the statistics where not training; where training they are
// those of input, computed anew so that the graph reaches it.
Tensor composite_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& saved, bool training, double eps);

// What batch_norm_backward gives without an activation: of input, weight and bias. What output_mask leaves out has no
// elements.
ThreeTensors composite_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                const OptionalTensor& saved, bool training, double eps, std::array<bool, 3> output_mask,
                                OptionalType bias_dtype);

// What batch_norm_double_backward gives, likewise.
ThreeTensors composite_double_backward(const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
                                       const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                       const Tensor& input, const OptionalTensor& weight, const OptionalTensor& saved,
                                       bool training, double eps, std::array<bool, 3> output_mask);

}  // namespace bn_ext

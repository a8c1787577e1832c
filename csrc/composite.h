// Gradients made of differentiable operations: for derivatives of higher order than the kernels', and for vmap.
#pragma once

#include "glue.h"

namespace bn_ext {

// What batch_norm_backward gives, without running statistics, or batch_norm_inference_backward with them. What
// output_mask leaves out has no elements.
Gradients composite_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                             std::array<bool, 3> output_mask, OptionalType bias_dtype);

// What batch_norm_double_backward and batch_norm_inference_double_backward give, likewise.
Gradients composite_double_backward(const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
                                    const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                    const Tensor& input, const OptionalTensor& weight,
                                    const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                                    std::array<bool, 3> output_mask);

}  // namespace bn_ext

// The operators' schemas. Devices register their kernels beside theirs: cpu/cpu_ops.cpp, cuda/.
#include <torch/library.h>

// Optional inputs are fine with every tracer, optional outputs are not: what output_mask leaves out has no elements.
TORCH_LIBRARY(bn_ext, m) {
  // Differentiable, for eager mode: training forward or inference, and its autograd node (autograd.cpp).
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps) -> Tensor");
  // Gradients, and theirs, made of differentiable operations, for derivatives of higher order.
  m.def(
      "batch_norm_composite_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? running_mean, "
      "Tensor? running_var, float eps, bool[3] output_mask, ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_composite_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor? weight, Tensor? running_mean, "
      "Tensor? running_var, float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  // The kernels of a device. bias_dtype: of the bias's gradient; none: weight's, or that of the statistics.
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps) -> Tensor");
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool[3] output_mask, "
      "ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_inference_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor running_mean, "
      "Tensor running_var, float eps, bool[3] output_mask, ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor)");
  // From the gradients that arrive at the results of a backward (none: zero), those with respect to its grad_output,
  // input and weight.
  m.def(
      "batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_inference_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor? weight, Tensor running_mean, "
      "Tensor running_var, float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // act(batch_norm(input) + residual), in the same way: differentiable, its gradients composed, the kernels. saved is
  // (6, C); mask is for backward's eyes only. activation: identity, relu, leaky_relu, silu or gelu.
  m.def(
      "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "str activation, float negative_slope) -> Tensor");
  m.def(
      "batch_norm_act_composite_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor mask, "
      "Tensor? weight, Tensor? bias, Tensor saved, bool training, float eps, str activation, float negative_slope, "
      "bool[4] output_mask, ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
      "float negative_slope, bool save_mask) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_inference(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, str activation, float negative_slope, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_act_inference_(Tensor(a!) input, Tensor? residual, Tensor? weight, Tensor? bias, "
      "Tensor running_mean, Tensor running_var, float eps, str activation, float negative_slope) -> ()");
  m.def(
      "batch_norm_act_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor mask, Tensor? weight, "
      "Tensor saved, bool training, str activation, float negative_slope, bool[4] output_mask, "
      "ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor, Tensor)");
}

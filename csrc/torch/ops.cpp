// The operators' schemas: one family. Without residual, activation and all that has a default it is plain batch norm.
// Devices register their kernels beside theirs: cpu_ops.cpp, cuda_ops.cpp.
#include <torch/library.h>

// Optional inputs are fine with every tracer, optional outputs are not: what output_mask leaves out has no elements.
// activation: identity, relu, leaky_relu, silu or gelu. saved: core/kernels.h's SavedRow. mask: core/activation.h's,
// for backward's eyes only. moments, sums: float64, rows by core/kernels.h's MomentRow and SumRow. bias_dtype: of the
// bias's gradient; none: weight's, or that of the statistics. virtual_batch_size, in training: each piece of so many
// samples (core/virtual_batch.h) by its own statistics; 0: all together. valid: what counts of a padded batch, integers
// (N,) for input[n, :, :valid[n]], or booleans (N, L), or (N,) of input (N, C); all else is zero in what is returned.
// renorm, in training: (max_r, max_d, warmup_steps, smooth) of core/renorm.h; backward's, that forward had it. One that
// allows a single value a channel takes it as in evaluation, where the host can see it: of sizes, and of valid on the
// CPU.
TORCH_LIBRARY(bn_ext, m) {
  // act(batch_norm(input) + residual), differentiable, for eager mode: forward or inference, and its autograd node
  // (autograd.cpp).
  m.def(
      "batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, Tensor? residual=None, "
      "str activation=\"identity\", float negative_slope=0.01, int virtual_batch_size=0, Tensor? valid=None, "
      "bool allow_single_value=False, float[]? renorm=None) -> Tensor");

  // The kernels of a device. Forward returns the output, saved and a mask. By the batch's statistics, which move the
  // running ones; with mean and var given by those, and nothing moves. By the statistics of a batch of which input is a
  // part with the moments of all its parts given, (parts, 4, C).
  m.def(
      "batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, Tensor? mean=None, "
      "Tensor? var=None, Tensor? residual=None, str activation=\"identity\", float negative_slope=0.01, "
      "Tensor? moments=None, int virtual_batch_size=0, Tensor? valid=None, float[]? renorm=None) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_moments(Tensor input) -> Tensor");
  m.def(
      "batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str activation=\"identity\", float negative_slope=0.01, Tensor? valid=None) "
      "-> Tensor");
  m.def(
      "batch_norm_inference_(Tensor(a!) input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, Tensor? residual=None, str activation=\"identity\", float negative_slope=0.01, Tensor? valid=None) "
      "-> ()");
  // The gradients with respect to input, weight, bias and residual. Of a part of a batch with the sums of all parts
  // given, (parts, 3, C): the gradients of weight and bias are then its own sums, the last one times invstd.
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool training, "
      "bool[4] output_mask, ScalarType? bias_dtype=None, Tensor? residual=None, Tensor? mask=None, "
      "str activation=\"identity\", float negative_slope=0.01, Tensor? sums=None, int virtual_batch_size=0, "
      "Tensor? valid=None, bool renorm=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_gradient_sums(Tensor grad_output, Tensor input, Tensor saved, Tensor? residual=None, "
      "Tensor? mask=None, str activation=\"identity\", float negative_slope=0.01) -> Tensor");
  // From the gradients that arrive at those with respect to input, weight and bias (none: zero), without an activation,
  // the gradients with respect to grad_output, input and weight.
  m.def(
      "batch_norm_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, Tensor? grad_grad_bias, "
      "Tensor grad_output, Tensor input, Tensor? weight, Tensor saved, bool training, bool[3] output_mask) "
      "-> (Tensor, Tensor, Tensor)");

  // The last two without an activation, made of differentiable operations, for derivatives of higher order and for
  // vmap. saved is asked for where not training.
  m.def(
      "batch_norm_composite_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor? saved, bool training, "
      "float eps, bool[3] output_mask, ScalarType? bias_dtype=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_composite_double_backward(Tensor? grad_grad_input, Tensor? grad_grad_weight, "
      "Tensor? grad_grad_bias, Tensor grad_output, Tensor input, Tensor? weight, Tensor? saved, bool training, "
      "float eps, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

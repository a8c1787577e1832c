// The entry of all but torch.func: one operator, one autograd node in C++. A Python autograd.Function costs about 25 us
// more a training step, several times a small batch norm; bn_ext/autograd.py keeps one for torch.func alone.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd_support.h"

namespace bn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardSchema = std::tuple<Tensor, Tensor>(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                                 const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                 std::optional<double>, double);
using InferenceSchema = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                               const Tensor&, double);
using BackwardSchema = Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                 std::array<bool, 3>);
using InferenceBackwardSchema = Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                          const Tensor&, double, std::array<bool, 3>);

const auto& forward_op() {
  static const auto op = handle<ForwardSchema>("bn_ext::batch_norm_forward");
  return op;
}
const auto& inference_op() {
  static const auto op = handle<InferenceSchema>("bn_ext::batch_norm_inference");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<BackwardSchema>("bn_ext::batch_norm_backward");
  return op;
}
const auto& inference_backward_op() {
  static const auto op = handle<InferenceBackwardSchema>("bn_ext::batch_norm_inference_backward");
  return op;
}

// The gradients as compositions of differentiable operations, for derivatives of higher order; formulas.h's formulas.
// Without running statistics those of the input normalise it, computed anew so that the graph reaches the input.
Gradients composite_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var, double eps,
                             std::array<bool, 3> output_mask) {
  const auto dtype = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<int64_t> dims{0}, column{1, -1};
  if (input.dim() == 3) {
    dims.push_back(2);
    column.push_back(1);
  }
  const Tensor x = input.to(dtype), dy = grad_output.to(dtype);
  const bool batch = !has(running_mean);
  const Tensor centred = x - (batch ? x.mean(dims, true) : running_mean->to(dtype).view(column));
  const Tensor variance = batch ? centred.square().mean(dims, true) : running_var->to(dtype).view(column);
  const Tensor invstd = at::rsqrt(variance + eps), normalised = centred * invstd;
  const auto none = [&] { return at::empty({0}, x.options()); };
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    const Tensor scale = has(weight) ? invstd * weight->to(dtype).view(column) : invstd;
    const Tensor projected = batch ? dy - (dy.mean(dims, true) + normalised * (dy * normalised).mean(dims, true)) : dy;
    grad_input = (projected * scale).to(input.scalar_type());
  } else {
    grad_input = none();
  }
  const auto parameter = has(weight) ? weight->scalar_type() : dtype;
  grad_weight = output_mask[1] ? (dy * normalised).sum(dims).to(parameter) : none();
  grad_bias = output_mask[2] ? dy.sum(dims).to(parameter) : none();
  return {grad_input, grad_weight, grad_bias};
}

variable_list as_inputs(const Gradients& g, std::array<bool, 3> mask, size_t inputs) {
  variable_list list(inputs);
  if (mask[0]) list[0] = std::get<0>(g);
  if (mask[1]) list[1] = std::get<1>(g);
  if (mask[2]) list[2] = std::get<2>(g);
  return list;
}

struct Training : torch::autograd::Function<Training> {
  static constexpr bool is_traceable = true;  // its backward is operators alone: compiled autograd may see into it
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                        std::optional<double> momentum, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, saved] =
        forward_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
    ctx->save_for_backward({input, weight.value_or(Tensor()), saved});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask"] = int64_t(input.requires_grad() + 2 * requires_grad(weight) + 4 * requires_grad(bias));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& dy = grad_outputs[0];
    if (!dy.defined()) return variable_list(8);
    const auto saved = ctx->get_saved_variables();
    const int64_t bits = ctx->saved_data["mask"].toInt();
    const std::array<bool, 3> mask{bool(bits & 1), bool(bits & 2), bool(bits & 4)};
    const OptionalTensor weight = optional(saved[1]);
    if (at::GradMode::is_enabled()) {
      const double eps = ctx->saved_data["eps"].toDouble();
      return as_inputs(composite_backward(dy, saved[0], weight, {}, {}, eps, mask), mask, 8);
    }
    return as_inputs(backward_op().call(dy, saved[0], weight, saved[2], mask), mask, 8);
  }
};

struct Inference : torch::autograd::Function<Inference> {
  static constexpr bool is_traceable = true;  // its backward is operators alone: compiled autograd may see into it
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    // Copies: a training step between this forward and its backward may move the running statistics.
    ctx->save_for_backward({input, weight.value_or(Tensor()), running_mean.clone(), running_var.clone()});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask"] = int64_t(input.requires_grad() + 2 * requires_grad(weight) + 4 * requires_grad(bias));
    return inference_op().call(input, weight, bias, running_mean, running_var, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& dy = grad_outputs[0];
    if (!dy.defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const int64_t bits = ctx->saved_data["mask"].toInt();
    const std::array<bool, 3> mask{bool(bits & 1), bool(bits & 2), bool(bits & 4)};
    const OptionalTensor weight = optional(saved[1]);
    const double eps = ctx->saved_data["eps"].toDouble();
    if (at::GradMode::is_enabled()) {
      return as_inputs(composite_backward(dy, saved[0], weight, saved[2], saved[3], eps, mask), mask, 6);
    }
    return as_inputs(inference_backward_op().call(dy, saved[0], weight, saved[2], saved[3], eps, mask), mask, 6);
  }
};

// Below autograd: inference mode, and the calls of the kernels' own devices.
Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                  double eps) {
  if (training) {
    return std::get<0>(
        forward_op().call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps));
  }
  TORCH_CHECK(has(running_mean), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(has(running_var), "running_var must be defined in evaluation mode");
  return inference_op().call(input, weight, bias, *running_mean, *running_var, eps);
}

Tensor batch_norm_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                           double eps) {
  check_no_gradient(running_mean, "running_mean");
  check_no_gradient(running_var, "running_var");
  const bool graph =
      at::GradMode::is_enabled() && (input.requires_grad() || requires_grad(weight) || requires_grad(bias));
  if (graph && training) {
    return Training::apply(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
  }
  if (graph && has(running_mean) && has(running_var)) {
    return Inference::apply(input, weight, bias, *running_mean, *running_var, eps);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeExplicitAutograd, m) { m.impl("batch_norm", batch_norm); }
TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) { m.impl("batch_norm", batch_norm_autograd); }
TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_composite_backward", composite_backward);
}
// vmap over a gradient (jacrev, hessian) goes by the rules of the operations that it is made of.
TORCH_LIBRARY_IMPL(bn_ext, FuncTorchBatchedDecomposition, m) {
  m.impl("batch_norm_composite_backward", composite_backward);
}

}  // namespace
}  // namespace bn_ext

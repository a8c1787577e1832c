// The entry of all but torch.func: one operator, one autograd node in C++. A Python autograd.Function costs about 25 us
// more a training step, several times a small batch norm; bn_ext/autograd.py keeps one for torch.func alone.
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd_support.h"
#include "composite.h"

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
                                 std::array<bool, 3>, OptionalType);
using InferenceBackwardSchema = Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                          const Tensor&, double, std::array<bool, 3>, OptionalType);
using DoubleBackwardSchema = Gradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                       const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                       std::array<bool, 3>);
using InferenceDoubleBackwardSchema = Gradients(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                                const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
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
const auto& double_backward_op() {
  static const auto op = handle<DoubleBackwardSchema>("bn_ext::batch_norm_double_backward");
  return op;
}
const auto& inference_double_backward_op() {
  static const auto op = handle<InferenceDoubleBackwardSchema>("bn_ext::batch_norm_inference_double_backward");
  return op;
}

variable_list as_inputs(const Gradients& g, std::array<bool, 3> mask, size_t inputs) {
  variable_list list(inputs);
  if (mask[0]) list[0] = std::get<0>(g);
  if (mask[1]) list[1] = std::get<1>(g);
  if (mask[2]) list[2] = std::get<2>(g);
  return list;
}

std::array<bool, 3> mask_of(int64_t bits) { return {bool(bits & 1), bool(bits & 2), bool(bits & 4)}; }
int64_t bits_of(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias) {
  return input.requires_grad() + 2 * requires_grad(weight) + 4 * requires_grad(bias) + type_bits(bias);
}

// A transform of torch.func takes no node in C++, nor does forward mode, and torch's older vmap (is_grads_batched)
// would run the kernels row by row, without a graph: there the gradients are made of differentiable operations.
bool transformed() {
  using c10::DispatchKey;
  return c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::VmapMode);
}
bool needs_composite(std::initializer_list<const Tensor*> tensors) {
  if (transformed()) return true;
  for (const Tensor* t : tensors) {
    if (t->defined() && t->_fw_grad(0).defined()) return true;
  }
  return false;
}

// The gradients as a node, for second derivatives. Statistics: forward's saved values, or the running mean and
// variance. Its outputs are the wanted gradients alone; third derivatives are made of differentiable operations.
struct FirstGradients : torch::autograd::Function<FirstGradients> {
  static constexpr bool is_traceable = true;
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& statistics, const OptionalTensor& variance,
                               double eps, int64_t bits) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto mask = mask_of(bits);
    const auto type = type_of(bits);
    const auto [dx, dw, db] =
        has(variance) ? inference_backward_op().call(dy, input, weight, statistics, *variance, eps, mask, type)
                      : backward_op().call(dy, input, weight, statistics, mask, type);
    ctx->save_for_backward({dy, input, weight.value_or(Tensor()), statistics, variance.value_or(Tensor())});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask"] = bits;
    variable_list wanted;
    if (mask[0]) wanted.push_back(dx);
    if (mask[1]) wanted.push_back(dw);
    if (mask[2]) wanted.push_back(db);
    return wanted;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& arriving) {
    const auto mask = mask_of(ctx->saved_data["mask"].toInt());
    OptionalTensor gg[3];
    bool any = false;
    for (size_t i = 0, at = 0; i < 3; ++i) {
      if (mask[i]) gg[i] = optional(arriving[at++]);
      any |= gg[i].has_value();
    }
    if (!any) return variable_list(7);
    const auto saved = ctx->get_saved_variables();
    const Tensor &dy = saved[0], &x = saved[1];
    const OptionalTensor weight = optional(saved[2]), variance = optional(saved[4]);
    const double eps = ctx->saved_data["eps"].toDouble();
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     weight.has_value() && ctx->needs_input_grad(2)};
    Gradients gradients;
    if (at::GradMode::is_enabled() || transformed()) {
      const OptionalTensor mean = variance.has_value() ? optional(saved[3]) : std::nullopt;
      gradients = composite_double_backward(gg[0], gg[1], gg[2], dy, x, weight, mean, variance, eps, wanted);
    } else if (variance.has_value()) {
      gradients =
          inference_double_backward_op().call(gg[0], gg[1], gg[2], dy, x, weight, saved[3], *variance, eps, wanted);
    } else {
      gradients = double_backward_op().call(gg[0], gg[1], gg[2], dy, x, weight, saved[3], wanted);
    }
    return as_inputs(gradients, wanted, 7);
  }
};

// Gradients that can be differentiated again, in the places of `inputs` inputs.
variable_list differentiable(const Tensor& dy, const Tensor& input, const OptionalTensor& weight,
                             const Tensor& statistics, const OptionalTensor& variance, double eps, int64_t bits,
                             size_t inputs) {
  const auto mask = mask_of(bits);
  if (needs_composite({&dy, &input, weight.has_value() ? &*weight : &dy})) {
    const OptionalTensor mean = has(variance) ? OptionalTensor(statistics) : std::nullopt;
    return as_inputs(composite_backward(dy, input, weight, mean, variance, eps, mask, type_of(bits)), mask, inputs);
  }
  const variable_list made = FirstGradients::apply(dy, input, weight, statistics, variance, eps, bits);
  variable_list list(inputs);
  for (size_t i = 0, at = 0; i < 3; ++i) {
    if (mask[i]) list[i] = made[at++];
  }
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
    ctx->saved_data["mask"] = bits_of(input, weight, bias);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& dy = grad_outputs[0];
    if (!dy.defined()) return variable_list(8);
    const auto saved = ctx->get_saved_variables();
    const int64_t bits = ctx->saved_data["mask"].toInt();
    const auto mask = mask_of(bits);
    const OptionalTensor weight = optional(saved[1]);
    if (at::GradMode::is_enabled()) {
      const double eps = ctx->saved_data["eps"].toDouble();
      return differentiable(dy, saved[0], weight, saved[2], {}, eps, bits, 8);
    }
    return as_inputs(backward_op().call(dy, saved[0], weight, saved[2], mask, type_of(bits)), mask, 8);
  }
};

struct Inference : torch::autograd::Function<Inference> {
  static constexpr bool is_traceable = true;  // its backward is operators alone: compiled autograd may see into it
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    Tensor output = inference_op().call(input, weight, bias, running_mean, running_var, eps);
    // Copies: a training step between this forward and its backward may move the running statistics.
    ctx->save_for_backward({input, weight.value_or(Tensor()), running_mean.clone(), running_var.clone()});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask"] = bits_of(input, weight, bias);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& dy = grad_outputs[0];
    if (!dy.defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    const int64_t bits = ctx->saved_data["mask"].toInt();
    const auto mask = mask_of(bits);
    const OptionalTensor weight = optional(saved[1]);
    const double eps = ctx->saved_data["eps"].toDouble();
    if (at::GradMode::is_enabled()) return differentiable(dy, saved[0], weight, saved[2], saved[3], eps, bits, 6);
    return as_inputs(inference_backward_op().call(dy, saved[0], weight, saved[2], saved[3], eps, mask, type_of(bits)),
                     mask, 6);
  }
};

// Below autograd: inference mode, and the calls of the kernels' own devices.
Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                  double eps) {
  if (training) {
    const OptionalTensor count = counter_of(num_batches_tracked, input, momentum);
    return std::get<0>(forward_op().call(input, weight, bias, running_mean, running_var, count, momentum, eps));
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
  check_can_be_counted(num_batches_tracked);
  const bool graph =
      at::GradMode::is_enabled() && (input.requires_grad() || requires_grad(weight) || requires_grad(bias));
  if (graph) {
    check_can_be_saved(input);
    if (has(weight)) check_can_be_saved(*weight);
  }
  if (graph && training) {
    const OptionalTensor count = counter_of(num_batches_tracked, input, momentum);
    return Training::apply(input, weight, bias, running_mean, running_var, count, momentum, eps);
  }
  if (graph && has(running_mean) && has(running_var)) {
    return Inference::apply(input, weight, bias, *running_mean, *running_var, eps);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps);
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeExplicitAutograd, m) { m.impl("batch_norm", batch_norm); }
TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) { m.impl("batch_norm", batch_norm_autograd); }

}  // namespace
}  // namespace bn_ext

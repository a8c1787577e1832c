// autograd.cpp's entry for batch norm with a residual and an activation: one operator, one node.
#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd_support.h"
#include "glue_activated.h"

namespace bn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using ForwardSchema = ActivatedTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, std::optional<double>, double, std::string_view, double,
                                       bool);
using InferenceSchema = ActivatedTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                         const OptionalTensor&, const Tensor&, const Tensor&, double, std::string_view,
                                         double, bool);
using InplaceSchema = void(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const Tensor&, const Tensor&, double, std::string_view, double);
using BackwardSchema = ActivatedGradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                          const OptionalTensor&, const Tensor&, bool, std::string_view, double,
                                          std::array<bool, 4>, OptionalType);
using PlainBackwardSchema = Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                      std::array<bool, 3>, OptionalType);
using PlainCompositeSchema = Gradients(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                       const OptionalTensor&, double, std::array<bool, 3>, OptionalType);

const auto& forward_op() {
  static const auto op = handle<ForwardSchema>("bn_ext::batch_norm_act_forward");
  return op;
}
const auto& inference_op() {
  static const auto op = handle<InferenceSchema>("bn_ext::batch_norm_act_inference");
  return op;
}
const auto& inplace_op() {
  static const auto op = handle<InplaceSchema>("bn_ext::batch_norm_act_inference_");
  return op;
}
const auto& backward_op() {
  static const auto op = handle<BackwardSchema>("bn_ext::batch_norm_act_backward");
  return op;
}
const auto& plain_backward_op() {
  static const auto op = handle<PlainBackwardSchema>("bn_ext::batch_norm_backward");
  return op;
}
const auto& plain_composite_op() {
  static const auto op = handle<PlainCompositeSchema>("bn_ext::batch_norm_composite_backward");
  return op;
}

// Forward's mask as booleans of input's shape: element i of the output's memory, one after the other (activation.h).
Tensor unpacked(const Tensor& mask, const Tensor& input) {
  const Tensor bits = at::bitwise_right_shift(mask.unsqueeze(1), at::arange(mask_elements(input), mask.options()));
  const Tensor flat = at::bitwise_and(bits, 1).reshape(-1);
  return flat.as_strided(input.sizes(), at::empty_like(input).strides()).to(at::kBool);
}

// act'(v) * dy from operations that can be differentiated any number of times.
Tensor activation_gradient(const Tensor& dy, const Tensor& v, Activation activation, double slope) {
  switch (activation) {
    case Activation::kReLU:
      return at::where(v <= 0, at::zeros_like(dy), dy);
    case Activation::kLeakyReLU:
      return at::where(v > 0, dy, dy * slope);
    case Activation::kSiLU: {
      const Tensor s = at::sigmoid(v);
      return dy * (s * (1 + v * (1 - s)));
    }
    case Activation::kGELU: {
      constexpr double kRootHalf = 0.70710678118654752440, kDensity = 0.39894228040143267794;
      return dy * (0.5 * (1 + at::erf(v * kRootHalf)) + v * (kDensity * at::exp(v.square() * -0.5)));
    }
    default:
      return dy;
  }
}

// The gradients as compositions of differentiable operations, for derivatives of higher order.
ActivatedGradients composite_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& residual,
                                      const Tensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                                      const Tensor& saved, bool training, double eps, std::string_view activation,
                                      double negative_slope, std::array<bool, 4> output_mask, OptionalType bias_dtype) {
  const Activation kind = activation_of(activation);
  check_defined(grad_output, "grad_output");
  check_defined(input, "input");
  check_defined(mask, "mask");
  TORCH_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
  const auto dtype = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  check_plane(input, input, "input");
  check_plane(grad_output, input, "grad_output");
  check_plane(residual, input, "residual");
  check_vector(weight, input, "weight");
  check_vector(bias, input, "bias");
  check_saved(saved, input, kSavedRows);
  check_mask(mask, input, kind);
  const Tensor dy = grad_output.to(dtype);
  OptionalTensor mean, variance;
  if (!training) {
    mean = saved.select(0, 0) + saved.select(0, 1);
    variance = saved.select(0, 2).square().reciprocal();
    eps = 0;
  }
  Tensor g = dy;
  if (mask.numel() > 0) {
    const Tensor passes = unpacked(mask, input);
    g = at::where(passes, dy, kind == Activation::kReLU ? at::zeros_like(dy) : dy * negative_slope);
  } else if (kind != Activation::kIdentity) {
    std::vector<int64_t> dims{0}, column{1, -1};
    if (input.dim() == 3) {
      dims.push_back(2);
      column.push_back(1);
    }
    const Tensor x = input.to(dtype);
    const Tensor centred = x - (training ? x.mean(dims, true) : mean->view(column));
    const Tensor spread = training ? centred.square().mean(dims, true) : variance->view(column);
    Tensor v = centred * at::rsqrt(spread + eps);
    if (has(weight)) v = v * weight->to(dtype).view(column);
    if (has(bias)) v = v + bias->to(dtype).view(column);
    if (has(residual)) v = v + residual->to(dtype);
    g = activation_gradient(dy, v, kind, negative_slope);
  }
  auto [grad_input, grad_weight, grad_bias] = plain_composite_op().call(
      g, input, weight, mean, variance, eps, {output_mask[0], output_mask[2], output_mask[3]}, bias_dtype);
  const Tensor grad_residual = output_mask[1] ? g.to(input.scalar_type()) : at::empty({0}, input.options());
  return {grad_input, grad_residual, grad_weight, grad_bias};
}

// bias with the values that forward had, which are in its coefficients (formulas.h: shift = bias - (what of the mean is
// not in their mean_hi) * scale), and with the derivatives of what it is.
Tensor bias_of_forward(const Tensor& bias, const Tensor& saved) {
  const Tensor now = bias.to(saved.scalar_type());
  const Tensor rest = saved.select(0, 0) - saved.select(0, 3) + saved.select(0, 1);
  const Tensor then = saved.select(0, 5) + rest * saved.select(0, 4);
  return now + (then - now).detach();
}

// input as forward had it: a mask lies in the order of the output's memory, which is that of empty_like(input), and
// what saved-tensor hooks bring back may be laid out otherwise (save_on_cpu makes everything contiguous).
Tensor laid_for_mask(const Tensor& input, const std::vector<int64_t>& strides) {
  if (input.sizes().size() != strides.size()) return input;  // the operator refuses it
  const bool dense = input.is_non_overlapping_and_dense();
  if ((dense ? input.strides().vec() : at::infer_dense_strides(input.sizes(), input.strides())) == strides)
    return input;
  return at::empty_strided(input.sizes(), strides, input.options()).copy_(input);
}

struct Activated : torch::autograd::Function<Activated> {
  static constexpr bool is_traceable = true;  // its backward is operators alone: compiled autograd may see into it
  static constexpr int kInputs = 12;

  static Tensor forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked, bool training,
                        std::optional<double> momentum, double eps, std::string_view activation,
                        double negative_slope) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [output, saved, mask] =
        training ? forward_op().call(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                                     momentum, eps, activation, negative_slope, true)
                 : inference_op().call(input, residual, weight, bias, *running_mean, *running_var, eps, activation,
                                       negative_slope, true);
    const Activation kind = activation_of(activation);
    // The residual is kept, not copied, where backward computes the activation's argument anew.
    const bool keep = has(residual) && kind != Activation::kIdentity && mask.sym_numel() == 0;
    // The input of batch norm's own gradients, or of the activation's argument; a residual alone needs neither.
    const bool of_norm = input.requires_grad() || requires_grad(weight) || requires_grad(bias);
    ctx->save_for_backward(
        {of_norm || keep ? input : Tensor(), keep ? *residual : Tensor(), mask, weight.value_or(Tensor()), saved});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["slope"] = negative_slope;
    // Not among the saved variables: backward does not read its values, which may change, as with torch's batch norm.
    if (has(bias)) ctx->saved_data["bias"] = *bias;
    // Symbolic in a graph that is being traced: what its backward gets has forward's strides.
    const bool by_mask = mask.sym_numel() != 0 && !output.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
    ctx->saved_data["strides"] = by_mask ? output.strides().vec() : std::vector<int64_t>();
    ctx->saved_data["mask"] = int64_t(input.requires_grad() + 2 * requires_grad(residual) + 4 * requires_grad(weight) +
                                      8 * requires_grad(bias) + type_bits(bias));
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const Tensor& dy = grad_outputs[0];
    variable_list list(kInputs);
    if (!dy.defined()) return list;
    const auto kept = ctx->get_saved_variables();
    const Tensor &mask = kept[2], &saved = kept[4];
    const std::vector<int64_t> strides = ctx->saved_data["strides"].toIntVector();
    // Where no input was kept, only its shape is asked for.
    const Tensor& shape = kept[0].defined() ? kept[0] : dy;
    const Tensor x = strides.empty() ? shape : laid_for_mask(shape, strides);
    const OptionalTensor residual = optional(kept[1]), weight = optional(kept[3]);
    const bool training = ctx->saved_data["training"].toBool();
    const std::string activation = ctx->saved_data["activation"].toStringRef();
    const double slope = ctx->saved_data["slope"].toDouble();
    const int64_t bits = ctx->saved_data["mask"].toInt();
    const std::array<bool, 4> wanted{bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8)};
    if (at::GradMode::is_enabled()) {
      const double eps = ctx->saved_data["eps"].toDouble();
      OptionalTensor bias;
      if (const auto found = ctx->saved_data.find("bias"); found != ctx->saved_data.end()) {
        bias = bias_of_forward(found->second.toTensor(), saved);
      }
      std::tie(list[0], list[1], list[2], list[3]) = composite_backward(
          dy, x, residual, mask, weight, bias, saved, training, eps, activation, slope, wanted, type_of(bits));
    } else if (activation == "identity" && (training || !kept[0].defined())) {
      if (kept[0].defined()) {
        std::tie(list[0], list[2], list[3]) = plain_backward_op().call(
            dy, x, weight, saved.narrow(0, 0, 3), {wanted[0], wanted[2], wanted[3]}, type_of(bits));
      }
      list[1] = dy;
    } else {
      std::tie(list[0], list[1], list[2], list[3]) =
          backward_op().call(dy, x, residual, mask, weight, saved, training, activation, slope, wanted, type_of(bits));
    }
    for (int i = 0; i < 4; ++i) {
      if (!wanted[i]) list[i] = Tensor();
    }
    return list;
  }
};

// Below autograd: inference mode, and the calls of the kernels' own devices.
Tensor batch_norm_act(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                      const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                      double eps, std::string_view activation, double negative_slope) {
  const OptionalTensor count = counter_of(num_batches_tracked, input, momentum);
  if (training) {
    return std::get<0>(forward_op().call(input, residual, weight, bias, running_mean, running_var, count, momentum, eps,
                                         activation, negative_slope, false));
  }
  TORCH_CHECK(has(running_mean), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(has(running_var), "running_var must be defined in evaluation mode");
  return std::get<0>(inference_op().call(input, residual, weight, bias, *running_mean, *running_var, eps, activation,
                                         negative_slope, false));
}

Tensor batch_norm_act_autograd(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               bool training, std::optional<double> momentum, double eps, std::string_view activation,
                               double negative_slope) {
  check_no_gradient(running_mean, "running_mean");
  check_no_gradient(running_var, "running_var");
  check_can_be_counted(num_batches_tracked);
  const bool graph = at::GradMode::is_enabled() &&
                     (input.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
  if (graph) {
    check_can_be_saved(input);
    if (has(weight)) check_can_be_saved(*weight);
    if (has(residual)) check_can_be_saved(*residual);
  }
  if (graph && (training || (has(running_mean) && has(running_var)))) {
    const OptionalTensor count = counter_of(num_batches_tracked, input, momentum);
    return Activated::apply(input, residual, weight, bias, running_mean, running_var, count, training, momentum, eps,
                            activation, negative_slope);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm_act(input, residual, weight, bias, running_mean, running_var, num_batches_tracked, training,
                        momentum, eps, activation, negative_slope);
}

void inplace_autograd(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                      const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps,
                      std::string_view activation, double negative_slope) {
  const bool graph = at::GradMode::is_enabled() &&
                     (input.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
  TORCH_CHECK(!graph,
              "batch norm with inplace=True writes into its input, which autograd would need: call it under "
              "torch.no_grad(), or with inplace=False");
  at::AutoDispatchBelowAutograd below;
  inplace_op().call(input, residual, weight, bias, running_mean, running_var, eps, activation, negative_slope);
}

// Who has saved input for a backward of its own is to notice.
void inplace_version(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                     const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps,
                     std::string_view activation, double negative_slope) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    inplace_op().call(input, residual, weight, bias, running_mean, running_var, eps, activation, negative_slope);
  }
  torch::autograd::impl::bump_version(input);
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeExplicitAutograd, m) { m.impl("batch_norm_act", batch_norm_act); }
TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) {
  m.impl("batch_norm_act", batch_norm_act_autograd);
  m.impl("batch_norm_act_inference_", inplace_autograd);
}
TORCH_LIBRARY_IMPL(bn_ext, ADInplaceOrView, m) { m.impl("batch_norm_act_inference_", inplace_version); }
TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_act_composite_backward", composite_backward);
}
TORCH_LIBRARY_IMPL(bn_ext, FuncTorchBatchedDecomposition, m) {
  m.impl("batch_norm_act_composite_backward", composite_backward);
}

}  // namespace
}  // namespace bn_ext

#include "gradients.h"

#include <ATen/ExpandUtils.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "activation_gradient.h"
#include "composite.h"
#include "operators.h"
#include "padding.h"

namespace bn_ext {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& backward_op() {
  static const auto op = handle<schema::Backward>("bn_ext::batch_norm_backward");
  return op;
}
const auto& double_backward_op() {
  static const auto op = handle<schema::DoubleBackward>("bn_ext::batch_norm_double_backward");
  return op;
}

std::array<bool, 4> mask_of(int64_t bits) { return {bool(bits & 1), bool(bits & 2), bool(bits & 4), bool(bits & 8)}; }
std::array<bool, 3> mask_of_norm(int64_t bits) { return {bool(bits & 1), bool(bits & 2), bool(bits & 4)}; }
OptionalType type_of(int64_t bits) {
  return bits >> kTypeShift ? OptionalType(static_cast<at::ScalarType>((bits >> kTypeShift) - 1)) : std::nullopt;
}

// The wanted ones of `found`, in the places of `inputs` inputs.
template <size_t kWanted, class Found>
variable_list as_inputs(const Found& found, std::array<bool, kWanted> wanted, size_t inputs) {
  variable_list list(inputs);
  std::apply(
      [&](const auto&... gradient) {
        size_t i = 0;
        ((wanted[i] ? void(list[i] = gradient) : void(), ++i), ...);
      },
      found);
  return list;
}

// A transform of torch.func takes no node in C++, nor does forward mode, and torch's older vmap (is_grads_batched)
// would run the kernels row by row, without a graph: there the gradients are made of differentiable operations.
bool transformed() {
  using c10::DispatchKey;
  return c10::impl::tls_is_dispatch_key_included(DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         c10::impl::tls_is_dispatch_key_included(DispatchKey::VmapMode);
}
// Whether forward mode differentiates along one of them.
bool any_tangent(at::ArrayRef<Tensor> tensors) {
  return forward_mode() && std::any_of(tensors.begin(), tensors.end(), has_tangent);
}

// The gradients of batch norm alone as a node, for second derivatives. Its outputs are the wanted gradients; third
// derivatives are made of differentiable operations.
struct FirstGradients : torch::autograd::Function<FirstGradients> {
  static constexpr bool is_traceable = true;
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& input,
                               const OptionalTensor& weight, const Tensor& saved, bool training, double eps,
                               int64_t bits) {
    at::AutoDispatchBelowADInplaceOrView below;
    const auto wanted = mask_of_norm(bits);
    const auto gradients =
        as_inputs(backward_op().call(dy, input, weight, saved, training, {wanted[0], wanted[1], wanted[2], false},
                                     type_of(bits), {}, {}, "identity", 0, {}, 0, {}, false),
                  std::array<bool, 4>{true, true, true, true}, 4);
    ctx->save_for_backward({dy, input, weight.value_or(Tensor()), saved});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = training;
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["mask"] = bits;
    variable_list outputs;
    for (size_t i = 0; i < 3; ++i) {
      if (wanted[i]) outputs.push_back(gradients[i]);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& arriving) {
    const auto given = mask_of_norm(ctx->saved_data["mask"].toInt());
    OptionalTensor gg[3];
    bool any = false;
    for (size_t i = 0, at = 0; i < 3; ++i) {
      if (given[i]) gg[i] = optional(arriving[at++]);
      any |= gg[i].has_value();
    }
    if (!any) return variable_list(7);
    const auto kept = ctx->get_saved_variables();
    const OptionalTensor weight = optional(kept[2]);
    const bool training = ctx->saved_data["training"].toBool();
    const double eps = ctx->saved_data["eps"].toDouble();
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     weight.has_value() && ctx->needs_input_grad(2)};
    variable_list all = arriving;
    all.insert(all.end(), kept.begin(), kept.end());
    if (at::GradMode::is_enabled() || transformed() || any_tangent(all)) {
      return as_inputs(
          composite_double_backward(gg[0], gg[1], gg[2], kept[0], kept[1], weight, kept[3], training, eps, wanted),
          wanted, 7);
    }
    return as_inputs(
        double_backward_op().call(gg[0], gg[1], gg[2], kept[0], kept[1], weight, kept[3], training, wanted), wanted, 7);
  }
};

// Batch norm as the kernels saw it: of a renormalised batch with the weight weight * r and the bias
// bias + weight * d (core/renorm.h).
struct Affine {
  Tensor saved;  // without r and d
  OptionalTensor weight;
  Tensor r, d, of_d;  // of_d: weight * d; undefined of a plain batch

  explicit Affine(const Kept& k) : saved(k.saved), weight(optional(k.weight)) {
    if (!k.renorm) return;
    saved = k.saved.narrow(0, 0, kSavedRows);
    r = k.saved.select(0, kSavedR);
    d = k.saved.select(0, kSavedD);
    const Tensor given = has(weight) ? weight->to(k.saved.scalar_type()).reshape({-1}) : Tensor();
    weight = given.defined() ? given * r : r;
    of_d = given.defined() ? given * d : d;
  }

  // The gradients of weight and bias, in their own types, from those of the kernels' weight and bias.
  void to_own(Tensor* grad_weight, Tensor* grad_bias, const Kept& k) const {
    if (!r.defined()) return;
    const auto own = [&](const Tensor& t, at::ScalarType type) {
      return (k.weight.defined() ? t.view_as(k.weight) : t).to(type);
    };
    const auto of_weight = k.weight.defined() ? k.weight.scalar_type() : k.saved.scalar_type();
    if (grad_weight->defined()) *grad_weight = own(*grad_weight * r + *grad_bias * d, of_weight);
    if (grad_bias->defined()) *grad_bias = own(*grad_bias, type_of(k.bits).value_or(of_weight));
  }
};

// The bias as forward had it, whatever became of it since: its values, which are in forward's coefficients (formulas.h:
// shift = bias - (what of the mean is not in their mean_hi) * scale), at the edge that its gradients took then.
Tensor bias_of_forward(const Kept& k, const Affine& norm) {
  const auto row = [&](int which) { return k.saved.select(0, which); };
  const Tensor rest = row(kSavedMeanHi) - row(kSavedNormalise) + row(kSavedMeanLo);
  Tensor bias = (row(kSavedNormalise + 2) + rest * row(kSavedNormalise + 1)).detach();
  if (norm.of_d.defined()) bias = bias - norm.of_d.detach();
  if (!k.bias.is_valid() || !at::GradMode::is_enabled()) return bias;
  const auto& there = k.bias.function->input_metadata(k.bias.input_nr);
  const Tensor linked = bias.view_symint(there.shape_as_dim_vector())
                            .to(there.dtype().toScalarType(), /*non_blocking=*/false, /*copy=*/true);
  torch::autograd::impl::set_gradient_edge(linked, k.bias);
  return linked;
}

// Where an activation that goes by the sign of its argument passed it on in forward, as booleans: from forward's mask
// or from the kernels, as other arithmetic may round an argument near zero to the other side. Undefined where neither
// can be.
Tensor passed_by_forward(const Kept& k, Activation kind) {
  if (k.mask.defined() && k.mask.sym_numel() != 0) return unpacked_mask(k.mask, k.input);
  if (!by_sign(kind) || transformed()) return {};
  at::AutoDispatchBelowADInplaceOrView below;
  const Tensor ones = at::ones_like(k.input);
  return std::get<3>(backward_op().call(ones, k.input, {}, k.saved, k.training, {false, false, false, true}, {},
                                        optional(k.residual), {}, k.activation, 0, {}, k.virtual_batch_size,
                                        optional(k.valid), k.renorm))
      .ne(0);
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

// Gradients that can be differentiated again: the activation's from torch's operations, batch norm's from a node of
// their own, of kernels too, or where no node may be, from torch's operations. passed: by passed_by_forward.
variable_list differentiable(const Tensor& grad_output, const Kept& k, const Tensor& passed) {
  const auto wanted = mask_of_norm(k.bits);
  const Affine norm(k);
  const Activation kind = activation_of(k.activation);
  // A gradient of 16 bits would be rounded on its way from one to the other, where a zero or the whole of it is not.
  const bool rounds = k.input.element_size() == 2 && kind != Activation::kIdentity && kind != Activation::kReLU;
  const bool composed = rounds || transformed() || any_tangent({grad_output, k.input, k.weight, k.residual});
  const auto argument = [&] {
    OptionalTensor bias = type_of(k.bits) ? OptionalTensor(bias_of_forward(k, norm)) : std::nullopt;
    if (norm.of_d.defined()) bias = has(bias) ? norm.of_d + bias->to(norm.of_d.scalar_type()).reshape({-1}) : norm.of_d;
    const Tensor v = composite_forward(k.input, norm.weight, bias, norm.saved, k.training, k.eps);
    return k.residual.defined() ? v + k.residual.to(v.scalar_type()) : v;
  };
  const Tensor dy = through_activation(grad_output, k.input, kind, k.slope, passed, argument);
  variable_list list(4);
  if (mask_of(k.bits)[3]) list[3] = dy.to(grad_output.scalar_type());
  if (!wanted[0] && !wanted[1] && !wanted[2]) return list;
  // Of a renormalised batch the weight's gradient has the bias's in it, not rounded to that one's type.
  const int64_t bits = k.renorm ? (k.bits & 7) | (wanted[1] ? 4 : 0) : k.bits;
  const auto of_norm = mask_of_norm(bits);
  if (composed) {
    const auto found =
        composite_backward(dy, k.input, norm.weight, norm.saved, k.training, k.eps, of_norm, type_of(bits));
    variable_list made = as_inputs(found, of_norm, 3);
    std::move(made.begin(), made.end(), list.begin());
  } else {
    const variable_list made = FirstGradients::apply(dy, k.input, norm.weight, norm.saved, k.training, k.eps, bits);
    for (size_t i = 0, at = 0; i < 3; ++i) {
      if (of_norm[i]) list[i] = made[at++];
    }
  }
  norm.to_own(&list[1], &list[2], k);
  if (!wanted[2]) list[2] = Tensor();
  return list;
}

// The same of a whole batch. Of a padded one what counts is taken out first: a batch of size (M, C) with the same saved
// values.
variable_list differentiable(const Tensor& grad_output, const Kept& k) {
  const Tensor passed = passed_by_forward(k, activation_of(k.activation));
  if (!k.valid.defined()) return differentiable(grad_output, k, passed);
  const Tensor places = places_of(k.valid, k.input);
  Kept gathered = k;
  gathered.input = rows_at(k.input, places);
  gathered.residual = rows_at(k.residual, places);
  gathered.mask = gathered.valid = Tensor();
  variable_list list = differentiable(rows_at(grad_output, places), gathered, rows_at(passed, places));
  for (const size_t of_input : {0, 3}) list[of_input] = rows_put(list[of_input], places, k.input);
  return list;
}

// The same of a batch that was cut: of each virtual batch, and what is one for all of them added up.
variable_list differentiable_cut(const Tensor& grad_output, Kept k) {
  if (!samples_lie_apart(k.input)) k.input = k.input.contiguous();  // as forward had it
  const Shape shape{k.input.size(0), k.input.size(1), k.input.dim() == 3 ? k.input.size(2) : 1};
  const VirtualBatches batches = virtual_batches(shape, k.input.dim(), k.virtual_batch_size);
  const int64_t sample = shape.c * shape.l, elements = mask_elements(k.input);
  const int64_t step = mask_step(batches.size * sample, elements);
  std::array<variable_list, 4> found;
  for (int64_t i = 0; i < batches.count; ++i) {
    const auto piece = [&](const Tensor& t) {
      return t.defined() ? t.narrow(0, batches.begin(i), batches.samples(i, shape.n)) : t;
    };
    Kept one = k;
    one.input = piece(k.input);
    one.residual = piece(k.residual);
    one.valid = piece(k.valid);
    one.saved = k.saved.narrow(0, i * saved_rows(k.renorm), saved_rows(k.renorm));
    if (k.mask.defined() && k.mask.numel() > 0) {
      one.mask = k.mask.narrow(0, i * step, mask_bytes(batches.samples(i, shape.n) * sample, elements));
    }
    one.virtual_batch_size = 0;
    const variable_list of_piece = differentiable(piece(grad_output), one);
    for (size_t j = 0; j < found.size(); ++j) {
      if (of_piece[j].defined()) found[j].push_back(of_piece[j]);
    }
  }
  variable_list list(4);
  for (const size_t of_input : {0, 3}) {
    if (!found[of_input].empty()) list[of_input] = at::cat(found[of_input], 0);
  }
  for (const size_t of_parameter : {1, 2}) {
    if (!found[of_parameter].empty()) list[of_parameter] = at::stack(found[of_parameter]).sum(0);
  }
  return list;
}

}  // namespace

variable_list gradients(const Tensor& dy, Kept k) {
  variable_list list(4);
  if (!dy.defined()) return list;
  if (!k.input.defined()) k.input = dy;  // only its shape is asked for
  if (!k.strides.empty()) k.input = laid_for_mask(k.input, k.strides);
  if (at::GradMode::is_enabled() || any_tangent({dy, k.input, k.weight, k.residual})) {
    return k.virtual_batch_size == 0 ? differentiable(dy, k) : differentiable_cut(dy, std::move(k));
  }
  auto wanted = mask_of(k.bits);
  if (k.activation == "identity" && wanted[3]) {
    list[3] = k.valid.defined() ? where_valid(dy, k.valid) : dy;
    wanted[3] = false;
  }
  if (!wanted[0] && !wanted[1] && !wanted[2] && !wanted[3]) return list;
  auto [dx, dw, db, dr] = backward_op().call(dy, k.input, optional(k.weight), k.saved, k.training, wanted,
                                             type_of(k.bits), optional(k.residual), optional(k.mask), k.activation,
                                             k.slope, {}, k.virtual_batch_size, optional(k.valid), k.renorm);
  if (wanted[0]) list[0] = std::move(dx);
  if (wanted[1]) list[1] = std::move(dw);
  if (wanted[2]) list[2] = std::move(db);
  if (wanted[3]) list[3] = std::move(dr);
  return list;
}

}  // namespace bn_ext

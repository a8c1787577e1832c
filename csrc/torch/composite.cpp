#include "composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace bn_ext {
namespace {

// The channels of an input as its gradients need them, in the type of its statistics.
struct Channels {
  at::ScalarType dtype;
  std::vector<int64_t> dims{0}, column{1, -1};
  bool batch;
  c10::SymInt count;  // values of a channel
  Tensor invstd, normalised, scale;

  Channels(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& saved, bool training, double eps)
      : batch(training) {
    check_defined(input, "input");
    TORCH_CHECK_VALUE(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
    check_plane(input, input, "input");
    check_vector(weight, input, "weight");
    if (!batch || has(saved)) check_saved(saved.value_or(Tensor()), input);
    dtype = input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    count = input.sym_size(0);
    if (input.dim() == 3) {
      count = count * input.sym_size(2);
      dims.push_back(2);
      column.push_back(1);
    }
    const auto row = [&](SavedRow which) { return vector(saved->select(0, which)); };
    const Tensor x = wide(input);
    Tensor centred;
    if (batch) {
      // Around a constant near the mean first: in one step each value would keep the rounding of a large mean.
      const Tensor near = x - (has(saved) ? row(kSavedMeanHi) : mean(x)).detach();
      centred = near - mean(near);
    } else {
      centred = (x - row(kSavedMeanHi)) - row(kSavedMeanLo);
    }
    invstd = batch ? at::rsqrt(mean(centred.square()) + eps) : row(kSavedInvstd);
    normalised = centred * invstd;
    scale = has(weight) ? invstd * vector(*weight) : invstd;
  }

  Tensor wide(const Tensor& t) const { return t.to(dtype); }
  // Of no values, as an empty virtual batch has, it is zero.
  Tensor mean(const Tensor& t) const { return t.sum(dims, true) / at::Scalar(count.max(1)); }
  Tensor vector(const Tensor& t) const { return wide(t).view(column); }
};

// sum += term, where either may be nothing yet.
void add(Tensor* sum, const Tensor& term) {
  if (term.defined()) *sum = sum->defined() ? *sum + term : term;
}

}  // namespace

Tensor composite_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                         const OptionalTensor& saved, bool training, double eps) {
  const Channels c(input, weight, saved, training, eps);
  check_vector(bias, input, "bias");
  const Tensor y = has(weight) ? c.normalised * c.vector(*weight) : c.normalised;
  return has(bias) ? y + c.vector(*bias) : y;
}

// formulas.h's formulas.
ThreeTensors composite_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                const OptionalTensor& saved, bool training, double eps, std::array<bool, 3> output_mask,
                                OptionalType bias_dtype) {
  const Channels c(input, weight, saved, training, eps);
  check_defined(grad_output, "grad_output");
  check_plane(grad_output, input, "grad_output");
  if (bias_dtype.has_value()) dtype_of(*bias_dtype, "bias_dtype");
  const Tensor dy = c.wide(grad_output);
  const auto none = [&] { return at::empty({0}, c.normalised.options()); };
  Tensor grad_input, grad_weight, grad_bias;
  if (output_mask[0]) {
    const Tensor projected = c.batch ? dy - (c.mean(dy) + c.normalised * c.mean(dy * c.normalised)) : dy;
    grad_input = (projected * c.scale).to(input.scalar_type());
  } else {
    grad_input = none();
  }
  const auto parameter = has(weight) ? weight->scalar_type() : c.dtype;
  const auto vector = [&](const Tensor& sum) { return has(weight) ? sum.view_as(*weight) : sum; };
  grad_weight = output_mask[1] ? vector((dy * c.normalised).sum(c.dims)).to(parameter) : none();
  grad_bias = output_mask[2] ? vector(dy.sum(c.dims)).to(bias_dtype.value_or(parameter)) : none();
  return {grad_input, grad_weight, grad_bias};
}

// double_formulas.h's formulas.
ThreeTensors composite_double_backward(const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
                                       const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                       const Tensor& input, const OptionalTensor& weight, const OptionalTensor& saved,
                                       bool training, double eps, std::array<bool, 3> output_mask) {
  const Channels c(input, weight, saved, training, eps);
  check_defined(grad_output, "grad_output");
  check_plane(grad_output, input, "grad_output");
  check_plane(grad_grad_input, input, "grad_grad_input");
  check_vector(grad_grad_weight, input, "grad_grad_weight");
  check_vector(grad_grad_bias, input, "grad_grad_bias");
  const Tensor dy = c.wide(grad_output);
  const auto centred = [&](const Tensor& t) { return c.batch ? t - c.mean(t) : t; };
  Tensor gg, alpha, grad_dy, grad_x, grad_weight;
  if (has(grad_grad_weight)) alpha = c.vector(*grad_grad_weight);
  if (has(grad_grad_input)) {
    const Tensor wide = c.wide(*grad_grad_input);
    gg = centred(wide);
    grad_weight = gg * dy;  // summed below
    if (c.batch) {
      const Tensor p = c.mean(dy * c.normalised), q = c.mean(gg * c.normalised);
      const Tensor slope = c.scale * p;
      add(&alpha, -c.scale * q);
      // delta without a * p: alpha's own product with p has it, and one of the three p * q.
      const Tensor delta = c.scale * (c.mean(grad_weight) - p * q) + (alpha - c.scale * q) * p;
      grad_x = -(gg * slope + c.normalised * delta);
      grad_weight = grad_weight - p * q;
    }
    grad_dy = gg * c.scale;
  } else if (alpha.defined() && c.batch) {
    grad_x = -c.normalised * (alpha * c.mean(dy * c.normalised));
  }
  if (alpha.defined()) {
    add(&grad_dy, c.normalised * alpha);
    add(&grad_x, centred(dy) * alpha);
  }
  if (has(grad_grad_bias)) add(&grad_dy, c.vector(*grad_grad_bias));
  const auto result = [&](const Tensor& t, bool wanted, const Tensor& like) {
    if (!wanted) return at::empty({0}, c.normalised.options());
    if (!t.defined()) return at::zeros_like(like);
    return t.expand_as(like).to(like.scalar_type());
  };
  if (grad_x.defined()) grad_x = grad_x * c.invstd;
  const Tensor of_weight = has(weight) ? *weight : c.invstd.flatten();
  if (grad_weight.defined()) grad_weight = (grad_weight * c.invstd).sum(c.dims).view_as(of_weight);
  return {result(grad_dy, output_mask[0], input), result(grad_x, output_mask[1], input),
          result(grad_weight, output_mask[2], of_weight)};
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeImplicitAutograd, m) {
  m.impl("batch_norm_composite_backward", composite_backward);
  m.impl("batch_norm_composite_double_backward", composite_double_backward);
}
// vmap over a gradient (jacrev, hessian) goes by the rules of the operations that it is made of.
TORCH_LIBRARY_IMPL(bn_ext, FuncTorchBatchedDecomposition, m) {
  m.impl("batch_norm_composite_backward", composite_backward);
  m.impl("batch_norm_composite_double_backward", composite_double_backward);
}

}  // namespace bn_ext

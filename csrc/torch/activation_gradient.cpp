#include "activation_gradient.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/bitwise_right_shift.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

namespace bn_ext {
namespace {

// act'(v) * dy.
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

}  // namespace

Tensor unpacked_mask(const Tensor& mask, const Tensor& input) {
  const Tensor bits = at::bitwise_right_shift(mask.unsqueeze(1), at::arange(mask_elements(input), mask.options()));
  const Tensor flat = at::bitwise_and(bits, 1).reshape(-1);
  return flat.as_strided(input.sizes(), at::empty_like(input).strides()).to(at::kBool);
}

Tensor through_activation(const Tensor& dy, const Tensor& input, Activation activation, double slope,
                          const Tensor& passed, const std::function<Tensor()>& argument) {
  if (activation == Activation::kIdentity) return dy;
  const Tensor wide = dy.to(statistics_options(input).dtype().toScalarType());
  if (!passed.defined()) return activation_gradient(wide, argument(), activation, slope);
  const Tensor blocked = activation == Activation::kReLU ? at::zeros_like(wide) : wide * slope;
  return at::where(passed, wide, blocked);
}

}  // namespace bn_ext

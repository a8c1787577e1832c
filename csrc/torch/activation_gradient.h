// The derivative of an activation, from torch's differentiable operations.
#pragma once

#include <functional>

#include "checks.h"

namespace bn_ext {

// act'(v) * dy, in the type of input's statistics where there is an activation. By forward's mask where that has
// elements; v, the activation's argument, is asked for where it is needed.
Tensor through_activation(const Tensor& dy, const Tensor& input, Activation activation, double slope,
                          const Tensor& mask, const std::function<Tensor()>& argument);

}  // namespace bn_ext

// The derivative of an activation, from torch's differentiable operations.
#pragma once

#include <functional>

#include "checks.h"

namespace bn_ext {

// Forward's mask as booleans of input's shape: element i of the output's memory, one after the other (activation.h).
Tensor unpacked_mask(const Tensor& mask, const Tensor& input);

// act'(v) * dy, in the type of input's statistics where there is an activation. By what forward passed on where that is
// defined; v, the activation's argument, is asked for where it is needed.
Tensor through_activation(const Tensor& dy, const Tensor& input, Activation activation, double slope,
                          const Tensor& passed, const std::function<Tensor()>& argument);

}  // namespace bn_ext

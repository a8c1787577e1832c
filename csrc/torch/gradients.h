// The gradients of batch norm with what follows it, once and again, for the node of autograd.cpp.
#pragma once

#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <vector>

#include "checks.h"

namespace bn_ext {

inline bool requires_grad(const OptionalTensor& t) { return has(t) && t->requires_grad(); }
inline bool forward_mode() { return torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr; }
inline bool has_tangent(const Tensor& t) { return t.defined() && t._fw_grad(0).defined(); }

// Which gradients a node is to give, input's, weight's, bias's and residual's, and the type of the bias's.
constexpr int kTypeShift = 8;
inline int64_t bits_of(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual) {
  const int64_t type = has(bias) ? (static_cast<int64_t>(bias->scalar_type()) + 1) << kTypeShift : 0;
  return input.requires_grad() + 2 * requires_grad(weight) + 4 * requires_grad(bias) + 8 * requires_grad(residual) +
         type;
}
// What a node keeps, unpacked.
struct Kept {
  Tensor input, weight, saved, residual, mask, valid;
  torch::autograd::Edge bias;    // where its gradients go; its values, which may change, are in `saved` as they were
  std::vector<int64_t> strides;  // of the output, where there is a mask
  bool training;
  double eps, slope;
  std::string activation;
  int64_t bits;
  int64_t virtual_batch_size;
  bool renorm;  // forward's
};

// The gradients of input, weight, bias and residual, in this order; undefined where not wanted. With GradMode they can
// be differentiated again.
torch::autograd::variable_list gradients(const Tensor& grad_output, Kept kept);

}  // namespace bn_ext

// What the differentiable operator asks of its arguments before anything has changed.
#pragma once

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include "gradients.h"

namespace bn_ext {

// What autograd's own save_for_backward refuses, said before the statistics have moved.
inline void check_can_be_saved(const OptionalTensor& t) {
  TORCH_CHECK(!has(t) || !t->is_inference(),
              "Inference tensors cannot be saved for backward. Please do not use Tensors created in inference mode in "
              "computation tracked by autograd. To work around this, you can make a clone to get a normal tensor and "
              "use it in autograd, or use `torch.no_grad()` instead of `torch.inference_mode()`.");
}
// The same of the count, which native changes in place by an operation of its own.
inline void check_can_be_counted(const OptionalTensor& t) {
  if (!has(t)) return;
  TORCH_CHECK(
      !t->is_inference() || c10::InferenceMode::is_enabled(),
      "Inplace update to inference tensor outside InferenceMode is not allowed.You can make a clone to get a "
      "normal tensor before doing inplace update.See https://github.com/pytorch/rfcs/pull/17 for more details.");
  TORCH_CHECK(!(t->requires_grad() && t->is_leaf() && at::GradMode::is_enabled()),
              "a leaf Variable that requires grad is being used in an in-place operation.");
}

// num_batches_tracked as the operators take it. One without data counts nothing, with torch's own either, and would
// bring the call to the kernels without data; a history of its own is none of the output's.
inline OptionalTensor counter_of(const OptionalTensor& count, const Tensor& input, std::optional<double> momentum) {
  if (!has(count)) return std::nullopt;
  if (count->is_meta() && !input.is_meta()) {
    TORCH_CHECK(momentum.has_value(), "Tensor.item() cannot be called on meta tensors");
    return std::nullopt;
  }
  return count->requires_grad() ? OptionalTensor(count->detach()) : count;
}

inline void check_no_gradient(const OptionalTensor& t, const char* name) {
  TORCH_CHECK(!requires_grad(t) || !at::GradMode::is_enabled(),
              "The function 'native_batch_norm' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

}  // namespace bn_ext

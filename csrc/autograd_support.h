// What the autograd nodes share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include "glue.h"

namespace bn_ext {

// Through the dispatcher, so that every device and every mode that listens to operators is reached.
template <class Schema>
c10::TypedOperatorHandle<Schema> handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

inline bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }
inline bool requires_grad(const OptionalTensor& t) { return has(t) && t->requires_grad(); }
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// The type of bias among the bits that a node keeps of the gradients that are wanted.
constexpr int kTypeShift = 8;
inline int64_t type_bits(const OptionalTensor& bias) {
  return has(bias) ? (static_cast<int64_t>(bias->scalar_type()) + 1) << kTypeShift : 0;
}
inline OptionalType type_of(int64_t bits) {
  return bits >> kTypeShift ? OptionalType(static_cast<at::ScalarType>((bits >> kTypeShift) - 1)) : std::nullopt;
}

// What autograd's own save_for_backward refuses, said before the statistics have moved.
inline void check_can_be_saved(const Tensor& t) {
  TORCH_CHECK(!t.defined() || !t.is_inference(),
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

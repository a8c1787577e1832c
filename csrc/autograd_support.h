// What the autograd nodes share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>

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

inline void check_no_gradient(const OptionalTensor& t, const char* name) {
  TORCH_CHECK(!requires_grad(t) || !at::GradMode::is_enabled(),
              "The function 'native_batch_norm' is not differentiable with respect to argument '", name,
              "'. This input cannot have requires_grad True.");
}

}  // namespace bn_ext

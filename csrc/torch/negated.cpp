// Views whose elements are the negatives of what lies in memory (torch's lazy negative bit). Torch's own fallback
// serves operators that write into nothing, or return what they write into; these write into statistics and return an
// output.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <utility>
#include <vector>

namespace bn_ext {
namespace {

void resolve_negated(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  std::vector<std::pair<at::Tensor, at::Tensor>> written;
  for (size_t i = 0; i < arguments.size(); ++i) {
    c10::IValue& value = (*stack)[first + i];
    if (!value.isTensor()) continue;
    const at::Tensor view = value.toTensor();
    if (!view.defined() || !view.is_neg()) continue;
    const at::Tensor resolved = view.resolve_neg();
    value = resolved;
    const auto* alias = arguments[i].alias_info();
    if (alias && alias->isWrite()) written.emplace_back(view, resolved);
  }
  op.callBoxed(stack);
  for (const auto& [view, resolved] : written) view.copy_(resolved);
}

TORCH_LIBRARY_IMPL(bn_ext, Negative, m) {
  for (const char* name : {"batch_norm", "batch_norm_forward", "batch_norm_inference_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&resolve_negated>());
  }
}

}  // namespace
}  // namespace bn_ext

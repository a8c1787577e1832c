// The entry of all but torch.func: one operator, one autograd node in C++. A Python autograd.Function costs about 25 us
// more a training step, several times a small batch norm; bn_ext/autograd.py keeps one for torch.func alone.
#include <ATen/FuncTorchTLS.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include "autograd_checks.h"
#include "gradients.h"
#include "operators.h"

namespace bn_ext {
namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

const auto& forward_op() {
  static const auto op = handle<schema::Forward>("bn_ext::batch_norm_forward");
  return op;
}
const auto& inference_op() {
  static const auto op = handle<schema::Inference>("bn_ext::batch_norm_inference");
  return op;
}
const auto& inplace_op() {
  static const auto op = handle<schema::InPlace>("bn_ext::batch_norm_inference_");
  return op;
}
// The node, written as torch generates its own: torch::autograd::Function keeps what it is given in a map of strings
// and notes every argument's shape, which took microseconds a step (CONTRIBUTING.md, Measured facts).
struct BatchNormBackward : torch::autograd::Node {
  SavedVariable input, weight, saved, residual, mask, valid;
  Kept rest;  // what is no saved variable

  std::string name() const override { return "BatchNormBackward"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return gradients(grads[0], unpacked());
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* v : variables()) v->reset_data();
  }

  // Compiled autograd: what the graph depends on, and the call of gradients that it records.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (SavedVariable* v : const_cast<BatchNormBackward*>(this)->variables()) args.collect(*v, false);
    for_each_value(rest, [&](const auto& value) { args.collect(value); });
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable* v : variables()) swap.before(*v);
    const Kept k = unpacked();
    PackedArgs packed;
    packed.pack(std::vector<Tensor>{k.input, k.weight, k.saved, k.residual, k.mask, k.valid});
    for_each_value(k, [&](const auto& value) { packed.pack(value); });
    const auto args = std::move(packed).vec();
    std::vector<at::TypePtr> types;
    for (const auto& value : args) types.push_back(value.type());
    const auto outputs =
        IValuePacker<std::vector<std::optional<InputMetadata>>>::pack(get_input_metadata(next_edges()));
    const auto& python = getPyCompilerInterface();
    const auto function = python->bind_function(swap.get_py_compiler(), name(), from_packed, types, true, true);
    auto result = python->call_function(swap.get_py_compiler(), "apply_functional", function, grads, args, outputs);
    for (SavedVariable* v : variables()) swap.after(*v);
    return result;
  }

 private:
  // What is no tensor, in the order in which it is packed.
  template <class Values, class Use>
  static void for_each_value(Values& k, const Use& use) {
    use(k.strides), use(k.training), use(k.eps), use(k.slope), use(k.activation), use(k.bits),
        use(k.virtual_batch_size), use(k.renorm);
  }

  std::array<SavedVariable*, 6> variables() { return {&input, &weight, &saved, &residual, &mask, &valid}; }

  Kept unpacked() {
    Kept k = rest;
    k.input = input.unpack(), k.weight = weight.unpack(), k.saved = saved.unpack();
    k.residual = residual.unpack(), k.mask = mask.unpack(), k.valid = valid.unpack();
    k.bias = next_edge(2);
    return k;
  }

  static variable_list from_packed(const variable_list& grads, const std::vector<c10::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const auto t = packed.unpack<std::vector<Tensor>>();
    Kept k{t[0], t[1], t[2], t[3], t[4], t[5]};
    for_each_value(k, [&](auto& value) { value = packed.unpack<std::decay_t<decltype(value)>>(); });
    return gradients(grads[0], std::move(k));
  }
};

// A new node: counted by torch's own kind of pointer since 2.13, by the standard library's before.
template <class N>
auto make_node() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, N>) {
    return c10::make_intrusive<N>();
  } else {
    return std::shared_ptr<N>(new N(), [](N* node) { deleteNode(node); });
  }
}

// What backward will look at again.
struct Keeps {
  // The residual is kept, not copied, where backward computes the activation's argument anew; forward's mask spares it.
  bool residual;
  // The input of batch norm's own gradients, or of that argument; a residual alone needs neither.
  bool input;
  Keeps(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& added,
        Activation kind)
      : residual(has(added) && kind != Activation::kIdentity && !by_sign(kind)),
        input(residual || x.requires_grad() || requires_grad(weight) || requires_grad(bias)) {}
};

Tensor recorded(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& count,
                bool training, std::optional<double> momentum, double eps, const OptionalTensor& residual,
                std::string_view activation, double slope, int64_t virtual_batch_size, const OptionalTensor& valid,
                OptionalNumbers renorm) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms) transforms->checkSupportsCppAutogradFunction();
  const OptionalTensor none;
  const Activation kind = activation_of(activation);
  const Keeps keeps(input, weight, bias, residual, kind);
  auto node = make_node<BatchNormBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, weight.value_or(Tensor()), bias.value_or(Tensor()),
                                                           residual.value_or(Tensor())));
  // Before the statistics move, as a hook may refuse what is saved.
  if (keeps.input) node->input = SavedVariable(input, false);
  if (has(weight)) node->weight = SavedVariable(*weight, false);
  if (keeps.residual) node->residual = SavedVariable(*residual, false);
  if (has(valid)) node->valid = SavedVariable(*valid, false);
  Tensor output, saved, mask;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(output, saved, mask) =
        training ? forward_op().call(input, weight, bias, running_mean, running_var, count, momentum, eps, none, none,
                                     residual, activation, slope, none, virtual_batch_size, valid, renorm)
                 : forward_op().call(input, weight, bias, none, none, none, std::nullopt, eps, running_mean,
                                     running_var, residual, activation, slope, none, 0, valid, std::nullopt);
  }
  const bool by_mask = mask.sym_numel() != 0;
  if (by_mask) node->mask = SavedVariable(mask, false);
  node->saved = SavedVariable(saved, false);
  Kept& rest = node->rest;
  // Symbolic in a graph that is being traced: what its backward gets has forward's strides.
  if (by_mask && !output.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) rest.strides = output.strides().vec();
  rest.training = training;
  rest.eps = eps;
  rest.slope = slope;
  rest.activation = activation;
  rest.bits = bits_of(input, weight, bias, residual);
  rest.virtual_batch_size = virtual_batch_size;
  rest.renorm = renorm.has_value();
  torch::autograd::set_history(output, node);
  return output;
}

// Below autograd: inference mode, and the calls of the kernels' own devices.
Tensor batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& running_mean, const OptionalTensor& running_var,
                  const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum, double eps,
                  const OptionalTensor& residual, std::string_view activation, double slope, int64_t virtual_batch_size,
                  const OptionalTensor& valid, bool allow_single_value, OptionalNumbers renorm) {
  check_virtual_batch_size(virtual_batch_size);
  renorm_of(renorm);
  if (training && !(allow_single_value && has_single_value(input, valid))) {
    const OptionalTensor count = counter_of(num_batches_tracked, input, momentum);
    return std::get<0>(forward_op().call(input, weight, bias, running_mean, running_var, count, momentum, eps, {}, {},
                                         residual, activation, slope, {}, virtual_batch_size, valid, renorm));
  }
  TORCH_CHECK(has(running_mean), "running_mean must be defined in evaluation mode");
  TORCH_CHECK(has(running_var), "running_var must be defined in evaluation mode");
  return inference_op().call(input, weight, bias, *running_mean, *running_var, eps, residual, activation, slope, valid);
}

bool needs_graph(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& residual) {
  return at::GradMode::is_enabled() &&
         (input.requires_grad() || requires_grad(weight) || requires_grad(bias) || requires_grad(residual));
}

Tensor batch_norm_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                           const OptionalTensor& running_mean, const OptionalTensor& running_var,
                           const OptionalTensor& num_batches_tracked, bool training, std::optional<double> momentum,
                           double eps, const OptionalTensor& residual, std::string_view activation, double slope,
                           int64_t virtual_batch_size, const OptionalTensor& valid, bool allow_single_value,
                           OptionalNumbers renorm) {
  check_virtual_batch_size(virtual_batch_size);
  renorm_of(renorm);
  check_no_gradient(running_mean, "running_mean");
  check_no_gradient(running_var, "running_var");
  check_can_be_counted(num_batches_tracked);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !forward_mode() || !(has_tangent(input) || has_tangent(weight.value_or(Tensor())) ||
                           has_tangent(bias.value_or(Tensor())) || has_tangent(residual.value_or(Tensor()))),
      "Trying to use forward AD with bn_ext::batch_norm, which has no rule for it");
  if (training && allow_single_value && has_single_value(input, valid)) training = false;
  const bool graph = needs_graph(input, weight, bias, residual);
  if (graph) {
    const Keeps keeps(input, weight, bias, residual, activation_of(activation));
    if (keeps.input) check_can_be_saved(input);
    check_can_be_saved(weight);
    if (keeps.residual) check_can_be_saved(residual);
  }
  if (graph && (training || (has(running_mean) && has(running_var)))) {
    const OptionalTensor count = training ? counter_of(num_batches_tracked, input, momentum) : std::nullopt;
    return recorded(input, weight, bias, running_mean, running_var, count, training, momentum, eps, residual,
                    activation, slope, training ? virtual_batch_size : 0, valid, training ? renorm : std::nullopt);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return batch_norm(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                    residual, activation, slope, virtual_batch_size, valid, false, renorm);
}

void inplace_autograd(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const Tensor& running_mean, const Tensor& running_var, double eps, const OptionalTensor& residual,
                      std::string_view activation, double slope, const OptionalTensor& valid) {
  TORCH_CHECK(!needs_graph(input, weight, bias, residual),
              "batch norm with inplace=True writes into its input, which autograd would need: call it under "
              "torch.no_grad(), or with inplace=False");
  at::AutoDispatchBelowAutograd below;
  inplace_op().call(input, weight, bias, running_mean, running_var, eps, residual, activation, slope, valid);
}

// Who has saved input for a backward of its own is to notice.
void inplace_version(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                     const Tensor& running_mean, const Tensor& running_var, double eps, const OptionalTensor& residual,
                     std::string_view activation, double slope, const OptionalTensor& valid) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    inplace_op().call(input, weight, bias, running_mean, running_var, eps, residual, activation, slope, valid);
  }
  torch::autograd::impl::bump_version(input);
}

TORCH_LIBRARY_IMPL(bn_ext, CompositeExplicitAutograd, m) { m.impl("batch_norm", batch_norm); }
TORCH_LIBRARY_IMPL(bn_ext, Autograd, m) {
  m.impl("batch_norm", batch_norm_autograd);
  m.impl("batch_norm_inference_", inplace_autograd);
}
TORCH_LIBRARY_IMPL(bn_ext, ADInplaceOrView, m) { m.impl("batch_norm_inference_", inplace_version); }

}  // namespace
}  // namespace bn_ext

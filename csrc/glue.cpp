#include "glue.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <charconv>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

namespace bn_ext {
DType dtype_of(at::ScalarType type, const char* what) {
  switch (type) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, '"', what, "\" not implemented for '", type, "'");
  }
}
DType dtype_of(const Tensor& t, const char* what) { return dtype_of(t.scalar_type(), what); }

at::TensorOptions statistics_options(const Tensor& input) {
  return input.options().dtype(input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
}

void check_defined(const Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.defined(), "argument '", name, "' must be Tensor, not None");
}

// The kernels read any element that sizes and strides speak of, so all of them must be there.
static void check_storage(const Tensor& t) {
  (void)t.unsafeGetTensorImpl()->data_ptr_impl<char>();  // raises in torch's words where there is no memory
  const size_t have = t.storage().nbytes(),
               need = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(), t.storage_offset());
  TORCH_CHECK(need <= have || t.numel() == 0, "setStorage: sizes ", t.sizes(), ", strides ", t.strides(),
              ", storage offset ", t.storage_offset(), ", and itemsize ", t.element_size(),
              " requiring a storage size of ", need, " are out of bounds for storage of size ", have);
}
const void* data_of(const Tensor& t) {
  check_storage(t);
  return t.const_data_ptr();
}
void* mutable_data_of(const Tensor& t) {
  check_storage(t);
  return t.mutable_data_ptr();
}

// Of a composition's argument, which may also be a tensor that only stands for others (fake, functional, batched).
static void check_composed(const Tensor& t, const Tensor& input, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided, '"', name, "\" not implemented for layout ", t.layout());
  TORCH_CHECK(t.device() == input.device(), "Tensor on device ", t.device(), " is not on the expected device ",
              input.device(), "!");
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  const bool stands_for =
      impl->key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
  if (impl->has_storage() && !t.is_meta() && !stands_for && !impl->has_symbolic_sizes_strides()) check_storage(t);
}
void check_plane(const OptionalTensor& t, const Tensor& input, const char* name) {
  if (!t.has_value() || !t->defined()) return;
  TORCH_CHECK(t->sym_sizes() == input.sym_sizes(), name, " should have the size of input, ", input.sym_sizes(),
              ", but has ", t->sym_sizes());
  check_composed(*t, input, name);
}
void check_vector(const OptionalTensor& t, const Tensor& input, const char* name) {
  if (!t.has_value() || !t->defined()) return;
  TORCH_CHECK(t->sym_numel() == input.sym_size(1), name, " should contain ", input.sym_size(1), " elements not ",
              t->sym_numel());
  check_composed(*t, input, name);
}

void check_saved(const Tensor& saved, const Tensor& input, int64_t rows) {
  check_defined(saved, "saved");
  TORCH_CHECK(saved.is_contiguous() && saved.dim() == 2 && saved.sym_size(0) == rows &&
                  saved.sym_size(1) == input.sym_size(1) && saved.scalar_type() == statistics_options(input).dtype(),
              "saved should be batch_norm_forward's contiguous (", rows, ", ", input.sym_size(1), ") tensor, but is ",
              saved.toString(), " of size ", saved.sym_sizes());
  check_composed(saved, input, "saved");
}

static TensorRef ref(const Tensor& t, void* data) {
  return {data, t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0};
}
TensorRef input_ref(const Tensor& t) { return ref(t, const_cast<void*>(data_of(t))); }
TensorRef output_ref(const Tensor& t) { return ref(t, t.mutable_data_ptr()); }

namespace {

Shape shape_of(const Tensor& input) {
  check_defined(input, "input");
  const int64_t dim = input.dim();
  TORCH_CHECK_VALUE(dim == 2 || dim == 3, "expected 2D or 3D input (got ", dim, "D input)");
  return {input.size(0), input.size(1), dim == 3 ? input.size(2) : 1};
}

// A per-channel vector that an op reads, or reads and writes. Any shape of the right number of elements will do.
VectorRef vector_ref(const OptionalTensor& given, const Tensor& input, const char* name, bool writes = false) {
  if (!given.has_value() || !given->defined()) return {};
  const Tensor& t = *given;
  TORCH_CHECK(t.numel() == input.size(1), name, " should contain ", input.size(1), " elements not ", t.numel());
  TORCH_CHECK(t.device() == input.device(), "Tensor on device ", t.device(), " is not on the expected device ",
              input.device(), "!");
  TORCH_CHECK(t.dim() == 1 || t.is_contiguous(), name, " of ", t.dim(), " dimensions should be contiguous");
  return {writes ? mutable_data_of(t) : const_cast<void*>(data_of(t)), dtype_of(t, "batch_norm"),
          t.dim() == 1 ? t.stride(0) : 1};
}

// Any mix of floating types is welcome; other types of parameters and statistics get native's words.
void check_vector_types(const Tensor& input, std::initializer_list<const OptionalTensor*> vectors) {
  bool first = true, mixed = false;
  for (const OptionalTensor* v : vectors) {
    if (!v->has_value() || !(*v)->defined()) continue;
    if (first) mixed = (*v)->scalar_type() != input.scalar_type();
    first = false;
    const auto type = (*v)->scalar_type();
    if (type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf) continue;
    TORCH_CHECK(!mixed, "mixed dtype (CPU): expect parameter to have scalar type of Float");
    TORCH_CHECK(false, "expected scalar type ", input.scalar_type(), " but found ", type);
  }
}

// A float as Python prints it.
std::string repr(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::general).ptr;
  std::string s(text, end);
  return s.find_first_of(".en") == std::string::npos ? s + ".0" : s;
}

std::string size_text(const Tensor& input) {
  std::ostringstream s;
  s << "torch.Size([";
  for (int64_t i = 0; i < input.dim(); ++i) s << (i ? ", " : "") << input.size(i);
  s << "])";
  return s.str();
}

void check_eps(double eps, bool training) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 12
  (void)training;
  TORCH_CHECK_VALUE(!(eps <= 0), "batch_norm eps must be positive, but got ", repr(eps));
#else
  if (training) {
    TORCH_CHECK_VALUE(!(eps <= 0), "batch_norm eps must be positive during training, but got ", repr(eps));
  }
  TORCH_CHECK_VALUE(!(eps < 0), "batch_norm eps must be non-negative, but got ", repr(eps));
#endif
}

bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// A tensor beside input, of its type.
Tensor like_input(const Tensor& t, const Tensor& input, const char* name) {
  check_defined(t, name);
  dtype_of(t, name);
  TORCH_CHECK(t.sizes() == input.sizes(), name, " should have the size of input, ", input.sizes(), ", but has ",
              t.sizes());
  TORCH_CHECK(t.device() == input.device(), "Tensor on device ", t.device(), " is not on the expected device ",
              input.device(), "!");
  return t.scalar_type() == input.scalar_type() ? t : t.to(input.scalar_type());
}

// The checks and allocations that both backward operators share; a gradient that is not wanted has no elements.
BackwardCall prepare_gradients(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                               std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  BackwardCall call;
  BackwardArgs& a = call.args;
  a.shape = shape_of(input);
  a.dtype = dtype_of(input, "batch_norm_backward");
  if (bias_dtype.has_value()) dtype_of(*bias_dtype, "bias_dtype");
  call.grad_output = like_input(grad_output, input, "grad_output");
  call.empty = input.numel() == 0;
  const auto none = [&] { return at::empty({0}, statistics_options(input)); };
  const auto parameter = [&](bool wanted, OptionalType dtype) {
    if (!wanted) return none();
    const bool given = has(weight);
    auto options = given ? weight->options() : statistics_options(input);
    if (dtype.has_value()) options = options.dtype(*dtype);
    const std::vector<int64_t> size = given ? weight->sizes().vec() : std::vector<int64_t>{a.shape.c};
    return call.empty ? at::zeros(size, options) : at::empty(size, options);
  };
  call.grad_input = output_mask[0] ? at::empty_like(input) : none();
  call.grad_weight = parameter(output_mask[1], {});
  call.grad_bias = parameter(output_mask[2], bias_dtype);
  if (call.empty) return call;
  a.weight = vector_ref(weight, input, "weight");
  a.dy = input_ref(call.grad_output);
  a.x = input_ref(input);
  if (output_mask[0]) a.dx = output_ref(call.grad_input);
  if (output_mask[1]) a.grad_weight = vector_ref(call.grad_weight, input, "grad_weight", true);
  if (output_mask[2]) a.grad_bias = vector_ref(call.grad_bias, input, "grad_bias", true);
  return call;
}

// The checks of forward's saved values, and of running statistics.
void set_saved(BackwardArgs* a, const Tensor& saved, const Tensor& input, int64_t rows = 3) {
  check_saved(saved, input, rows);
  a->saved = data_of(saved);
}
void set_running(BackwardArgs* a, const Tensor& running_mean, const Tensor& running_var, double eps,
                 const Tensor& input) {
  check_defined(running_mean, "running_mean");
  check_defined(running_var, "running_var");
  a->running_mean = vector_ref(running_mean, input, "running_mean");
  a->running_var = vector_ref(running_var, input, "running_var");
  a->eps = eps;
}

// The checks and allocations that both double backward operators share, which allocate what backward's do and one more.
DoubleBackwardCall prepare_second_gradients(const Arriving& arriving, const Tensor& grad_output, const Tensor& input,
                                            const OptionalTensor& weight, std::array<bool, 3> output_mask) {
  const BackwardCall first = prepare_gradients(grad_output, input, weight, {output_mask[1], output_mask[2], false}, {});
  DoubleBackwardCall call;
  static_cast<BackwardArgs&>(call.args) = first.args;
  call.grad_output = first.grad_output;
  call.grad_input = first.grad_input;
  call.grad_weight = first.grad_weight;
  call.empty = first.empty;
  if (has(arriving.input)) call.grad_grad_input = like_input(*arriving.input, input, "grad_grad_input");
  call.grad_grad_output = output_mask[0] ? at::empty_like(input) : first.grad_bias;
  if (call.empty) return call;
  if (has(arriving.input)) call.args.gg_x = input_ref(call.grad_grad_input);
  call.args.gg_weight = vector_ref(arriving.weight, input, "grad_grad_weight");
  call.args.gg_bias = vector_ref(arriving.bias, input, "grad_grad_bias");
  if (output_mask[0]) call.args.grad_dy = output_ref(call.grad_grad_output);
  return call;
}

// Whoever averages or converts all buffers of a model leaves a count of any type, on any device, even of any shape;
// torch then counts as nn.BatchNorm1d does. What it refuses is refused here, before anything has changed.
void prepare_count(ForwardCall* call, const Tensor& count, const Tensor& input, std::optional<double>* momentum) {
  constexpr const char* kByZero = "float division by zero";
  if (count.scalar_type() == at::kLong && count.numel() == 1 && count.device() == input.device()) {
    auto* counter = static_cast<int64_t*>(mutable_data_of(count));
    TORCH_CHECK(momentum->has_value() || !count.is_cpu() || *counter != -1, kByZero);
    if (call->empty) {
      call->count = count;
    } else {
      call->args.num_batches_tracked = counter;
    }
    return;
  }
  const Tensor next = at::add(count, 1);
  TORCH_CHECK(next.scalar_type() == count.scalar_type(), "result type ", c10::toString(next.scalar_type()),
              " can't be cast to the desired output type ", c10::toString(count.scalar_type()));
  at::assert_no_internal_overlap(count);
  call->count = count;
  if (momentum->has_value()) return;
  TORCH_CHECK_VALUE(count.numel() == 1, "only one element tensors can be converted to Python scalars");
  const auto batches = next.item().to<double>();
  TORCH_CHECK(batches != 0, kByZero);
  *momentum = 1 / batches;
}

}  // namespace

void ForwardCall::count_batch() const {
  if (count.defined()) Tensor(count).add_(1);
}

ForwardCall prepare_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                            int64_t saved_rows) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.shape = shape_of(input);
  TORCH_CHECK_VALUE(a.shape.count() != 1, "Expected more than 1 value per channel when training, got input size ",
                    size_text(input));
  check_eps(eps, true);
  call.empty = input.numel() == 0;
  if (!call.empty) {
    TORCH_CHECK_VALUE(has(running_mean) == has(running_var),
                      "running_mean and running_var must either both be None or neither be None");
    check_vector_types(input, {&weight, &bias, &running_mean, &running_var});
    a.running_mean = vector_ref(running_mean, input, "running_mean", true);
    a.running_var = vector_ref(running_var, input, "running_var", true);
    a.weight = vector_ref(weight, input, "weight");
    a.bias = vector_ref(bias, input, "bias");
  }
  a.dtype = dtype_of(input, "batch_norm");
  if (num_batches_tracked.has_value() && num_batches_tracked->defined()) {
    prepare_count(&call, *num_batches_tracked, input, &momentum);
  }
  a.cumulative = !momentum.has_value();
  a.momentum = momentum.value_or(0.0);
  a.eps = eps;
  call.output = at::empty_like(input);
  call.saved = call.empty ? at::zeros({saved_rows, a.shape.c}, statistics_options(input))
                          : at::empty({saved_rows, a.shape.c}, statistics_options(input));
  if (call.empty) return call;
  a.x = input_ref(input);
  a.y = output_ref(call.output);
  a.saved = call.saved.mutable_data_ptr();
  return call;
}

InferenceCall prepare_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const Tensor& running_mean, const Tensor& running_var, double eps,
                                const OptionalTensor& output) {
  InferenceCall call;
  InferenceArgs& a = call.args;
  a.shape = shape_of(input);
  check_defined(running_mean, "running_mean");
  check_defined(running_var, "running_var");
  check_eps(eps, false);
  call.empty = input.numel() == 0;
  if (!call.empty) {
    const OptionalTensor mean = running_mean, var = running_var;
    check_vector_types(input, {&weight, &bias, &mean, &var});
    a.running_mean = vector_ref(running_mean, input, "running_mean");
    a.running_var = vector_ref(running_var, input, "running_var");
    a.weight = vector_ref(weight, input, "weight");
    a.bias = vector_ref(bias, input, "bias");
  }
  a.dtype = dtype_of(input, "batch_norm");
  a.eps = eps;
  call.output = output.has_value() ? *output : at::empty_like(input);
  if (call.empty) return call;
  a.x = input_ref(input);
  a.y = output_ref(call.output);
  return call;
}

BackwardCall prepare_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, std::array<bool, 3> output_mask, OptionalType bias_dtype,
                              int64_t saved_rows) {
  BackwardCall call = prepare_gradients(grad_output, input, weight, output_mask, bias_dtype);
  set_saved(&call.args, saved, input, saved_rows);
  return call;
}

BackwardCall prepare_inference_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                        const Tensor& running_mean, const Tensor& running_var, double eps,
                                        std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  BackwardCall call = prepare_gradients(grad_output, input, weight, output_mask, bias_dtype);
  if (!call.empty) set_running(&call.args, running_mean, running_var, eps, input);
  return call;
}

DoubleBackwardCall prepare_double_backward(const Arriving& arriving, const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& weight, const Tensor& saved,
                                           std::array<bool, 3> output_mask) {
  DoubleBackwardCall call = prepare_second_gradients(arriving, grad_output, input, weight, output_mask);
  set_saved(&call.args, saved, input);
  return call;
}

DoubleBackwardCall prepare_inference_double_backward(const Arriving& arriving, const Tensor& grad_output,
                                                     const Tensor& input, const OptionalTensor& weight,
                                                     const Tensor& running_mean, const Tensor& running_var, double eps,
                                                     std::array<bool, 3> output_mask) {
  DoubleBackwardCall call = prepare_second_gradients(arriving, grad_output, input, weight, output_mask);
  if (!call.empty) set_running(&call.args, running_mean, running_var, eps, input);
  return call;
}

}  // namespace bn_ext

// The checked calls of checks.h: what each operator makes of its arguments.
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <charconv>
#include <cmath>
#include <initializer_list>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"

namespace bn_ext {
namespace {

Shape shape_of(const Tensor& input) {
  check_defined(input, "input");
  const int64_t dim = input.dim();
  TORCH_CHECK_VALUE(dim == 2 || dim == 3, "expected 2D or 3D input (got ", dim, "D input)");
  return {input.size(0), input.size(1), dim == 3 ? input.size(2) : 1};
}

// A per-channel vector that an op reads, or reads and writes. Any shape of the right number of elements will do.
VectorRef vector_ref(const OptionalTensor& given, const Tensor& input, const char* name, bool writes = false) {
  if (!has(given)) return {};
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
    if (!has(*v)) continue;
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
  if (call->args.batches.count > 1) {  // each has a share of its own, by a count that the kernels keep
    TORCH_CHECK_NOT_IMPLEMENTED(batches == std::floor(batches), "virtual batches with momentum=None and ", batches - 1,
                                " batches before them");
    call->counter = at::full({}, batches - 1, input.options().dtype(at::kLong));
    call->args.num_batches_tracked = call->counter.mutable_data_ptr<int64_t>();
    return;
  }
  *momentum = 1 / batches;
}

int64_t mask_size(const Tensor& input) { return mask_bytes(input.numel(), mask_elements(input)); }

Epilogue epilogue_of(const Tensor& input, const After& after) {
  check_defined(input, "input");
  Epilogue e;
  e.activation = activation_of(after.activation);
  e.negative_slope = after.negative_slope;
  if (!has(after.residual)) return e;
  const Tensor& residual = *after.residual;
  TORCH_CHECK(residual.sizes() == input.sizes(), "residual should have the size of input, ", input.sizes(),
              ", but has ", residual.sizes());
  TORCH_CHECK(residual.scalar_type() == input.scalar_type(), "residual should have the type of input, ",
              input.scalar_type(), ", but has ", residual.scalar_type());
  TORCH_CHECK(residual.device() == input.device(), "Tensor on device ", residual.device(),
              " is not on the expected device ", input.device(), "!");
  if (input.numel() > 0) e.residual = input_ref(residual);
  return e;
}

// A mask where backward will go by one, else no elements. On the CPU bits are set by rows that may share a byte: zeros.
Tensor make_mask(const Tensor& input, Epilogue* e) {
  const auto options = input.options().dtype(at::kByte);
  if (!by_sign(e->activation) || !e->residual) return at::empty({0}, options);
  Tensor mask = input.is_cpu() ? at::zeros({mask_size(input)}, options) : at::empty({mask_size(input)}, options);
  e->mask = mask.mutable_data_ptr<uint8_t>();
  return mask;
}

// Forward's mask: for this input and a function that goes by a sign, or without elements.
void check_mask(const Tensor& mask, const Tensor& input, Activation activation) {
  TORCH_CHECK(
      mask.scalar_type() == at::kByte && mask.layout() == at::kStrided && mask.device() == input.device() &&
          (mask.numel() == 0 ||
           (by_sign(activation) && mask.is_contiguous() && mask.dim() == 1 && mask.numel() == mask_size(input))),
      "mask should be batch_norm_forward's for this input, but is ", mask.toString(), " of size ", mask.sizes());
}

// Of no elements where no call looks into it: zero.
Tensor statistics_like(const Tensor& input, at::IntArrayRef size) {
  return input.numel() == 0 ? at::zeros(size, statistics_options(input)) : at::empty(size, statistics_options(input));
}

at::TensorOptions stage_options(const Tensor& input) { return input.options().dtype(at::kDouble); }

// The results of a stage that all parts of a batch have brought together; returns what keeps them alive.
Tensor set_given(Stage* stage, const Tensor& given, const Tensor& input, int64_t rows, const char* name) {
  TORCH_CHECK(given.dim() == 3 && given.size(0) > 0 && given.size(1) == rows && given.size(2) == input.size(1) &&
                  given.scalar_type() == at::kDouble && given.device() == input.device() &&
                  given.layout() == at::kStrided,
              name, " should be a float64 tensor of size (parts, ", rows, ", ", input.size(1), ") on ", input.device(),
              ", but is ", given.toString(), " of size ", given.sizes(), " on ", given.device());
  (void)data_of(given);
  const Tensor dense = given.contiguous();
  stage->given = static_cast<const double*>(data_of(dense));
  stage->parts = dense.size(0);
  return dense;
}

// A stage's result, of an input without elements: zero.
Tensor make_result(Stage* stage, const Tensor& input, int64_t rows) {
  const auto options = stage_options(input);
  const Tensor result =
      input.numel() == 0 ? at::zeros({rows, input.size(1)}, options) : at::empty({rows, input.size(1)}, options);
  stage->result = static_cast<double*>(result.mutable_data_ptr());
  return result;
}

// What both forwards share: checks and views of the per-channel vectors.
void set_vectors(ForwardArgs* a, const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const OptionalTensor& mean, const OptionalTensor& var) {
  check_vector_types(input, {&weight, &bias, &mean, &var});
  a->running_mean = vector_ref(mean, input, "running_mean", a->training);
  a->running_var = vector_ref(var, input, "running_var", a->training);
  a->weight = vector_ref(weight, input, "weight");
  a->bias = vector_ref(bias, input, "bias");
}

// What both forwards share: what they write.
void set_outputs(ForwardCall* call, const Tensor& input, const After& after, bool saves, const OptionalTensor& output,
                 int64_t virtual_batch_size = 0) {
  ForwardArgs& a = call->args;
  call->output = output.has_value() ? *output : at::empty_like(input);
  if (saves) {
    const int64_t batches = most_virtual_batches(a.shape.n, virtual_batch_size);
    call->saved = statistics_like(input, {kSavedRows * batches, a.shape.c});
    if (a.batches.count < batches && !call->empty) call->saved.slice(0, kSavedRows * a.batches.count).zero_();
    // A mask's bytes hold elements of neighbouring batches: of virtual ones backward computes the argument anew.
    call->mask =
        virtual_batch_size == 0 ? make_mask(input, &a.epilogue) : at::empty({0}, input.options().dtype(at::kByte));
    a.saved = call->saved.mutable_data_ptr();
  }
  if (call->empty) return;
  if (input.numel() == 0) {  // a part without values, whose batch has some: the kernels then look at no element
    a.shape = {1, a.shape.c, 1};
    a.x = {a.saved, a.shape.c, 1, 1};
    return;
  }
  if (a.epilogue.residual) call->residual = *after.residual;
  a.x = input_ref(input);
  a.y = output_ref(call->output);
}

}  // namespace

void ForwardCall::count_batch() const {
  if (count.defined()) Tensor(count).add_(args.batches.count);
}

ForwardCall prepare_training(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                             const After& after, const OptionalTensor& moments, int64_t virtual_batch_size) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.epilogue = epilogue_of(input, after);
  a.shape = shape_of(input);
  const bool part = has(moments);
  TORCH_CHECK_VALUE(!part || virtual_batch_size == 0, "virtual batches are whole ones, not parts with moments");
  TORCH_CHECK_VALUE(part || a.shape.count() != 1,
                    "Expected more than 1 value per channel when training, got input size ", size_text(input));
  a.batches = virtual_batches(a.shape, input.dim(), virtual_batch_size);
  check_eps(eps, true);
  call.empty = input.numel() == 0 && (!part || a.shape.c == 0);
  if (part) call.merged = set_given(&a.stage, *moments, input, kMomentRows, "moments");
  if (!call.empty) {
    TORCH_CHECK_VALUE(has(running_mean) == has(running_var),
                      "running_mean and running_var must either both be None or neither be None");
    set_vectors(&a, input, weight, bias, running_mean, running_var);
  }
  a.dtype = dtype_of(input, "batch_norm");
  if (has(num_batches_tracked)) prepare_count(&call, *num_batches_tracked, input, &momentum);
  a.cumulative = !momentum.has_value();
  a.momentum = momentum.value_or(0.0);
  a.eps = eps;
  set_outputs(&call, input, after, true, {}, virtual_batch_size);
  return call;
}

ForwardCall prepare_moments(const Tensor& input) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.shape = shape_of(input);
  a.dtype = dtype_of(input, "batch_norm");
  call.empty = input.numel() == 0;
  call.output = make_result(&a.stage, input, kMomentRows);
  if (!call.empty) a.x = input_ref(input);
  return call;
}

ForwardCall prepare_evaluation(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const Tensor& mean, const Tensor& var, double eps, const After& after, bool saves,
                               const OptionalTensor& output) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.training = false;
  a.epilogue = epilogue_of(input, after);
  a.shape = shape_of(input);
  check_defined(mean, "running_mean");
  check_defined(var, "running_var");
  check_eps(eps, false);
  call.empty = input.numel() == 0;
  if (!call.empty) set_vectors(&a, input, weight, bias, mean, var);
  a.dtype = dtype_of(input, "batch_norm");
  a.eps = eps;
  set_outputs(&call, input, after, saves, output);
  return call;
}

BackwardCall prepare_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, bool training, std::array<bool, 4> output_mask,
                              OptionalType bias_dtype, const OptionalTensor& mask, const After& after,
                              const OptionalTensor& sums, int64_t virtual_batch_size) {
  BackwardCall call;
  BackwardArgs& a = call.args;
  const Epilogue epilogue = epilogue_of(input, after);
  a.training = training;
  a.shape = shape_of(input);
  a.dtype = dtype_of(input, "batch_norm_backward");
  if (bias_dtype.has_value()) dtype_of(*bias_dtype, "bias_dtype");
  call.grad_output = like_input(grad_output, input, "grad_output");
  call.empty = input.numel() == 0;
  check_saved(saved, input, virtual_batch_size);
  TORCH_CHECK_VALUE(virtual_batch_size == 0 || (training && !has(sums)), "virtual batches are whole ones, in training");
  a.batches = virtual_batches(a.shape, input.dim(), virtual_batch_size);
  if (epilogue.activates()) a.epilogue = epilogue;
  if (has(mask)) {
    check_mask(*mask, input, epilogue.activation);
    if (mask->numel() > 0) a.epilogue.mask = static_cast<uint8_t*>(const_cast<void*>(data_of(*mask)));
  }
  if (has(sums)) {
    TORCH_CHECK_VALUE(training && !output_mask[1] && !output_mask[2],
                      "sums are those of a batch in training; the gradients of weight and bias are its parts' own");
    call.sums = set_given(&a.stage, *sums, input, kSumRows, "sums");
  }
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
  call.grad_residual = output_mask[3] ? at::empty_like(input) : none();
  if (call.empty) return call;
  a.weight = vector_ref(weight, input, "weight");
  a.dy = input_ref(call.grad_output);
  a.x = input_ref(input);
  a.saved = data_of(saved);
  if (output_mask[3]) {
    if (epilogue.activates()) {
      a.grad_residual = output_ref(call.grad_residual);
    } else {
      call.grad_residual.copy_(call.grad_output);
    }
  }
  if (output_mask[0]) {
    a.dx = output_ref(call.grad_input);
  } else if (epilogue.activates()) {  // the output's strides all the same
    a.dx = output_ref(output_mask[3] ? call.grad_residual : at::empty_like(input));
    a.dx.data = nullptr;
  }
  if (output_mask[1]) a.grad_weight = vector_ref(call.grad_weight, input, "grad_weight", true);
  if (output_mask[2]) a.grad_bias = vector_ref(call.grad_bias, input, "grad_bias", true);
  return call;
}

BackwardCall prepare_sums(const Tensor& grad_output, const Tensor& input, const Tensor& saved,
                          const OptionalTensor& mask, const After& after) {
  BackwardCall call = prepare_backward(grad_output, input, {}, saved, true, {}, {}, mask, after);
  call.sums = make_result(&call.args.stage, input, kSumRows);
  return call;
}

// The checks and allocations of a backward, and one tensor more.
DoubleBackwardCall prepare_double_backward(const Arriving& arriving, const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& weight, const Tensor& saved, bool training,
                                           std::array<bool, 3> output_mask) {
  const OptionalTensor none;
  const BackwardCall first =
      prepare_backward(grad_output, input, weight, saved, training, {output_mask[1], output_mask[2], false, false}, {},
                       none, {none, "identity", 0});
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

}  // namespace bn_ext

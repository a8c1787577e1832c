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

#include "views.h"

namespace bn_ext {
namespace {

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

// Whoever averages or converts all buffers of a model leaves a count of any type, on any device, even of any shape;
// torch then counts as nn.BatchNorm1d does. What it refuses is refused here, before anything has changed.
void prepare_count(ForwardCall* call, const Tensor& count, const Tensor& input, std::optional<double>* momentum) {
  constexpr const char* kByZero = "float division by zero";
  constexpr const char* kOfTorch = "virtual batches are cut by torch with ";
  if (count.scalar_type() == at::kLong && count.numel() == 1 && count.device() == input.device()) {
    auto* counter = static_cast<int64_t*>(mutable_data_of(count));
    // A piece would divide by it.
    const bool reaches_zero =
        count.is_cpu() && *counter < 0 && *counter >= -call->args.batches.count && !recomputations();
    TORCH_CHECK(momentum->has_value() || !reaches_zero, kByZero);
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
  const auto pieces = static_cast<double>(call->args.batches.count);
  const bool reaches_zero = batches <= 0 && batches > -pieces && batches == std::floor(batches);
  TORCH_CHECK(!reaches_zero || recomputations(), kByZero);
  if (pieces > 1) {  // each has a share of its own, by a count that the kernels keep
    const auto type = count.scalar_type();
    TORCH_CHECK_NOT_IMPLEMENTED((type == at::kLong || type == at::kInt || type == at::kDouble || type == at::kFloat) &&
                                    std::abs(batches) < (1 << 24) - pieces && batches == std::floor(batches),
                                kOfTorch, "momentum=None and a num_batches_tracked that only torch counts on");
    call->counter = at::full({}, batches - 1, input.options().dtype(at::kLong));
    call->args.num_batches_tracked = call->counter.mutable_data_ptr<int64_t>();
    return;
  }
  *momentum = 1 / batches;
}

// A mask where backward will go by one, else no elements. On the CPU bits are set by rows that may share a byte: zeros.
Tensor make_mask(const Tensor& input, Epilogue* e, const VirtualBatches& batches, int64_t virtual_batch_size) {
  const auto options = input.options().dtype(at::kByte);
  if (!by_sign(e->activation) || !e->residual) return at::empty({0}, options);
  const int64_t size = mask_size(input, virtual_batch_size);
  Tensor mask = input.is_cpu() ? at::zeros({size}, options) : at::empty({size}, options);
  set_mask(e, mask.mutable_data_ptr<uint8_t>(), input, batches);
  return mask;
}

// Of no elements where no call looks into it: zero.
Tensor statistics_like(const Tensor& input, at::IntArrayRef size) {
  return input.numel() == 0 ? at::zeros(size, statistics_options(input)) : at::empty(size, statistics_options(input));
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
    const int64_t batches = most_virtual_batches(a.shape.n, virtual_batch_size), rows = saved_rows(a.renormalised());
    call->saved = statistics_like(input, {rows * batches, a.shape.c});
    if (a.batches.count < batches && !call->empty) call->saved.slice(0, rows * a.batches.count).zero_();
    call->mask = make_mask(input, &a.epilogue, a.batches, virtual_batch_size);
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

// What r and d of a renormalised batch go by: what is there before it moves, also where a recomputation moves nothing.
void set_renorm(ForwardCall* call, const Tensor& input, const Tensor& mean, const Tensor& var,
                const OptionalTensor& count) {
  ForwardArgs& a = call->args;
  call->renorm_mean = mean;
  call->renorm_var = var;
  a.renorm.mean = a.running_mean;
  a.renorm.var = a.running_var;
  if (a.renorm.warmup_steps == 0) return;
  if (!a.num_batches_tracked) {  // torch counts, in another type or elsewhere
    TORCH_CHECK_VALUE(count->numel() == 1, "only one element tensors can be converted to Python scalars");
    call->counter = count->detach().to(input.device(), at::kLong, /*non_blocking=*/false, /*copy=*/true);
    a.num_batches_tracked = static_cast<int64_t*>(call->counter.mutable_data_ptr());
  }
  call->renorm_count = call->counter.defined() ? call->counter : *count;
  a.renorm.batches = a.num_batches_tracked;
}

// After the checks, which decide what computes: that has to be what it was in forward.
void keep_statistics(ForwardCall* call) {
  call->args.running_mean = call->args.running_var = {};
  call->args.num_batches_tracked = nullptr;
  call->count = Tensor();
}

}  // namespace

int& recomputations() {
  thread_local int depth = 0;
  return depth;
}

void ForwardCall::count_batch() const {
  // One by one, as narrow types round.
  for (int64_t i = 0; count.defined() && i < args.batches.count; ++i) Tensor(count).add_(1);
}

ForwardCall prepare_training(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                             const After& after, const OptionalTensor& moments, int64_t virtual_batch_size,
                             const OptionalTensor& valid, const OptionalNumbers& renorm) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.epilogue = epilogue_of(input, after);
  a.shape = shape_of(input);
  const bool part = has(moments);
  TORCH_CHECK_VALUE(!part || virtual_batch_size == 0, "virtual batches are whole ones, not parts with moments");
  TORCH_CHECK_VALUE(!part || !has(valid), "a padded batch is a whole one, not a part with moments");
  TORCH_CHECK_VALUE(!part || !renorm.has_value(), "a renormalised batch is a whole one, not a part with moments");
  call.valid = set_valid(&a.valid, valid, input);
  const auto check_count = [&](const Valid& v, const Shape& shape) {
    const bool known = !v || input.is_cpu();  // without waiting for a device
    TORCH_CHECK_VALUE(shape.count() != 1 && (!known || valid_count(v, shape) != 1),
                      "Expected more than 1 value per channel when training, got input size ", size_text(input));
  };
  if (!part) check_count(a.valid, a.shape);
  a.batches = virtual_batches(a.shape, input.dim(), virtual_batch_size);
  for (int64_t i = 0; has(valid) && a.batches.count > 1 && i < a.batches.count; ++i) {
    const ForwardArgs one = virtual_batch(a, i);
    check_count(one.valid, one.shape);
  }
  check_eps(eps, true);
  call.empty = input.numel() == 0 && (!part || a.shape.c == 0);
  if (part) call.merged = set_given(&a.stage, *moments, input, kMomentRows, "moments");
  if (!call.empty) {
    TORCH_CHECK_VALUE(has(running_mean) == has(running_var),
                      "running_mean and running_var must either both be None or neither be None");
    set_vectors(&a, input, weight, bias, running_mean, running_var);
  }
  a.dtype = dtype_of(input, "batch_norm");
  if (renorm.has_value()) {
    a.renorm = renorm_of(renorm);
    TORCH_CHECK_VALUE(has(running_mean) && has(running_var),
                      "batch renormalisation goes by running_mean and running_var: it needs both");
    TORCH_CHECK_VALUE(a.renorm.warmup_steps == 0 || has(num_batches_tracked),
                      "warmup_steps are counted by num_batches_tracked, which is None");
  }
  if (has(num_batches_tracked)) prepare_count(&call, *num_batches_tracked, input, &momentum);
  if (renorm.has_value() && !call.empty) set_renorm(&call, input, *running_mean, *running_var, num_batches_tracked);
  a.cumulative = !momentum.has_value();
  a.momentum = momentum.value_or(0.0);
  a.eps = eps;
  if (recomputations()) keep_statistics(&call);
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
                               const OptionalTensor& valid, const OptionalTensor& output) {
  ForwardCall call;
  ForwardArgs& a = call.args;
  a.training = false;
  a.epilogue = epilogue_of(input, after);
  a.shape = shape_of(input);
  check_defined(mean, "running_mean");
  check_defined(var, "running_var");
  check_eps(eps, false);
  call.valid = set_valid(&a.valid, valid, input);
  call.empty = input.numel() == 0;
  if (!call.empty) set_vectors(&a, input, weight, bias, mean, var);
  a.dtype = dtype_of(input, "batch_norm");
  a.eps = eps;
  set_outputs(&call, input, after, saves, output);
  return call;
}

}  // namespace bn_ext

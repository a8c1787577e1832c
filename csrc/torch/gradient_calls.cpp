// The checked calls of checks.h that go back: gradients, their sums, and second derivatives.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <vector>

#include "padding.h"
#include "views.h"

namespace bn_ext {

// Forward's mask: for this input and a function that goes by a sign, or without elements.
static void check_mask(const Tensor& mask, const Tensor& input, Activation activation, int64_t virtual_batch_size) {
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.layout() == at::kStrided && mask.device() == input.device() &&
                  (mask.numel() == 0 || (by_sign(activation) && mask.is_contiguous() && mask.dim() == 1 &&
                                         mask.numel() == mask_size(input, virtual_batch_size))),
              "mask should be batch_norm_forward's for this input, but is ", mask.toString(), " of size ",
              mask.sizes());
}

BackwardCall prepare_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, bool training, std::array<bool, 4> output_mask,
                              OptionalType bias_dtype, const OptionalTensor& mask, const After& after,
                              const OptionalTensor& sums, int64_t virtual_batch_size, const OptionalTensor& valid,
                              bool renorm) {
  BackwardCall call;
  BackwardArgs& a = call.args;
  const Epilogue epilogue = epilogue_of(input, after);
  a.training = training;
  a.shape = shape_of(input);
  a.dtype = dtype_of(input, "batch_norm_backward");
  if (bias_dtype.has_value()) dtype_of(*bias_dtype, "bias_dtype");
  call.grad_output = like_input(grad_output, input, "grad_output");
  call.empty = input.numel() == 0;
  TORCH_CHECK_VALUE(!has(valid) || !has(sums), "a padded batch is a whole one, not a part with sums");
  call.valid = set_valid(&a.valid, valid, input);
  check_saved(saved, input, virtual_batch_size, renorm);
  TORCH_CHECK_VALUE(!renorm || (training && !has(sums)), "renormalised batches are whole ones, in training");
  a.by_renorm = renorm;
  TORCH_CHECK_VALUE(virtual_batch_size == 0 || (training && !has(sums)), "virtual batches are whole ones, in training");
  a.batches = virtual_batches(a.shape, input.dim(), virtual_batch_size);
  if (epilogue.activates()) a.epilogue = epilogue;
  if (has(mask)) {
    check_mask(*mask, input, epilogue.activation, virtual_batch_size);
    if (mask->numel() > 0)
      set_mask(&a.epilogue, static_cast<uint8_t*>(const_cast<void*>(data_of(*mask))), input, a.batches);
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
      call.grad_residual.copy_(has(valid) ? where_valid(call.grad_output, *valid) : call.grad_output);
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

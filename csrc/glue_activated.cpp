#include "glue_activated.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <vector>

namespace bn_ext {
namespace {

bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }

int64_t mask_size(const Tensor& input) { return mask_bytes(input.numel(), mask_elements(input)); }

Epilogue epilogue_of(const Tensor& input, const OptionalTensor& residual, std::string_view activation, double slope) {
  check_defined(input, "input");
  Epilogue e;
  e.activation = activation_of(activation);
  e.negative_slope = slope;
  if (!has(residual)) return e;
  TORCH_CHECK(residual->sizes() == input.sizes(), "residual should have the size of input, ", input.sizes(),
              ", but has ", residual->sizes());
  TORCH_CHECK(residual->scalar_type() == input.scalar_type(), "residual should have the type of input, ",
              input.scalar_type(), ", but has ", residual->scalar_type());
  TORCH_CHECK(residual->device() == input.device(), "Tensor on device ", residual->device(),
              " is not on the expected device ", input.device(), "!");
  if (input.numel() > 0) e.residual = input_ref(*residual);
  return e;
}

// A mask where backward will go by one, else no elements. On the CPU bits are set by rows that may share a byte: zeros.
Tensor make_mask(const Tensor& input, Epilogue* e, bool wanted) {
  const auto options = input.options().dtype(at::kByte);
  if (!wanted || !by_sign(e->activation) || !e->residual) return at::empty({0}, options);
  Tensor mask = input.is_cpu() ? at::zeros({mask_size(input)}, options) : at::empty({mask_size(input)}, options);
  e->mask = mask.mutable_data_ptr<uint8_t>();
  return mask;
}

}  // namespace

int64_t mask_elements(const Tensor& input) {
  return input.is_cuda() ? cuda_mask_elements(static_cast<int>(input.element_size())) : kCpuMaskElements;
}

Activation activation_of(std::string_view name) {
  if (name == "identity") return Activation::kIdentity;
  if (name == "relu") return Activation::kReLU;
  if (name == "leaky_relu") return Activation::kLeakyReLU;
  if (name == "silu") return Activation::kSiLU;
  TORCH_CHECK_VALUE(name == "gelu", "activation should be identity, relu, leaky_relu, silu or gelu, but is ", name);
  return Activation::kGELU;
}

void check_mask(const Tensor& mask, const Tensor& input, Activation activation) {
  check_defined(mask, "mask");
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.layout() == at::kStrided && mask.device() == input.device() &&
                  (mask.sym_numel() == 0 ||
                   (by_sign(activation) && mask.is_contiguous() && mask.dim() == 1 &&
                    (input.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || mask.numel() == mask_size(input)))),
              "mask should be batch_norm_act_forward's for this input, but is ", mask.toString(), " of size ",
              mask.sym_sizes());
}

ActivatedForwardCall prepare_activated_forward(const Tensor& input, const OptionalTensor& residual,
                                               const OptionalTensor& weight, const OptionalTensor& bias,
                                               const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                               const OptionalTensor& num_batches_tracked,
                                               std::optional<double> momentum, double eps, std::string_view activation,
                                               double negative_slope, bool save_mask) {
  Epilogue epilogue = epilogue_of(input, residual, activation, negative_slope);
  ForwardCall plain =
      prepare_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, kSavedRows);
  Tensor mask = make_mask(input, &epilogue, save_mask);
  return {{plain.args, epilogue}, plain, mask};
}

ActivatedInferenceCall prepare_activated_inference(const Tensor& input, const OptionalTensor& residual,
                                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                                   const Tensor& running_mean, const Tensor& running_var, double eps,
                                                   std::string_view activation, double negative_slope, bool save,
                                                   const OptionalTensor& output) {
  Epilogue epilogue = epilogue_of(input, residual, activation, negative_slope);
  InferenceCall plain = prepare_inference(input, weight, bias, running_mean, running_var, eps, output);
  Tensor mask = make_mask(input, &epilogue, save);
  const std::vector<int64_t> size =
      save ? std::vector<int64_t>{kSavedRows, plain.args.shape.c} : std::vector<int64_t>{0};
  Tensor saved = plain.empty ? at::zeros(size, statistics_options(input)) : at::empty(size, statistics_options(input));
  return {{plain.args, epilogue, save ? saved.mutable_data_ptr() : nullptr}, plain.output, saved, mask, plain.empty};
}

Tensor laid_as(const Tensor& residual, const Tensor& output) {
  const bool aligned = reinterpret_cast<uintptr_t>(residual.const_data_ptr()) % 16 == 0;
  if (aligned && residual.strides() == output.strides()) return residual;
  Tensor laid = at::empty_like(output);
  laid.copy_(residual);
  return laid;
}

Tensor output_in_place(const Tensor& input, const OptionalTensor& residual,
                       std::initializer_list<const OptionalTensor*> vectors) {
  check_defined(input, "input");
  at::assert_no_internal_overlap(input);
  bool apart = input.is_non_overlapping_and_dense();
  if (has(residual)) {
    at::assert_no_partial_overlap(input, *residual);
    // Torch compares dense tensors alone; of the others it cannot tell.
    apart = apart && (!residual->is_alias_of(input) ||
                      at::get_overlap_status(input, *residual) != at::MemOverlapStatus::TooHard);
  }
  for (const OptionalTensor* v : vectors) apart = apart && !(has(*v) && (*v)->is_alias_of(input));
  return apart ? input : at::empty_like(input);
}

ActivatedBackwardCall prepare_activated_backward(const Tensor& grad_output, const Tensor& input,
                                                 const OptionalTensor& residual, const Tensor& mask,
                                                 const OptionalTensor& weight, const Tensor& saved, bool training,
                                                 std::string_view activation, double negative_slope,
                                                 std::array<bool, 4> output_mask, OptionalType bias_dtype) {
  check_defined(mask, "mask");
  Epilogue epilogue = epilogue_of(input, residual, activation, negative_slope);
  BackwardCall plain = prepare_backward(grad_output, input, weight, saved,
                                        {output_mask[0], output_mask[2], output_mask[3]}, bias_dtype, kSavedRows);
  check_mask(mask, input, epilogue.activation);
  if (mask.numel() > 0) {
    epilogue.mask = static_cast<uint8_t*>(const_cast<void*>(data_of(mask)));
  }
  ActivatedBackwardCall call{{plain.args, epilogue, training, {}}, plain, Tensor()};
  call.grad_residual = output_mask[1] ? at::empty_like(input) : at::empty({0}, input.options());
  if (plain.empty) return call;
  if (output_mask[1]) call.args.grad_residual = output_ref(call.grad_residual);
  if (!output_mask[0]) {
    call.args.dx = output_ref(output_mask[1] ? call.grad_residual : at::empty_like(input));  // its strides count
    call.args.dx.data = nullptr;
  }
  return call;
}

}  // namespace bn_ext

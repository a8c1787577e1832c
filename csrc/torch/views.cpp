#include "views.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace bn_ext {

Shape shape_of(const Tensor& input) {
  check_defined(input, "input");
  const int64_t dim = input.dim();
  TORCH_CHECK_VALUE(dim == 2 || dim == 3, "expected 2D or 3D input (got ", dim, "D input)");
  return {input.size(0), input.size(1), dim == 3 ? input.size(2) : 1};
}

VectorRef vector_ref(const OptionalTensor& given, const Tensor& input, const char* name, bool writes) {
  if (!has(given)) return {};
  const Tensor& t = *given;
  TORCH_CHECK(t.numel() == input.size(1), name, " should contain ", input.size(1), " elements not ", t.numel());
  check_device(t, input, name);
  TORCH_CHECK(t.dim() == 1 || t.is_contiguous(), name, " of ", t.dim(), " dimensions should be contiguous");
  return {writes ? mutable_data_of(t) : const_cast<void*>(data_of(t)), dtype_of(t, "batch_norm"),
          t.dim() == 1 ? t.stride(0) : 1};
}

Tensor like_input(const Tensor& t, const Tensor& input, const char* name) {
  check_defined(t, name);
  dtype_of(t, name);
  TORCH_CHECK(t.sizes() == input.sizes(), name, " should have the size of input, ", input.sizes(), ", but has ",
              t.sizes());
  check_device(t, input, name);
  return t.scalar_type() == input.scalar_type() ? t : t.to(input.scalar_type());
}

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
  check_device(residual, input, "residual");
  if (input.numel() > 0) e.residual = input_ref(residual);
  return e;
}

int64_t mask_size(const Tensor& input, int64_t virtual_batch_size) {
  const int64_t numel = input.numel(), elements = mask_elements(input);
  if (virtual_batch_size == 0) return mask_bytes(numel, elements);
  return mask_bytes_cut(numel, most_virtual_batches(input.size(0), virtual_batch_size), elements);
}

void set_mask(Epilogue* e, uint8_t* mask, const Tensor& input, const VirtualBatches& batches) {
  e->mask = mask;
  const int64_t sample = input.numel() / std::max<int64_t>(input.size(0), 1);
  e->mask_step = mask_step(batches.size * sample, mask_elements(input));
}

Tensor set_valid(Valid* valid, const OptionalTensor& given, const Tensor& input) {
  if (!has(given)) return {};
  const Tensor& t = *given;
  const bool mask = t.scalar_type() == at::kBool;
  check_valid(t, input);
  (void)data_of(t);
  const Tensor kept = (mask ? t : t.to(at::kLong)).contiguous();
  if (mask) {
    valid->mask = static_cast<const uint8_t*>(kept.const_data_ptr());
    return kept;
  }
  valid->lengths = kept.const_data_ptr<int64_t>();
  const int64_t length = input.size(2);
  for (int64_t n = 0; input.is_cpu() && n < kept.numel(); ++n) {
    TORCH_CHECK_VALUE(valid->lengths[n] >= 0 && valid->lengths[n] <= length, "lengths should be from 0 to ", length,
                      ", but there is ", valid->lengths[n]);
  }
  return kept;
}

static at::TensorOptions stage_options(const Tensor& input) { return input.options().dtype(at::kDouble); }

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

Tensor make_result(Stage* stage, const Tensor& input, int64_t rows) {
  const auto options = stage_options(input);
  const Tensor result =
      input.numel() == 0 ? at::zeros({rows, input.size(1)}, options) : at::empty({rows, input.size(1)}, options);
  stage->result = static_cast<double*>(result.mutable_data_ptr());
  return result;
}

}  // namespace bn_ext

#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/Exception.h>

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
  if (!has(t)) return;
  TORCH_CHECK(t->sym_sizes() == input.sym_sizes(), name, " should have the size of input, ", input.sym_sizes(),
              ", but has ", t->sym_sizes());
  check_composed(*t, input, name);
}
void check_vector(const OptionalTensor& t, const Tensor& input, const char* name) {
  if (!has(t)) return;
  TORCH_CHECK(t->sym_numel() == input.sym_size(1), name, " should contain ", input.sym_size(1), " elements not ",
              t->sym_numel());
  check_composed(*t, input, name);
}

void check_saved(const Tensor& saved, const Tensor& input, int64_t virtual_batch_size) {
  check_defined(saved, "saved");
  // Symbolic in a graph that is being traced, where nothing is cut.
  const c10::SymInt rows = virtual_batch_size == 0
                               ? c10::SymInt(kSavedRows)
                               : c10::SymInt(kSavedRows * most_virtual_batches(input.size(0), virtual_batch_size));
  TORCH_CHECK(saved.is_contiguous() && saved.dim() == 2 && saved.sym_size(0) == rows &&
                  saved.sym_size(1) == input.sym_size(1) && saved.scalar_type() == statistics_options(input).dtype(),
              "saved should be batch_norm_forward's contiguous (", rows, ", ", input.sym_size(1), ") tensor, but is ",
              saved.toString(), " of size ", saved.sym_sizes());
  check_composed(saved, input, "saved");
}

void check_virtual_batch_size(int64_t size) {
  TORCH_CHECK_VALUE(size >= 0, "virtual_batch_size should be at least 1, but is ", size);
}

VirtualBatches virtual_batches(const Shape& shape, int64_t dim, int64_t size) {
  check_virtual_batch_size(size);
  const VirtualBatches batches = cut(shape, size);
  TORCH_CHECK_VALUE(batches.count == 1 || batches.size * shape.l != 1,
                    "Expected more than 1 value per channel when training, got input size torch.Size([1, ", shape.c,
                    dim == 3 ? ", 1])" : "])");
  return batches;
}

bool samples_lie_apart(const Tensor& input) {
  if (input.dim() != 3 || input.is_contiguous()) return true;
  const Tensor output = at::empty_like(input);
  return output.stride(0) >= output.stride(1) && output.stride(0) >= output.stride(2);
}

static TensorRef ref(const Tensor& t, void* data) {
  return {data, t.stride(0), t.stride(1), t.dim() == 3 ? t.stride(2) : 0};
}
TensorRef input_ref(const Tensor& t) { return ref(t, const_cast<void*>(data_of(t))); }
TensorRef output_ref(const Tensor& t) { return ref(t, t.mutable_data_ptr()); }

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

}  // namespace bn_ext

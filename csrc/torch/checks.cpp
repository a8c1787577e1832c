#include "checks.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <c10/util/Exception.h>

#include <cmath>

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

// In the words that torch has for a GPU's operators, and those that it has for all others.
void check_device(const Tensor& t, const Tensor& input, const char* name) {
  const at::Device mine = t.device(), wanted = input.device();
  if (mine == wanted) return;
  TORCH_CHECK(!mine.is_cuda() && !wanted.is_cuda(), "Expected all tensors to be on the same device, but got ", name,
              " is on ", mine, ", different from other tensors on ", wanted,
              " (when checking argument in method bn_ext::batch_norm)");
  TORCH_CHECK(false, "Tensor on device ", mine, " is not on the expected device ", wanted, "!");
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

// Fake and functional tensors, and what has no sizes yet.
static bool stands_for_others(const Tensor& t) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  return impl->has_symbolic_sizes_strides() ||
         impl->key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Functionalize}));
}

// Of a composition's argument, which may also be a tensor that only stands for others (fake, functional, batched).
static void check_composed(const Tensor& t, const Tensor& input, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided, '"', name, "\" not implemented for layout ", t.layout());
  check_device(t, input, name);
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (impl->has_storage() && !t.is_meta() && !stands_for_others(t)) check_storage(t);
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

void check_valid(const Tensor& t, const Tensor& input) {
  const auto size = input.sym_sizes();
  const auto type = t.scalar_type();
  const char* const name = type == at::kBool ? "mask" : "lengths";
  check_device(t, input, name);
  TORCH_CHECK_NOT_IMPLEMENTED(t.layout() == at::kStrided, '"', name, "\" not implemented for layout ", t.layout());
  if (type == at::kBool) {
    const bool fits = t.dim() == input.dim() - 1 && t.sym_size(0) == size[0] &&
                      (input.dim() == 2 || (t.dim() == 2 && t.sym_size(1) == size[2]));
    TORCH_CHECK_VALUE(fits, "mask should have the size of input, ", size, ", without its channels, but has ",
                      t.sym_sizes());
    return;
  }
  TORCH_CHECK_TYPE(c10::isIntegralType(type, false), "lengths should be integers and a mask booleans, but are ", type);
  TORCH_CHECK_VALUE(input.dim() == 3, "lengths are for input of size (N, C, L), but that has ", size);
  TORCH_CHECK_VALUE(t.dim() == 1 && t.sym_size(0) == size[0], "lengths should be of size [", size[0], "], but are of ",
                    t.sym_sizes());
}

void check_saved(const Tensor& saved, const Tensor& input, int64_t virtual_batch_size, bool renorm) {
  check_defined(saved, "saved");
  // Symbolic in a graph that is being traced, where nothing is cut.
  const int64_t each = saved_rows(renorm);
  const c10::SymInt rows = virtual_batch_size == 0
                               ? c10::SymInt(each)
                               : c10::SymInt(each * most_virtual_batches(input.size(0), virtual_batch_size));
  TORCH_CHECK(saved.is_contiguous() && saved.dim() == 2 && saved.sym_size(0) == rows &&
                  saved.sym_size(1) == input.sym_size(1) && saved.scalar_type() == statistics_options(input).dtype(),
              "saved should be batch_norm_forward's contiguous (", rows, ", ", input.sym_size(1), ") tensor, but is ",
              saved.toString(), " of size ", saved.sym_sizes());
  check_composed(saved, input, "saved");
}

void check_virtual_batch_size(int64_t size) {
  TORCH_CHECK_VALUE(size >= 0, "virtual_batch_size should be at least 1, but is ", size);
}

Renorm renorm_of(const OptionalNumbers& numbers) {
  Renorm r;
  if (!numbers.has_value()) return r;
  TORCH_CHECK_VALUE(numbers->size() == 4, "renorm should be (max_r, max_d, warmup_steps, smooth), but has ",
                    numbers->size(), " numbers");
  const double steps = (*numbers)[2], smooth = (*numbers)[3];
  r.given = true;
  r.max_r = (*numbers)[0];
  r.max_d = (*numbers)[1];
  TORCH_CHECK_VALUE(r.max_r >= 1, "max_r should be at least 1, but is ", r.max_r);
  TORCH_CHECK_VALUE(r.max_d >= 0, "max_d should be at least 0, but is ", r.max_d);
  constexpr double kMostSteps = 1ll << 53;  // which a double counts
  TORCH_CHECK_VALUE(steps >= 0 && steps <= kMostSteps && steps == std::floor(steps),
                    "warmup_steps should be a whole number from 0 to 2^53, but is ", steps);
  TORCH_CHECK_VALUE(smooth == 0 || smooth == 1, "smooth should be 0 or 1, but is ", smooth);
  r.warmup_steps = static_cast<int64_t>(steps);
  r.smooth = smooth == 1;
  return r;
}

bool has_single_value(const Tensor& input, const OptionalTensor& valid) {
  const int64_t dim = input.dim();
  if (dim != 2 && dim != 3) return false;
  if (!has(valid)) return input.sym_size(0) == 1 && (dim == 2 || input.sym_size(2) == 1);
  // One that only stands for others has no values, and a device's are not waited for.
  if (!valid->is_cpu() || valid->layout() != at::kStrided || stands_for_others(*valid)) return false;
  check_valid(*valid, input);
  (void)data_of(*valid);
  return valid->sum().item<int64_t>() == 1;
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
  if (input.is_contiguous()) return true;
  const Tensor output = at::empty_like(input);
  for (int64_t d = 1; d < output.dim(); ++d) {
    if (output.stride(d) > output.stride(0)) return false;
  }
  return true;
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

// Between tensors and the torch-free kernels: checks with native's error texts, allocation, raw views.
// Every device's operators go through these (operators.h), so a check stands in one place.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "core/kernels.h"

namespace bn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using OptionalNumbers = std::optional<at::ArrayRef<double>>;
using Forwarded = std::tuple<Tensor, Tensor, Tensor>;          // output, saved, mask
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of input, weight, bias, residual
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;       // double backward: of grad_output, input, weight

inline bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }
inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

// A checked call: raw arguments, and the tensors that they write. `empty`: there is no element to work on.
struct ForwardCall {
  ForwardArgs args;
  Tensor output, saved, mask;
  Tensor residual;                               // what args have of it
  Tensor merged;                                 // what args.stage is given
  Tensor valid;                                  // what args have of it
  Tensor count;                                  // num_batches_tracked, where no kernel counts
  Tensor counter;                                // what args count in its place
  Tensor renorm_mean, renorm_var, renorm_count;  // what args' renorm has of them
  bool empty = false;
  // To be called once the kernel ran: an empty batch counts too, as in nn.BatchNorm1d.
  void count_batch() const;
  Forwarded results() const { return {output, saved, mask}; }
};
struct BackwardCall {
  BackwardArgs args;
  Tensor grad_output, valid;  // keep converted tensors alive
  Tensor grad_input, grad_weight, grad_bias, grad_residual;
  Tensor sums;  // what args.stage is given, or its result
  bool empty = false;
  Gradients gradients() const { return {grad_input, grad_weight, grad_bias, grad_residual}; }
};
struct DoubleBackwardCall {
  DoubleBackwardArgs args;
  Tensor grad_output, grad_grad_input;  // keep converted tensors alive
  Tensor grad_grad_output, grad_input, grad_weight;
  bool empty = false;
  ThreeTensors gradients() const { return {grad_grad_output, grad_input, grad_weight}; }
};
// The gradients that arrive at backward's results; each may be absent, which is zero.
struct Arriving {
  OptionalTensor input, weight, bias;
};
// What follows the normalisation, as the operators are given it.
struct After {
  const OptionalTensor& residual;
  std::string_view activation;
  double negative_slope;
};

// Where a tensor's elements are. Raises for a storage that was freed, or shrunk below them.
const void* data_of(const Tensor& t);
void* mutable_data_of(const Tensor& t);

// Raises a TypeError for an undefined tensor; None passes only where a schema allows it.
void check_defined(const Tensor& t, const char* name);
void check_device(const Tensor& t, const Tensor& input, const char* name);

// What a composition asks of an argument that torch's own operations would broadcast, or read although it was freed:
// the size of input, or one value a channel. None passes where it may be None.
void check_plane(const OptionalTensor& t, const Tensor& input, const char* name);
void check_vector(const OptionalTensor& t, const Tensor& input, const char* name);
// Lengths or a mask: types and sizes.
void check_valid(const Tensor& t, const Tensor& input);
// Forward's saved values.
void check_saved(const Tensor& saved, const Tensor& input, int64_t virtual_batch_size = 0, bool renorm = false);
// Whether pieces of input's samples lie each in a piece of what empty_like(input) makes, as the kernels want their
// output.
bool samples_lie_apart(const Tensor& input);
void check_virtual_batch_size(int64_t size);
// The numbers of a renormalisation; a ValueError for what are none.
Renorm renorm_of(const OptionalNumbers& numbers);
// Whether input, or what counts of it, has one value a channel, as far as the host can see.
bool has_single_value(const Tensor& input, const OptionalTensor& valid);
// The virtual batches of an input of this shape; size 0: one batch. A ValueError for one that has one value a channel.
VirtualBatches virtual_batches(const Shape& shape, int64_t dim, int64_t size);

// A tensor's type for the kernels, else native's error; the options of its statistics; a raw view of a (N, C) or
// (N, C, L) tensor.
DType dtype_of(at::ScalarType type, const char* what);
DType dtype_of(const Tensor& t, const char* what);
at::TensorOptions statistics_options(const Tensor& input);
TensorRef input_ref(const Tensor& t);
TensorRef output_ref(const Tensor& t);

// Elements of input's dtype that a byte of a mask holds on its device.
int64_t mask_elements(const Tensor& input);
// "identity", "relu", "leaky_relu", "silu" or "gelu"; anything else is a ValueError.
Activation activation_of(std::string_view name);

// How many recomputations of checkpoints this thread is in (bn_ext/recompute.py): training then moves no running
// statistics and counts no batch.
int& recomputations();

ForwardCall prepare_training(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                             const OptionalTensor& running_mean, const OptionalTensor& running_var,
                             const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                             const After& after, const OptionalTensor& moments, int64_t virtual_batch_size,
                             const OptionalTensor& valid, const OptionalNumbers& renorm);
// output is the moments.
ForwardCall prepare_moments(const Tensor& input);

// saves: for a backward. output is written where given, else a new tensor.
ForwardCall prepare_evaluation(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                               const Tensor& mean, const Tensor& var, double eps, const After& after, bool saves,
                               const OptionalTensor& valid, const OptionalTensor& output = {});

// bias_dtype: of the bias whose gradient is wanted; none: weight's, or that of the statistics.
BackwardCall prepare_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, bool training, std::array<bool, 4> output_mask,
                              OptionalType bias_dtype, const OptionalTensor& mask, const After& after,
                              const OptionalTensor& sums = {}, int64_t virtual_batch_size = 0,
                              const OptionalTensor& valid = {}, bool renorm = false);
BackwardCall prepare_sums(const Tensor& grad_output, const Tensor& input, const Tensor& saved,
                          const OptionalTensor& mask, const After& after);

DoubleBackwardCall prepare_double_backward(const Arriving& arriving, const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& weight, const Tensor& saved, bool training,
                                           std::array<bool, 3> output_mask);

// residual itself where it lies in memory as output does, aligned for vectors, else a copy that does.
Tensor laid_as(const Tensor& residual, const Tensor& output);

// What an operator that writes into its input should give to the kernels as output: the input where it is dense and
// nothing else that they read lies in its memory, element on element apart, else a new tensor, to be copied. Raises for
// an input whose elements share memory with each other or with parts of residual, as torch's operators in place do.
Tensor output_in_place(const Tensor& input, const OptionalTensor& residual,
                       std::initializer_list<const OptionalTensor*> vectors);

}  // namespace bn_ext

// Between tensors and the torch-free kernels: checks with native's error texts, allocation, raw views.
// Every device's registration goes through these, so a check stands in one place.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace bn_ext {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalType = std::optional<at::ScalarType>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// A checked call: raw arguments, and the tensors that they write. `empty`: there is no element to work on.
struct ForwardCall {
  ForwardArgs args;
  Tensor output, saved;
  Tensor count;  // num_batches_tracked, where no kernel counts
  bool empty = false;
  // To be called once the kernel ran: an empty batch counts too, as in nn.BatchNorm1d.
  void count_batch() const;
};
struct InferenceCall {
  InferenceArgs args;
  Tensor output;
  bool empty = false;
};
struct BackwardCall {
  BackwardArgs args;
  Tensor grad_output;  // keeps a converted gradient alive
  Tensor grad_input, grad_weight, grad_bias;
  bool empty = false;
  Gradients gradients() const { return {grad_input, grad_weight, grad_bias}; }
};
struct DoubleBackwardCall {
  DoubleBackwardArgs args;
  Tensor grad_output, grad_grad_input;  // keep converted tensors alive
  Tensor grad_grad_output, grad_input, grad_weight;
  bool empty = false;
  Gradients gradients() const { return {grad_grad_output, grad_input, grad_weight}; }
};
// The gradients that arrive at backward's results; each may be absent, which is zero.
struct Arriving {
  OptionalTensor input, weight, bias;
};

// Where a tensor's elements are. Raises for a storage that was freed, or shrunk below them.
const void* data_of(const Tensor& t);
void* mutable_data_of(const Tensor& t);

// An argument that a schema cannot forbid to be None, and is.
void check_defined(const Tensor& t, const char* name);

// What a composition asks of an argument that torch's own operations would broadcast, or read although it was freed:
// the size of input, or one value a channel. None passes where it may be None.
void check_plane(const OptionalTensor& t, const Tensor& input, const char* name);
void check_vector(const OptionalTensor& t, const Tensor& input, const char* name);
// Forward's saved values, `rows` of them a channel.
void check_saved(const Tensor& saved, const Tensor& input, int64_t rows);

// A tensor's type for the kernels, else native's error; the options of its statistics; a raw view of a (N, C) or
// (N, C, L) tensor.
DType dtype_of(at::ScalarType type, const char* what);
DType dtype_of(const Tensor& t, const char* what);
at::TensorOptions statistics_options(const Tensor& input);
TensorRef input_ref(const Tensor& t);
TensorRef output_ref(const Tensor& t);

ForwardCall prepare_forward(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const OptionalTensor& running_mean, const OptionalTensor& running_var,
                            const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps,
                            int64_t saved_rows = 3);

InferenceCall prepare_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                                const Tensor& running_mean, const Tensor& running_var, double eps,
                                const OptionalTensor& output = {});

// bias_dtype: of the bias whose gradient is wanted; none: weight's, or that of the statistics.
BackwardCall prepare_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, std::array<bool, 3> output_mask, OptionalType bias_dtype,
                              int64_t saved_rows = 3);

BackwardCall prepare_inference_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                        const Tensor& running_mean, const Tensor& running_var, double eps,
                                        std::array<bool, 3> output_mask, OptionalType bias_dtype);

DoubleBackwardCall prepare_double_backward(const Arriving& arriving, const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& weight, const Tensor& saved,
                                           std::array<bool, 3> output_mask);

DoubleBackwardCall prepare_inference_double_backward(const Arriving& arriving, const Tensor& grad_output,
                                                     const Tensor& input, const OptionalTensor& weight,
                                                     const Tensor& running_mean, const Tensor& running_var, double eps,
                                                     std::array<bool, 3> output_mask);

}  // namespace bn_ext

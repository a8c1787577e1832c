// What counts of a padded batch, by torch's operations: `valid` is lengths or a mask (ops.cpp).
#pragma once

#include <ATen/core/Tensor.h>

namespace bn_ext {

// Booleans of size (N, L), of an (N, C) input (N, 1).
at::Tensor valid_positions(const at::Tensor& valid, const at::Tensor& input);
// t, of input's size, with zeros where it does not count.
at::Tensor where_valid(const at::Tensor& t, const at::Tensor& valid);
// Whether a mask of `input`, whose channels are planes, has so many short runs that taking their values out is faster.
bool is_scattered(const at::Tensor& valid, const at::Tensor& input);
// Where values count: indices of the flattened positions.
at::Tensor places_of(const at::Tensor& valid, const at::Tensor& input);
// What counts of t, of input's size, (1, C, M), and the way back into what empty_like(input) makes, zero elsewhere.
at::Tensor line_at(const at::Tensor& t, const at::Tensor& places);
at::Tensor line_put(const at::Tensor& line, const at::Tensor& places, const at::Tensor& input);

// The values of t, of input's size, at `places` of the flattened positions, (M, C), and the way back, zero elsewhere.
// Nothing stays nothing.
at::Tensor rows_at(const at::Tensor& t, const at::Tensor& places);
at::Tensor rows_put(const at::Tensor& rows, const at::Tensor& places, const at::Tensor& input);

}  // namespace bn_ext

// What the kernels see of tensors: shapes, vectors, masks and stages, each checked with native's error texts.
#pragma once

#include <string_view>

#include "checks.h"

namespace bn_ext {

Shape shape_of(const Tensor& input);
// A per-channel vector that an op reads, or reads and writes. Any shape of the right number of elements will do.
VectorRef vector_ref(const OptionalTensor& given, const Tensor& input, const char* name, bool writes = false);
// A tensor beside input, of its type.
Tensor like_input(const Tensor& t, const Tensor& input, const char* name);

Epilogue epilogue_of(const Tensor& input, const After& after);
// Bytes of forward's mask, and where each virtual batch has its own.
int64_t mask_size(const Tensor& input, int64_t virtual_batch_size);
void set_mask(Epilogue* e, uint8_t* mask, const Tensor& input, const VirtualBatches& batches);

// What counts of a padded batch: lengths, integers of size (N,), or a mask, booleans of the size of input without its
// channels. Returns what keeps the kernels' view alive. On the CPU lengths out of range raise.
Tensor set_valid(Valid* valid, const OptionalTensor& given, const Tensor& input);

// The results of a stage that all parts of a batch have brought together; returns what keeps them alive.
Tensor set_given(Stage* stage, const Tensor& given, const Tensor& input, int64_t rows, const char* name);
// A stage's result, of an input without elements: zero.
Tensor make_result(Stage* stage, const Tensor& input, int64_t rows);

}  // namespace bn_ext

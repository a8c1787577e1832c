// Virtual batches (core/virtual_batch.h) in a launch: each row of the grid has one of them. All but the last leave what
// the last one, in a launch of its own, takes up in their order: statistics to move the running ones by, sums to add.
#pragma once

#include "core/kernels.h"

namespace bn_ext {
namespace cuda {

template <class Args>
struct PieceArgs : Args {
  int64_t first = 0;       // virtual batch of the grid's first row
  int64_t earlier = 0;     // of the last one: how many have left something
  bool leaves = false;     // it is not the last one
  double* left = nullptr;  // (earlier, 2, C): mean and unbiased variance; gradients of weight and bias
};

}  // namespace cuda
}  // namespace bn_ext

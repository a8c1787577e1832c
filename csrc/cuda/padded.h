// Passes over a padded batch beside those of plan.h, torch-free, asynchronous on the given stream. Of its virtual
// batches (core/virtual_batch.h) each row of a grid has one.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kernels.h"
#include "plan.h"

namespace bn_ext {
namespace cuda {

constexpr int kPaddedThreads = 256;

struct PaddedArgs {
  Shape shape;
  DType dtype;
  TensorRef x, dy;  // what is summed
  Valid valid;
  VirtualBatches batches;
  int64_t first = 0;  // virtual batch of the grid's first row
  const void* saved = nullptr;
  bool by_renorm = false;    // what is saved
  Epilogue epilogue;         // dy is what arrives behind it
  TensorRef places;          // by whose strides the bits of its mask lie
  double* result = nullptr;  // (batches, parts, rows, C) of Stage's results
  BN_HD bool renormalised() const { return by_renorm; }
  int tx = 1, ty = kPaddedThreads;
  int64_t parts = 1, part_positions = 0;
};

// A virtual batch in a pass that is given the sums of each. The last one moves the running statistics by all of them,
// in their order, and adds up the gradients of the parameters.
template <class Args>
struct PaddedPiece : Args {
  int64_t earlier = 0;  // virtual batches before it
  bool last = true;
  int64_t given_step = 0;  // from one's sums to the next one's
  // What earlier virtual batch i is given.
  BN_HD Stage stage_of(int64_t i) const {
    Stage s = this->stage;
    s.given -= (earlier - i) * given_step;
    return s;
  }
};

// The pass of launch.h with args.valid. `workspace` holds so many bytes, aligned to 16, of any content.
int64_t padded_bytes(const ForwardArgs& args, const Device& device);
int64_t padded_bytes(const BackwardArgs& args, const Device& device);
cudaError_t padded_forward(const ForwardArgs& args, const Device& device, void* workspace, cudaStream_t stream);
cudaError_t padded_backward(const BackwardArgs& args, const Device& device, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace bn_ext

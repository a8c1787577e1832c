// The CUDA kernels as the glue and the tests see them: torch-free, asynchronous on the given stream.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kernels.h"
#include "plan.h"

namespace bn_ext {
namespace cuda {

// Figures of CUDA device `index`.
cudaError_t query_device(int index, Device* device);

// Before single elements set their bits in bytes that they share: the mask of so many virtual batches.
cudaError_t clear_mask(const ForwardArgs& args, int64_t first, int64_t batches, cudaStream_t stream);

// `workspace` holds plan.workspace_bytes, aligned to 16, of any content; it belongs to this call alone. The residual of
// training has the output's strides and its alignment. A mask is written whole, whatever it holds before. Evaluation
// may write into its input.
cudaError_t forward(const ForwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream);
cudaError_t backward(const BackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream);
// Of training, with a gradient at grad_input.
cudaError_t double_backward(const DoubleBackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace bn_ext

// Training of a batch in virtual ones (core/virtual_batch.h): all but the last side by side in one launch and the last
// in another, or each in launches of its own, where that leaves more of the device at work. The last one moves the
// running statistics by all of them, in their order, and adds up the sums of the parameters' gradients.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kernels.h"
#include "plan.h"

namespace bn_ext {
namespace cuda {

struct CutPlan {
  Plan earlier, last;
  bool together = false;  // all earlier ones in one launch (in one for each 65535, the most rows of a grid)
  int64_t left_bytes = 0, workspace_bytes = 0;
};

// Of batches of two and more, without Valid and Renorm; backward with sums.
CutPlan plan_forward_cut(const ForwardArgs& args, const Device& device);
CutPlan plan_backward_cut(const BackwardArgs& args, const Device& device);

// As launch.h's.
cudaError_t forward_cut(const ForwardArgs& args, const CutPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t backward_cut(const BackwardArgs& args, const CutPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace bn_ext

// From a plan to the launches of its element type.
#include "launch.h"

#include <algorithm>
#include <cstdlib>

#include "entries.h"

namespace bn_ext {
namespace cuda {

cudaError_t query_device(int index, Device* device) {
  const auto ask = [&](cudaDeviceAttr attribute, auto* to) {
    int value = 0;
    const auto error = cudaDeviceGetAttribute(&value, attribute, index);
    *to = value;
    return error;
  };
  int major = 0, minor = 0, cooperative = 0;
  const cudaError_t errors[] = {
      ask(cudaDevAttrComputeCapabilityMajor, &major),
      ask(cudaDevAttrComputeCapabilityMinor, &minor),
      ask(cudaDevAttrCooperativeLaunch, &cooperative),
      ask(cudaDevAttrMultiProcessorCount, &device->sms),
      ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_per_block),
      ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_per_sm),
      ask(cudaDevAttrReservedSharedMemoryPerBlock, &device->reserved_per_block),
  };
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  device->capability = 10 * major + minor;
  // The variable is for tests: it leads to the second launch on a device that needs none.
  device->cooperative = cooperative != 0 && std::getenv("BN_EXT_NO_COOPERATIVE") == nullptr;
  return cudaSuccess;
}

cudaError_t clear_mask(const ForwardArgs& args, int64_t first, int64_t batches, cudaStream_t stream) {
  const Epilogue& e = args.epilogue;
  if (!e.mask) return cudaSuccess;
  const Shape last = virtual_batch(args, first + batches - 1).shape;
  const int64_t of_last = mask_bytes(last.numel(), cuda_mask_elements(element_bytes(args.dtype)));
  const int64_t size = (batches - 1) * e.mask_step + of_last;
  return cudaMemsetAsync(e.mask + first * e.mask_step, 0, static_cast<size_t>(size), stream);
}

cudaError_t forward(const ForwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (plan.vector == 1) {
    if (const auto error = clear_mask(args, plan.first, plan.pieces, stream); error != cudaSuccess) return error;
  }
  return of_type(args.dtype, forward_float32, forward_float64, forward_bfloat16, forward_float16)(args, plan, workspace,
                                                                                                  stream);
}

cudaError_t backward(const BackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  return of_type(args.dtype, backward_float32, backward_float64, backward_bfloat16, backward_float16)(
      args, plan, workspace, stream);
}

cudaError_t double_backward(const DoubleBackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  return of_type(args.dtype, double_backward_float32, double_backward_float64, double_backward_bfloat16,
                 double_backward_float16)(args, plan, workspace, stream);
}

}  // namespace cuda
}  // namespace bn_ext

// CUDA kernels of the operators: device, stream, workspace, launch errors.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "composite.h"
#include "cuda/architectures.h"
#include "cuda/cut.h"
#include "cuda/launch.h"
#include "cuda/padded.h"
#include "operators.h"

namespace bn_ext {
namespace cuda {
namespace {

// Figures of a device, asked for once.
Device device_figures(c10::DeviceIndex index) {
  static std::mutex mutex;
  static std::vector<Device> known(static_cast<size_t>(c10::cuda::device_count()), Device{0});
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = known.at(static_cast<size_t>(index));
  if (device.capability == 0) C10_CUDA_CHECK(query_device(index, &device));
  TORCH_CHECK_NOT_IMPLEMENTED(runs_on(built_codes(), device.capability), "bn_ext was built for ", built_codes(),
                              ", which does not run on a GPU of compute capability ", device.capability / 10, ".",
                              device.capability % 10);
  return device;
}

// Plans and launches on the current stream of the current device. The workspace goes back to the caching allocator at
// once: what is allocated there next is ordered behind this launch by the stream.
template <class Args, class PlanFor, class Launch>
void plan_and_launch(const Tensor& input, const Args& args, const PlanFor& plan_for, const Launch& launch) {
  Device device = device_figures(input.get_device());
  const auto attempt = [&] {
    const auto plan = plan_for(args, device);
    Tensor workspace;
    void* memory = nullptr;
    if (plan.workspace_bytes > 0) {
      workspace = at::empty({plan.workspace_bytes}, input.options().dtype(at::kByte));
      memory = workspace.mutable_data_ptr();
    }
    return launch(args, plan, memory, c10::cuda::getCurrentCUDAStream(input.get_device()));
  };
  // Something (MPS, a partition, a debugger) may keep part of the device from us: the blocks of a grid or of a cluster
  // cannot all be there to wait for each other.
  cudaError_t error = attempt();
  for (; error != cudaSuccess; error = attempt()) {
    const bool no_cluster = error == cudaErrorInvalidClusterSize || error == cudaErrorLaunchOutOfResources;
    bool& way = no_cluster ? device.clusters : device.cooperative;
    if (!way || !(no_cluster || error == cudaErrorCooperativeLaunchTooLarge)) break;
    (void)cudaGetLastError();
    way = false;
  }
  C10_CUDA_CHECK(error);
}

// A padded batch: sums of what counts, then the pass that writes.
template <class Args>
void launch_padded(const Tensor& input, const Args& args,
                   cudaError_t (*run)(const Args&, const Device&, void*, cudaStream_t)) {
  const Device device = device_figures(input.get_device());
  const Tensor workspace = at::empty({padded_bytes(args, device)}, input.options().dtype(at::kByte));
  const auto stream = c10::cuda::getCurrentCUDAStream(input.get_device());
  C10_CUDA_CHECK(run(args, device, workspace.mutable_data_ptr(), stream));
}

void launch_whole(const Tensor& input, const ForwardArgs& a) {
  const auto plan_for = [](const ForwardArgs& whole, const Device& d) { return plan_forward(whole, d); };
  a.valid ? launch_padded(input, a, padded_forward) : plan_and_launch(input, a, plan_for, cuda::forward);
}
void launch_whole(const Tensor& input, const BackwardArgs& a) {
  const auto plan_for = [](const BackwardArgs& whole, const Device& d) { return plan_backward(whole, d); };
  a.valid ? launch_padded(input, a, padded_backward) : plan_and_launch(input, a, plan_for, cuda::backward);
}

// In training without a gradient at grad_input, what flows on to the input is a backward with grad_grad_weight in the
// place of the weight; what flows on to grad_output is made of torch's operations.
void from_parameters(const Tensor& input, const Tensor& saved, const Arriving& arriving,
                     const DoubleBackwardCall& call) {
  if (call.args.grad_weight) Tensor(call.grad_weight).zero_();
  if (call.args.dx) {
    BackwardArgs a = call.args;
    a.weight = call.args.gg_weight;
    a.grad_weight = {};
    if (a.weight) {
      launch_whole(input, a);
    } else {
      Tensor(call.grad_input).zero_();
    }
  }
  if (call.args.grad_dy) {
    std::vector<int64_t> column{1, -1};
    if (input.dim() == 3) column.push_back(1);
    const auto wide = [&](const Tensor& t) { return t.to(saved.scalar_type()).view(column); };
    Tensor sum = at::zeros_like(saved[kSavedMeanHi]).view(column);
    if (has(arriving.weight)) {
      const Tensor centred = (input - wide(saved[kSavedMeanHi])) - wide(saved[kSavedMeanLo]);
      sum = centred * (wide(saved[kSavedInvstd]) * wide(*arriving.weight));
    }
    if (has(arriving.bias)) sum = sum + wide(*arriving.bias);
    Tensor(call.grad_grad_output).copy_(sum.expand_as(input));
  }
}

// Without statistics of the batch nothing is left to fuse but two products: torch's operations.
void from_fixed(const Tensor& input, const OptionalTensor& weight, const Tensor& saved, const Arriving& arriving,
                const DoubleBackwardCall& call) {
  const std::array<bool, 3> wanted{bool(call.args.grad_dy), bool(call.args.dx), bool(call.args.grad_weight)};
  const auto [grad_dy, grad_x, grad_weight] = composite_double_backward(
      arriving.input, arriving.weight, arriving.bias, call.grad_output, input, weight, saved, false, 0, wanted);
  if (wanted[0]) Tensor(call.grad_grad_output).copy_(grad_dy);
  if (wanted[1]) Tensor(call.grad_input).copy_(grad_x);
  if (wanted[2]) Tensor(call.grad_weight).copy_(grad_weight);
}

// What r and d of a renormalised batch go by, copied, as blocks would come to read what others have moved.
std::vector<Tensor> copy_for_renorm(const ForwardCall& call, Renorm* renorm) {
  std::vector<Tensor> copies{at::stack({call.renorm_mean.flatten(), call.renorm_var.flatten()})};
  const Tensor& statistics = copies[0];
  const auto row = [&](int64_t i) {
    return VectorRef{statistics.select(0, i).mutable_data_ptr(), dtype_of(statistics, "batch_norm"), 1};
  };
  renorm->mean = row(0);
  renorm->var = row(1);
  if (renorm->batches) {
    copies.push_back(call.renorm_count.clone());
    renorm->batches = copies[1].const_data_ptr<int64_t>();
  }
  return copies;
}

struct Cuda {
  static constexpr bool kGathers = false;
  struct Guard : c10::cuda::CUDAGuard {
    explicit Guard(const Tensor& input) : CUDAGuard(input.device()) {}
  };
  static void forward(const Tensor& input, ForwardCall& call) {
    if (call.args.training && call.residual.defined()) {
      call.residual = laid_as(call.residual, call.output);
      call.args.epilogue.residual = input_ref(call.residual);
    }
    if (!call.args.renorm) {
      if (call.args.batches.count == 1 || call.args.valid) return launch_whole(input, call.args);
      return plan_and_launch(input, call.args, plan_forward_cut, forward_cut);
    }
    for (int64_t i = 0; i < call.args.batches.count; ++i) {
      ForwardArgs one = virtual_batch(call.args, i);
      const auto copies = copy_for_renorm(call, &one.renorm);
      launch_whole(input, one);
    }
  }
  static void backward(const Tensor& input, const BackwardCall& call) {
    const BackwardArgs& a = call.args;
    if (a.batches.count == 1 || a.valid) return launch_whole(input, a);
    if (a.sums()) return plan_and_launch(input, a, plan_backward_cut, backward_cut);
    // The sums of each virtual batch, then theirs, so that nothing depends on the order in which blocks end.
    const int64_t channels = a.shape.c;
    const Tensor parts = at::empty({2, a.batches.count, channels}, input.options().dtype(at::kDouble));
    auto* const sums = static_cast<double*>(parts.mutable_data_ptr());
    const auto of_batch = [&](const VectorRef& wanted, int64_t which, int64_t i) {
      double* const to = sums + (which * a.batches.count + i) * channels;
      return wanted ? VectorRef{to, DType::kFloat64, 1} : VectorRef();
    };
    for (int64_t i = 0; i < a.batches.count; ++i) {
      BackwardArgs one = virtual_batch(a, i);
      one.grad_weight = of_batch(a.grad_weight, 0, i);
      one.grad_bias = of_batch(a.grad_bias, 1, i);
      launch_whole(input, one);
    }
    if (a.grad_weight) Tensor(call.grad_weight).copy_(parts[0].sum(0).view_as(call.grad_weight));
    if (a.grad_bias) Tensor(call.grad_bias).copy_(parts[1].sum(0).view_as(call.grad_bias));
  }
  static void double_backward(const Tensor& input, const OptionalTensor& weight, const Tensor& saved,
                              const Arriving& arriving, const DoubleBackwardCall& call) {
    if (!call.args.training) return from_fixed(input, weight, saved, arriving, call);
    if (!call.args.gg_x) return from_parameters(input, saved, arriving, call);
    plan_and_launch(input, call.args, plan_double_backward, cuda::double_backward);
  }
};

TORCH_LIBRARY_IMPL(bn_ext, CUDA, m) { Operators<Cuda>::add_to(m); }

}  // namespace
}  // namespace cuda
}  // namespace bn_ext

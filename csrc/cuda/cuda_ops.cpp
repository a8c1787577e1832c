// CUDA kernels of the operators: device, stream, workspace, launch errors.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "architectures.h"
#include "composite.h"
#include "glue_activated.h"
#include "launch.h"

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
    const Plan plan = plan_for(args, device);
    Tensor workspace;
    void* memory = nullptr;
    if (plan.workspace_bytes > 0) {
      workspace = at::empty({plan.workspace_bytes}, input.options().dtype(at::kByte));
      memory = workspace.mutable_data_ptr();
    }
    return launch(args, plan, memory, c10::cuda::getCurrentCUDAStream(input.get_device()));
  };
  cudaError_t error = attempt();
  if (error == cudaErrorCooperativeLaunchTooLarge && device.cooperative) {
    // Something (MPS, a debugger) keeps part of the device from us: the blocks cannot all wait for each other.
    (void)cudaGetLastError();
    device.cooperative = false;
    error = attempt();
  }
  C10_CUDA_CHECK(error);
}

std::tuple<Tensor, Tensor> batch_norm_forward(const Tensor& input, const OptionalTensor& weight,
                                              const OptionalTensor& bias, const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var,
                                              const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                              double eps) {
  const c10::cuda::CUDAGuard guard(input.device());
  const ForwardCall call =
      prepare_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps);
  if (!call.empty) {
    plan_and_launch(input, call.args, plan_forward, forward);
  }
  call.count_batch();
  return {call.output, call.saved};
}

Tensor batch_norm_inference(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                            const Tensor& running_mean, const Tensor& running_var, double eps) {
  const c10::cuda::CUDAGuard guard(input.device());
  const InferenceCall call = prepare_inference(input, weight, bias, running_mean, running_var, eps);
  if (!call.empty) {
    plan_and_launch(input, call.args, plan_inference,
                    [](const InferenceArgs& args, const Plan& plan, void*, cudaStream_t stream) {
                      return inference(args, plan, stream);
                    });
  }
  return call.output;
}

ActivatedTensors batch_norm_act_forward(const Tensor& input, const OptionalTensor& residual,
                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                        const OptionalTensor& num_batches_tracked, std::optional<double> momentum,
                                        double eps, std::string_view activation, double negative_slope,
                                        bool save_mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  auto call = prepare_activated_forward(input, residual, weight, bias, running_mean, running_var, num_batches_tracked,
                                        momentum, eps, activation, negative_slope, save_mask);
  if (!call.plain.empty) {
    Tensor laid;
    if (call.args.epilogue.residual) {
      laid = laid_as(*residual, call.plain.output);
      call.args.epilogue.residual = input_ref(laid);
    }
    plan_and_launch(input, call.args, plan_activated_forward, forward_activated);
  }
  call.plain.count_batch();
  return {call.plain.output, call.plain.saved, call.mask};
}

void run_inference(const Tensor& input, const ActivatedInferenceCall& call) {
  if (call.empty) return;
  plan_and_launch(input, call.args, plan_activated_inference,
                  [](const ActivatedInferenceArgs& args, const Plan& plan, void*, cudaStream_t stream) {
                    return inference_activated(args, plan, stream);
                  });
}

ActivatedTensors batch_norm_act_inference(const Tensor& input, const OptionalTensor& residual,
                                          const OptionalTensor& weight, const OptionalTensor& bias,
                                          const Tensor& running_mean, const Tensor& running_var, double eps,
                                          std::string_view activation, double negative_slope, bool save) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto call = prepare_activated_inference(input, residual, weight, bias, running_mean, running_var, eps,
                                                activation, negative_slope, save);
  run_inference(input, call);
  return {call.output, call.saved, call.mask};
}

void batch_norm_act_inference_(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                               double eps, std::string_view activation, double negative_slope) {
  const c10::cuda::CUDAGuard guard(input.device());
  const OptionalTensor mean = running_mean, var = running_var;
  const Tensor output = output_in_place(input, residual, {&weight, &bias, &mean, &var});
  run_inference(input, prepare_activated_inference(input, residual, weight, bias, running_mean, running_var, eps,
                                                   activation, negative_slope, false, output));
  if (!output.is_same(input)) input.copy_(output);
}

Gradients run_backward(const Tensor& input, const BackwardCall& call) {
  const BackwardArgs& a = call.args;
  if (!call.empty && (a.dx || a.grad_weight || a.grad_bias)) plan_and_launch(input, a, plan_backward, backward);
  return call.gradients();
}

Gradients batch_norm_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                              const Tensor& saved, std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  const c10::cuda::CUDAGuard guard(input.device());
  return run_backward(input, prepare_backward(grad_output, input, weight, saved, output_mask, bias_dtype));
}

Gradients batch_norm_inference_backward(const Tensor& grad_output, const Tensor& input, const OptionalTensor& weight,
                                        const Tensor& running_mean, const Tensor& running_var, double eps,
                                        std::array<bool, 3> output_mask, OptionalType bias_dtype) {
  const c10::cuda::CUDAGuard guard(input.device());
  return run_backward(input, prepare_inference_backward(grad_output, input, weight, running_mean, running_var, eps,
                                                        output_mask, bias_dtype));
}

// In training without a gradient at grad_input, what flows on to the input is a backward with grad_grad_weight in the
// place of the weight; what flows on to grad_output is made of torch's operations.
Gradients from_parameters(const DoubleBackwardCall& call, const Arriving& arriving, const Tensor& input,
                          const Tensor& saved) {
  const auto has = [](const OptionalTensor& t) { return t.has_value() && t->defined(); };
  if (call.args.grad_weight) Tensor(call.grad_weight).zero_();
  if (call.args.dx) {
    BackwardArgs a = call.args;
    a.weight = call.args.gg_weight;
    a.grad_weight = {};
    if (a.weight) {
      plan_and_launch(input, a, plan_backward, backward);
    } else {
      Tensor(call.grad_input).zero_();
    }
  }
  if (call.args.grad_dy) {
    std::vector<int64_t> column{1, -1};
    if (input.dim() == 3) column.push_back(1);
    const auto wide = [&](const Tensor& t) { return t.to(saved.scalar_type()).view(column); };
    Tensor sum = at::zeros_like(saved[0]).view(column);
    if (has(arriving.weight)) {
      const Tensor centred = (input - wide(saved[0])) - wide(saved[1]);
      sum = centred * (wide(saved[2]) * wide(*arriving.weight));
    }
    if (has(arriving.bias)) sum = sum + wide(*arriving.bias);
    Tensor(call.grad_grad_output).copy_(sum.expand_as(input));
  }
  return call.gradients();
}

Gradients batch_norm_double_backward(const OptionalTensor& grad_grad_input, const OptionalTensor& grad_grad_weight,
                                     const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                     const Tensor& input, const OptionalTensor& weight, const Tensor& saved,
                                     std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  const Arriving arriving{grad_grad_input, grad_grad_weight, grad_grad_bias};
  const DoubleBackwardCall call = prepare_double_backward(arriving, grad_output, input, weight, saved, output_mask);
  const DoubleBackwardArgs& a = call.args;
  if (call.empty || !(a.grad_dy || a.dx || a.grad_weight)) return call.gradients();
  if (!a.gg_x) return from_parameters(call, arriving, input, saved);
  plan_and_launch(input, a, plan_double_backward, double_backward);
  return call.gradients();
}

// Without statistics of the batch nothing is left to fuse but two products: torch's operations.
Gradients batch_norm_inference_double_backward(const OptionalTensor& grad_grad_input,
                                               const OptionalTensor& grad_grad_weight,
                                               const OptionalTensor& grad_grad_bias, const Tensor& grad_output,
                                               const Tensor& input, const OptionalTensor& weight,
                                               const Tensor& running_mean, const Tensor& running_var, double eps,
                                               std::array<bool, 3> output_mask) {
  const c10::cuda::CUDAGuard guard(input.device());
  const DoubleBackwardCall call =
      prepare_inference_double_backward({grad_grad_input, grad_grad_weight, grad_grad_bias}, grad_output, input, weight,
                                        running_mean, running_var, eps, output_mask);
  if (call.empty) return call.gradients();
  const auto [grad_dy, grad_x, grad_weight] =
      composite_double_backward(grad_grad_input, grad_grad_weight, grad_grad_bias, grad_output, input, weight,
                                running_mean, running_var, eps, output_mask);
  if (output_mask[0]) Tensor(call.grad_grad_output).copy_(grad_dy);
  if (output_mask[1]) Tensor(call.grad_input).copy_(grad_x);
  if (output_mask[2]) Tensor(call.grad_weight).copy_(grad_weight);
  return call.gradients();
}

ActivatedGradients batch_norm_act_backward(const Tensor& grad_output, const Tensor& input,
                                           const OptionalTensor& residual, const Tensor& mask,
                                           const OptionalTensor& weight, const Tensor& saved, bool training,
                                           std::string_view activation, double negative_slope,
                                           std::array<bool, 4> output_mask, OptionalType bias_dtype) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto call = prepare_activated_backward(grad_output, input, residual, mask, weight, saved, training, activation,
                                               negative_slope, output_mask, bias_dtype);
  const ActivatedBackwardArgs& a = call.args;
  if (!call.plain.empty && (a.sums() || a.dx || a.grad_residual)) {
    plan_and_launch(input, a, plan_activated_backward, backward_activated);
  }
  return call.gradients();
}

TORCH_LIBRARY_IMPL(bn_ext, CUDA, m) {
  m.impl("batch_norm_forward", batch_norm_forward);
  m.impl("batch_norm_inference", batch_norm_inference);
  m.impl("batch_norm_act_forward", batch_norm_act_forward);
  m.impl("batch_norm_act_backward", batch_norm_act_backward);
  m.impl("batch_norm_act_inference", batch_norm_act_inference);
  m.impl("batch_norm_act_inference_", batch_norm_act_inference_);
  m.impl("batch_norm_backward", batch_norm_backward);
  m.impl("batch_norm_inference_backward", batch_norm_inference_backward);
  m.impl("batch_norm_double_backward", batch_norm_double_backward);
  m.impl("batch_norm_inference_double_backward", batch_norm_inference_double_backward);
}

}  // namespace
}  // namespace cuda
}  // namespace bn_ext

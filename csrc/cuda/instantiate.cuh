// Launches of the kernels for one element type; each .cu of a type includes this and defines its three entries.
#pragma once

#include <algorithm>
#include <type_traits>

#include "entries.h"
#include "kernel.cuh"
#include "padded.cuh"

namespace bn_ext {
namespace cuda {

// A kernel's launch: cluster or cooperative attribute, and more than 48 KB of shared memory where the plan says so.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Plan& plan, bool alone, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks()), static_cast<unsigned>(plan.pieces));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  if (plan.shared_bytes > 48 * 1024 - 64) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute{};
  if (!alone && plan.exchange == Exchange::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.splits);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (!alone && plan.exchange == Exchange::kGrid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  config.attrs = &attribute;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class Args>
cudaError_t reduce_and_apply(void (*kernel)(Plan, Args, void*, int), const Plan& plan, const Args& args,
                             void* workspace, cudaStream_t stream) {
  if (args.stage.given) return launch(kernel, plan, true, stream, plan, args, workspace, int{kApply});
  if (plan.exchange != Exchange::kTwoLaunches) {
    return launch(kernel, plan, false, stream, plan, args, workspace, kReduce | kApply);
  }
  const auto error = launch(kernel, plan, true, stream, plan, args, workspace, int{kReduce});
  if (error != cudaSuccess) return error;
  return launch(kernel, plan, true, stream, plan, args, workspace, int{kApply});
}
template <class Op>
cudaError_t reduce_and_apply(const Plan& plan, const typename Op::Args& args, void* workspace, cudaStream_t stream) {
  return reduce_and_apply(reduce_kernel<Op>, plan, args, workspace, stream);
}
template <class Op>
cudaError_t reduce_and_apply(const Plan& plan, const PieceArgs<typename Op::Args>& args, void* workspace,
                             cudaStream_t stream) {
  return reduce_and_apply(pieces_kernel<Op>, plan, args, workspace, stream);
}

template <class Op>
cudaError_t apply(const Plan& plan, const typename Op::Args& args, cudaStream_t stream) {
  return launch(args.valid ? padded_apply_kernel<Op> : apply_kernel<Op>, plan, true, stream, plan, args);
}

// A padded batch's sums are given.
template <class Op>
cudaError_t run_training(const Plan& plan, const typename Op::Args& args, void* workspace, cudaStream_t stream) {
  if (args.valid) return launch(padded_apply_kernel<Op>, plan, true, stream, plan, args);
  return reduce_and_apply<Op>(plan, args, workspace, stream);
}
template <class Op>
cudaError_t run_training(const Plan& plan, const PieceArgs<typename Op::Args>& args, void* workspace,
                         cudaStream_t stream) {
  return reduce_and_apply<Op>(plan, args, workspace, stream);
}

// `Use` is given the kernel's operation for the plan's vector.
template <template <typename, int> class Op, typename T, class Use>
cudaError_t with_vector(const Plan& plan, const Use& use) {
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  return plan.vector == 1 ? use(static_cast<Op<T, 1>*>(nullptr)) : use(static_cast<Op<T, kFull>*>(nullptr));
}

// As with_vector, of the operation with or without a residual.
template <template <typename, int, bool> class Op, typename T, class Use>
cudaError_t with_residual(const Epilogue& epilogue, const Plan& plan, const Use& use) {
  return epilogue.residual ? with_vector<Summed<Op>::template Of, T>(plan, use)
                           : with_vector<Alone<Op>::template Of, T>(plan, use);
}

template <typename T>
cudaError_t forward_of(const ForwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  const auto reduce = [&](auto* op) {
    return run_training<std::remove_pointer_t<decltype(op)>>(plan, args, workspace, stream);
  };
  const auto write = [&](auto* op) { return apply<std::remove_pointer_t<decltype(op)>>(plan, args, stream); };
  if (args.training) {
    return args.epilogue ? with_residual<ActivatedForward, T>(args.epilogue, plan, reduce)
                         : with_vector<Forward, T>(plan, reduce);
  }
  // What may write into its input reads it otherwise.
  return args.epilogue || args.x.data == args.y.data ? with_residual<ActivatedEvaluation, T>(args.epilogue, plan, write)
                                                     : with_vector<Evaluation, T>(plan, write);
}

// Virtual batches in training; in backward with sums.
template <typename T>
cudaError_t forward_pieces_of(const PieceArgs<ForwardArgs>& args, const Plan& plan, void* workspace,
                              cudaStream_t stream) {
  const auto reduce = [&](auto* op) {
    return reduce_and_apply<std::remove_pointer_t<decltype(op)>>(plan, args, workspace, stream);
  };
  return args.epilogue ? with_residual<ActivatedForward, T>(args.epilogue, plan, reduce)
                       : with_vector<Forward, T>(plan, reduce);
}

// use(source): what tells the activation's derivative, as a constant.
template <class Use>
cudaError_t with_source(const Epilogue& epilogue, const Use& use) {
  switch (source_of(epilogue)) {
    case Source::kSign:
      return use(std::integral_constant<Source, Source::kSign>());
    case Source::kArgument:
      return use(std::integral_constant<Source, Source::kArgument>());
    case Source::kSum:
      return use(std::integral_constant<Source, Source::kSum>());
    default:
      return use(std::integral_constant<Source, Source::kMask>());
  }
}

template <typename T, Source kSource, class Args>
cudaError_t sums_by(const Args& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  constexpr int kFull = access_bytes(Pass::kActivatedBackward, sizeof(T)) / static_cast<int>(sizeof(T));
  if (plan.vector == 1) return run_training<ActivatedBackward<T, 1, kSource>>(plan, args, workspace, stream);
  return run_training<ActivatedBackward<T, kFull, kSource>>(plan, args, workspace, stream);
}

template <typename T>
cudaError_t backward_pieces_of(const PieceArgs<BackwardArgs>& args, const Plan& plan, void* workspace,
                               cudaStream_t stream) {
  if (!args.epilogue.activates()) {
    return with_vector<Backward, T>(plan, [&](auto* op) {
      return reduce_and_apply<std::remove_pointer_t<decltype(op)>>(plan, args, workspace, stream);
    });
  }
  return with_source(args.epilogue, [&](auto source) { return sums_by<T, source()>(args, plan, workspace, stream); });
}

template <typename T, Source kSource>
cudaError_t backward_by(const BackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (args.sums()) return sums_by<T, kSource>(args, plan, workspace, stream);
  constexpr int kFull = 16 / static_cast<int>(sizeof(T));
  if (plan.vector == 1) return apply<ActivationGradient<T, 1, kSource>>(plan, args, stream);
  return apply<ActivationGradient<T, kFull, kSource>>(plan, args, stream);
}

template <typename T>
cudaError_t backward_of(const BackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (args.epilogue.activates()) {
    return with_source(args.epilogue,
                       [&](auto source) { return backward_by<T, source()>(args, plan, workspace, stream); });
  }
  if (args.training) {
    return with_vector<Backward, T>(plan, [&](auto* op) {
      return run_training<std::remove_pointer_t<decltype(op)>>(plan, args, workspace, stream);
    });
  }
  if (args.sums()) {
    return with_vector<EvaluationBackward, T>(plan, [&](auto* op) {
      return reduce_and_apply<std::remove_pointer_t<decltype(op)>>(plan, args, workspace, stream);
    });
  }
  return with_vector<EvaluationScale, T>(
      plan, [&](auto* op) { return apply<std::remove_pointer_t<decltype(op)>>(plan, args, stream); });
}

template <typename T>
cudaError_t double_backward_of(const DoubleBackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  constexpr int kFull = access_bytes(Pass::kDoubleBackward, sizeof(T)) / static_cast<int>(sizeof(T));
  if (plan.vector == 1) return reduce_and_apply<DoubleBackward<T, 1>>(plan, args, workspace, stream);
  return reduce_and_apply<DoubleBackward<T, kFull>>(plan, args, workspace, stream);
}

template <class... Parameters>
cudaError_t launch_padded(void (*kernel)(Parameters...), const PaddedArgs& args, size_t shared, cudaStream_t stream) {
  const int64_t blocks = (args.shape.c + args.tx - 1) / args.tx * args.parts;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(std::min(args.batches.count - args.first, kMostRows)));
  config.blockDim = dim3(kPaddedThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename T>
cudaError_t padded_of(PaddedPass pass, const PaddedArgs& args, cudaStream_t stream) {
  if (pass == PaddedPass::kMoments) {
    return launch_padded(padded_kernel<PaddedMoments<T>>, args, kPaddedThreads * sizeof(Moments<double>), stream);
  }
  constexpr size_t kShared = kPaddedThreads * sizeof(GradientSum);
  if (!args.epilogue.activates()) return launch_padded(padded_kernel<PaddedSums<T>>, args, kShared, stream);
  return with_source(args.epilogue, [&](auto source) {
    return launch_padded(padded_kernel<PaddedActivatedSums<T, source()>>, args, kShared, stream);
  });
}

// Defines the entries of one type (entries.h).
#define BN_EXT_DEFINE_ENTRIES(NAME, T)                                                                            \
  cudaError_t forward_##NAME(const ForwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {   \
    return forward_of<T>(args, plan, workspace, stream);                                                          \
  }                                                                                                               \
  cudaError_t backward_##NAME(const BackwardArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) { \
    return backward_of<T>(args, plan, workspace, stream);                                                         \
  }                                                                                                               \
  cudaError_t double_backward_##NAME(const DoubleBackwardArgs& args, const Plan& plan, void* workspace,           \
                                     cudaStream_t stream) {                                                       \
    return double_backward_of<T>(args, plan, workspace, stream);                                                  \
  }                                                                                                               \
  cudaError_t forward_pieces_##NAME(const PieceArgs<ForwardArgs>& args, const Plan& plan, void* workspace,        \
                                    cudaStream_t stream) {                                                        \
    return forward_pieces_of<T>(args, plan, workspace, stream);                                                   \
  }                                                                                                               \
  cudaError_t backward_pieces_##NAME(const PieceArgs<BackwardArgs>& args, const Plan& plan, void* workspace,      \
                                     cudaStream_t stream) {                                                       \
    return backward_pieces_of<T>(args, plan, workspace, stream);                                                  \
  }                                                                                                               \
  cudaError_t padded_##NAME(PaddedPass pass, const PaddedArgs& args, cudaStream_t stream) {                       \
    return padded_of<T>(pass, args, stream);                                                                      \
  }

}  // namespace cuda
}  // namespace bn_ext

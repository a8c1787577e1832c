// The C entries through which tests reach the CUDA operators. The arguments of all passes come in one struct of 8-byte
// fields, as tests/simt_support.py fills it; the plan is made here, for the modelled device, as the glue makes it.
#include <string>

#include "cuda/cut.h"
#include "cuda/launch.h"
#include "cuda/padded.h"

#define ENTRY extern "C" __attribute__((visibility("default")))

namespace {

struct Tensor {
  void* data;
  int64_t stride_n, stride_c, stride_l;
  bn_ext::TensorRef ref() const { return {data, stride_n, stride_c, stride_l}; }
};

struct Vector {
  void* data;
  int64_t dtype, stride;
  bn_ext::VectorRef ref() const { return {data, static_cast<bn_ext::DType>(dtype), stride}; }
};

struct Call {
  int64_t n, c, l, dtype;
  Tensor x, y, dy, dx, gg_x, grad_dy;
  Vector weight, bias, running_mean, running_var, grad_weight, grad_bias, gg_weight, gg_bias;
  int64_t* num_batches_tracked;
  int64_t cumulative;
  double momentum, eps;
  void* saved;
  Tensor residual, grad_residual;
  int64_t activation;  // bn_ext::Activation
  double negative_slope;
  uint8_t* mask;
  int64_t training;
  double* result;
  const double* given;
  int64_t parts;
  const int64_t* lengths;
  const uint8_t* valid;
  int64_t renorms;  // forward by what follows; backward of such a forward
  Vector renorm_mean, renorm_var;
  const int64_t* renorm_batches;
  double max_r, max_d;
  int64_t warmup_steps, smooth;
  int64_t batches, batch_size, mask_step;  // virtual ones
};

bn_ext::Epilogue epilogue_of(const Call& call) {
  return {static_cast<bn_ext::Activation>(call.activation), call.negative_slope, call.residual.ref(), call.mask,
          call.mask_step};
}

template <typename Args>
Args common_args(const Call& call) {
  Args a;
  a.shape = {call.n, call.c, call.l};
  a.dtype = static_cast<bn_ext::DType>(call.dtype);
  a.x = call.x.ref();
  a.weight = call.weight.ref();
  a.saved = call.saved;
  a.training = call.training != 0;
  a.epilogue = epilogue_of(call);
  a.stage = {call.result, call.given, call.parts};
  a.valid = {call.lengths, call.valid};
  if (call.batches > 0) a.batches = {call.batches, call.batch_size};
  return a;
}

bn_ext::ForwardArgs forward_args(const Call& call) {
  auto a = common_args<bn_ext::ForwardArgs>(call);
  a.y = call.y.ref();
  a.bias = call.bias.ref();
  a.running_mean = call.running_mean.ref();
  a.running_var = call.running_var.ref();
  a.eps = call.eps;
  a.num_batches_tracked = call.num_batches_tracked;
  a.cumulative = call.cumulative != 0;
  a.momentum = call.momentum;
  a.renorm = {call.renorms != 0, call.renorm_mean.ref(), call.renorm_var.ref(), call.renorm_batches, call.max_r,
              call.max_d,        call.warmup_steps,      call.smooth != 0};
  return a;
}

template <typename Args = bn_ext::BackwardArgs>
Args backward_args(const Call& call) {
  auto a = common_args<Args>(call);
  a.dy = call.dy.ref();
  a.dx = call.dx.ref();
  a.grad_weight = call.grad_weight.ref();
  a.grad_bias = call.grad_bias.ref();
  a.grad_residual = call.grad_residual.ref();
  a.by_renorm = call.renorms != 0;
  return a;
}

bn_ext::DoubleBackwardArgs double_backward_args(const Call& call) {
  auto a = backward_args<bn_ext::DoubleBackwardArgs>(call);
  a.gg_x = call.gg_x.ref();
  a.grad_dy = call.grad_dy.ref();
  a.gg_weight = call.gg_weight.ref();
  a.gg_bias = call.gg_bias.ref();
  return a;
}

cudaError_t make_plan(int64_t pass, const Call& call, bn_ext::Plan* plan) {
  bn_ext::Device device;
  const cudaError_t error = bn_ext::cuda::query_device(0, &device);
  if (error != cudaSuccess) return error;
  switch (static_cast<bn_ext::Pass>(pass)) {
    case bn_ext::Pass::kForward:
    case bn_ext::Pass::kInference:
      *plan = plan_forward(forward_args(call), device);
      break;
    case bn_ext::Pass::kDoubleBackward:
      *plan = plan_double_backward(double_backward_args(call), device);
      break;
    default:
      *plan = plan_backward(backward_args(call), device);
  }
  return cudaSuccess;
}

struct Field {
  const char* name;
  int64_t (*of)(const bn_ext::Plan&);
};
#define FIELD(name)                                                           \
  Field {                                                                     \
    #name, [](const bn_ext::Plan& p) { return static_cast<int64_t>(p.name); } \
  }
const Field kFields[] = {FIELD(exchange),
                         FIELD(planes),
                         FIELD(pooled),
                         FIELD(stream_output),
                         FIELD(vector),
                         FIELD(tx),
                         FIELD(ty),
                         FIELD(span),
                         FIELD(modulo),
                         FIELD(lanes),
                         FIELD(groups),
                         FIELD(column_step),
                         FIELD(tile_channels),
                         FIELD(tail),
                         FIELD(kept),
                         FIELD(channels),
                         FIELD(vectors),
                         FIELD(tiles),
                         FIELD(fast),
                         FIELD(rows),
                         FIELD(inner),
                         FIELD(step_inner),
                         FIELD(splits),
                         FIELD(split_rows),
                         FIELD(count),
                         FIELD(pieces),
                         FIELD(launches),
                         FIELD(blocks()),
                         FIELD(read_bytes),
                         FIELD(write_bytes),
                         FIELD(workspace_bytes),
                         FIELD(shared_bytes)};

}  // namespace

// The names of what drive_plan fills in, in order, each followed by a space.
ENTRY const char* drive_plan_fields() {
  static std::string names;
  names.clear();
  for (const Field& field : kFields) names += std::string(field.name) + " ";
  return names.c_str();
}

ENTRY int drive_plan(int64_t pass, const Call* call, int64_t* fields) {
  bn_ext::Plan plan;
  const cudaError_t error = make_plan(pass, *call, &plan);
  for (const Field& field : kFields) *fields++ = field.of(plan);
  return error;
}

ENTRY int drive_forward(const Call* call, void* workspace) {
  bn_ext::Plan plan;
  const cudaError_t error = make_plan(static_cast<int64_t>(bn_ext::Pass::kForward), *call, &plan);
  if (error != cudaSuccess) return error;
  return bn_ext::cuda::forward(forward_args(*call), plan, workspace, nullptr);
}

ENTRY int drive_backward(const Call* call, void* workspace) {
  bn_ext::Plan plan;
  const cudaError_t error = make_plan(static_cast<int64_t>(bn_ext::Pass::kBackward), *call, &plan);
  if (error != cudaSuccess) return error;
  return bn_ext::cuda::backward(backward_args(*call), plan, workspace, nullptr);
}

// Of a padded batch: bytes of workspace, and the passes.
ENTRY int64_t drive_padded_bytes(int64_t backward, const Call* call) {
  bn_ext::Device device;
  if (bn_ext::cuda::query_device(0, &device) != cudaSuccess) return -1;
  return backward ? bn_ext::cuda::padded_bytes(backward_args(*call), device)
                  : bn_ext::cuda::padded_bytes(forward_args(*call), device);
}

ENTRY int drive_padded_forward(const Call* call, void* workspace) {
  bn_ext::Device device;
  const cudaError_t error = bn_ext::cuda::query_device(0, &device);
  return error ? error : bn_ext::cuda::padded_forward(forward_args(*call), device, workspace, nullptr);
}

ENTRY int drive_padded_backward(const Call* call, void* workspace) {
  bn_ext::Device device;
  const cudaError_t error = bn_ext::cuda::query_device(0, &device);
  return error ? error : bn_ext::cuda::padded_backward(backward_args(*call), device, workspace, nullptr);
}

// Of virtual batches: the plans of the earlier ones and of the last, whether those go together, bytes of workspace.
static cudaError_t make_cut(int64_t backward, const Call& call, bn_ext::cuda::CutPlan* plan) {
  bn_ext::Device device;
  const cudaError_t error = bn_ext::cuda::query_device(0, &device);
  *plan = backward ? bn_ext::cuda::plan_backward_cut(backward_args(call), device)
                   : bn_ext::cuda::plan_forward_cut(forward_args(call), device);
  return error;
}

ENTRY int drive_cut_plan(int64_t backward, const Call* call, int64_t* earlier, int64_t* last, int64_t* together,
                         int64_t* workspace_bytes) {
  bn_ext::cuda::CutPlan plan;
  const cudaError_t error = make_cut(backward, *call, &plan);
  for (const Field& field : kFields) *earlier++ = field.of(plan.earlier), *last++ = field.of(plan.last);
  *together = plan.together;
  *workspace_bytes = plan.workspace_bytes;
  return error;
}

ENTRY int drive_cut_forward(const Call* call, void* workspace) {
  bn_ext::cuda::CutPlan plan;
  const cudaError_t error = make_cut(0, *call, &plan);
  return error ? error : bn_ext::cuda::forward_cut(forward_args(*call), plan, workspace, nullptr);
}

ENTRY int drive_cut_backward(const Call* call, void* workspace) {
  bn_ext::cuda::CutPlan plan;
  const cudaError_t error = make_cut(1, *call, &plan);
  return error ? error : bn_ext::cuda::backward_cut(backward_args(*call), plan, workspace, nullptr);
}

ENTRY int drive_double_backward(const Call* call, void* workspace) {
  bn_ext::Plan plan;
  const cudaError_t error = make_plan(static_cast<int64_t>(bn_ext::Pass::kDoubleBackward), *call, &plan);
  if (error != cudaSuccess) return error;
  return bn_ext::cuda::double_backward(double_backward_args(*call), plan, workspace, nullptr);
}

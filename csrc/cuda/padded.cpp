#include "cuda/padded.h"

#include <algorithm>

#include "cuda/entries.h"

namespace bn_ext {
namespace cuda {
namespace {

// How the input, and what is laid as it, is covered.
template <class Args>
PaddedArgs cover(const Args& of, const Device& device) {
  PaddedArgs a;
  a.shape = of.shape;
  a.dtype = of.dtype;
  a.x = of.x;
  a.valid = of.valid;
  a.batches = of.batches;
  if (of.shape.c > 1 && (of.shape.l == 1 || of.x.stride_c < of.x.stride_l)) {  // neighbours are channels
    a.tx = 32;
    a.ty = kPaddedThreads / a.tx;
  }
  constexpr int64_t kMostParts = 64;  // which a thread merges one by one
  const VirtualBatches& v = of.batches;
  const int64_t samples = std::max(v.size, v.samples(v.count - 1, of.shape.n));  // the last one may be the largest
  const int64_t tiles = (of.shape.c + a.tx - 1) / a.tx * v.count, positions = samples * of.shape.l;
  const int64_t wanted = (4 * int64_t{device.sms} + tiles - 1) / tiles, most = (positions + a.ty - 1) / a.ty;
  const int64_t parts = std::max<int64_t>(1, std::min({wanted, most, kMostParts}));
  a.part_positions = (positions + parts - 1) / parts;
  a.parts = (positions + a.part_positions - 1) / a.part_positions;
  return a;
}

#define BN_EXT_TRY(call) \
  if (const cudaError_t error = (call); error != cudaSuccess) return error

template <class Args>
int64_t bytes_of_parts(const Args& a, const Device& device, int64_t rows) {
  const int64_t bytes = a.batches.count * cover(a, device).parts * rows * a.shape.c * int64_t{sizeof(double)};
  return (bytes + 15) / 16 * 16;
}

// The sums of what counts, to be given to the pass that writes.
template <class Args>
cudaError_t give(PaddedPass pass, PaddedArgs of, void* memory, Args* a, cudaStream_t stream) {
  of.result = static_cast<double*>(memory);
  a->stage.given = of.result;
  a->stage.parts = of.parts;
  for (; of.first < of.batches.count; of.first += kMostRows) {
    BN_EXT_TRY(of_type(of.dtype, padded_float32, padded_float64, padded_bfloat16, padded_float16)(pass, of, stream));
  }
  return cudaSuccess;
}

// Launches that take the virtual batches of one size side by side and the last one, where it is of another, alone.
template <class Args>
cudaError_t write(const Args& a, const Device& device, Plan (*plan_for)(const Args&, const Device&, Cut),
                  cudaError_t (*pass)(const Args&, const Plan&, void*, cudaStream_t), cudaStream_t stream) {
  const int64_t last = a.batches.count - 1, alike = last + (a.batches.samples(last, a.shape.n) == a.batches.size);
  if (last > 0) {
    Plan plan = plan_for(a, device, Cut::kBeside);
    for (; plan.first < alike; plan.first += plan.pieces) {
      plan.pieces = std::min(alike - plan.first, kMostRows);
      BN_EXT_TRY(pass(a, plan, nullptr, stream));
    }
    if (alike > last) return cudaSuccess;
  }
  Plan plan = plan_for(virtual_batch(a, last), device, Cut::kWhole);
  plan.first = last;
  return pass(a, plan, nullptr, stream);
}

}  // namespace

int64_t padded_bytes(const ForwardArgs& a, const Device& device) {
  return a.training ? bytes_of_parts(a, device, kMomentRows) : 0;
}
int64_t padded_bytes(const BackwardArgs& a, const Device& device) {
  return a.sums() ? bytes_of_parts(a, device, kSumRows) : 0;
}

cudaError_t padded_forward(const ForwardArgs& args, const Device& device, void* workspace, cudaStream_t stream) {
  ForwardArgs a = args;
  if (a.training) {
    BN_EXT_TRY(give(PaddedPass::kMoments, cover(a, device), workspace, &a, stream));
  }
  return write(a, device, plan_forward, forward, stream);
}

cudaError_t padded_backward(const BackwardArgs& args, const Device& device, void* workspace, cudaStream_t stream) {
  BackwardArgs a = args;
  if (a.sums()) {
    PaddedArgs of = cover(a, device);
    of.dy = a.dy;
    of.saved = a.saved;
    of.by_renorm = a.by_renorm;
    of.epilogue = a.epilogue;
    of.places = a.grad_residual ? a.grad_residual : a.dx;
    BN_EXT_TRY(give(PaddedPass::kSums, of, workspace, &a, stream));
  }
  if (!a.training && !a.epilogue.activates()) {  // a pass that writes dx while it sums: here it only scales
    BackwardArgs scaling = a;
    scaling.grad_weight = scaling.grad_bias = {};
    scaling.stage = {};
    if (a.dx) BN_EXT_TRY(backward(scaling, plan_backward(scaling, device), nullptr, stream));
    if (!a.sums()) return cudaSuccess;
    a.dx = {};
  }
  return write(a, device, plan_backward, backward, stream);
}

}  // namespace cuda
}  // namespace bn_ext

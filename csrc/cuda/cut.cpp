#include "cuda/cut.h"

#include <algorithm>

#include "cuda/entries.h"

namespace bn_ext {
namespace cuda {
namespace {

constexpr double kLaunch = 2.0;  // microseconds from one launch to the next; to be set by measurement

template <class Args, class PlanFor>
CutPlan plan_cut(const Args& a, const Device& d, const PlanFor& plan_for) {
  const int64_t earlier = a.batches.count - 1;
  const Args last = virtual_batch(a, earlier);
  const auto time_of = [](const Plan& p) { return p.time + kLaunch * p.launches; };
  CutPlan together{plan_for(a, d, Cut::kBeside), plan_for(last, d, Cut::kLast), true};
  CutPlan each{plan_for(a, d, Cut::kEach), plan_for(last, d, Cut::kWhole), false};
  const double of_together = time_of(together.earlier) + time_of(together.last);
  const double of_each = static_cast<double>(earlier) * time_of(each.earlier) + time_of(each.last);
  CutPlan& best = of_together <= of_each ? together : each;
  best.left_bytes = earlier * 2 * a.shape.c * int64_t{sizeof(double)};
  best.workspace_bytes = best.left_bytes + std::max(best.earlier.workspace_bytes, best.last.workspace_bytes);
  return best;
}

template <class Args, class Entry>
cudaError_t run_cut(const Args& args, const CutPlan& plan, void* workspace, cudaStream_t stream, Entry* entry) {
  PieceArgs<Args> a{args};
  const int64_t earlier = args.batches.count - 1;
  void* const partials = static_cast<char*>(workspace) + plan.left_bytes;
  a.left = static_cast<double*>(workspace);
  a.leaves = true;
  Plan rows = plan.earlier;
  for (; a.first < earlier; a.first += rows.pieces) {
    rows.pieces = plan.together ? std::min(earlier - a.first, kMostRows) : 1;
    if (const auto error = entry(a, rows, partials, stream); error != cudaSuccess) return error;
  }
  static_cast<Args&>(a) = virtual_batch(args, earlier);
  a.first = 0;
  a.earlier = earlier;
  a.leaves = false;
  return entry(a, plan.last, partials, stream);
}

}  // namespace

CutPlan plan_forward_cut(const ForwardArgs& args, const Device& device) { return plan_cut(args, device, plan_forward); }
CutPlan plan_backward_cut(const BackwardArgs& args, const Device& device) {
  return plan_cut(args, device, plan_backward);
}

cudaError_t forward_cut(const ForwardArgs& args, const CutPlan& plan, void* workspace, cudaStream_t stream) {
  if (plan.earlier.vector == 1 || plan.last.vector == 1) {
    if (const auto error = clear_mask(args, 0, args.batches.count, stream); error != cudaSuccess) return error;
  }
  return run_cut(args, plan, workspace, stream,
                 of_type(args.dtype, forward_pieces_float32, forward_pieces_float64, forward_pieces_bfloat16,
                         forward_pieces_float16));
}

cudaError_t backward_cut(const BackwardArgs& args, const CutPlan& plan, void* workspace, cudaStream_t stream) {
  return run_cut(args, plan, workspace, stream,
                 of_type(args.dtype, backward_pieces_float32, backward_pieces_float64, backward_pieces_bfloat16,
                         backward_pieces_float16));
}

}  // namespace cuda
}  // namespace bn_ext

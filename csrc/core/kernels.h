// The torch-free interface between tensors and kernels: what a pass is given. One family: a call without a residual
// and an activation is plain batch norm.
// Kernels trust what they are given; every check is made at the op's entry (torch/checks.h).
#pragma once

#include <type_traits>

#include "activation.h"
#include "renorm.h"
#include "tensors.h"
#include "valid.h"
#include "virtual_batch.h"
#include "welford.h"

namespace bn_ext {

// Rows of `saved`, what forward leaves for backward: (kSavedRows, C) in accumulate_type(dtype). mean_hi + mean_lo is
// the mean; the last three rows are formulas.h's Normalise (mean_hi, scale, shift), by which backward computes an
// activation's argument anew. A renormalised batch has two rows more, renorm.h's r and d, which Normalise contains.
// Those of virtual batches lie one after the other.
enum SavedRow : int {
  kSavedMeanHi,
  kSavedMeanLo,
  kSavedInvstd,
  kSavedNormalise,
  kSavedRows = kSavedNormalise + 3,
  kSavedR = kSavedRows,
  kSavedD,
  kSavedRenormRows
};
BN_HD int saved_rows(bool renormalised) { return renormalised ? kSavedRenormRows : kSavedRows; }

// A pass in two stages, for a batch of which this tensor is a part: the first ends with its reduction, the second
// begins behind it, with the results of all parts, merged in their order. Results of a part: (kMomentRows, C) doubles
// of forward's, (kSumRows, C) of backward's in training. Neither is given: both stages at once.
enum MomentRow : int { kMomentCount, kMomentMeanHi, kMomentMeanLo, kMomentM2, kMomentRows };
enum SumRow : int { kSumCount, kSumDy, kSumDot, kSumRows };  // dot: of dy with x - mean
struct Stage {
  double* result = nullptr;
  const double* given = nullptr;
  int64_t parts = 0;  // of what is given
};

// Channel c of a stage's results: of what is given in its parts' order, and into the result.
BN_HD Moments<double> given_moments(const Stage& stage, int64_t c, int64_t channels) {
  Moments<double> all;
  const double* part = stage.given + c;
  for (int64_t i = 0; i < stage.parts; ++i, part += kMomentRows * channels) {
    all = merge<double>(all, {part[kMomentCount * channels], part[kMomentMeanHi * channels],
                              part[kMomentMeanLo * channels], part[kMomentM2 * channels]});
  }
  return all;
}
BN_HD void put_result(const Stage& stage, int64_t c, int64_t channels, const Moments<double>& m) {
  const double values[kMomentRows] = {m.count, m.mean_hi, m.mean_lo, m.m2};
  for (int k = 0; k < kMomentRows; ++k) stage.result[k * channels + c] = values[k];
}
struct GradientSum {
  double count = 0, dy = 0, dot = 0;
};
BN_HD GradientSum given_sums(const Stage& stage, int64_t c, int64_t channels) {
  GradientSum all;
  const double* part = stage.given + c;
  for (int64_t i = 0; i < stage.parts; ++i, part += kSumRows * channels) {
    all.count += part[kSumCount * channels];
    all.dy += part[kSumDy * channels];
    all.dot += part[kSumDot * channels];
  }
  return all;
}
BN_HD void put_result(const Stage& stage, int64_t c, int64_t channels, const GradientSum& s) {
  const double values[kSumRows] = {s.count, s.dy, s.dot};
  for (int k = 0; k < kSumRows; ++k) stage.result[k * channels + c] = values[k];
}

struct ForwardArgs {
  Shape shape;
  DType dtype;
  TensorRef x, y;  // y absent where a stage ends with its result
  VectorRef weight, bias, running_mean, running_var;
  bool training = true;  // by the batch's statistics, which move the running ones; else by the running ones
  double eps = 0;
  double momentum = 0;
  int64_t* num_batches_tracked = nullptr;
  bool cumulative = false;  // momentum=None: 1 / num_batches_tracked after this batch
  void* saved = nullptr;    // evaluation: nullptr where there will be no backward
  Epilogue epilogue;
  Stage stage;             // in training
  VirtualBatches batches;  // in training
  Valid valid;             // of a padded batch; what does not count is written as zero
  Renorm renorm;           // in training
  BN_HD bool renormalised() const { return bool(renorm); }
};

struct BackwardArgs {
  Shape shape;
  DType dtype;
  TensorRef dy, x, dx;  // dx absent: only the reductions are wanted; its strides are the output's all the same
  VectorRef weight, grad_weight, grad_bias;
  const void* saved = nullptr;
  bool training = true;
  Epilogue epilogue;        // with an activation, or nothing
  TensorRef grad_residual;  // laid as dx; with an activation only
  Stage stage;              // what is given, in training alone
  VirtualBatches batches;   // in training
  Valid valid;              // as forward had it
  bool by_renorm = false;   // forward had a Renorm
  BN_HD bool renormalised() const { return by_renorm; }
  // Whether sums over the channels are needed, for a result, for the parameters or for training's dx.
  BN_HD bool sums() const { return stage.result || grad_weight || grad_bias || (training && dx); }
};

// Derivatives of the gradients above, without an epilogue: dx and grad_weight are here what flows on to the input and
// to the weight, and grad_bias is not used.
struct DoubleBackwardArgs : BackwardArgs {
  TensorRef gg_x;                // what arrives at backward's dx; absent: zero
  TensorRef grad_dy;             // what flows on to dy; absent: not wanted
  VectorRef gg_weight, gg_bias;  // what arrives at backward's grad_weight and grad_bias; absent: zero
};

// A tensor from sample n on; `saved` from virtual batch i on.
BN_HD TensorRef from_sample(TensorRef t, int64_t n, DType dtype) {
  if (t) t.data = static_cast<char*>(t.data) + n * t.stride_n * element_bytes(dtype);
  return t;
}
template <class Args>
BN_HD void* saved_from(const Args& a, int64_t i) {
  const int64_t bytes = i * saved_rows(a.renormalised()) * a.shape.c * element_bytes(accumulate_type(a.dtype));
  const void* saved = a.saved;
  return saved ? const_cast<char*>(static_cast<const char*>(saved)) + bytes : nullptr;
}

// A pass over virtual batch i alone, which reads and moves the running statistics of the whole.
template <class Args>
BN_HD Args virtual_batch(const Args& a, int64_t i) {
  Args one = a;
  const int64_t n = a.batches.begin(i);
  one.batches = VirtualBatches();
  one.shape.n = a.batches.samples(i, a.shape.n);
  one.valid = from_sample(a.valid, n, a.shape);
  one.x = from_sample(a.x, n, a.dtype);
  if (a.epilogue.mask) one.epilogue.mask += i * a.epilogue.mask_step;
  one.epilogue.residual = from_sample(a.epilogue.residual, n, a.dtype);
  one.saved = saved_from(a, i);
  if constexpr (std::is_base_of<ForwardArgs, Args>::value) {
    one.y = from_sample(a.y, n, a.dtype);
  } else {
    one.dy = from_sample(a.dy, n, a.dtype);
    one.dx = from_sample(a.dx, n, a.dtype);
    one.grad_residual = from_sample(a.grad_residual, n, a.dtype);
  }
  return one;
}

// A parallel loop lent by the glue: body(context, begin, end) over [0, tasks), at least `grain` tasks a thread.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) = nullptr;
};

namespace cpu {

struct Kernels {
  void (*forward)(const ForwardArgs&, const Parallel&);
  void (*backward)(const BackwardArgs&, const Parallel&);
  void (*double_backward)(const DoubleBackwardArgs&, const Parallel&);
};

// The same body compiled once per instruction-set level; a level that this build lacks is nullptr.
const Kernels* kernels_default();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

}  // namespace cpu
}  // namespace bn_ext

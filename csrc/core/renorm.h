// Batch renormalisation (Ioffe, "Batch Renormalization", 2017): y = ((x - mean) / std * r + d) * weight + bias, where
//   r = clamp(std / running_std, 1 / max_r, max_r),  d = clamp((mean - running_mean) / running_std, -max_d, max_d)
// are constants, so to every pass it is batch norm with the weight weight * r and the bias bias + weight * d.
#pragma once

#include "tensors.h"

namespace bn_ext {

struct Renorm {
  bool given = false;  // else plain batch norm
  // What r and d go by, read before the running statistics move. On CUDA no memory that the pass writes, as a block may
  // come to read what another has moved.
  VectorRef mean, var;
  const int64_t* batches = nullptr;  // counted before this one; asked for where there is a warm-up
  double max_r = 1, max_d = 0;
  int64_t warmup_steps = 0;
  bool smooth = false;
  BN_HD explicit operator bool() const { return given; }
};

struct RenormFactors {
  double r = 1, d = 0;
};

// How much of r - 1 and of d applies: 0 in the warm-up, where `smooth` the part of it that is over, and 1 behind it.
BN_HD double warmed_up(const Renorm& n, int64_t batches) {
  if (batches >= n.warmup_steps) return 1;
  return n.smooth && batches > 0 ? static_cast<double>(batches) / static_cast<double>(n.warmup_steps) : 0;
}

// NaN stays NaN.
BN_HD double clamped(double value, double low, double high) { return value < low ? low : value > high ? high : value; }

// invstd of the batch and of the running variance, 1 / sqrt(var + eps) both; away: mean - running_mean.
BN_HD RenormFactors renorm_factors(const Renorm& n, double share, double away, double invstd, double running_invstd) {
  RenormFactors f;
  if (share == 0) return f;  // batch norm to the bit
  f.r = 1 + (clamped(running_invstd / invstd, 1 / n.max_r, n.max_r) - 1) * share;
  f.d = clamped(away * running_invstd, -n.max_d, n.max_d) * share;
  return f;
}

}  // namespace bn_ext

// Per-channel coefficients of normalise and backward, each formula written once for CPU and CUDA.
//
// Forward   y  = (x - mean_hi) * scale + shift          scale = invstd * weight, shift = bias - mean_lo * scale
// Backward  dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale      (training: batch statistics)
//           dx = dy * scale                                                   (evaluation: fixed statistics)
// with  invstd = 1 / sqrt(var + eps),  dy_hi + dy_lo = mean(dy),  k = mean(dy * (x - mean)) * invstd^2,
//       slope = k,  offset = mean_lo * k - dy_lo.
// It is Ioffe & Szegedy 2015's gradient with mean and mean(dy) carried as hi + lo: the low words cost nothing per
// element.
#pragma once

#include <string.h>

#include "welford.h"

namespace bn_ext {

template <typename A>
struct Normalise {
  A mean_hi, scale, shift;
};

template <typename A>
struct Gradient {
  A mean_hi, dy_hi, scale, slope, offset;
};

// hi + lo of type A nearest to the double-double (hi + lo).
template <typename A, typename W>
BN_HD void split(W value_hi, W value_lo, A* hi, A* lo) {
  *hi = static_cast<A>(value_hi);
  const W rest = value_hi - static_cast<W>(*hi);
  const A low = static_cast<A>(rest + value_lo);  // before the choice, which is then no branch
  *lo = is_finite(rest) ? low : A(0);
}

// W is the wide type (double on the CPU), A the type that the element-wise pass computes in. A mean within one standard
// deviation of zero moves into shift, where it cancels nothing: mean_hi = 0 then lets the pass leave the subtraction
// out.
template <typename A, typename W>
BN_HD Normalise<A> normalise_coefficients(A mean_hi, A mean_lo, W variance, W invstd, W weight, W bias) {
  Normalise<A> r;
  const W scale = invstd * weight, mean = static_cast<W>(mean_hi) + static_cast<W>(mean_lo);
  const bool fold = mean * mean <= variance;
  r.mean_hi = fold ? A(0) : mean_hi;
  r.scale = static_cast<A>(scale);
  // With scale as it is rounded, so that both terms of x * scale + shift carry the same one.
  const W low = static_cast<W>(mean_lo);
  r.shift = static_cast<A>(bias - (fold ? mean : low) * static_cast<W>(r.scale));
  return r;
}

// sum_dy = sum(dy), dot = sum(dy * (x - mean)) over `count` values of the channel. mean_lo is what mean_hi lacks.
template <typename A, typename W>
BN_HD Gradient<A> gradient_coefficients(A mean_hi, W mean_lo, W invstd, W weight, W sum_dy, W dot, W count) {
  Gradient<A> r;
  const W scale = invstd * weight;
  const W k = dot / count * invstd * invstd;
  A dy_lo;
  split<A, W>(sum_dy / count, W(0), &r.dy_hi, &dy_lo);
  r.mean_hi = mean_hi;
  r.scale = static_cast<A>(scale);
  r.slope = static_cast<A>(k);
  r.offset = static_cast<A>(mean_lo * k - static_cast<W>(dy_lo));
  return r;
}

// What a reduction subtracts from x in place of the mean: sum(dy * (x - mean)) = sum(dy * (x - k)) - (mean - k) *
// sum(dy). The difference x - mean has, for all x of one binade, the same rounding error, which a sum over many values
// adds up; x - k has none, or a random one, where the last bit of k is no finer than the last bits of the differences.
// So k is the mean without its last 6 bits or, where it is smaller than the standard deviation, rounded to 2^-20
// (double: 2^-45) of that. eps is part of invstd: of a variance far below eps, k is the nearer to the mean the larger
// that is.
template <typename A, typename Bits>
BN_HD A masked(A value, Bits mask) {
  Bits bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= mask;
  memcpy(&value, &bits, sizeof(bits));
  return value;
}
template <typename A>
BN_HD A coarse_shift(A mean_hi, A invstd) {
  A truncated, power;  // power: of two, of invstd
  if constexpr (sizeof(A) == sizeof(float)) {
    truncated = masked(mean_hi, ~63u);
    power = masked(invstd, 0x7f800000u);
  } else {
    truncated = masked(mean_hi, ~63ull);
    power = masked(invstd, 0x7ff0000000000000ull);
  }
  // A number whose last bit is the wanted one takes the finer ones away.
  const A large = (sizeof(A) == sizeof(float) ? A(12) : A(192)) / power;
  const A rounded = (mean_hi + large) - large, ratio = mean_hi * invstd;
  // All of it before the choices, which are then no branches.
  const A small = power > A(0) ? rounded : A(0);
  return ratio > A(1) || ratio < A(-1) ? truncated : small;
}

// running = (1 - momentum) * running + momentum * batch, as nn.BatchNorm1d defines momentum.
template <typename W>
BN_HD W running_update(W running, W batch, W momentum) {
  return (W(1) - momentum) * running + momentum * batch;
}

}  // namespace bn_ext

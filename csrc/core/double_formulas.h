// Per-channel coefficients of the second derivatives, written once for CPU and CUDA.
//
// Backward maps (dy, x, weight) to dx, grad_weight and grad_bias; gg, a and b are the gradients that arrive at these.
// Their product with backward's results is, for a channel of m values with xhat = (x - mean) * s, s = invstd, p =
// mean(dy * xhat), q = mean(gg * xhat) and c = mean(gg * dy) - mean(gg) * mean(dy),
//       J = m * weight * s * (c - p * q) + a * m * p + b * sum(dy).
// xhat depends on x through the statistics too: d xhat_j / d x_i = s * ([i = j] - 1 / m - xhat_i * xhat_j / m) and
// d s / d x_i = -s^2 * xhat_i / m. So, with alpha = a - weight * s * q and beta = -weight * s * p,
//       dJ/d dy     = (gg - mean(gg)) * weight * s + xhat * alpha + b
//       dJ/d x      = ((dy - mean(dy)) * alpha + (gg - mean(gg)) * beta + xhat * delta) * s
//       delta       = -(weight * s * (c - 3 * p * q) + a * p)
//       dJ/d weight = m * s * (c - p * q).
// In evaluation xhat's statistics are constants: the means, p, q and delta are zero, and c is mean(gg * dy).
#pragma once

#include "formulas.h"

namespace bn_ext {

// Sums over a channel, in this order: dy, dy * (x - mean), gg, gg * (x - mean), gg * dy.
constexpr int kDoubleSums = 5;

template <typename A>
struct DoubleGradient {
  A mean_hi, invstd, gg_hi, dy_hi, scale, alpha, beta, delta, offset_dy, offset_x;
};
constexpr int kDoubleCoefficients = 10;

// What backward's inputs and the gradients of its results are in a channel; the mean as hi + lo.
template <typename A, typename W>
struct DoubleChannel {
  A mean_hi, mean_lo;
  W invstd, weight, gg_weight, gg_bias, count;
  bool training;
};

// The low words of the means go into the offsets, as in gradient_coefficients.
template <typename A, typename W>
BN_HD DoubleGradient<A> double_coefficients(const DoubleChannel<A, W>& c, const W* sums) {
  DoubleGradient<A> r;
  const W s = c.invstd, scale = c.weight * s, none = W(0);
  const W mean_dy = c.training ? sums[0] / c.count : none, mean_gg = c.training ? sums[2] / c.count : none;
  const W p = c.training ? sums[1] / c.count * s : none, q = c.training ? sums[3] / c.count * s : none;
  const W alpha = c.gg_weight - scale * q, beta = -scale * p;
  const W covariance = sums[4] / c.count - mean_gg * mean_dy;
  const W delta = c.training ? -(scale * (covariance - W(3) * p * q) + c.gg_weight * p) : none;
  A dy_lo, gg_lo;
  split<A, W>(mean_dy, none, &r.dy_hi, &dy_lo);
  split<A, W>(mean_gg, none, &r.gg_hi, &gg_lo);
  const W xhat_lo = static_cast<W>(c.mean_lo) * s;
  r.mean_hi = c.mean_hi;
  r.invstd = static_cast<A>(s);
  r.scale = static_cast<A>(scale);
  r.alpha = static_cast<A>(alpha);
  r.beta = static_cast<A>(beta);
  r.delta = static_cast<A>(delta);
  r.offset_dy = static_cast<A>(c.gg_bias - static_cast<W>(gg_lo) * scale - xhat_lo * alpha);
  r.offset_x = static_cast<A>(-(static_cast<W>(dy_lo) * alpha + static_cast<W>(gg_lo) * beta + xhat_lo * delta));
  return r;
}

template <typename A, typename W>
BN_HD W double_grad_weight(const DoubleChannel<A, W>& c, const W* sums) {
  if (!c.training) return c.invstd * sums[4];
  const W product = sums[0] * sums[2] + sums[1] * sums[3] * c.invstd * c.invstd;
  return c.invstd * (sums[4] - product / c.count);
}

// What a position adds to the sums, of dy, x - mean and gg.
template <typename V>
BN_HD void double_terms(const V* in, V* term) {
  term[0] = in[0];
  term[1] = in[0] * in[1];
  term[2] = in[2];
  term[3] = in[2] * in[1];
  term[4] = in[2] * in[0];
}

// One position: of dy, x and gg the gradients with respect to dy and x. c holds the coefficients in DoubleGradient's
// order; V is a number or a vector of them.
template <typename V>
BN_HD void double_gradients(const V* in, const V* c, V* out) {
  const V xhat = (in[1] - c[0]) * c[1], gg = in[2] - c[2];
  out[0] = (gg * c[4] + c[8]) + xhat * c[5];
  out[1] = (((in[0] - c[3]) * c[5] + c[9]) + gg * c[6] + xhat * c[7]) * c[1];
}

}  // namespace bn_ext

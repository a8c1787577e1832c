// Welford's (count, mean, M2) and its parallel merge: the one statistics formula of the CPU and CUDA kernels.
//
// Sources: Welford 1962 for the running update; Chan, Golub, LeVeque 1983 ("Algorithms for computing the sample
// variance") for the merge. The mean is kept as an unevaluated sum of two numbers (hi + lo, Dekker 1971), because a
// mean rounded to one word is what limits the accuracy of (x - mean) when |mean| is much larger than the standard
// deviation.
#pragma once

#include "host_device.h"

namespace bn_ext {

template <typename A>
struct Moments {
  A count = 0;
  A mean_hi = 0;
  A mean_lo = 0;
  A m2 = 0;
};

// inf - inf is NaN while NaN - NaN is NaN: false for both, true for every finite value. No libm call, so it vectorises.
template <typename A>
BN_HD bool is_finite(A value) {
  return value - value == A(0);
}

// sum = fl(a + b), error = (a + b) - sum exactly (Knuth's two-sum). An infinite sum has no meaningful error.
template <typename A>
BN_HD void two_sum(A a, A b, A* sum, A* error) {
  const A s = a + b;
  const A bb = s - a;
  const A e = (a - (s - bb)) + (b - bb);
  *sum = s;
  *error = is_finite(s) ? e : A(0);
}

// Moments of `count` values from their sums shifted by `shift`: s1 = sum(x - shift), s2 = sum((x - shift)^2).
// When shift is one of the values, (shift - mean)^2 <= count * variance, so the subtraction loses at most log2(count)
// bits.
template <typename A>
BN_HD Moments<A> from_shifted_sums(A count, A shift, A s1, A s2) {
  Moments<A> r;
  r.count = count;
  const A offset = s1 / count;
  two_sum(shift, offset, &r.mean_hi, &r.mean_lo);
  const A m2 = s2 - s1 * offset;
  r.m2 = m2 < A(0) ? A(0) : m2;  // NaN stays NaN
  return r;
}

// hi + lo += value, what rounding takes from hi kept in lo.
template <typename A>
BN_HD void add_compensated(A* hi, A* lo, A value_hi, A value_lo) {
  A error;
  two_sum(*hi, value_hi, hi, &error);
  *lo += error + value_lo;
}

// Chan's merge. `a` comes first: the result depends on the order only by rounding, so callers keep the order fixed.
template <typename A>
BN_HD Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  if (b.count == A(0)) return a;
  if (a.count == A(0)) return b;
  Moments<A> r;
  r.count = a.count + b.count;
  const A fraction = b.count / r.count;
  const A delta = (b.mean_hi - a.mean_hi) + (b.mean_lo - a.mean_lo);
  A hi, lo;
  two_sum(a.mean_hi, a.mean_lo + delta * fraction, &hi, &lo);
  // Two infinite means of one sign: the difference is NaN, their mean is not.
  const A plain = a.mean_hi + b.mean_hi;
  r.mean_hi = is_finite(delta) ? hi : plain;
  r.mean_lo = is_finite(delta) ? lo : A(0);
  r.m2 = a.m2 + b.m2 + delta * delta * (a.count * fraction);
  return r;
}

// Running mean and M2 of a stream that arrives in batches, each summed as differences from the running mean of before:
// Welford's update with a batch in the place of one value, so its division is paid once a batch. mean = shift + offset;
// shift stays finite, so that an infinite value makes the mean infinite, as a sum would, and not NaN.
template <typename A>
struct Running {
  A shift = 0;   // what the next batch subtracts
  A offset = 0;  // mean - shift
  A m2 = 0;
};

// A batch of n values after `count` others: s1 = sum(x - shift), s2 = sum((x - shift)^2). The caller divides once for
// many channels: fraction = n / (count + n), reciprocal = 1 / n.
template <typename A>
BN_HD void absorb(Running<A>* r, A count, A fraction, A reciprocal, A s1, A s2) {
  const A mean = s1 * reciprocal, delta = mean - r->offset, m2 = s2 - s1 * mean;
  r->m2 += (m2 < A(0) ? A(0) : m2) + delta * delta * (count * fraction);
  r->offset = r->offset * (A(1) - fraction) + mean * fraction;
  A hi, lo;
  two_sum(r->shift, r->offset, &hi, &lo);
  if (is_finite(hi)) {
    r->shift = hi;
    r->offset = lo;
  }
}

// Many moments into one, without a division for each: Chan's merge of all at once, by sums shifted by a mean among
// them. The sum that makes the mean is s1 + s1_lo: of equal addends every one would round alike.
template <typename A>
struct Pool {
  A shift = 0;  // finite
  A count = 0, s1 = 0, s1_lo = 0, s2 = 0;
};
template <typename A>
BN_HD void add(Pool<A>* p, const Moments<A>& m) {
  const A d = (m.mean_hi - p->shift) + m.mean_lo, weighted = m.count * d;
  p->count += m.count;
  p->s2 += m.m2 + weighted * d;
  add_compensated(&p->s1, &p->s1_lo, weighted, A(0));
}
template <typename A>
BN_HD Moments<A> moments_of(const Pool<A>& p) {
  if (p.count == A(0)) return Moments<A>();
  return from_shifted_sums(p.count, p.shift, p.s1 + p.s1_lo, p.s2);
}

// One value into the running moments (Welford's update).
template <typename A>
BN_HD void add(Moments<A>* m, A value) {
  Moments<A> one;
  one.count = A(1);
  one.mean_hi = value;
  *m = merge(*m, one);
}

}  // namespace bn_ext

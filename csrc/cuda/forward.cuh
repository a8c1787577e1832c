// Forward of training and of evaluation.
#pragma once

#include "reduce.cuh"

namespace bn_ext {
namespace cuda {

// y = (x - mean_hi) * scale + shift. Coefficients by column: mean_hi, scale, shift.
template <typename T, int V>
struct Affine {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  static constexpr int kVector = V, kInputs = 1, kOutputs = 1, kCoefficients = 3;

  template <class Args>
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const A (&c)[3][V], const Args&) {
    Vec<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) y[i] = narrow<T>((widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i]);
    return y;
  }
  static __device__ void put(A* coefficients, int channels, int j, const Normalise<A>& n) {
    coefficients[j] = n.mean_hi;
    coefficients[channels + j] = n.scale;
    coefficients[2 * channels + j] = n.shift;
  }
};

// Nothing that counts, or a lone value, in a padded batch, moves no running statistic: the host could not know.
__device__ inline bool moves(const Moments<double>& m) { return m.count > 1; }
__device__ inline double mean_of(const Moments<double>& m) { return m.mean_hi + m.mean_lo; }
__device__ inline double unbiased_of(const Moments<double>& m) { return m.m2 / (m.count - 1); }

__device__ inline void move_statistics(const ForwardArgs& a, int64_t channel, const Moments<double>& m,
                                       double momentum) {
  if (!a.running_mean || !moves(m)) return;
  write(a.running_mean, channel, running_update(read(a.running_mean, channel, 0), mean_of(m), momentum));
  write(a.running_var, channel, running_update(read(a.running_var, channel, 0), unbiased_of(m), momentum));
}

// A channel's running statistics as launches of one virtual batch each move them: rounded to their type in between.
// momentum: with momentum=None, the number of batches when the first of these has been counted.
struct RunningPair {
  const ForwardArgs& a;
  const int64_t channel;
  const double momentum;
  double mean, var;
  __device__ RunningPair(const ForwardArgs& args, int64_t c, double by)
      : a(args), channel(c), momentum(by), mean(read(args.running_mean, c, 0)), var(read(args.running_var, c, 0)) {}
  __device__ void move(int64_t i, double by_mean, double by_var) {
    const bool cumulative = a.cumulative && a.num_batches_tracked != nullptr;
    const double share = cumulative ? 1.0 / (momentum + static_cast<double>(i)) : momentum;
    mean = rounded_to(a.running_mean.dtype, running_update(mean, by_mean, share));
    var = rounded_to(a.running_var.dtype, running_update(var, by_var, share));
  }
  __device__ void put() const {
    write(a.running_mean, channel, mean);
    write(a.running_var, channel, var);
  }
};
__device__ inline void move_statistics(const PieceArgs<ForwardArgs>& a, int64_t channel, const Moments<double>& m,
                                       double momentum) {
  if (!a.running_mean) return;
  if (a.leaves) return leave(a, channel, mean_of(m), unbiased_of(m));
  RunningPair running(a, channel, momentum);
  const double* left = a.left + channel;
#pragma unroll 4
  for (int64_t i = 0; i < a.earlier; ++i, left += 2 * a.shape.c) running.move(i, left[0], left[a.shape.c]);
  running.move(a.earlier, mean_of(m), unbiased_of(m));
  running.put();
}
__device__ inline void move_statistics(const PaddedPiece<ForwardArgs>& a, int64_t channel, const Moments<double>& m,
                                       double momentum) {
  if (!a.running_mean || !a.last) return;
  RunningPair running(a, channel, momentum);
#pragma unroll 1
  for (int64_t i = 0; i <= a.earlier; ++i) {
    const auto by = i < a.earlier ? given_moments(a.stage_of(i), channel, a.shape.c) : m;
    if (moves(by)) running.move(i, mean_of(by), unbiased_of(by));
  }
  running.put();
}

// Mean and variance of a channel -> its coefficients, in the tile's rows and, where it `saves`, all of `saved`.
// kRenorm: in training, where it may be renormalised.
template <typename T, int V, bool kRenorm, typename A>
__device__ inline void set_channel(const ForwardArgs& a, int64_t channel, double mean_hi, double mean_lo,
                                   double variance, int j, int of_tile, A* tile, bool saves) {
  const double invstd = inverse_std<A>(variance, a.eps);
  RenormFactors factors;
  A hi, lo;
  split(mean_hi, mean_lo, &hi, &lo);
  double weight = read(a.weight, channel, 1), bias = read(a.bias, channel, 0);
  if (kRenorm && a.renorm) {
    const Renorm& n = a.renorm;
    factors =
        renorm_factors(n, n.batches ? warmed_up(n, *n.batches) : 1, (mean_hi - read(n.mean, channel, 0)) + mean_lo,
                       invstd, inverse_std<A>(read(n.var, channel, 1), a.eps));
    bias += weight * factors.d;
    weight *= factors.r;
  }
  const auto n = normalise_coefficients<A, double>(hi, lo, variance, invstd, weight, bias);
  Affine<T, V>::put(tile, of_tile, j, n);
  if (!saves) return;
  const A values[kSavedRows] = {hi, lo, static_cast<A>(invstd), n.mean_hi, n.scale, n.shift};
  for (int k = 0; k < kSavedRows; ++k) static_cast<A*>(a.saved)[k * a.shape.c + channel] = values[k];
  if (kRenorm && a.renorm) {
    static_cast<A*>(a.saved)[kSavedR * a.shape.c + channel] = static_cast<A>(factors.r);
    static_cast<A*>(a.saved)[kSavedD * a.shape.c + channel] = static_cast<A>(factors.d);
  }
}

template <typename T, int V>
struct Evaluation : Affine<T, V> {
  using A = typename Affine<T, V>::A;
  using Args = ForwardArgs;
  static constexpr int kUnroll = 4;

  // All blocks of a tile save the same.
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    const double mean = read(a.running_mean, channel, 0), variance = read(a.running_var, channel, 1);
    set_channel<T, V, false>(a, channel, mean, 0.0, variance, j, channels, out, a.saved != nullptr);
  }
};

template <typename T, int V>
struct Forward : Affine<T, V> {
  using A = typename Affine<T, V>::A;
  using Args = ForwardArgs;
  static constexpr bool kMoments = true, kOnePass = false;
  static constexpr int kGroups = 1;
  static constexpr int kUnroll = V > 4 ? 4 : 8;  // as many loads in flight as the registers allow
  static constexpr int kBatch = 32;              // rows summed as plain differences before they are absorbed
  template <typename From, typename W>
  using Merge = MomentsPool<From, W>;

  struct State {
    Running<A> running[V];
    A s1[V], s2[V];
    int count = 0, batch = 0;
  };

  static __device__ void begin(State* s, const Plan&, const Place<V>&, const Args&) {
#pragma unroll
    for (int i = 0; i < V; ++i) s->s1[i] = s->s2[i] = 0;
  }

  // The first values' mean is the first shift: a single outlier among them is divided by their number.
  template <int U>
  static __device__ void first_shift(State* s, const Chunk<T, V, 1, U>& chunk, int rows) {
    const A reciprocal = A(1) / static_cast<A>(rows);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A sum = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u < rows) sum += widen(chunk.v[u][0][i]);
      }
      // Where their sum overflows one of them will do.
      const A mean = sum * reciprocal, first = widen(chunk.v[0][0][i]);
      s->running[i].shift = is_finite(mean) ? mean : is_finite(first) ? first : A(0);
    }
  }

  template <int U>
  static __device__ __forceinline__ void add(State* s, const Chunk<T, V, 1, U>& chunk, int rows) {
    if (s->count + s->batch == 0) first_shift(s, chunk, rows);
    A s1[V] = {}, s2[V] = {};  // of the chunk: sums of sums round less
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < rows) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A d = widen(chunk.v[u][0][i]) - s->running[i].shift;
          s1[i] += d;
          s2[i] += d * d;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      s->s1[i] += s1[i];
      s->s2[i] += s2[i];
    }
    s->batch += rows;
    // The first chunks are absorbed at once: their shift may be far from the mean of all that follows.
    if (s->batch >= kBatch || s->count < U) flush(s);
  }

  static __device__ void flush(State* s) {
    const A count = static_cast<A>(s->count), n = static_cast<A>(s->batch);
    s->count += s->batch;
    s->batch = 0;
    const A fraction = n / static_cast<A>(s->count), reciprocal = A(1) / n;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      absorb(&s->running[i], count, fraction, reciprocal, s->s1[i], s->s2[i]);
      s->s1[i] = s->s2[i] = 0;
    }
  }

  // One value of column i alone.
  static __device__ Partial<A> partial(State* s, int i, int, bool has_tail, const Vec<T, 1> (&tail)[1]) {
    Running<A> r = s->running[i];
    A count = static_cast<A>(s->count);
    if (has_tail) {
      const A value = widen(tail[0][0]);
      if (s->count == 0) r.shift = is_finite(value) ? value : A(0);
      const A d = value - r.shift;
      absorb(&r, count, A(1) / (count + A(1)), A(1), d, d * d);
      count += A(1);
    }
    const A sum = r.shift + r.offset;
    return is_finite(sum) ? Partial<A>{{count, r.shift, r.offset, r.m2}} : Partial<A>{{count, sum, A(0), r.m2}};
  }

  // Sum of squared deviations in double, for float values whose squares overflow float. All lanes of a warp come here.
  static __device__ double wide_m2(const Args& a, int64_t channel, bool wanted, double mean, int lane, int lanes) {
    double sum = 0;
    if (wanted) {
      const T* x = static_cast<const T*>(a.x.data) + channel * a.x.stride_c;
      for (int64_t i = lane; i < a.shape.count(); i += lanes) {
        const int64_t n = i / a.shape.l, l = i % a.shape.l;
        const double d = static_cast<double>(widen(load<1>(x + n * a.x.stride_n + l * a.x.stride_l)[0])) - mean;
        sum += d * d;
      }
    }
    return group_sum(sum, lanes);
  }

  // Statistics of one channel to coefficients, and, by the block that owns them, to what is kept.
  template <class Any>
  static __device__ void finish(const Plan& p, const Any& a, const Partial<double>* totals, bool valid, int64_t channel,
                                int j, int channels, int lane, bool owner, double momentum, A* out) {
    const Partial<double>& total = *totals;
    Moments<double> m{static_cast<double>(p.count), total[1], total[2], total[3]};
    const double own = m.mean_hi + m.mean_lo;
    const bool overflow = valid && !a.stage.given && sizeof(A) == sizeof(float) && !(m.m2 <= 3e38) && is_finite(own);
    if (__any_sync(kAllLanes, overflow)) {
      const double wide = wide_m2(a, channel, overflow, own, lane, p.lanes);
      if (overflow) m.m2 = wide;
    }
    if (!valid || lane != 0) return;
    if (a.stage.given) m = given_moments(a.stage, channel, a.shape.c);
    if (a.stage.result) {
      if (owner) put_result(a.stage, channel, a.shape.c, m);
      return;
    }
    set_channel<T, V, true>(a, channel, m.mean_hi, m.mean_lo, m.count > 0 ? m.m2 / m.count : 0, j, channels, out,
                            owner);
    if (owner) move_statistics(a, channel, m, momentum);
  }
};

}  // namespace cuda
}  // namespace bn_ext

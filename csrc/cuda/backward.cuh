// Backward of training and of evaluation.
#pragma once

#include "reduce.cuh"

namespace bn_ext {
namespace cuda {

// dx = dy * scale
template <typename T, int V, typename A>
__device__ __forceinline__ Vec<T, V> scaled(const Vec<T, V>& dy, const A (&c)[1][V]) {
  Vec<T, V> dx;
#pragma unroll
  for (int i = 0; i < V; ++i) dx[i] = narrow<T>(widen(dy[i]) * c[0][i]);
  return dx;
}

__device__ inline void put_gradients(const BackwardArgs& a, int64_t channel, double of_weight, double of_bias) {
  write(a.grad_weight, channel, of_weight);
  write(a.grad_bias, channel, of_bias);
}
__device__ inline void put_gradients(const PieceArgs<BackwardArgs>& a, int64_t channel, double of_weight,
                                     double of_bias) {
  if (a.leaves) return leave(a, channel, of_weight, of_bias);
  const int64_t channels = a.shape.c;
  double weights = 0, biases = 0;
  const double* left = a.left + channel;
#pragma unroll 4
  for (int64_t i = 0; i < a.earlier; ++i, left += 2 * channels) {
    weights += left[0];
    biases += left[channels];
  }
  put_gradients(static_cast<const BackwardArgs&>(a), channel, weights + of_weight, biases + of_bias);
}

// What both kinds share: sums of dy and of dy * (x - shift) by column.
template <typename T, int V>
struct GradientSums {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = BackwardArgs;
  // As many rows at once as registers hold: sums, shifts and coefficients of 8 elements or of doubles leave fewer.
  static constexpr int kVector = V, kInputs = 2, kOutputs = 1, kGroups = 1;
  static constexpr int kUnroll = V > 4 || sizeof(A) == 8 ? 2 : 4, kBatch = 32;
  static constexpr bool kMoments = false;
  template <typename From, typename W>
  using Merge = SumsPool<From, W>;

  struct State {
    A shift[V], dy[V], dot[V];  // of the batch
    A all_dy[V], all_dot[V];    // of the batches before it: sums of sums, so that rounding grows with the root of each
    int batch = 0;
  };

  // A row of `saved`.
  static __device__ A saved(const Args& a, int row, int64_t channel) {
    return static_cast<const A*>(a.saved)[row * a.shape.c + channel];
  }
  static __device__ A shift_of(const Args& a, int64_t channel) {
    return coarse_shift(saved(a, kSavedMeanHi, channel), saved(a, kSavedInvstd, channel));
  }

  static __device__ void begin(State* s, const Plan& p, const Place<V>& place, const Args& a) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t channel = place.channel(p, i);
      s->shift[i] = place.active && channel < p.channels ? shift_of(a, channel) : A(0);
      s->dy[i] = s->dot[i] = s->all_dy[i] = s->all_dot[i] = 0;
    }
  }

  template <int U>
  static __device__ __forceinline__ void add(State* s, const Chunk<T, V, 2, U>& chunk, int rows) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < rows) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A dy = widen(chunk.v[u][0][i]);
          s->dy[i] += dy;
          s->dot[i] += dy * (widen(chunk.v[u][1][i]) - s->shift[i]);
        }
      }
    }
    s->batch += rows;
    if (s->batch >= kBatch) flush(s);
  }

  static __device__ void flush(State* s) {
    s->batch = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      s->all_dy[i] += s->dy[i];
      s->all_dot[i] += s->dot[i];
      s->dy[i] = s->dot[i] = 0;
    }
  }

  static __device__ Partial<A> partial(State* s, int i, int, bool has_tail, const Vec<T, 1> (&tail)[2]) {
    Partial<A> r{{s->all_dy[i], A(0), s->all_dot[i], A(0)}};
    if (has_tail) {
      const A dy = widen(tail[0][0]);
      add_compensated(&r[0], &r[1], dy, A(0));
      add_compensated(&r[2], &r[3], dy * (widen(tail[1][0]) - s->shift[i]), A(0));
    }
    return r;
  }

  // mean - shift
  static __device__ double beyond_shift(const Args& a, int64_t channel) {
    return (static_cast<double>(saved(a, kSavedMeanHi, channel)) - static_cast<double>(shift_of(a, channel))) +
           saved(a, kSavedMeanLo, channel);
  }

  // sum(dy) and sum(dy * (x - mean)), from the sums around the shift, or what a stage is given.
  static __device__ GradientSum sums_of(const Plan& p, const Args& a, const Partial<double>& total, int64_t channel) {
    if (a.stage.given) return given_sums(a.stage, channel, a.shape.c);
    const double sum_dy = total[0] + total[1];
    return {static_cast<double>(p.count), sum_dy, (total[2] + total[3]) - beyond_shift(a, channel) * sum_dy};
  }

  // The owner's part: gradients of the parameters, or a stage's result.
  template <class Any>
  static __device__ void put_sums(const Any& a, int64_t channel, const GradientSum& sum, double invstd) {
    if (a.stage.result) return put_result(a.stage, channel, a.shape.c, sum);
    put_gradients(a, channel, of_weight(a, channel, sum, invstd), sum.dy);
  }
  static __device__ void put_sums(const PaddedPiece<BackwardArgs>& a, int64_t channel, const GradientSum& sum,
                                  double invstd) {
    if (!a.last) return;
    double weights = 0, biases = 0;
    Args one = a;
#pragma unroll 1
    for (int64_t i = 0; i < a.earlier; ++i) {
      one.saved = saved_from(a, i - a.earlier);
      const GradientSum s = given_sums(a.stage_of(i), channel, a.shape.c);
      if (s.count == 0) continue;  // its invstd may be infinite
      weights += of_weight(one, channel, s, saved(one, kSavedInvstd, channel));
      biases += s.dy;
    }
    if (sum.count > 0) weights += of_weight(a, channel, sum, invstd);
    put_gradients(static_cast<const Args&>(a), channel, weights, biases + sum.dy);
  }
  static __device__ double of_weight(const Args& a, int64_t channel, const GradientSum& sum, double invstd) {
    const double dot = sum.dot * invstd;
    return a.by_renorm ? dot * saved(a, kSavedR, channel) + sum.dy * saved(a, kSavedD, channel) : dot;
  }
};

// dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale
template <typename T, int V>
struct Backward : GradientSums<T, V> {
  using Sums = GradientSums<T, V>;
  using A = typename Sums::A;
  using Args = BackwardArgs;
  static constexpr bool kOnePass = false;
  static constexpr int kCoefficients = 5;

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[2], const A (&c)[5][V], const Args&) {
    Vec<T, V> dx;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A centred = (widen(in[0][i]) - c[1][i]) + c[4][i];
      dx[i] = narrow<T>((centred - (widen(in[1][i]) - c[0][i]) * c[3][i]) * c[2][i]);
    }
    return dx;
  }

  template <class Any>
  static __device__ void finish(const Plan& p, const Any& a, const Partial<double>* totals, bool valid, int64_t channel,
                                int j, int channels, int lane, bool owner, double, A* out) {
    if (!valid || lane != 0) return;
    const GradientSum sum = Sums::sums_of(p, a, *totals, channel);
    const double invstd = Sums::saved(a, kSavedInvstd, channel);
    if (a.dx) {
      double weight = read(a.weight, channel, 1);
      if (a.by_renorm) weight *= Sums::saved(a, kSavedR, channel);
      const auto g =
          gradient_coefficients<A, double>(Sums::saved(a, kSavedMeanHi, channel), Sums::saved(a, kSavedMeanLo, channel),
                                           invstd, weight, sum.dy, sum.dot, sum.count);
      const A c[5] = {g.mean_hi, g.dy_hi, g.scale, g.slope, g.offset};
      for (int k = 0; k < 5; ++k) out[k * channels + j] = c[k];
    }
    if (owner) Sums::put_sums(a, channel, sum, invstd);
  }
};

// dx is written while the sums are made.
template <typename T, int V>
struct EvaluationBackward : GradientSums<T, V> {
  using Sums = GradientSums<T, V>;
  using A = typename Sums::A;
  using Args = BackwardArgs;
  static constexpr bool kOnePass = true;
  static constexpr int kCoefficients = 1;

  static __device__ A scale_of(const Args& a, int64_t channel) {
    return static_cast<A>(Sums::saved(a, kSavedInvstd, channel) * read(a.weight, channel, 1));
  }

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[2], const A (&c)[1][V], const Args&) {
    return scaled(in[0], c);
  }

  static __device__ void finish(const Plan& p, const Args& a, const Partial<double>* totals, bool valid,
                                int64_t channel, int, int, int lane, bool owner, double, A*) {
    if (!valid || lane != 0 || !owner) return;
    Sums::put_sums(a, channel, Sums::sums_of(p, a, *totals, channel), Sums::saved(a, kSavedInvstd, channel));
  }
};

// Evaluation backward where only dx is wanted: x is not read.
template <typename T, int V>
struct EvaluationScale {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = BackwardArgs;
  static constexpr int kVector = V, kInputs = 1, kOutputs = 1, kCoefficients = 1, kUnroll = 4;

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const A (&c)[1][V], const Args&) {
    return scaled(in[0], c);
  }
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int, A* out) {
    out[j] = EvaluationBackward<T, V>::scale_of(a, channel);
  }
};

}  // namespace cuda
}  // namespace bn_ext

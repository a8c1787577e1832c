// Derivatives of training's gradients, with a gradient that arrived at dx: csrc/core/double_formulas.h.
#pragma once

#include "backward.cuh"
#include "core/double_formulas.h"

namespace bn_ext {
namespace cuda {

// Inputs dy, x, gg; outputs the gradients with respect to dy and to x.
template <typename T, int V>
struct DoubleBackward {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = DoubleBackwardArgs;
  using Sums = GradientSums<T, V>;
  static constexpr int kVector = V, kInputs = 3, kOutputs = 2, kUnroll = 2, kBatch = 32;
  static constexpr int kCoefficients = kDoubleCoefficients;
  static constexpr int kGroups = 3;  // sums of dy and of gg, each alone and with x; of gg * dy
  static constexpr bool kMoments = false, kOnePass = false;
  template <typename From, typename W>
  using Merge = SumsPool<From, W>;

  struct State {
    A shift[V], sum[kDoubleSums][V];  // of the batch
    A all[kDoubleSums][V];            // of the batches before it
    int batch = 0;
  };

  static __device__ void begin(State* s, const Plan& p, const Place<V>& place, const Args& a) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t channel = place.channel(p, i);
      const bool there = place.active && channel < p.channels;
      s->shift[i] = there ? Sums::shift_of(a, channel) : A(0);
#pragma unroll
      for (int k = 0; k < kDoubleSums; ++k) s->sum[k][i] = s->all[k][i] = 0;
    }
  }

  template <int U>
  static __device__ __forceinline__ void add(State* s, const Chunk<T, V, 3, U>& chunk, int rows) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < rows) {
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const A in[3] = {widen(chunk.v[u][0][i]), widen(chunk.v[u][1][i]) - s->shift[i], widen(chunk.v[u][2][i])};
          A term[kDoubleSums];
          double_terms(in, term);
#pragma unroll
          for (int k = 0; k < kDoubleSums; ++k) s->sum[k][i] += term[k];
        }
      }
    }
    s->batch += rows;
    if (s->batch >= kBatch) flush(s);
  }

  static __device__ void flush(State* s) {
    s->batch = 0;
#pragma unroll
    for (int k = 0; k < kDoubleSums; ++k) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        s->all[k][i] += s->sum[k][i];
        s->sum[k][i] = 0;
      }
    }
  }

  // Two sums of column i.
  static __device__ Partial<A> partial(State* s, int i, int group, bool has_tail, const Vec<T, 1> (&tail)[3]) {
    const int first = 2 * group, second = first + 1;
    Partial<A> r{{s->all[first][i], A(0), second < kDoubleSums ? s->all[second % kDoubleSums][i] : A(0), A(0)}};
    if (has_tail) {
      const A in[3] = {widen(tail[0][0]), widen(tail[1][0]) - s->shift[i], widen(tail[2][0])};
      A term[kDoubleSums];
      double_terms(in, term);
      add_compensated(&r[0], &r[1], term[first], A(0));
      if (second < kDoubleSums) add_compensated(&r[2], &r[3], term[second % kDoubleSums], A(0));
    }
    return r;
  }

  static __device__ __forceinline__ Results<T, V, 2> apply(const Vec<T, V> (&in)[3], const A (&c)[kCoefficients][V],
                                                           const Args&) {
    Results<T, V, 2> r;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A values[3] = {widen(in[0][i]), widen(in[1][i]), widen(in[2][i])};
      A k[kCoefficients], made[2];
#pragma unroll
      for (int j = 0; j < kCoefficients; ++j) k[j] = c[j][i];
      double_gradients(values, k, made);
      r.v[0][i] = narrow<T>(made[0]);
      r.v[1][i] = narrow<T>(made[1]);
    }
    return r;
  }

  static __device__ void finish(const Plan& p, const Args& a, const Partial<double>* totals, bool valid,
                                int64_t channel, int j, int channels, int lane, bool owner, double, A* out) {
    if (!valid || lane != 0) return;
    DoubleChannel<A, double> c;
    c.mean_hi = Sums::saved(a, kSavedMeanHi, channel);
    c.mean_lo = Sums::saved(a, kSavedMeanLo, channel);
    c.invstd = Sums::saved(a, kSavedInvstd, channel);
    c.weight = read(a.weight, channel, 1);
    c.gg_weight = read(a.gg_weight, channel, 0);
    c.gg_bias = read(a.gg_bias, channel, 0);
    c.count = static_cast<double>(p.count);
    c.training = true;
    const double beyond = Sums::beyond_shift(a, channel);
    double sums[kDoubleSums];
    for (int k = 0; k < kDoubleSums; ++k) {
      sums[k] = totals[k / 2][k % 2 * 2] + totals[k / 2][k % 2 * 2 + 1];
      if (k % 2 == 1) sums[k] -= beyond * sums[k - 1];
    }
    if (owner && a.grad_weight) write(a.grad_weight, channel, double_grad_weight(c, sums));
    const auto g = double_coefficients(c, sums);
    const A k[kCoefficients] = {g.mean_hi, g.invstd, g.gg_hi, g.dy_hi,     g.scale,
                                g.alpha,   g.beta,   g.delta, g.offset_dy, g.offset_x};
    for (int i = 0; i < kCoefficients; ++i) out[i * channels + j] = k[i];
  }
};

}  // namespace cuda
}  // namespace bn_ext

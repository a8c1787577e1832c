// Evaluation with a residual and an activation behind the normalisation.
#pragma once

#include <type_traits>

#include "activation.h"
#include "forward.cuh"

namespace bn_ext {
namespace cuda {

template <class S, class V>
struct Words {
  using type = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
};
#include "activation_math.h"

// use(activation) for the launch's, so that a branch on it is taken by all threads alike.
template <typename A, class Use>
__device__ __forceinline__ auto with_kind(const Epilogue& e, const Use& use) {
  const A slope = static_cast<A>(e.negative_slope);
  switch (e.activation) {
    case Activation::kReLU:
      return use(ReLU<A>{slope});
    case Activation::kLeakyReLU:
      return use(LeakyReLU<A>{slope});
    case Activation::kSiLU:
      return use(SiLU<A>{slope});
    case Activation::kGELU:
      return use(GELU<A>{slope});
    default:
      return use(Identity<A>{slope});
  }
}

// The tile's coefficients of one channel to their rows of `saved`.
template <typename A>
__device__ inline void save_coefficients(A* saved, int64_t channels, int64_t channel, const A* tile, int of_tile,
                                         int j) {
  for (int k = 0; k < 3; ++k) saved[(kSavedCoefficients + k) * channels + channel] = tile[k * of_tile + j];
}

// y = act((x - mean_hi) * scale + shift + residual), the residual of any strides.
template <typename T, int V, bool kResidual>
struct ActivatedEvaluation {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = ActivatedInferenceArgs;
  static constexpr int kVector = V, kInputs = kResidual ? 2 : 1, kOutputs = 1, kCoefficients = 3;
  static constexpr int kUnroll = kResidual ? 2 : 4;  // as many rows as the registers hold

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[kInputs], const A (&c)[3][V], const Args& a) {
    return with_kind<A>(a.epilogue, [&](const auto& act) {
      Vec<T, V> y;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        A v = (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i];
        if constexpr (kResidual) v += widen(in[1][i]);
        y[i] = narrow<T>(act(v));
      }
      return y;
    });
  }
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    Evaluation<T, V>::coefficients(a, channel, j, channels, out);
    if (!a.saved) return;
    // For backward. All blocks of a tile write the same.
    const double variance = read(a.running_var, channel, 1);
    A hi, lo;
    split(read(a.running_mean, channel, 0), 0.0, &hi, &lo);
    const A values[3] = {hi, lo, static_cast<A>(inverse_std<A>(variance, a.eps))};
    for (int k = 0; k < 3; ++k) static_cast<A*>(a.saved)[k * a.shape.c + channel] = values[k];
    save_coefficients(static_cast<A*>(a.saved), a.shape.c, channel, out, channels, j);
  }
};

// Training forward. The residual, of the output's strides, is read by the sweep that writes alone.
template <typename T, int V, bool kResidual>
struct ActivatedForward : Forward<T, V> {
  using A = typename Forward<T, V>::A;
  using Args = ActivatedForwardArgs;
  static constexpr bool kBeside = kResidual;
  static constexpr int kUnroll = V > 4 || kResidual ? 2 : 4;  // as many rows as the registers hold

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const Vec<T, V>& residual,
                                                    const A (&c)[3][V], const Args& a) {
    return with_kind<A>(a.epilogue, [&](const auto& act) {
      Vec<T, V> y;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        A v = (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i];
        if constexpr (kResidual) v += widen(residual[i]);
        y[i] = narrow<T>(act(v));
      }
      return y;
    });
  }
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const A (&c)[3][V], const Args& a) {
    return apply(in, in[0], c, a);
  }
  static __device__ void finish(const Plan& p, const Args& a, const Partial<double>* total, bool valid, int64_t channel,
                                int j, int channels, int lane, bool owner, double momentum, A* out) {
    Forward<T, V>::finish(p, a, total, valid, channel, j, channels, lane, owner, momentum, out);
    if (!valid || lane != 0 || !owner) return;
    save_coefficients(static_cast<A*>(a.saved), p.channels, channel, out, channels, j);
  }
};

// act'((x - mean_hi) * scale + shift + residual) * dy, with forward's very coefficients: what the residual's gradient
// is, and what backward of the plain batch norm takes then.
template <typename T, int V, bool kResidual>
struct ActivationGradient {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = ActivatedBackwardArgs;
  static constexpr bool kBeside = kResidual;
  static constexpr int kVector = V, kInputs = 2, kOutputs = 1, kCoefficients = 3, kUnroll = 2;

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[2], const Vec<T, V>& residual,
                                                    const A (&c)[3][V], const Args& a) {
    return with_kind<A>(a.epilogue, [&](const auto& act) {
      Vec<T, V> g;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        A v = (widen(in[1][i]) - c[0][i]) * c[1][i] + c[2][i];
        if constexpr (kResidual) v += widen(residual[i]);
        g[i] = narrow<T>(act.gradient(widen(in[0][i]), v));
      }
      return g;
    });
  }
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[2], const A (&c)[3][V], const Args& a) {
    return apply(in, in[0], c, a);
  }
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    const A* saved = static_cast<const A*>(a.saved) + kSavedCoefficients * a.shape.c + channel;
    for (int k = 0; k < 3; ++k) out[k * channels + j] = saved[k * a.shape.c];
  }
};

// With and without a residual, as with_vector takes operations.
template <template <typename, int, bool> class Op>
struct Alone {
  template <typename T, int V>
  using Of = Op<T, V, false>;
};
template <template <typename, int, bool> class Op>
struct Summed {
  template <typename T, int V>
  using Of = Op<T, V, true>;
};

}  // namespace cuda
}  // namespace bn_ext

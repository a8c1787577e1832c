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

// y = act((x - mean_hi) * scale + shift + residual). The activation is the launch's, so a branch on it is taken by all.
template <typename T, int V, bool kResidual>
struct ActivatedEvaluation {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = ActivatedInferenceArgs;
  static constexpr int kVector = V, kInputs = kResidual ? 2 : 1, kOutputs = 1, kCoefficients = 3;
  static constexpr int kUnroll = kResidual ? 2 : 4;  // as many rows as the registers hold

  template <class Act>
  static __device__ __forceinline__ Vec<T, V> apply_as(const Vec<T, V> (&in)[kInputs], const A (&c)[3][V],
                                                       const Act& act) {
    Vec<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      A v = (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i];
      if constexpr (kResidual) v += widen(in[1][i]);
      y[i] = narrow<T>(act(v));
    }
    return y;
  }
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[kInputs], const A (&c)[3][V], const Args& a) {
    const A slope = static_cast<A>(a.epilogue.negative_slope);
    switch (a.epilogue.activation) {
      case Activation::kReLU:
        return apply_as(in, c, ReLU<A>{slope});
      case Activation::kLeakyReLU:
        return apply_as(in, c, LeakyReLU<A>{slope});
      case Activation::kSiLU:
        return apply_as(in, c, SiLU<A>{slope});
      case Activation::kGELU:
        return apply_as(in, c, GELU<A>{slope});
      default:
        return apply_as(in, c, Identity<A>{slope});
    }
  }
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    Evaluation<T, V>::coefficients(a, channel, j, channels, out);
  }
};

template <typename T, int V>
using ActivatedAlone = ActivatedEvaluation<T, V, false>;
template <typename T, int V>
using ActivatedSum = ActivatedEvaluation<T, V, true>;

}  // namespace cuda
}  // namespace bn_ext

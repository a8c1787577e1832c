// A residual and an activation behind the normalisation, and what they make of backward.
#pragma once

#include <type_traits>

#include "backward.cuh"
#include "core/activation.h"
#include "forward.cuh"

namespace bn_ext {
namespace cuda {

template <class S, class V>
struct Words {
  using type = std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>;
};
#include "core/activation_math.h"

// use(activation) for the launch's, so that a branch on it is taken by all threads alike; backward's kernels are one
// for what goes by sign and one for the others, which need more registers.
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
template <Source kSource, typename A, class Use>
__device__ __forceinline__ void with_kind_of(const Epilogue& e, const Use& use) {
  const A slope = static_cast<A>(e.negative_slope);
  if constexpr (kSource == Source::kSign) {
    e.activation == Activation::kReLU ? use(ReLU<A>{slope}) : use(LeakyReLU<A>{slope});
  } else {
    e.activation == Activation::kGELU ? use(GELU<A>{slope}) : use(SiLU<A>{slope});
  }
}

// ---- the mask of forward: activation.h says where an element's bit is ----

// Bits of N elements from `offset` on, the first the lowest. One element's bit stands for all.
template <typename T, int N>
__device__ __forceinline__ unsigned load_mask(const uint8_t* mask, int64_t offset) {
  constexpr int kElements = cuda_mask_elements(sizeof(T));
  static_assert(N <= kElements, "the elements of one access have one byte");
  const unsigned bits = load<1>(mask + offset / kElements)[0] >> static_cast<int>(offset % kElements);
  return N > 1 ? bits : -(bits & 1u);
}

// The bits of a whole byte. With N = 1 bit i of `bits`, for the element at `offset`: where a thread takes all elements
// one by one, into zeros; in an incomplete row of vectors, whose bytes have one writer, in order.
template <typename T, int V, int N>
__device__ __forceinline__ void store_mask(uint8_t* mask, int64_t offset, unsigned bits, int i) {
  constexpr int kElements = cuda_mask_elements(sizeof(T));
  const int64_t at = offset / kElements;
  if constexpr (N > 1) {
    static_assert(N == kElements, "an access has a byte of its own");
    store(mask + at, Vec<uint8_t, 1>{{static_cast<uint8_t>(bits)}});
  } else {
    const int element = static_cast<int>(offset % kElements);
    const unsigned bit = bits >> i & 1u;
    if constexpr (V > 1) {
      const unsigned before = element > 0 ? load_coherent<1>(mask + at)[0] : 0u;
      store(mask + at, Vec<uint8_t, 1>{{static_cast<uint8_t>(before | bit << element)}});
    } else if (bit) {
      const int byte = static_cast<int>(at % 4);
      atomicOr(reinterpret_cast<unsigned*>(mask + (at - byte)), 1u << (8 * byte + element));
    }
  }
}

// act(v) for a whole vector, with the bits of what the derivative passes.
template <typename T, int V, typename A, class Argument>
__device__ __forceinline__ Vec<T, V> activate(const Epilogue& e, unsigned* bits, const Argument& argument) {
  return with_kind<A>(e, [&](const auto& act) {
    Vec<T, V> y;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A v = argument(i);
      if constexpr (std::decay_t<decltype(act)>::kBySign) *bits |= static_cast<unsigned>(act.passes(v)) << i;
      y[i] = narrow<T>(act(v));
    }
    return y;
  });
}

// y = act((x - mean_hi) * scale + shift + residual), the residual of any strides; y may be x.
template <typename T, int V, bool kResidual>
struct ActivatedEvaluation {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = ForwardArgs;
  static constexpr int kVector = V, kInputs = kResidual ? 2 : 1, kOutputs = 1, kCoefficients = 3;
  static constexpr int kUnroll = kResidual ? 2 : 4;  // as many rows as the registers hold
  static constexpr bool kMarks = kResidual, kInPlace = true;

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[kInputs], const A (&c)[3][V], const Args& a,
                                                    unsigned* bits) {
    return activate<T, V, A>(a.epilogue, bits, [&](int i) {
      const A v = (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i];
      if constexpr (kResidual) return v + widen(in[1][i]);
      return v;
    });
  }
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[kInputs], const A (&c)[3][V], const Args& a) {
    unsigned bits = 0;
    return apply(in, c, a, &bits);
  }
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    Evaluation<T, V>::coefficients(a, channel, j, channels, out);
  }
};

// Training forward without a residual.
template <typename T, int V, bool kResidual>
struct ActivatedForward : Forward<T, V> {
  using A = typename Forward<T, V>::A;
  using Args = ForwardArgs;

  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const A (&c)[3][V], const Args& a) {
    unsigned bits = 0;
    return activate<T, V, A>(a.epilogue, &bits, [&](int i) { return (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i]; });
  }
};

// With one, of the output's strides: the sweep that writes alone reads it.
template <typename T, int V>
struct ActivatedForward<T, V, true> : ActivatedForward<T, V, false> {
  using A = typename Forward<T, V>::A;
  using Args = ForwardArgs;
  using Beside = Vec<T, V>;
  static constexpr int kUnroll = 2;  // as many rows as the registers hold
  static constexpr bool kMarks = true, kSumsBeside = false;

  template <int N>
  static __device__ __forceinline__ Beside beside(const Args& a, int64_t offset) {
    const auto some = load<N, Cache::kLastUse>(static_cast<const T*>(a.epilogue.residual.data) + offset);
    Beside all;
#pragma unroll
    for (int i = 0; i < V; ++i) all[i] = some[N == 1 ? 0 : i];
    return all;
  }
  static __device__ __forceinline__ Vec<T, V> apply(const Vec<T, V> (&in)[1], const Beside& residual,
                                                    const A (&c)[3][V], const Args& a, unsigned* bits) {
    return activate<T, V, A>(
        a.epilogue, bits, [&](int i) { return (widen(in[0][i]) - c[0][i]) * c[1][i] + c[2][i] + widen(residual[i]); });
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

// ---- backward ----

// g = act'((x - mean_hi) * scale + shift + residual) * dy, with forward's very coefficients.
template <typename T, int V, Source kSource>
struct ActivatedGradient {
  using Element = T;
  using A = typename Accumulate<T>::Type;
  using Args = BackwardArgs;
  // The bits of a vector, or nothing.
  using Beside = std::conditional_t<kSource == Source::kMask, unsigned, char>;

  template <int N>
  static __device__ __forceinline__ Beside beside(const Args& a, int64_t offset) {
    if constexpr (kSource != Source::kMask) return 0;
    return load_mask<T, N>(a.epilogue.mask, offset);
  }

  // use(gradient): gradient(dy, bits, i, x, residual, mean_hi, scale, shift) of element i.
  template <class Use>
  static __device__ __forceinline__ void with_gradient(const Epilogue& e, const Use& use) {
    if constexpr (kSource == Source::kMask) {
      const bool zero = e.activation == Activation::kReLU;
      const A slope = static_cast<A>(e.negative_slope);
      use([=](A dy, Beside bits, int i, auto...) { return bits >> i & 1u ? dy : zero ? A(0) : dy * slope; });
    } else {
      with_kind_of<kSource, A>(e, [&](const auto& act) {
        use([&](A dy, Beside, int, A x, A residual, A mean_hi, A scale, A shift) {
          const A v = (x - mean_hi) * scale + shift;
          return act.gradient(dy, kSource == Source::kSum ? v + residual : v);
        });
      });
    }
  }
};

// Sums and, where they are wanted, dx and the residual's gradient g. As Backward of g; in evaluation dx = g * scale.
// Inputs dy, x and, by sum, the residual; outputs g, dx.
template <typename T, int V, Source kSource>
struct ActivatedBackward : GradientSums<T, V>, ActivatedGradient<T, V, kSource> {
  using Sums = GradientSums<T, V>;
  using Of = ActivatedGradient<T, V, kSource>;
  using Element = T;
  using A = typename Sums::A;
  using Args = BackwardArgs;
  using Beside = typename Of::Beside;
  static constexpr bool kOnePass = false, kSumsBeside = true;
  static constexpr int kInputs = kSource == Source::kSum ? 3 : 2, kOutputs = 2;
  static constexpr int kUnroll = sizeof(A) == 8 ? 1 : 2;  // rows of two doubles spill on sm_120
  // Rows of coefficients; the shift comes last, as by mask there is none and any row will do.
  static constexpr int kCoefficients = kSource == Source::kMask ? 5 : 6;
  static constexpr int kMean = 0, kScale = 1, kDy = 2, kSlope = 3, kOffset = 4, kShift = kCoefficients - 1;

  struct State : Sums::State {
    A c[3][V];  // of the normalisation; not by mask
  };

  static __device__ void begin(State* s, const Plan& p, const Place<V>& place, const Args& a) {
    Sums::begin(s, p, place, a);
    if constexpr (kSource != Source::kMask) {
      const A* saved = static_cast<const A*>(a.saved) + kSavedNormalise * p.channels;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t channel = place.channel(p, i);
        const bool there = place.active && channel < p.channels;
#pragma unroll
        for (int k = 0; k < 3; ++k) s->c[k][i] = there ? saved[k * p.channels + channel] : A(0);
      }
    }
  }

  // g of column i, from element `of` of a row's vectors.
  template <class Gradient, class Row>
  static __device__ __forceinline__ A gradient(const State& s, const Gradient& g, const Row& row, int i, int of,
                                               Beside bits) {
    A residual = 0;
    if constexpr (kSource == Source::kSum) residual = widen(row[2][of]);
    return g(widen(row[0][of]), bits, i, widen(row[1][of]), residual, s.c[0][i], s.c[1][i], s.c[2][i]);
  }

  template <int U>
  static __device__ __forceinline__ void add(State* s, const Chunk<T, V, kInputs, U>& chunk, int rows,
                                             const Beside* beside, const Args& a) {
    Of::with_gradient(a.epilogue, [&](const auto& g) {
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (u < rows) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A dy = gradient(*s, g, chunk.v[u], i, i, beside[u]);
            s->dy[i] += dy;
            s->dot[i] += dy * (widen(chunk.v[u][1][i]) - s->shift[i]);
          }
        }
      }
    });
    s->batch += rows;
    if (s->batch >= Sums::kBatch) Sums::flush(s);
  }

  static __device__ Partial<A> partial(State* s, int i, int, bool has_tail, const Vec<T, 1> (&tail)[kInputs],
                                       Beside bits, const Args& a) {
    Partial<A> r{{s->all_dy[i], A(0), s->all_dot[i], A(0)}};
    if (has_tail) {
      Of::with_gradient(a.epilogue, [&](const auto& g) {
        const A dy = gradient(*s, g, tail, i, 0, bits);
        add_compensated(&r[0], &r[1], dy, A(0));
        add_compensated(&r[2], &r[3], dy * (widen(tail[1][0]) - s->shift[i]), A(0));
      });
    }
    return r;
  }

  static __device__ __forceinline__ Results<T, V, 2> apply(const Vec<T, V> (&in)[kInputs], Beside bits,
                                                           const A (&c)[kCoefficients][V], const Args& a) {
    Results<T, V, 2> r;
    Of::with_gradient(a.epilogue, [&](const auto& gradient) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A x = widen(in[1][i]);
        A residual = 0;
        if constexpr (kSource == Source::kSum) residual = widen(in[2][i]);
        const A g = gradient(widen(in[0][i]), bits, i, x, residual, c[kMean][i], c[kScale][i], c[kShift][i]);
        const A centred = (g - c[kDy][i]) + c[kOffset][i];
        r.v[0][i] = narrow<T>(g);
        r.v[1][i] = narrow<T>((a.training ? centred - (x - c[kMean][i]) * c[kSlope][i] : g) * c[kScale][i]);
      }
    });
    return r;
  }

  template <class Any>
  static __device__ void finish(const Plan& p, const Any& a, const Partial<double>* totals, bool valid, int64_t channel,
                                int j, int channels, int lane, bool owner, double, A* out) {
    if (!valid || lane != 0) return;
    const GradientSum sum = Sums::sums_of(p, a, *totals, channel);
    const auto saved = [&](int row) { return Sums::saved(a, row, channel); };
    // The mean as the normalisation has it, mean_hi = 0 included.
    const A mean_hi = saved(kSavedNormalise);
    const double mean_lo =
        (static_cast<double>(saved(kSavedMeanHi)) - static_cast<double>(mean_hi)) + saved(kSavedMeanLo);
    const double invstd = saved(kSavedInvstd);
    const auto g = gradient_coefficients<A, double>(mean_hi, mean_lo, invstd, 1.0, sum.dy, sum.dot, sum.count);
    const A c[6] = {mean_hi, saved(kSavedNormalise + 1), g.dy_hi, g.slope, g.offset, saved(kSavedNormalise + 2)};
    for (int k = 0; k < kCoefficients; ++k) out[k * channels + j] = c[k];
    if (owner) Sums::put_sums(a, channel, sum, invstd);
  }
};

// Without sums: g and, in evaluation, dx = g * scale. By mask nothing but dy is read.
template <typename T, int V, Source kSource>
struct ActivationGradient : ActivatedGradient<T, V, kSource> {
  using Of = ActivatedGradient<T, V, kSource>;
  using A = typename Of::A;
  using Args = BackwardArgs;
  using Beside = typename Of::Beside;
  static constexpr bool kSumsBeside = false;
  static constexpr int kVector = V,
                       kInputs = kSource == Source::kSum    ? 3
                                 : kSource != Source::kMask ? 2
                                                            : 1,
                       kOutputs = 2;
  static constexpr int kCoefficients = kSource == Source::kMask ? 1 : 3, kUnroll = 2;

  static __device__ __forceinline__ Results<T, V, 2> apply(const Vec<T, V> (&in)[kInputs], Beside bits,
                                                           const A (&c)[kCoefficients][V], const Args& a) {
    Results<T, V, 2> r;
    Of::with_gradient(a.epilogue, [&](const auto& gradient) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A dy = widen(in[0][i]), scale = c[0][i];
        A x = 0, residual = 0, mean_hi = 0, shift = 0;
        if constexpr (kSource != Source::kMask) x = widen(in[1][i]), mean_hi = c[1][i], shift = c[2][i];
        if constexpr (kSource == Source::kSum) residual = widen(in[2][i]);
        const A g = gradient(dy, bits, i, x, residual, mean_hi, scale, shift);
        r.v[0][i] = narrow<T>(g);
        r.v[1][i] = narrow<T>(g * scale);
      }
    });
    return r;
  }
  // scale, mean_hi, shift
  static __device__ void coefficients(const Args& a, int64_t channel, int j, int channels, A* out) {
    const A* saved = static_cast<const A*>(a.saved) + kSavedNormalise * a.shape.c + channel;
    constexpr int rows[3] = {1, 0, 2};
    for (int k = 0; k < kCoefficients; ++k) out[k * channels + j] = saved[rows[k] * a.shape.c];
  }
};

}  // namespace cuda
}  // namespace bn_ext

// Activations and their derivatives, each formula written once for vectors and scalars. Included inside a namespace,
// where Words<S, V> is the unsigned integer type (or vector of such) of V's size; S is the scalar, V a vector of it or
// S.
//
//   silu(v) = v * s(v), s(v) = 1 / (1 + exp(-v))      silu'(v) = s * (1 + v * (1 - s))
//   gelu(v) = v * P(v), P the normal distribution      gelu'(v) = P(v) + v * p(v), p(v) = exp(-v^2 / 2) / sqrt(2 pi)
//
// exp is only ever taken of what is not positive, so nothing overflows, and s and P keep their relative accuracy in
// both tails. 1 - P(a) = exp(-a^2 / 2) * F(u) / (a + 4), u = (a - 4) / (a + 4), a >= 0: F is smooth on [-1, 1] (the
// substitution of Shepherd & Laframboise 1981, "Chebyshev approximation of (1 + 2x) exp(x^2) erfc x"); the coefficients
// below are its Chebyshev expansion, cut off below half a unit in the last place.
// Errors: silu, gelu within 6 units in the last place where the result is a normal number; the derivatives within 6
// units in the last place of max(1, |v|) * the largest term. CUDA's float, whose exp is an estimate: within 8.

#ifdef __CUDACC__
#define BN_UNROLL _Pragma("unroll")
#else
#define BN_UNROLL _Pragma("GCC unroll 32")
#endif
#define BN_ACTIVATION         \
  template <class S, class V> \
  BN_HD

template <class To, class From>
BN_HD To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit copy keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class S, int kCount>
BN_HD V polynomial(V x, const S (&c)[kCount]) {
  V sum = x * c[kCount - 1] + c[kCount - 2];
  BN_UNROLL
  for (int i = kCount - 3; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// Of 1 to 18. CUDA's division in float is a sequence with a branch for what is no such number; its estimate, good to
// one unit in the last place, and a step of Newton's are three instructions.
BN_ACTIVATION V reciprocal(V v) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) == sizeof(float)) {
    V r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return fmaf(r, fmaf(-v, r, S(1)), r);
  }
#endif
  return S(1) / v;
}

// exp(hi + lo) for hi + lo <= 0, |lo| small; zero where the result would not be a normal number. CUDA's float has 2^t
// estimated, good to 2^-22 (PTX ISA, ex2.approx.ftz.f32), times exp of the little that t ln 2 lacks; hi is not
// infinite.
BN_ACTIVATION V exp_of_negative(V hi, V lo) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) == sizeof(float)) {
    const V t = hi * S(1.44269504f);
    V power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
    const V rest = fmaf(t, S(1.90465421e-9f), fmaf(t, S(-0.693147182f), hi)) + lo;
    return fmaf(power, rest, power);
  }
#endif
  using I = typename Words<S, V>::type;
  V n, r, g;
  I power;
  if constexpr (sizeof(S) == sizeof(float)) {
    constexpr S kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
    constexpr S c[] = {0.5000000014f, 0.1666657336f, 0.04166645678f, 0.008363776467f, 0.001393454452f};
    const V shifted = hi * S(1.44269504f) + kMagic;
    n = shifted - kMagic;
    r = ((hi - n * S(0.693359375f)) - n * S(-2.12194440e-4f)) + lo;
    g = polynomial(r, c);
    power = (same_bits<I>(shifted) << 23) + 0x3f800000u;
  } else {
    constexpr S kMagic = 6755399441055744.0;
    constexpr S c[] = {0.500000000000000113,     0.166666666666666714,   0.0416666666666206336,
                       0.00833333333332554408,   0.00138888889189411912, 0.000198412698768661758,
                       0.0000248015186387537566, 2.75572528315354186e-6, 2.76213397473818781e-7,
                       2.5106275452329115e-8};
    const V shifted = hi * S(1.4426950408889634) + kMagic;
    n = shifted - kMagic;
    r = ((hi - n * S(6.93147180369123816490e-01)) - n * S(1.90821492927058770002e-10)) + lo;
    g = polynomial(r, c);
    power = (same_bits<I>(shifted) << 52) + 0x3ff0000000000000ull;
  }
  const V value = ((r * r) * g + r + S(1)) * same_bits<V>(power);
  return hi < S(sizeof(S) == sizeof(float) ? -87.3 : -708.3) ? V{} : value;
}

BN_ACTIVATION V magnitude(V v) { return v < S(0) ? -v : v; }

// min(|v|, limit), which of NaN is the limit.
BN_ACTIVATION V limited_magnitude(V v, S limit) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(S) == sizeof(float)) return fminf(fabsf(v), limit);
#endif
  const V full = magnitude<S, V>(v), most = V{} + limit;
  return full < most ? full : most;
}

// s(v) and 1 - s(v).
BN_ACTIVATION void sigmoids(V v, V* s, V* rest) {
#ifdef __CUDA_ARCH__
  const V a = limited_magnitude<S, V>(v, S(sizeof(S) == sizeof(float) ? 90 : 750));  // where exp is zero
#else
  const V a = magnitude<S, V>(v);
#endif
  const V e = exp_of_negative<S, V>(-a, V{});
  const V large = reciprocal<S, V>(e + S(1)), small = e * large;
  *s = v < S(0) ? small : large;
  *rest = v < S(0) ? large : small;
}

// P(v) and exp(-v^2 / 2).
BN_ACTIVATION void normal_distribution(V v, V* probability, V* e) {
  constexpr S kLimit = sizeof(S) == sizeof(float) ? S(14) : S(39);  // exp(-limit^2 / 2) is zero in exp_of_negative
  const V a = limited_magnitude<S, V>(v, kLimit);
#ifdef __CUDA_ARCH__
  // a^2 in two parts, the second what rounding took from the first.
  const V half = a * S(-0.5), square = a * half;
  *e = exp_of_negative<S, V>(square, fma(a, half, -square));
#else
  // a^2 in two parts: the square of a's upper half is exact.
  using I = typename Words<S, V>::type;
  const V upper =
      same_bits<V>(same_bits<I>(a) & (sizeof(S) == sizeof(float) ? I{} + 0xfffff000u : ~(I{} + 0x7ffffffu)));
  *e = exp_of_negative<S, V>(upper * upper * S(-0.5), (a - upper) * (a + upper) * S(-0.5));
#endif
  const V inverse = reciprocal<S, V>(a + S(4)), u = (a - S(4)) * inverse;
  V f;
  if constexpr (sizeof(S) == sizeof(float)) {
    constexpr S c[] = {0.7552851305f,    -0.6078966314f,    0.3871373939f,    -0.1865221598f,
                       0.06039664828f,   -0.00753771716f,   -0.003479954637f, 0.001622040106f,
                       0.0001336533871f, -0.0002155737763f, -1.731082301e-6f, 2.118298426e-5f};
    f = polynomial(u, c);
  } else {
    constexpr S c[] = {
        0.755285130415751451,    -0.607896641971892958,    0.387137400742226602,    -0.186521857959578716,
        0.0603965748903609184,   -0.00754018896889161899,  -0.00347969235665150262, 0.00163081848547358572,
        0.000133344209160147793, -0.000231095137787289336, -1.90767603071909815e-6, 0.0000351456023590445148,
        7.14602153126746174e-7,  -5.92289377754192813e-6,  -6.24955107756517786e-7, 1.02698407014319295e-6,
        2.64733728197986783e-7,  -1.62231632085356706e-7,  -7.87836034269363779e-8, 1.95696089399740487e-8,
        1.60673869573294019e-8,  -1.27723514329577203e-9,  -1.6886576966786735e-9};
    f = polynomial(u, c);
  }
  const V tail = *e * f * inverse;
  *probability = v < S(0) ? tail : S(1) - tail;
}

// Whether the derivative at v is 1 and not negative_slope, with torch's answers for 0 and NaN.
BN_ACTIVATION auto passes_relu(V v) { return (v <= S(0)) == 0; }
BN_ACTIVATION auto passes_leaky_relu(V v) { return v > S(0); }

BN_ACTIVATION V silu(V v) {
  V s, rest;
  sigmoids<S, V>(v, &s, &rest);
  return v * s;
}
BN_ACTIVATION V silu_derivative(V v) {
  V s, rest;
  sigmoids<S, V>(v, &s, &rest);
  return s * (v * rest + S(1));
}
BN_ACTIVATION V gelu(V v) {
  V probability, e;
  normal_distribution<S, V>(v, &probability, &e);
  return v * probability;
}
BN_ACTIVATION V gelu_derivative(V v) {
  V probability, e;
  normal_distribution<S, V>(v, &probability, &e);
  return probability + v * (e * S(0.39894228040143267794));
}

// What is applied to v, and what to the gradient that comes back: structs, so that a loop is compiled for each.
template <class S>
struct Identity {
  static constexpr bool kBySign = false;
  S slope;
  template <class V>
  BN_HD V operator()(V v) const {
    return v;
  }
  template <class V>
  BN_HD V gradient(V dy, V) const {
    return dy;
  }
};
template <class S>
struct ReLU {
  static constexpr bool kBySign = true;
  S slope;
  template <class V>
  BN_HD auto passes(V v) const {
    return passes_relu<S, V>(v);
  }
  template <class V>
  BN_HD V blocked(V) const {
    return V{};
  }
  template <class V>
  BN_HD V operator()(V v) const {
    return passes(v) ? v : V{};
  }
  template <class V>
  BN_HD V gradient(V dy, V v) const {
    return passes(v) ? dy : V{};
  }
};
template <class S>
struct LeakyReLU {
  static constexpr bool kBySign = true;
  S slope;
  template <class V>
  BN_HD auto passes(V v) const {
    return passes_leaky_relu<S, V>(v);
  }
  template <class V>
  BN_HD V blocked(V dy) const {
    return dy * slope;
  }
  template <class V>
  BN_HD V operator()(V v) const {
    return passes(v) ? v : v * slope;
  }
  template <class V>
  BN_HD V gradient(V dy, V v) const {
    return passes(v) ? dy : dy * slope;
  }
};
template <class S>
struct SiLU {
  static constexpr bool kBySign = false;
  S slope;
  template <class V>
  BN_HD V operator()(V v) const {
    return silu<S, V>(v);
  }
  template <class V>
  BN_HD V gradient(V dy, V v) const {
    return dy * silu_derivative<S, V>(v);
  }
};
template <class S>
struct GELU {
  static constexpr bool kBySign = false;
  S slope;
  template <class V>
  BN_HD V operator()(V v) const {
    return gelu<S, V>(v);
  }
  template <class V>
  BN_HD V gradient(V dy, V v) const {
    return dy * gelu_derivative<S, V>(v);
  }
};

// use(activation) with the struct of a kind.
template <class S, class Use>
BN_HD auto with_activation(Activation kind, S slope, const Use& use) {
  switch (kind) {
    case Activation::kReLU:
      return use(ReLU<S>{slope});
    case Activation::kLeakyReLU:
      return use(LeakyReLU<S>{slope});
    case Activation::kSiLU:
      return use(SiLU<S>{slope});
    case Activation::kGELU:
      return use(GELU<S>{slope});
    default:
      return use(Identity<S>{slope});
  }
}
#undef BN_ACTIVATION
#undef BN_UNROLL

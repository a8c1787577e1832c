// Vectors of one instruction-set level: GCC/Clang vector types, loads that widen and stores that round.
// Included inside the level's namespace; BN_VECTOR_BYTES is the register width,
// BN_LEVEL the level itself: GCC before 13 does not update __AVX2__ and its kin at a target pragma in C++.

constexpr int kLanesD = BN_VECTOR_BYTES / 8;
constexpr int kLanesF = BN_VECTOR_BYTES / 4;

template <class E, int N>
struct VecOf {
  typedef E type __attribute__((vector_size(sizeof(E) * N)));
};
template <class E, int N>
using Vec = typename VecOf<E, N>::type;
using VecD = Vec<double, kLanesD>;

template <class V, class P>
inline V load_raw(const P* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class P>
inline void store_raw(P* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <int N>
inline Vec<float, N> widen(const float* p) {
  return load_raw<Vec<float, N>>(p);
}
template <int N>
inline Vec<double, N> widen(const double* p) {
  return load_raw<Vec<double, N>>(p);
}
template <int N>
inline Vec<float, N> widen(const bfloat16* p) {
  const auto half = load_raw<Vec<uint16_t, N>>(p);
  const auto word = __builtin_convertvector(half, Vec<uint32_t, N>) << 16;
  return load_raw<Vec<float, N>>(&word);
}
template <int N>
inline Vec<float, N> widen(const float16* p) {
#if BN_LEVEL >= 2
  if constexpr (N == 16) return (Vec<float, 16>)_mm512_maskz_cvtph_ps(0xffff, load_raw<__m256i>(p));
#endif
#if BN_LEVEL >= 1
  if constexpr (N == 8) return (Vec<float, 8>)_mm256_cvtph_ps(load_raw<__m128i>(p));
  if constexpr (N == 4) return (Vec<float, 4>)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  Vec<float, N> v;
  for (int i = 0; i < N; ++i) v[i] = static_cast<float>(to_double(p[i]));
  return v;
}

template <int N>
inline void narrow(float* p, Vec<float, N> v) {
  store_raw(p, v);
}
template <int N>
inline void narrow(double* p, Vec<double, N> v) {
  store_raw(p, v);
}
template <int N>
inline void narrow(bfloat16* p, Vec<float, N> v) {
  const auto bits = load_raw<Vec<uint32_t, N>>(&v);
  const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto quiet = bits >> 16 | 0x40;
  const auto word = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
  store_raw(p, __builtin_convertvector(word, Vec<uint16_t, N>));
}
template <int N>
inline void narrow(float16* p, Vec<float, N> v) {
#if BN_LEVEL >= 2
  if constexpr (N == 16) return store_raw(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#endif
#if BN_LEVEL >= 1
  if constexpr (N == 8) return store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  for (int i = 0; i < N; ++i) p[i] = float_to_float16(v[i]);
}

// One stream read from memory far ahead: the hardware's prefetchers stop at page ends and start late (measured:
// statistics of a tensor in the last-level cache 1.6 times faster). Past the end of a tensor it is a no-op.
constexpr int kPrefetchBytes = 4096;
template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
}

// The type that element-wise passes compute in, and its vector.
template <class T>
struct Compute {
  using scalar = float;
  static constexpr int lanes = kLanesF;
};
template <>
struct Compute<double> {
  using scalar = double;
  static constexpr int lanes = kLanesD;
};
template <class T>
using Scalar = typename Compute<T>::scalar;
template <class T>
using VecC = Vec<Scalar<T>, Compute<T>::lanes>;

template <class T>
inline VecC<T> load_compute(const T* p) {
  return widen<Compute<T>::lanes>(p);
}
template <class T>
inline void store_compute(T* p, VecC<T> v) {
  narrow<Compute<T>::lanes>(p, v);
}
// kLanesD elements, in the compute type and in double.
template <class T>
inline Vec<Scalar<T>, kLanesD> load_half(const T* p) {
  return widen<kLanesD>(p);
}
template <class T>
inline VecD load_double(const T* p) {
  return __builtin_convertvector(load_half(p), VecD);
}

// The first n of N elements, the rest filled: for the end of a row, where a whole vector would leave it.
template <int N, class T>
inline const T* padded(const T* p, int64_t n, T fill, T* buffer) {
  for (int i = 0; i < N; ++i) buffer[i] = i < n ? p[i] : fill;
  return buffer;
}

template <class V>
inline V broadcast(double value) {
  V v;
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = value;
  return v;
}

inline double sum_lanes(VecD v) {
  double sum = v[0];
  for (int i = 1; i < kLanesD; ++i) sum += v[i];
  return sum;
}

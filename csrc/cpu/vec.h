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

// As many signed bytes as V has integers, widened. By instructions: GCC 12 takes such a conversion apart.
template <class V>
inline V widen_bytes(const uint8_t* p) {
  constexpr int kN = sizeof(V) / sizeof(V{}[0]);
#if BN_LEVEL >= 2
  if constexpr (sizeof(V) == 64) {
    if constexpr (kN == 16) return (V)_mm512_maskz_cvtepi8_epi32(0xffff, load_raw<__m128i>(p));
    if constexpr (kN == 8) return (V)_mm512_maskz_cvtepi8_epi64(0xff, _mm_loadl_epi64((const __m128i*)p));
    if constexpr (kN == 32) return (V)_mm512_maskz_cvtepi8_epi16(0xffffffff, load_raw<__m256i>(p));
  }
#endif
#if BN_LEVEL >= 1
  if constexpr (sizeof(V) == 32 && kN == 8) return (V)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
  if constexpr (sizeof(V) == 32 && kN == 16) return (V)_mm256_cvtepi8_epi16(load_raw<__m128i>(p));
#endif
  return __builtin_convertvector(load_raw<Vec<int8_t, kN>>(p), V);
}
// The vector of integers of V's shape.
template <class V, class E = std::decay_t<decltype(V{}[0])>>
using BitsOf = Vec<std::conditional_t<sizeof(E) == 2, int16_t, std::conditional_t<sizeof(E) == 4, int32_t, int64_t>>,
                   sizeof(V) / sizeof(E)>;
// `value` where the pattern has 0xff, zeros where it has 0.
template <class V>
inline V keep_lanes(const uint8_t* pattern, V value) {
  return (V)((BitsOf<V>)value & widen_bytes<BitsOf<V>>(pattern));
}
using VecD = Vec<double, kLanesD>;
inline VecD square_root(VecD v) {
#if BN_LEVEL >= 2
  return (VecD)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif BN_LEVEL >= 1
  return (VecD)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanesD; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
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
  for (int i = 0; i < N; ++i) v[i] = static_cast<float>(to_double(load_one<float16>(p + i)));
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
  for (int i = 0; i < N; ++i) store_one(p + i, float_to_float16(v[i]));
}

// Where pieces lie apart in memory, what is read this much later is asked for early: the hardware's prefetchers stop at
// each piece. Along memory they do better alone (measured: 0.7 to 0.8 of the speed with prefetches beside them).
constexpr int64_t kPrefetchBytes = 4096;
inline void prefetch(const void* data, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(data) + at);
}

template <class To, class From>
inline To bits_in(From value) {
  To to;
  __builtin_memcpy(&to, &value, sizeof to);
  return to;
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
// What one step of a loop over elements takes. For bfloat16 two vectors, the even and the odd elements of one register:
// each costs one instruction to widen, where neighbours would have to be moved across the register, in and out.
template <class T>
constexpr int kPackVectors = std::is_same<T, bfloat16>::value && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 2 : 1;
template <class T>
constexpr int kPack = kPackVectors<T> * Compute<T>::lanes;
// n rounded up to whole packs.
template <class T>
constexpr int64_t packed_size(int64_t n) {
  return (n + kPack<T> - 1) / kPack<T> * kPack<T>;
}

// n values of the order of memory into that of packs, and back; both whole packs long.
template <class T, class E>
inline void to_packs(const E* in, int64_t n, E* out) {
  constexpr int kV = kPackVectors<T>, kLanes = Compute<T>::lanes;
  for (int64_t v = 0; v < n; v += kV * kLanes) {
    for (int u = 0; u < kV; ++u) {
      for (int j = 0; j < kLanes; ++j) out[v + u * kLanes + j] = in[v + j * kV + u];
    }
  }
}
template <class T, class E>
inline void from_packs(const E* in, int64_t n, E* out) {
  constexpr int kV = kPackVectors<T>, kLanes = Compute<T>::lanes;
  for (int64_t v = 0; v < n; v += kV * kLanes) {
    for (int u = 0; u < kV; ++u) {
      for (int j = 0; j < kLanes; ++j) out[v + j * kV + u] = in[v + u * kLanes + j];
    }
  }
}

template <class T>
inline void load_pack(const T* p, VecC<T>* v) {
  if constexpr (kPackVectors<T> == 1) {
    v[0] = load_compute(p);
  } else {
    const auto both = load_raw<Vec<uint32_t, kLanesF>>(p);
    v[0] = (VecC<T>)(both << 16);
    v[1] = (VecC<T>)(both & 0xffff0000);
  }
}

// Rounded to the upper 16 bits, ties to even; NaN becomes all ones.
template <class V>
inline Vec<uint32_t, kLanesF> round_to_upper(V value) {
  const auto bits = (Vec<uint32_t, kLanesF>)value;
  return (bits + 0x7fff + (bits >> 16 & 1)) | (Vec<uint32_t, kLanesF>)(value != value);
}

template <class T>
inline void store_pack(T* p, const VecC<T>* v) {
  if constexpr (kPackVectors<T> == 1) {
    store_compute(p, v[0]);
  } else {
    store_raw(p, round_to_upper(v[0]) >> 16 | (round_to_upper(v[1]) & 0xffff0000));
  }
}

// One bit for each of the first n lanes.
inline uint32_t lanes_below(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// The first n of the pack in `buffer`, to where a whole one would leave a row.
template <class T>
inline void store_first(const T* buffer, int64_t n, T* to) {
#if BN_LEVEL >= 2
  const uint32_t there = lanes_below(n);
  if constexpr (sizeof(T) == 4 && kPack<T> == 16) {
    return _mm512_mask_storeu_epi32(to, there, load_raw<__m512i>(buffer));
  } else if constexpr (sizeof(T) == 8 && kPack<T> == 8) {
    return _mm512_mask_storeu_epi64(to, there, load_raw<__m512i>(buffer));
  } else if constexpr (sizeof(T) == 2 && kPack<T> == 32) {
    return _mm512_mask_storeu_epi16(to, there, load_raw<__m512i>(buffer));
  } else if constexpr (sizeof(T) == 2 && kPack<T> == 16) {
    return _mm256_mask_storeu_epi16(to, there, load_raw<__m256i>(buffer));
  }
#endif
  std::copy(buffer, buffer + n, to);
}

// The same without reading the line first and past the caches, for an output that they cannot hold anyway. p must be
// aligned to the pack. An output no larger stays with ordinary stores: who reads it next may find its end in cache.
constexpr int64_t kStreamedOutput = int64_t(8) << 20;
template <class T>
inline void stream_elements(T* p, const T (&out)[kPack<T>]) {
#if defined(BN_EXT_X86)
#if BN_LEVEL >= 2
  if constexpr (sizeof out == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_raw<__m512i>(out));
#endif
#if BN_LEVEL >= 1
  if constexpr (sizeof out == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_raw<__m256i>(out));
#endif
  if constexpr (sizeof out == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_raw<__m128i>(out));
#endif
  __builtin_memcpy(p, out, sizeof out);
}
template <class T>
inline void stream_pack(T* p, const VecC<T>* v) {
  T out[kPack<T>];
  store_pack(out, v);
  stream_elements(p, out);
}
// The end of a run, `left` elements of a pack in `buffer`, with zeros behind it where `room` says that those are to be
// zero: a whole pack, as a line that is written in two parts is read first. Returns how many zeros.
template <bool kStream, class T>
inline int64_t store_end(T (&buffer)[kPack<T>], int64_t left, int64_t room, T* to) {
  if (!kStream || room < kPack<T> - left) {
    store_first(buffer, left, to);
    return 0;
  }
  for (int64_t i = 0; i < kPack<T>; ++i) buffer[i] = i < left ? buffer[i] : T();
  stream_elements(to, buffer);
  return kPack<T> - left;
}
// Calls body(streamed, i, count) for n elements from `out` on, streamed ones from the first whose address allows it;
// none are where `whole` forbids to begin within the n and the first does not allow it.
template <class T, class Body>
inline void for_streamed(bool stream, bool whole, const T* out, int64_t n, const Body& body) {
  const int64_t off = reinterpret_cast<uintptr_t>(out) % (kPack<T> * sizeof(T));
  int64_t head = n;
  if (stream && off == 0) {
    head = 0;
  } else if (stream && !whole && off % sizeof(T) == 0) {
    head = std::min<int64_t>(n, kPack<T> - off / int64_t(sizeof(T)));
  }
  if (head > 0) body(std::false_type(), int64_t(0), head);
  if (head < n) body(std::true_type(), head, n - head);
}
// Orders streamed stores before whatever this thread does next.
inline void stream_fence() {
#if defined(BN_EXT_X86)
  _mm_sfence();
#endif
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
#if BN_LEVEL >= 2
  const uint32_t there = lanes_below(n);
  if constexpr (sizeof(T) == 4 && N == 16) {
    _mm512_storeu_si512(buffer, _mm512_mask_loadu_epi32(_mm512_set1_epi32(bits_in<int32_t>(fill)), there, p));
    return buffer;
  } else if constexpr (sizeof(T) == 4 && N == 8) {
    _mm256_storeu_si256((__m256i*)buffer, _mm256_mask_loadu_epi32(_mm256_set1_epi32(bits_in<int32_t>(fill)), there, p));
    return buffer;
  } else if constexpr (sizeof(T) == 8 && N == 8) {
    _mm512_storeu_si512(buffer, _mm512_mask_loadu_epi64(_mm512_set1_epi64(bits_in<int64_t>(fill)), there, p));
    return buffer;
  } else if constexpr (sizeof(T) == 2 && N == 32) {
    _mm512_storeu_si512(buffer, _mm512_mask_loadu_epi16(_mm512_set1_epi16(bits_in<int16_t>(fill)), there, p));
    return buffer;
  } else if constexpr (sizeof(T) == 2 && N == 16) {
    _mm256_storeu_si256((__m256i*)buffer, _mm256_mask_loadu_epi16(_mm256_set1_epi16(bits_in<int16_t>(fill)), there, p));
    return buffer;
  }
#endif
  for (int i = 0; i < N; ++i) buffer[i] = i < n ? load_one<T>(p + i) : fill;
  return buffer;
}

// v, and zero from its lane n on.
template <class V>
inline V first_lanes(V v, int64_t n) {
  typename VecOf<std::conditional_t<sizeof(v[0]) == 4, int32_t, int64_t>, sizeof(V) / sizeof(v[0])>::type lane;
  for (unsigned j = 0; j < sizeof(V) / sizeof(v[0]); ++j) lane[j] = static_cast<int32_t>(j);
  return lane < static_cast<int32_t>(n) ? v : V{};
}

// The pack from p + at on; of a tail, which has `left` elements, nothing behind its end.
template <class T, class Tail>
inline __attribute__((always_inline)) void load_pack_at(const T* p, int64_t at, int64_t left, Tail tail, VecC<T>* v) {
  T buffer[kPack<T>];
  load_pack(tail ? padded<kPack<T>>(p + at, left, T(), buffer) : p + at, v);
}
// The same, with zeros where the pattern has 0.
template <class T, class Tail>
inline __attribute__((always_inline)) void load_kept_pack(const T* p, const uint8_t* pattern, int64_t at, int64_t left,
                                                          Tail tail, VecC<T>* v) {
  using Bits = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  T buffer[kPack<T>], kept[kPack<T>];
  const T* const from = tail ? padded<kPack<T>>(p + at, left, T(), buffer) : p + at;
  store_raw(kept, keep_lanes(pattern + at, load_raw<Vec<Bits, kPack<T>>>(from)));
  load_pack(kept, v);
}

// value - 0 is value, zeros' signs included: set lane by lane, GCC 12 makes one masked instruction of each.
template <class V, class E>
inline V broadcast(E value) {
  return value - V{};
}

inline double sum_lanes(VecD v) {
  double sum = v[0];
  for (int i = 1; i < kLanesD; ++i) sum += v[i];
  return sum;
}

// y = act((x - mean_hi) * scale + shift + residual) over rows and runs. Included inside the level's namespace.

template <class S, class V>
struct Words {
  using type = typename VecOf<std::conditional_t<sizeof(S) == 4, uint32_t, uint64_t>, sizeof(V) / sizeof(S)>::type;
};
#include "core/activation_math.h"

// One bit for each element of a pack, in memory's order, from comparisons of its vectors.
template <class T, class M>
inline uint32_t bits_of_pack(const M* hit) {
  uint32_t bits = 0;
#if defined(BN_EXT_X86)
  if constexpr (kPackVectors<T> == 2) {
    const auto both = (hit[0] & 0xffff) | (hit[1] & static_cast<int32_t>(0xffff0000));  // 16 bits an element
#if BN_LEVEL >= 2
    bits = _mm512_movepi16_mask((__m512i)both);
#elif BN_LEVEL >= 1
    const uint32_t bytes = _mm256_movemask_epi8(_mm256_packs_epi16((__m256i)both, _mm256_setzero_si256()));
    bits = (bytes & 0xff) | (bytes >> 8 & 0xff00);
#else
    bits = _mm_movemask_epi8(_mm_packs_epi16((__m128i)both, _mm_setzero_si128()));
#endif
  } else if constexpr (sizeof(hit[0][0]) == 4) {
#if BN_LEVEL >= 2
    bits = _mm512_movepi32_mask((__m512i)hit[0]);
#elif BN_LEVEL >= 1
    bits = _mm256_movemask_ps((__m256)hit[0]);
#else
    bits = _mm_movemask_ps((__m128)hit[0]);
#endif
  } else {
#if BN_LEVEL >= 2
    bits = _mm512_movepi64_mask((__m512i)hit[0]);
#elif BN_LEVEL >= 1
    bits = _mm256_movemask_pd((__m256d)hit[0]);
#else
    bits = _mm_movemask_pd((__m128d)hit[0]);
#endif
  }
#else
  for (int u = 0; u < kPackVectors<T>; ++u) {
    for (int j = 0; j < Compute<T>::lanes; ++j) bits |= uint32_t(hit[u][j] != 0) << (j * kPackVectors<T> + u);
  }
#endif
  return bits;
}

// 64 bits of a mask from p on, the first the lowest.
inline uint64_t load_bits(const uint8_t* p) {
  uint64_t word;
  std::memcpy(&word, p, sizeof word);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

// n bits into a mask of zeros, from bit `at` on. Rows that other threads write may begin and end in the same bytes.
inline void store_bits(uint8_t* mask, int64_t at, uint64_t* bits, int64_t n) {
  const int shift = at % 8;
  uint8_t* to = mask + at / 8;
  const int64_t bytes = (shift + n + 7) / 8;
  if (n % 64 != 0) bits[n / 64] &= (uint64_t(1) << n % 64) - 1;
  const auto byte = [&](int64_t i) {
    const int64_t bit = 8 * i - shift, word = bit < 0 ? 0 : bit / 64, left = bit < 0 ? 0 : bit % 64;
    uint64_t value = bit < 0 ? bits[0] << -bit : bits[word] >> left;
    if (bit >= 0 && left > 56 && 64 * (word + 1) < n) value |= bits[word + 1] << (64 - left);
    return static_cast<uint8_t>(value);
  };
  const int64_t first = shift != 0, last = (shift + n) % 8 != 0 ? bytes - 1 : bytes;
  if (shift == 0) {
    for (int64_t i = 0; i < last / 8; ++i) {
      for (int j = 0; j < 8; ++j) to[8 * i + j] = static_cast<uint8_t>(bits[i] >> (8 * j));
    }
    for (int64_t i = last / 8 * 8; i < last; ++i) to[i] = byte(i);
  } else {
    for (int64_t i = first; i < last; ++i) to[i] = byte(i);
    __atomic_fetch_or(to, byte(0), __ATOMIC_RELAXED);
  }
  if (last < bytes && (last > 0 || first == 0)) __atomic_fetch_or(to + last, byte(last), __ATOMIC_RELAXED);
}

constexpr int64_t kPiece = kGather;  // the longest row or run that is handled at once
static_assert(kBlockColumns <= kPiece, "a row of a task is one piece");

// What one piece needs to know; coefficients of mean_hi, scale, shift by column (in packs), or of a run's channel.
template <class T>
struct Piece {
  int64_t n;
  const Scalar<T>* c[3];
  int64_t at;  // offset in the output
};

// The piece's elements [v, v + n).
template <bool kRun, class T>
inline Piece<T> part_of(const Piece<T>& p, int64_t v, int64_t n) {
  const int64_t columns = kRun ? 0 : v;
  return {n, {p.c[0] + columns, p.c[1] + columns, p.c[2] + columns}, p.at + v};
}

template <class T, bool kRun>
inline void load_coefficients(const Piece<T>& p, int64_t v, VecC<T>* k) {
  for (int i = 0; i < 3; ++i) {
    k[i] = kRun ? VecC<T>{} + *p.c[i] : load_raw<VecC<T>>(p.c[i] + v);
  }
}

template <class T, bool kRun, bool kStream, class Act>
inline void activate_piece(const Piece<T>& p, const T* x, const T* residual, T* y, uint8_t* mask, const Act& act) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>, kLanes = Compute<T>::lanes;
  uint64_t words[kPiece / 64 + 1];
  uint64_t word = 0;
  for_vectors<kN>(p.n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer[kN];
    VecC<T> value[kVectors], other[kVectors] = {};
    load_pack_at(x, v, p.n - v, tail, value);
    if (residual) load_pack_at(residual, v, p.n - v, tail, other);
    for (int u = 0; u < kVectors; ++u) {
      VecC<T> k[3];
      load_coefficients<T, kRun>(p, v + u * kLanes, k);
      value[u] = normalise<T>(value[u], k[0], k[1], k[2]);
      if (residual) value[u] += other[u];
    }
    if constexpr (Act::kBySign) {
      if (mask) {
        decltype(act.passes(value[0])) hit[kVectors];
        for (int u = 0; u < kVectors; ++u) hit[u] = act.passes(value[u]);
        word |= uint64_t(bits_of_pack<T>(hit)) << v % 64;
        if (tail || (v + kN) % 64 == 0) words[v / 64] = word, word = 0;
      }
    }
    for (int u = 0; u < kVectors; ++u) value[u] = act(value[u]);
    if (kStream && !tail) return stream_pack(y + v, value);
    store_pack(tail ? buffer : y + v, value);
    if (tail) store_first(buffer, p.n - v, y + v);
  });
  if constexpr (Act::kBySign) {
    if (mask) {
      if (p.n % kN == 0 && p.n % 64 != 0) words[p.n / 64] = word;
      store_bits(mask, p.at, words, p.n);
    }
  }
}

// Forward's and evaluation's y, in the place of the plain row and run of normalise.h.
template <class T>
class Activated {
 public:
  // A residual is the third operand.
  Activated(const Geometry& g, const Epilogue& e)
      : e_(e), residual_(g, e.residual ? 2 : 0, e.residual.data), has_residual_(e.residual) {}

  bool direct() const { return (!has_residual_ || residual_.direct()) && !e_.mask; }

  void row(const Geometry& g, const T* x, T* y, const ColumnTask& t, int64_t r, bool stream,
           const Scalar<T>* const* c) const {
    T buffer[kBlockColumns];
    const T* residual = has_residual_ ? residual_.next_row(r, t.v0, t.n, buffer) : nullptr;
    piece<false>({t.n, {c[0], c[1], c[2]}, g.row_offset(0, r) + t.v0}, x, residual, y, stream);
  }
  void run(const Geometry& g, const T* x, T* y, int64_t o, int64_t c, int64_t i0, int64_t n, bool stream,
           const NormaliseCoefficients<T>& k) const {
    T buffer[kGather];
    const T* residual = has_residual_ ? residual_.run(o, c, i0, n, buffer) : nullptr;
    const int64_t at = o * g.strides[0].outer + c * g.strides[0].channel + i0;
    piece<true>({n, {k.row(0) + c, k.row(1) + c, k.row(2) + c}, at}, x, residual, y, stream);
  }

 private:
  template <bool kRun>
  void piece(const Piece<T>& p, const T* x, const T* residual, T* y, bool stream) const {
    with_activation<Scalar<T>>(e_.activation, static_cast<Scalar<T>>(e_.negative_slope), [&](const auto& act) {
      for_streamed(stream, !kRun && kPackVectors<T> > 1, y, p.n, [&](auto streamed, int64_t v, int64_t n) {
        activate_piece<T, kRun, decltype(streamed)::value>(part_of<kRun>(p, v, n), x + v,
                                                           residual ? residual + v : nullptr, y + v, e_.mask, act);
      });
    });
  }
  const Epilogue& e_;
  Reader<T> residual_;
  bool has_residual_;
};

// Contiguous access to rows (columns layout) and runs (planes layout) of an operand with any strides.
// Included inside the level's namespace.

// Rows reduced side by side share a load and a store of the accumulators. Past the caches that does not pay: many
// streams at one power-of-two distance defeat the prefetcher (measured 1.3 to 1.7 times slower), so rows go one by one
// there.
constexpr int kRowGroup = 8, kGradientRowGroup = 4;
constexpr int64_t kStreamBytes = int64_t(8) << 20;
constexpr int64_t kGather = 1024;  // elements of a run gathered at a time

// Where the pattern has 0xff what `from` has, elsewhere as `fill`, or zeros. `to` may be `from`.
template <class T>
inline void keep_columns(const uint8_t* pattern, const T* from, const T* fill, int64_t n, T* to) {
  using W = std::conditional_t<sizeof(T) == 2, int16_t, std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  constexpr int kN = BN_VECTOR_BYTES / sizeof(T);
  using V = Vec<W, kN>;
  int64_t v = 0;
  for (; v + kN <= n; v += kN) {
    const V keep = widen_bytes<V>(pattern + v), in = load_raw<V>(from + v);
    store_raw(to + v, fill ? (in & keep) | (load_raw<V>(fill + v) & ~keep) : in & keep);
  }
  for (; v < n; ++v) store_one(to + v, pattern[v] ? load_one<T>(from + v) : fill ? fill[v] : T());
}

template <class T>
class Reader {
 public:
  using Element = T;

  // Without data it reads as zeros, which cost no memory traffic.
  Reader(const Geometry& g, int operand, const void* data)
      : g_(g),
        k_(operand),
        base_(static_cast<const T*>(data)),
        direct_(data != nullptr && g.direct(operand)),
        masked_(data != nullptr && g.masked()),
        apart_(direct_ && g.columns && g.block_cols() < g.cols && g.elements() * int64_t(sizeof(T)) > kStreamBytes) {}

  bool direct() const { return direct_; }
  const Reader& in_order() const { return *this; }
  // From now on rows have whatever lies where they do not count.
  void read_whole() { masked_ = false; }

  // Columns [v0, v0 + n) of row r: in place, or gathered into `buffer` (n elements). What does not count is zero or, if
  // given, as `fill`.
  const T* row(int64_t r, int64_t v0, int64_t n, T* buffer, const T* fill = nullptr) const {
    const T* const all = whole_row(r, v0, n, buffer);
    return masked_ ? masked_row(r, all, n, buffer, fill) : all;
  }

  // The same where rows are read in their order: if the columns are a piece of a wider row, asks for a later row's.
  const T* next_row(int64_t r, int64_t v0, int64_t n, T* buffer, const T* fill = nullptr) const {
    const T* const all = next_whole_row(r, v0, n, buffer);
    return masked_ ? masked_row(r, all, n, buffer, fill) : all;
  }
  // With whatever does not count.
  __attribute__((always_inline)) const T* next_whole_row(int64_t r, int64_t v0, int64_t n, T* buffer) const {
    if (apart_) {
      const int64_t bytes = n * int64_t(sizeof(T)), later = r + 1 + kPrefetchBytes / bytes;
      if (later < g_.rows) prefetch(base_ + g_.row_offset(k_, later) + v0, bytes);
    }
    return whole_row(r, v0, n, buffer);
  }

  // Elements [i0, i0 + n) of the run of channel c at outer index o.
  const T* run(int64_t o, int64_t c, int64_t i0, int64_t n, T* buffer) const {
    if (base_ == nullptr) return zeros();
    const Strides& s = g_.strides[k_];
    const T* run = base_ + o * s.outer + c * s.channel + i0 * s.inner;
    if (direct_) return run;
    for (int64_t j = 0; j < n; ++j) buffer[j] = load_one<T>(run + j * s.inner);
    return buffer;
  }
  // As a source of dy (Sources), which may depend on x.
  const T* run(int64_t o, int64_t c, int64_t i0, int64_t n, const T*, T* buffer, bool) const {
    return run(o, c, i0, n, buffer);
  }

 private:
  [[gnu::noinline]] const T* masked_row(int64_t r, const T* all, int64_t n, T* buffer, const T* fill) const {
    uint8_t memory[kBlockColumns];
    const uint8_t* const pattern = g_.ragged->pattern(r, memory);
    if (!pattern) return all;
    keep_columns(pattern, all, fill, n, buffer);
    return buffer;
  }
  __attribute__((always_inline)) const T* whole_row(int64_t r, int64_t v0, int64_t n, T* buffer) const {
    if (base_ == nullptr) return zeros();
    const T* row = base_ + g_.row_offset(k_, r);
    if (direct_) return row + v0;
    const int64_t fast = g_.fast(), fast_stride = g_.fast_stride(k_), slow_stride = g_.slow_stride(k_);
    int64_t at = v0 % fast;
    const T* group = row + v0 / fast * slow_stride;
    for (int64_t j = 0; j < n; ++j) {
      buffer[j] = load_one<T>(group + at * fast_stride);
      if (++at == fast) {
        at = 0;
        group += slow_stride;
      }
    }
    return buffer;
  }

  static const T* zeros() {
    static_assert(kGather >= kBlockColumns, "as many as a row or a run is read of at a time");
    alignas(64) static const T values[kGather] = {};
    return values;
  }

  const Geometry& g_;
  int k_;
  const T* base_;
  bool direct_, masked_, apart_;
};

// What a pass reads, in the order of its operands: dy from a tensor or from what makes it of one
// (activated_gradient.h), and tensors, the first of which is x.
template <class T, int kInputs, class Dy = Reader<T>>
struct Sources {
  Dy dy;
  std::array<Reader<T>, kInputs - 1> rest;

  // The same with dy in the order of memory, as sums in double read it.
  auto in_order() const { return Sources<T, kInputs, std::decay_t<decltype(dy.in_order())>>{dy.in_order(), rest}; }

  // With whatever lies where rows do not count, unless dy is computed of them.
  Sources whole() const {
    Sources all = *this;
    if constexpr (std::is_same<Dy, Reader<T>>::value) {
      all.dy.read_whole();
      for (Reader<T>& r : all.rest) r.read_whole();
    }
    return all;
  }

  bool direct() const {
    return dy.direct() && std::all_of(rest.begin(), rest.end(), [](const Reader<T>& r) { return r.direct(); });
  }
};

// Of all of these, some rows or a piece of a run; Row: what a row or a run of dy is.
template <class T, int kInputs, class Row, int kRows = 1>
struct Pieces {
  Row dy[kRows];
  const T* rest[kInputs - 1][kRows];
};

// Memory for `kSize` elements of each. What is computed of dy is read by whole vectors, from any element on.
template <class T, int kInputs, class Dy, int64_t kSize>
struct Buffers {
  static constexpr bool kComputed = !std::is_same<typename Dy::Element, T>::value;
  alignas(kComputed ? 64 : alignof(T)) typename Dy::Element dy[kSize + (kComputed ? kPack<T> : 0)];
  T rest[kInputs - 1][kSize];
};

inline bool streams(const Geometry& g, int64_t element_size) { return g.elements() * element_size > kStreamBytes; }
inline bool streams_output(const Geometry& g, int64_t element_size) {
  return g.outer * g.channels * g.inner * element_size >= kStreamedOutput;
}

// What counts of the columns of `kRows` rows from r on: a byte a column, 0xff or 0.
template <int kRows>
class Patterns {
 public:
  Patterns(const Geometry& g, int64_t r) {
    for (int j = 0; j < kRows; ++j) {
      of_[j] = g.ragged->pattern(r + j, memory_[j]);
      if (of_[j]) continue;
      std::memset(memory_[j], 0xff, sizeof memory_[j]);
      of_[j] = memory_[j];
    }
  }
  const uint8_t* operator[](int j) const { return of_[j]; }

 private:
  uint8_t memory_[kRows][kBlockColumns];
  const uint8_t* of_[kRows];
};

// What counts of the columns of row r.
class Pattern {
 public:
  Pattern(const Geometry& g, int64_t r) : of_(g, r), p_(of_[0]) {}
  const uint8_t* data() const { return p_; }
  // From a row's n values into the row, with zeros where it does not count.
  template <class T>
  void put(const T* from, int64_t n, T* to, bool stream) const {
    const T* const zeros = nullptr;
    for_streamed(stream, false, to, n, [&](auto streamed, int64_t v, int64_t count) {
      const int64_t packs = streamed ? v + count / kPack<T> * kPack<T> : v;
      for (int64_t i = v; i < packs; i += kPack<T>) {
        T out[kPack<T>];
        keep_columns(p_ + i, from + i, zeros, kPack<T>, out);
        stream_elements(to + i, out);
      }
      keep_columns(p_ + packs, from + packs, zeros, v + count - packs, to + packs);
    });
  }

 private:
  Patterns<1> of_;
  const uint8_t* p_;
};

// What for_row_groups reads: rows with whatever lies where they do not count; rows with `fill` there.
template <class T>
struct Whole {
  const Reader<T>& rows;
  __attribute__((always_inline)) const T* next_row(int64_t r, int64_t v0, int64_t n, T* buffer) const {
    return rows.next_whole_row(r, v0, n, buffer);
  }
};
template <class T>
struct Filled {
  const Reader<T>& rows;
  const T* fill;
  const T* next_row(int64_t r, int64_t v0, int64_t n, T* buffer) const { return rows.next_row(r, v0, n, buffer, fill); }
};

// Calls body(count, r, pointers) for groups of `kRows` rows from r on, then for single rows.
template <int kRows, class T, class Rows, class Body>
inline void for_row_groups(const Rows& x, int64_t r0, int64_t r1, int64_t v0, int64_t n, T* buffer, const Body& body) {
  const auto group = [&](auto count, int64_t r) {
    const T* rows[decltype(count)::value];
    for (int j = 0; j < count; ++j) rows[j] = x.next_row(r + j, v0, n, buffer + j * kBlockColumns);
    body(count, r, rows);
  };
  int64_t r = r0;
  for (; r + kRows <= r1; r += kRows) group(std::integral_constant<int, kRows>(), r);
  for (; r < r1; ++r) group(std::integral_constant<int, 1>(), r);
}

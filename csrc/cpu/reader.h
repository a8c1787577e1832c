// Contiguous access to rows (columns layout) and runs (planes layout) of an operand with any strides.
// Included inside the level's namespace.

template <class T>
class Reader {
 public:
  using Element = T;

  Reader(const Geometry& g, int operand, const void* data)
      : g_(g), k_(operand), base_(static_cast<const T*>(data)), direct_(g.direct(operand)) {}

  bool direct() const { return direct_; }
  const Reader& in_order() const { return *this; }

  // Columns [v0, v0 + n) of row r: in place, or gathered into `buffer` (n elements).
  const T* row(int64_t r, int64_t v0, int64_t n, T* buffer) const {
    const T* row = base_ + g_.row_offset(k_, r);
    if (direct_) return row + v0;
    const int64_t fast = g_.fast(), fast_stride = g_.fast_stride(k_), slow_stride = g_.slow_stride(k_);
    int64_t at = v0 % fast;
    const T* group = row + v0 / fast * slow_stride;
    for (int64_t j = 0; j < n; ++j) {
      buffer[j] = group[at * fast_stride];
      if (++at == fast) {
        at = 0;
        group += slow_stride;
      }
    }
    return buffer;
  }

  // Elements [i0, i0 + n) of the run of channel c at outer index o.
  const T* run(int64_t o, int64_t c, int64_t i0, int64_t n, T* buffer) const {
    const Strides& s = g_.strides[k_];
    const T* run = base_ + o * s.outer + c * s.channel + i0 * s.inner;
    if (direct_) return run;
    for (int64_t j = 0; j < n; ++j) buffer[j] = run[j * s.inner];
    return buffer;
  }
  // As a source of gradients (gradient.h), which may depend on x.
  const T* run(int64_t o, int64_t c, int64_t i0, int64_t n, const T*, T* buffer, bool) const {
    return run(o, c, i0, n, buffer);
  }

 private:
  const Geometry& g_;
  int k_;
  const T* base_;
  bool direct_;
};

// Rows reduced side by side share a load and a store of the accumulators. Past the caches that does not pay: many
// streams at one power-of-two distance defeat the prefetcher (measured 1.3 to 1.7 times slower), so rows go one by one
// there.
constexpr int kRowGroup = 8, kGradientRowGroup = 4;
constexpr int64_t kStreamBytes = int64_t(8) << 20;
constexpr int64_t kGather = 1024;  // elements of a run gathered at a time

inline bool streams(const Geometry& g, int64_t element_size) { return g.rows * g.cols * element_size > kStreamBytes; }
inline bool streams_output(const Geometry& g, int64_t element_size) {
  return g.outer * g.channels * g.inner * element_size >= kStreamedOutput;
}

// How far from an element lies what is read kPrefetchBytes later: right there in memory, or, where a task takes only n
// elements of the lead's every row (or outer index, for planes), some of these further.
inline int64_t elements_ahead(const Geometry& g, int64_t element_size, int64_t n) {
  const int64_t bytes = n * element_size,
                step = g.columns ? g.row_offset(0, 1) - g.row_offset(0, 0) : g.strides[0].outer;
  const bool along = g.columns ? n == g.cols : bytes >= 2 * kPrefetchBytes || g.outer == 1;
  return along ? kPrefetchBytes / element_size : (kPrefetchBytes / bytes + 1) * step;
}

// Calls body(rows, pointers) for groups of `kRows` rows, then for single rows.
template <int kRows, class T, class Body>
inline void for_row_groups(const Reader<T>& x, int64_t r0, int64_t r1, int64_t v0, int64_t n, T* buffer, Body body) {
  const T* rows[kRows];
  int64_t r = r0;
  for (; r + kRows <= r1; r += kRows) {
    for (int j = 0; j < kRows; ++j) rows[j] = x.row(r + j, v0, n, buffer + j * kBlockColumns);
    body(std::integral_constant<int, kRows>(), rows);
  }
  for (; r < r1; ++r) {
    rows[0] = x.row(r, v0, n, buffer);
    body(std::integral_constant<int, 1>(), rows);
  }
}

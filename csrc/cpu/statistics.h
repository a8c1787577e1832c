// Moments of a chunk: sums shifted by the chunk's first value and accumulated in double, then (count, mean, M2); and
// what the float version in statistics_float.h shares with it.
// Included inside the level's namespace.

// Partial results of every chunk: [chunk][3][channels] doubles, the rows being mean_hi, mean_lo, m2.
struct Partials {
  double* data;
  int64_t channels;
  double* row(int64_t chunk, int which) const { return data + (chunk * 3 + which) * channels; }
  void store(int64_t chunk, int64_t c, const Moments<double>& m) const {
    row(chunk, 0)[c] = m.mean_hi;
    row(chunk, 1)[c] = m.mean_lo;
    row(chunk, 2)[c] = m.m2;
  }
};

// Whether sums of float differences can be trusted: squares neither overflowed nor lost digits to underflow, and the
// shift was within two standard deviations of the mean, so that the mean's part of s2 does not drown the variance. A
// sum of zero stands for differences below 1e-22, whose variance float32 cannot tell from zero.
inline bool float_sums_are_safe(double count, double s1, double s2) {
  return s2 == 0 || (s2 > 1e-25 && s2 < 1e35 && s1 * s1 <= 0.8 * count * s2);
}

inline int64_t padded_size(int64_t n) { return (n + kLanesF - 1) / kLanesF * kLanesF; }

template <class T>
inline double finite_or_zero(T value) {
  const double d = to_double(value);
  return is_finite(d) ? d : 0.0;
}

// Rows and columns of a task of the columns layout; tasks run along memory.
struct ColumnTask {
  int64_t chunk, r0, r1, v0, n;
};
inline ColumnTask column_task(const Geometry& g, int64_t task) {
  const int64_t blocks = g.col_blocks(), of_rows = g.row_chunks() * blocks;
  if (task >= of_rows) {  // rows were joined, so that all columns are one block
    const int64_t tail = task - of_rows, r0 = g.rows + tail * g.tail_chunk_rows();
    return {g.row_chunks() + tail, r0, std::min(r0 + g.tail_chunk_rows(), g.rows + g.tail_rows), 0, g.tail_cols};
  }
  const int64_t chunk = task / blocks, v0 = task % blocks * g.block_cols();
  const int64_t r0 = chunk * g.chunk_rows();
  return {chunk, r0, std::min(r0 + g.chunk_rows(), g.rows), v0, std::min(g.block_cols(), g.cols - v0)};
}
inline int64_t column_tasks(const Geometry& g) { return g.row_chunks() * g.col_blocks() + g.tail_chunks(); }

struct PlaneChunk {
  int64_t o0, o1, i0, n;  // n: at most, of each run
};
inline PlaneChunk plane_chunk(const Geometry& g, int64_t chunk) {
  if (g.ragged) return {g.ragged->chunk_begin(chunk), g.ragged->chunk_begin(chunk + 1), 0, g.run_length()};
  const int64_t pieces = g.run_pieces(), o = chunk / pieces * g.chunk_outer(), i = chunk % pieces * g.run_length();
  return {o, std::min(o + g.chunk_outer(), g.outer), i, std::min(g.run_length(), g.inner - i)};
}

// Values a channel has in a chunk.
inline double chunk_count(const Geometry& g, int64_t chunk) {
  if (!g.columns) {
    const PlaneChunk p = plane_chunk(g, chunk);
    return static_cast<double>(g.ragged ? g.ragged->chunk_values(chunk) : (p.o1 - p.o0) * p.n);
  }
  if (chunk >= g.row_chunks()) {
    const int64_t done = (chunk - g.row_chunks()) * g.tail_chunk_rows();
    return static_cast<double>(std::min(g.tail_chunk_rows(), g.tail_rows - done) * (g.tail_cols / g.channels));
  }
  const int64_t r0 = chunk * g.chunk_rows(), rows = std::min(g.chunk_rows(), g.rows - r0);
  if (g.masked()) return static_cast<double>(g.ragged->span_values(r0, r0 + rows));
  return static_cast<double>(rows * (g.by_span ? g.inner : g.fold));
}

// step(v, tail) for every vector of kLanes columns; the last, shorter one with tail = std::true_type. Two compiled
// copies of the step: a test inside it would keep the loop's values out of registers.
template <int kLanes, class Step>
__attribute__((always_inline)) inline void for_vectors(int64_t n, const Step& step) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t v = 0; v < whole; v += kLanes) step(v, std::false_type());
  if (whole < n) step(whole, std::true_type());
}

// Accumulates `kRows` rows of n columns into s1, s2 (padded to whole vectors).
template <class T, int kRows>
inline void accumulate_rows(const T* const* rows, int64_t n, const double* shift, double* s1, double* s2) {
  for_vectors<kLanesD>(n, [&](int64_t v, auto tail) {
    T buffer[kLanesD];
    const VecD k = load_raw<VecD>(shift + v);
    VecD a = load_raw<VecD>(s1 + v), b = load_raw<VecD>(s2 + v);
    for (int j = 0; j < kRows; ++j) {
      const T* p = tail ? padded<kLanesD>(rows[j] + v, n - v, T(), buffer) : rows[j] + v;
      const VecD d = load_double(p) - k;
      a += d;
      b += d * d;
    }
    store_raw(s1 + v, a);
    store_raw(s2 + v, b);
  });
}

// Columns that share a channel also share the shift of the first of them, so that their sums simply add.
inline int64_t lead_column(const Geometry& g, int64_t v) { return g.by_span ? v - v % g.fast() : v % g.fast(); }

// Of masked rows: the mean of each channel's first values, `few` of them at most, in x's type, for all its columns.
// What does not count is filled with it, so that it adds nothing to sums around it.
template <class T>
inline void span_shifts(const Geometry& g, const Reader<T>& x, const ColumnTask& t, int few, T* buffer, T* fill) {
  alignas(64) double base[kBlockColumns] = {}, sum[kBlockColumns] = {};
  const int64_t length = g.fast(), channels = t.n / length;
  int found = 0;
  for (int64_t r = t.r0; r < t.r1 && found < few; ++r) {
    if (g.ragged->span_values(r, r + 1) == 0) continue;
    const T* const row = x.row(r, t.v0, t.n, buffer) + g.ragged->first(r);
    for (int64_t c = 0; c < channels; ++c) {
      const double value = to_double(load_one<T>(row + c * length));
      if (found == 0) base[c] = value;
      sum[c] += value - base[c];
    }
    ++found;
  }
  for (int64_t c = 0; c < channels; ++c) {
    std::fill(fill + c * length, fill + (c + 1) * length,
              from_double<T>(finite_or_zero(from_double<T>(base[c] + sum[c] / (found ? found : 1)))));
  }
}

// Sums of n columns, `rows` values each -> moments of their channels, for the channels that `redo` marks (all if null).
// With `unsafe` given, channels for which float arithmetic was not safe are marked there instead of being stored;
// returns whether there was one. A channel is judged by its own values alone, so no channel can change another's
// result.
template <class S>
inline bool store_columns(const Geometry& g, const ColumnTask& t, const S* shift, double* s1, double* s2,
                          const Partials& partials, const bool* redo, bool* unsafe) {
  const int64_t n = t.n, fast = g.fast(), groups = (n + fast - 1) / fast;
  const int64_t channels = g.by_span ? groups : std::min(n, fast), step = g.by_span ? fast : 1;
  const double count = chunk_count(g, t.chunk);
  if (g.by_span) {
    for (int64_t v = 0; v < n; v += fast) {
      for (int64_t j = 1; j < fast; ++j) s1[v] += s1[v + j], s2[v] += s2[v + j];
    }
  } else {
    for (int64_t v = fast; v < n; v += fast) {
      for (int64_t c = 0; c < channels; ++c) s1[c] += s1[v + c], s2[c] += s2[v + c];
    }
  }
  const int64_t c0 = g.by_span ? t.v0 / fast : t.v0;
  bool any = false;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t v = c * step;
    if (unsafe) any |= unsafe[c] = !float_sums_are_safe(count, s1[v], s2[v]);
    if (unsafe ? unsafe[c] : redo && !redo[c]) continue;
    partials.store(t.chunk, c0 + c, from_shifted_sums<double>(count, shift[v], s1[v], s2[v]));
  }
  return any;
}

// Columns [v0, v0 + n) of rows [r0, r1) in double, which holds whatever the values are; `redo` as in store_columns.
template <class T>
inline void columns_chunk_double(const Geometry& g, const Reader<T>& x, const ColumnTask& t, const Partials& partials,
                                 const bool* redo = nullptr) {
  alignas(64) double shift[kBlockColumns], s1[kBlockColumns] = {}, s2[kBlockColumns] = {};
  T buffer[kRowGroup * kBlockColumns], fill[kBlockColumns];
  if (g.masked()) {
    span_shifts(g, x, t, 1, buffer, fill);
    for (int64_t v = 0; v < t.n; ++v) shift[v] = to_double(fill[v]);
  } else {
    const T* first = x.row(t.r0, t.v0, t.n, buffer);
    for (int64_t v = 0; v < t.n; ++v) {
      const int64_t lead = lead_column(g, v);
      shift[v] = lead == v ? finite_or_zero(load_one<T>(first + v)) : shift[lead];
    }
  }
  std::fill(shift + t.n, shift + padded_size(t.n), 0.0);
  const Filled<T> filled{x, g.masked() ? fill : nullptr};
  for_row_groups<kRowGroup>(filled, t.r0, t.r1, t.v0, t.n, buffer, [&](auto count, int64_t, const T* const* rows) {
    accumulate_rows<T, decltype(count)::value>(rows, t.n, shift, s1, s2);
  });
  store_columns(g, t, shift, s1, s2, partials, redo, nullptr);
}

// Several sums over runs; independent accumulators (ways: 2 or 4) of each hide the adder's latency.
template <int kSums = 2, int kWays = 4>
struct RunSums {
  VecD s[kSums][kWays] = {};
  double total(int i) const {
    if constexpr (kWays == 2) return sum_lanes(s[i][0] + s[i][1]);
    return sum_lanes((s[i][0] + s[i][1]) + (s[i][2] + s[i][3]));
  }
};

// step(i, tail, u) for every vector of a run, u being its accumulator: always a constant, so that all stay in
// registers.
template <int kLanes, class Step>
inline void for_run(int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    step(i, std::false_type(), 0);
    step(i + kLanes, std::false_type(), 1);
    step(i + 2 * kLanes, std::false_type(), 2);
    step(i + 3 * kLanes, std::false_type(), 3);
  }
  for (; i + kLanes <= n; i += kLanes) step(i, std::false_type(), 0);
  if (i < n) step(i, std::true_type(), 1);
}

template <class T>
inline void accumulate_run(const T* p, int64_t n, T fill, VecD k, RunSums<>* total) {
  RunSums<> sums = *total;
  for_run<kLanesD>(n, [&](int64_t i, auto tail, int u) __attribute__((always_inline)) {
    T buffer[kLanesD];
    const VecD d = load_double(tail ? padded<kLanesD>(p + i, n - i, fill, buffer) : p + i) - k;
    sums.s[0][u] += d;
    sums.s[1][u] += d * d;
  });
  *total = sums;
}

// Chunk of one channel in the planes layout, in double.
template <class T>
inline void planes_chunk_double(const Geometry& g, const Reader<T>& x, int64_t chunk, int64_t c,
                                const Partials& partials) {
  const PlaneChunk p = plane_chunk(g, chunk);
  T buffer[kGather];
  // The shift also fills the last vector's unused lanes, where it must give a difference of exactly zero.
  const Ragged::Run head = g.run(p.o0, p.i0, p.n);
  const T first = load_one<T>(x.run(head.outer, c, head.begin, 1, buffer));
  const bool finite = is_finite(to_double(first));
  const T fill = finite ? first : T();
  const double shift = finite ? to_double(first) : 0.0;
  const VecD k = broadcast<VecD>(shift);
  RunSums<> sums;
  const int64_t step = x.direct() ? p.n : kGather;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    const Ragged::Run run = g.run(o, p.i0, p.n);
    for (int64_t i = 0; i < run.length; i += step) {
      const int64_t n = std::min(step, run.length - i);
      accumulate_run(x.run(run.outer, c, run.begin + i, n, buffer), n, fill, k, &sums);
    }
  }
  partials.store(chunk, c, from_shifted_sums(chunk_count(g, chunk), shift, sums.total(0), sums.total(1)));
}

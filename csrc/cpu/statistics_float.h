// Moments of a chunk in float arithmetic, flushed to double every few values: half the work of statistics.h, for
// float32 and 16-bit tensors. Included inside the level's namespace.
//
// The shift is the mean of the chunk's first values. Where it turns out to be far from the chunk's mean (an outlier
// among them), or a sum of squares left float's safe range, the chunk is done again in double.

constexpr int64_t kFlush = 16;  // values that a float sum holds before it is added to a double one
constexpr int64_t kShiftRows = 8;

using VecF = Vec<float, kLanesF>;
using HalfF = Vec<float, kLanesD>;

// The two halves of v, widened.
inline void add_widened(VecF v, VecD* low, VecD* high) {
  HalfF half[2];
  __builtin_memcpy(half, &v, sizeof v);
  *low += __builtin_convertvector(half[0], VecD);
  *high += __builtin_convertvector(half[1], VecD);
}

// total += sums, sums = 0, over n columns.
inline void flush_columns(int64_t n, float* sums, double* total) {
  for (int64_t v = 0; v < n; v += kLanesF) {
    VecD low = load_raw<VecD>(total + v), high = load_raw<VecD>(total + v + kLanesD);
    add_widened(load_raw<VecF>(sums + v), &low, &high);
    store_raw(total + v, low);
    store_raw(total + v + kLanesD, high);
    store_raw(sums + v, VecF{});
  }
}

struct AllCounts {};  // in the place of Patterns

// The pack at `at` of row j, what does not count as zero.
template <class V>
inline V kept(const AllCounts&, int, int64_t, V value) {
  return value;
}
template <class V, int kRows>
__attribute__((always_inline)) inline V kept(const Patterns<kRows>& patterns, int j, int64_t at, V value) {
  return keep_lanes(patterns[j] + at, value);
}

// Rows side by side are summed before they are added to f1 and f2.
template <class T, int kRows, class Counts>
inline void accumulate_rows_float(const T* const* rows, int64_t n, const float* shift, float* f1, float* f2,
                                  const Counts& counts) {
  for_vectors<kLanesF>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer[kLanesF];
    const VecF k = load_raw<VecF>(shift + v);
    const auto difference = [&](int j) __attribute__((always_inline)) {
      return kept(counts, j, v,
                  widen<kLanesF>(tail ? padded<kLanesF>(rows[j] + v, n - v, T(), buffer) : rows[j] + v) - k);
    };
    VecF a = difference(0), b = a * a;
    for (int j = 1; j < kRows; ++j) {
      const VecF d = difference(j);
      a += d;
      b += d * d;
    }
    store_raw(f1 + v, load_raw<VecF>(f1 + v) + a);
    store_raw(f2 + v, load_raw<VecF>(f2 + v) + b);
  });
}

// Mean of the first rows of each column's channel, as x0 + mean(x - x0) so that a large x0 costs no digits.
template <class T>
inline void column_shifts(const Geometry& g, const Reader<T>& x, const ColumnTask& t, T* buffer, float* shift) {
  static_assert(kShiftRows <= kRowGroup, "the buffer holds a row group");
  const int64_t count = std::min(kShiftRows, t.r1 - t.r0);
  const T* rows[kShiftRows];
  for (int64_t j = 0; j < count; ++j) rows[j] = x.row(t.r0 + j, t.v0, t.n, buffer + j * kBlockColumns);
  const float scale = 1.0f / static_cast<float>(count);
  for_vectors<kLanesF>(t.n, [&](int64_t v, auto tail) {
    T end[kLanesF];
    const auto load = [&](int64_t j) {
      return widen<kLanesF>(tail ? padded<kLanesF>(rows[j] + v, t.n - v, T(), end) : rows[j] + v);
    };
    const VecF base = load(0);
    VecF sum{};
    for (int64_t j = 1; j < count; ++j) sum += load(j) - base;
    const VecF mean = base + sum * scale;
    store_raw(shift + v, mean - mean == VecF{} ? mean : VecF{});  // zero where it is not finite
  });
  if (t.n <= g.fast() && !g.by_span) return;
  for (int64_t v = 0; v < t.n; ++v) shift[v] = shift[lead_column(g, v)];
}

// The sums of a task's rows into s1 and s2. counts(number of rows, first row): what of them counts.
template <class T, class Counts>
__attribute__((always_inline)) inline void sum_rows_float(const Geometry& g, const Reader<T>& x, const ColumnTask& t,
                                                          const float* shift, T* buffer, float* f1, float* f2,
                                                          double* s1, double* s2, const Counts& counts) {
  const int64_t size = padded_size(t.n);
  const bool stream = streams(g, sizeof(T));
  const int64_t batch = stream ? kFlush : kFlush * kRowGroup;
  for (int64_t r = t.r0; r < t.r1; r += batch) {
    const int64_t end = std::min(r + batch, t.r1);
    const auto body = [&](auto count, int64_t first, const T* const* rows) {
      accumulate_rows_float<T, decltype(count)::value>(rows, t.n, shift, f1, f2, counts(count, first));
    };
    if (stream) {
      for_row_groups<1>(Whole<T>{x}, r, end, t.v0, t.n, buffer, body);
    } else {
      for_row_groups<kRowGroup>(Whole<T>{x}, r, end, t.v0, t.n, buffer, body);
    }
    flush_columns(size, f1, s1);
    flush_columns(size, f2, s2);
  }
}
// Of rows that hold padding; apart, for the sake of the registers of the ones without.
template <class T>
[[gnu::noinline]] void sum_masked_rows_float(const Geometry& g, const Reader<T>& x, const ColumnTask& t,
                                             const float* shift, T* buffer, float* f1, float* f2, double* s1,
                                             double* s2) {
  sum_rows_float(g, x, t, shift, buffer, f1, f2, s1, s2,
                 [&](auto count, int64_t first) { return Patterns<decltype(count)::value>(g, first); });
}

template <class T>
inline void columns_chunk_float(const Geometry& g, const Reader<T>& x, const ColumnTask& t, const Partials& partials) {
  alignas(64) float shift[kBlockColumns], f1[kBlockColumns], f2[kBlockColumns];
  alignas(64) double s1[kBlockColumns], s2[kBlockColumns];
  T buffer[kRowGroup * kBlockColumns];
  const int64_t size = padded_size(t.n);
  for (float* f : {f1, f2}) std::fill(f, f + size, 0.0f);
  for (double* s : {s1, s2}) std::fill(s, s + size, 0.0);
  if (g.masked()) {
    T fill[kBlockColumns];
    span_shifts(g, x, t, kShiftRows, buffer, fill);
    for (int64_t v = 0; v < t.n; ++v) shift[v] = static_cast<float>(to_double(fill[v]));
    std::fill(shift + t.n, shift + size, 0.0f);
  } else {
    column_shifts(g, x, t, buffer, shift);
  }
  if (g.masked()) {
    sum_masked_rows_float(g, x, t, shift, buffer, f1, f2, s1, s2);
  } else {
    sum_rows_float(g, x, t, shift, buffer, f1, f2, s1, s2, [](auto, int64_t) { return AllCounts(); });
  }
  bool unsafe[kBlockColumns];
  const bool any = store_columns(g, t, shift, s1, s2, partials, nullptr, unsafe);
  if (any) columns_chunk_double(g, x, t, partials, unsafe);
}

// Sums of a channel over runs: float vectors, and double ones that they are flushed to.
template <int kCount>
struct FloatRunSums {
  VecF f[kCount] = {};
  VecD d[kCount] = {};

  void flush() {
    for (int i = 0; i < kCount; ++i) {
      add_widened(f[i], &d[i], &d[i]);
      f[i] = VecF{};
    }
  }
  // What the accumulators of one piece of a run hold, two or four for each sum.
  template <int kWays>
  void add(const VecF (&of_piece)[kCount][kWays]) {
    for (int i = 0; i < kCount; ++i) {
      const VecF* a = of_piece[i];
      f[i] += kWays == 2 ? a[0] + a[1] : (a[0] + a[1]) + (a[kWays - 2] + a[kWays - 1]);
    }
  }
  double total(int i) const { return sum_lanes(d[i]); }
};

// A piece of a run: kFlush of what one step of the loop takes for each accumulator.
constexpr int64_t run_piece(int64_t step, int ways) { return kFlush * ways * step; }

// The channels whose runs of one chunk are summed side by side, since they follow each other in memory. Which ones are
// together does not change a channel's sums.
constexpr int64_t kPlaneGroup = 32;
inline int64_t plane_group(const Geometry& g, int64_t channels, const Parallel& par) {
  if (g.strides[0].channel > g.strides[0].outer) return 1;
  const int64_t busy = (channels * g.chunks() + 4 * par.threads - 1) / (4 * par.threads);
  return std::max<int64_t>(1, std::min({kPlaneGroup, g.chunk_outer(), busy}));
}

// body(chunk, c0, c1) for all chunks of channels [c0, c1), in groups of channels.
template <class Body>
inline void for_plane_groups(const Geometry& g, int64_t c0, int64_t c1, const Parallel& par, const Body& body) {
  const int64_t group = plane_group(g, c1 - c0, par), groups = (c1 - c0 + group - 1) / group;
  parallel_for(par, g.chunks() * groups, group * g.run_length() * g.chunk_outer(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = c0 + task % groups * group;
      body(task / groups, first, std::min(first + group, c1));
    }
  });
}

// add(o, c, i, n, sums of c) for the runs of a chunk, in pieces of up to `step`, each one addition to the float sums,
// which are flushed in time; all of them at the end.
template <class Sums, class Add>
inline void for_chunk_runs(const Geometry& g, const PlaneChunk& p, int64_t c0, int64_t c1, int64_t step, Sums* sums,
                           const Add& add) {
  const auto flush = [&] {
    for (int64_t c = c0; c < c1; ++c) sums[c - c0].flush();
  };
  const Ragged* const ragged = g.ragged;
  int64_t pending = 0;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    int64_t outer = o, begin = p.i0, length = p.n;
    if (ragged) outer = ragged->run(o).outer, begin = ragged->run(o).begin, length = ragged->run(o).length;
    const int64_t of_run = (length + step - 1) / step;
    if (pending > 0 && pending + of_run > kFlush) flush(), pending = 0;
    pending += of_run;
    for (int64_t c = c0; c < c1; ++c) {
      for (int64_t i = 0; i < length; i += step) {
        add(outer, c, begin + i, std::min(step, length - i), &sums[c - c0]);
      }
    }
  }
  flush();
}

template <class T>
inline void accumulate_run_float(const T* p, int64_t n, float shift, FloatRunSums<2>* sums) {
  const VecF k = VecF{} + shift;
  VecF acc[2][4] = {};
  for_run<kLanesF>(n, [&](int64_t i, auto tail, int u) __attribute__((always_inline)) {
    T buffer[kLanesF];
    VecF d = widen<kLanesF>(tail ? padded<kLanesF>(p + i, n - i, T(), buffer) : p + i) - k;
    if (tail) d = first_lanes(d, n - i);
    acc[0][u] += d;
    acc[1][u] += d * d;
  });
  sums->add(acc);
}

// Mean of a chunk's first values of a channel, as x0 + mean(x - x0); zero where it is not finite.
template <class T>
inline float plane_shift(const Geometry& g, const Reader<T>& x, const PlaneChunk& p, int64_t c) {
  T buffer[kShiftRows];
  const Ragged::Run head = g.run(p.o0, p.i0, p.n);
  const int64_t few = std::min(kShiftRows, head.length);
  if (few < 1) __builtin_unreachable();  // a chunk has values
  const T* first = x.run(head.outer, c, head.begin, few, buffer);
  const float base = static_cast<float>(to_double(load_one<T>(first)));
  float sum = 0;
  for (int64_t i = 0; i < few; ++i) sum += static_cast<float>(to_double(load_one<T>(first + i))) - base;
  const float shift = base + sum / static_cast<float>(few);
  return is_finite(shift) ? shift : 0;
}

template <class T>
inline void planes_chunk_float(const Geometry& g, const Reader<T>& x, int64_t chunk, int64_t c0, int64_t c1,
                               const Partials& partials) {
  const PlaneChunk p = plane_chunk(g, chunk);
  T buffer[kGather];
  float shift[kPlaneGroup];
  FloatRunSums<2> sums[kPlaneGroup];
  for (int64_t c = c0; c < c1; ++c) shift[c - c0] = plane_shift(g, x, p, c);
  constexpr int64_t kPiece = run_piece(kLanesF, 4);
  const int64_t step = x.direct() ? kPiece : std::min(kGather, kPiece);
  const auto add = [&](int64_t o, int64_t c, int64_t i, int64_t n, FloatRunSums<2>* of_channel) {
    accumulate_run_float(x.run(o, c, i, n, buffer), n, shift[c - c0], of_channel);
  };
  for_chunk_runs(g, p, c0, c1, step, sums, add);
  const double count = chunk_count(g, chunk);
  for (int64_t c = c0; c < c1; ++c) {
    const double s1 = sums[c - c0].total(0), s2 = sums[c - c0].total(1);
    if (float_sums_are_safe(count, s1, s2)) {
      partials.store(chunk, c, from_shifted_sums<double>(count, shift[c - c0], s1, s2));
    } else {
      planes_chunk_double(g, x, chunk, c, partials);
    }
  }
}

template <class T>
inline void statistics_columns(const Geometry& g, const Reader<T>& x, const Partials& partials, const Parallel& par) {
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const ColumnTask t = column_task(g, task);
      if constexpr (sizeof(T) < sizeof(double)) {
        columns_chunk_float(g, x, t, partials);
      } else {
        columns_chunk_double(g, x, t, partials);
      }
    }
  });
}

// All chunks of channels [c0, c1).
template <class T>
inline void statistics_planes(const Geometry& g, const Reader<T>& x, const Partials& partials, int64_t c0, int64_t c1,
                              const Parallel& par) {
  for_plane_groups(g, c0, c1, par, [&](int64_t chunk, int64_t first, int64_t last) {
    if constexpr (sizeof(T) < sizeof(double)) {
      planes_chunk_float(g, x, chunk, first, last, partials);
    } else {
      for (int64_t c = first; c < last; ++c) planes_chunk_double(g, x, chunk, c, partials);
    }
  });
}

// The moments of all chunks of channels [c0, c1), which are all of them where columns are taken.
template <class T>
inline void statistics(const Geometry& g, const Reader<T>& x, const Partials& partials, int64_t c0, int64_t c1,
                       const Parallel& par) {
  g.columns ? statistics_columns(g, x, partials, par) : statistics_planes(g, x, partials, c0, c1, par);
}

// Merges the chunks of channels [c0, c1) in their order.
inline void merge_chunks(const Geometry& g, const Partials& partials, int64_t c0, int64_t c1) {
  double* hi = partials.row(0, 0);
  double* lo = partials.row(0, 1);
  double* m2 = partials.row(0, 2);
  double count = chunk_count(g, 0);
  for (int64_t chunk = 1; chunk < g.chunks(); ++chunk) {
    const double more = chunk_count(g, chunk);
    const double *hi_b = partials.row(chunk, 0), *lo_b = partials.row(chunk, 1), *m2_b = partials.row(chunk, 2);
    for (int64_t c = c0; c < c1; ++c) {
      const Moments<double> m = merge<double>({count, hi[c], lo[c], m2[c]}, {more, hi_b[c], lo_b[c], m2_b[c]});
      hi[c] = m.mean_hi;
      lo[c] = m.mean_lo;
      m2[c] = m.m2;
    }
    count += more;
  }
}

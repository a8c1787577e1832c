// The reductions of backward and of its derivatives in double, over rows and runs of two or three sources: dy, x and,
// for second derivatives, gg, the gradient that arrived at dx. Included inside the level's namespace.

// sum(dy), sum(dy * (x - mean)); with gg those of double_formulas.h.
template <int kInputs>
constexpr int kSums = kInputs == 2 ? 2 : kDoubleSums;

// What a position adds to the sums, of dy, x - mean and gg.
template <int kInputs, class V>
inline void gradient_terms(const V* in, V* term) {
  if constexpr (kInputs == 3) return double_terms(in, term);
  term[0] = in[0];
  term[1] = in[0] * in[1];
}

// Sums of every chunk: [chunk][kCount][channels] doubles.
template <int kCount>
struct ChunkSums {
  double* data;
  int64_t channels;
  double* row(int64_t chunk, int which) const { return data + (chunk * kCount + which) * channels; }
};

// What x is centred by, per channel: the mean rounded to double, and what the rounding left (float64 tensors only).
using Means = Coefficients<double, 2>;

// x - mean in double. In float the difference would carry one rounding error for all x of a binade, and so a bias that
// sum(dy * (x - mean)) adds up wherever dy has a mean.
template <class T>
inline VecD centre(VecD x, VecD mean, VecD rest) {
  const VecD d = x - mean;
  if constexpr (sizeof(T) == sizeof(double)) return d - rest;
  return d;
}

// dy of a task's rows, one after the other: rows(r, x of row r, buffer).
template <class Dy>
struct RowsOf {
  using type = typename Dy::Rows;
};
template <class T>
struct RowsOf<Reader<T>> {
  struct type {
    const Reader<T>& dy;
    const ColumnTask& t;
    type(const Reader<T>& source, const ColumnTask& task, bool = false) : dy(source), t(task) {}
    const T* operator()(int64_t r, const T*, T* buffer) const { return dy.next_row(r, t.v0, t.n, buffer); }
  };
};

// `kRows` rows of all sources from r on; `rows`: those of dy.
template <int kRows, class T, int kInputs, class Dy, class Rows, class Memory>
inline auto pieces_of_rows(const Sources<T, kInputs, Dy>& in, const Rows& rows, const ColumnTask& t, int64_t r,
                           Memory& buffers) {
  Pieces<T, kInputs, decltype(rows(r, nullptr, buffers.dy)), kRows> of;
  for (int k = 0; k + 1 < kInputs; ++k) {
    for (int j = 0; j < kRows; ++j) {
      of.rest[k][j] = in.rest[k].next_row(r + j, t.v0, t.n, buffers.rest[k] + j * kBlockColumns);
    }
  }
  for (int j = 0; j < kRows; ++j) of.dy[j] = rows(r + j, of.rest[0][j], buffers.dy + j * kBlockColumns);
  return of;
}
// A piece of a run of all sources.
template <class T, int kInputs, class Dy, class Memory>
inline auto pieces_of_run(const Sources<T, kInputs, Dy>& in, int64_t o, int64_t c, int64_t i, int64_t n,
                          Memory& buffers, bool in_order) {
  Pieces<T, kInputs, decltype(in.dy.run(o, c, i, n, nullptr, buffers.dy, in_order))> of;
  for (int k = 0; k + 1 < kInputs; ++k) of.rest[k][0] = in.rest[k].run(o, c, i, n, buffers.rest[k]);
  of.dy[0] = in.dy.run(o, c, i, n, of.rest[0][0], buffers.dy, in_order);
  return of;
}

template <class T, int kInputs, class Dy>
using RowBuffers = Buffers<T, kInputs, Dy, kGradientRowGroup * kBlockColumns>;

// body(pieces) over the rows of a task, in groups; single ones past the caches, see kStreamBytes.
template <class T, int kInputs, class Dy, class Rows, class Body>
inline void for_gradient_rows(const Geometry& g, const Sources<T, kInputs, Dy>& in, const Rows& rows,
                              const ColumnTask& t, int64_t r0, int64_t r1, RowBuffers<T, kInputs, Dy>& buffers,
                              const Body& body) {
  int64_t r = r0;
  const auto group = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    body(pieces_of_rows<kRows>(in, rows, t, r, buffers));
    r += kRows;
  };
  if (!streams(g, sizeof(T))) {
    while (r + kGradientRowGroup <= r1) group(std::integral_constant<int, kGradientRowGroup>());
  }
  while (r < r1) group(std::integral_constant<int, 1>());
}

// Elements from p + at on in double, and of a tail nothing behind its end.
template <class E, class Tail>
inline __attribute__((always_inline)) VecD load_double_at(const E* p, int64_t at, int64_t left, Tail tail) {
  E buffer[kLanesD];
  return load_double(tail ? padded<kLanesD>(p + at, left, E(), buffer) : p + at);
}

template <class T, int kInputs, class G, int kRows>
inline void accumulate_gradient_rows(const Pieces<T, kInputs, const G*, kRows>& rows, int64_t n,
                                     const double* const* mean, double (*sum)[kBlockColumns]) {
  constexpr int kCount = kSums<kInputs>;
  for_vectors<kLanesD>(n, [&](int64_t v, auto tail) {
    double buffer_mean[kLanesD], buffer_rest[kLanesD];
    const int64_t left = n - v;
    const auto m = load_raw<VecD>(tail ? padded<kLanesD>(mean[0] + v, left, 0.0, buffer_mean) : mean[0] + v);
    const auto rest = load_raw<VecD>(tail ? padded<kLanesD>(mean[1] + v, left, 0.0, buffer_rest) : mean[1] + v);
    VecD total[kCount];
    for (int i = 0; i < kCount; ++i) total[i] = load_raw<VecD>(sum[i] + v);
    for (int j = 0; j < kRows; ++j) {
      VecD in[kInputs], term[kCount];
      in[0] = load_double_at(rows.dy[j], v, left, tail);
      for (int k = 1; k < kInputs; ++k) in[k] = load_double_at(rows.rest[k - 1][j], v, left, tail);
      in[1] = centre<T>(in[1], m, rest);
      gradient_terms<kInputs>(in, term);
      for (int i = 0; i < kCount; ++i) total[i] += term[i];
    }
    for (int i = 0; i < kCount; ++i) store_raw(sum[i] + v, total[i]);
  });
}

// Sums of a task's columns -> sums of their channels, for the channels that `redo` marks (all if null). correct(c,
// sums) puts the sums right that are stored. With `unsafe` given, channels whose sums are not finite are marked there
// instead of being stored; returns whether there was one.
template <int kCount, class Correct>
inline bool store_gradient_columns(const Geometry& g, const ColumnTask& t, double (*sum)[kBlockColumns],
                                   const ChunkSums<kCount>& sums, const bool* redo, bool* unsafe,
                                   const Correct& correct) {
  const int64_t n = t.n, fast = g.fast(), step = g.by_span ? fast : 1;
  const int64_t channels = g.by_span ? n / fast : std::min(n, fast), c0 = g.by_span ? t.v0 / fast : t.v0;
  for (int i = 0; i < kCount; ++i) {
    double* s = sum[i];
    if (g.by_span) {
      for (int64_t v = 0; v < n; v += fast) {
        for (int64_t j = 1; j < fast; ++j) s[v] += s[v + j];
      }
    } else {
      for (int64_t v = fast; v < n; v += fast) {
        for (int64_t c = 0; c < channels; ++c) s[c] += s[v + c];
      }
    }
  }
  bool any = false;
  for (int64_t c = 0; c < channels; ++c) {
    double of_channel[kCount];
    bool finite = true;
    for (int i = 0; i < kCount; ++i) {
      of_channel[i] = sum[i][c * step];
      finite &= is_finite(of_channel[i]);
    }
    if (unsafe) any |= unsafe[c] = !finite;
    if (unsafe ? unsafe[c] : redo && !redo[c]) continue;
    correct(c0 + c, of_channel);
    for (int i = 0; i < kCount; ++i) sums.row(t.chunk, i)[c0 + c] = of_channel[i];
  }
  return any;
}

// Columns of a task in double, which holds whatever the values are; `redo` as in store_gradient_columns.
template <class T, int kInputs, class Dy>
inline void gradient_columns_double(const Geometry& g, const Sources<T, kInputs, Dy>& in, const ColumnTask& t,
                                    const Means& means, const ChunkSums<kSums<kInputs>>& sums,
                                    const bool* redo = nullptr) {
  alignas(64) double sum[kSums<kInputs>][kBlockColumns];
  alignas(64) double expanded[2 * kBlockColumns];
  RowBuffers<T, kInputs, Dy> buffers;
  const typename RowsOf<Dy>::type of_dy(in.dy, t, true);
  const double* mean[2];
  means.expand(g, t.v0, t.n, expanded, mean);
  for (double* s : sum) std::fill(s, s + padded_size(t.n), 0.0);
  for_gradient_rows(g, in, of_dy, t, t.r0, t.r1, buffers,
                    [&](const auto& rows) { accumulate_gradient_rows(rows, t.n, mean, sum); });
  store_gradient_columns(g, t, sum, sums, redo, nullptr, [](int64_t, double*) {});
}

// body(n, pieces) over the pieces of a chunk of one channel.
template <class T, int kInputs, class Dy, class Body>
inline void for_gradient_runs(const Geometry& g, const Sources<T, kInputs, Dy>& in, const PlaneChunk& p, int64_t c,
                              const Body& body) {
  Buffers<T, kInputs, Dy, kGather> buffers;
  const int64_t step = in.direct() ? p.n : kGather;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    const Ragged::Run run = g.run(o, p.i0, p.n);
    for (int64_t i = 0; i < run.length; i += step) {
      const int64_t n = std::min(step, run.length - i);
      body(n, pieces_of_run(in, run.outer, c, run.begin + i, n, buffers, true));
    }
  }
}

// Accumulators of each sum: as many as registers hold.
template <int kInputs>
constexpr int kWays = kInputs == 2 ? 4 : 2;

template <class T, int kInputs, class Dy>
inline void gradient_planes_double(const Geometry& g, const Sources<T, kInputs, Dy>& in, int64_t chunk, int64_t c,
                                   const Means& means, const ChunkSums<kSums<kInputs>>& sums) {
  constexpr int kCount = kSums<kInputs>;
  const VecD mean = broadcast<VecD>(means.row(0)[c]), rest = broadcast<VecD>(means.row(1)[c]);
  RunSums<kCount, kWays<kInputs>> acc;
  for_gradient_runs(g, in, plane_chunk(g, chunk), c, [&](int64_t n, const auto& from) {
    for_run<kLanesD>(n, [&](int64_t j, auto tail, int u) __attribute__((always_inline)) {
      VecD at[kInputs], term[kCount];
      at[0] = load_double_at(from.dy[0], j, n - j, tail);
      for (int k = 1; k < kInputs; ++k) at[k] = load_double_at(from.rest[k - 1][0], j, n - j, tail);
      at[1] = centre<T>(at[1], mean, rest);
      gradient_terms<kInputs>(at, term);
      for (int i = 0; i < kCount; ++i) acc.s[i][u % kWays<kInputs>] += term[i];
    });
  });
  for (int i = 0; i < kCount; ++i) sums.row(chunk, i)[c] = acc.total(i);
}

// Adds the chunks of channels [c0, c1) in their order, into chunk 0.
template <int kCount>
inline void sum_chunks(const Geometry& g, const ChunkSums<kCount>& sums, int64_t c0, int64_t c1) {
  for (int64_t chunk = 1; chunk < g.chunks(); ++chunk) {
    for (int which = 0; which < kCount; ++which) {
      double* total = sums.row(0, which);
      const double* part = sums.row(chunk, which);
      for (int64_t c = c0; c < c1; ++c) total[c] += part[c];
    }
  }
}

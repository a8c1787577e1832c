// The reductions of backward and of its derivatives in double, over rows and runs of two or three tensors: dy, x and,
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
inline VecD centre(const T* x, VecD mean, VecD rest) {
  const VecD d = load_double(x) - mean;
  if constexpr (sizeof(T) == sizeof(double)) return d - rest;
  return d;
}

// Gathered rows of a group, or pieces of runs.
template <class T, int kInputs>
using RowBuffer = T[kInputs][kGradientRowGroup * kBlockColumns];

// body(rows), rows[input][row of the group], over the rows of a task; single ones past the caches, see kStreamBytes.
template <class T, int kInputs, class Body>
inline void for_gradient_rows(const Geometry& g, const Readers<T, kInputs>& in, const ColumnTask& t, int64_t r0,
                              int64_t r1, RowBuffer<T, kInputs>& buffer, const Body& body) {
  int64_t r = r0;
  const auto group = [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    const T* rows[kInputs][kRows];
    for (int k = 0; k < kInputs; ++k) {
      for (int j = 0; j < kRows; ++j) {
        in[k].fetch_ahead(r + j, t.v0, t.n);
        rows[k][j] = in[k].row(r + j, t.v0, t.n, buffer[k] + j * kBlockColumns);
      }
    }
    body(rows);
    r += kRows;
  };
  if (!streams(g, sizeof(T))) {
    while (r + kGradientRowGroup <= r1) group(std::integral_constant<int, kGradientRowGroup>());
  }
  while (r < r1) group(std::integral_constant<int, 1>());
}

template <class T, int kInputs, int kRows>
inline void accumulate_gradient_rows(const T* const (&rows)[kInputs][kRows], int64_t n, const double* const* mean,
                                     double (*sum)[kBlockColumns]) {
  constexpr int kCount = kSums<kInputs>;
  for_vectors<kLanesD>(n, [&](int64_t v, auto tail) {
    T buffer[kInputs][kLanesD];
    double buffer_mean[kLanesD], buffer_rest[kLanesD];
    const int64_t left = n - v;
    const auto m = load_raw<VecD>(tail ? padded<kLanesD>(mean[0] + v, left, 0.0, buffer_mean) : mean[0] + v);
    const auto rest = load_raw<VecD>(tail ? padded<kLanesD>(mean[1] + v, left, 0.0, buffer_rest) : mean[1] + v);
    VecD total[kCount];
    for (int i = 0; i < kCount; ++i) total[i] = load_raw<VecD>(sum[i] + v);
    for (int j = 0; j < kRows; ++j) {
      VecD in[kInputs], term[kCount];
      for (int k = 0; k < kInputs; ++k) {
        const T* p = tail ? padded<kLanesD>(rows[k][j] + v, left, T(), buffer[k]) : rows[k][j] + v;
        in[k] = k == 1 ? centre(p, m, rest) : load_double(p);
      }
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
template <class T, int kInputs>
inline void gradient_columns_double(const Geometry& g, const Readers<T, kInputs>& in, const ColumnTask& t,
                                    const Means& means, const ChunkSums<kSums<kInputs>>& sums,
                                    const bool* redo = nullptr) {
  alignas(64) double sum[kSums<kInputs>][kBlockColumns];
  alignas(64) double expanded[2 * kBlockColumns];
  RowBuffer<T, kInputs> buffer;
  const double* mean[2];
  means.expand(g, t.v0, t.n, expanded, mean);
  for (double* s : sum) std::fill(s, s + padded_size(t.n), 0.0);
  for_gradient_rows<T, kInputs>(g, in, t, t.r0, t.r1, buffer,
                                [&](const auto& rows) { accumulate_gradient_rows(rows, t.n, mean, sum); });
  store_gradient_columns(g, t, sum, sums, redo, nullptr, [](int64_t, double*) {});
}

// body(n, pointers) over the pieces of a chunk of one channel.
template <class T, int kInputs, class Body>
inline void for_gradient_runs(const Readers<T, kInputs>& in, const PlaneChunk& p, int64_t c, const Body& body) {
  T buffer[kInputs][kGather];
  const int64_t step = all_direct(in) ? p.n : kGather;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    for (int64_t i = 0; i < p.n; i += step) {
      const int64_t n = std::min(step, p.n - i);
      const T* from[kInputs];
      for (int k = 0; k < kInputs; ++k) from[k] = in[k].run(o, c, p.i0 + i, n, buffer[k]);
      body(n, from);
    }
  }
}

// Accumulators of each sum: as many as registers hold.
template <int kInputs>
constexpr int kWays = kInputs == 2 ? 4 : 2;

template <class T, int kInputs>
inline void gradient_planes_double(const Geometry& g, const Readers<T, kInputs>& in, int64_t chunk, int64_t c,
                                   const Means& means, const ChunkSums<kSums<kInputs>>& sums) {
  constexpr int kCount = kSums<kInputs>;
  const VecD mean = broadcast<VecD>(means.row(0)[c]), rest = broadcast<VecD>(means.row(1)[c]);
  RunSums<kCount, kWays<kInputs>> acc;
  for_gradient_runs<T, kInputs>(in, plane_chunk(g, chunk), c, [&](int64_t n, const T* const* from) {
    for_run<kLanesD>(n, [&](int64_t j, auto tail, int u) __attribute__((always_inline)) {
      T buffer[kInputs][kLanesD];
      VecD at[kInputs], term[kCount];
      for (int k = 0; k < kInputs; ++k) {
        const T* p = tail ? padded<kLanesD>(from[k] + j, n - j, T(), buffer[k]) : from[k] + j;
        at[k] = k == 1 ? centre(p, mean, rest) : load_double(p);
      }
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

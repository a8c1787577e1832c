// Backward: the reductions sum(dy), sum(dy * (x - mean)) in double, and dx. Included inside the level's namespace.

// Sums of every chunk: [chunk][2][channels] doubles, the rows being sum(dy) and sum(dy * (x - mean)).
struct GradSums {
  double* data;
  int64_t channels;
  double* row(int64_t chunk, int which) const { return data + (chunk * 2 + which) * channels; }
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

// grad_output of a task's rows. A source of it, `Dy` below, is the Reader of a tensor or an ActivatedGradient.
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
    const T* operator()(int64_t r, const T*, T* buffer) const { return dy.row(r, t.v0, t.n, buffer); }
  };
};

// body(count, rows_dy, rows_x) over groups of rows of a task; single rows past the caches, see kStreamBytes.
template <class T, class Rows, class G, class Body>
inline void for_gradient_rows(const Geometry& g, const Rows& dy, const Reader<T>& x, const ColumnTask& t, int64_t r0,
                              int64_t r1, G* buffer_dy, T* buffer_x, const Body& body) {
  int64_t r = r0;
  const auto pair = [&](auto count, const T* const* rows_x) {
    constexpr int kRows = decltype(count)::value;
    decltype(dy(r, rows_x[0], buffer_dy)) rows_dy[kRows];
    for (int j = 0; j < kRows; ++j) rows_dy[j] = dy(r + j, rows_x[j], buffer_dy + j * kBlockColumns);
    body(count, rows_dy, rows_x);
    r += kRows;
  };
  if (streams(g, sizeof(T))) {
    for_row_groups<1>(x, r0, r1, t.v0, t.n, buffer_x, pair);
  } else {
    for_row_groups<kGradientRowGroup>(x, r0, r1, t.v0, t.n, buffer_x, pair);
  }
}

template <class T, int kRows, class G>
inline void accumulate_gradient_rows(const G* const* dy, const T* const* x, int64_t n, const double* const* mean,
                                     double* sum, double* dot) {
  for_vectors<kLanesD>(n, [&](int64_t v, auto tail) {
    T buffer_x[kLanesD];
    G buffer_dy[kLanesD];
    double buffer_mean[kLanesD], buffer_rest[kLanesD];
    const int64_t left = n - v;
    const auto m = load_raw<VecD>(tail ? padded<kLanesD>(mean[0] + v, left, 0.0, buffer_mean) : mean[0] + v);
    const auto rest = load_raw<VecD>(tail ? padded<kLanesD>(mean[1] + v, left, 0.0, buffer_rest) : mean[1] + v);
    VecD a = load_raw<VecD>(sum + v), b = load_raw<VecD>(dot + v);
    for (int j = 0; j < kRows; ++j) {
      prefetch_ahead(x[j] + v);
      prefetch_ahead(dy[j] + v);
      const T* px = tail ? padded<kLanesD>(x[j] + v, left, T(), buffer_x) : x[j] + v;
      const VecD g = load_double(tail ? padded<kLanesD>(dy[j] + v, left, G(), buffer_dy) : dy[j] + v);
      a += g;
      b += g * centre(px, m, rest);
    }
    store_raw(sum + v, a);
    store_raw(dot + v, b);
  });
}

// Sums of a task's columns -> sums of their channels, for the channels that `redo` marks (all if null). correct(c, sum,
// dot) returns the dot that is stored. With `unsafe` given, channels whose sums are not finite are marked there instead
// of being stored; returns whether there was one.
template <class Correct>
inline bool store_gradient_columns(const Geometry& g, const ColumnTask& t, double* sum, double* dot,
                                   const GradSums& sums, const bool* redo, bool* unsafe, const Correct& correct) {
  const int64_t n = t.n, fast = g.fast(), step = g.by_span ? fast : 1;
  const int64_t channels = g.by_span ? n / fast : std::min(n, fast), c0 = g.by_span ? t.v0 / fast : t.v0;
  if (g.by_span) {
    for (int64_t v = 0; v < n; v += fast) {
      for (int64_t j = 1; j < fast; ++j) sum[v] += sum[v + j], dot[v] += dot[v + j];
    }
  } else {
    for (int64_t v = fast; v < n; v += fast) {
      for (int64_t c = 0; c < channels; ++c) sum[c] += sum[v + c], dot[c] += dot[v + c];
    }
  }
  double *out_sum = sums.row(t.chunk, 0) + c0, *out_dot = sums.row(t.chunk, 1) + c0;
  bool any = false;
  for (int64_t c = 0; c < channels; ++c) {
    const double s = sum[c * step], d = dot[c * step];
    if (unsafe) any |= unsafe[c] = !is_finite(s) || !is_finite(d);
    if (unsafe ? unsafe[c] : redo && !redo[c]) continue;
    out_sum[c] = s;
    out_dot[c] = correct(c0 + c, s, d);
  }
  return any;
}

// Columns of a task in double, which holds whatever the values are; `redo` as in store_gradient_columns.
template <class T, class Dy>
inline void gradient_columns_double(const Geometry& g, const Dy& dy, const Reader<T>& x, const ColumnTask& t,
                                    const Means& means, const GradSums& sums, const bool* redo = nullptr) {
  alignas(64) double sum[kBlockColumns], dot[kBlockColumns];
  alignas(64) double expanded[2 * kBlockColumns];
  alignas(64) typename Dy::Element buffer_dy[kGradientRowGroup * kBlockColumns];
  T buffer_x[kGradientRowGroup * kBlockColumns];
  const typename RowsOf<Dy>::type rows(dy, t, true);
  const double* mean[2];
  means.expand(g, t.v0, t.n, expanded, mean);
  const int64_t size = padded_size(t.n);
  std::fill(sum, sum + size, 0.0);
  std::fill(dot, dot + size, 0.0);
  for_gradient_rows(g, rows, x, t, t.r0, t.r1, buffer_dy, buffer_x,
                    [&](auto count, const auto& rows_dy, const T* const* rows_x) {
                      accumulate_gradient_rows<T, decltype(count)::value>(rows_dy, rows_x, t.n, mean, sum, dot);
                    });
  store_gradient_columns(g, t, sum, dot, sums, redo, nullptr, [](int64_t, double, double d) { return d; });
}

// body(n, pdy, px) over the pieces of a chunk of one channel.
template <class T, class Dy, class Body>
inline void for_gradient_runs(const Dy& dy, const Reader<T>& x, const PlaneChunk& p, int64_t c, bool in_order,
                              const Body& body) {
  alignas(64) typename Dy::Element buffer_dy[kGather];
  T buffer_x[kGather];
  const int64_t step = dy.direct() && x.direct() ? p.n : kGather;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    for (int64_t i = 0; i < p.n; i += step) {
      const int64_t n = std::min(step, p.n - i);
      const T* px = x.run(o, c, p.i0 + i, n, buffer_x);
      body(n, dy.run(o, c, p.i0 + i, n, px, buffer_dy, in_order), px);
    }
  }
}

template <class T, class Dy>
inline void gradient_planes_double(const Geometry& g, const Dy& dy, const Reader<T>& x, int64_t chunk, int64_t c,
                                   const Means& means, const GradSums& sums) {
  const VecD mean = broadcast<VecD>(means.row(0)[c]), rest = broadcast<VecD>(means.row(1)[c]);
  RunSums acc;
  using G = typename Dy::Element;
  for_gradient_runs(dy, x, plane_chunk(g, chunk), c, true, [&](int64_t n, const G* pdy, const T* px) {
    for_run<kLanesD>(n, [&](int64_t j, auto tail, int u) __attribute__((always_inline)) {
      T tail_x[kLanesD];
      G tail_dy[kLanesD];
      prefetch_ahead(px + j);
      prefetch_ahead(pdy + j);
      const T* at_x = tail ? padded<kLanesD>(px + j, n - j, T(), tail_x) : px + j;
      const VecD v = load_double(tail ? padded<kLanesD>(pdy + j, n - j, G(), tail_dy) : pdy + j);
      acc.s1[u] += v;
      acc.s2[u] += v * centre(at_x, mean, rest);
    });
  });
  sums.row(chunk, 0)[c] = acc.total1();
  sums.row(chunk, 1)[c] = acc.total2();
}

// Adds the chunks of channels [c0, c1) in their order, into chunk 0.
inline void sum_chunks(const Geometry& g, const GradSums& sums, int64_t c0, int64_t c1) {
  for (int64_t chunk = 1; chunk < g.chunks(); ++chunk) {
    for (int which = 0; which < 2; ++which) {
      double* total = sums.row(0, which);
      const double* part = sums.row(chunk, which);
      for (int64_t c = c0; c < c1; ++c) total[c] += part[c];
    }
  }
}

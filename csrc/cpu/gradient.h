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

template <class T, int kRows>
inline void accumulate_gradient_rows(const T* const* dy, const T* const* x, int64_t n, const double* const* mean,
                                     double* sum, double* dot) {
  for_vectors<kLanesD>(n, [&](int64_t v, auto tail) {
    T buffer_x[kLanesD], buffer_dy[kLanesD];
    double buffer_mean[kLanesD], buffer_rest[kLanesD];
    const int64_t left = n - v;
    const auto m = load_raw<VecD>(tail ? padded<kLanesD>(mean[0] + v, left, 0.0, buffer_mean) : mean[0] + v);
    const auto rest = load_raw<VecD>(tail ? padded<kLanesD>(mean[1] + v, left, 0.0, buffer_rest) : mean[1] + v);
    VecD a = load_raw<VecD>(sum + v), b = load_raw<VecD>(dot + v);
    for (int j = 0; j < kRows; ++j) {
      prefetch(x[j] + v);
      prefetch(dy[j] + v);
      const T* px = tail ? padded<kLanesD>(x[j] + v, left, T(), buffer_x) : x[j] + v;
      const VecD g = load_double(tail ? padded<kLanesD>(dy[j] + v, left, T(), buffer_dy) : dy[j] + v);
      a += g;
      b += g * centre(px, m, rest);
    }
    store_raw(sum + v, a);
    store_raw(dot + v, b);
  });
}

template <class T>
inline void gradient_columns_chunk(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, const ColumnTask& t,
                                   const Means& means, const GradSums& sums) {
  alignas(64) double sum[kBlockColumns], dot[kBlockColumns];
  alignas(64) double expanded[2 * kBlockColumns];
  T buffer_dy[kGradientRowGroup * kBlockColumns], buffer_x[kGradientRowGroup * kBlockColumns];
  const double* mean[2];
  means.expand(g, t.v0, t.n, expanded, mean);
  const int64_t padded_n = (t.n + kLanesD - 1) / kLanesD * kLanesD;
  std::fill(sum, sum + padded_n, 0.0);
  std::fill(dot, dot + padded_n, 0.0);
  int64_t r = t.r0;
  const auto body = [&](auto count, const T* const* rows) {
    constexpr int kRows = decltype(count)::value;
    const T* rows_dy[kRows];
    for (int j = 0; j < kRows; ++j) rows_dy[j] = dy.row(r + j, t.v0, t.n, buffer_dy + j * kBlockColumns);
    accumulate_gradient_rows<T, kRows>(rows_dy, rows, t.n, mean, sum, dot);
    r += kRows;
  };
  if (g.rows * g.cols * int64_t(sizeof(T)) > kStreamBytes) {
    for_row_groups<1>(x, t.r0, t.r1, t.v0, t.n, buffer_x, body);
  } else {
    for_row_groups<kGradientRowGroup>(x, t.r0, t.r1, t.v0, t.n, buffer_x, body);
  }
  const int64_t fast = g.fast();
  double *out_sum = sums.row(t.chunk, 0), *out_dot = sums.row(t.chunk, 1);
  if (g.by_span) {
    for (int64_t v = 0; v < t.n; v += fast) {
      double a = 0, b = 0;
      for (int64_t j = v; j < v + fast; ++j) a += sum[j], b += dot[j];
      out_sum[(t.v0 + v) / fast] = a;
      out_dot[(t.v0 + v) / fast] = b;
    }
    return;
  }
  const int64_t channels = std::min(t.n, fast);
  for (int64_t v = fast; v < t.n; v += fast) {
    for (int64_t c = 0; c < channels; ++c) sum[c] += sum[v + c], dot[c] += dot[v + c];
  }
  std::copy(sum, sum + channels, out_sum + t.v0);
  std::copy(dot, dot + channels, out_dot + t.v0);
}

template <class T>
inline void gradient_planes_chunk(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, int64_t chunk, int64_t c,
                                  const Means& means, const GradSums& sums) {
  const PlaneChunk p = plane_chunk(g, chunk);
  T buffer_dy[kGather], buffer_x[kGather];
  const VecD mean = broadcast<VecD>(means.row(0)[c]), rest = broadcast<VecD>(means.row(1)[c]);
  RunSums acc;
  const int64_t step = dy.direct() && x.direct() ? p.n : kGather;
  for (int64_t o = p.o0; o < p.o1; ++o) {
    for (int64_t i = 0; i < p.n; i += step) {
      const int64_t n = std::min(step, p.n - i);
      const T* px = x.run(o, c, p.i0 + i, n, buffer_x);
      const T* pdy = dy.run(o, c, p.i0 + i, n, buffer_dy);
      for_run<kLanesD>(n, [&](int64_t j, auto tail, int u) __attribute__((always_inline)) {
        T tail_x[kLanesD], tail_dy[kLanesD];
        prefetch(px + j);
        prefetch(pdy + j);
        const T* at_x = tail ? padded<kLanesD>(px + j, n - j, T(), tail_x) : px + j;
        const VecD v = load_double(tail ? padded<kLanesD>(pdy + j, n - j, T(), tail_dy) : pdy + j);
        acc.s1[u] += v;
        acc.s2[u] += v * centre(at_x, mean, rest);
      });
    }
  }
  sums.row(chunk, 0)[c] = acc.total1();
  sums.row(chunk, 1)[c] = acc.total2();
}

template <class T>
inline void reduce_columns(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, const Means& means,
                           const GradSums& sums, const Parallel& par) {
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) gradient_columns_chunk(g, dy, x, column_task(g, task), means, sums);
  });
}

template <class T>
inline void reduce_planes(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, const Means& means,
                          const GradSums& sums, int64_t c0, int64_t c1, const Parallel& par) {
  const int64_t chunks = g.chunks();
  parallel_for(par, (c1 - c0) * chunks, g.run_length() * g.chunk_outer(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      gradient_planes_chunk(g, dy, x, task % chunks, c0 + task / chunks, means, sums);
    }
  });
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

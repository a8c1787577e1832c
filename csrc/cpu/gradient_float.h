// Backward's reductions in float arithmetic, flushed to double every kFlush values: half the work of gradient.h, for
// float32 and 16-bit tensors. Included inside the level's namespace.
//
// x is centred by formulas.h's coarse shift; what the shift leaves of the mean is taken off the sum in double. A chunk
// whose sums left float's range is done again in double, channel by channel.

// What the reductions know of the channels. `shift` and `rest` (mean - shift) are for float sums, `means` for double.
template <class T>
struct Centres {
  Means means;
  Coefficients<Scalar<T>, 1> shift;
  const double* rest;
};

// Float sums take at most kFlush addends before they are added to double ones. Where these are themselves sums of four
// rows, or of two vectors of a run, made pairwise, they add next to no error.
template <class T, int kRows, class Row>
inline void accumulate_gradient_rows_float(const Row* dy, const T* const* x, int64_t n, const float* shift,
                                           int64_t ahead, float* sum, float* dot) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  for_vectors<kN>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    if (kRows == 1) prefetch_gradient<T>(dy[0], v + ahead), prefetch(x[0] + v + ahead);
    VecF k[kVectors], s[kVectors] = {}, d[kVectors] = {};
    for (int u = 0; u < kVectors; ++u) k[u] = load_raw<VecF>(shift + v + u * kLanesF);
    const auto load = [&](const T* from, VecF* to) __attribute__((always_inline)) {
      T buffer[kN];
      load_pack(tail ? padded<kN>(from + v, n - v, T(), buffer) : from + v, to);
    };
    for (int j = 0; j < kRows; j += 2) {
      const bool two = j + 1 < kRows;
      VecF vdy[kVectors], vx[kVectors], more_dy[kVectors], more_x[kVectors];
      load(x[j], vx);
      load_gradient<T>(dy[j], v, n, tail, vx, vdy);
      if (two) {
        load(x[j + 1], more_x);
        load_gradient<T>(dy[j + 1], v, n, tail, more_x, more_dy);
      }
      for (int u = 0; u < kVectors; ++u) {
        VecF product = vdy[u] * (vx[u] - k[u]), sum_dy = vdy[u];
        if (two) product += more_dy[u] * (more_x[u] - k[u]), sum_dy += more_dy[u];
        s[u] = j == 0 ? sum_dy : s[u] + sum_dy;
        d[u] = j == 0 ? product : d[u] + product;
      }
    }
    for (int u = 0; u < kVectors; ++u) {
      float *to_sum = sum + v + u * kLanesF, *to_dot = dot + v + u * kLanesF;
      store_raw(to_sum, load_raw<VecF>(to_sum) + s[u]);
      store_raw(to_dot, load_raw<VecF>(to_dot) + d[u]);
    }
  });
}

template <class T, class Dy>
inline void gradient_columns_float(const Geometry& g, const Dy& dy, const Reader<T>& x, const ColumnTask& t,
                                   const Centres<T>& centres, const GradSums& sums) {
  alignas(64) float shift[kBlockColumns], f1[kBlockColumns], f2[kBlockColumns];
  alignas(64) double sum[kBlockColumns], dot[kBlockColumns], in_order[kBlockColumns];
  alignas(64) typename Dy::Element buffer_dy[kGradientRowGroup * kBlockColumns];
  T buffer_x[kGradientRowGroup * kBlockColumns];
  const typename RowsOf<Dy>::type rows(dy, t);
  const int64_t size = packed_size<T>(t.n);
  for (float* f : {f1, f2}) std::fill(f, f + size, 0.0f);
  for (double* s : {sum, dot}) std::fill(s, s + size, 0.0);
  const float* k[1];
  centres.shift.template expand_packs<T>(g, t.v0, t.n, shift, k);
  const bool stream = streams(g, sizeof(T));
  const int64_t batch = stream ? kFlush : kFlush * kGradientRowGroup;
  const int64_t ahead = elements_ahead(g, sizeof(T), t.n);
  for (int64_t r = t.r0; r < t.r1; r += batch) {
    for_gradient_rows(g, rows, x, t, r, std::min(r + batch, t.r1), buffer_dy, buffer_x,
                      [&](auto count, const auto& rows_dy, const T* const* rows_x) {
                        constexpr int kRows = decltype(count)::value;
                        accumulate_gradient_rows_float<T, kRows>(rows_dy, rows_x, t.n, k[0], ahead, f1, f2);
                      });
    flush_columns(size, f1, sum);
    flush_columns(size, f2, dot);
  }
  if constexpr (kPackVectors<T> > 1) {
    for (double* s : {sum, dot}) {
      from_packs<T>(s, t.n, in_order);
      std::copy(in_order, in_order + t.n, s);
    }
  }
  bool unsafe[kBlockColumns];
  const auto correct = [&](int64_t c, double s, double d) { return d - centres.rest[c] * s; };
  const bool any = store_gradient_columns(g, t, sum, dot, sums, nullptr, unsafe, correct);
  if (any) gradient_columns_double(g, dy.in_order(), x, t, centres.means, sums, unsafe);
}

template <class T, class Row>
inline void accumulate_gradient_run_float(const Row& dy, const T* x, int64_t n, float shift, int64_t ahead,
                                          FloatRunSums* sums) {
  constexpr int kN = 2 * kLanesF;
  constexpr int64_t kFlushed = kFlush * 4 * kN, kLine = 64 / sizeof(T);
  const VecF k = VecF{} + shift;
  for (int64_t i0 = 0; i0 < n; i0 += kFlushed) {
    const int64_t m = std::min(kFlushed, n - i0), addends = (m + 4 * kN - 1) / (4 * kN) + 4;
    if (sums->pending + addends > kFlush + 4) sums->flush();
    sums->pending += addends;
    VecF a[4], b[4];
    for (int u = 0; u < 4; ++u) a[u] = sums->f1[u], b[u] = sums->f2[u];
    for_run<kN>(m, [&](int64_t i, auto tail, int u) __attribute__((always_inline)) {
      T tail_x[kN];
      for (int64_t line = 0; line < kN; line += kLine) {
        if (u * kN % kLine != 0) continue;
        prefetch(x + i0 + i + line + ahead);
        prefetch_gradient<T>(dy, i0 + i + line + ahead);
      }
      const T* px = tail ? padded<kN>(x + i0 + i, m - i, T(), tail_x) : x + i0 + i;
      VecF vx[2], vdy[2];
      for (int w = 0; w < 2; w += kPackVectors<T>) {
        load_pack(px + w * kLanesF, vx + w);
        load_gradient<T>(dy, i0 + i + w * kLanesF, n, tail, vx + w, vdy + w);
      }
      a[u] += vdy[0] + vdy[1];
      b[u] += vdy[0] * (vx[0] - k) + vdy[1] * (vx[1] - k);
    });
    for (int u = 0; u < 4; ++u) sums->f1[u] = a[u], sums->f2[u] = b[u];
  }
}

template <class T, class Dy>
inline void gradient_planes_float(const Geometry& g, const Dy& dy, const Reader<T>& x, int64_t chunk, int64_t c,
                                  const Centres<T>& centres, const GradSums& sums) {
  const float shift = centres.shift.row(0)[c];
  const int64_t ahead = elements_ahead(g, sizeof(T), g.inner);
  FloatRunSums acc;
  for_gradient_runs(dy, x, plane_chunk(g, chunk), c, false, [&](int64_t n, const auto& pdy, const T* px) {
    accumulate_gradient_run_float(pdy, px, n, shift, ahead, &acc);
  });
  acc.flush();
  const double sum = acc.totals.total1(), dot = acc.totals.total2();
  if (!is_finite(sum) || !is_finite(dot))
    return gradient_planes_double(g, dy.in_order(), x, chunk, c, centres.means, sums);
  sums.row(chunk, 0)[c] = sum;
  sums.row(chunk, 1)[c] = dot - centres.rest[c] * sum;
}

template <class T, class Dy>
inline void reduce_columns(const Geometry& g, const Dy& dy, const Reader<T>& x, const Centres<T>& centres,
                           const GradSums& sums, const Parallel& par) {
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const ColumnTask t = column_task(g, task);
      if constexpr (sizeof(T) < sizeof(double)) {
        gradient_columns_float(g, dy, x, t, centres, sums);
      } else {
        gradient_columns_double(g, dy, x, t, centres.means, sums);
      }
    }
  });
}

template <class T, class Dy>
inline void reduce_planes(const Geometry& g, const Dy& dy, const Reader<T>& x, const Centres<T>& centres,
                          const GradSums& sums, int64_t c0, int64_t c1, const Parallel& par) {
  const int64_t chunks = g.chunks();
  parallel_for(par, (c1 - c0) * chunks, g.run_length() * g.chunk_outer(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, c = c0 + task / chunks;
      if constexpr (sizeof(T) < sizeof(double)) {
        gradient_planes_float(g, dy, x, chunk, c, centres, sums);
      } else {
        gradient_planes_double(g, dy, x, chunk, c, centres.means, sums);
      }
    }
  });
}

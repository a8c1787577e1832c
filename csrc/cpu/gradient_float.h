// The reductions of gradient.h in float arithmetic, flushed to double every kFlush values: half the work, for float32
// and 16-bit tensors. Included inside the level's namespace.
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

// Sums of products with x - shift, each behind the sum without it, become those with x - mean.
template <int kCount>
inline void recentre(double rest, double* sums) {
  for (int i = 1; i < kCount; i += 2) sums[i] -= rest * sums[i - 1];
}

// Float sums take at most kFlush addends before they are added to double ones. Where these are themselves sums of four
// rows, or of two vectors of a run, made pairwise, they add next to no error.
template <class T, int kInputs, class Row, int kRows, class Counts>
inline void accumulate_gradient_rows_float(const Pieces<T, kInputs, Row, kRows>& rows, int64_t n, const float* shift,
                                           float (*sum)[kBlockColumns], const Counts& counts) {
  constexpr int kVectors = kPackVectors<T>, kCount = kSums<kInputs>;
  for_vectors<kPack<T>>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    VecF shifts[kVectors], total[kCount][kVectors] = {};
    for (int u = 0; u < kVectors; ++u) shifts[u] = load_raw<VecF>(shift + v + u * kLanesF);
    Shared<T> shared;
    load_shared<T>(rows.dy[0], v, shared);
    const auto load = [&](int j, VecF(*to)[kVectors]) __attribute__((always_inline)) {
      if constexpr (std::is_same<Counts, AllCounts>::value) {
        for (int k = 1; k < kInputs; ++k) load_pack_at(rows.rest[k - 1][j], v, n - v, tail, to[k]);
        load_gradient<T>(rows.dy[j], v, n - v, tail, shared, to[1], to[0]);
      } else {
        for (int k = 1; k < kInputs; ++k) load_kept_pack(rows.rest[k - 1][j], counts[j], v, n - v, tail, to[k]);
        load_kept_pack(rows.dy[j], counts[j], v, n - v, tail, to[0]);
      }
    };
    for (int j = 0; j < kRows; j += 2) {
      const bool two = j + 1 < kRows;
      VecF in[kInputs][kVectors], more[kInputs][kVectors];
      load(j, in);
      if (two) load(j + 1, more);
      for (int u = 0; u < kVectors; ++u) {
        VecF at[kInputs], term[kCount];
        for (int k = 0; k < kInputs; ++k) at[k] = k == 1 ? in[k][u] - shifts[u] : in[k][u];
        gradient_terms<kInputs>(at, term);
        if (two) {
          VecF next[kCount];
          for (int k = 0; k < kInputs; ++k) at[k] = k == 1 ? more[k][u] - shifts[u] : more[k][u];
          gradient_terms<kInputs>(at, next);
          for (int i = 0; i < kCount; ++i) term[i] += next[i];
        }
        for (int i = 0; i < kCount; ++i) total[i][u] = j == 0 ? term[i] : total[i][u] + term[i];
      }
    }
    for (int u = 0; u < kVectors; ++u) {
      for (int i = 0; i < kCount; ++i) {
        float* to = sum[i] + v + u * kLanesF;
        store_raw(to, load_raw<VecF>(to) + total[i][u]);
      }
    }
  });
}

// The sums of a task's rows. counts(number of rows, first row): what of them counts.
template <class T, int kInputs, class Dy, class Rows, class Counts>
__attribute__((always_inline)) inline void sum_gradient_rows(const Geometry& g, const Sources<T, kInputs, Dy>& in,
                                                             const Rows& of_dy, const ColumnTask& t, const float* shift,
                                                             int64_t size, RowBuffers<T, kInputs, Dy>& buffers,
                                                             float (*part)[kBlockColumns], double (*sum)[kBlockColumns],
                                                             const Counts& counts) {
  const bool stream = streams(g, sizeof(T));
  const int64_t batch = stream ? kFlush : kFlush * kGradientRowGroup;
  for (int64_t r = t.r0; r < t.r1; r += batch) {
    int64_t first = r;
    for_gradient_rows(g, in, of_dy, t, r, std::min(r + batch, t.r1), buffers, [&](const auto& rows) {
      constexpr int kRows = std::extent<decltype(rows.dy)>::value;
      accumulate_gradient_rows_float(rows, t.n, shift, part, counts(std::integral_constant<int, kRows>(), first));
      first += kRows;
    });
    for (int i = 0; i < kSums<kInputs>; ++i) flush_columns(size, part[i], sum[i]);
  }
}
// Of rows that hold padding, dy being a tensor; apart, for the sake of the registers of the ones without.
template <class T, int kInputs, class Dy>
[[gnu::noinline]] void sum_masked_gradient_rows(const Geometry& g, const Sources<T, kInputs, Dy>& in,
                                                const ColumnTask& t, const float* shift, int64_t size,
                                                RowBuffers<T, kInputs, Dy>& buffers, float (*part)[kBlockColumns],
                                                double (*sum)[kBlockColumns]) {
  if constexpr (std::is_same<Dy, Reader<T>>::value) {
    sum_gradient_rows(g, in, typename RowsOf<Dy>::type(in.dy, t), t, shift, size, buffers, part, sum,
                      [&](auto count, int64_t first) { return Patterns<decltype(count)::value>(g, first); });
  }
}

template <class T, int kInputs, class Dy>
inline void gradient_columns_float(const Geometry& g, const Sources<T, kInputs, Dy>& in, const ColumnTask& t,
                                   const Centres<T>& centres, const ChunkSums<kSums<kInputs>>& sums) {
  constexpr int kCount = kSums<kInputs>;
  alignas(64) float shift[kBlockColumns], part[kCount][kBlockColumns];
  alignas(64) double sum[kCount][kBlockColumns], in_order[kBlockColumns];
  RowBuffers<T, kInputs, Dy> buffers;
  const typename RowsOf<Dy>::type of_dy(in.dy, t);
  const int64_t size = packed_size<T>(t.n);
  for (float* f : part) std::fill(f, f + size, 0.0f);
  for (double* s : sum) std::fill(s, s + size, 0.0);
  const float* k[1];
  centres.shift.template expand_packs<T>(g, t.v0, t.n, shift, k);
  if (std::is_same<Dy, Reader<T>>::value && g.masked()) {
    sum_masked_gradient_rows(g, in.whole(), t, k[0], size, buffers, part, sum);
  } else {
    sum_gradient_rows(g, in, of_dy, t, k[0], size, buffers, part, sum, [](auto, int64_t) { return AllCounts(); });
  }
  if constexpr (kPackVectors<T> > 1) {
    for (double* s : sum) {
      from_packs<T>(s, t.n, in_order);
      std::copy(in_order, in_order + t.n, s);
    }
  }
  bool unsafe[kBlockColumns];
  const auto correct = [&](int64_t c, double* s) { recentre<kCount>(centres.rest[c], s); };
  const bool any = store_gradient_columns(g, t, sum, sums, nullptr, unsafe, correct);
  if (any) gradient_columns_double(g, in.in_order(), t, centres.means, sums, unsafe);
}

template <class T, int kInputs, class Run>
inline void accumulate_gradient_run_float(const Pieces<T, kInputs, Run>& from, int64_t n, float shift,
                                          FloatRunSums<kSums<kInputs>>* sums) {
  constexpr int kCount = kSums<kInputs>, kW = kWays<kInputs>;
  const VecF mean = VecF{} + shift;
  VecF acc[kCount][kW] = {};
  Shared<T> shared;
  load_shared<T>(from.dy[0], 0, shared);
  for_run<2 * kLanesF>(n, [&](int64_t i, auto tail, int u) __attribute__((always_inline)) {
    VecF in[kInputs][2], at[kInputs], term[2][kCount];
    for (int w = 0; w < 2; w += kPackVectors<T>) {
      const int64_t v = i + w * kLanesF;
      for (int k = 1; k < kInputs; ++k) load_pack_at(from.rest[k - 1][0], v, n - v, tail, in[k] + w);
      load_gradient<T>(from.dy[0], v, n - v, tail, shared, in[1] + w, in[0] + w);
    }
    for (int w = 0; w < 2; ++w) {
      for (int k = 0; k < kInputs; ++k) at[k] = k == 1 ? in[k][w] - mean : in[k][w];
      gradient_terms<kInputs>(at, term[w]);
    }
    for (int i = 0; i < kCount; ++i) acc[i][u % kW] += term[0][i] + term[1][i];
  });
  sums->add(acc);
}

template <class T, int kInputs, class Dy>
inline void gradient_planes_float(const Geometry& g, const Sources<T, kInputs, Dy>& in, int64_t chunk, int64_t c0,
                                  int64_t c1, const Centres<T>& centres, const ChunkSums<kSums<kInputs>>& sums) {
  constexpr int kCount = kSums<kInputs>;
  constexpr int64_t kLongest = run_piece(2 * kLanesF, kWays<kInputs>);
  using Sums = FloatRunSums<kCount>;
  Buffers<T, kInputs, Dy, kGather> buffers;
  Sums of_channels[kPlaneGroup];
  const float* shift = centres.shift.row(0);
  const int64_t step = in.direct() ? kLongest : std::min(kGather, kLongest);
  const auto add = [&](int64_t o, int64_t c, int64_t i, int64_t n, Sums* of_channel) {
    accumulate_gradient_run_float(pieces_of_run(in, o, c, i, n, buffers, false), n, shift[c], of_channel);
  };
  for_chunk_runs(g, plane_chunk(g, chunk), c0, c1, step, of_channels, add);
  for (int64_t c = c0; c < c1; ++c) {
    double total[kCount];
    bool finite = true;
    for (int i = 0; i < kCount; ++i) {
      total[i] = of_channels[c - c0].total(i);
      finite &= is_finite(total[i]);
    }
    if (!finite) {
      gradient_planes_double(g, in.in_order(), chunk, c, centres.means, sums);
      continue;
    }
    recentre<kCount>(centres.rest[c], total);
    for (int i = 0; i < kCount; ++i) sums.row(chunk, i)[c] = total[i];
  }
}

template <class T, int kInputs, class Dy>
inline void reduce_columns(const Geometry& g, const Sources<T, kInputs, Dy>& in, const Centres<T>& centres,
                           const ChunkSums<kSums<kInputs>>& sums, const Parallel& par) {
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const ColumnTask t = column_task(g, task);
      if constexpr (sizeof(T) < sizeof(double)) {
        gradient_columns_float(g, in, t, centres, sums);
      } else {
        gradient_columns_double(g, in, t, centres.means, sums);
      }
    }
  });
}

template <class T, int kInputs, class Dy>
inline void reduce_planes(const Geometry& g, const Sources<T, kInputs, Dy>& in, const Centres<T>& centres,
                          const ChunkSums<kSums<kInputs>>& sums, int64_t c0, int64_t c1, const Parallel& par) {
  for_plane_groups(g, c0, c1, par, [&](int64_t chunk, int64_t first, int64_t last) {
    if constexpr (sizeof(T) < sizeof(double)) {
      gradient_planes_float(g, in, chunk, first, last, centres, sums);
    } else {
      for (int64_t c = first; c < last; ++c) {
        gradient_planes_double(g, in, chunk, c, centres.means, sums);
      }
    }
  });
}

// Sums of channels [c0, c1) by chunk, in either layout.
template <class T, int kInputs, class Dy>
inline void reduce_gradients(const Geometry& g, const Sources<T, kInputs, Dy>& in, const Centres<T>& centres,
                             const ChunkSums<kSums<kInputs>>& sums, int64_t c0, int64_t c1, const Parallel& par) {
  if (g.columns) return reduce_columns(g, in, centres, sums, par);
  reduce_planes(g, in, centres, sums, c0, c1, par);
}

// What backward and its derivatives make of their inputs position by position, over rows and runs. Included inside the
// level's namespace.

// dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale, of dy and x. The five coefficients of formulas.h:
// mean_hi, dy_hi, scale, slope, offset.
template <class T>
struct GradInput {
  using Element = T;
  static constexpr int kInputs = 2, kOutputs = 1, kCoefficients = 5;
  static constexpr bool kShares = false;
  static void apply(const VecC<T>* in, const VecC<T>* c, VecC<T>* out) {
    out[0] = (((in[0] - c[1]) + c[4]) - (in[1] - c[0]) * c[3]) * c[2];
  }
  static void put(const Gradient<Scalar<T>>& k, Scalar<T>* c) {
    c[0] = k.mean_hi, c[1] = k.dy_hi, c[2] = k.scale, c[3] = k.slope, c[4] = k.offset;
  }
};

// The same where dy is a gradient that shares forward's mean_hi and scale (Shared): two loads less for each pack.
template <class T>
struct SharedGradInput {
  using Element = T;
  static constexpr int kInputs = 2, kOutputs = 1, kCoefficients = 3;
  static constexpr bool kShares = true;
  static void apply(const VecC<T>* in, const VecC<T>* c, const VecC<T>* shared, VecC<T>* out) {
    out[0] = (((in[0] - c[0]) + c[2]) - (in[1] - shared[0]) * c[1]) * shared[1];
  }
  static void put(const Gradient<Scalar<T>>& k, Scalar<T>* c) { c[0] = k.dy_hi, c[1] = k.slope, c[2] = k.offset; }
};

// The gradients of double_formulas.h with respect to dy and to x, of dy, x and gg.
template <class T>
struct DoubleGradInput {
  using Element = T;
  static constexpr int kInputs = 3, kOutputs = 2, kCoefficients = kDoubleCoefficients;
  static constexpr bool kShares = false;
  static void apply(const VecC<T>* in, const VecC<T>* c, VecC<T>* out) { double_gradients(in, c, out); }
};

// What a pass reads and writes. Outputs lie like the lead operand; of several each may be absent (null).
template <class Op, class Dy = Reader<typename Op::Element>>
using SourcesOf = Sources<typename Op::Element, Op::kInputs, Dy>;
template <class Op, class Row>
using PiecesOf = Pieces<typename Op::Element, Op::kInputs, Row>;
template <class Op>
using Outputs = std::array<typename Op::Element*, Op::kOutputs>;
template <class Op>
using CoefficientsOf = Coefficients<Scalar<typename Op::Element>, Op::kCoefficients>;

template <size_t kOutputs, class T>
inline bool wanted(const T* output) {
  return kOutputs == 1 || output != nullptr;
}
// The outputs from where at(base) says that a row or a run of one begins.
template <class T, size_t kOutputs, class At>
inline std::array<T*, kOutputs> outputs_at(const std::array<T*, kOutputs>& bases, const At& at) {
  std::array<T*, kOutputs> out;
  for (size_t i = 0; i < kOutputs; ++i) out[i] = wanted<kOutputs>(bases[i]) ? at(bases[i]) : nullptr;
  return out;
}
// for_streamed over outputs that lie alike: body(streamed, i, count, outputs from i on).
template <class T, size_t kOutputs, class Body>
inline void for_outputs(bool stream, bool whole, const std::array<T*, kOutputs>& out, int64_t n, const Body& body) {
  const auto off = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % (kPack<T> * sizeof(T)); };
  const T* first = out[0];
  for (T* p : out) {
    if (!wanted<kOutputs>(p)) continue;
    if (!wanted<kOutputs>(first)) first = p;
    stream = stream && off(p) == off(first);
  }
  for_streamed(stream, whole, first, n, [&](auto streamed, int64_t i, int64_t count) {
    body(streamed, i, count, outputs_at(out, [&](T* p) { return p + i; }));
  });
}

// The pieces from element v on.
template <class T, int kInputs, class Row>
inline Pieces<T, kInputs, Row> operator+(const Pieces<T, kInputs, Row>& in, int64_t v) {
  Pieces<T, kInputs, Row> from;
  from.dy[0] = in.dy[0] + v;
  for (int k = 0; k + 1 < kInputs; ++k) from.rest[k][0] = in.rest[k][0] + v;
  return from;
}

// One step of a row or a run: `in` at its elements, `left` of which there are where it is a tail.
// room: as in normalise_run.
template <class Op, bool kStream, class Row, class Tail, class CoefficientAt>
inline __attribute__((always_inline)) int64_t apply_step(const PiecesOf<Op, Row>& in, const Outputs<Op>& out,
                                                         int64_t at, int64_t left, Tail tail,
                                                         const Shared<typename Op::Element>& shared,
                                                         const CoefficientAt& coefficient, int64_t room = 0) {
  using T = typename Op::Element;
  constexpr int kVectors = kPackVectors<T>, kInputs = Op::kInputs, kOutputs = Op::kOutputs;
  T buffer[kPack<T>];
  VecC<T> loaded[kInputs][kVectors], made[kOutputs][kVectors];
  for (int k = 1; k < kInputs; ++k) load_pack_at(in.rest[k - 1][0], at, left, tail, loaded[k]);
  load_gradient<T>(in.dy[0], at, left, tail, shared, loaded[1], loaded[0]);
  keep_gradient<T>(in.dy[0], at, left, tail, loaded[0]);
  for (int u = 0; u < kVectors; ++u) {
    VecC<T> of[kInputs], c[Op::kCoefficients], result[kOutputs];
    for (int k = 0; k < kInputs; ++k) of[k] = loaded[k][u];
    for (int i = 0; i < Op::kCoefficients; ++i) c[i] = coefficient(i, u);
    if constexpr (Op::kShares) {
      const VecC<T> k[2] = {shared[0][u], shared[1][u]};
      Op::apply(of, c, k, result);
    } else {
      Op::apply(of, c, result);
    }
    for (int o = 0; o < kOutputs; ++o) made[o][u] = result[o];
  }
  int64_t zeros = 0;
  for (int o = 0; o < kOutputs; ++o) {
    if (!wanted<kOutputs>(out[o])) continue;
    if (kStream && !tail) {
      stream_pack(out[o] + at, made[o]);
      continue;
    }
    store_pack(tail ? buffer : out[o] + at, made[o]);
    if (tail) zeros = store_end<kStream>(buffer, left, room, out[o] + at);
  }
  return zeros;
}

// Columns from c0 on of a row of coefficients.
template <class Op, bool kStream, class Row>
__attribute__((always_inline)) inline void apply_row(const PiecesOf<Op, Row>& in, const Outputs<Op>& out, int64_t n,
                                                     const Scalar<typename Op::Element>* const* c, int64_t c0) {
  using T = typename Op::Element;
  for_vectors<kPack<T>>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    Shared<T> shared;
    load_shared<T>(in.dy[0], v, shared);
    apply_step<Op, kStream>(in, out, v, n - v, tail, shared, [&](int i, int u) __attribute__((always_inline)) {
      return load_raw<VecC<T>>(c[i] + c0 + v + u * Compute<T>::lanes);
    });
  });
}

template <class Op, bool kStream, class Run>
inline int64_t apply_run(const PiecesOf<Op, Run>& in, const Outputs<Op>& out, int64_t n, const CoefficientsOf<Op>& c,
                         int64_t channel, int64_t room) {
  int64_t zeros = 0;
  using T = typename Op::Element;
  VecC<T> k[Op::kCoefficients];
  for (int i = 0; i < Op::kCoefficients; ++i) k[i] = broadcast<VecC<T>>(c.row(i)[channel]);
  Shared<T> shared;
  load_shared<T>(in.dy[0], 0, shared);
  for_run<kPack<T>>(n, [&](int64_t j, auto tail, int) __attribute__((always_inline)) {
    const auto coefficient = [&](int i, int) __attribute__((always_inline)) { return k[i]; };
    zeros = apply_step<Op, kStream>(in, out, j, n - j, tail, shared, coefficient, room);
  });
  return zeros;
}

// The same of rows that hold padding; apart, for the sake of the registers of the one without.
template <class Op, class Dy>
[[gnu::noinline]] void apply_masked(const Geometry& g, const SourcesOf<Op, Dy>& in, const Outputs<Op>& outputs,
                                    const ColumnTask& t, const Scalar<typename Op::Element>* const* c, bool stream) {
  using T = typename Op::Element;
  static_assert(Op::kOutputs == 1, "derivatives of a padded batch's gradients have no kernel");
  Buffers<T, Op::kInputs, Dy, kBlockColumns> buffers;
  const typename RowsOf<Dy>::type of_dy(in.dy, t);
  T whole[kBlockColumns];  // with values where it does not count, which nobody gets
  for (int64_t r = t.r0; r < t.r1; ++r) {
    apply_row<Op, false>(pieces_of_rows<1>(in, of_dy, t, r, buffers), {whole}, t.n, c, 0);
    Pattern(g, r).put(whole, t.n, lead_row(g, outputs[0], r, t.v0), stream);
  }
}

template <class Op, class Dy>
inline void apply_task(const Geometry& g, const SourcesOf<Op, Dy>& in, const Outputs<Op>& outputs, const ColumnTask& t,
                       const Scalar<typename Op::Element>* const* c, bool stream) {
  using T = typename Op::Element;
  Buffers<T, Op::kInputs, Dy, kBlockColumns> buffers;
  const typename RowsOf<Dy>::type of_dy(in.dy, t);
  for (int64_t r = t.r0; r < t.r1; ++r) {
    const auto from = pieces_of_rows<1>(in, of_dy, t, r, buffers);
    const auto row = outputs_at(outputs, [&](T* base) { return lead_row(g, base, r, t.v0); });
    for_outputs(stream, kPackVectors<T> > 1, row, t.n, [&](auto streamed, int64_t v, int64_t n, const auto& out) {
      apply_row<Op, decltype(streamed)::value>(from + v, out, n, c, v);
    });
  }
}

template <class Op, class Dy>
inline void apply_columns(const Geometry& g, const SourcesOf<Op, Dy>& in, const Outputs<Op>& outputs,
                          const CoefficientsOf<Op>& coefficients, Order order, const Parallel& par) {
  using T = typename Op::Element;
  using A = Scalar<T>;
  // Spelt out here: GCC 12 fails on an aligned array of this size in the lambda.
  struct alignas(64) Rows {
    A of[Op::kCoefficients * kBlockColumns];
  };
  const bool stream = streams_output(g, sizeof(T));
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    Rows expanded;
    const A* c[Op::kCoefficients];
    for_tasks(order, begin, end, [&](int64_t task) {
      const ColumnTask t = column_task(g, task);
      coefficients.template expand_packs<T>(g, t.v0, t.n, expanded.of, c);
      if constexpr (Op::kOutputs == 1) {
        if (g.masked()) return apply_masked<Op, Dy>(g, in.whole(), outputs, t, c, stream);
      }
      apply_task<Op, Dy>(g, in, outputs, t, c, stream);
    });
    stream_fence();
  });
}

template <class Op, class Dy>
inline void apply_planes(const Geometry& g, const SourcesOf<Op, Dy>& in, const Outputs<Op>& outputs,
                         const CoefficientsOf<Op>& coefficients, int64_t c0, int64_t c1, Order order,
                         const Parallel& par) {
  using T = typename Op::Element;
  // What is computed lies in packs, and only whole ones can be read.
  constexpr bool kWhole = !std::is_same<typename Dy::Element, T>::value && kPackVectors<T> > 1;
  const bool stream = streams_output(g, sizeof(T));
  const auto body = [&](int64_t o, int64_t c, int64_t i0, int64_t n, int64_t room) {
    Buffers<T, Op::kInputs, Dy, kGather> buffers;
    const auto from = pieces_of_run(in, o, c, i0, n, buffers, false);
    const auto run = outputs_at(outputs, [&](T* base) { return lead_run(g, base, o, c, i0); });
    int64_t zeros = 0;
    for_outputs(stream, kWhole, run, n, [&](auto streamed, int64_t i, int64_t count, const auto& out) {
      zeros = apply_run<Op, decltype(streamed)::value>(from + i, out, count, coefficients, c, room);
    });
    return zeros;
  };
  for_planes(g, c0, c1, in.direct(), order, par, body, [&](int64_t o, int64_t c, int64_t i0, int64_t n) {
    for (T* const base : outputs) {
      if (wanted<Op::kOutputs>(base)) zero_run(lead_run(g, base, o, c, i0), n, stream);
    }
  });
}

// Channels [c0, c1), in either layout.
template <class Op, class Dy>
inline void apply_gradients(const Geometry& g, const SourcesOf<Op, Dy>& in, const Outputs<Op>& outputs,
                            const CoefficientsOf<Op>& coefficients, int64_t c0, int64_t c1, Order order,
                            const Parallel& par) {
  if (g.columns) return apply_columns<Op, Dy>(g, in, outputs, coefficients, order, par);
  apply_planes<Op, Dy>(g, in, outputs, coefficients, c0, c1, order, par);
}

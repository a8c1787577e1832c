// dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale over rows and runs. Included inside the level's
// namespace. The five coefficients of formulas.h: mean_hi, dy_hi, scale, slope, offset.

template <class T>
using GradCoefficients = Coefficients<Scalar<T>, 5>;

template <class T>
inline VecC<T> grad_input(VecC<T> dy, VecC<T> centred, const VecC<T>* c) {
  return (((dy - c[1]) + c[4]) - centred * c[3]) * c[2];
}

// kStream: dx is streamed, and where rows are wider than a task (ahead != 0, see elements_ahead) the inputs are fetched
// early.
template <class T, bool kStream, class Row>
inline void grad_input_row(const Row& dy, const T* x, T* dx, int64_t n, int64_t ahead, const Scalar<T>* const* c) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  for_vectors<kN>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer_dy[kN], buffer_x[kN];
    if (kStream && ahead != 0) prefetch_gradient<T>(dy, v + ahead), prefetch(x + v + ahead);
    VecC<T> vdy[kVectors], vx[kVectors];
    load_pack(tail ? padded<kN>(x + v, n - v, T(), buffer_x) : x + v, vx);
    load_gradient<T>(dy, v, n, tail, vx, vdy);
    keep_gradient<T>(dy, v, n, tail, vdy);
    for (int u = 0; u < kVectors; ++u) {
      VecC<T> k[5];
      for (int i = 0; i < 5; ++i) k[i] = load_raw<VecC<T>>(c[i] + v + u * Compute<T>::lanes);
      vdy[u] = grad_input<T>(vdy[u], vx[u] - k[0], k);
    }
    if (kStream && !tail) return stream_pack(dx + v, vdy);
    store_pack(tail ? buffer_dy : dx + v, vdy);
    if (tail) std::copy(buffer_dy, buffer_dy + (n - v), dx + v);
  });
}

template <class T, bool kStream, class Row>
inline void grad_input_run(const Row& dy, const T* x, T* dx, int64_t n, const GradCoefficients<T>& c, int64_t channel) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  VecC<T> k[5];
  for (int i = 0; i < 5; ++i) k[i] = broadcast<VecC<T>>(c.row(i)[channel]);
  for_run<kN>(n, [&](int64_t i, auto tail, int) __attribute__((always_inline)) {
    T buffer_dy[kN], buffer_x[kN];
    VecC<T> vdy[kVectors], vx[kVectors];
    load_pack(tail ? padded<kN>(x + i, n - i, T(), buffer_x) : x + i, vx);
    load_gradient<T>(dy, i, n, tail, vx, vdy);
    keep_gradient<T>(dy, i, n, tail, vdy);
    for (int u = 0; u < kVectors; ++u) vdy[u] = grad_input<T>(vdy[u], vx[u] - k[0], k);
    if (kStream && !tail) return stream_pack(dx + i, vdy);
    store_pack(tail ? buffer_dy : dx + i, vdy);
    if (tail) std::copy(buffer_dy, buffer_dy + (n - i), dx + i);
  });
}

template <class T, bool kStream, class Dy>
inline void grad_input_task(const Geometry& g, const Dy& dy, const Reader<T>& x, T* dx, const ColumnTask& t,
                            const Scalar<T>* const* c) {
  alignas(64) typename Dy::Element buffer_dy[kBlockColumns];
  T buffer_x[kBlockColumns];
  const typename RowsOf<Dy>::type rows(dy, t);
  const int64_t ahead = t.n == g.cols ? 0 : elements_ahead(g, sizeof(T), t.n);
  for (int64_t r = t.r0; r < t.r1; ++r) {
    const T* in_x = x.row(r, t.v0, t.n, buffer_x);
    const auto in_dy = rows(r, in_x, buffer_dy);
    T* out = lead_row(g, dx, r, t.v0);
    if (kStream && streamable(out)) {
      grad_input_row<T, true>(in_dy, in_x, out, t.n, ahead, c);
    } else {
      grad_input_row<T, false>(in_dy, in_x, out, t.n, ahead, c);
    }
  }
}

template <class T, class Dy>
inline void grad_input_columns(const Geometry& g, const Dy& dy, const Reader<T>& x, T* dx,
                               const GradCoefficients<T>& coefficients, const Parallel& par) {
  const bool stream = streams_output(g, sizeof(T));
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    alignas(64) Scalar<T> expanded[5 * kBlockColumns];
    const Scalar<T>* c[5];
    for_tasks(Order::kReverse, begin, end, [&](int64_t task) {
      const ColumnTask t = column_task(g, task);
      coefficients.template expand_packs<T>(g, t.v0, t.n, expanded, c);
      stream ? grad_input_task<T, true>(g, dy, x, dx, t, c) : grad_input_task<T, false>(g, dy, x, dx, t, c);
    });
    stream_fence();
  });
}

template <class T, class Dy>
inline void grad_input_planes(const Geometry& g, const Dy& dy, const Reader<T>& x, T* dx,
                              const GradCoefficients<T>& coefficients, int64_t c0, int64_t c1, const Parallel& par) {
  const bool direct = dy.direct() && x.direct(), stream = streams_output(g, sizeof(T));
  for_planes(g, c0, c1, direct, Order::kReverse, par, [&](int64_t o, int64_t c, int64_t i0, int64_t n) {
    alignas(64) typename Dy::Element buffer_dy[kGather];
    T buffer_x[kGather];
    const T* in_x = x.run(o, c, i0, n, buffer_x);
    const auto in_dy = dy.run(o, c, i0, n, in_x, buffer_dy, false);
    T* out = lead_run(g, dx, o, c, i0);
    if (stream && streamable(out)) {
      grad_input_run<T, true>(in_dy, in_x, out, n, coefficients, c);
    } else {
      grad_input_run<T, false>(in_dy, in_x, out, n, coefficients, c);
    }
  });
}

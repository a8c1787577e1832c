// dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale over rows and runs. Included inside the level's
// namespace. The five coefficients of formulas.h: mean_hi, dy_hi, scale, slope, offset.

template <class T>
using GradCoefficients = Coefficients<Scalar<T>, 5>;

template <class T>
inline VecC<T> grad_input(VecC<T> dy, VecC<T> centred, const VecC<T>* c) {
  return (((dy - c[1]) + c[4]) - centred * c[3]) * c[2];
}

template <class T, bool kStream>
inline void grad_input_row(const T* dy, const T* x, T* dx, int64_t n, const Scalar<T>* const* c, int64_t c0) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  for_vectors<kN>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer_dy[kN], buffer_x[kN];
    VecC<T> vdy[kVectors], vx[kVectors];
    load_pack(tail ? padded<kN>(dy + v, n - v, T(), buffer_dy) : dy + v, vdy);
    load_pack(tail ? padded<kN>(x + v, n - v, T(), buffer_x) : x + v, vx);
    for (int u = 0; u < kVectors; ++u) {
      VecC<T> k[5];
      for (int i = 0; i < 5; ++i) k[i] = load_raw<VecC<T>>(c[i] + c0 + v + u * Compute<T>::lanes);
      vdy[u] = grad_input<T>(vdy[u], vx[u] - k[0], k);
    }
    if (kStream && !tail) return stream_pack(dx + v, vdy);
    store_pack(tail ? buffer_dy : dx + v, vdy);
    if (tail) std::copy(buffer_dy, buffer_dy + (n - v), dx + v);
  });
}

template <class T, bool kStream>
inline void grad_input_run(const T* dy, const T* x, T* dx, int64_t n, const GradCoefficients<T>& c, int64_t channel) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  VecC<T> k[5];
  for (int i = 0; i < 5; ++i) k[i] = broadcast<VecC<T>>(c.row(i)[channel]);
  for_run<kN>(n, [&](int64_t i, auto tail, int) __attribute__((always_inline)) {
    T buffer_dy[kN], buffer_x[kN];
    VecC<T> vdy[kVectors], vx[kVectors];
    load_pack(tail ? padded<kN>(dy + i, n - i, T(), buffer_dy) : dy + i, vdy);
    load_pack(tail ? padded<kN>(x + i, n - i, T(), buffer_x) : x + i, vx);
    for (int u = 0; u < kVectors; ++u) vdy[u] = grad_input<T>(vdy[u], vx[u] - k[0], k);
    if (kStream && !tail) return stream_pack(dx + i, vdy);
    store_pack(tail ? buffer_dy : dx + i, vdy);
    if (tail) std::copy(buffer_dy, buffer_dy + (n - i), dx + i);
  });
}

template <class T>
inline void grad_input_task(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, T* dx, const ColumnTask& t,
                            const Scalar<T>* const* c, bool stream) {
  T buffer_dy[kBlockColumns], buffer_x[kBlockColumns];
  for_row_pairs<1>(dy, x, t.r0, t.r1, t.v0, t.n, buffer_dy, buffer_x,
                   [&](auto, int64_t r, const T* const* in_dy, const T* const* in_x) {
                     T* out = lead_row(g, dx, r, t.v0);
                     for_streamed(stream, kPackVectors<T> > 1, out, t.n, [&](auto streamed, int64_t v, int64_t n) {
                       constexpr bool kStream = decltype(streamed)::value;
                       grad_input_row<T, kStream>(in_dy[0] + v, in_x[0] + v, out + v, n, c, v);
                     });
                   });
}

template <class T>
inline void grad_input_columns(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, T* dx,
                               const GradCoefficients<T>& coefficients, const Parallel& par) {
  const bool stream = streams_output(g, sizeof(T));
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    alignas(64) Scalar<T> expanded[5 * kBlockColumns];
    const Scalar<T>* c[5];
    for_tasks(Order::kReverse, begin, end, [&](int64_t task) {
      const ColumnTask t = column_task(g, task);
      coefficients.template expand_packs<T>(g, t.v0, t.n, expanded, c);
      grad_input_task(g, dy, x, dx, t, c, stream);
    });
    stream_fence();
  });
}

template <class T>
inline void grad_input_planes(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, T* dx,
                              const GradCoefficients<T>& coefficients, int64_t c0, int64_t c1, const Parallel& par) {
  const bool direct = dy.direct() && x.direct(), stream = streams_output(g, sizeof(T));
  for_planes(g, c0, c1, direct, Order::kReverse, par, [&](int64_t o, int64_t c, int64_t i0, int64_t n) {
    T buffer_dy[kGather], buffer_x[kGather];
    const T *in_dy = dy.run(o, c, i0, n, buffer_dy), *in_x = x.run(o, c, i0, n, buffer_x);
    T* out = lead_run(g, dx, o, c, i0);
    for_streamed(stream, false, out, n, [&](auto streamed, int64_t i, int64_t count) {
      grad_input_run<T, decltype(streamed)::value>(in_dy + i, in_x + i, out + i, count, coefficients, c);
    });
  });
}

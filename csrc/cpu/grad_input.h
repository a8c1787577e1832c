// dx = ((dy - dy_hi) - (x - mean_hi) * slope + offset) * scale over rows and runs. Included inside the level's
// namespace. The five coefficients of formulas.h in its order: mean_hi, dy_hi, scale, slope, offset.

template <class T>
using GradCoefficients = Coefficients<Scalar<T>, 5>;

template <class T>
inline VecC<T> grad_input(VecC<T> dy, VecC<T> x, const VecC<T>* c) {
  return (((dy - c[1]) + c[4]) - (x - c[0]) * c[3]) * c[2];
}

template <class T>
inline void grad_input_row(const T* dy, const T* x, T* dx, int64_t n, const Scalar<T>* const* c) {
  constexpr int kLanes = Compute<T>::lanes;
  for_vectors<kLanes>(n, [&](int64_t v, auto tail) {
    T buffer_dy[kLanes], buffer_x[kLanes];
    Scalar<T> buffer_c[kLanes];
    const int64_t left = n - v;
    VecC<T> k[5];
    for (int i = 0; i < 5; ++i) {
      k[i] = load_raw<VecC<T>>(tail ? padded<kLanes>(c[i] + v, left, Scalar<T>(), buffer_c) : c[i] + v);
    }
    const T* pdy = tail ? padded<kLanes>(dy + v, left, T(), buffer_dy) : dy + v;
    const T* px = tail ? padded<kLanes>(x + v, left, T(), buffer_x) : x + v;
    store_compute(tail ? buffer_dy : dx + v, grad_input<T>(load_compute(pdy), load_compute(px), k));
    if (tail) std::copy(buffer_dy, buffer_dy + left, dx + v);
  });
}

template <class T>
inline void grad_input_run(const T* dy, const T* x, T* dx, int64_t n, const GradCoefficients<T>& c, int64_t channel) {
  constexpr int kLanes = Compute<T>::lanes;
  VecC<T> k[5];
  for (int i = 0; i < 5; ++i) k[i] = broadcast<VecC<T>>(c.row(i)[channel]);
  for_run<kLanes>(n, [&](int64_t i, auto tail, int) __attribute__((always_inline)) {
    T buffer_dy[kLanes], buffer_x[kLanes];
    const T* pdy = tail ? padded<kLanes>(dy + i, n - i, T(), buffer_dy) : dy + i;
    const T* px = tail ? padded<kLanes>(x + i, n - i, T(), buffer_x) : x + i;
    store_compute(tail ? buffer_dy : dx + i, grad_input<T>(load_compute(pdy), load_compute(px), k));
    if (tail) std::copy(buffer_dy, buffer_dy + (n - i), dx + i);
  });
}

template <class T>
inline void grad_input_columns(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, T* dx,
                               const GradCoefficients<T>& coefficients, const Parallel& par) {
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    alignas(64) Scalar<T> expanded[5 * kBlockColumns];
    T buffer_dy[kBlockColumns], buffer_x[kBlockColumns];
    const Scalar<T>* c[5];
    for_tasks(Order::kReverse, begin, end, [&](int64_t task) {
      const ColumnTask t = column_task(g, task);
      coefficients.expand(g, t.v0, t.n, expanded, c);
      for (int64_t r = t.r0; r < t.r1; ++r) {
        grad_input_row(dy.row(r, t.v0, t.n, buffer_dy), x.row(r, t.v0, t.n, buffer_x), lead_row(g, dx, r, t.v0), t.n,
                       c);
      }
    });
  });
}

template <class T>
inline void grad_input_planes(const Geometry& g, const Reader<T>& dy, const Reader<T>& x, T* dx,
                              const GradCoefficients<T>& coefficients, int64_t c0, int64_t c1, const Parallel& par) {
  const bool direct = dy.direct() && x.direct();
  for_planes(g, c0, c1, direct, Order::kReverse, par, [&](int64_t o, int64_t c, int64_t i0, int64_t n) {
    T buffer_dy[kGather], buffer_x[kGather];
    grad_input_run(dy.run(o, c, i0, n, buffer_dy), x.run(o, c, i0, n, buffer_x), lead_run(g, dx, o, c, i0), n,
                   coefficients, c);
  });
}

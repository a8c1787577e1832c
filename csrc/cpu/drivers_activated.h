// The stages of drivers.h with a residual and an activation behind the normalisation. Included inside the level's
// namespace.

// All pieces of a gradient, for its outputs alone.
template <class T>
inline void write_gradient(const Geometry& g, const ActivatedGradient<T>& dy, const Reader<T>& x, const Parallel& par) {
  using Element = typename ActivatedGradient<T>::Element;
  if (!g.columns) {
    return for_planes(g, 0, g.channels, false, Order::kForward, par,
                      [&](int64_t o, int64_t c, int64_t i, int64_t n, int64_t) {
                        alignas(64) Element buffer[kGather];
                        T buffer_x[kGather];
                        dy.run(o, c, i, n, x.run(o, c, i, n, buffer_x), buffer);
                        return int64_t(0);
                      });
  }
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    alignas(64) Element buffer[kBlockColumns];
    T buffer_x[kBlockColumns];
    for (int64_t task = begin; task < end; ++task) {
      const ColumnTask t = column_task(g, task);
      const typename ActivatedGradient<T>::Rows rows(dy, t);
      for (int64_t r = t.r0; r < t.r1; ++r) rows(r, x.next_row(r, t.v0, t.n, buffer_x), buffer);
    }
    stream_fence();
  });
}

// Training's sums and dx where the activation goes by a sign that the coefficients or the mask tell.
template <class T, bool kMask, class Act>
inline void backward_by_sign(const Geometry& g, const BackwardArgs& a, const ActivatedGradient<T>& gradient,
                             const Act& act, const Parallel& par) {
  const SignGradient<T, Act, kMask> reduced(gradient, act, nullptr);
  const SignGradient<T, Act, kMask> applied(gradient, act, static_cast<T*>(a.grad_residual.data));
  using Op = std::conditional_t<kMask, GradInput<T>, SharedGradInput<T>>;
  reduce_and_apply<T, Op>(g, a, reduced, a.dx ? &applied : nullptr, par);
}

template <class T>
inline void backward_activated(const BackwardArgs& a, const Parallel& par) {
  const TensorRef residual = a.epilogue.residual && !a.epilogue.mask ? a.epilogue.residual : a.dx;
  const TensorRef operands[] = {a.dx, a.dy, a.x, residual};
  Ragged ragged(a.valid, a.shape);
  Geometry g = make_geometry(a.shape, operands, 4, &ragged);
  g.set_chunks(kGradientChunks);
  const ActivatedGradient<T> gradient(g, a, 1, 3);
  T *dx = static_cast<T*>(a.dx.data), *grad_residual = static_cast<T*>(a.grad_residual.data);
  clear_padding(g, dx, par, a.training);
  clear_padding(g, grad_residual, par, false);
  const bool stream = streams_output(g, sizeof(T));
  if constexpr (sizeof(T) < sizeof(double)) {
    const Activation kind = a.epilogue.activation;
    const auto slope = static_cast<Scalar<T>>(a.epilogue.negative_slope);
    if (a.training && a.sums() && (dx || !grad_residual) && by_sign(kind)) {
      if (a.epilogue.mask) {
        const Blocked<Scalar<T>> act{slope, kind == Activation::kReLU};
        return backward_by_sign<T, true>(g, a, gradient, act, par);
      }
      if (!a.epilogue.residual && kind == Activation::kReLU) {
        return backward_by_sign<T, false>(g, a, gradient, ReLU<Scalar<T>>{slope}, par);
      }
      if (!a.epilogue.residual) {
        return backward_by_sign<T, false>(g, a, gradient, LeakyReLU<Scalar<T>>{slope}, par);
      }
    }
  }
  if (a.training && dx) {
    const auto written = gradient.with_outputs(grad_residual, nullptr, stream);
    reduce_and_apply<T>(g, a, gradient, &written, par);
  } else if (a.sums()) {
    const auto written = gradient.with_outputs(grad_residual, dx, false);
    reduce_and_apply<T>(g, a, written, static_cast<const ActivatedGradient<T>*>(nullptr), par);
  } else {
    write_gradient(g, gradient.with_outputs(grad_residual, dx, stream), Reader<T>(g, 2, a.x.data), par);
  }
}

template <class T>
inline void backward_typed(const BackwardArgs& a, const Parallel& par) {
  a.epilogue.activates() ? backward_activated<T>(a, par) : backward_plain<T>(a, par);
}

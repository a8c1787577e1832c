// The stages put together: statistics -> per-channel coefficients -> element-wise pass. Included inside the level's
// namespace. Every path gives the same bits: which one runs depends on the number of threads, the results do not.

// Data of a core that stays in its share of the caches between two sweeps, and of a tensor that does so as a whole.
constexpr int64_t kCacheBytes = int64_t(2) << 20, kCachedTensor = int64_t(8) << 20;
constexpr int64_t kChannelElements = 64;  // a channel's share of per-channel work, in elements of element-wise work

// How many channels are taken through all stages together: those that stay in cache meanwhile, so that memory is swept
// once instead of two or three times. All of them where that cannot be, or where all stay.
inline int64_t channels_together(const Geometry& g, int64_t bytes_per_channel, const Parallel& par) {
  if (g.columns || bytes_per_channel > kCacheBytes || bytes_per_channel * g.channels <= kCachedTensor)
    return g.channels;
  const int64_t fit = kCacheBytes / bytes_per_channel, fair = g.channels / (4 * par.threads);
  return par.threads == 1 ? fit : fair == 0 ? g.channels : std::min(fit, fair);
}

// Runs work(c0, c1, parallel) for so many channels at a time over the threads, or once for all of them.
template <class Work>
inline void for_channels(const Geometry& g, int64_t together, const Parallel& par, const Work& work) {
  if (together >= g.channels) return work(0, g.channels, par);
  const int64_t blocks = (g.channels + together - 1) / together;
  parallel_for(par, blocks, together * g.outer * g.inner, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      work(b * together, std::min((b + 1) * together, g.channels), Parallel());
    }
  });
}

// body(c0, c1) over blocks of [begin, end).
template <class Body>
inline void for_channel_blocks(int64_t begin, int64_t end, int64_t chunks, const Parallel& par, const Body& body) {
  parallel_for(par, end - begin, kChannelElements + chunks, [&](int64_t b, int64_t e) { body(begin + b, begin + e); });
}

// The geometry of the output, the input and a residual.
inline Geometry geometry_of(const ForwardArgs& a, Ragged* ragged, const Fold& fold = {}) {
  const TensorRef operands[] = {a.y ? a.y : a.x, a.x, a.epilogue.residual};
  return make_geometry(a.shape, operands, a.epilogue.residual ? 3 : 2, ragged, fold);
}

template <class T, class After>
inline void forward_by_batch(const ForwardArgs& a, const Parallel& par) {
  Ragged ragged(a.valid, a.shape);
  const Geometry g = geometry_of(a, &ragged, fold_of_moments()),
                 flat = g.columns && !g.ragged ? geometry_of(a, nullptr) : g;
  const int64_t chunks = g.chunks(), channels = g.channels;
  const Scratch scratch((chunks * 3 + 3) * channels);
  const Partials partials{scratch.data(), channels};
  const auto coefficients = coefficients_of<T>(a, scratch.data() + chunks * 3 * channels);
  const Reader<T> x(g, 1, a.x.data), flat_x(flat, 1, a.x.data);
  T* y = static_cast<T*>(a.y.data);
  const After after(flat, a.epilogue);
  const Share share = count_batch(a);

  const double count = static_cast<double>(g.count());
  clear_padding(g, y, par, true);
  if (count == 0) {
    if (a.saved) std::memset(a.saved, 0, saved_rows(a.renormalised()) * channels * sizeof(Scalar<T>));
    return;
  }
  const int64_t together = channels_together(g, g.count() * int64_t(sizeof(T)), par);
  for_channels(g, together, par, [&](int64_t c0, int64_t c1, const Parallel& p) {
    if (!a.stage.given) statistics(g, x, partials, c0, c1, p);
    for_channel_blocks(c0, c1, a.stage.given ? a.stage.parts : chunks, p, [&](int64_t b, int64_t e) {
      if (!a.stage.given) merge_chunks(g, partials, b, e);
      for_blocks(b, e, [&](int64_t c, int64_t n) {
        const MomentsOfBlock m =
            a.stage.given ? given_block(a.stage, c, n, channels) : merged_block(partials, count, c, n);
        finish_channels<T>(a, m, share, c, n, coefficients);
      });
    });
    if (!y) return;
    normalise(flat, flat_x, y, coefficients, c0, c1, Order::kReverse, p, after);
  });
}

template <class T, class After>
inline void forward_by_running(const ForwardArgs& a, const Parallel& par) {
  Ragged ragged(a.valid, a.shape);
  const Geometry g = geometry_of(a, &ragged);
  const Scratch scratch(3 * g.channels);
  const auto coefficients = coefficients_of<T>(a, scratch.data());
  for_channel_blocks(0, g.channels, 0, par, [&](int64_t b, int64_t e) {
    for_blocks(b, e, [&](int64_t c, int64_t n) {
      set_channels<T>(a, c, n, load_block(a.running_mean, c, n, 0), Block(), load_block(a.running_var, c, n, 1), 0.0,
                      coefficients);
    });
  });
  const Reader<T> x(g, 1, a.x.data);
  T* y = static_cast<T*>(a.y.data);
  const After after(g, a.epilogue);
  clear_padding(g, y, par, true);
  normalise(g, x, y, coefficients, 0, g.channels, Order::kForward, par, after);
}

template <class T>
inline void forward_typed(const ForwardArgs& a, const Parallel& par) {
  const auto with = [&](auto* after) {
    using After = std::remove_pointer_t<decltype(after)>;
    a.training ? forward_by_batch<T, After>(a, par) : forward_by_running<T, After>(a, par);
  };
  a.epilogue ? with(static_cast<Activated<T>*>(nullptr)) : with(static_cast<Unactivated*>(nullptr));
}

// Evaluation: dx = dy * scale, which is a normalise of dy; x is not read.
template <class T>
inline void scale_gradient(const BackwardArgs& a, const Parallel& par) {
  const TensorRef operands[] = {a.dx, a.dy};
  Ragged ragged(a.valid, a.shape);
  const Geometry g = make_geometry(a.shape, operands, 2, &ragged);
  const Scratch scratch(3 * g.channels);
  const NormaliseCoefficients<T> coefficients{reinterpret_cast<Scalar<T>*>(scratch.data()), g.channels};
  for_blocks(0, g.channels, [&](int64_t c, int64_t n) {
    Block invstd = Block();
    for (int64_t i = 0; i < n; ++i) invstd[i] = saved_at<T>(a, kSavedInvstd, c + i);
    const BlockOf<Scalar<T>> none = BlockOf<Scalar<T>>();
    set_normalise<T>(coefficients, c, n, none, none, Block(), invstd, load_block(a.weight, c, n, 1), Block());
  });
  const Reader<T> dy(g, 1, a.dy.data);
  T* dx = static_cast<T*>(a.dx.data);
  clear_padding(g, dx, par, true);
  normalise(g, dy, dx, coefficients, 0, g.channels, Order::kForward, par);
}

// The sums of dy as `reduced` gives it, the parameter gradients from them and, where `applied` is given, training's dx
// of dy as that gives it: the same, or a copy with outputs of its own.
template <class T, class Op = GradInput<T>, class Dy>
inline void reduce_and_apply(const Geometry& g, const BackwardArgs& a, const Dy& reduced, const Dy* applied,
                             const Parallel& par) {
  const int64_t chunks = g.chunks(), channels = g.channels;
  const Scratch scratch((chunks * 2 + kStateDoubles + 5) * channels);
  const ChunkSums<2> sums{scratch.data(), channels};
  double* of_channels = scratch.data() + chunks * 2 * channels;
  const ChannelState<T> state = state_in<T>(a, of_channels, channels);
  const CoefficientsOf<Op> coefficients{reinterpret_cast<Scalar<T>*>(of_channels + kStateDoubles * channels), channels};
  const Reader<T> x(g, 2, a.x.data);
  const int64_t together = channels_together(g, 2 * g.count() * int64_t(sizeof(T)), par);
  const double count = static_cast<double>(g.count());
  for_channels(g, together, par, [&](int64_t c0, int64_t c1, const Parallel& p) {
    if (!a.stage.given) reduce_gradients(g, Sources<T, 2, Dy>{reduced, {x}}, state.centres, sums, c0, c1, p);
    for_channel_blocks(c0, c1, chunks, p, [&](int64_t b, int64_t e) {
      if (!a.stage.given) sum_chunks(g, sums, b, e);
      for_blocks(b, e, [&](int64_t c, int64_t n) {
        const SumsOfBlock s = a.stage.given ? given_block_of_sums(a.stage, c, n, channels)
                              : chunks      ? summed_block(sums, count, c, n)
                                            : SumsOfBlock();
        finish_gradients<T, Op>(a, s, state, c, n, coefficients);
      });
    });
    if (!applied) return;
    apply_gradients<Op, Dy>(g, {*applied, {x}}, {static_cast<T*>(a.dx.data)}, coefficients, c0, c1, Order::kReverse, p);
  });
}

template <class T>
inline void backward_plain(const BackwardArgs& a, const Parallel& par) {
  if (a.dx && !a.training) scale_gradient<T>(a, par);
  if (!a.sums()) return;
  const TensorRef operands[] = {a.dx ? a.dx : a.x, a.dy, a.x};
  Ragged ragged(a.valid, a.shape);
  Geometry g = make_geometry(a.shape, operands, 3, &ragged);
  g.set_chunks(kGradientChunks);
  const Reader<T> dy(g, 1, a.dy.data);
  if (a.dx && a.training) clear_padding(g, static_cast<T*>(a.dx.data), par, true);
  reduce_and_apply<T>(g, a, dy, a.dx && a.training ? &dy : nullptr, par);
}

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

inline double inverse_std(double variance, double eps) { return 1.0 / std::sqrt(variance + eps); }

template <class T>
inline void set_normalise(const NormaliseCoefficients<T>& out, int64_t c, Scalar<T> mean_hi, Scalar<T> mean_lo,
                          double variance, double invstd, const VectorRef& weight, const VectorRef& bias) {
  const auto k = normalise_coefficients<Scalar<T>, double>(mean_hi, mean_lo, variance, invstd,
                                                           load_element(weight, c, 1.0), load_element(bias, c, 0.0));
  out.row(0)[c] = k.mean_hi;
  out.row(1)[c] = k.scale;
  out.row(2)[c] = k.shift;
}

// Where the coefficients of the normalisation lie: in `saved` or, where there is none, in memory of the driver.
template <class T>
inline NormaliseCoefficients<T> coefficients_of(const ForwardArgs& a, double* memory) {
  Scalar<T>* saved = static_cast<Scalar<T>*>(a.saved);
  return {saved ? saved + kSavedNormalise * a.shape.c : reinterpret_cast<Scalar<T>*>(memory), a.shape.c};
}

// Mean and variance of channel c -> saved values and coefficients.
template <class T>
inline void set_channel(const ForwardArgs& a, int64_t c, double mean_hi, double mean_lo, double variance,
                        const NormaliseCoefficients<T>& coefficients) {
  const double invstd = inverse_std(variance, a.eps);
  Scalar<T> hi, lo;
  split(mean_hi, mean_lo, &hi, &lo);
  set_normalise<T>(coefficients, c, hi, lo, variance, invstd, a.weight, a.bias);
  if (!a.saved) return;
  Scalar<T>* saved = static_cast<Scalar<T>*>(a.saved) + c;
  saved[kSavedMeanHi * a.shape.c] = hi;
  saved[kSavedMeanLo * a.shape.c] = lo;
  saved[kSavedInvstd * a.shape.c] = static_cast<Scalar<T>>(invstd);
}

// Moments of channel c -> the same, and running statistics; or a stage's result.
template <class T>
inline void finish_channel(const ForwardArgs& a, const Moments<double>& m, double momentum, int64_t c,
                           const NormaliseCoefficients<T>& coefficients) {
  if (a.stage.result) return put_result(a.stage, c, a.shape.c, m);
  set_channel<T>(a, c, m.mean_hi, m.mean_lo, m.m2 / m.count, coefficients);
  if (a.running_mean) {
    store_element(a.running_mean, c, running_update(load_element(a.running_mean, c), m.mean_hi, momentum));
  }
  if (a.running_var) {
    const double unbiased = m.m2 / (m.count - 1);
    store_element(a.running_var, c, running_update(load_element(a.running_var, c), unbiased, momentum));
  }
}

// The geometry of the output, the input and a residual.
inline Geometry geometry_of(const ForwardArgs& a) {
  const TensorRef operands[] = {a.y ? a.y : a.x, a.x, a.epilogue.residual};
  return make_geometry(a.shape, operands, a.epilogue.residual ? 3 : 2);
}

template <class T, class After>
inline void forward_by_batch(const ForwardArgs& a, const Parallel& par) {
  const Geometry g = geometry_of(a);
  const int64_t chunks = g.chunks(), channels = g.channels;
  const Scratch scratch((chunks * 3 + 3) * channels);
  const Partials partials{scratch.data(), channels};
  const auto coefficients = coefficients_of<T>(a, scratch.data() + chunks * 3 * channels);
  const Reader<T> x(g, 1, a.x.data);
  T* y = static_cast<T*>(a.y.data);
  const After after(g, a.epilogue);
  if (a.num_batches_tracked) ++*a.num_batches_tracked;
  double momentum = a.momentum;
  if (a.cumulative) momentum = a.num_batches_tracked ? 1.0 / static_cast<double>(*a.num_batches_tracked) : 0.0;

  const double count = static_cast<double>(a.shape.count());
  const int64_t together = channels_together(g, a.shape.count() * int64_t(sizeof(T)), par);
  for_channels(g, together, par, [&](int64_t c0, int64_t c1, const Parallel& p) {
    if (a.stage.given) {
      for_channel_blocks(c0, c1, a.stage.parts, p, [&](int64_t b, int64_t e) {
        for (int64_t c = b; c < e; ++c) {
          finish_channel<T>(a, given_moments(a.stage, c, channels), momentum, c, coefficients);
        }
      });
    } else {
      statistics(g, x, partials, c0, c1, p);
      for_channel_blocks(c0, c1, chunks, p, [&](int64_t b, int64_t e) {
        merge_chunks(g, partials, b, e);
        for (int64_t c = b; c < e; ++c) {
          finish_channel<T>(a, partials.merged(count, c), momentum, c, coefficients);
        }
      });
    }
    if (!y) return;
    normalise(g, x, y, coefficients, c0, c1, Order::kReverse, p, after);
  });
}

template <class T, class After>
inline void forward_by_running(const ForwardArgs& a, const Parallel& par) {
  const Geometry g = geometry_of(a);
  const Scratch scratch(3 * g.channels);
  const auto coefficients = coefficients_of<T>(a, scratch.data());
  for_channel_blocks(0, g.channels, 0, par, [&](int64_t b, int64_t e) {
    for (int64_t c = b; c < e; ++c) {
      set_channel<T>(a, c, load_element(a.running_mean, c), 0.0, load_element(a.running_var, c), coefficients);
    }
  });
  const Reader<T> x(g, 1, a.x.data);
  T* y = static_cast<T*>(a.y.data);
  const After after(g, a.epilogue);
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

// What backward knows of the channels, from forward's saved values. `rest` = mean - shift.
template <class T>
struct ChannelState {
  Centres<T> centres;
  double *rest, *invstd;
};

// A row of `saved` at channel c.
template <class T>
inline Scalar<T> saved_at(const BackwardArgs& a, SavedRow row, int64_t c) {
  return static_cast<const Scalar<T>*>(a.saved)[row * a.shape.c + c];
}

template <class T>
inline void load_state(const BackwardArgs& a, const ChannelState<T>& s, int64_t c) {
  const Scalar<T> hi = saved_at<T>(a, kSavedMeanHi, c), lo = saved_at<T>(a, kSavedMeanLo, c);
  const Scalar<T> invstd = saved_at<T>(a, kSavedInvstd, c);
  two_sum<double>(hi, lo, s.centres.means.row(0) + c, s.centres.means.row(1) + c);
  s.invstd[c] = invstd;
  const Scalar<T> shift = coarse_shift(hi, invstd);
  s.centres.shift.row(0)[c] = shift;
  s.rest[c] = static_cast<double>(hi) - shift + lo;
}

// Sums of channel c -> parameter gradients and, in training, the coefficients of Op's dx; or a stage's result.
template <class T, class Op>
inline void finish_gradient(const BackwardArgs& a, const GradientSum& sum, const ChannelState<T>& s, int64_t c,
                            const CoefficientsOf<Op>& out) {
  if (a.stage.result) return put_result(a.stage, c, a.shape.c, sum);
  if (a.grad_weight) store_element(a.grad_weight, c, sum.dot * s.invstd[c]);
  if (a.grad_bias) store_element(a.grad_bias, c, sum.dy);
  if (!a.dx || !a.training) return;
  const Scalar<T> hi = saved_at<T>(a, kSavedMeanHi, c);
  const Scalar<T> mean_hi = Op::kShares ? saved_at<T>(a, kSavedNormalise, c) : hi;
  const double mean_lo = (static_cast<double>(hi) - mean_hi) + saved_at<T>(a, kSavedMeanLo, c);
  const auto k = gradient_coefficients<Scalar<T>, double>(mean_hi, mean_lo, s.invstd[c], load_element(a.weight, c, 1.0),
                                                          sum.dy, sum.dot, sum.count);
  Scalar<T> values[Op::kCoefficients];
  Op::put(k, values);
  for (int i = 0; i < Op::kCoefficients; ++i) out.row(i)[c] = values[i];
}

// Evaluation: dx = dy * scale, which is a normalise of dy; x is not read.
template <class T>
inline void scale_gradient(const BackwardArgs& a, const Parallel& par) {
  const TensorRef operands[] = {a.dx, a.dy};
  const Geometry g = make_geometry(a.shape, operands, 2);
  const Scratch scratch(3 * g.channels);
  const NormaliseCoefficients<T> coefficients{reinterpret_cast<Scalar<T>*>(scratch.data()), g.channels};
  for (int64_t c = 0; c < g.channels; ++c) {
    set_normalise<T>(coefficients, c, 0, 0, 0, saved_at<T>(a, kSavedInvstd, c), a.weight, VectorRef());
  }
  const Reader<T> dy(g, 1, a.dy.data);
  T* dx = static_cast<T*>(a.dx.data);
  normalise(g, dy, dx, coefficients, 0, g.channels, Order::kForward, par);
}

// The state of all channels, in (kStateDoubles * channels) doubles.
constexpr int64_t kStateDoubles = 5;
template <class T>
inline ChannelState<T> state_in(const BackwardArgs& a, double* memory, int64_t channels) {
  double *rest = memory + 2 * channels, *invstd = rest + channels;
  Scalar<T>* shift = reinterpret_cast<Scalar<T>*>(invstd + channels);
  const ChannelState<T> state{{{memory, channels}, {shift, channels}, rest}, rest, invstd};
  for (int64_t c = 0; c < channels; ++c) load_state<T>(a, state, c);
  return state;
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
  const int64_t together = channels_together(g, 2 * a.shape.count() * int64_t(sizeof(T)), par);
  const double count = static_cast<double>(a.shape.count());
  for_channels(g, together, par, [&](int64_t c0, int64_t c1, const Parallel& p) {
    if (!a.stage.given) reduce_gradients(g, Sources<T, 2, Dy>{reduced, {x}}, state.centres, sums, c0, c1, p);
    for_channel_blocks(c0, c1, chunks, p, [&](int64_t b, int64_t e) {
      if (!a.stage.given) sum_chunks(g, sums, b, e);
      for (int64_t c = b; c < e; ++c) {
        const GradientSum own{count, sums.row(0, 0)[c], sums.row(0, 1)[c]};
        finish_gradient<T, Op>(a, a.stage.given ? given_sums(a.stage, c, channels) : own, state, c, coefficients);
      }
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
  Geometry g = make_geometry(a.shape, operands, 3);
  g.set_chunks(kGradientChunks);
  const Reader<T> dy(g, 1, a.dy.data);
  reduce_and_apply<T>(g, a, dy, a.dx && a.training ? &dy : nullptr, par);
}

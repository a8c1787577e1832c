// What is computed once a channel: from sums to running statistics, saved values, coefficients and parameter
// gradients. In blocks of channels, in loops without branches that the compiler makes vectors of. Included inside the
// level's namespace.

constexpr int64_t kChannelBlock = 64;
template <class E>
struct BlockOf {
  alignas(64) E v[kChannelBlock];
  E& operator[](int64_t i) { return v[i]; }
  const E& operator[](int64_t i) const { return v[i]; }
};
using Block = BlockOf<double>;

// body(c, n) over the blocks of channels [begin, end).
template <class Body>
inline void for_blocks(int64_t begin, int64_t end, const Body& body) {
  for (int64_t c = begin; c < end; c += kChannelBlock) body(c, std::min(kChannelBlock, end - c));
}

// Elements [c, c + n) of a per-channel vector, whatever its type.
inline Block load_block(const VectorRef& v, int64_t c, int64_t n, double absent) {
  Block to;
  const char* const p = static_cast<const char*>(v.data) + c * v.stride * element_bytes(v.dtype);
  if (!v) {
    std::fill(to.v, to.v + kChannelBlock, absent);
  } else if (v.stride == 1 && v.dtype == DType::kFloat32) {
    for (int64_t i = 0; i < n; ++i) to[i] = load_one<float>(p + i * int64_t(sizeof(float)));
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load_element(v, c + i);
  }
  return to;
}
inline void store_block(const VectorRef& v, int64_t c, int64_t n, const Block& from) {
  char* const p = static_cast<char*>(v.data) + c * v.stride * element_bytes(v.dtype);
  if (v.stride == 1 && v.dtype == DType::kFloat32) {
    for (int64_t i = 0; i < n; ++i) store_one(p + i * int64_t(sizeof(float)), static_cast<float>(from[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) store_element(v, c + i, from[i]);
  }
}

inline double inverse_std(double variance, double eps) { return 1.0 / std::sqrt(variance + eps); }
inline Block inverse_stds(const Block& variance, int64_t n, double eps) {
  Block to;
  int64_t i = 0;
  for (; i + kLanesD <= n; i += kLanesD) {
    store_raw(to.v + i, 1.0 / square_root(load_raw<VecD>(variance.v + i) + eps));
  }
  for (; i < n; ++i) to[i] = inverse_std(variance[i], eps);
  return to;
}

// Where the coefficients of the normalisation lie: in `saved` or, where there is none, in memory of the driver.
template <class T>
inline NormaliseCoefficients<T> coefficients_of(const ForwardArgs& a, double* memory) {
  Scalar<T>* saved = static_cast<Scalar<T>*>(a.saved);
  return {saved ? saved + kSavedNormalise * a.shape.c : reinterpret_cast<Scalar<T>*>(memory), a.shape.c};
}

template <class T>
inline void set_normalise(const NormaliseCoefficients<T>& out, int64_t c, int64_t n, const BlockOf<Scalar<T>>& mean_hi,
                          const BlockOf<Scalar<T>>& mean_lo, const Block& variance, const Block& invstd,
                          const Block& weight, const Block& bias) {
  BlockOf<Scalar<T>> rows[3];
  for (int64_t i = 0; i < n; ++i) {
    const auto k =
        normalise_coefficients<Scalar<T>, double>(mean_hi[i], mean_lo[i], variance[i], invstd[i], weight[i], bias[i]);
    rows[0][i] = k.mean_hi;
    rows[1][i] = k.scale;
    rows[2][i] = k.shift;
  }
  for (int k = 0; k < 3; ++k) std::copy(rows[k].v, rows[k].v + n, out.row(k) + c);
}

// What a batch weighs: its momentum, and how far the warm-up of a renormalisation is over.
struct Share {
  double momentum = 0, renorm = 0;
};
inline Share count_batch(const ForwardArgs& a) {
  Share share{a.momentum, a.renorm && a.renorm.batches ? warmed_up(a.renorm, *a.renorm.batches) : 1};
  if (a.num_batches_tracked) ++*a.num_batches_tracked;
  if (a.cumulative) share.momentum = a.num_batches_tracked ? 1.0 / static_cast<double>(*a.num_batches_tracked) : 0.0;
  return share;
}

struct MomentsOfBlock {
  Block count, mean_hi, mean_lo, m2;
};
inline MomentsOfBlock merged_block(const Partials& partials, double count, int64_t c, int64_t n) {
  MomentsOfBlock m;
  std::fill(m.count.v, m.count.v + n, count);
  Block* const rows[] = {&m.mean_hi, &m.mean_lo, &m.m2};
  for (int k = 0; k < 3; ++k) std::copy(partials.row(0, k) + c, partials.row(0, k) + c + n, rows[k]->v);
  return m;
}
inline MomentsOfBlock given_block(const Stage& stage, int64_t c, int64_t n, int64_t channels) {
  MomentsOfBlock m;
  for (int64_t i = 0; i < n; ++i) {
    const Moments<double> one = given_moments(stage, c + i, channels);
    m.count[i] = one.count, m.mean_hi[i] = one.mean_hi, m.mean_lo[i] = one.mean_lo, m.m2[i] = one.m2;
  }
  return m;
}

// r and d into the weight, the bias and `saved`; apart, so that the code of a plain batch stays small.
template <class T>
[[gnu::noinline]] void renormalise(const ForwardArgs& a, int64_t c, int64_t n, const Block& mean_hi,
                                   const Block& mean_lo, const Block& invstd, double share, Block* weight,
                                   Block* bias) {
  for (int64_t i = 0; i < n; ++i) {
    const double away = (mean_hi[i] - load_element(a.renorm.mean, c + i)) + mean_lo[i];
    const double running = inverse_std(load_element(a.renorm.var, c + i), a.eps);
    const RenormFactors factors = renorm_factors(a.renorm, share, away, invstd[i], running);
    (*bias)[i] += (*weight)[i] * factors.d;
    (*weight)[i] *= factors.r;
    if (!a.saved) continue;
    Scalar<T>* const saved = static_cast<Scalar<T>*>(a.saved) + c + i;
    saved[kSavedR * a.shape.c] = static_cast<Scalar<T>>(factors.r);
    saved[kSavedD * a.shape.c] = static_cast<Scalar<T>>(factors.d);
  }
}

// Mean and variance of channels [c, c + n) -> saved values and coefficients.
template <class T>
inline void set_channels(const ForwardArgs& a, int64_t c, int64_t n, const Block& mean_hi, const Block& mean_lo,
                         const Block& variance, double share_of_renorm, const NormaliseCoefficients<T>& coefficients) {
  using S = Scalar<T>;
  const Block invstd = inverse_stds(variance, n, a.eps);
  Block weight = load_block(a.weight, c, n, 1), bias = load_block(a.bias, c, n, 0);
  if (a.renorm) renormalise<T>(a, c, n, mean_hi, mean_lo, invstd, share_of_renorm, &weight, &bias);
  BlockOf<S> hi, lo, narrowed;
  for (int64_t i = 0; i < n; ++i) split(mean_hi[i], mean_lo[i], &hi[i], &lo[i]);
  set_normalise<T>(coefficients, c, n, hi, lo, variance, invstd, weight, bias);
  if (!a.saved) return;
  for (int64_t i = 0; i < n; ++i) narrowed[i] = static_cast<S>(invstd[i]);
  S* const saved = static_cast<S*>(a.saved) + c;
  std::copy(hi.v, hi.v + n, saved + kSavedMeanHi * a.shape.c);
  std::copy(lo.v, lo.v + n, saved + kSavedMeanLo * a.shape.c);
  std::copy(narrowed.v, narrowed.v + n, saved + kSavedInvstd * a.shape.c);
}

inline void move_running(const VectorRef& to, int64_t c, int64_t n, const double* batch, double momentum) {
  if (!to) return;
  Block running = load_block(to, c, n, 0);
  for (int64_t i = 0; i < n; ++i) running[i] = running_update(running[i], batch[i], momentum);
  store_block(to, c, n, running);
}

// Moments of channels [c, c + n) -> the same, and running statistics; or a stage's result.
template <class T>
inline void finish_channels(const ForwardArgs& a, const MomentsOfBlock& m, const Share& share, int64_t c, int64_t n,
                            const NormaliseCoefficients<T>& coefficients) {
  if (a.stage.result) {
    for (int64_t i = 0; i < n; ++i) {
      put_result(a.stage, c + i, a.shape.c, Moments<double>{m.count[i], m.mean_hi[i], m.mean_lo[i], m.m2[i]});
    }
    return;
  }
  Block variance, unbiased;
  for (int64_t i = 0; i < n; ++i) {
    variance[i] = m.m2[i] / m.count[i];
    unbiased[i] = m.m2[i] / (m.count[i] - 1);
  }
  set_channels<T>(a, c, n, m.mean_hi, m.mean_lo, variance, share.renorm, coefficients);
  move_running(a.running_mean, c, n, m.mean_hi.v, share.momentum);
  move_running(a.running_var, c, n, unbiased.v, share.momentum);
}

// What backward knows of the channels, from forward's saved values. `rest` = mean - shift.
template <class T>
struct ChannelState {
  Centres<T> centres;
  double *rest, *invstd;
};

// A row of `saved`, or channel c of it.
template <class T>
inline const Scalar<T>* saved_row(const BackwardArgs& a, SavedRow row) {
  return static_cast<const Scalar<T>*>(a.saved) + row * a.shape.c;
}
template <class T>
inline Scalar<T> saved_at(const BackwardArgs& a, SavedRow row, int64_t c) {
  return saved_row<T>(a, row)[c];
}

// The state of all channels, in (kStateDoubles * channels) doubles.
constexpr int64_t kStateDoubles = 5;
template <class T>
inline ChannelState<T> state_in(const BackwardArgs& a, double* memory, int64_t channels) {
  double *rest = memory + 2 * channels, *invstd = rest + channels;
  Scalar<T>* shift = reinterpret_cast<Scalar<T>*>(invstd + channels);
  const ChannelState<T> state{{{memory, channels}, {shift, channels}, rest}, rest, invstd};
  const Scalar<T>*const his = saved_row<T>(a, kSavedMeanHi), *const los = saved_row<T>(a, kSavedMeanLo),
                        *const invstds = saved_row<T>(a, kSavedInvstd);
  for_blocks(0, channels, [&](int64_t c, int64_t n) {
    Block means[2], rests, wide;
    BlockOf<Scalar<T>> shifts;
    for (int64_t i = 0; i < n; ++i) {
      const Scalar<T> hi = his[c + i], lo = los[c + i];
      two_sum<double>(hi, lo, &means[0][i], &means[1][i]);
      wide[i] = invstds[c + i];
      shifts[i] = coarse_shift(hi, invstds[c + i]);
      rests[i] = static_cast<double>(hi) - shifts[i] + lo;
    }
    for (int k = 0; k < 2; ++k) std::copy(means[k].v, means[k].v + n, memory + k * channels + c);
    std::copy(rests.v, rests.v + n, rest + c);
    std::copy(wide.v, wide.v + n, invstd + c);
    std::copy(shifts.v, shifts.v + n, shift + c);
  });
  return state;
}

struct SumsOfBlock {
  Block count, dy, dot;
};
inline SumsOfBlock summed_block(const ChunkSums<2>& sums, double count, int64_t c, int64_t n) {
  SumsOfBlock s;
  std::fill(s.count.v, s.count.v + n, count);
  std::copy(sums.row(0, 0) + c, sums.row(0, 0) + c + n, s.dy.v);
  std::copy(sums.row(0, 1) + c, sums.row(0, 1) + c + n, s.dot.v);
  return s;
}
inline SumsOfBlock given_block_of_sums(const Stage& stage, int64_t c, int64_t n, int64_t channels) {
  SumsOfBlock s;
  for (int64_t i = 0; i < n; ++i) {
    const GradientSum one = given_sums(stage, c + i, channels);
    s.count[i] = one.count, s.dy[i] = one.dy, s.dot[i] = one.dot;
  }
  return s;
}

// Of a renormalised batch; apart, so that the code of a plain one stays as small as GCC keeps in line.
template <class T>
[[gnu::noinline]] void renormalise_gradient(const BackwardArgs& a, int64_t c, int64_t n, const Block& dy, Block* dot) {
  for (int64_t i = 0; i < n; ++i) {
    (*dot)[i] = (*dot)[i] * saved_at<T>(a, kSavedR, c + i) + dy[i] * saved_at<T>(a, kSavedD, c + i);
  }
}
template <class T>
[[gnu::noinline]] void renormalise_weight(const BackwardArgs& a, int64_t c, int64_t n, Block* weight) {
  for (int64_t i = 0; i < n; ++i) (*weight)[i] *= saved_at<T>(a, kSavedR, c + i);
}

// Sums of channels [c, c + n) -> parameter gradients and, in training, the coefficients of Op's dx; or a stage's
// result.
template <class T, class Op>
inline void finish_gradients(const BackwardArgs& a, const SumsOfBlock& sums, const ChannelState<T>& s, int64_t c,
                             int64_t n, const CoefficientsOf<Op>& out) {
  using S = Scalar<T>;
  if (a.stage.result) {
    for (int64_t i = 0; i < n; ++i) {
      put_result(a.stage, c + i, a.shape.c, GradientSum{sums.count[i], sums.dy[i], sums.dot[i]});
    }
    return;
  }
  const double* const invstd = s.invstd + c;
  if (a.grad_weight) {
    Block dot;
    for (int64_t i = 0; i < n; ++i) dot[i] = sums.dot[i] * invstd[i];
    if (a.by_renorm) renormalise_gradient<T>(a, c, n, sums.dy, &dot);
    store_block(a.grad_weight, c, n, dot);
  }
  if (a.grad_bias) store_block(a.grad_bias, c, n, sums.dy);
  if (!a.dx || !a.training) return;
  Block weight = load_block(a.weight, c, n, 1);
  if (a.by_renorm) renormalise_weight<T>(a, c, n, &weight);
  const S *const his = saved_row<T>(a, kSavedMeanHi) + c, *const los = saved_row<T>(a, kSavedMeanLo) + c,
                 *const mean_his = Op::kShares ? saved_row<T>(a, kSavedNormalise) + c : his;
  BlockOf<S> rows[Op::kCoefficients];
  for (int64_t i = 0; i < n; ++i) {
    const double mean_lo = (static_cast<double>(his[i]) - mean_his[i]) + los[i];
    const auto k = gradient_coefficients<S, double>(mean_his[i], mean_lo, invstd[i], weight[i], sums.dy[i], sums.dot[i],
                                                    sums.count[i]);
    S values[Op::kCoefficients];
    Op::put(k, values);
    for (int j = 0; j < Op::kCoefficients; ++j) rows[j][i] = values[j];
  }
  for (int j = 0; j < Op::kCoefficients; ++j) std::copy(rows[j].v, rows[j].v + n, out.row(j) + c);
}

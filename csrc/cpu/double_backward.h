// Second derivatives: sums -> coefficients of double_formulas.h -> element-wise pass. Included inside the level's
// namespace.

// The tensors that a stage reads; what it does not is taken as zero.
struct DoubleReads {
  bool dy, x, gg;
  bool any() const { return dy || x || gg; }
};

// Sums are for training's means, and for the gradient of the weight.
inline DoubleReads read_by_sums(const DoubleBackwardArgs& a) {
  const bool gg(a.gg_x), weight(a.grad_weight);
  if (!a.training) return {gg && weight, false, gg && weight};
  const bool dy = gg ? weight || a.dx : bool(a.gg_weight) && a.dx;
  return {dy, gg || dy, gg};
}

// Where neither gg nor a gradient of grad_weight arrived, what arrived at grad_bias is the result, of no tensor.
inline DoubleReads read_by_apply(const DoubleBackwardArgs& a) {
  const bool gg(a.gg_x), slope = a.gg_weight || (a.training && gg);
  return {slope && a.dx, slope && (a.grad_dy || a.training), gg && (a.grad_dy || a.training)};
}

template <class T>
inline Sources<T, 3> double_sources(const Geometry& g, const DoubleBackwardArgs& a, const DoubleReads& reads) {
  return {{g, 1, reads.dy ? a.dy.data : nullptr},
          {{{g, 2, reads.x ? a.x.data : nullptr}, {g, 3, reads.gg ? a.gg_x.data : nullptr}}}};
}

// Sums of channel c, zero where none are needed -> the gradient of the weight, coefficients.
template <class T>
inline void finish_double(const DoubleBackwardArgs& a, const double* sums, double invstd, int64_t c, bool reads_x,
                          const CoefficientsOf<DoubleGradInput<T>>& out) {
  DoubleChannel<Scalar<T>, double> channel;
  // Where x is not read, whatever the mean is, nothing is subtracted from nothing.
  channel.mean_hi = reads_x ? saved_at<T>(a, kSavedMeanHi, c) : Scalar<T>(0);
  channel.mean_lo = reads_x ? saved_at<T>(a, kSavedMeanLo, c) : Scalar<T>(0);
  channel.invstd = invstd;
  channel.weight = load_element(a.weight, c, 1.0);
  channel.gg_weight = load_element(a.gg_weight, c, 0.0);
  channel.gg_bias = load_element(a.gg_bias, c, 0.0);
  channel.count = static_cast<double>(a.shape.count());
  channel.training = a.training;
  if (a.grad_weight) store_element(a.grad_weight, c, double_grad_weight(channel, sums));
  if (!a.grad_dy && !a.dx) return;
  const auto k = double_coefficients(channel, sums);
  const Scalar<T> in_order[] = {k.mean_hi, k.invstd, k.gg_hi, k.dy_hi,     k.scale,
                                k.alpha,   k.beta,   k.delta, k.offset_dy, k.offset_x};
  for (int i = 0; i < kDoubleCoefficients; ++i) out.row(i)[c] = in_order[i];
}

template <class T>
inline void double_backward_typed(const DoubleBackwardArgs& a, const Parallel& par) {
  const TensorRef lead = a.grad_dy ? a.grad_dy : a.dx ? a.dx : a.x;
  const TensorRef operands[] = {lead, a.dy, a.x, a.gg_x ? a.gg_x : lead};
  const Geometry g = make_geometry(a.shape, operands, 4);
  const int64_t chunks = g.chunks(), channels = g.channels;
  const Scratch scratch((chunks * kDoubleSums + kStateDoubles + kDoubleCoefficients) * channels);
  const ChunkSums<kDoubleSums> sums{scratch.data(), channels};
  double* of_channels = scratch.data() + chunks * kDoubleSums * channels;
  const ChannelState<T> state = state_in<T>(a, of_channels, channels);
  const CoefficientsOf<DoubleGradInput<T>> coefficients{
      reinterpret_cast<Scalar<T>*>(of_channels + kStateDoubles * channels), channels};
  const DoubleReads by_sums = read_by_sums(a), by_apply = read_by_apply(a);
  const Sources<T, 3> summed = double_sources<T>(g, a, by_sums), applied = double_sources<T>(g, a, by_apply);
  const Outputs<DoubleGradInput<T>> outputs{static_cast<T*>(a.grad_dy.data), static_cast<T*>(a.dx.data)};
  const int64_t together = channels_together(g, 3 * a.shape.count() * int64_t(sizeof(T)), par);
  for_channels(g, together, par, [&](int64_t c0, int64_t c1, const Parallel& p) {
    if (by_sums.any()) reduce_gradients(g, summed, state.centres, sums, c0, c1, p);
    for_channel_blocks(c0, c1, chunks, p, [&](int64_t b, int64_t e) {
      if (by_sums.any()) sum_chunks(g, sums, b, e);
      for (int64_t c = b; c < e; ++c) {
        double total[kDoubleSums] = {};
        for (int i = 0; i < kDoubleSums && by_sums.any(); ++i) total[i] = sums.row(0, i)[c];
        finish_double<T>(a, total, state.invstd[c], c, by_apply.x, coefficients);
      }
    });
    if (!a.grad_dy && !a.dx) return;
    const Order order = by_sums.any() ? Order::kReverse : Order::kForward;
    apply_gradients<DoubleGradInput<T>, Reader<T>>(g, applied, outputs, coefficients, c0, c1, order, p);
  });
}

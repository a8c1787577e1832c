// y = (x - mean_hi) * scale + shift over rows and runs. Included inside the level's namespace.

template <class T>
inline VecC<T> normalise(VecC<T> x, VecC<T> mean_hi, VecC<T> scale, VecC<T> shift) {
  return (x - mean_hi) * scale + shift;
}

// Per-channel coefficients as `kCount` arrays of `channels`, and their expansion to the columns of a block.
template <class E, int kCount>
struct Coefficients {
  E* data;
  int64_t channels;
  E* row(int which) const { return data + which * channels; }

  // As expand, for columns that are read pack by pack of T: in their order, the last pack filled up with zeros.
  template <class T>
  void expand_packs(const Geometry& g, int64_t v0, int64_t n, E* buffer, const E** rows) const {
    expand(g, v0, n, buffer, rows);
    const int64_t size = packed_size<T>(n);
    if (kPackVectors<T> == 1 && size == n) return;
    for (int i = 0; i < kCount; ++i) {
      E in[kBlockColumns], *out = buffer + i * kBlockColumns;
      std::copy(rows[i], rows[i] + n, in);
      std::fill(in + n, in + size, E(0));
      to_packs<T>(in, n, out);
      rows[i] = out;
    }
  }

  // rows[i]: coefficient i of columns [v0, v0 + n), in place where a column is a channel.
  void expand(const Geometry& g, int64_t v0, int64_t n, E* buffer, const E** rows) const {
    const int64_t fast = g.fast();
    const bool in_place = !g.by_span && g.fold == 1;
    for (int i = 0; i < kCount; ++i) {
      rows[i] = in_place ? row(i) + v0 : buffer + i * kBlockColumns;
      if (in_place) continue;
      E* out = buffer + i * kBlockColumns;
      const E* in = row(i);
      if (g.by_span) {
        for (int64_t v = 0; v < n; v += fast) std::fill(out + v, out + std::min(v + fast, n), in[(v0 + v) / fast]);
      } else {
        for (int64_t v = 0; v < n; v += fast) std::copy(in, in + std::min(fast, n - v), out + v);
      }
    }
  }
};

template <class T>
using NormaliseCoefficients = Coefficients<Scalar<T>, 3>;

// kCentred = false: every mean_hi of the row is zero and is not even loaded, which is a quarter of the loads. x - 0 is
// x, so the bits are the same. keep: a pattern of what counts, all else is written as zero; none if null.
template <class T, bool kCentred, bool kStream, class Keep = std::nullptr_t>
inline void normalise_row(const T* x, T* y, int64_t n, const Scalar<T>* const* c, int64_t c0, Keep keep = nullptr) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  for_vectors<kN>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer[kN];
    VecC<T> value[kVectors];
    load_pack(tail ? padded<kN>(x + v, n - v, T(), buffer) : x + v, value);
    for (int u = 0; u < kVectors; ++u) {
      VecC<T> k[3];
      for (int i = kCentred ? 0 : 1; i < 3; ++i) k[i] = load_raw<VecC<T>>(c[i] + c0 + v + u * Compute<T>::lanes);
      value[u] = kCentred ? normalise<T>(value[u], k[0], k[1], k[2]) : value[u] * k[1] + k[2];
    }
    if constexpr (!std::is_same<Keep, std::nullptr_t>::value) {
      static_assert(kVectors == 1, "lanes as the pattern's bytes");
      value[0] = keep_lanes(keep + v, value[0]);
    }
    if (kStream && !tail) return stream_pack(y + v, value);
    store_pack(tail ? buffer : y + v, value);
    if (tail) store_first(buffer, n - v, y + v);
  });
}

template <class E>
inline bool all_zero(const E* p, int64_t n) {
  bool zero = true;
  for (int64_t i = 0; i < n; ++i) zero &= p[i] == 0;
  return zero;
}

// room: how many elements behind are to be zero; returns how many are.
template <class T, bool kStream>
inline int64_t normalise_run(const T* x, T* y, int64_t n, const NormaliseCoefficients<T>& c, int64_t channel,
                             int64_t room) {
  int64_t zeros = 0;
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>;
  const auto hi = broadcast<VecC<T>>(c.row(0)[channel]), scale = broadcast<VecC<T>>(c.row(1)[channel]),
             shift = broadcast<VecC<T>>(c.row(2)[channel]);
  for_run<kN>(n, [&](int64_t i, auto tail, int) __attribute__((always_inline)) {
    T buffer[kN];
    VecC<T> value[kVectors];
    load_pack(tail ? padded<kN>(x + i, n - i, T(), buffer) : x + i, value);
    for (int u = 0; u < kVectors; ++u) value[u] = normalise<T>(value[u], hi, scale, shift);
    if (kStream && !tail) return stream_pack(y + i, value);
    store_pack(tail ? buffer : y + i, value);
    if (tail) zeros = store_end<kStream>(buffer, n - i, room, y + i);
  });
  return zeros;
}

template <class T>
inline void zero_run(T* y, int64_t n, bool stream) {
  const VecC<T> zero[kPackVectors<T>] = {};
  for_streamed(stream, false, y, n, [&](auto streamed, int64_t at, int64_t count) {
    const int64_t whole = streamed ? count / kPack<T> * kPack<T> : 0;
    for (int64_t i = 0; i < whole; i += kPack<T>) stream_pack(y + at + i, zero);
    std::memset(static_cast<void*>(y + at + whole), 0, (count - whole) * sizeof(T));
  });
}

// The write side of the lead operand: always dense, so always in place.
template <class T>
inline T* lead_row(const Geometry& g, T* base, int64_t r, int64_t v0) {
  return base + g.row_offset(0, r) + v0;
}
template <class T>
inline T* lead_run(const Geometry& g, T* base, int64_t o, int64_t c, int64_t i0) {
  return base + o * g.strides[0].outer + c * g.strides[0].channel + i0;
}

// After a pass over the same tensor tasks are taken from the last to the first: its end is what that pass left in
// cache. Otherwise they run along memory, as the prefetchers expect.
enum class Order { kForward, kReverse };

template <class Body>
inline void for_tasks(Order order, int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = 0; i < end - begin; ++i) body(order == Order::kForward ? begin + i : end - 1 - i);
}

// What follows the normalisation in the same pass: nothing, or activated.h's Activated.
struct Unactivated {
  Unactivated() = default;
  Unactivated(const Geometry&, const Epilogue&) {}
  static constexpr bool direct() { return true; }
};

template <class T, class After>
inline void normalise_task(const Geometry& g, const Reader<T>& x, T* y, const ColumnTask& t, const Scalar<T>* const* c,
                           bool stream, const After& after) {
  T buffer[kBlockColumns];
  const bool centred = !all_zero(c[0], packed_size<T>(t.n));
  for_row_groups<1>(Whole<T>{x}, t.r0, t.r1, t.v0, t.n, buffer, [&](auto, int64_t r, const T* const* rows) {
    T* out = lead_row(g, y, r, t.v0);
    if constexpr (!std::is_same<After, Unactivated>::value) return after.row(g, rows[0], out, t, r, stream, c);
    for_streamed(stream, kPackVectors<T> > 1, out, t.n, [&](auto streamed, int64_t v, int64_t n) {
      constexpr bool kStream = decltype(streamed)::value;
      if (centred) {
        normalise_row<T, true, kStream>(rows[0] + v, out + v, n, c, v);
      } else {
        normalise_row<T, false, kStream>(rows[0] + v, out + v, n, c, v);
      }
    });
  });
}

// The same of rows that hold padding; apart, for the sake of the registers of the one without.
template <class T, class After>
[[gnu::noinline]] void normalise_masked(const Geometry& g, const Reader<T>& x, T* y, const ColumnTask& t,
                                        const Scalar<T>* const* c, bool stream, const After& after) {
  T buffer[kBlockColumns], whole[kBlockColumns];
  for (int64_t r = t.r0; r < t.r1; ++r) {
    const Pattern pattern(g, r);
    T* const out = lead_row(g, y, r, t.v0);
    if constexpr (!std::is_same<After, Unactivated>::value) {
      after.row(g, x.next_row(r, t.v0, t.n, buffer), whole, t, r, false, c);
      pattern.put(whole, t.n, out, stream);
    } else if constexpr (kPackVectors<T> > 1) {
      normalise_row<T, true, false>(x.next_whole_row(r, t.v0, t.n, buffer), whole, t.n, c, 0);
      pattern.put(whole, t.n, out, stream);
    } else {
      const T* const in = x.next_whole_row(r, t.v0, t.n, buffer);
      for_streamed(stream, false, out, t.n, [&](auto streamed, int64_t v, int64_t n) {
        normalise_row<T, true, decltype(streamed)::value>(in + v, out + v, n, c, v, pattern.data() + v);
      });
    }
  }
}

template <class T, class After = Unactivated>
inline void normalise_columns(const Geometry& g, const Reader<T>& x, T* y, const NormaliseCoefficients<T>& coefficients,
                              Order order, const Parallel& par, const After& after = After()) {
  const bool stream = streams_output(g, sizeof(T));
  parallel_for(par, column_tasks(g), g.chunk_rows() * g.block_cols(), [&](int64_t begin, int64_t end) {
    alignas(64) Scalar<T> expanded[3 * kBlockColumns];
    const Scalar<T>* c[3];
    for_tasks(order, begin, end, [&](int64_t task) {
      const ColumnTask t = column_task(g, task);
      coefficients.template expand_packs<T>(g, t.v0, t.n, expanded, c);
      if (g.masked()) return normalise_masked(g, x, y, t, c, stream, after);
      normalise_task(g, x, y, t, c, stream, after);
    });
    stream_fence();
  });
}

// Calls body(o, c, i0, n) for the runs of one (outer, channel) plane after the other, in pieces that a gather buffer
// holds where some operand is not contiguous. In reverse order blocks of kRunElements go backwards, and what is in them
// forwards: runs of a few hundred bytes taken backwards run against the prefetchers.
//
// Of a padded batch, gaps(o, c, i0, n) for what does not count around a run; body is told how much of it follows, and
// returns how much it has dealt with.
struct NoGaps {
  void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};
template <class Body, class Gaps = NoGaps>
inline void for_planes(const Geometry& g, int64_t c0, int64_t c1, bool direct, Order order, const Parallel& par,
                       const Body& body, const Gaps& gaps = Gaps()) {
  const int64_t channels = c1 - c0, pieces = g.run_pieces(), step = direct ? g.run_length() : kGather;
  const Ragged* const ragged = g.ragged;
  const auto runs = [&](int64_t begin, int64_t end) {
    // Counted on instead of divided for each run: a short one takes no longer than two divisions.
    int64_t piece = begin % pieces, c = begin / pieces % channels, o = begin / pieces / channels;
    for (int64_t left = end - begin; left > 0; --left) {
      if (ragged) {
        const Ragged::Run& run = ragged->run(o);
        const int64_t i1 = run.begin + run.length;
        if (run.before) gaps(run.outer, c0 + c, run.begin - run.before, run.before);
        int64_t done = 0;
        for (int64_t i = run.begin; i < i1; i += step) {
          done = body(run.outer, c0 + c, i, std::min(step, i1 - i), i + step < i1 ? 0 : run.behind);
        }
        if (run.behind > done) gaps(run.outer, c0 + c, i1 + done, run.behind - done);
      } else {
        const int64_t i0 = piece * g.run_length(), i1 = std::min(i0 + g.run_length(), g.inner);
        for (int64_t i = i0; i < i1; i += step) body(o, c0 + c, i, std::min(step, i1 - i), int64_t(0));
      }
      if (++piece < pieces) continue;
      piece = 0;
      if (++c < channels) continue;
      c = 0;
      ++o;
    }
  };
  parallel_for(par, g.runs() * channels * pieces, g.run_length(), [&](int64_t begin, int64_t end) {
    const int64_t block = order == Order::kForward ? end - begin : g.chunk_outer();
    for (int64_t last = end; last > begin; last -= block) runs(std::max(begin, last - block), last);
    stream_fence();
  });
}

template <class T, class After = Unactivated>
inline void normalise_planes(const Geometry& g, const Reader<T>& x, T* y, const NormaliseCoefficients<T>& coefficients,
                             int64_t c0, int64_t c1, Order order, const Parallel& par, const After& after = After()) {
  const bool stream = streams_output(g, sizeof(T));
  const auto body = [&](int64_t o, int64_t c, int64_t i0, int64_t n, int64_t room) -> int64_t {
    T buffer[kGather];
    const T* in = x.run(o, c, i0, n, buffer);
    T* out = lead_run(g, y, o, c, i0);
    if constexpr (!std::is_same<After, Unactivated>::value) {
      after.run(g, in, out, o, c, i0, n, stream, coefficients);
      return 0;
    }
    int64_t zeros = 0;
    for_streamed(stream, false, out, n, [&](auto streamed, int64_t i, int64_t count) {
      zeros = normalise_run<T, decltype(streamed)::value>(in + i, out + i, count, coefficients, c, room);
    });
    return zeros;
  };
  for_planes(g, c0, c1, x.direct() && after.direct(), order, par, body,
             [&](int64_t o, int64_t c, int64_t i0, int64_t n) { zero_run(lead_run(g, y, o, c, i0), n, stream); });
}

// Zeros where a padded batch does not count, in a tensor that lies as the lead operand; none where there is no tensor,
// or where whole rows are written (Geometry::masked) unless nothing counts. by_run: who writes the runs of planes
// clears what is around them too.
template <class T>
inline void clear_padding(const Geometry& g, T* y, const Parallel& par, bool by_run) {
  if (!g.ragged || !y || (g.masked() && g.count() > 0)) return;
  const Strides& s = g.strides[0];
  parallel_for(par, g.outer, g.channels * g.inner, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      if (g.masked()) {
        std::memset(static_cast<void*>(y + o * s.outer), 0, g.cols * sizeof(T));
        continue;
      }
      if (by_run && !g.columns && g.ragged->any(o)) continue;
      g.ragged->for_runs(o, false, [&](int64_t i0, int64_t i1) {
        T* const from = y + o * s.outer + i0 * s.inner;
        const bool rows = g.columns;
        const int64_t lines = rows ? i1 - i0 : g.channels, step = rows ? s.inner : s.channel;
        const size_t bytes = (rows ? g.channels : i1 - i0) * sizeof(T);
        for (int64_t i = 0; i < lines; ++i) std::memset(static_cast<void*>(from + i * step), 0, bytes);
      });
    }
  });
}

// y of channels [c0, c1), which are all of them where columns are taken.
template <class T, class After = Unactivated>
inline void normalise(const Geometry& g, const Reader<T>& x, T* y, const NormaliseCoefficients<T>& coefficients,
                      int64_t c0, int64_t c1, Order order, const Parallel& par, const After& after = After()) {
  g.columns ? normalise_columns(g, x, y, coefficients, order, par, after)
            : normalise_planes(g, x, y, coefficients, c0, c1, order, par, after);
}

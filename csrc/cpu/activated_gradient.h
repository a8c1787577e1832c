// The gradient of activated.h's y with respect to the activation's argument, as a source of dy for gradient.h and
// grad_input.h: a row or run at a time in a buffer or, where it goes by a sign, in registers. And the plain source,
// rows of a tensor. Included inside the level's namespace.

// A value of a buffer that holds gradients in the compute type, pack by pack, whole packs long.
template <class S>
struct Computed {
  S value;
};
template <class S>
struct Compute<Computed<S>> : Compute<S> {};
template <int N, class S>
inline Vec<S, N> widen(const Computed<S>* p) {
  return load_raw<Vec<S, N>>(p);
}

// What all rows of a task, or all of a run, share at a pack of columns: the coefficients of gradients that depend on x.
// Read once for several packs, as one of them in registers is one load less for each.
template <class T>
using Shared = VecC<T>[3][kPackVectors<T>];
template <class T, class E>
__attribute__((always_inline)) inline void load_shared(const E*, int64_t, Shared<T>&) {}

// A pack of gradients from column v on, with `left` columns there where it is a tail: of T as it lies in memory, or
// computed. `x` is the pack of the input there, for gradients that depend on it.
template <class T, class Tail>
__attribute__((always_inline)) inline void load_gradient(const T* row, int64_t v, int64_t left, Tail tail,
                                                         const Shared<T>&, const VecC<T>*, VecC<T>* g) {
  load_pack_at(row, v, left, tail, g);
}
template <class T, class Tail>
__attribute__((always_inline)) inline void load_gradient(const Computed<Scalar<T>>* row, int64_t v, int64_t, Tail,
                                                         const Shared<T>&, const VecC<T>*, VecC<T>* g) {
  for (int u = 0; u < kPackVectors<T>; ++u) g[u] = load_raw<VecC<T>>(row + v + u * Compute<T>::lanes);
}

// act'((x - mean_hi) * scale + shift + residual) * dy, with forward's very coefficients.
template <class T, bool kRun, class Act>
inline void gradient_piece(const Piece<T>& p, const T* dy, const T* x, const T* residual, Scalar<T>* out,
                           const Act& act) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>, kLanes = Compute<T>::lanes;
  for_vectors<kN>(p.n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer[kN];
    const auto load = [&](const T* from, VecC<T>* to) __attribute__((always_inline)) {
      load_pack(tail ? padded<kN>(from + v, p.n - v, load_one<T>(from + p.n - 1), buffer) : from + v, to);
    };
    VecC<T> g[kVectors], value[kVectors], other[kVectors];
    load(dy, g);
    load(x, value);
    if (residual) load(residual, other);
    for (int u = 0; u < kVectors; ++u) {
      VecC<T> k[3];
      load_coefficients<T, kRun>(p, v + u * kLanes, k);
      value[u] = normalise<T>(value[u], k[0], k[1], k[2]);
      if (residual) value[u] += other[u];
      store_raw(out + v + u * kLanes, act.gradient(g[u], value[u]));
    }
  });
}

// Bit i of a pack's bits for each lane of its vector u.
template <class T, class M>
__attribute__((always_inline)) inline M lane_bits(int u) {
  M one;
  for (int j = 0; j < Compute<T>::lanes; ++j) one[j] = 1u << (j * kPackVectors<T> + u);
  return one;
}

// The same by forward's mask.
template <class T, class Act>
inline void masked_gradient_piece(int64_t n, const T* dy, const uint8_t* mask, int64_t at, Scalar<T>* out,
                                  const Act& act) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>, kLanes = Compute<T>::lanes;
  using M = typename Words<Scalar<T>, VecC<T>>::type;
  for_vectors<kN>(n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    VecC<T> g[kVectors];
    load_pack_at(dy, v, n - v, tail, g);
    const uint32_t bits = static_cast<uint32_t>(load_bits(mask + (at + v) / 8) >> (at + v) % 8);
    for (int u = 0; u < kVectors; ++u) {
      const auto passes = ((M{} + bits) & lane_bits<T, M>(u)) != 0;
      store_raw(out + v + u * kLanes, passes ? g[u] : act.blocked(g[u]));
    }
  });
}

// Gradients of a buffer, times the scale if wanted, to a tensor of the output's strides.
template <class T, bool kRun, bool kStream>
inline void store_part(const Piece<T>& p, const Scalar<T>* g, bool scaled, T* out) {
  constexpr int kN = kPack<T>, kVectors = kPackVectors<T>, kLanes = Compute<T>::lanes;
  for_vectors<kN>(p.n, [&](int64_t v, auto tail) __attribute__((always_inline)) {
    T buffer[kN];
    VecC<T> value[kVectors];
    for (int u = 0; u < kVectors; ++u) {
      value[u] = load_raw<VecC<T>>(g + v + u * kLanes);
      if (scaled) value[u] *= kRun ? VecC<T>{} + *p.c[1] : load_raw<VecC<T>>(p.c[1] + v + u * kLanes);
    }
    if (kStream && !tail) return stream_pack(out + v, value);
    store_pack(tail ? buffer : out + v, value);
    if (tail) store_first(buffer, p.n - v, out + v);
  });
}
template <class T, bool kRun>
inline void store_piece(const Piece<T>& p, const Scalar<T>* g, bool scaled, T* out, bool stream) {
  for_streamed(stream, kPackVectors<T> > 1, out, p.n, [&](auto streamed, int64_t v, int64_t n) {
    store_part<T, kRun, decltype(streamed)::value>(part_of<kRun>(p, v, n), g + v, scaled, out + v);
  });
}

// The gradient of the activation's argument: what backward of the batch norm takes as its grad_output. As it is made,
// piece by piece, it can go to grad_residual and, times the scale, to the dx of an evaluation.
template <class T>
class ActivatedGradient {
 public:
  using Element = Computed<Scalar<T>>;

  ActivatedGradient(const Geometry& g, const BackwardArgs& a, int dy, int residual)
      : g_(g),
        e_(a.epilogue),
        dy_(g, dy, a.dy.data),
        residual_(g, residual, a.epilogue.residual.data),
        coefficients_{static_cast<Scalar<T>*>(const_cast<void*>(a.saved)) + kSavedNormalise * a.shape.c, a.shape.c} {}
  // Outputs that are written with the pieces; nullptr for none.
  ActivatedGradient with_outputs(T* grad_residual, T* scaled, bool stream) const {
    ActivatedGradient r = *this;
    r.grad_residual_ = grad_residual;
    r.scaled_ = scaled;
    r.stream_ = stream && !g_.masked();
    return r;
  }

  static constexpr bool direct() { return false; }
  const ActivatedGradient& in_order() const { return *this; }

  class Rows {
   public:
    // in_order: as memory lies and not in packs.
    Rows(const ActivatedGradient& from, const ColumnTask& t, bool in_order = false)
        : from_(from), t_(t), in_order_(in_order) {
      from.coefficients_.template expand_packs<T>(from.g_, t.v0, t.n, expanded_, c_);
    }
    const Element* operator()(int64_t r, const T* x, Element* buffer) const {
      T memory[2 * kBlockColumns];
      const T* dy = from_.dy_.next_row(r, t_.v0, t_.n, memory);
      const T* residual =
          from_.has_residual() ? from_.residual_.next_row(r, t_.v0, t_.n, memory + kBlockColumns) : nullptr;
      const Piece<T> p{t_.n, {c_[0], c_[1], c_[2]}, from_.g_.row_offset(0, r) + t_.v0};
      from_.template piece<false>(p, dy, x, residual, buffer, in_order_);
      if (from_.g_.masked()) clear(r, p.at);
      return buffer;
    }

   private:
    // Zeros where the outputs' row r does not count.
    [[gnu::noinline]] void clear(int64_t r, int64_t at) const {
      for (T* const out : {from_.grad_residual_, from_.scaled_}) {
        if (out) Pattern(from_.g_, r).put(out + at, t_.n, out + at, false);
      }
    }
    const ActivatedGradient& from_;
    const ColumnTask& t_;
    bool in_order_;
    alignas(64) Scalar<T> expanded_[3 * kBlockColumns];
    const Scalar<T>* c_[3];
  };

  const Element* run(int64_t o, int64_t c, int64_t i0, int64_t n, const T* x, Element* buffer,
                     bool in_order = false) const {
    T memory[2 * kGather];
    const T* dy = dy_.run(o, c, i0, n, memory);
    const T* residual = has_residual() ? residual_.run(o, c, i0, n, memory + kGather) : nullptr;
    const Piece<T> p{n,
                     {coefficients_.row(0) + c, coefficients_.row(1) + c, coefficients_.row(2) + c},
                     o * g_.strides[0].outer + c * g_.strides[0].channel + i0};
    piece<true>(p, dy, x, residual, buffer, in_order);
    return buffer;
  }

 private:
  bool has_residual() const { return e_.residual && !e_.mask; }

  template <bool kRun>
  void piece(const Piece<T>& p, const T* dy, const T* x, const T* residual, Element* buffer, bool in_order) const {
    Scalar<T>* out = reinterpret_cast<Scalar<T>*>(buffer);
    const auto slope = static_cast<Scalar<T>>(e_.negative_slope);
    with_activation<Scalar<T>>(e_.activation, slope, [&](const auto& act) {
      if constexpr (std::decay_t<decltype(act)>::kBySign) {
        if (e_.mask) return masked_gradient_piece<T>(p.n, dy, e_.mask, p.at, out, act);
      }
      gradient_piece<T, kRun>(p, dy, x, residual, out, act);
    });
    // Two vectors are read at a time; what lies behind the piece counts as zero.
    const int64_t size = packed_size<T>(p.n), end = (p.n + 2 * kLanesF - 1) / (2 * kLanesF) * (2 * kLanesF);
    clear_tail(out, p.n, std::max(size, end));
    if (grad_residual_) store_piece<T, kRun>(p, out, false, grad_residual_ + p.at, stream_);
    if (scaled_) store_piece<T, kRun>(p, out, true, scaled_ + p.at, stream_);
    if (in_order && kPackVectors<T> > 1) {
      Scalar<T> packs[kPiece];
      std::copy(out, out + size, packs);
      from_packs<T>(packs, p.n, out);
    }
  }
  template <class U, class Act, bool kMask>
  friend class SignGradient;

  // Elements [n, end) of a buffer of packs.
  static void clear_tail(Scalar<T>* out, int64_t n, int64_t end) {
    const int64_t whole = n / kPack<T> * kPack<T>;
    for (int64_t v = whole; v < std::min(end, packed_size<T>(n)); ++v) {
      const int64_t lane = (v - whole) % Compute<T>::lanes, u = (v - whole) / Compute<T>::lanes;
      if (whole + lane * kPackVectors<T> + u >= n) out[v] = 0;
    }
    for (int64_t v = packed_size<T>(n); v < end; ++v) out[v] = 0;
  }

  const Geometry& g_;
  const Epilogue& e_;
  Reader<T> dy_, residual_;
  Coefficients<Scalar<T>, 3> coefficients_;
  T *grad_residual_ = nullptr, *scaled_ = nullptr;
  bool stream_ = false;
};

// What a mask does not pass, of ReLU and LeakyReLU in one compiled body.
template <class S>
struct Blocked {
  S slope;
  bool zero;
  template <class V>
  V blocked(V dy) const {
    return zero ? V{} : dy * slope;
  }
};

// The same gradient where it goes by a sign, taken in registers: a row of grad_output, and either the coefficients or
// the mask. Columns of a pack behind the row's end give zero.
template <class T, class Act, bool kMask, bool kRun>
struct SignRow {
  const T* dy;
  Piece<T> piece;
  const uint8_t* mask;
  T* copy;  // grad_residual's row, or nullptr
  Act act;

  // From column v on.
  SignRow operator+(int64_t v) const {
    return {dy + v, part_of<kRun>(piece, v, piece.n - v), mask, copy ? copy + v : nullptr, act};
  }
};

template <class T, class Act, bool kRun>
__attribute__((always_inline)) inline void load_shared(const SignRow<T, Act, true, kRun>&, int64_t, Shared<T>&) {}
template <class T, class Act, bool kRun>
__attribute__((always_inline)) inline void load_shared(const SignRow<T, Act, false, kRun>& row, int64_t v,
                                                       Shared<T>& shared) {
  for (int u = 0; u < kPackVectors<T>; ++u) {
    VecC<T> k[3];
    load_coefficients<T, kRun>(row.piece, v + u * Compute<T>::lanes, k);
    for (int i = 0; i < 3; ++i) shared[i][u] = k[i];
  }
}

template <class T, class Act, bool kMask, bool kRun, class Tail>
__attribute__((always_inline)) inline void load_gradient(const SignRow<T, Act, kMask, kRun>& row, int64_t v,
                                                         int64_t left, Tail tail, const Shared<T>& shared,
                                                         const VecC<T>* x, VecC<T>* g) {
  constexpr int kVectors = kPackVectors<T>;
  load_gradient<T>(row.dy, v, left, tail, shared, x, g);
  if constexpr (kMask) {
    using M = typename Words<Scalar<T>, VecC<T>>::type;
    const int64_t at = row.piece.at + v;
    const uint32_t bits = static_cast<uint32_t>(load_bits(row.mask + at / 8) >> at % 8);
    for (int u = 0; u < kVectors; ++u) {
      const auto passes = ((M{} + bits) & lane_bits<T, M>(u)) != 0;
      g[u] = passes ? g[u] : row.act.blocked(g[u]);
    }
  } else {
    for (int u = 0; u < kVectors; ++u) {
      g[u] = row.act.gradient(g[u], normalise<T>(x[u], shared[0][u], shared[1][u], shared[2][u]));
    }
  }
}

// What grad_input.h calls with each pack: a gradient that is an output itself is written there.
template <class T, class Tail>
inline void keep_gradient(const T*, int64_t, int64_t, Tail, const VecC<T>*) {}
template <class T, class Tail>
inline void keep_gradient(const Computed<Scalar<T>>*, int64_t, int64_t, Tail, const VecC<T>*) {}
template <class T, class Act, bool kMask, bool kRun, class Tail>
__attribute__((always_inline)) inline void keep_gradient(const SignRow<T, Act, kMask, kRun>& row, int64_t v,
                                                         int64_t left, Tail tail, const VecC<T>* g) {
  if (!row.copy) return;
  T buffer[kPack<T>];
  store_pack(tail ? buffer : row.copy + v, g);
  if (tail) store_first(buffer, left, row.copy + v);
}

// As a source of gradients; what needs them in double or in order asks the ActivatedGradient that it is made of.
template <class T, class Act, bool kMask>
class SignGradient {
 public:
  using Element = T;
  using Row = SignRow<T, Act, kMask, false>;
  using Run = SignRow<T, Act, kMask, true>;

  SignGradient(const ActivatedGradient<T>& from, const Act& act, T* grad_residual)
      : from_(from), act_(act), grad_residual_(grad_residual) {}
  const ActivatedGradient<T>& in_order() const { return from_; }
  bool direct() const { return from_.dy_.direct(); }

  class Rows {
   public:
    Rows(const SignGradient& source, const ColumnTask& t) : source_(source), t_(t) {
      if (!kMask) source.from_.coefficients_.template expand_packs<T>(source.from_.g_, t.v0, t.n, expanded_, c_);
    }
    Row operator()(int64_t r, const T*, T* buffer) const {
      const auto& from = source_.from_;
      const int64_t at = from.g_.row_offset(0, r) + t_.v0;
      return source_.template make<false>(from.dy_.next_row(r, t_.v0, t_.n, buffer), {t_.n, {c_[0], c_[1], c_[2]}, at});
    }

   private:
    const SignGradient& source_;
    const ColumnTask& t_;
    alignas(64) Scalar<T> expanded_[3 * kBlockColumns];
    const Scalar<T>* c_[3] = {};
  };

  Run run(int64_t o, int64_t c, int64_t i0, int64_t n, const T*, T* buffer, bool = false) const {
    const auto& k = from_.coefficients_;
    const int64_t at = o * from_.g_.strides[0].outer + c * from_.g_.strides[0].channel + i0;
    return make<true>(from_.dy_.run(o, c, i0, n, buffer), {n, {k.row(0) + c, k.row(1) + c, k.row(2) + c}, at});
  }

 private:
  template <bool kRun>
  SignRow<T, Act, kMask, kRun> make(const T* dy, const Piece<T>& p) const {
    return {dy, p, from_.e_.mask, grad_residual_ ? grad_residual_ + p.at : nullptr, act_};
  }
  const ActivatedGradient<T>& from_;
  Act act_;
  T* grad_residual_;
};

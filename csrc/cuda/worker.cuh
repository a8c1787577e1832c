// A block at work: the tensors that it reads and writes, its sweeps over their rows.
#pragma once

#include "activated.cuh"
#include "backward.cuh"
#include "double_backward.cuh"
#include "forward.cuh"

namespace bn_ext {
namespace cuda {

constexpr int kCopyGroups = 4;

// Tensors of the arguments in the order of the plan's operands.
template <class Op>
struct Tensors {
  using T = typename Op::Element;
  const T* in[Op::kInputs];
  T* out[Op::kOutputs];  // null: not wanted

  __device__ explicit Tensors(const ForwardArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out{static_cast<T*>(a.y.data)} {
    if constexpr (Op::kInputs == 2) in[1] = static_cast<const T*>(a.epilogue.residual.data);
  }
  __device__ explicit Tensors(const BackwardArgs& a) : in{static_cast<const T*>(a.dy.data)} {
    if constexpr (Op::kInputs >= 2) in[1] = static_cast<const T*>(a.x.data);
    if constexpr (Op::kInputs == 3) in[2] = static_cast<const T*>(a.epilogue.residual.data);
    if constexpr (Op::kOutputs == 2) out[0] = static_cast<T*>(a.grad_residual.data);
    out[Op::kOutputs - 1] = static_cast<T*>(a.dx.data);
  }
  __device__ explicit Tensors(const DoubleBackwardArgs& a)
      : in{static_cast<const T*>(a.dy.data), static_cast<const T*>(a.x.data), static_cast<const T*>(a.gg_x.data)},
        out{static_cast<T*>(a.grad_dy.data), static_cast<T*>(a.dx.data)} {}

  __device__ bool wanted() const {
    bool any = false;
    for (int o = 0; o < Op::kOutputs; ++o) any |= out[o] != nullptr;
    return any;
  }
};

// What an operation reads at a row's place in the output, beside its inputs (Op::beside), and whether its sums need it
// too; whether it leaves a mask; whether its output may be one of its inputs.
struct Nothing {};
template <class Op, class = void>
struct BesideOf {
  using Type = Nothing;
  static constexpr bool kSums = false;
};
template <class Op>
struct BesideOf<Op, std::void_t<typename Op::Beside>> {
  using Type = typename Op::Beside;
  static constexpr bool kSums = Op::kSumsBeside;
};
template <class Op, class = void>
struct leaves_mask : std::false_type {};
template <class Op>
struct leaves_mask<Op, std::void_t<decltype(Op::kMarks)>> : std::bool_constant<Op::kMarks> {};
template <class Op, class = void>
struct in_place : std::false_type {};
template <class Op>
struct in_place<Op, std::void_t<decltype(Op::kInPlace)>> : std::bool_constant<Op::kInPlace> {};

// A block at work on its part of a tile.
template <class Op>
struct Worker {
  using T = typename Op::Element;
  using A = typename Op::A;
  using Beside = typename BesideOf<Op>::Type;
  static constexpr int V = Op::kVector, K = Op::kInputs, U = Op::kUnroll;
  static constexpr bool kBeside = !std::is_same_v<Beside, Nothing>, kSumsBeside = BesideOf<Op>::kSums;

  const Plan& plan;
  const typename Op::Args& args;
  const Place<V> place;
  const Tensors<Op> tensors;
  const Slots<T, V, K> slots;

  __device__ Worker(const Plan& p, const typename Op::Args& a, Vec<T, V>* shared)
      : plan(p), args(a), place(p), tensors(a), slots{shared} {}

  __device__ int kept() const { return min(plan.kept, place.rows); }

  template <int With>
  __device__ __forceinline__ Cursor<K, With> cursor(int row) const {
    return Cursor<K, With>(plan, place, place.begin + static_cast<int64_t>(row) * plan.ty);
  }

  __device__ __forceinline__ void put(int64_t offset, const Vec<T, V>& v, int output = 0) const {
    if (plan.stream_output) {
      store<Cache::kLastUse>(tensors.out[output] + offset, v);
    } else {
      store(tensors.out[output] + offset, v);
    }
  }
  __device__ __forceinline__ void put(int64_t offset, const Results<T, V, Op::kOutputs>& r) const {
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) {
      if (tensors.out[o] != nullptr) put(offset, r.v[o], o);
    }
  }
  // Element i alone.
  __device__ __forceinline__ void put_one(int64_t offset, const Vec<T, V>& v, int i, int output = 0) const {
    store(tensors.out[output] + offset, Vec<T, 1>{{v[i]}});
  }
  __device__ __forceinline__ void put_one(int64_t offset, const Results<T, V, Op::kOutputs>& r, int i) const {
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) {
      if (tensors.out[o] != nullptr) put_one(offset, r.v[o], i, o);
    }
  }

  template <int N>
  __device__ __forceinline__ Beside beside(int64_t offset) const {
    if constexpr (kBeside) {
      return Op::template beside<N>(args, offset);
    } else {
      return {};
    }
  }

  // Outputs of a row of inputs, at `offset`; with N = 1 of a single element, for column i. The mask gets `marked`
  // alone.
  template <int N>
  __device__ __forceinline__ auto applied(const Vec<T, V> (&in)[K], const Beside& beside,
                                          const A (&coefficient)[Op::kCoefficients][V], int64_t offset, int i = 0,
                                          unsigned marked = ~0u) const {
    const auto apply = [&](auto... bits) {
      if constexpr (kBeside) {
        return Op::apply(in, beside, coefficient, args, bits...);
      } else {
        return Op::apply(in, coefficient, args, bits...);
      }
    };
    if constexpr (leaves_mask<Op>::value) {
      unsigned bits = 0;
      const auto result = apply(&bits);
      if (args.epilogue.mask != nullptr) store_mask<T, V, N>(args.epilogue.mask, offset, bits & marked, i);
      return result;
    } else {
      return apply();
    }
  }

  template <int N, Cache C>
  static __device__ __forceinline__ Vec<T, N> fetch(const T* p) {
    if constexpr (in_place<Op>::value) {
      return load_coherent<N>(p);
    } else {
      return load<N, C>(p);
    }
  }

  // Some rows of the thread from memory, in registers, and their places in the output.
  struct Rows {
    Chunk<T, V, K, U> chunk;
    int64_t out[U];
    Beside beside[U];
  };
  template <Cache C, bool With, bool kReadBeside, bool Back>
  __device__ __forceinline__ void load_rows(Cursor<K, With>* c, int rows, Rows* to) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < rows) {
#pragma unroll
        for (int k = 0; k < K; ++k) to->chunk.v[u][k] = fetch<V, C>(tensors.in[k] + c->offset[k]);
        if constexpr (With) to->out[u] = c->output();
        if constexpr (kReadBeside) to->beside[u] = beside<V>(to->out[u]);
        if (Back) {
          c->retreat(plan);
        } else {
          c->advance(plan);
        }
      }
    }
  }

  // Groups of copies end at whole chunks: the mean of the first chunk is what sums start from, and should be of many.
  static __device__ int group_end(int group, int stay) {
    return min(stay, ((group + 1) * stay / kCopyGroups + U - 1) / U * U);
  }

  // Starts the copies of the rows that stay on chip.
  __device__ __forceinline__ void copy_kept(int stay) const {
    if constexpr (V > 1) {
      auto c = cursor<false>(0);
      for (int g = 0, r = 0; g < kCopyGroups; ++g) {
        for (const int end = group_end(g, stay); r < end; ++r) {
#pragma unroll
          for (int k = 0; k < K; ++k) copy_async<sizeof(Vec<T, V>)>(&slots.at(r, k), tensors.in[k] + c.offset[k]);
          c.advance(plan);
        }
        copy_async_commit();
      }
    }
  }

  // Calls use(chunk, rows, beside) with all rows of the thread: those that do not stay, straight from memory, then the
  // kept ones as they arrive. With: write(offset, inputs) follows for each row; nothing is kept then.
  template <bool With, class Use, class Write>
  __device__ __forceinline__ void first_sweep(const Use& use, const Write& write) const {
    const int stay = kept();
    if constexpr (!With) copy_kept(stay);
    if (stay < place.rows) {
      Rows some;
      auto c = cursor < With || kSumsBeside > (stay);
      int r = stay;
      for (; r + U <= place.rows; r += U) {
        load_rows<Cache::kStreaming, With || kSumsBeside, kSumsBeside, false>(&c, U, &some);
        use(some.chunk, U, some.beside);
        if (With) {
#pragma unroll
          for (int u = 0; u < U; ++u) write(some.out[u], some.chunk.v[u]);
        }
      }
      if (const int rows = place.rows - r; rows > 0) {
        load_rows<Cache::kStreaming, With || kSumsBeside, kSumsBeside, false>(&c, rows, &some);
        use(some.chunk, rows, some.beside);
        if (With) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            if (u < rows) write(some.out[u], some.chunk.v[u]);
          }
        }
      }
    }
    if constexpr (!With) {
      if (stay > 0) take_kept(stay, use);
    }
  }

  template <class Use>
  __device__ __forceinline__ void take_kept(int stay, const Use& use) const {
    Chunk<T, V, K, U> chunk;
    Beside beside_of[U];
    auto c = cursor<kSumsBeside>(0);
    for (int g = 0, r = 0; g < kCopyGroups; ++g) {
      wait_for_group(g);  // own copies only: no barrier
      const int end = group_end(g, stay);
      while (r < end) {
        const int rows = min(U, end - r);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (u < rows) {
#pragma unroll
            for (int k = 0; k < K; ++k) chunk.v[u][k] = slots.at(r + u, k);
            if constexpr (kSumsBeside) {
              beside_of[u] = beside<V>(c.output());
              c.advance(plan);
            }
          }
        }
        use(chunk, rows, beside_of);
        r += rows;
      }
    }
  }

  static __device__ __forceinline__ void wait_for_group(int g) {
    static_assert(kCopyGroups == 4, "one case each");
    switch (g) {
      case 0:
        return copy_async_wait<3>();
      case 1:
        return copy_async_wait<2>();
      case 2:
        return copy_async_wait<1>();
      default:
        return copy_async_wait<0>();
    }
  }

  // The rows read last come first, from the second-level cache; then those that stayed on chip.
  __device__ __forceinline__ void second_sweep(const A (&coefficient)[Op::kCoefficients][V]) const {
    const int stay = kept();
    if (stay < place.rows) {
      auto c = cursor<true>(place.rows - 1);
      Rows some;
      int r = place.rows;
      for (; r - U >= stay; r -= U) {
        load_rows<Cache::kLastUse, true, kBeside, true>(&c, U, &some);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          put(some.out[u], applied<V>(some.chunk.v[u], some.beside[u], coefficient, some.out[u]));
        }
      }
      if (const int rows = r - stay; rows > 0) {
        load_rows<Cache::kLastUse, true, kBeside, true>(&c, rows, &some);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (u < rows) put(some.out[u], applied<V>(some.chunk.v[u], some.beside[u], coefficient, some.out[u]));
        }
      }
    }
    if (stay > 0) {
      auto c = cursor<true>(0);
#pragma unroll 4
      for (int r = 0; r < stay; ++r) {
        Vec<T, V> in[K];
#pragma unroll
        for (int k = 0; k < K; ++k) in[k] = slots.at(r, k);
        put(c.output(), applied<V>(in, beside<V>(c.output()), coefficient, c.output()));
        c.advance(plan);
      }
    }
  }

  // Calls f(i, offset of the output, inputs) for the thread's columns of the incomplete last row.
  template <class F>
  __device__ __forceinline__ void for_tail(const F& f) const {
    if (place.tail == 0) return;
    const Cursor<K, true> c(plan, place, plan.rows);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < place.tail) {
        Vec<T, 1> in[K];
#pragma unroll
        for (int k = 0; k < K; ++k) in[k] = fetch<1, Cache::kDefault>(tensors.in[k] + c.offset[k] + i);
        f(i, c.output() + i, in);
      }
    }
  }

  static __device__ __forceinline__ Vec<T, V> spread(const Vec<T, 1>& one) {
    Vec<T, V> all;
#pragma unroll
    for (int e = 0; e < V; ++e) all[e] = one[0];
    return all;
  }

  __device__ __forceinline__ void apply_tail(const A (&coefficient)[Op::kCoefficients][V]) const {
    for_tail([&](int i, int64_t offset, const Vec<T, 1>(&in)[K]) {
      Vec<T, V> wide[K];
#pragma unroll
      for (int k = 0; k < K; ++k) wide[k] = spread(in[k]);
      put_one(offset, applied<1>(wide, beside<1>(offset), coefficient, offset, i), i);
    });
  }

  // Coefficients of the thread's columns, from the tile's in shared memory: [which][channel].
  __device__ void read_coefficients(const A* tile, int channels, A (&coefficient)[Op::kCoefficients][V]) const {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int j = place.local(plan, i);
      const bool there = place.active && j < channels;
#pragma unroll
      for (int k = 0; k < Op::kCoefficients; ++k) coefficient[k][i] = there ? tile[k * channels + j] : A(0);
    }
  }
};

}  // namespace cuda
}  // namespace bn_ext

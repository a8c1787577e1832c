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
      : in{static_cast<const T*>(a.x.data)}, out{static_cast<T*>(a.y.data)} {}
  __device__ explicit Tensors(const InferenceArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out{static_cast<T*>(a.y.data)} {}
  __device__ explicit Tensors(const ActivatedInferenceArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out{static_cast<T*>(a.y.data)} {
    if constexpr (Op::kInputs == 2) in[1] = static_cast<const T*>(a.epilogue.residual.data);
  }
  __device__ explicit Tensors(const ActivatedBackwardArgs& a)
      : in{static_cast<const T*>(a.dy.data), static_cast<const T*>(a.x.data)},
        out{static_cast<T*>(a.grad_residual.data)} {}
  __device__ explicit Tensors(const BackwardArgs& a)
      : in{static_cast<const T*>(a.dy.data)}, out{static_cast<T*>(a.dx.data)} {
    if constexpr (Op::kInputs == 2) in[1] = static_cast<const T*>(a.x.data);
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

// Whether an operation reads a residual of the output's strides where it writes.
template <class Op, class = void>
struct reads_beside : std::false_type {};
template <class Op>
struct reads_beside<Op, std::void_t<decltype(Op::kBeside)>> : std::bool_constant<Op::kBeside> {};

// A block at work on its part of a tile.
template <class Op>
struct Worker {
  using T = typename Op::Element;
  using A = typename Op::A;
  static constexpr int V = Op::kVector, K = Op::kInputs, U = Op::kUnroll;

  const Plan& plan;
  const typename Op::Args& args;
  const Place<V> place;
  const Tensors<Op> tensors;
  const Slots<T, V, K> slots;

  __device__ Worker(const Plan& p, const typename Op::Args& a, Vec<T, V>* shared)
      : plan(p), args(a), place(p), tensors(a), slots{shared} {}

  __device__ int kept() const { return min(plan.kept, place.rows); }

  template <bool With>
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

  // Outputs of a row of inputs, at `offset`, where an operation with kBeside reads another N elements.
  template <int N>
  __device__ __forceinline__ auto applied(const Vec<T, V> (&in)[K], const A (&coefficient)[Op::kCoefficients][V],
                                          int64_t offset) const {
    if constexpr (reads_beside<Op>::value) {
      const auto some = load<N, Cache::kLastUse>(static_cast<const T*>(args.epilogue.residual.data) + offset);
      Vec<T, V> beside;
#pragma unroll
      for (int i = 0; i < V; ++i) beside[i] = some[N == 1 ? 0 : i];
      return Op::apply(in, beside, coefficient, args);
    } else {
      return Op::apply(in, coefficient, args);
    }
  }

  // Some rows of the thread from memory, in registers; `out` gets where their outputs go.
  template <Cache C, bool With, bool Back>
  __device__ __forceinline__ void load_rows(Cursor<K, With>* c, int rows, Chunk<T, V, K, U>* chunk,
                                            int64_t* out) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      if (u < rows) {
#pragma unroll
        for (int k = 0; k < K; ++k) chunk->v[u][k] = load<V, C>(tensors.in[k] + c->offset[k]);
        if (With) out[u] = c->output();
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

  // Calls use(chunk, rows) with all rows of the thread: those that do not stay, straight from memory, then the kept
  // ones as they arrive. With: write(offset, inputs) follows for each row; nothing is kept then.
  template <bool With, class Use, class Write>
  __device__ __forceinline__ void first_sweep(const Use& use, const Write& write) const {
    const int stay = kept();
    Chunk<T, V, K, U> chunk;
    int64_t out[U];
    if constexpr (!With) copy_kept(stay);
    if (stay < place.rows) {
      auto c = cursor<With>(stay);
      int r = stay;
      for (; r + U <= place.rows; r += U) {
        load_rows<Cache::kStreaming, With, false>(&c, U, &chunk, out);
        use(chunk, U);
        if (With) {
#pragma unroll
          for (int u = 0; u < U; ++u) write(out[u], chunk.v[u]);
        }
      }
      if (const int rows = place.rows - r; rows > 0) {
        load_rows<Cache::kStreaming, With, false>(&c, rows, &chunk, out);
        use(chunk, rows);
        if (With) {
#pragma unroll
          for (int u = 0; u < U; ++u) {
            if (u < rows) write(out[u], chunk.v[u]);
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
          }
        }
        use(chunk, rows);
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
      Chunk<T, V, K, U> chunk;
      int64_t out[U];
      int r = place.rows;
      for (; r - U >= stay; r -= U) {
        load_rows<Cache::kLastUse, true, true>(&c, U, &chunk, out);
#pragma unroll
        for (int u = 0; u < U; ++u) put(out[u], applied<V>(chunk.v[u], coefficient, out[u]));
      }
      if (const int rows = r - stay; rows > 0) {
        load_rows<Cache::kLastUse, true, true>(&c, rows, &chunk, out);
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (u < rows) put(out[u], applied<V>(chunk.v[u], coefficient, out[u]));
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
        put(c.output(), applied<V>(in, coefficient, c.output()));
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
        for (int k = 0; k < K; ++k) in[k] = load<1>(tensors.in[k] + c.offset[k] + i);
        f(i, c.output() + i, in);
      }
    }
  }

  __device__ __forceinline__ void apply_tail(const A (&coefficient)[Op::kCoefficients][V]) const {
    for_tail([&](int i, int64_t offset, const Vec<T, 1>(&in)[K]) {
      Vec<T, V> wide[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int e = 0; e < V; ++e) wide[k][e] = in[k][0];
      }
      put_one(offset, applied<1>(wide, coefficient, offset), i);
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

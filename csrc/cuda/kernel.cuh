// The two kernels: one reduces and then applies, with its blocks meeting in between; the other only applies.
#pragma once

#include "activated.cuh"
#include "backward.cuh"
#include "forward.cuh"

namespace bn_ext {
namespace cuda {

namespace cg = cooperative_groups;

constexpr int kReduce = 1, kApply = 2;  // phases of a launch
constexpr int kCopyGroups = 4;

// Tensors of the arguments in the order of the plan's operands.
template <class Op>
struct Tensors {
  using T = typename Op::Element;
  const T* in[Op::kInputs];
  T* out;

  __device__ explicit Tensors(const ForwardArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out(static_cast<T*>(a.y.data)) {}
  __device__ explicit Tensors(const InferenceArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out(static_cast<T*>(a.y.data)) {}
  __device__ explicit Tensors(const ActivatedInferenceArgs& a)
      : in{static_cast<const T*>(a.x.data)}, out(static_cast<T*>(a.y.data)) {
    if constexpr (Op::kInputs == 2) in[1] = static_cast<const T*>(a.epilogue.residual.data);
  }
  __device__ explicit Tensors(const ActivatedBackwardArgs& a)
      : in{static_cast<const T*>(a.dy.data), static_cast<const T*>(a.x.data)},
        out(static_cast<T*>(a.grad_residual.data)) {}
  __device__ explicit Tensors(const BackwardArgs& a)
      : in{static_cast<const T*>(a.dy.data)}, out(static_cast<T*>(a.dx.data)) {
    if constexpr (Op::kInputs == 2) in[1] = static_cast<const T*>(a.x.data);
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

  __device__ __forceinline__ void put(int64_t offset, const Vec<T, V>& v) const {
    if (plan.stream_output) {
      store<Cache::kLastUse>(tensors.out + offset, v);
    } else {
      store(tensors.out + offset, v);
    }
  }

  // Outputs of a row of inputs, at `offset`, where an operation with kBeside reads another N elements.
  template <int N>
  __device__ __forceinline__ Vec<T, V> applied(const Vec<T, V> (&in)[K], const A (&coefficient)[Op::kCoefficients][V],
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
    if constexpr (sizeof(Vec<T, V>) == 16) {
      auto c = cursor<false>(0);
      for (int g = 0, r = 0; g < kCopyGroups; ++g) {
        for (const int end = group_end(g, stay); r < end; ++r) {
#pragma unroll
          for (int k = 0; k < K; ++k) copy_async(&slots.at(r, k), tensors.in[k] + c.offset[k]);
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
      store(tensors.out + offset, Vec<T, 1>{{applied<1>(wide, coefficient, offset)[i]}});
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

// The share of this batch in the running averages. With momentum=None it is 1 / (batches so far + 1), and the counter
// itself counts the blocks that have seen it (above bit 40), so that the last of them may set its new value.
__device__ inline double momentum_of(const ForwardArgs& a, const Plan& p, const int64_t tile) {
  if (a.num_batches_tracked == nullptr) return a.momentum;
  auto* counter = reinterpret_cast<unsigned long long*>(a.num_batches_tracked);
  if (!a.cumulative) {
    if (tile == 0) *counter += 1;
    return a.momentum;
  }
  constexpr int kShift = 40;
  const unsigned long long seen = atomicAdd(counter, 1ull << kShift), batches = (seen & ((1ull << kShift) - 1)) + 1;
  if (static_cast<int64_t>(seen >> kShift) == p.tiles - 1) atomicExch(counter, batches);
  return 1.0 / static_cast<double>(batches);
}
__device__ inline double momentum_of(const BackwardArgs&, const Plan&, int64_t) { return 0; }

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ Plan plan, const __grid_constant__ typename Op::Args args, void* workspace,
                  int phases) {
  using A = typename Op::A;
  using T = typename Op::Element;
  constexpr int V = Op::kVector, K = Op::kInputs;
  auto* const scratch = dynamic_shared<Partial<A>>();      // [V][kThreads], later the coefficients
  auto* const results = scratch + scratch_partials(plan);  // [tile_channels]
  auto* const slots = reinterpret_cast<Vec<T, V>*>(results + plan.tile_channels);
  const Worker<Op> worker(plan, args, slots);
  const auto& place = worker.place;
  const int channels = tile_channels(plan, place.tile);
  const int64_t first_channel = place.tile * plan.tile_channels;
  A* const partials = static_cast<A*>(workspace);  // [splits][channels][4], with plan.pooled [channels][4] behind
  A* const pooled = partials + 4 * plan.splits * plan.channels;
  double momentum = 0;
  if ((phases & kApply) && place.split == 0 && threadIdx.x == 0) momentum = momentum_of(args, plan, place.tile);

  if (phases & kReduce) {
    typename Op::State state;
    Op::begin(&state, plan, place, args);
    const auto use = [&](const auto& chunk, int rows) { Op::add(&state, chunk, rows); };
    if constexpr (Op::kOnePass) {
      A coefficient[1][V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t channel = place.channel(plan, i);
        coefficient[0][i] = place.active && channel < plan.channels ? Op::scale_of(args, channel) : A(0);
      }
      const auto write_row = [&](int64_t offset, const Vec<T, V>(&in)[K]) {
        worker.put(offset, worker.template applied<V>(in, coefficient, offset));
      };
      if (args.dx) {
        worker.template first_sweep<true>(use, write_row);
        worker.apply_tail(coefficient);
      } else {
        worker.template first_sweep<false>(use, write_row);
      }
    } else {
      worker.template first_sweep<false>(use, [](int64_t, const Vec<T, V>(&)[K]) {});
    }
    if (state.batch > 0) Op::flush(&state);
    if (place.ty < plan.ty && place.tx < plan.tx) {
      const Vec<T, 1> none[K] = {};
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (i >= place.tail)
          scratch[i * kThreads + place.ty * plan.tx + place.tx] = Op::partial(&state, i, false, none);
      }
      worker.for_tail([&](int i, int64_t, const Vec<T, 1>(&in)[K]) {
        scratch[i * kThreads + place.ty * plan.tx + place.tx] = Op::partial(&state, i, true, in);
      });
    }
    __syncthreads();  // the threads' partial results are written
    pool_block<Op, V>(plan, scratch, channels, results);
    __syncthreads();  // the block's are, and nobody reads the threads' any more
    if (plan.exchange == Exchange::kGrid || plan.exchange == Exchange::kTwoLaunches) {
      for (int j = static_cast<int>(threadIdx.x); j < channels; j += kThreads) {
        store_partial(partials + 4 * (place.split * plan.channels + first_channel + j), results[j]);
      }
    }
    if (phases == kReduce) return;
  }

  const int lanes = plan.lanes, groups = kThreads / lanes;
  const int group = static_cast<int>(threadIdx.x) / lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const auto merged = [&](bool valid, int64_t splits, int width, int at, const auto& fetch) {
    typename Op::template Merge<A, double> pool;
    if (valid) {
      pool.begin(fetch(0));
      for (int64_t s = at; s < splits; s += width) pool.take(fetch(s));
    }
    pool.combine(width);
    return pool.result();
  };
  if (plan.exchange == Exchange::kGrid) {
    __threadfence();
    cg::this_grid().sync();
    if (plan.pooled) {
      // Every channel once, by some warp of the grid; all lanes of a warp have the same channel.
      const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
      const int at = static_cast<int>(threadIdx.x) % 32;
      for (int64_t c = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32; c < plan.channels; c += warps) {
        const auto fetch = [&](int64_t s) { return load_partial(partials + 4 * (s * plan.channels + c)); };
        const auto total = merged(true, plan.splits, 32, at, fetch);
        if (at == 0) store_partial(pooled + 4 * c, narrowed<Op, A>(total));
      }
      __threadfence();
      cg::this_grid().sync();
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  if (plan.exchange == Exchange::kCluster) cg::this_cluster().sync();
#endif

  const bool needed = (!Op::kOnePass && worker.tensors.out != nullptr) || place.split == 0;
  if (needed) {
    __shared__ double shared_momentum;
    if (threadIdx.x == 0) shared_momentum = momentum;
    __syncthreads();
    for (int base = 0; base < channels; base += groups) {
      const int j = base + group;
      const int64_t channel = first_channel + j;
      const bool valid = j < channels;
      Partial<double> total{};
      if (plan.splits == 1 || plan.pooled) {
        if (valid) total = rounded<double>(plan.pooled ? load_partial(pooled + 4 * channel) : results[j]);
      } else {
        total = merged(valid, plan.splits, lanes, lane, [&](int64_t s) -> Partial<A> {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
          if (plan.exchange == Exchange::kCluster) {
            return *cg::this_cluster().map_shared_rank(&results[j], static_cast<unsigned>(s));
          }
#endif
          return load_partial(partials + 4 * (s * plan.channels + channel));
        });
      }
      Op::finish(plan, args, total, valid, channel, j, channels, lane, place.split == 0, shared_momentum,
                 reinterpret_cast<A*>(scratch));
    }
    __syncthreads();  // the coefficients are written
    if constexpr (!Op::kOnePass) {
      if (worker.tensors.out != nullptr) {
        A coefficient[Op::kCoefficients][V];
        worker.read_coefficients(reinterpret_cast<const A*>(scratch), channels, coefficient);
        worker.second_sweep(coefficient);
        worker.apply_tail(coefficient);
      }
    }
  }
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  // Shared memory stays until no block of the cluster reads it.
  if (plan.exchange == Exchange::kCluster) cg::this_cluster().sync();
#endif
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kVector > 4 ? 2 : 3)
    apply_kernel(const __grid_constant__ Plan plan, const __grid_constant__ typename Op::Args args) {
  using A = typename Op::A;
  A* const tile = dynamic_shared<A>();  // coefficients
  const Worker<Op> worker(plan, args, nullptr);
  const int channels = tile_channels(plan, worker.place.tile);
  for (int j = static_cast<int>(threadIdx.x); j < channels; j += kThreads) {
    Op::coefficients(args, worker.place.tile * plan.tile_channels + j, j, channels, tile);
  }
  __syncthreads();  // the coefficients are written
  A coefficient[Op::kCoefficients][Op::kVector];
  worker.read_coefficients(tile, channels, coefficient);
  worker.second_sweep(coefficient);
  worker.apply_tail(coefficient);
}

}  // namespace cuda
}  // namespace bn_ext

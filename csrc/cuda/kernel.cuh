// The kernels: one reduces and then applies, with its blocks meeting in between, and another one does so for virtual
// batches; the third only applies.
#pragma once

#include "worker.cuh"

namespace bn_ext {
namespace cuda {

namespace cg = cooperative_groups;

constexpr int kReduce = 1, kApply = 2;  // phases of a launch

// Counts `batches` and returns their share in the running averages; with momentum=None, which makes it one over the
// number of batches, that number when the first of these has been counted. The counter then counts also the blocks that
// have seen it (above bit 40, by which its own value is known while it is below 2^39 and not below -2^39), so that the
// last of them may set its new value.
__device__ inline double count_batches(const ForwardArgs& a, const Plan& p, const int64_t tile, int64_t batches) {
  if (a.num_batches_tracked == nullptr) return a.momentum;
  auto* counter = reinterpret_cast<unsigned long long*>(a.num_batches_tracked);
  if (!a.cumulative) {
    if (tile == 0) *counter += batches;
    return a.momentum;
  }
  constexpr int kShift = 40;
  const unsigned long long seen = atomicAdd(counter, 1ull << kShift);
  const int64_t before = static_cast<int64_t>(seen << (64 - kShift)) >> (64 - kShift);
  const auto blocks = static_cast<int64_t>((seen - static_cast<unsigned long long>(before)) >> kShift);
  if (blocks == p.tiles - 1) atomicExch(counter, static_cast<unsigned long long>(before + batches));
  return static_cast<double>(before + 1);
}
// What move_statistics goes by.
__device__ inline double momentum_of(const ForwardArgs& a, const Plan& p, int64_t tile) {
  const double share = count_batches(a, p, tile, 1);
  return a.cumulative && a.num_batches_tracked != nullptr ? 1.0 / share : share;
}
__device__ inline double momentum_of(const PieceArgs<ForwardArgs>& a, const Plan& p, int64_t tile) {
  return a.leaves ? 0 : count_batches(a, p, tile, 1 + a.earlier);
}
__device__ inline double momentum_of(const PaddedPiece<ForwardArgs>& a, const Plan& p, int64_t tile) {
  return a.last ? count_batches(a, p, tile, 1 + a.earlier) : 0;
}
__device__ inline double momentum_of(const BackwardArgs&, const Plan&, int64_t) { return 0; }

template <class Op, class Args>
__device__ __forceinline__ void reduce_block(const Plan& plan, const Args& args, void* workspace, int phases) {
  using A = typename Op::A;
  using T = typename Op::Element;
  constexpr int V = Op::kVector, K = Op::kInputs, G = Op::kGroups;
  auto* const scratch = dynamic_shared<Partial<A>>();      // [V][kThreads], later the coefficients
  auto* const results = scratch + scratch_partials(plan);  // [G][tile_channels]
  auto* const slots = reinterpret_cast<Vec<T, V>*>(results + G * plan.tile_channels);
  const Worker<Op> worker(plan, args, slots);
  const auto& place = worker.place;
  const int channels = tile_channels(plan, place.tile);
  const int64_t first_channel = place.tile * plan.tile_channels;
  A* const partials = static_cast<A*>(workspace);  // [splits][G][channels][4], with plan.pooled [G][channels][4] behind
  A* const pooled = partials + 4 * G * plan.splits * plan.channels;
  double momentum = 0;
  if ((phases & kApply) && place.split == 0 && threadIdx.x == 0) momentum = momentum_of(args, plan, place.tile);

  if (phases & kReduce) {
    typename Op::State state;
    Op::begin(&state, plan, place, args);
    const auto use = [&](const auto& chunk, int rows, const auto* beside) {
      if constexpr (Worker<Op>::kSumsBeside) {
        Op::add(&state, chunk, rows, beside, args);
      } else {
        Op::add(&state, chunk, rows);
      }
    };
    const auto partial_of = [&](int i, int g, bool has_tail, const Vec<T, 1>(&tail)[K], int64_t offset) {
      if constexpr (Worker<Op>::kSumsBeside) {
        return Op::partial(&state, i, g, has_tail, tail,
                           has_tail ? worker.template beside<1>(offset) : typename Op::Beside{}, args);
      } else {
        return Op::partial(&state, i, g, has_tail, tail);
      }
    };
    if constexpr (Op::kOnePass) {
      A coefficient[1][V];
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t channel = place.channel(plan, i);
        coefficient[0][i] = place.active && channel < plan.channels ? Op::scale_of(args, channel) : A(0);
      }
      const auto write_row = [&](int64_t offset, const Vec<T, V>(&in)[K]) {
        worker.put(offset, worker.template applied<V>(in, {}, coefficient, offset));
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
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (place.ty < plan.ty && place.tx < plan.tx) {
        const Vec<T, 1> none[K] = {};
#pragma unroll
        for (int i = 0; i < V; ++i) {
          if (i >= place.tail) scratch[i * kThreads + place.ty * plan.tx + place.tx] = partial_of(i, g, false, none, 0);
        }
        worker.for_tail([&](int i, int64_t offset, const Vec<T, 1>(&in)[K]) {
          scratch[i * kThreads + place.ty * plan.tx + place.tx] = partial_of(i, g, true, in, offset);
        });
      }
      __syncthreads();  // the threads' partial results are written
      pool_block<Op, V>(plan, scratch, channels, results + g * plan.tile_channels);
      __syncthreads();  // the block's are, and nobody reads the threads' any more
    }
    if (plan.exchange == Exchange::kGrid || plan.exchange == Exchange::kTwoLaunches) {
      for (int j = static_cast<int>(threadIdx.x); j < G * channels; j += kThreads) {
        const int g = G == 1 ? 0 : j / channels, at = j - g * channels;
        store_partial(partials + 4 * ((place.split * G + g) * plan.channels + first_channel + at),
                      results[g * plan.tile_channels + at]);
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
      // Every channel's groups once, by some warp of the grid; all lanes of a warp have the same channel.
      const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
      const int at = static_cast<int>(threadIdx.x) % 32;
      for (int64_t c = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32; c < G * plan.channels; c += warps) {
        const auto fetch = [&](int64_t s) { return load_partial(partials + 4 * (s * G * plan.channels + c)); };
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

  const bool needed = (!Op::kOnePass && worker.tensors.wanted()) || place.split == 0;
  if (needed) {
    __shared__ double shared_momentum;
    if (threadIdx.x == 0) shared_momentum = momentum;
    __syncthreads();
    for (int base = 0; base < channels; base += groups) {
      const int j = base + group;
      const int64_t channel = first_channel + j;
      const bool valid = j < channels;
      Partial<double> totals[G] = {};
#pragma unroll
      for (int g = 0; g < G; ++g) {
        if (args.stage.given) break;
        Partial<A>* const of_block = results + g * plan.tile_channels + j;
        if (plan.splits == 1 || plan.pooled) {
          if (!valid) continue;
          const int64_t at = g * plan.channels + channel;
          totals[g] = rounded<double>(plan.pooled ? load_partial(pooled + 4 * at) : *of_block);
          continue;
        }
        totals[g] = merged(valid, plan.splits, lanes, lane, [&](int64_t s) -> Partial<A> {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
          if (plan.exchange == Exchange::kCluster) {
            return *cg::this_cluster().map_shared_rank(of_block, static_cast<unsigned>(s));
          }
#endif
          return load_partial(partials + 4 * ((s * G + g) * plan.channels + channel));
        });
      }
      Op::finish(plan, args, totals, valid, channel, j, channels, lane, place.split == 0, shared_momentum,
                 reinterpret_cast<A*>(scratch));
    }
    __syncthreads();  // the coefficients are written
    if constexpr (!Op::kOnePass) {
      if (worker.tensors.wanted()) {
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
__global__ void __launch_bounds__(kThreads, 2)
    reduce_kernel(const __grid_constant__ Plan plan, const __grid_constant__ typename Op::Args args, void* workspace,
                  int phases) {
  reduce_block<Op>(plan, args, workspace, phases);
}

// A copy of the arguments, which stays in registers as far as it differs.
template <class Args>
__device__ __forceinline__ PieceArgs<Args> piece_of_block(const PieceArgs<Args>& all) {
  return virtual_batch(all, all.first + blockIdx.y);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    pieces_kernel(const __grid_constant__ Plan plan, const __grid_constant__ PieceArgs<typename Op::Args> args,
                  void* workspace, int phases) {
  reduce_block<Op>(plan, piece_of_block<typename Op::Args>(args), workspace, phases);
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

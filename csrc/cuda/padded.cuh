// Padded batches: one kernel sums what counts, of any strides, as a pass in two stages is given it (core/kernels.h's
// Stage), the other writes, and zeros elsewhere.
#pragma once

#include "kernel.cuh"
#include "padded.h"

namespace bn_ext {
namespace cuda {

// The virtual batch of this block's row of the grid.
__device__ inline PaddedArgs piece_of_block(const PaddedArgs& all, int rows) {
  PaddedArgs a = all;
  const int64_t i = all.first + blockIdx.y, n = all.batches.begin(i);
  a.shape.n = all.batches.samples(i, all.shape.n);
  a.x = from_sample(all.x, n, all.dtype);
  a.dy = from_sample(all.dy, n, all.dtype);
  a.valid = from_sample(all.valid, n, all.shape);
  a.saved = saved_from(all, i);
  a.epilogue.residual = from_sample(all.epilogue.residual, n, all.dtype);
  if (all.epilogue.mask) a.epilogue.mask += i * all.epilogue.mask_step;
  a.result += i * all.parts * rows * all.shape.c;
  return a;
}
template <class Args>
__device__ inline PaddedPiece<Args> piece_of_block(const Args& all, int64_t first, int rows) {
  const int64_t i = first + blockIdx.y;
  PaddedPiece<Args> a{virtual_batch(all, i)};
  a.earlier = i;
  a.last = i + 1 == all.batches.count;
  a.given_step = all.stage.parts * rows * all.shape.c;
  if (a.stage.given) a.stage.given += i * a.given_step;
  return a;
}

// A thread's way along the positions (n, l) of its part, ty of them a step.
struct Positions {
  int64_t n, l, left;
  __device__ Positions(const PaddedArgs& a, int64_t part, int at) {
    const int64_t begin = part * a.part_positions, end = min(begin + a.part_positions, a.shape.count());
    n = (begin + at) / a.shape.l;
    l = (begin + at) % a.shape.l;
    left = end - begin - at;
  }
  __device__ bool there() const { return left > 0; }
  __device__ void advance(const PaddedArgs& a) {
    left -= a.ty;
    n += a.ty / a.shape.l;
    l += a.ty % a.shape.l;
    if (l >= a.shape.l) {
      l -= a.shape.l;
      ++n;
    }
  }
};

template <typename T>
__device__ __forceinline__ double value_at(const TensorRef& t, int64_t n, int64_t c, int64_t l) {
  const T* const p = static_cast<const T*>(t.data) + n * t.stride_n + c * t.stride_c + l * t.stride_l;
  return static_cast<double>(widen(load<1>(p)[0]));
}

// Count, mean and squared deviations, in double around the thread's first value.
template <typename T>
struct PaddedMoments {
  using Result = Moments<double>;
  static constexpr int kRows = kMomentRows;
  double count = 0, shift = 0, s1 = 0, s2 = 0;

  __device__ PaddedMoments(const PaddedArgs&, int64_t) {}
  __device__ void add(const PaddedArgs& a, int64_t n, int64_t c, int64_t l) {
    const double x = value_at<T>(a.x, n, c, l);
    if (count == 0 && is_finite(x)) shift = x;
    const double d = x - shift;
    count += 1;
    s1 += d;
    s2 += d * d;
  }
  __device__ Result result() const { return count > 0 ? from_shifted_sums(count, shift, s1, s2) : Result(); }
  static __device__ Result merged(const Result& one, const Result& other) { return merge(one, other); }
};

// Count, sum(dy) and sum(dy * (x - mean)).
template <typename T>
struct PaddedSums {
  using Result = GradientSum;
  static constexpr int kRows = kSumRows;
  using A = typename Accumulate<T>::Type;
  double mean;
  GradientSum sum;

  __device__ PaddedSums(const PaddedArgs& a, int64_t c) {
    const A* const saved = static_cast<const A*>(a.saved) + c;
    mean = static_cast<double>(saved[kSavedMeanHi * a.shape.c]) + saved[kSavedMeanLo * a.shape.c];
  }
  __device__ void add(const PaddedArgs& a, int64_t n, int64_t c, int64_t l) {
    add(value_at<T>(a.dy, n, c, l), value_at<T>(a.x, n, c, l));
  }
  __device__ void add(double dy, double x) {
    sum.count += 1;
    sum.dy += dy;
    sum.dot += dy * (x - mean);
  }
  __device__ Result result() const { return sum; }
  static __device__ Result merged(const Result& one, const Result& other) {
    return {one.count + other.count, one.dy + other.dy, one.dot + other.dot};
  }
};

// The same of g = act' * dy (activated.cuh), which no type rounds in between.
template <typename T, Source kSource>
struct PaddedActivatedSums : PaddedSums<T> {
  using A = typename PaddedSums<T>::A;
  A c[3] = {};  // of the normalisation; not by mask

  __device__ PaddedActivatedSums(const PaddedArgs& a, int64_t channel) : PaddedSums<T>(a, channel) {
    if constexpr (kSource == Source::kMask) return;
    const A* const saved = static_cast<const A*>(a.saved) + channel;
    for (int k = 0; k < 3; ++k) c[k] = saved[(kSavedNormalise + k) * a.shape.c];
  }
  __device__ void add(const PaddedArgs& a, int64_t n, int64_t channel, int64_t l) {
    const auto value = [&](const TensorRef& t) { return static_cast<A>(value_at<T>(t, n, channel, l)); };
    const A dy = value(a.dy), x = value(a.x);
    A residual = 0, g = 0;
    unsigned bits = 0;
    if constexpr (kSource == Source::kSum) residual = value(a.epilogue.residual);
    if constexpr (kSource == Source::kMask) {
      const TensorRef& p = a.places;
      bits = load_mask<T, 1>(a.epilogue.mask, n * p.stride_n + channel * p.stride_c + l * p.stride_l);
    }
    ActivatedGradient<T, 1, kSource>::with_gradient(a.epilogue, [&](const auto& gradient) {
      g = gradient(dy, static_cast<typename ActivatedGradient<T, 1, kSource>::Beside>(bits), 0, x, residual, c[0], c[1],
                   c[2]);
    });
    PaddedSums<T>::add(g, x);
  }
};

// A block has tx channels by ty positions at a time, of one part.
template <class Sums>
__global__ void __launch_bounds__(kPaddedThreads) padded_kernel(const __grid_constant__ PaddedArgs all) {
  using Result = typename Sums::Result;
  const PaddedArgs a = piece_of_block(all, Sums::kRows);
  auto* const results = dynamic_shared<Result>();  // [ty][tx]
  const int t = static_cast<int>(threadIdx.x), tx = t % a.tx, ty = t / a.tx;
  const int64_t part = blockIdx.x % a.parts, c = blockIdx.x / a.parts * a.tx + tx;
  if (c < a.shape.c) {
    Sums sums(a, c);
    for (Positions at(a, part, ty); at.there(); at.advance(a)) {
      if (a.valid.at(at.n, at.l, a.shape.l)) sums.add(a, at.n, c, at.l);
    }
    results[t] = sums.result();
  }
  for (int half = a.ty / 2; half > 0; half /= 2) {
    __syncthreads();  // the results that are merged here are written
    if (ty < half && c < a.shape.c) results[t] = Sums::merged(results[t], results[t + half * a.tx]);
  }
  if (ty > 0 || c >= a.shape.c) return;
  Stage stage;
  stage.result = a.result + part * Sums::kRows * a.shape.c;
  put_result(stage, c, a.shape.c, results[t]);
}

// Which elements of a thread's vectors count, by the position n * L + l of the first.
template <int V>
struct Counting {
  const Valid& valid;
  const int64_t length;
  int64_t step, carry;  // from one element's position to the next one's, and more where the fast counter carries
  int left, size;       // elements to the first carry, and from there to the next

  __device__ Counting(const Plan& p, const Place<V>& place, const Valid& v, int64_t l) : valid(v), length(l) {
    const Operand& o = p.operand[kPosition];
    const int64_t column = place.vector * p.column_step;
    step = p.planes ? o.inner / V : o.fast;
    carry = p.planes ? 0 : o.slow - p.fast * o.fast;
    size = static_cast<int>(min(p.fast, int64_t{V}));
    left = p.planes ? V : static_cast<int>(min(p.fast - column % p.fast, int64_t{V}));
  }
  __device__ __forceinline__ int64_t sample_of(int64_t position) const {
    const bool narrow = static_cast<uint64_t>(position | length) >> 32 == 0;
    return narrow ? static_cast<uint32_t>(position) / static_cast<uint32_t>(length) : position / length;
  }
  // A bit for each of the first `elements`.
  __device__ __forceinline__ unsigned bits(int64_t position, int elements = V) const {
    int64_t n = sample_of(position), l = position - n * length;
    bool counts = valid.at(n, l, length);
    unsigned found = counts;
    int to_carry = left;
#pragma unroll
    for (int i = 1; i < V; ++i) {
      if (i < elements) {
        const bool carries = --to_carry == 0;
        if (carries) to_carry = size;
        if (const int64_t move = carries ? step + carry : step; move != 0) {
          l += move;
          if (l < 0 || l >= length) {
            position = n * length + l;
            n = sample_of(position);
            l = position - n * length;
          }
          counts = valid.at(n, l, length);
        }
        found |= static_cast<unsigned>(counts) << i;
      }
    }
    return found;
  }
};

// A block that writes a padded batch: zeros where it does not count, and no vector is read of which nothing does.
template <class Op>
struct PaddedWorker : Worker<Op> {
  using Base = Worker<Op>;
  using Base::args, Base::place, Base::plan, Base::tensors;
  using typename Base::A;
  using typename Base::Beside;
  using typename Base::T;
  static constexpr int V = Base::V, K = Base::K, R = Base::U < 4 ? Base::U : 4;  // R rows at a time
  static constexpr unsigned kAll = (1u << V) - 1;
  static_assert(R * V <= 32, "the bits of the rows are one word");

  __device__ PaddedWorker(const Plan& p, const typename Op::Args& a) : Base(p, a, nullptr) {}

  static __device__ __forceinline__ void clear(Vec<T, V>* v, unsigned counts) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (!(counts >> i & 1u)) (*v)[i] = narrow<T>(A(0));
    }
  }
  static __device__ __forceinline__ void clear(Results<T, V, Op::kOutputs>* r, unsigned counts) {
#pragma unroll
    for (int o = 0; o < Op::kOutputs; ++o) clear(&r->v[o], counts);
  }

  __device__ __forceinline__ void sweep(const A (&coefficient)[Op::kCoefficients][V]) const {
    const Counting<V> counting(plan, place, args.valid, args.shape.l);
    auto c = this->template cursor<2>(0);
    for (int r = 0; r < place.rows; r += R) {
      const int rows = min(R, place.rows - r);
      unsigned counts = 0;
      auto ahead = c;
#pragma unroll 1
      for (int u = 0; u < rows; ++u, ahead.advance(plan)) counts |= counting.bits(ahead.position()) << u * V;
      Vec<T, V> in[R][K] = {};
      Beside beside_of[R] = {};
      int64_t out[R];
#pragma unroll
      for (int u = 0; u < R; ++u) {
        if (u < rows) {
          out[u] = c.output();
          if (counts >> u * V & kAll) {
#pragma unroll
            for (int k = 0; k < K; ++k) {
              in[u][k] = Base::template fetch<V, Cache::kLastUse>(tensors.in[k] + c.offset[k]);
            }
            beside_of[u] = this->template beside<V>(out[u]);
          }
          c.advance(plan);
        }
      }
#pragma unroll
      for (int u = 0; u < R; ++u) {
        if (u < rows) {
          auto result = this->template applied<V>(in[u], beside_of[u], coefficient, out[u], 0, counts >> u * V);
          clear(&result, counts >> u * V);
          this->put(out[u], result);
        }
      }
    }
    if (place.tail > 0) tail(counting, coefficient);
  }

  __device__ __forceinline__ void tail(const Counting<V>& counting,
                                       const A (&coefficient)[Op::kCoefficients][V]) const {
    const Cursor<K, 2> c(plan, place, plan.rows);
    const unsigned counts = counting.bits(c.position(), place.tail);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < place.tail) {
        const int64_t offset = c.output() + i;
        Vec<T, V> in[K] = {};
        Beside beside_of = {};
        if (counts >> i & 1u) {
#pragma unroll
          for (int k = 0; k < K; ++k) {
            in[k] = Base::spread(Base::template fetch<1, Cache::kDefault>(tensors.in[k] + c.offset[k] + i));
          }
          beside_of = this->template beside<1>(offset);
        }
        auto result = this->template applied<1>(in, beside_of, coefficient, offset, i, counts);
        clear(&result, counts);
        this->put_one(offset, result, i);
      }
    }
  }
};

// Whether an operation goes by sums, here those that it is given.
template <class Op, class = void>
struct has_sums : std::false_type {};
template <class Op>
struct has_sums<Op, std::void_t<typename Op::State>> : std::true_type {};

template <class Op>
__global__ void __launch_bounds__(kThreads, 2)
    padded_apply_kernel(const __grid_constant__ Plan plan, const __grid_constant__ typename Op::Args all) {
  using A = typename Op::A;
  A* const tile = dynamic_shared<A>();  // coefficients
  constexpr int kRows = std::is_same_v<typename Op::Args, ForwardArgs> ? int{kMomentRows} : int{kSumRows};
  const auto args = piece_of_block(all, plan.first, kRows);
  const PaddedWorker<Op> worker(plan, args);
  const auto& place = worker.place;
  const int channels = tile_channels(plan, place.tile);
  const int64_t first_channel = place.tile * plan.tile_channels;
  if constexpr (has_sums<Op>::value) {
    const bool owner = place.split == 0;
    __shared__ double momentum;
    if (threadIdx.x == 0) momentum = owner ? momentum_of(args, plan, place.tile) : 0;
    __syncthreads();
    for (int base = 0; base < channels; base += kThreads) {
      const int j = base + static_cast<int>(threadIdx.x);
      const Partial<double> totals[Op::kGroups] = {};
      Op::finish(plan, args, totals, j < channels, first_channel + j, j, channels, 0, owner, momentum, tile);
    }
  } else {
    for (int j = static_cast<int>(threadIdx.x); j < channels; j += kThreads) {
      Op::coefficients(args, first_channel + j, j, channels, tile);
    }
  }
  __syncthreads();  // the coefficients are written
  if (!worker.tensors.wanted()) return;
  A coefficient[Op::kCoefficients][Op::kVector];
  worker.read_coefficients(tile, channels, coefficient);
  worker.sweep(coefficient);
}

}  // namespace cuda
}  // namespace bn_ext

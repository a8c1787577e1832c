// The CPU kernels without torch, on random calls, for ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer:
// every pass, type and kind of memory layout, odd and empty-ish shapes, misaligned and overlapping operands. Each call
// is made by one thread and by several, whose results must be the same bits. Every operand has memory of its own size,
// so a step outside of it is seen.
//
//     kernels <seconds> <seed> [default|avx2|avx512]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/activation.h"
#include "core/kernels.h"

namespace {

using namespace bn_ext;

std::mt19937_64 generator;
int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }
bool maybe(int64_t one_in) { return below(one_in) == 0; }

// at::parallel_for's division of labour, by threads of our own.
Parallel threads_of(int count) {
  static int threads;
  threads = count;
  Parallel p;
  p.threads = count;
  p.run = [](int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
    const int64_t used = std::min<int64_t>(threads, (tasks + grain - 1) / grain), each = (tasks + used - 1) / used;
    std::vector<std::thread> workers;
    for (int64_t begin = 0; begin < tasks; begin += each) {
      workers.emplace_back([=] { body(context, begin, std::min(tasks, begin + each)); });
    }
    for (std::thread& worker : workers) worker.join();
  };
  return p;
}

// Memory of exactly `bytes`, `shift` bytes away from any alignment.
class Memory {
 public:
  Memory() = default;
  Memory(int64_t bytes, int shift) : block_(static_cast<size_t>(bytes + shift)), shift_(shift) {}
  char* data() { return block_.data() + shift_; }
  bool operator==(const Memory& other) const { return block_ == other.block_; }
  size_t size() const { return block_.size() - static_cast<size_t>(shift_); }

 private:
  std::vector<char> block_;
  int shift_ = 0;
};

void store(char* p, DType type, double value) {
  const auto put = [p](auto v) { std::memcpy(p, &v, sizeof v); };
  const float f = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  switch (type) {
    case DType::kFloat64:
      return put(value);
    case DType::kFloat32:
      return put(f);
    case DType::kBFloat16:
      return put(static_cast<uint16_t>(bits >> 16));
    case DType::kFloat16: {  // of numbers between 2^-14 and 2^15, and zero
      const uint32_t magnitude = bits & 0x7fffffff;
      const uint32_t half = magnitude < 0x38800000 ? 0 : (magnitude - 0x38000000) >> 13;
      return put(static_cast<uint16_t>((bits >> 16 & 0x8000) | half));
    }
  }
}

void fill(Memory* memory, DType type, bool positive, bool odd_values) {
  std::normal_distribution<double> normal(0.3, 1.0);
  const int width = element_bytes(type);
  for (size_t i = 0; i + width <= memory->size(); i += width) {
    double value = normal(generator);
    if (odd_values && maybe(50)) value = maybe(2) ? 3e4 : 0.0;
    store(memory->data() + i, type, positive ? std::abs(value) + 0.1 : value);
  }
}

struct Layout {
  int64_t n = 0, c = 0, l = 0, elements = 0;
};

// Strides of a tensor of this shape, and the elements that it spans.
Layout layout_of(const Shape& s, int kind) {
  Layout y;
  switch (kind) {
    case 0:  // contiguous
      y = {s.c * s.l, s.l, 1, 0};
      break;
    case 1:  // channels last, (N, L, C) permuted
      y = {s.c * s.l, 1, s.c, 0};
      break;
    case 2:  // (C, N, L) permuted
      y = {s.l, s.n * s.l, 1, 0};
      break;
    case 3:  // padded rows
      y = {(s.c * s.l + 3), s.l, 1, 0};
      break;
    case 4:  // every other element
      y = {2 * s.c * s.l, 2 * s.l, 2, 0};
      break;
    case 5:  // expanded along the batch
      y = {0, s.l, 1, 0};
      break;
    case 6:  // one value a channel
      y = {0, 1, 0, 0};
      break;
    default:  // windows that overlap
      y = {1, s.n, 1, 0};
  }
  y.elements = 1 + (s.n - 1) * y.n + (s.c - 1) * y.c + (s.l - 1) * y.l;
  return y;
}
constexpr int kDense = 3, kLayouts = 8;

struct Operand {
  Memory memory;
  TensorRef ref;
  Operand() = default;
  Operand(const Shape& s, DType type, int kind, bool odd_values) {
    const Layout y = layout_of(s, kind);
    memory = Memory(y.elements * element_bytes(type), maybe(4) ? static_cast<int>(1 + below(63)) : 0);
    fill(&memory, type, false, odd_values);
    ref = {memory.data(), y.n, y.c, y.l};
  }
};

struct Vector {
  Memory memory;
  VectorRef ref;
  Vector() = default;
  Vector(int64_t size, DType type, bool positive) {
    const int64_t stride = maybe(4) ? 2 : 1;
    memory = Memory((1 + (size - 1) * stride) * element_bytes(type), maybe(4) ? static_cast<int>(1 + below(7)) : 0);
    fill(&memory, type, positive, false);
    ref = {memory.data(), type, stride};
  }
};

// Everything that one call reads and writes; a copy has memory of its own.
struct Call {
  Shape shape;
  DType type = DType::kFloat32;
  Activation activation = Activation::kIdentity;
  bool training = false;
  int64_t batches = 0, virtual_batch = 0;
  Operand x, y, dy, dx, residual, grad_residual, gg;
  Vector weight, bias, mean, var, grad_weight, grad_bias, gg_weight;
  Memory saved, mask, moments, sums;
  bool has_residual = false, wants_input = false, wants_weight = false, wants_bias = false, cumulative = false;
};

DType any_type() { return static_cast<DType>(below(4)); }
int64_t any_size(int64_t most) {
  const int64_t pick = below(4);
  return pick == 0 ? 1 : pick == 1 ? 1 + below(4) : 1 + below(most);
}

Call random_call() {
  Call c;
  const int64_t wide = maybe(6) ? 700 : 40;
  c.shape = {any_size(maybe(4) ? 3000 : 60), any_size(wide), maybe(2) ? 1 : any_size(maybe(6) ? 3000 : 70)};
  while (c.shape.numel() > 400000) {
    int64_t& longest = c.shape.n > c.shape.l ? c.shape.n : c.shape.l;
    longest = (longest + 1) / 2;
  }
  if (c.shape.count() == 1) c.shape.n = 2;
  c.type = any_type();
  c.activation = static_cast<Activation>(below(5));
  c.training = maybe(2);
  c.batches = below(5);
  c.cumulative = maybe(3);
  c.has_residual = maybe(2), c.wants_input = !maybe(4), c.wants_weight = !maybe(4), c.wants_bias = !maybe(4);
  const bool odd = maybe(3);
  const int dense = static_cast<int>(below(kDense)), any = maybe(2) ? dense : static_cast<int>(below(kLayouts));
  c.x = Operand(c.shape, c.type, any, odd);
  c.y = Operand(c.shape, c.type, any < kDense ? any : dense, odd);
  c.dx = Operand(c.shape, c.type, any < kDense ? any : dense, odd);
  c.grad_residual = Operand(c.shape, c.type, any < kDense ? any : dense, odd);
  c.dy = Operand(c.shape, c.type, maybe(2) ? dense : static_cast<int>(below(kLayouts)), odd);
  c.gg = Operand(c.shape, c.type, maybe(2) ? dense : static_cast<int>(below(kLayouts)), odd);
  c.residual = Operand(c.shape, c.type, maybe(2) ? dense : static_cast<int>(below(kLayouts)), odd);
  if (!maybe(5)) c.weight = Vector(c.shape.c, any_type(), false), c.bias = Vector(c.shape.c, any_type(), false);
  c.mean = Vector(c.shape.c, any_type(), false), c.var = Vector(c.shape.c, any_type(), true);
  c.grad_weight = Vector(c.shape.c, any_type(), false), c.grad_bias = Vector(c.shape.c, any_type(), false);
  c.gg_weight = Vector(c.shape.c, any_type(), false);
  c.virtual_batch = 1 + below(c.shape.n);
  const int64_t rows = saved_rows(true) * most_virtual_batches(c.shape.n, c.virtual_batch);
  c.saved = Memory(rows * c.shape.c * element_bytes(accumulate_type(c.type)), 0);
  c.mask = Memory(mask_bytes(c.shape.numel(), kCpuMaskElements), 0);
  c.moments = Memory(2 * kMomentRows * c.shape.c * sizeof(double), 0);
  c.sums = Memory(2 * kSumRows * c.shape.c * sizeof(double), 0);
  return c;
}

// The references of a call point into its own memory again, after it has been copied.
void settle(Call* c) {
  for (Operand* o : {&c->x, &c->y, &c->dy, &c->dx, &c->residual, &c->grad_residual, &c->gg})
    o->ref.data = o->memory.data();
  for (Vector* v : {&c->weight, &c->bias, &c->mean, &c->var, &c->grad_weight, &c->grad_bias, &c->gg_weight}) {
    if (v->memory.size()) v->ref.data = v->memory.data();
  }
}

// Training in two stages, for a batch of two parts that are alike.
void run_in_stages(Call* c, ForwardArgs forward, BackwardArgs backward, const cpu::Kernels& kernels,
                   const Parallel& parallel) {
  const auto twice = [](Memory* results) {
    const size_t half = results->size() / 2;
    std::memcpy(results->data() + half, results->data(), half);
    return reinterpret_cast<const double*>(results->data());
  };
  ForwardArgs moments{c->shape, c->type, c->x.ref};
  moments.stage.result = reinterpret_cast<double*>(c->moments.data());
  kernels.forward(moments, parallel);
  forward.training = backward.training = true;
  forward.stage = {nullptr, twice(&c->moments), 2};
  kernels.forward(forward, parallel);

  BackwardArgs sums = backward;
  sums.dx.data = sums.grad_residual.data = nullptr;
  sums.grad_weight = sums.grad_bias = {};
  sums.stage.result = reinterpret_cast<double*>(c->sums.data());
  kernels.backward(sums, parallel);
  backward.grad_weight = backward.grad_bias = {};
  backward.stage = {nullptr, twice(&c->sums), 2};
  kernels.backward(backward, parallel);
}

// Training of a batch that is cut, where samples lie one after the other in what is written.
void run_cut(Call* c, ForwardArgs forward, BackwardArgs backward, const cpu::Kernels& kernels,
             const Parallel& parallel) {
  for (const Operand* o : {&c->y, &c->dx, &c->grad_residual}) {
    if (o->ref.stride_n < o->ref.stride_c || o->ref.stride_n < o->ref.stride_l) return;
  }
  forward.batches = backward.batches = cut(c->shape, c->virtual_batch);
  if (forward.batches.size * c->shape.l == 1) return;
  forward.training = backward.training = true;
  kernels.forward(forward, parallel);
  kernels.backward(backward, parallel);
}

// Training of a renormalised batch, whole and cut.
void run_renormalised(Call* c, ForwardArgs forward, BackwardArgs backward, const cpu::Kernels& kernels,
                      const Parallel& parallel) {
  forward.training = backward.training = backward.by_renorm = true;
  forward.renorm = {true, c->mean.ref, c->var.ref, &c->batches, 1.5, 0.5, 4, c->cumulative};
  kernels.forward(forward, parallel);
  kernels.backward(backward, parallel);
  run_cut(c, forward, backward, kernels, parallel);
}

void run(Call* c, const cpu::Kernels& kernels, const Parallel& parallel) {
  settle(c);
  constexpr double kEps = 1e-5;
  Epilogue epilogue;
  epilogue.activation = c->activation;
  epilogue.negative_slope = 0.1;
  if (c->has_residual) epilogue.residual = c->residual.ref;

  ForwardArgs forward{c->shape, c->type, c->x.ref, c->y.ref, c->weight.ref, c->bias.ref, c->mean.ref, c->var.ref};
  forward.num_batches_tracked = &c->batches;
  forward.cumulative = c->cumulative;
  forward.momentum = 0.1, forward.eps = kEps, forward.saved = c->saved.data();
  kernels.forward(forward, parallel);
  forward.training = false;
  kernels.forward(forward, parallel);
  forward.saved = nullptr;
  kernels.forward(forward, parallel);
  forward.training = c->training;
  forward.saved = c->saved.data();

  BackwardArgs backward{c->shape, c->type, c->dy.ref, c->x.ref, c->dx.ref, c->weight.ref};
  if (!c->wants_input) backward.dx.data = nullptr;
  if (c->wants_weight) backward.grad_weight = c->grad_weight.ref;
  if (c->wants_bias) backward.grad_bias = c->grad_bias.ref;
  backward.saved = c->saved.data();
  backward.training = c->training;
  kernels.backward(backward, parallel);

  DoubleBackwardArgs twice;
  static_cast<BackwardArgs&>(twice) = backward;
  twice.grad_bias = {};
  twice.gg_x = c->gg.ref;
  twice.grad_dy = c->grad_residual.ref;
  if (c->has_residual) twice.gg_weight = c->gg_weight.ref;
  kernels.double_backward(twice, parallel);
  run_in_stages(c, forward, backward, kernels, parallel);
  if (!epilogue.activates()) run_cut(c, forward, backward, kernels, parallel);

  const bool masked = c->has_residual && by_sign(c->activation);
  std::memset(c->mask.data(), 0, c->mask.size());
  epilogue.mask = masked ? reinterpret_cast<uint8_t*>(c->mask.data()) : nullptr;
  forward.epilogue = backward.epilogue = epilogue;
  kernels.forward(forward, parallel);
  if (!epilogue.activates()) return;
  if (c->has_residual) backward.grad_residual = c->grad_residual.ref;
  kernels.backward(backward, parallel);
  run_in_stages(c, forward, backward, kernels, parallel);
  forward.epilogue.mask = backward.epilogue.mask = nullptr;
  run_cut(c, forward, backward, kernels, parallel);
  run_renormalised(c, forward, backward, kernels, parallel);
}

bool same(const Call& a, const Call& b) {
  const auto operand = [](const Operand& p, const Operand& q) { return p.memory == q.memory; };
  const auto vector = [](const Vector& p, const Vector& q) { return p.memory == q.memory; };
  return operand(a.x, b.x) && operand(a.y, b.y) && operand(a.dx, b.dx) && operand(a.grad_residual, b.grad_residual) &&
         vector(a.mean, b.mean) && vector(a.var, b.var) && vector(a.grad_weight, b.grad_weight) &&
         vector(a.grad_bias, b.grad_bias) && a.saved == b.saved && a.mask == b.mask && a.moments == b.moments &&
         a.sums == b.sums && a.batches == b.batches;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fprintf(stderr, "kernels <seconds> <seed> [level]\n"), 2;
  const double seconds = std::atof(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const std::string level = argc > 3 ? argv[3] : "default";
  const cpu::Kernels* kernels = level == "avx512" ? cpu::kernels_avx512()
                                : level == "avx2" ? cpu::kernels_avx2()
                                                  : cpu::kernels_default();
  if (!kernels) return std::fprintf(stderr, "no level %s in this build\n", level.c_str()), 2;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t calls = 0;
  for (; std::chrono::steady_clock::now() < end; ++calls) {
    generator.seed(seed + static_cast<uint64_t>(calls));
    Call once = random_call(), again = once;
    run(&once, *kernels, threads_of(1));
    run(&again, *kernels, threads_of(3));
    if (!same(once, again)) {
      std::fprintf(stderr, "seed %llu: shape (%lld, %lld, %lld): three threads gave other bits than one\n",
                   static_cast<unsigned long long>(seed + static_cast<uint64_t>(calls)),
                   static_cast<long long>(once.shape.n), static_cast<long long>(once.shape.c),
                   static_cast<long long>(once.shape.l));
      return 1;
    }
  }
  std::printf("kernels: %lld calls of every pass, level %s, seed %llu, no difference\n", static_cast<long long>(calls),
              level.c_str(), static_cast<unsigned long long>(seed));
  return 0;
}

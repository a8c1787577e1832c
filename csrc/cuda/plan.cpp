#include "cuda/plan.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/double_formulas.h"
#include "core/layout.h"

namespace bn_ext {
namespace {

// The cost model that chooses between splits, in microseconds and bytes; constants to be set by measurement.
constexpr double kSmBytes = 32e3;      // that one SM's share of the memory moves in a microsecond
constexpr double kLoneSmBytes = 50e3;  // that one SM can take when the others leave memory to it
constexpr double kClusterBarrier = 0.7, kGridBarrier = 2.5, kSecondBarrier = 1.5;
constexpr double kPartialBytes = 40e3;        // of partial results that an SM reads from the second-level cache
constexpr double kIdle = 0.1;                 // cost of a device with idle SMs only, over one with none
constexpr double kNarrow = 0.05;              // cost of rows of 128 bytes over rows of 512 and more
constexpr double kLine = 128, kPart = 0.15;   // cost of rows of half a line of the cache; three times of a quarter
constexpr int64_t kPooledPartials = 1024;     // more partial results a tile than this are merged once for all blocks
constexpr int64_t kStreamedBytes = 16 << 20;  // outputs larger than this leave the cache to the input
constexpr int kMaxCluster = 8;                // that every device with clusters can run
constexpr int kBlocksPerSm = 2;
constexpr int64_t kLowestGridRows = 8;  // rows a thread below which a grid is not split further
constexpr int64_t kNoCarry = int64_t{1} << 62;

struct Request {
  Pass pass;
  Shape shape;
  DType dtype;
  TensorRef operand[kOutput + 1];  // inputs, then the output
  int inputs;
  bool output, reduces, keeps;
  TensorRef second;     // output, laid out as the first
  bool places = false;  // the output's strides count also where it is absent
  bool given = false;   // what it reduces is merged already: one sweep, and nothing meets
  bool padded = false;
  int64_t pieces = 1, apart = 0;  // virtual batches in the launch; samples from each to the next
  bool once = false;              // it has to be one launch
  // Bytes beside the operands: those that each sweep reads, or the writing one alone, and that it writes.
  int64_t beside = 0, beside_once = 0, beside_written = 0;
  int64_t written() const { return output + bool(second); }
  int operands() const { return inputs + (output || places); }
};

int64_t bytes_of_mask(const Shape& shape, DType dtype) {
  const int elements = cuda_mask_elements(element_bytes(dtype));
  return (shape.numel() + elements - 1) / elements;
}

int coefficients(Pass pass) {
  if (pass == Pass::kDoubleBackward) return kDoubleCoefficients;
  return pass == Pass::kActivatedBackward ? 6 : pass == Pass::kBackward ? 5 : 3;
}

int access_of(const Request& r) { return access_bytes(r.pass, element_bytes(r.dtype)); }

// Whether every row of every operand can be taken `v` elements at a time.
bool vectorises(const Geometry& g, const Request& r, int v) {
  const int operands = r.operands();
  const auto misaligned = [&](const TensorRef& t) {
    return reinterpret_cast<uintptr_t>(t.data) % access_of(r) != 0 || r.apart * t.stride_n % v != 0;
  };
  if (misaligned(r.second)) return false;
  for (int k = 0; k < operands; ++k) {
    const Strides& s = g.strides[k];
    if (misaligned(r.operand[k]) || !g.direct(k)) return false;
    const auto bad = [&](int64_t size, int64_t stride) { return size > 1 && stride % v != 0; };
    if (g.columns) {
      const int64_t outer_rows = g.by_span ? g.rows : g.outer;
      const int64_t outer = s.outer, inner = g.fold * s.inner;
      if (bad(outer_rows, outer) || (!g.by_span && bad(g.inner, inner))) return false;
    } else if (bad(g.outer, s.outer) || bad(g.channels, s.channel)) {
      return false;
    }
  }
  if (g.columns) return g.cols % v == 0;
  return g.inner % v == 0 || (g.outer == 1 && g.channels == 1 && g.inner > v);
}

// Rows, columns and strides of the tensor; the block's shape is not settled here.
Plan lay_out(const Request& r, bool vectorised) {
  const int full = access_of(r) / element_bytes(r.dtype);
  const int v = vectorised ? full : 1;
  // Joining rows is for whole vectors only: the threads of a block lie side by side over several rows anyway.
  Fold fold;
  fold.columns = 1;
  fold.multiple = v;
  fold.limit = static_cast<int64_t>(kThreads) * v;
  fold.wide = 0;
  fold.rows = r.shape.count();
  TensorRef lead_first[kMaxPlanOperands];
  const int operands = r.operands(), walked = operands + r.padded;
  const int lead = operands > r.inputs ? r.inputs : std::min(r.inputs - 1, 1);  // without an output, x leads
  lead_first[0] = r.operand[lead];
  for (int k = 0, at = 1; k < operands; ++k) {
    if (k != lead) lead_first[at++] = r.operand[k];
  }
  lead_first[operands] = {nullptr, r.shape.l, 0, 1};  // the position, as if it were an address
  Geometry g = make_geometry(r.shape, lead_first, walked, nullptr, fold);
  Strides in_order[kMaxPlanOperands];
  for (int k = 0, at = 1; k < walked; ++k) in_order[k] = g.strides[k == lead ? 0 : at++];
  std::copy_n(in_order, walked, g.strides);

  Plan p;
  p.groups = r.pass == Pass::kDoubleBackward ? 3 : 1;
  p.coefficients = std::max(5, coefficients(r.pass));
  p.count = r.shape.count();
  p.channels = g.channels;
  if (vectorised && !vectorises(g, r, v)) return p;
  p.vector = v;
  p.planes = !g.columns;
  if (g.columns) {
    p.vectors = g.cols / v;
    p.column_step = v;
    p.fast = g.fast();
    p.rows = g.rows;
    p.inner = g.by_span || g.outer == 1 ? kNoCarry : g.inner;
    p.tail = static_cast<int>(g.tail_cols);
    p.span = g.by_span ? static_cast<int>(g.inner) : 1;
    p.modulo = g.fold > 1 ? static_cast<int>(g.channels) : 0;
  } else {
    p.vectors = g.channels;
    p.fast = g.channels;
    p.rows = g.outer * (g.inner / v);
    p.inner = g.outer == 1 ? kNoCarry : g.inner / v;
    p.tail = static_cast<int>(g.inner % v);
    p.span = v;
  }
  for (int k = 0; k < walked; ++k) {
    Operand& o = p.operand[k < r.inputs ? k : k < operands ? kOutput : kPosition];
    const Strides& s = g.strides[k];
    if (g.columns) {
      o.fast = g.fast_stride(k);
      o.slow = g.slow_stride(k);
      o.outer = g.by_span ? 0 : s.outer;
      o.inner = g.by_span ? s.outer : g.fold * s.inner;
    } else {
      o.fast = s.channel;
      o.outer = s.outer;
      o.inner = v * s.inner;
    }
  }
  return p;
}

// Threads of a block: tx vector columns by ty rows, the columns a multiple of what keeps channels whole.
void shape_block(Plan* p, int64_t wanted) {
  const int64_t unit = p->planes || p->span == 1 ? 1 : std::lcm<int64_t>(p->span, p->vector) / p->vector;
  int64_t tx = std::min<int64_t>(wanted, p->vectors);
  if (p->modulo > 0 && !p->planes) {
    tx = p->vectors;  // joined rows: every column's channel comes again in the same row
  } else {
    const int64_t tiles = (p->vectors + tx - 1) / tx;
    tx = (p->vectors + tiles - 1) / tiles;
    tx = std::min((tx + unit - 1) / unit, kThreads / unit) * unit;
  }
  p->tx = static_cast<int>(tx);
  p->ty = static_cast<int>(kThreads / tx);
  p->tiles = (p->vectors + tx - 1) / tx;
  const int64_t columns = tx * p->vector;
  const int64_t own = columns / p->span;
  if (p->modulo == 0 || p->planes) p->modulo = static_cast<int>(own);
  p->tile_channels = static_cast<int>(std::min<int64_t>(p->modulo, own));
  p->lanes = 1;
  while (p->lanes < 32 && p->tile_channels * p->lanes * 2 <= kThreads) p->lanes *= 2;
}

struct Memory {
  int64_t fixed, row, room;  // shared memory of a block: for merging, of one row of kept inputs, for keeping
  int64_t lone_room;         // for keeping, in a block that has its SM to itself
  int64_t resident;          // blocks that are on the device at once
};

Memory memory_of(const Plan& p, const Request& r, const Device& d) {
  const int64_t wide = r.dtype == DType::kFloat64 ? 8 : 4, partial = 4 * wide;
  Memory m{};
  m.resident = int64_t{kBlocksPerSm} * d.sms;
  if (!r.reduces) {
    m.fixed = coefficients(r.pass) * p.tile_channels * wide;
    return m;
  }
  m.fixed = (scratch_partials(p) + int64_t{p.groups} * p.tile_channels) * partial;
  m.row = static_cast<int64_t>(kThreads) * access_of(r) * r.inputs;
  const int64_t around = d.reserved_per_block + 128;  // the driver's, the kernel's few static bytes, rounding
  const int64_t blocks = kBlocksPerSm * (m.fixed + around) <= d.shared_per_sm ? kBlocksPerSm : 1;
  m.resident = blocks * d.sms;
  const auto room = [&](int64_t share) {
    return std::max<int64_t>(0, std::min(d.shared_per_block - 128, d.shared_per_sm / share - around) - m.fixed);
  };
  m.room = room(blocks);
  m.lone_room = room(1);
  return m;
}

// Fills in the rest for this many splits; returns the model's time in microseconds.
double settle(Plan* p, const Request& r, const Device& d, int64_t splits, Exchange exchange) {
  const Memory m = memory_of(*p, r, d);
  const int64_t rows = std::max<int64_t>(p->rows, 1);
  p->split_rows = (rows + splits - 1) / splits;
  p->splits = (rows + p->split_rows - 1) / p->split_rows;
  if (exchange == Exchange::kCluster) p->splits = splits;  // the last may have no row
  p->exchange = p->splits == 1 ? Exchange::kNone : exchange;
  const int64_t thread_rows = (p->split_rows + p->ty - 1) / p->ty;
  const bool can_keep = r.keeps && !r.given && p->vector > 1 && p->exchange != Exchange::kTwoLaunches && m.row > 0;
  const int64_t blocks = p->blocks() * r.pieces;
  const int64_t room = blocks <= d.sms ? m.lone_room : m.room;
  p->kept = can_keep ? static_cast<int>(std::min(thread_rows, room / m.row)) : 0;
  p->shared_bytes = m.fixed + p->kept * m.row;
  const int64_t bytes = element_bytes(r.dtype), tensor = r.shape.numel() * bytes;
  const int64_t kept_rows = std::min<int64_t>(int64_t{p->kept} * p->ty, p->split_rows);
  // Rows beyond the kept ones, of all splits.
  int64_t again = 0;
  if (r.reduces && r.output && !r.given && r.pass != Pass::kInferenceBackward) {
    const int64_t whole = p->rows / p->split_rows, last = p->rows % p->split_rows;
    again = whole * (p->split_rows - kept_rows) + std::max<int64_t>(0, last - kept_rows);
    again = again * p->vectors * p->vector * bytes + p->tail * bytes;
  }
  // A pass that writes while it sums comes back to the incomplete row alone.
  const bool one_pass = r.reduces && r.output && r.pass == Pass::kInferenceBackward;
  const int64_t tail = (p->groups - 1 + one_pass) * p->tail * bytes;  // each group of sums reads it for itself
  const int64_t sweeps = r.reduces && r.output && !one_pass && !r.given ? 2 : 1;
  p->pieces = r.pieces;
  p->read_bytes = r.pieces * (r.inputs * (tensor + again + tail) + sweeps * r.beside + r.beside_once);
  p->write_bytes = r.pieces * (r.written() * tensor + r.beside_written);
  p->launches = p->exchange == Exchange::kTwoLaunches ? 2 : 1;
  p->stream_output = r.output && again > 0 && r.pieces * tensor > kStreamedBytes;
  const int64_t partials = p->splits * p->tile_channels * p->groups;
  p->pooled = p->exchange == Exchange::kGrid && partials > kPooledPartials;
  const int64_t wide = r.dtype == DType::kFloat64 ? 8 : 4;
  const bool through_memory = p->exchange == Exchange::kGrid || p->exchange == Exchange::kTwoLaunches;
  p->workspace_bytes = through_memory ? 4 * wide * p->groups * p->channels * (p->splits + p->pooled) : 0;
  for (Operand& o : p->operand) {
    p->step_inner = p->ty % p->inner;
    o.step = p->ty / p->inner * o.outer + p->step_inner * o.inner;
    o.wrap = p->inner == kNoCarry ? 0 : o.outer - p->inner * o.inner;
  }

  const double total = static_cast<double>(p->read_bytes + p->write_bytes);
  const double rounds = static_cast<double>((blocks + d.sms - 1) / d.sms);
  p->busiest = rounds * d.sms / static_cast<double>(blocks);
  p->lone = p->busiest * total / (kLoneSmBytes * d.sms);
  p->waste = 1;
  if (blocks < d.sms) p->waste *= 1 + kIdle * (1 - static_cast<double>(blocks) / d.sms);
  const double line = static_cast<double>(p->tx * p->vector * bytes);
  if (!p->planes && p->tiles > 1 && line < 512) p->waste *= 1 + kNarrow * (1 - line / 512);
  if (!p->planes && p->tiles > 1 && line < kLine) p->waste *= 1 + kPart * (kLine / line - 1);
  p->meeting = p->exchange == Exchange::kCluster ? kClusterBarrier : 0;
  if (through_memory) {
    const double merging = static_cast<double>(partials) * 4 * wide / kPartialBytes;
    p->meeting += kGridBarrier + (p->pooled ? kSecondBarrier : merging);
  }
  return p->waste * std::max(total / (kSmBytes * d.sms), p->lone) + p->meeting;
}

Plan make_plan(const Request& r, const Device& d) {
  Plan laid = lay_out(r, true);
  if (laid.vector == 1) laid = lay_out(r, false);
  Plan best;
  double best_time = -1;
  const auto consider = [&](Plan p, int64_t splits, Exchange exchange) {
    const double time = settle(&p, r, d, splits, exchange);
    if (best_time < 0 || time < best_time) {
      best_time = p.time = time;
      best = p;
    }
  };
  // Vector columns of a tile: rows of 128 bytes and more where channels lie side by side, fewer only to give more SMs a
  // part of a sum; one channel or, where these are short, several of the planes.
  int64_t previous = 0;
  for (const int64_t wanted : {8, 16, 32, 64, 4, 2, 1}) {
    Plan p = laid;
    const int64_t short_planes = std::max<int64_t>(1, kThreads / std::max<int64_t>(p.rows, 1));
    // Single elements: more columns a row for the same bytes, but never so many that one thread sums a channel alone,
    // whose rounding nothing would average.
    const int64_t scalars = std::min<int64_t>(4 * wanted, kThreads / 4);
    shape_block(&p, p.planes ? std::min(wanted, short_planes) : p.vector == 1 ? scalars : wanted);
    if (p.tx == previous || (wanted == 1 && !p.planes)) continue;
    if (wanted > 1 && wanted < 8 && (p.planes || !r.reduces || r.given)) continue;
    previous = p.tx;
    const int64_t most = std::max<int64_t>(1, (p.rows + p.ty - 1) / p.ty);
    if (!r.reduces || r.given) {
      // Nothing meets: as many splits as give every SM some blocks, of a few rows a thread.
      const int64_t filled = std::max<int64_t>(1, 8 * d.sms / (p.tiles * r.pieces));
      consider(p, std::min(filled, std::max<int64_t>(1, most / 4)), Exchange::kNone);
      continue;
    }
    consider(p, 1, Exchange::kNone);
    if (d.capability >= 90 && d.clusters) {
      const int64_t largest = std::min<int64_t>({kMaxCluster, d.sms, most});
      for (int64_t s = 2; s <= largest; s *= 2) consider(p, s, Exchange::kCluster);
    }
    const int64_t filled =
        std::min(memory_of(p, r, d).resident / p.tiles, std::max<int64_t>(1, most / kLowestGridRows));
    const bool meets = r.pieces == 1 && (d.cooperative || !r.once);  // blocks of several launches or of the grid
    if (filled > 1 && meets) {
      consider(p, filled, d.cooperative ? Exchange::kGrid : Exchange::kTwoLaunches);
    }
  }
  return best;
}

}  // namespace

// What the request is for, of the batch that the arguments are.
static Shape set_cut(Request* r, const Shape& shape, const VirtualBatches& batches, Cut cut) {
  r->shape = shape;
  r->once = cut == Cut::kBeside || cut == Cut::kLast;
  if (cut == Cut::kBeside || cut == Cut::kEach) r->shape.n = r->apart = batches.size;
  if (cut == Cut::kBeside) r->pieces = batches.count - 1;
  return r->shape;
}

Plan plan_forward(const ForwardArgs& a, const Device& d, Cut cut) {
  const bool output = bool(a.y);
  Request r{Pass::kForward, a.shape, a.dtype, {a.x}, 1, output, a.training, a.training && output};
  const Shape shape = set_cut(&r, a.shape, a.batches, cut);
  if (!a.training) r.pass = Pass::kInference;
  r.given = a.stage.given;
  r.padded = bool(a.valid);
  if (a.epilogue.mask) r.beside_written = bytes_of_mask(shape, a.dtype);
  if (a.epilogue.residual && a.training) r.beside_once = shape.numel() * element_bytes(a.dtype);
  if (a.epilogue.residual && !a.training) r.operand[r.inputs++] = a.epilogue.residual;
  if (output) r.operand[r.inputs] = a.y;
  return make_plan(r, d);
}

// With an activation, the pass reads what tells its derivative and may write g beside dx.
static Plan plan_activated_backward(const BackwardArgs& a, const Device& d, Cut cut) {
  const bool sums = a.sums(), output = a.dx || a.grad_residual;
  const Source source = source_of(a.epilogue);
  Request r{
      sums ? Pass::kActivatedBackward : Pass::kInference, a.shape, a.dtype, {a.dy}, 1, output, sums, sums && output};
  const Shape shape = set_cut(&r, a.shape, a.batches, cut);
  if (sums || source != Source::kMask) r.operand[r.inputs++] = a.x;
  if (source == Source::kSum) r.operand[r.inputs++] = a.epilogue.residual;
  r.operand[r.inputs] = a.grad_residual ? a.grad_residual : a.dx;
  if (a.grad_residual && a.dx) r.second = a.dx;
  if (a.epilogue.mask) r.places = true, r.beside = bytes_of_mask(shape, a.dtype);
  r.given = a.stage.given;
  r.padded = bool(a.valid);
  return make_plan(r, d);
}

Plan plan_backward(const BackwardArgs& a, const Device& d, Cut cut) {
  if (a.epilogue.activates()) return plan_activated_backward(a, d, cut);
  const bool sums = a.training || a.sums(), output = bool(a.dx);
  Request r{a.training ? Pass::kBackward : Pass::kInferenceBackward,
            a.shape,
            a.dtype,
            {a.dy},
            sums ? 2 : 1,
            output,
            sums,
            a.training && output};
  set_cut(&r, a.shape, a.batches, cut);
  if (sums) r.operand[1] = a.x;
  if (output) r.operand[r.inputs] = a.dx;
  r.given = a.stage.given;
  r.padded = bool(a.valid);
  return make_plan(r, d);
}

Plan plan_double_backward(const DoubleBackwardArgs& a, const Device& d) {
  const bool output = a.grad_dy || a.dx;
  Request r{Pass::kDoubleBackward, a.shape, a.dtype, {a.dy, a.x, a.gg_x}, 3, output, true, output};
  if (output) r.operand[r.inputs] = a.grad_dy ? a.grad_dy : a.dx;
  if (a.grad_dy && a.dx) r.second = a.dx;
  return make_plan(r, d);
}

}  // namespace bn_ext

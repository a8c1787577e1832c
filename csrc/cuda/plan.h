// How a CUDA launch covers a tensor: which threads see which elements, how many blocks share a channel, how these meet,
// and how much stays on chip. A pure function of the arguments and the device, so it is the same on every run, is
// tested without a GPU, and tells the traffic of a launch before it is made (`python -m bn_ext.launches`).
//
// A tensor is rows x columns. A row is a position of the reduction, a column a position that a thread keeps: for
// tensors whose channels lie side by side the columns run along the channels; for channel planes the rows run along a
// channel, 16 bytes each, and every channel has one vector column. A block has tx x ty threads: tx vector columns (a
// tile), ty rows at a time. `splits` blocks share the rows of a tile.
#pragma once

#include <cstdint>

#include "core/kernels.h"

namespace bn_ext {

// The figures of a device that a plan depends on.
struct Device {
  int capability = 90;  // 10 * major + minor
  int sms = 132;
  int64_t shared_per_block = 227 * 1024, shared_per_sm = 228 * 1024, reserved_per_block = 1024;  // bytes
  bool cooperative = true;
  bool clusters = true;  // where the capability has them
};

// How the blocks of a tile merge their partial results.
enum class Exchange : int {
  kNone,         // one block has all rows, or nothing is reduced
  kCluster,      // distributed shared memory (compute capability 9.0 and later)
  kGrid,         // a barrier of all blocks, in a cooperative launch
  kTwoLaunches,  // the second launch merges what the first left in memory
};

enum class Pass : int {
  kForward,
  kInference,  // and every other pass without sums
  kBackward,
  kInferenceBackward,
  kDoubleBackward,
  kActivatedBackward
};

// What a launch takes of a batch that is cut into virtual ones (core/virtual_batch.h).
enum class Cut : int {
  kWhole,   // the arguments are one batch
  kBeside,  // all but the last, side by side: each has its part of the grid
  kEach,    // any of these alone
  kLast,    // the last one, which the arguments are, in one launch
};

struct Operand {
  int64_t fast = 0, slow = 0;    // strides of the two counters of a column
  int64_t outer = 0, inner = 0;  // strides of the two counters of a row
  int64_t step = 0, wrap = 0;    // a thread's step to its next row, and the correction when the inner counter carries
};

constexpr int kThreads = 256;
constexpr int64_t kMostRows = 65535;  // of a grid
// Operands of a plan: inputs, then the output (two lie alike), then n * length + l, by which it is known what counts of
// a padded batch.
constexpr int kOutput = 3, kPosition = 4, kMaxPlanOperands = 5;

struct Plan {
  Exchange exchange = Exchange::kNone;
  bool planes = false;         // neighbouring threads lie along the rows
  bool pooled = false;         // kGrid: partial results are merged once, by all blocks together, then a second barrier
  bool stream_output = false;  // the output is too large to be found in the cache later
  int vector = 1;              // elements of one access: access_bytes of them, or one
  int tx = 1, ty = kThreads;
  int span = 1, modulo = 1;  // column v of a tile belongs to its channel (v / span) % modulo
  int tile_channels = 1;
  int lanes = 1;                                           // threads that merge the partial results of one channel
  int column_step = 1;                                     // columns of one vector column
  int tail = 0;                                            // columns of an incomplete last row
  int kept = 0;                                            // rows of each input that a thread keeps on chip
  int groups = 1;                                          // partial results of a channel, four numbers each
  int coefficients = 5;                                    // of a channel, at most
  int64_t channels = 0, vectors = 0, tiles = 0, fast = 1;  // fast: size of a column's fast counter
  int64_t rows = 0, inner = 1, step_inner = 0;             // inner: size of a row's inner counter
  int64_t splits = 1, split_rows = 0;
  int64_t count = 0;  // values of a channel
  Operand operand[kMaxPlanOperands];
  int64_t shared_bytes = 0, workspace_bytes = 0;
  // The model: tensor bytes that the launch reads and writes, launches made, their time without the launching.
  int64_t read_bytes = 0, write_bytes = 0;
  int launches = 1;
  double time = 0;     // microseconds
  double waste = 1;    // times as long, for parts of lines and idle SMs
  double busiest = 1;  // share of the SM that has most to do, over an equal one
  double lone = 0;     // microseconds in which that SM moves its bytes, when the others leave memory to it
  double meeting = 0;  // microseconds of time in which blocks meet
  int64_t pieces = 1;  // virtual batches side by side, each of so many blocks
  int64_t first = 0;   // of a padded batch: the first of these
  int64_t blocks() const { return tiles * splits; }
};

// Bytes of a vector access. The sums and coefficients of some passes leave registers for four elements at a time.
constexpr int access_bytes(Pass pass, int element_bytes) {
  const bool four = pass == Pass::kDoubleBackward || pass == Pass::kActivatedBackward;
  return four && element_bytes == 2 ? 8 : 16;
}

// Size of a block's scratch in partial results: those of its threads lie there first, its channels' coefficients later.
BN_HD int64_t scratch_partials(const Plan& p) {
  const int64_t threads = int64_t{kThreads} * p.vector, channels = (int64_t{p.coefficients} * p.tile_channels + 3) / 4;
  return threads < channels ? channels : threads;
}

Plan plan_forward(const ForwardArgs& args, const Device& device, Cut cut = Cut::kWhole);
Plan plan_backward(const BackwardArgs& args, const Device& device, Cut cut = Cut::kWhole);
// Of training, with a gradient at grad_input.
Plan plan_double_backward(const DoubleBackwardArgs& args, const Device& device);

}  // namespace bn_ext

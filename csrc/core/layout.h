// How a tensor of any strides is walked: as "columns" (contiguous rows, channels vary along a row) or as "planes"
// (contiguous runs that belong to one channel). Both kinds reduce over rows or runs; no tensor is ever copied whole.
//
//   columns  rows x cols, channel of column v:
//              by channel  v % channels   (N,C), permuted (N,L,C); `fold` rows are joined when C is small
//              by span     v / span       contiguous (N,C,L) with a short L
//   planes   outer x channels x inner, inner contiguous: (N,C,L), transposed (N,C), (C,N,L)
//
// The kind follows the lead operand (the output, which is dense); the others may have any strides and are gathered row
// by row into a small buffer where they do not match.
//
// Of a padded batch (valid.h) the rows and the runs are those that count, each where a list says; rows are joined where
// they follow each other.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "ragged.h"

namespace bn_ext {

struct Strides {
  int64_t outer = 0, channel = 0, inner = 0;
};

constexpr int kMaxOperands = 5;
constexpr int64_t kBlockColumns = 512;  // columns whose accumulators stay in the first-level cache
constexpr int64_t kShortInner = 64;     // contiguous (N,C,L) with a shorter L is walked as columns
constexpr int64_t kShortPadded = 64;    // of a padded batch, whose runs are skipped where they are longer
constexpr int64_t kChunkElements = 131072;
// A medium-sized tensor's chunks are for several cores to share; sums of them are cheaper to add than moments to merge.
constexpr int64_t kMinChunkElements = 32768, kMomentChunks = 2, kGradientChunks = 4;
constexpr int64_t kMinChunkRows = 64, kMaxChunkRows = 4096;
constexpr int64_t kRunElements = 16384;  // elements of one channel that make a chunk of planes

struct Geometry {
  bool columns = false;
  bool by_span = false;
  int64_t outer = 1, channels = 0, inner = 1;  // reduction = outer x inner, collapsed where all operands allow it
  int64_t fold = 1;                            // rows joined into one row of columns
  int64_t rows = 0, cols = 0;                  // columns
  int64_t tail_rows = 0, tail_cols = 0;        // left over: together one row or, of a padded batch, rows of one each
  int64_t rows_of_chunk = kMaxChunkRows;
  Strides strides[kMaxOperands];
  const Ragged* ragged = nullptr;  // of a padded batch
  bool even = false;               // the inner dimension's step leads to the next outer index too, in all operands

  // Size of the counter that runs fastest along a row of columns.
  int64_t fast() const { return by_span ? inner : channels; }
  int64_t fast_stride(int k) const { return by_span ? strides[k].inner : strides[k].channel; }
  int64_t slow_stride(int k) const { return by_span ? strides[k].channel : strides[k].inner; }

  // Offset of one value of channel 0, of which outer * inner dimension + inner index is given.
  int64_t value_offset(int k, int64_t at) const {
    return (at / inner) * strides[k].outer + (at % inner) * strides[k].inner;
  }
  // Of a padded batch's row; apart, so that the others' stays small.
  [[gnu::noinline]] int64_t listed_offset(int k, int64_t r) const {
    const int64_t at = ragged->row(r);
    return even ? at * strides[k].inner : value_offset(k, at);
  }
  // Offset of column 0 of row r.
  int64_t row_offset(int k, int64_t r) const {
    if (by_span) return r * strides[k].outer;
    if (ragged) return listed_offset(k, r);
    return even ? r * fold * strides[k].inner : value_offset(k, r);
  }
  // Planes: run o from i on, `length` of it or what there is.
  Ragged::Run run(int64_t o, int64_t i, int64_t length) const {
    return ragged ? ragged->run(o) : Ragged::Run{o, i, length, 0, 0};
  }
  int64_t runs() const { return ragged ? ragged->runs() : outer; }
  // Rows that hold padding, whose outputs are written whole.
  bool masked() const { return ragged && by_span; }
  // Values of a channel.
  int64_t count() const { return ragged ? ragged->count() : outer * inner; }
  // Rows of this operand lie in memory just as the columns run.
  bool direct(int k) const {
    if (!columns) return strides[k].inner == 1 || inner == 1;
    const bool one_group = cols <= fast();
    return fast_stride(k) == 1 && (one_group || slow_stride(k) == fast());
  }

  // Chunk grid: a function of the shape and strides alone, so results do not depend on the number of threads.
  int64_t block_cols() const {
    if (!by_span) return cols < kBlockColumns ? cols : kBlockColumns;
    const int64_t whole = kBlockColumns / inner * inner;
    return cols < whole ? cols : whole;
  }
  int64_t col_blocks() const { return cols == 0 ? 1 : (cols + block_cols() - 1) / block_cols(); }
  int64_t chunk_rows() const { return rows_of_chunk; }
  // As many chunks of rows as are wanted of a medium-sized tensor; more of a large one.
  void set_chunks(int64_t wanted) {
    const int64_t share = rows * cols / wanted;
    const int64_t elements = share < kMinChunkElements ? kMinChunkElements
                             : share > kChunkElements  ? kChunkElements
                                                       : share;
    const int64_t want = elements / (block_cols() ? block_cols() : 1);
    rows_of_chunk = want < kMinChunkRows ? kMinChunkRows : want > kMaxChunkRows ? kMaxChunkRows : want;
  }
  int64_t row_chunks() const { return (rows + chunk_rows() - 1) / chunk_rows(); }
  int64_t tail_chunk_rows() const { return chunk_rows() * fold < kMaxChunkRows ? chunk_rows() * fold : kMaxChunkRows; }
  int64_t tail_chunks() const { return (tail_rows + tail_chunk_rows() - 1) / tail_chunk_rows(); }
  // Of all columns.
  int64_t elements() const { return rows * cols + tail_rows * tail_cols; }
  int64_t run_length() const { return inner < kRunElements ? inner : kRunElements; }
  int64_t run_pieces() const { return ragged ? 1 : (inner + run_length() - 1) / run_length(); }
  int64_t chunk_outer() const { return kRunElements / run_length(); }
  int64_t outer_chunks() const { return (outer + chunk_outer() - 1) / chunk_outer(); }
  int64_t chunks() const {
    if (columns) return row_chunks() + tail_chunks();
    return ragged ? ragged->chunks() : outer_chunks() * run_pieces();
  }
};

inline Strides strides_of(const TensorRef& t) { return Strides{t.stride_n, t.stride_c, t.stride_l}; }

// When rows are joined: until a row has `columns` of them and is a multiple of `multiple`, within `limit`; further, up
// to `wide` columns, while more than `few` rows are left, and up to the limit while more than `rows` are.
struct Fold {
  int64_t columns = 64, multiple = 16, limit = kBlockColumns, wide = 256, few = 24, rows = 512;
};
// Of a pass that merges the moments of a channel's joined columns, which costs more than to add sums of them.
inline Fold fold_of_moments() {
  Fold fold;
  fold.few = 96;
  return fold;
}

// operands[0] is the lead. Sizes are at least 1. ragged: what it is walked by, where it knows of padding; it has to
// live as long as the geometry.
inline Geometry make_geometry(const Shape& shape, const TensorRef* operands, int count, Ragged* ragged = nullptr,
                              const Fold& fold = {}) {
  Geometry g;
  if (ragged && *ragged) g.ragged = ragged;
  g.outer = shape.n;
  g.channels = shape.c;
  g.inner = shape.l;
  for (int k = 0; k < count; ++k) g.strides[k] = strides_of(operands[k]);
  // The reduced dimension with the smaller step runs inside; a dimension of size 1 goes outside.
  const auto swap_dimensions = [&] {
    const int64_t outer = g.outer;
    g.outer = g.inner;
    g.inner = outer;
    for (int k = 0; k < count; ++k) {
      const int64_t stride = g.strides[k].outer;
      g.strides[k].outer = g.strides[k].inner;
      g.strides[k].inner = stride;
    }
    if (g.ragged) ragged->swap();
  };
  if (g.inner == 1 || (g.outer > 1 && g.strides[0].outer < g.strides[0].inner)) swap_dimensions();
  g.even = true;
  for (int k = 0; k < count; ++k) g.even = g.even && g.strides[k].outer == g.inner * g.strides[k].inner;
  g.even = g.even || g.outer == 1;
  if (g.even && !g.ragged) {
    g.inner *= g.outer;
    g.outer = 1;
  }
  const Strides& lead = g.strides[0];
  if (g.channels > 1 && lead.inner != 1 && lead.channel == 1) {
    g.columns = true;
    g.rows = g.ragged ? g.ragged->count() : g.outer * g.inner;
    if (g.even) {
      const int64_t limit = g.ragged ? std::min(fold.limit, ragged->mean_run() / 2 * g.channels) : fold.limit;
      const auto narrow = [&] {
        const int64_t cols = g.fold * g.channels;
        const int64_t enough = cols < fold.wide ? fold.few : fold.rows;
        return cols < fold.columns || cols % fold.multiple != 0 || g.rows / g.fold > enough;
      };
      while (narrow() && g.fold * 2 * g.channels <= limit) g.fold *= 2;
      g.tail_cols = g.rows % g.fold * g.channels;
      g.tail_rows = g.tail_cols > 0;
      g.rows /= g.fold;
    }
    if (g.ragged) {
      ragged->set_rows(g.fold);
      g.rows = ragged->runs();
      g.tail_rows = ragged->single_rows();
      g.tail_cols = g.channels;
    }
    g.cols = g.fold * g.channels;
  } else if (g.inner < (g.ragged ? kShortPadded : kShortInner) && g.outer > 1 && lead.inner == 1 &&
             lead.channel == g.inner) {
    g.columns = g.by_span = true;
    g.rows = g.outer;
    g.cols = g.channels * g.inner;
    if (g.ragged) ragged->set_span(g.block_cols());
  } else if (g.ragged) {
    ragged->set_runs(kRunElements);
  }
  g.set_chunks(kMomentChunks);
  return g;
}

}  // namespace bn_ext

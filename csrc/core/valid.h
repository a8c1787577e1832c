// Which values of a padded batch count: x[n, :, l] of the valid pairs (n, l).
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "tensors.h"

namespace bn_ext {

struct Valid {
  const int64_t* lengths = nullptr;  // (N,): l < lengths[n]
  const uint8_t* mask = nullptr;     // (N, L), one row after the other, 0 or 1
  BN_HD explicit operator bool() const { return lengths != nullptr || mask != nullptr; }
  // length: L.
  BN_HD bool at(int64_t n, int64_t l, int64_t length) const {
    return lengths != nullptr ? l < lengths[n] : mask[n * length + l] != 0;
  }
};

BN_HD Valid from_sample(Valid v, int64_t n, const Shape& shape) {
  if (v.lengths) v.lengths += n;
  if (v.mask) v.mask += n * shape.l;
  return v;
}

// Values of a channel that count.
inline int64_t valid_count(const Valid& v, const Shape& shape) {
  if (!v) return shape.count();
  int64_t count = 0;
  for (int64_t i = 0; i < (v.lengths ? shape.n : shape.count()); ++i) count += v.lengths ? v.lengths[i] : v.mask[i];
  return count;
}

// The same in the order in which layout.h walks a tensor, outer index by outer index: as runs along the inner dimension
// or, for columns, as rows.
class Ragged {
 public:
  struct Run {
    int64_t outer, begin, length;
    int64_t before, behind;  // what does not count up to the run before, and behind the last one
  };

  Ragged(const Valid& valid, const Shape& shape)
      : valid_(valid), length_(shape.l), outer_(shape.n), inner_(shape.l), count_(valid_count(valid, shape)) {}
  explicit operator bool() const { return bool(valid_); }

  // outer and inner change places: (l, n), or (n, l) again.
  void swap() {
    swapped_ = !swapped_;
    const int64_t outer = outer_;
    outer_ = inner_;
    inner_ = outer;
  }
  int64_t count() const { return count_; }

  // Rows of one value each, as outer * inner dimension + inner index.
  void set_rows() {
    rows_.reset(new int64_t[count_ + 1]);
    runs_ = 0;
    for (int64_t o = 0; o < outer_; ++o) {
      for_runs(o, true, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) rows_[runs_++] = o * inner_ + i;
      });
    }
  }
  int64_t row(int64_t r) const { return rows_[r]; }
  // Runs of up to `longest`; chunks of at least so many values.
  void set_runs(int64_t longest) {
    int64_t size = 0;
    each_run(longest, [&](const Run&) { ++size; });
    list_.reset(new Run[size + 1]);
    begin_.reset(new int64_t[size + 1]);
    values_.reset(new int64_t[size + 1]);
    runs_ = chunks_ = 0;
    int64_t values = 0;
    each_run(longest, [&](const Run& run) {
      if (values == 0) begin_[chunks_] = runs_;
      list_[runs_++] = run;
      values += run.length;
      if (values < longest && runs_ < size) return;
      values_[chunks_++] = values;
      values = 0;
    });
    begin_[chunks_] = runs_;
  }
  int64_t runs() const { return runs_; }
  const Run& run(int64_t i) const { return list_[i]; }
  // Runs [chunk_begin(k), chunk_begin(k + 1)) have chunk_values(k) values.
  int64_t chunks() const { return chunks_; }
  int64_t chunk_begin(int64_t k) const { return begin_[k]; }
  int64_t chunk_values(int64_t k) const { return values_[k]; }

  // Whole rows of short planes, channel after channel, of which a pass takes `columns` at a time: a row's pattern says
  // by one byte a column what counts, 0xff or 0.
  void set_span(int64_t columns) {
    columns_ = columns;
    begin_.reset(new int64_t[outer_ + 1]);
    begin_[0] = 0;
    for (int64_t o = 0; o < outer_; ++o) {
      int64_t values = 0;
      for (int64_t i = 0; i < inner_; ++i) values += at(o, i);
      begin_[o + 1] = begin_[o] + values;
    }
    if (!valid_.lengths || swapped_) return;
    patterns_.reset(new uint8_t[(inner_ + 1) * columns]());
    for (int64_t length = 1; length <= inner_; ++length) {
      for (int64_t v = 0; v < columns; v += inner_) std::memset(patterns_.get() + length * columns + v, 0xff, length);
    }
  }
  // Values that count in rows [o0, o1).
  int64_t span_values(int64_t o0, int64_t o1) const { return begin_[o1] - begin_[o0]; }
  // memory: `columns` bytes; nullptr where all counts.
  const uint8_t* pattern(int64_t o, uint8_t* memory) const {
    const int64_t values = span_values(o, o + 1);
    if (values == inner_) return nullptr;
    if (patterns_) return patterns_.get() + values * columns_;
    for (int64_t i = 0; i < inner_; ++i) memory[i] = at(o, i) ? 0xff : 0;
    for (int64_t v = inner_; v < columns_; v *= 2) std::memcpy(memory + v, memory, v < columns_ - v ? v : columns_ - v);
    return memory;
  }
  // The first that counts of rows that have one.
  int64_t first(int64_t o) const {
    int64_t i = 0;
    while (i + 1 < inner_ && !at(o, i)) ++i;
    return i;
  }

  // Whether outer index o has a run.
  bool any(int64_t o) const {
    bool found = false;
    for_runs(o, true, [&](int64_t, int64_t) { found = true; });
    return found;
  }
  // body(begin, end) for the longest runs of outer index o that count, or that do not.
  template <class Body>
  void for_runs(int64_t o, bool count, const Body& body) const {
    if (valid_.lengths && !swapped_) {
      const int64_t end = valid_.lengths[o], from = count ? 0 : end, to = count ? end : inner_;
      if (from < to) body(from, to);
      return;
    }
    for (int64_t i = 0, end; i < inner_; i = end) {
      const bool counts = at(o, i);
      for (end = i + 1; end < inner_ && at(o, end) == counts;) ++end;
      if (counts == count) body(i, end);
    }
  }

 private:
  bool at(int64_t o, int64_t i) const { return swapped_ ? valid_.at(i, o, length_) : valid_.at(o, i, length_); }
  template <class Body>
  void each_run(int64_t longest, const Body& body) const {
    for (int64_t o = 0; o < outer_; ++o) {
      int64_t done = 0;
      Run last{o, 0, 0, 0, 0};  // known when the next one is
      for_runs(o, true, [&](int64_t begin, int64_t end) {
        for (; begin < end; begin = done) {
          if (last.length > 0) body(last);
          last = {o, begin, end - begin < longest ? end - begin : longest, begin - done, 0};
          done = begin + last.length;
        }
      });
      last.behind = inner_ - done;
      if (last.length > 0) body(last);
    }
  }

  Valid valid_;
  int64_t length_, outer_, inner_, count_;
  bool swapped_ = false;
  std::unique_ptr<Run[]> list_;
  std::unique_ptr<int64_t[]> rows_, begin_, values_;
  std::unique_ptr<uint8_t[]> patterns_;  // by length
  int64_t runs_ = 0, chunks_ = 0, columns_ = 0;
};

}  // namespace bn_ext

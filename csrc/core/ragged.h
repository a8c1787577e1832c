// What of a padded batch is walked on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "valid.h"

namespace bn_ext {

// What counts of a padded batch, in the order in which layout.h walks a tensor, outer index by outer index: as runs
// along the inner dimension or, for columns, as rows.
class Ragged {
 public:
  static constexpr int64_t kPatternRoom = 32;  // what is read behind a pattern's end, a vector's lanes at a time

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

  // Values of a run, on average.
  int64_t mean_run() const {
    int64_t runs = 0;
    for (int64_t o = 0; o < outer_; ++o) for_runs(o, true, [&](int64_t, int64_t) { ++runs; });
    return runs > 0 ? count_ / runs : 0;
  }

  // Rows of `fold` values that follow each other and, behind them, of the single ones left, each as outer * inner
  // dimension + inner index of its first.
  void set_rows(int64_t fold) {
    rows_.reset(new int64_t[count_ + 1]);  // single ones from the end on
    runs_ = single_ = 0;
    for (int64_t o = 0; o < outer_; ++o) {
      for_runs(o, true, [&](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + fold <= end; i += fold) rows_[runs_++] = o * inner_ + i;
        for (; i < end; ++i) rows_[count_ - ++single_] = o * inner_ + i;
      });
    }
  }
  int64_t row(int64_t r) const { return rows_[r < runs_ ? r : count_ - 1 - (r - runs_)]; }
  int64_t single_rows() const { return single_; }
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
    patterns_.reset(new uint8_t[(inner_ + 1) * columns + kPatternRoom]());
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
  int64_t runs_ = 0, single_ = 0, chunks_ = 0, columns_ = 0;
};

}  // namespace bn_ext

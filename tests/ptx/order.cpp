// What happens before what: every block counts its barriers (epochs), a clock says up to which epoch of each block
// writes are known, and acquire, release, fences and barriers pass clocks on.
#include <algorithm>

#include "machine.h"

namespace ptx {
namespace {

uint32_t known_epoch(const Thread& t, uint32_t block) {
  if (t.own) return (*t.own)[block];
  return block < t.block->known.size() ? t.block->known[block] : 0;
}

bool block_ordered(const Thread& t, uint32_t block, uint32_t epoch) {
  return block == t.block->id ? epoch < t.block->epoch : epoch < known_epoch(t, block);
}

bool readers_ordered(const Thread& t, const Shadow& s) {
  if (s.rt == kAllMany) {
    for (uint32_t b = 0; b < t.launch->grid; ++b) {
      if (!block_ordered(t, b, s.re)) return false;
    }
    return true;
  }
  if (s.rt & kBlockMany) return block_ordered(t, s.rt & ~kBlockMany, s.re);
  return ordered(t, s.rt - 1, s.re);
}

std::string reader_of(const Shadow& s, const Launch& l) {
  if (s.rt == kAllMany) return "several blocks";
  if (s.rt & kBlockMany) return "several threads of block " + std::to_string(s.rt & ~kBlockMany);
  return place_of(l, s.rt - 1);
}

Clock clock_of(const Thread& t) {
  Clock c = t.own ? *t.own : t.block->known;
  c.resize(t.launch->grid, 0);
  c[t.block->id] = t.block->epoch;
  return c;
}

void join(Clock* to, const Clock& from) {
  if (to->size() < from.size()) to->resize(from.size(), 0);
  for (size_t k = 0; k < from.size(); ++k) (*to)[k] = std::max((*to)[k], from[k]);
}

void learn(Thread& t, const Clock& c) {
  if (!t.own) t.own = std::make_unique<Clock>(clock_of(t));
  join(t.own.get(), c);
}

}  // namespace

bool ordered(const Thread& t, uint32_t thread, uint32_t epoch) {
  return thread == t.global || block_ordered(t, thread / t.launch->threads, epoch);
}

// An access to bytes with the shadow s. same: a write of what is there already.
void note(Thread& t, const Ins& i, Shadow& s, Access access, const std::string& where, bool same) {
  const Launch& l = *t.launch;
  const bool write = access.write, atomic = access.atomic;
  const auto at = [](uint32_t line) { return " at PTX line " + std::to_string(line); };
  const bool race = s.wt && !ordered(t, s.wt - 1, s.we) && !(s.watomic && atomic);
  if (race && !(write && same)) {  // no order between equal values does no harm
    fail(std::string("race: ") + (write ? "write" : "read") + " of " + where + " not ordered behind the write by " +
         place_of(l, s.wt - 1) + at(s.wline));
  }
  if (write) {
    if (s.nc) fail("write of " + where + ", which this launch reads by ld.global.nc" + at(s.rline));
    if (s.rt && !readers_ordered(t, s) && !(atomic && s.watomic)) {
      fail("race: write of " + where + " not ordered behind the read by " + reader_of(s, l) + at(s.rline));
    }
    s.wt = t.global + 1, s.we = t.block->epoch, s.watomic = atomic, s.written = 1, s.wline = i.line;
    s.rt = 0;
    return;
  }
  if (i.nc) {
    if (s.written) fail("ld.global.nc of " + where + ", which this launch writes" + at(s.wline));
    s.nc = 1;
  }
  if (atomic) return;
  s.rline = i.line;
  const uint32_t me = t.global + 1, block = t.block->id;
  if (s.rt == 0 || s.rt == me || (s.rt != kAllMany && readers_ordered(t, s))) {
    s.rt = me, s.re = t.block->epoch;
  } else if (s.rt == kAllMany) {
    s.re = std::max(s.re, t.block->epoch);
  } else {
    const uint32_t before = s.rt & kBlockMany ? s.rt & ~kBlockMany : (s.rt - 1) / l.threads;
    s.rt = before == block ? kBlockMany | block : kAllMany;
    s.re = std::max(s.re, t.block->epoch);
  }
}

void acquire_from(Thread& t, uint64_t address) {
  const auto at = t.launch->sync.find(address);
  if (at != t.launch->sync.end()) learn(t, at->second);
}

void release_to(Thread& t, uint64_t address) { join(&t.launch->sync[address], clock_of(t)); }

void relaxed_from(Thread& t, uint64_t address) {
  const auto at = t.launch->sync.find(address);
  if (at == t.launch->sync.end()) return;
  if (!t.pending) t.pending = std::make_unique<Clock>();
  join(t.pending.get(), at->second);
}

void relaxed_to(Thread& t, uint64_t address) {
  if (t.fenced) join(&t.launch->sync[address], *t.fenced);
}

void fence(Thread& t) {
  if (t.pending) learn(t, *t.pending), t.pending.reset();
  t.fenced = std::make_unique<Clock>(clock_of(t));
}

// All threads have arrived at the block's barrier.
void join_block(Block& b) {
  for (Thread& k : b.threads) {
    if (k.own) join(&b.known, *k.own);
    k.own.reset();
  }
  ++b.epoch;
  if (!b.known.empty()) b.known[b.id] = b.epoch;
}

void join_cluster(Launch& l, uint32_t first) {
  Clock sum(l.grid, 0);
  for (uint32_t b = first; b < first + l.cluster; ++b) {
    Block& k = *l.blocks[b];
    join(&sum, k.known);
    for (Thread& m : k.threads) {
      if (m.own) join(&sum, *m.own), m.own.reset();
    }
    sum[b] = ++k.epoch;
  }
  for (uint32_t b = first; b < first + l.cluster; ++b) l.blocks[b]->known = sum;
}

// Shared memory ends with its block: what other blocks read there must have been before.
void check_end_of_shared(Thread& t) {
  Block& b = *t.block;
  const uint32_t threads = t.launch->threads;
  for (size_t g = 0; g < b.shadows.all.size(); ++g) {
    const Shadow& s = b.shadows.all[g];
    if (s.rt == 0 || s.rt == (kBlockMany | b.id)) continue;
    if (!(s.rt & kBlockMany) && (s.rt - 1) / threads == b.id) continue;
    bool before = true;
    for (uint32_t k = b.cluster_first; s.rt == kAllMany && k < b.cluster_first + t.launch->cluster; ++k) {
      before &= k == b.id || s.re < known_epoch(t, k);
    }
    if (!before || (s.rt != kAllMany && !readers_ordered(t, s))) {
      fail("the block ends, and with it its shared memory, not ordered behind the read of byte " +
           std::to_string(b.shadows.granule * g) + " by " + reader_of(s, *t.launch) + " at PTX line " +
           std::to_string(s.rline));
    }
  }
}

}  // namespace ptx

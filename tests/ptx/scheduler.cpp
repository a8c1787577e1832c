// Who runs next, barriers of blocks and clusters, and what a launch that cannot go on says.
#include <algorithm>
#include <random>
#include <stdexcept>

#include "machine.h"

namespace ptx {

std::string place_of(const Launch& l, uint32_t thread) {
  const uint32_t block = thread / l.threads;
  return "block (" + std::to_string(block % l.grid_x) + "," + std::to_string(block / l.grid_x) + ",0) thread (" +
         std::to_string(thread % l.threads) + ",0,0)";
}

namespace {

std::string instruction(const Thread& t) {
  const Ins& i = t.launch->kernel->code[t.at];
  return "PTX line " + std::to_string(i.line) + ": " + i.statement();
}

std::string position(const Thread& t) { return place_of(*t.launch, t.global) + " at " + instruction(t); }

void make_ready(Thread& t) {
  t.state = kReady;
  t.launch->ready.push_back(&t);
}

// Aligned barriers: all threads of a warp at one instruction.
void check_aligned(const Launch& l, const Block& b) {
  for (uint32_t k = 0; k < l.threads; ++k) {
    const Ins &mine = l.kernel->code[b.threads[k].at], &first = l.kernel->code[b.threads[k / 32 * 32].at];
    if ((mine.strong || first.strong) && &mine != &first) {
      fail("a warp meets in different barriers, which are aligned: " + position(b.threads[k / 32 * 32]) + " and " +
           position(b.threads[k]));
    }
  }
}

void barrier_arrived(Thread& t) {
  Block& b = *t.block;
  if (++b.waiting < t.launch->threads) return;
  check_aligned(*t.launch, b);
  b.waiting = 0;
  join_block(b);
  for (Thread& k : b.threads) make_ready(k);
}

std::vector<std::vector<uint64_t>> spare;  // registers of ended blocks: fresh pages cost more than the rest of a start

void start_block(Launch& l, uint32_t id) {
  auto b = std::make_unique<Block>();
  b->id = id;
  b->cluster_first = id / l.cluster * l.cluster;
  b->threads.resize(l.threads);
  const size_t registers = l.kernel->registers;
  if (!spare.empty()) b->registers = std::move(spare.back()), spare.pop_back();
  b->registers.assign(registers * l.threads, 0x7ff4dead7fa4deadull);  // NaN as float and as double, no address
  const size_t shared = l.kernel->dynamic_base + l.dynamic_shared - kSharedBase;
  b->shared.assign(shared, simt::kPoison);
  b->shared_init.assign(shared, 0);
  b->warps.resize((l.threads + 31) / 32);
  b->shared_lines.resize(b->warps.size());
  if (l.cooperative || l.cluster > 1) b->known.assign(l.grid, 0);
  for (uint32_t k = 0; k < l.threads; ++k) {
    Thread& t = b->threads[k];
    t.R = b->registers.data() + registers * k;
    t.C = l.kernel->constants.data();
    t.tid = static_cast<uint16_t>(k);
    t.global = id * l.threads + k;
    t.block = b.get();
    t.launch = &l;
    b->warps[k / 32].exist |= 1u << k % 32;
  }
  l.blocks[id] = std::move(b);
  for (Thread& t : l.blocks[id]->threads) l.ready.push_back(&t);
  ++l.live_blocks;
}

void end_thread(Thread& t) {
  Block& b = *t.block;
  Launch& l = *t.launch;
  ++b.exited;
  const auto some = [](const std::vector<Copy>& g) { return !g.empty(); };
  if (std::any_of(t.groups.begin(), t.groups.end(), some)) fail("ends with copies that it did not wait for");
  if (!t.open.empty()) fail("ends with copies that it did not commit");
  if (b.exited < l.threads) return;
  if (l.cluster > 1) check_end_of_shared(t);
  b.done = true;
  for (auto& warp : b.warps) simt::finish_warp(&warp);
  simt::finish_block(b.id, b.bytes);
  if (counting()) finish_shared(b);
  --l.live_blocks;
  spare.push_back(std::move(b.registers));
  if (l.cluster > 1) return;  // others may still look for it
  b.shared = {}, b.shared_init = {}, b.shadows = {};
}

// Whose turn it is: any ready thread; or, by other seeds, the one of the block, or of the warp, that is ahead in a
// random order, so that some run as far as they can before others begin. Who polls falls to the end of the order.
size_t choose(Launch& l, int policy, const std::vector<uint32_t>& rank, std::mt19937_64* random) {
  const size_t any = (*random)() % l.ready.size();
  if (policy == 0) return any;
  size_t best = any;
  uint32_t best_rank = UINT32_MAX;
  for (int tries = 0; tries < 24; ++tries) {
    const size_t k = (*random)() % l.ready.size();
    const uint32_t warp = policy == 2 ? l.ready[k]->tid / 32 * 7 % 8 : 0;
    const uint32_t r = rank[l.ready[k]->block->id] * (policy == 2 ? 64 : 1) + warp;
    if (r < best_rank) best = k, best_rank = r;
  }
  return best;
}

void run_slice(Thread& t, uint64_t quantum) {
  Ins* const code = t.launch->kernel->code.data();
  uint64_t left = quantum;
  t.stop = false;
  while (!t.stop) {
    Ins& i = code[t.pc];
    t.at = t.pc++;
    if (i.guard >= 0 && ((t.R[i.guard] & 1) != 0) == i.negate) continue;
    ++i.count;
    i.fn(t, i);
    if (--left == 0) break;
  }
  t.launch->instructions += quantum - left;
}

std::string deadlock(const Launch& l) {
  std::string report = "deadlock: no thread can go on";
  for (const auto& b : l.blocks) {
    if (!b || b->done) continue;
    report += "\n  block " + std::to_string(b->id) + ": " + std::to_string(b->exited) + " threads have ended, " +
              std::to_string(b->waiting) + " wait at a barrier";
    int shown = 0;
    for (const Thread& t : b->threads) {
      if (t.state != kExited && ++shown <= 2) report += "\n    " + position(t);
    }
    if (report.size() > 2000) break;
  }
  return report;
}

void run_one(Thread& t, uint64_t quantum) {
  try {
    run_slice(t, quantum);
    if (t.launch->instructions > 5000000000u) fail("the launch does not end");
    if (t.state == kBar) barrier_arrived(t);
    if (t.state == kWarp) sync_warp(t);
    if (t.state == kExited) end_thread(t);
  } catch (const std::runtime_error& error) {
    fail(place_of(*t.launch, t.global) + ": " + error.what() + ", at " + instruction(t) + " of " +
         t.launch->kernel->file);
  }
}

}  // namespace

// The last one ends the phase.
void cluster_arrive(Thread& t) {
  Launch& l = *t.launch;
  if (t.cluster_arrived) fail("arrives twice at the cluster's barrier without a wait");
  t.cluster_arrived = true;
  const uint32_t first = t.block->cluster_first;
  auto& [arrived, phase] = l.cluster_state[first];
  t.cluster_phase = phase;
  if (++arrived < l.cluster * l.threads) return;
  arrived = 0;
  ++phase;
  join_cluster(l, first);
  for (uint32_t b = first; b < first + l.cluster; ++b) {
    for (Thread& k : l.blocks[b]->threads) {
      if (k.state == kClusterWait) k.cluster_arrived = false, make_ready(k);
    }
  }
}

void cluster_wait(Thread& t) {
  if (!t.cluster_arrived) fail("waits at the cluster's barrier without having arrived");
  if (t.launch->cluster_state[t.block->cluster_first].second != t.cluster_phase) {
    t.cluster_arrived = false;
    return;
  }
  t.state = kClusterWait;
  t.stop = true;
}

void run_launch(Launch& l, uint64_t seed) {
  std::mt19937_64 random(seed * 7919 + 17);
  const bool preempt = seed % 2 == 1;
  const int policy = static_cast<int>(seed / 2 % 3);
  forget_shadows();
  l.blocks.resize(l.grid);
  std::vector<uint32_t> order(l.grid / l.cluster), rank(l.grid);
  for (uint32_t k = 0; k < order.size(); ++k) order[k] = k;
  for (uint32_t k = 0; k < l.grid; ++k) rank[k] = k;
  std::shuffle(order.begin(), order.end(), random);
  std::shuffle(rank.begin(), rank.end(), random);
  const uint32_t most = l.cooperative ? l.grid : std::max<uint32_t>(l.cluster * 2, 3);
  uint32_t last_rank = l.grid;
  uint64_t spins = 0;
  size_t next = 0;
  for (;;) {
    while (next < order.size() && l.live_blocks + l.cluster <= most) {
      for (uint32_t k = 0; k < l.cluster; ++k) start_block(l, order[next] * l.cluster + k);
      ++next;
    }
    if (l.ready.empty()) {
      if (l.live_blocks == 0) break;
      fail(deadlock(l));
    }
    std::swap(l.ready[choose(l, policy, rank, &random)], l.ready.back());
    Thread& t = *l.ready.back();
    l.ready.pop_back();
    const uint64_t polled = t.polled;
    run_one(t, preempt ? 20 + random() % 600 : 1000000);
    if (t.state != kReady) {
      spins = 0;
      if (t.block->done && l.cluster == 1) l.blocks[t.block->id].reset();  // a grid may have many
      continue;
    }
    const bool polls = t.polled != polled;
    if (!t.stop || polls) l.ready.push_back(&t);  // else its own arrival has woken it
    spins = polls ? spins + 1 : 0;
    if (polls && policy) rank[t.block->id] = last_rank++;
    if (spins > 2000000) fail("deadlock: polled for in vain, " + position(t));
  }
}

}  // namespace ptx

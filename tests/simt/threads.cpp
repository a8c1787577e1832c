// What the threads of a kernel call: barriers, warp exchanges, polling, shared memory of other blocks, copies.
#include <cstring>

#include "runtime.h"

namespace simt {

static Cluster& own_cluster() {
  if (device().cc_major < 9) fail("this device has no clusters");
  return *current->block->cluster;
}

static Barrier& barrier_of(Scope scope) {
  if (scope == Scope::kBlock) return current->block->barrier;
  return scope == Scope::kCluster ? own_cluster().barrier : run.grid;
}

int lane() { return current->linear % 32; }
void* dynamic_shared() {
  if (current->block->dynamic == nullptr) fail("dynamic_shared in a launch without dynamic shared memory");
  return current->block->dynamic;
}
unsigned cluster_size() { return static_cast<unsigned>(own_cluster().blocks.size()); }
unsigned cluster_rank() { return current->block->rank; }

void* map_shared(void* pointer, unsigned rank) {
  Block* own = current->block;
  if (rank >= own->cluster->blocks.size()) fail("map_shared_rank of a block that the cluster does not have");
  Block* other = own->cluster->blocks[rank];
  if (other == own) return pointer;
  if (other->barrier.done > 0) fail("map_shared_rank of a block that has threads that ended");
  char* p = static_cast<char*>(pointer);
  const size_t in_static = static_cast<size_t>(p - shared_base), in_dynamic = static_cast<size_t>(p - own->dynamic);
  if (in_static < shared_bytes) return other->shared.data() + in_static;
  if (own->dynamic != nullptr && in_dynamic < launch_record().dynamic_shared) return other->dynamic + in_dynamic;
  fail("map_shared_rank of a pointer outside shared memory");
}

void changed() { run.idle_polls = 0; }

void preempt(unsigned one_in) {
  if (random_below(one_in) != 0) return;
  make_ready(current);
  to_scheduler();
}

void poll(const void* address, const char* what, Site site) {
  const unsigned value = *static_cast<const unsigned*>(address);
  // Every live thread had many turns and nothing moved: what they poll for never comes.
  const Wait here{what, 0, site};
  if (++run.idle_polls > 10000 + 64 * run.live_threads) {
    abandon("deadlock: threads poll for a value that never comes" + describe_waits(), cudaErrorLaunchFailure);
  }
  make_ready(current);
  current->wait = here;
  to_scheduler();
  current->wait = Wait{};
  if (*static_cast<const unsigned*>(address) != value) changed();
}

void arrive(Scope scope, const char* what, int predicate, Site site) {
  Barrier& b = barrier_of(scope);
  if (scope == Scope::kGrid && !launch_record().cooperative) fail("grid sync in a launch that is not cooperative");
  if (b.arrived == 0) {
    b.wait = Wait{what, 0, site};
    b.votes = Votes{0, 1, 0};
  } else if (b.wait.site.line != site.line || strcmp(b.wait.what, what) != 0) {
    fail("threads meet in different barriers: " + text_of(b.wait) + " and " + text_of(Wait{what, 0, site}));
  }
  ++current->phase[static_cast<int>(scope)];
  ++b.arrived;
  b.votes.any |= predicate != 0;
  b.votes.all &= predicate != 0;
  b.votes.count += predicate != 0;
  if (b.arrived < b.threads) return;
  ++b.phase;
  b.arrived = 0;
  b.result = b.votes;
  run.idle_polls = 0;
  if (scope == Scope::kGrid) ++launch_record().grid_barriers;
  for (Thread* t : b.waiters) make_ready(t);
  b.waiters.clear();
}

Votes wait(Scope scope, const char* what, Site site) {
  Barrier& b = barrier_of(scope);
  if (b.phase < current->phase[static_cast<int>(scope)]) {
    current->wait = Wait{what, 0, site};
    b.waiters.push_back(current);
    to_scheduler();
  }
  return b.result;
}

// Lanes of `mask` wait here until the last arrives, who deals out the values; source_lane kVote asks for the set of
// lanes that brought a value other than 0.
static constexpr int kVote = -1;

static uint64_t meet(const char* what, unsigned mask, uint64_t value, int source_lane, Site site) {
  Thread* self = current;
  Block* block = self->block;
  Warp& warp = block->warps[self->linear / 32];
  Thread* lanes = &block->threads[self->linear / 32 * 32];
  if (!(mask >> lane() & 1u)) fail(std::string(what) + ": the mask leaves out the calling lane");
  const unsigned all = mask & warp.exist;
  if (all & warp.done) fail(std::string(what) + ": the mask names a lane that has ended");
  self->value = value;
  self->source_lane = source_lane;
  self->wait = Wait{what, mask, site};
  warp.waiting |= 1u << lane();
  bool complete = (warp.waiting & all) == all;
  uint64_t votes = 0, dealt[32];
  for (int i = 0; i < 32 && complete; ++i) {
    if (!(all >> i & 1u)) continue;
    const Wait& other = lanes[i].wait;
    complete = other.mask == mask;  // else it waits for others first
    if (complete && strcmp(other.what, what) != 0) {
      fail("lanes meet in different warp operations: " + text_of(self->wait) + " and " + text_of(other));
    }
    const int from = lanes[i].source_lane;
    dealt[i] = from >= 0 && from < 32 && (all >> from & 1u) ? lanes[from].value : ~uint64_t{0};
    votes |= static_cast<uint64_t>(lanes[i].value != 0) << i;
  }
  if (!complete) {
    to_scheduler();
    return self->value;
  }
  warp.waiting &= ~all;
  self->wait = Wait{};
  for (int i = 0; i < 32; ++i) {
    if (!(all >> i & 1u)) continue;
    lanes[i].value = source_lane == kVote ? votes : dealt[i];
    if (&lanes[i] != self) make_ready(&lanes[i]);
  }
  return self->value;
}

uint64_t exchange(const char* what, unsigned mask, uint64_t value, int source_lane, Site site) {
  return meet(what, mask, value, source_lane < 0 ? 32 : source_lane, site);
}

unsigned ballot(const char* what, unsigned mask, bool predicate, Site site) {
  return static_cast<unsigned>(meet(what, mask, predicate, kVote, site));
}

// ---- asynchronous copies: carried out at the wait ----
void copy_async(void* shared, const void* global, int bytes, Site site) {
  touch(global, bytes, false, site);
  current->copies.push_back(Copy{shared, global, bytes, current->copy_group});
}

void copy_async_commit() { ++current->copy_group; }

void copy_async_wait(int groups_left) {
  auto& copies = current->copies;
  size_t n = 0;
  for (; n < copies.size() && copies[n].group < current->copy_group - groups_left; ++n) {
    memcpy(copies[n].to, copies[n].from, copies[n].bytes);
  }
  copies.erase(copies.begin(), copies.begin() + n);
}

void touch(const void* address, int bytes, bool write, Site site, bool last_use) {
  preempt(device().cache_bytes > 0 ? 1 : 32);  // a cache is for threads that go on side by side
  Buffer* const b = buffer_at(address);
  const char* verb = write ? "writes " : "reads ";
  const auto at = [&] { return " at " + std::string(site.file) + ":" + std::to_string(site.line); };
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(verb + std::to_string(bytes) + " misaligned bytes" + at());
  if (b != nullptr) {
    const char* p = static_cast<const char*>(address);
    if (p < b->begin || p + bytes > b->begin + b->bytes) {
      abandon(describe_thread() + ": " + verb + "out of bounds: " + std::to_string(bytes) + " bytes at " +
                  place(*b, address) + at(),
              cudaErrorIllegalAddress);
    }
    if (b->internal) fail(std::string(verb) + "shared memory by a helper for global memory" + at());
  }
  Block& block = *current->block;
  block.bytes += bytes;
  count_access(&block.warps[current->linear / 32], lane(), site, b, address, bytes, write, last_use);
}

}  // namespace simt

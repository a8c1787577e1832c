// Who runs next: one operating-system thread, a random choice by seed at every point where a kernel's thread steps
// aside. A launch that cannot go on ends with a report of which threads wait where.
#include <link.h>
#include <setjmp.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Thread* current = nullptr;

Running run;
char* shared_base = nullptr;
size_t shared_bytes = 0;

namespace {

uint64_t random_state = 1;
sigjmp_buf escape;
std::string failure;
cudaError_t failure_code = cudaSuccess;

// The library's thread_local variables, which are the kernels' __shared__ ones and this one.
thread_local volatile char shared_anchor;

void find_shared() {
  shared_anchor = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        bool ours = false;
        size_t bytes = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const auto at = reinterpret_cast<uintptr_t>(&find_shared) - info->dlpi_addr - header.p_vaddr;
          ours = ours || (header.p_type == PT_LOAD && at < header.p_memsz);
          if (header.p_type == PT_TLS) bytes = header.p_memsz;
        }
        if (!ours) return 0;
        shared_base = static_cast<char*>(info->dlpi_tls_data);
        shared_bytes = bytes;
        return 1;
      },
      nullptr);
}

}  // namespace

void thread_main() {
  run.body(run.argument);
  current->done = true;
  to_scheduler();
}

void make_ready(Thread* t) {
  t->wait = Wait{};
  if (!t->block->listed) run.with_ready.push_back(t->block);
  t->block->listed = true;
  t->block->ready.push_back(t);
}

std::string text_of(const Wait& wait) {
  std::string file = wait.site.file;
  return std::string(wait.what) + " at " + file.substr(file.rfind('/') + 1) + ":" + std::to_string(wait.site.line);
}

std::string text_of(uint3 v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

// "block (0,0,0): threads 0-15: __syncthreads at k.cu:7; threads 16-31: ended;"
std::string describe_waits() {
  std::string text;
  int blocks = 0;
  for (const auto& cluster : run.clusters) {
    for (const Block* block : cluster->blocks) {
      if (++blocks > 4) continue;
      text += "\n  block " + text_of(block->index) + ":";
      const auto& threads = block->threads;
      const auto state = [](const Thread& t) {
        if (t.done) return std::string("ended");
        return t.wait.what == nullptr ? std::string("running") : text_of(t.wait);
      };
      for (size_t i = 0, end; i < threads.size(); i = end) {
        for (end = i + 1; end < threads.size() && state(threads[end]) == state(threads[i]);) ++end;
        text += " threads " + std::to_string(i) + "-" + std::to_string(end - 1) + ": " + state(threads[i]) + ";";
      }
    }
  }
  return blocks > 4 ? text + "\n  and " + std::to_string(blocks - 4) + " more blocks" : text;
}

namespace {

void load_shared(Block* block) {
  if (run.loaded == block) return;
  if (run.loaded != nullptr) memcpy(run.loaded->shared.data(), shared_base, shared_bytes);
  memcpy(shared_base, block->shared.data(), shared_bytes);
  run.loaded = block;
}

// Dynamic shared memory: guarded, kept for the next block of the same size.
std::vector<char*> free_dynamic;
size_t free_dynamic_bytes = 0;

char* take_dynamic(size_t bytes) {
  if (bytes != free_dynamic_bytes) {
    for (char* p : free_dynamic) free_guarded(p);
    free_dynamic.clear();
    free_dynamic_bytes = bytes;
  }
  if (free_dynamic.empty()) {
    return static_cast<char*>(allocate_guarded("dynamic shared memory", bytes, 16, false, false));
  }
  char* p = free_dynamic.back();
  free_dynamic.pop_back();
  memset(p, kPoison, bytes);
  return p;
}

void start_block(Cluster& cluster, uint64_t linear, unsigned rank, int threads, size_t dynamic_bytes) {
  auto* block = new Block;
  cluster.blocks.push_back(block);
  block->cluster = &cluster;
  block->rank = rank;
  block->index = {static_cast<unsigned>(linear % gridDim.x), static_cast<unsigned>(linear / gridDim.x % gridDim.y),
                  static_cast<unsigned>(linear / gridDim.x / gridDim.y)};
  block->barrier.threads = threads;
  block->shared.assign(shared_bytes, static_cast<char>(kPoison));
  if (dynamic_bytes > 0) {
    block->dynamic = take_dynamic(dynamic_bytes);
  }
  block->threads.resize(threads);
  block->warps.resize((threads + 31) / 32);
  for (int i = 0; i < threads; ++i) {
    Thread& t = block->threads[i];
    t.block = block;
    t.linear = i;
    t.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    t.stack = take_stack();
    make_context(t);
    block->warps[i / 32].exist |= 1u << i % 32;
    make_ready(&t);
  }
  run.live_threads += threads;
}

void end_block(Block* block) {
  if (run.loaded == block) {
    memcpy(block->shared.data(), shared_base, shared_bytes);
    run.loaded = nullptr;
  }
  for (Warp& warp : block->warps) finish_warp(&warp);
  finish_block((uint64_t{block->index.z} * gridDim.y + block->index.y) * gridDim.x + block->index.x, block->bytes);
  // Other blocks of the cluster that still read here find poison.
  std::fill(block->shared.begin(), block->shared.end(), static_cast<char>(kPoison));
  if (block->dynamic != nullptr) memset(block->dynamic, kPoison, launch_record().dynamic_shared);
}

void drop_cluster(Cluster& cluster) {
  for (Block* block : cluster.blocks) {
    for (Thread& t : block->threads) give_stack(t.stack);
    if (block->dynamic != nullptr) free_dynamic.push_back(block->dynamic);
    delete block;
  }
}

void end_thread(Thread* t) {
  Block* block = t->block;
  block->warps[t->linear / 32].done |= 1u << t->linear % 32;
  ++block->cluster->barrier.done;
  ++run.grid.done;
  --run.live_threads;
  run.idle_polls = 0;
  if (++block->barrier.done == block->barrier.threads) end_block(block);
}

void resume(Thread* t) {
  load_shared(t->block);
  current = t;
  threadIdx = t->index;
  blockIdx = t->block->index;
  to_thread(*t);
  if (!stack_intact(*t)) {
    abandon(describe_thread() + ": a thread's stack of 64 KB overflowed", cudaErrorLaunchFailure);
  }
  if (t->done) end_thread(t);
  current = nullptr;
}

// Runs live blocks until one of the clusters has ended.
void run_until_one_ends() {
  const auto ended = [](const std::unique_ptr<Cluster>& c) { return c->barrier.done == c->barrier.threads; };
  while (true) {
    if (run.with_ready.empty()) {
      abandon("deadlock: no thread can go on" + describe_waits(), cudaErrorLaunchFailure);
    }
    const size_t at = random_below(run.with_ready.size());
    Block* block = run.with_ready[at];
    // Long turns and short ones: a block runs alone for a while, or blocks alternate.
    for (uint64_t turn = 1 + random_below(4 * block->threads.size()); turn > 0 && !block->ready.empty(); --turn) {
      std::swap(block->ready[random_below(block->ready.size())], block->ready.back());
      Thread* t = block->ready.back();
      block->ready.pop_back();
      resume(t);
    }
    if (block->ready.empty()) {
      block->listed = false;
      run.with_ready.erase(std::find(run.with_ready.begin(), run.with_ready.end(), block));
    }
    const auto it = std::find_if(run.clusters.begin(), run.clusters.end(), ended);
    if (it != run.clusters.end()) {
      drop_cluster(**it);
      run.clusters.erase(it);
      return;
    }
  }
}

}  // namespace

void seed_random(uint64_t seed) { random_state = seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull; }

uint64_t random_below(uint64_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 11) % n;
}

std::string describe_thread() {
  if (current == nullptr) return "no thread";
  return "block " + text_of(current->block->index) + " thread " + text_of(current->index);
}

[[noreturn]] void abandon(const std::string& message, cudaError_t error) {
  failure = message;
  failure_code = error;
  siglongjmp(escape, 1);
}

[[noreturn]] void fail(const std::string& message) {
  abandon(describe_thread() + ": " + message, cudaErrorLaunchFailure);
}

// ---- a launch ----
static void run_grid(unsigned cluster_blocks, bool all_live, size_t dynamic_bytes) {
  const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  run.grid.threads = static_cast<int64_t>(blocks) * threads;
  std::vector<uint32_t> order(blocks / cluster_blocks);
  std::iota(order.begin(), order.end(), 0u);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  const size_t live = all_live ? order.size() : 1 + random_below(6);
  for (size_t next = 0; next < order.size() || !run.clusters.empty();) {
    for (; next < order.size() && run.clusters.size() < live; ++next) {
      run.clusters.push_back(std::make_unique<Cluster>());
      Cluster& cluster = *run.clusters.back();
      cluster.barrier.threads = static_cast<int64_t>(cluster_blocks) * threads;
      for (unsigned rank = 0; rank < cluster_blocks; ++rank) {
        start_block(cluster, uint64_t{order[next]} * cluster_blocks + rank, rank, threads, dynamic_bytes);
      }
    }
    run_until_one_ends();
  }
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* argument) {
  Launch record;
  const cudaError_t refused = check_launch(config, kernel, &record.cluster, &record.cooperative);
  if (refused != cudaSuccess) return remember(refused);
  record.kernel = kernel;
  record.grid = gridDim = config.gridDim;
  record.block = blockDim = config.blockDim;
  record.dynamic_shared = config.dynamicSmemBytes;
  record.blocks_per_sm = blocks_per_sm(static_cast<int>(blockDim.x * blockDim.y * blockDim.z), config.dynamicSmemBytes);
  find_shared();
  run = Running{};
  run.body = body;
  run.argument = argument;
  failure.clear();
  failure_code = cudaSuccess;
  begin_launch(record);
  catch_faults();
  if (sigsetjmp(escape, 1) == 0) {
    run_grid(record.cluster, record.cooperative, config.dynamicSmemBytes);
  } else {
    for (const auto& cluster : run.clusters) drop_cluster(*cluster);
    run.clusters.clear();
  }
  current = nullptr;
  release_faults();
  end_launch();
  if (failure.empty() && !first_overwritten().empty()) {
    failure = "memory beside " + first_overwritten() + " was overwritten";
    failure_code = cudaErrorIllegalAddress;
  }
  if (!failure.empty()) {
    char name[40];
    snprintf(name, sizeof(name), "{kernel %p}: ", kernel);
    set_error(name + failure);
  }
  return remember(failure_code);
}

}  // namespace simt

extern "C" __attribute__((visibility("default"))) void simt_seed(uint64_t seed) { simt::seed_random(seed); }

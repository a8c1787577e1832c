// Guarded memory and counters: every buffer lies between two pages that nobody may touch, every access by the kernels'
// helpers is checked and counted, and a fault becomes an error that names buffer, block and thread.
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace simt {
namespace {

constexpr unsigned char kSlack = 0xa5;
constexpr size_t kCoverLimit = 64 << 20;  // larger buffers are counted, not mapped byte by byte

struct Buffer {
  std::string name;
  char *map = nullptr, *begin = nullptr;
  size_t map_bytes = 0, bytes = 0;
  bool sparse = false, internal = false;
  std::vector<uint8_t> cover[2];  // how often this launch read and wrote each byte
  char* data() const { return map + getpagesize(); }
  char* data_end() const { return map + map_bytes - getpagesize(); }
};

struct Cover {
  int least = 0, most = 0;
};

struct Record {
  Launch launch;
  std::map<int, Cover> cover[2];
};

std::map<char*, int> by_address;  // start of the mapping -> buffer
std::map<int, Buffer> buffers;
std::vector<std::string> names;  // of all buffers there ever were
std::vector<Record> records;
std::string error_text, report_text;

int find(const void* address) {
  char* p = static_cast<char*>(const_cast<void*>(address));
  auto it = by_address.upper_bound(p);
  if (it == by_address.begin()) return -1;
  const Buffer& b = buffers[(--it)->second];
  return p < b.map + b.map_bytes ? it->second : -1;
}

std::string place(const Buffer& b, const void* address) {
  const long long offset = static_cast<const char*>(address) - b.begin;
  return b.name + (offset < 0 ? " - " : " + ") + std::to_string(offset < 0 ? -offset : offset) + " (" + b.name +
         " has " + std::to_string(b.bytes) + " bytes)";
}

bool slack_intact(const Buffer& b) {
  if (b.sparse) return true;
  const auto kept = [](const char* from, const char* to) {
    return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kSlack; });
  };
  return kept(b.data(), b.begin) && kept(b.begin + b.bytes, b.data_end());
}

// ---- faults ----
struct sigaction old_actions[5];
constexpr int kSignals[5] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
stack_t old_stack;
alignas(16) char signal_stack[64 << 10];

void on_fault(int signal, siginfo_t* info, void* context) {
  if (current == nullptr) {  // not a kernel's fault: let it be what it is
    sigaction(signal, &old_actions[std::find(kSignals, kSignals + 5, signal) - kSignals], nullptr);
    return;
  }
  std::string text = describe_thread() + ": ";
  const void* pc = nullptr;
  const char* verb = "accesses";
#if defined(__x86_64__)
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  pc = reinterpret_cast<const void*>(registers[REG_RIP]);
  verb = registers[REG_ERR] & 2 ? "writes" : "reads";
#elif defined(__aarch64__)
  pc = reinterpret_cast<const void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#endif
  if (signal == SIGSEGV || signal == SIGBUS) {
    const int id = find(info->si_addr);
    char address[32];
    snprintf(address, sizeof(address), "%p", info->si_addr);
    text += std::string(verb) + " out of bounds: " +
            (id < 0 ? std::string("address ") + address + ", in no buffer" : place(buffers[id], info->si_addr));
  } else {
    text += "an index outside its array, an integer overflow, a shift too far or a division by zero";
  }
  Dl_info module;
  if (pc != nullptr && dladdr(pc, &module) != 0) {
    char at[40];
    snprintf(at, sizeof(at), ", {pc %p}",
             reinterpret_cast<void*>(static_cast<const char*>(pc) - static_cast<const char*>(module.dli_fbase)));
    text += at;
  }
  abandon(text, cudaErrorIllegalAddress);
}

void catch_faults() {
  stack_t own{};
  own.ss_sp = signal_stack;
  own.ss_size = sizeof(signal_stack);
  sigaltstack(&own, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &old_actions[i]);
}

void release_faults() {
  for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &old_actions[i], nullptr);
  sigaltstack(&old_stack, nullptr);
}

// ---- counting ----
void count(const LineTraffic& line, LineTraffic::Access& access) {
  uint32_t* const end = access.sectors + __builtin_popcount(access.lanes);
  std::sort(access.sectors, end);
  Launch& launch = records.back().launch;
  Counter& c = (line.write ? launch.writes : launch.reads)[line.buffer];
  c.accesses += 1;
  c.bytes += access.bytes;
  c.sectors += std::unique(access.sectors, end) - access.sectors;
  c.ideal_sectors += (access.bytes + 31) / 32;
}

LineTraffic& line_of(Warp& warp, Site site, int buffer, bool write) {
  for (auto& line : warp.lines) {
    if (line.site.line == site.line && line.site.file == site.file && line.buffer == buffer && line.write == write) {
      return line;
    }
  }
  warp.lines.emplace_back();
  LineTraffic& line = warp.lines.back();
  line.site = site;
  line.buffer = buffer;
  line.write = write;
  return line;
}

std::string json(const Launch& launch, const Record& record) {
  const auto number = [](uint64_t v) { return std::to_string(v); };
  const auto triple = [](dim3 v) {
    return "[" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + "]";
  };
  char name[40];
  snprintf(name, sizeof(name), "{kernel %p}", launch.kernel);
  std::string s = std::string("{\"kernel\":\"") + name + "\",\"grid\":" + triple(launch.grid) +
                  ",\"block\":" + triple(launch.block) + ",\"cluster\":" + number(launch.cluster) +
                  ",\"cooperative\":" + (launch.cooperative ? "true" : "false") +
                  ",\"dynamic_shared\":" + number(launch.dynamic_shared) +
                  ",\"blocks_per_sm\":" + number(launch.blocks_per_sm) +
                  ",\"grid_barriers\":" + number(launch.grid_barriers) + ",\"block_bytes\":[";
  for (size_t i = 0; i < launch.block_bytes.size(); ++i) s += (i ? "," : "") + number(launch.block_bytes[i]);
  s += "],\"buffers\":{";
  bool first = true;
  for (int id = -1; id < static_cast<int>(names.size()); ++id) {
    std::string fields;
    for (const bool write : {false, true}) {
      const auto& counters = write ? launch.writes : launch.reads;
      const auto it = counters.find(id);
      if (it == counters.end()) continue;
      const Counter& c = it->second;
      const std::string verb = write ? "write" : "read";
      fields += std::string(fields.empty() ? "" : ",") + "\"" + verb + "_bytes\":" + number(c.bytes) + ",\"" + verb +
                "_accesses\":" + number(c.accesses) + ",\"" + verb + "_sectors\":" + number(c.sectors) + ",\"" + verb +
                "_ideal_sectors\":" + number(c.ideal_sectors);
      const auto cover = record.cover[write].find(id);
      if (cover == record.cover[write].end()) continue;
      fields += ",\"" + verb + "s_of_a_byte\":[" + number(cover->second.least) + "," + number(cover->second.most) + "]";
    }
    if (fields.empty()) continue;
    s += std::string(first ? "" : ",") + "\"" + (id < 0 ? "other" : names[id]) + "\":{" + fields + "}";
    first = false;
  }
  return s + "}}";
}

}  // namespace

void* allocate_guarded(const char* name, size_t bytes, size_t align, bool left, bool sparse) {
  const size_t page = getpagesize(), data = std::max(page, (bytes + page - 1) / page * page);
  void* map = mmap(nullptr, data + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  Buffer b;
  b.name = name;
  b.map = static_cast<char*>(map);
  b.map_bytes = data + 2 * page;
  b.bytes = bytes;
  b.sparse = sparse;
  b.internal = b.name == "dynamic shared memory";
  b.begin = left ? b.data() : b.data() + (data - bytes) / align * align;
  mprotect(b.data(), data, PROT_READ | PROT_WRITE);
  if (!sparse) {
    memset(b.data(), kSlack, data);
    memset(b.begin, kPoison, bytes);
  }
  const int id = static_cast<int>(names.size());
  names.push_back(b.name);
  by_address[b.map] = id;
  char* begin = b.begin;
  buffers.emplace(id, std::move(b));
  return begin;
}

void free_guarded(void* pointer) {
  const int id = find(pointer);
  if (id < 0) return;
  by_address.erase(buffers[id].map);
  munmap(buffers[id].map, buffers[id].map_bytes);
  buffers.erase(id);
}

void begin_launch(const Launch& launch) {
  records.emplace_back();
  records.back().launch = launch;
  for (auto& [id, b] : buffers) b.cover[0].clear(), b.cover[1].clear();
  catch_faults();
}

Launch& launch_record() { return records.back().launch; }

void touch(const void* address, int bytes, bool write, Site site) {
  preempt(32);
  const int id = find(address);
  const char* verb = write ? "writes " : "reads ";
  const auto at = [&] { return " at " + std::string(site.file) + ":" + std::to_string(site.line); };
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(verb + std::to_string(bytes) + " misaligned bytes" + at());
  if (id >= 0) {
    Buffer& b = buffers[id];
    const char* p = static_cast<const char*>(address);
    if (p < b.begin || p + bytes > b.begin + b.bytes) {
      abandon(describe_thread() + ": " + verb + "out of bounds: " + std::to_string(bytes) + " bytes at " +
                  place(b, address) + at(),
              cudaErrorIllegalAddress);
    }
    if (b.internal) fail(std::string(verb) + "shared memory by a helper for global memory" + at());
    auto& cover = b.cover[write];
    if (cover.empty() && b.bytes <= kCoverLimit) cover.resize(b.bytes);
    for (size_t i = p - b.begin, end = i + bytes; i < end && !cover.empty(); ++i) cover[i] += cover[i] < 255;
  }
  Block& block = *current->block;
  block.bytes += bytes;
  Warp& warp = block.warps[current->linear / 32];
  LineTraffic& line = line_of(warp, site, id, write);
  const uint64_t k = line.next[lane()]++ - line.first;
  while (line.accesses.size() <= k) line.accesses.emplace_back();
  auto& access = line.accesses[k];
  const uint64_t base = id < 0 ? 0 : reinterpret_cast<uintptr_t>(buffers[id].map) / 32;
  access.sectors[__builtin_popcount(access.lanes)] =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) / 32 - base);
  access.lanes |= 1u << lane();
  access.bytes += bytes;
  while (!line.accesses.empty() && line.accesses.front().lanes == warp.exist) {
    count(line, line.accesses.front());
    line.accesses.pop_front();
    ++line.first;
  }
}

void finish_block(Block& block) {
  for (Warp& warp : block.warps) {
    for (auto& line : warp.lines) {
      for (auto& access : line.accesses) count(line, access);
    }
    warp.lines.clear();
  }
  auto& record = records.back().launch;
  const uint64_t linear = (uint64_t{block.index.z} * record.grid.y + block.index.y) * record.grid.x + block.index.x;
  if (record.block_bytes.size() <= linear) record.block_bytes.resize(linear + 1);
  record.block_bytes[linear] = block.bytes;
}

void end_launch() {
  release_faults();
  for (auto& [id, b] : buffers) {
    for (const int write : {0, 1}) {
      if (b.cover[write].empty()) continue;
      const auto [least, most] = std::minmax_element(b.cover[write].begin(), b.cover[write].end());
      records.back().cover[write][id] = Cover{*least, *most};
    }
  }
}

std::string first_overwritten() {
  for (const auto& [id, b] : buffers) {
    if (!slack_intact(b)) return b.name;
  }
  return "";
}

void set_error(const std::string& message) {
  if (error_text.empty()) error_text = message;
}

}  // namespace simt

// ---- what tests call ----
#define SIMT_API extern "C" __attribute__((visibility("default")))

// Memory for a tensor: ends (left: begins) at a page that must not be touched, filled with NaNs (sparse: zero pages).
SIMT_API void* simt_alloc(const char* name, size_t bytes, size_t align, int left, int sparse) {
  return simt::allocate_guarded(name, bytes, align, left != 0, sparse != 0);
}
SIMT_API void simt_free(void* pointer) { simt::free_guarded(pointer); }
// The first error since simt_reset, "" if there was none.
SIMT_API const char* simt_error() { return simt::error_text.c_str(); }
// The launches since simt_reset as JSON.
SIMT_API const char* simt_report() {
  simt::report_text = "[";
  for (const auto& record : simt::records) {
    simt::report_text += (simt::report_text.size() > 1 ? "," : "") + simt::json(record.launch, record);
  }
  return (simt::report_text += "]").c_str();
}
SIMT_API void simt_reset() {
  simt::records.clear();
  simt::error_text.clear();
}
SIMT_API void simt_seed(uint64_t seed) { simt::seed_random(seed); }

// Counters of global memory traffic, by launch and buffer.
#include <algorithm>

#include "records.h"

namespace simt {
namespace {

constexpr size_t kCoverLimit = 64 << 20;  // larger buffers are counted, not mapped byte by byte

struct Cover {
  int least = 0, most = 0;
};

struct Record {
  Launch launch;
  std::map<int, Cover> cover[2];
};

std::vector<Record> records;
std::string error_text, report_text;

// The second-level cache, where the device model has it counted: sectors of 32 bytes, of which those that were said to
// be used for the last time leave first, then the one that was used longest ago. It is empty before a call.
struct Cache {
  struct Use {
    Buffer* buffer;
    uint32_t sector;
    uint64_t time;
  };
  uint64_t now = 0, emptied = 0, held = 0;
  std::deque<Use> leave_first, in_order;

  void use(Buffer* b, uint32_t sector, bool write, bool last_use) {
    if (b->used.empty()) b->used.resize(b->map_bytes / 32);
    uint64_t& time = b->used[sector];
    if (time <= emptied) {
      ++held;
      if (!write) records.back().launch.missed[b->id] += 32;
    }
    time = ++now;
    (last_use ? leave_first : in_order).push_back({b, sector, time});
    while (held * 32 > static_cast<uint64_t>(device().cache_bytes)) {
      std::deque<Use>& from = leave_first.empty() ? in_order : leave_first;
      uint64_t& time = from.front().buffer->used[from.front().sector];
      if (time == from.front().time) time = 0, --held;
      from.pop_front();
    }
  }
  void clear() {
    emptied = now;
    held = 0;
    leave_first.clear();
    in_order.clear();
  }
} cache;

void count(const LineTraffic& line, LineTraffic::Access& access) {
  uint32_t* const end = access.sectors + __builtin_popcount(access.lanes);
  std::sort(access.sectors, end);
  Launch& launch = records.back().launch;
  Counter& c = (line.write ? launch.writes : launch.reads)[line.buffer];
  c.accesses += 1;
  c.bytes += access.bytes;
  uint32_t* const last = std::unique(access.sectors, end);
  c.sectors += last - access.sectors;
  c.ideal_sectors += (access.bytes + 31) / 32;
  if (device().cache_bytes == 0 || line.buffer < 0) return;
  Buffer* const b = &live_buffers().at(line.buffer);
  for (const uint32_t* sector = access.sectors; sector < last; ++sector) {
    cache.use(b, *sector, line.write, access.last_use);
  }
}

LineTraffic& line_of(WarpTraffic& warp, Site site, int buffer, bool write) {
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
  for (int id = -1; id < buffers_ever(); ++id) {
    std::string fields;
    for (const bool write : {false, true}) {
      const auto& counters = write ? launch.writes : launch.reads;
      const auto it = counters.find(id);
      if (it == counters.end()) continue;
      const Counter& c = it->second;
      const auto missed = launch.missed.find(id);
      if (!write && missed != launch.missed.end()) fields += "\"missed_bytes\":" + number(missed->second);
      const std::string verb = write ? "write" : "read";
      fields += std::string(fields.empty() ? "" : ",") + "\"" + verb + "_bytes\":" + number(c.bytes) + ",\"" + verb +
                "_accesses\":" + number(c.accesses) + ",\"" + verb + "_sectors\":" + number(c.sectors) + ",\"" + verb +
                "_ideal_sectors\":" + number(c.ideal_sectors);
      const auto cover = record.cover[write].find(id);
      if (cover == record.cover[write].end()) continue;
      fields += ",\"" + verb + "s_of_a_byte\":[" + number(cover->second.least) + "," + number(cover->second.most) + "]";
    }
    if (fields.empty()) continue;
    s += std::string(first ? "" : ",") + "\"" + (id < 0 ? "other" : name_of_buffer(id)) + "\":{" + fields + "}";
    first = false;
  }
  return s + "}}";
}

}  // namespace

void begin_launch(const Launch& launch) {
  records.emplace_back();
  records.back().launch = launch;
  for (auto& [id, b] : live_buffers()) b.cover[0].clear(), b.cover[1].clear();
}

Launch& launch_record() { return records.back().launch; }

void count_access(WarpTraffic* warp, int lane, Site site, Buffer* b, const void* address, int bytes, bool write,
                  bool last_use) {
  if (b != nullptr) {
    auto& cover = b->cover[write];
    if (cover.empty() && b->bytes <= kCoverLimit) cover.resize(b->bytes);
    const size_t at = static_cast<const char*>(address) - b->begin;
    for (size_t i = at, end = i + bytes; i < end && !cover.empty(); ++i) cover[i] += cover[i] < 255;
  }
  LineTraffic& line = line_of(*warp, site, b == nullptr ? -1 : b->id, write);
  const uint64_t k = line.next[lane]++ - line.first;
  while (line.accesses.size() <= k) line.accesses.emplace_back();
  auto& access = line.accesses[k];
  const uint64_t base = b == nullptr ? 0 : reinterpret_cast<uintptr_t>(b->map) / 32;
  access.sectors[__builtin_popcount(access.lanes)] =
      static_cast<uint32_t>(reinterpret_cast<uintptr_t>(address) / 32 - base);
  access.lanes |= 1u << lane;
  access.bytes += bytes;
  access.last_use = last_use;
  while (!line.accesses.empty() && line.accesses.front().lanes == warp->exist) {
    count(line, line.accesses.front());
    line.accesses.pop_front();
    ++line.first;
  }
}

void finish_warp(WarpTraffic* warp) {
  for (auto& line : warp->lines) {
    for (auto& access : line.accesses) count(line, access);
  }
  warp->lines.clear();
}

void finish_block(uint64_t linear, uint64_t bytes) {
  auto& all = records.back().launch.block_bytes;
  if (all.size() <= linear) all.resize(linear + 1);
  all[linear] = bytes;
}

void end_launch() {
  for (auto& [id, b] : live_buffers()) {
    for (const int write : {0, 1}) {
      if (b.cover[write].empty()) continue;
      const auto [least, most] = std::minmax_element(b.cover[write].begin(), b.cover[write].end());
      records.back().cover[write][id] = Cover{*least, *most};
    }
  }
}

void set_error(const std::string& message) {
  if (error_text.empty()) error_text = message;
}

}  // namespace simt

// ---- what tests call ----
#define SIMT_API extern "C" __attribute__((visibility("default")))

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
  simt::cache.clear();
  simt::error_text.clear();
}

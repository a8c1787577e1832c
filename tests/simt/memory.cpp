// Guarded memory: every buffer lies between two pages that nobody may touch, slack beside it is watched.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "records.h"

namespace simt {
namespace {

constexpr unsigned char kSlack = 0xa5;

std::map<char*, int> by_address;  // start of the mapping -> buffer
std::map<int, Buffer> buffers;
std::vector<std::string> names;  // of all buffers there ever were
Buffer* last = nullptr;          // most accesses are to the buffer of the one before

bool slack_intact(const Buffer& b) {
  if (b.sparse) return true;
  const char *data = b.map + getpagesize(), *data_end = b.map + b.map_bytes - getpagesize();
  const auto kept = [](const char* from, const char* to) {
    return std::all_of(from, to, [](char c) { return static_cast<unsigned char>(c) == kSlack; });
  };
  return kept(data, b.begin) && kept(b.begin + b.bytes, data_end);
}

}  // namespace

std::map<int, Buffer>& live_buffers() { return buffers; }
const std::string& name_of_buffer(int id) { return names[id]; }
int buffers_ever() { return static_cast<int>(names.size()); }

Buffer* buffer_at(const void* address) {
  char* p = static_cast<char*>(const_cast<void*>(address));
  if (last != nullptr && p >= last->map && p < last->map + last->map_bytes) return last;
  auto it = by_address.upper_bound(p);
  if (it == by_address.begin()) return nullptr;
  Buffer& b = buffers[(--it)->second];
  return p < b.map + b.map_bytes ? last = &b : nullptr;
}

std::string place(const Buffer& b, const void* address) {
  const long long offset = static_cast<const char*>(address) - b.begin;
  return b.name + (offset < 0 ? " - " : " + ") + std::to_string(offset < 0 ? -offset : offset) + " (" + b.name +
         " has " + std::to_string(b.bytes) + " bytes)";
}

void* allocate_guarded(const char* name, size_t bytes, size_t align, bool left, bool sparse) {
  const size_t page = getpagesize(), data = std::max(page, (bytes + page - 1) / page * page);
  void* map = mmap(nullptr, data + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  Buffer b;
  b.name = name;
  b.map = static_cast<char*>(map);
  b.map_bytes = data + 2 * page;
  b.bytes = bytes;
  b.sparse = b.filled = sparse;
  b.internal = b.name == "dynamic shared memory";
  char* const at = b.map + page;
  b.begin = left ? at : at + (data - bytes) / align * align;
  mprotect(at, data, PROT_READ | PROT_WRITE);
  if (!sparse) {
    memset(at, kSlack, data);
    memset(b.begin, kPoison, bytes);
  }
  const int id = b.id = static_cast<int>(names.size());
  names.push_back(b.name);
  by_address[b.map] = id;
  char* begin = b.begin;
  buffers.emplace(id, std::move(b));
  return begin;
}

void free_guarded(void* pointer) {
  Buffer* const b = buffer_at(pointer);
  if (b == nullptr) return;
  last = nullptr;
  by_address.erase(b->map);
  munmap(b->map, b->map_bytes);
  buffers.erase(b->id);
}

bool fill(void* pointer, int value, size_t bytes) {
  Buffer* const b = buffer_at(pointer);
  const char* p = static_cast<char*>(pointer);
  if (b == nullptr || p < b->begin || p + bytes > b->begin + b->bytes) return false;
  memset(pointer, value, bytes);
  b->written.resize(b->bytes);
  std::fill_n(b->written.begin() + (p - b->begin), bytes, 1);
  return true;
}

std::string first_overwritten() {
  for (const auto& [id, b] : buffers) {
    if (!slack_intact(b)) return b.name;
  }
  return "";
}

}  // namespace simt

// ---- what tests call ----
#define SIMT_API extern "C" __attribute__((visibility("default")))

// Memory for a tensor: ends (left: begins) at a page that must not be touched, filled with NaNs (sparse: zero pages).
SIMT_API void* simt_alloc(const char* name, size_t bytes, size_t align, int left, int sparse) {
  return simt::allocate_guarded(name, bytes, align, left != 0, sparse != 0);
}
SIMT_API void simt_free(void* pointer) { simt::free_guarded(pointer); }
// The host has given all of it a value (constant: which no kernel may change).
SIMT_API void simt_filled(void* pointer, int constant) {
  simt::Buffer* const b = simt::buffer_at(pointer);
  if (b != nullptr) b->filled = true, b->constant = constant != 0;
}

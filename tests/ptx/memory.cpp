// Every access of a thread: bounds, alignment, whether somebody wrote what is read, whether anything orders it; and
// cp.async, whose bytes are there after the wait and not before.
#include "machine.h"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

namespace ptx {

void fail(const std::string& what) { throw std::runtime_error(what); }

// The shadows of bytes at..at + bytes of `size`; smaller accesses than there were split all of them.
Shadow* Shadows::of(size_t at, size_t bytes, size_t size, size_t* count) {
  if (all.empty()) all.resize(size / granule + 1);
  if (bytes < granule) {
    const size_t parts = granule / bytes;
    std::vector<Shadow> finer(size / bytes + 1);
    for (size_t k = 0; k < finer.size(); ++k) finer[k] = all[k / parts];
    all.swap(finer);
    granule = static_cast<uint32_t>(bytes);
  }
  *count = bytes / granule;
  return &all[at / granule];
}

namespace {

std::unordered_map<int, Shadows> of_buffer;  // in this launch
int last_id = -1;
Shadows* last_shadows = nullptr;

Shadows& shadows_of(const simt::Buffer& b) {
  if (b.id != last_id) last_id = b.id, last_shadows = &of_buffer[b.id];
  return *last_shadows;
}

const char* verb(const Access& access) { return access.write ? "writes " : "reads "; }

uint8_t* reach_parameter(Launch& l, uint64_t address, uint32_t bytes, Access access) {
  if (!(address & kParamWindow)) fail("a parameter at an address that is none");
  const uint64_t at = address & ~kParamWindow;
  if (access.write) fail("writes to a parameter");
  if (at + bytes > l.params.size()) fail("reads beyond the parameters: byte " + std::to_string(at));
  if (at % bytes) fail("reads misaligned parameters: byte " + std::to_string(at));
  return l.params.data() + at;
}

uint8_t* reach_shared(Thread& t, const Ins& i, uint64_t address, uint32_t bytes, bool generic, Access access) {
  Launch& l = *t.launch;
  Block* owner = t.block;
  uint64_t at = address & 0xffffffffu;
  if (generic) {
    const uint32_t rank = static_cast<uint32_t>((address & ~kSharedWindow) >> 32);
    at = static_cast<uint32_t>(at - kWindowLow);
    if (rank > 0) {
      const uint32_t id = t.block->cluster_first + rank - 1;
      owner = l.blocks[id].get();
      if (!owner || owner->done || owner->exited) {
        fail(verb(access) + ("shared memory of block " + std::to_string(id)) + ", whose threads exit");
      }
      if (owner != t.block && l.cluster_state[t.block->cluster_first].second == 0) {
        fail(verb(access) + std::string("shared memory of another block before the cluster's first barrier"));
      }
    }
  }
  const uint64_t o = at - kSharedBase;
  if (at < kSharedBase || o + bytes > owner->shared.size()) {
    fail(verb(access) + std::string("out of bounds: ") + std::to_string(bytes) + " bytes at shared byte " +
         std::to_string(static_cast<int64_t>(at) - kSharedBase) + " (the block has " +
         std::to_string(owner->shared.size()) + ")");
  }
  if (at % bytes) fail(verb(access) + std::to_string(bytes) + " misaligned bytes at shared byte " + std::to_string(o));
  if (counting()) count_shared(t, i, o, bytes);
  size_t count = 0;
  Shadow* const s = owner->shadows.of(o, bytes, owner->shared.size(), &count);
  for (size_t k = 0; k < count; ++k) {
    const bool fresh = access.write && !s[k].wt && !s[k].rt && !s[k].pending;
    if (fresh) {
      s[k].wt = t.global + 1, s[k].we = t.block->epoch, s[k].watomic = access.atomic, s[k].written = 1;
      s[k].wline = i.line;
      continue;
    }
    const std::string where = "shared byte " + std::to_string(o + k * owner->shadows.granule);
    if (s[k].pending) fail(verb(access) + where + " while a cp.async to it is not waited for");
    note(t, i, s[k], access, where, false);
  }
  uint8_t* const init = owner->shared_init.data() + o;
  if (access.write && !access.atomic) {
    memset(init, 1, bytes);
  } else if (memchr(init, 0, bytes)) {
    fail("reads shared memory that nobody wrote, byte " + std::to_string(o));
  }
  return owner->shared.data() + o;
}

std::string in_no_buffer(uint64_t address) {
  char text[64];
  snprintf(text, sizeof(text), "address 0x%llx, in no buffer", static_cast<unsigned long long>(address));
  return text;
}

uint8_t* reach_global(Thread& t, const Ins& i, uint64_t address, uint32_t bytes, Access access) {
  char* const p = reinterpret_cast<char*>(address);
  simt::Buffer* const b = simt::buffer_at(p);
  const std::string size = std::to_string(bytes);
  if (!b) fail(verb(access) + ("out of bounds: " + size) + " bytes at " + in_no_buffer(address));
  if (p < b->begin || p + bytes > b->begin + b->bytes) {
    fail(verb(access) + ("out of bounds: " + size) + " bytes at " + simt::place(*b, p));
  }
  if (address % bytes) fail(verb(access) + size + " misaligned bytes at " + simt::place(*b, p));
  if (access.write && b->constant) fail("writes to an input: " + simt::place(*b, p));
  const uint64_t o = p - b->begin;
  if (!i.strong && !b->internal) {
    t.block->bytes += bytes;
    simt::count_access(&t.block->warps[t.tid / 32], t.tid % 32, {"PTX", static_cast<int>(i.line)}, b, p, bytes,
                       access.write);
  }
  uint8_t* const data = reinterpret_cast<uint8_t*>(p);
  if (b->sparse) return data;
  if (!b->constant) {  // nobody writes that: nothing to race with
    const bool same = access.incoming && memcmp(data, access.incoming, bytes) == 0;
    size_t count = 0;
    Shadow* const s = shadows_of(*b).of(o, bytes, b->bytes, &count);
    for (size_t k = 0; k < count; ++k) {
      if (access.write && !s[k].wt && !s[k].rt && !s[k].nc) {
        s[k].wt = t.global + 1, s[k].we = t.block->epoch, s[k].watomic = access.atomic, s[k].written = 1;
        s[k].wline = i.line;
      } else {
        note(t, i, s[k], access, b->name + " + " + std::to_string(o + k * bytes / count), same);
      }
    }
  }
  if (b->filled) return data;
  if (b->written.empty()) b->written.resize(b->bytes);
  uint8_t* const written = b->written.data() + o;
  if (access.write && !access.atomic) {
    memset(written, 1, bytes);
  } else if (memchr(written, 0, bytes)) {
    fail("reads what nobody wrote: " + size + " bytes at " + simt::place(*b, p));
  }
  return data;
}

}  // namespace

void forget_shadows() {
  of_buffer.clear();
  last_id = -1;
}

uint8_t* reach(Thread& t, const Ins& i, uint64_t address, uint32_t bytes, uint8_t space, Access access) {
  if (space == kParam || (space == kGeneric && (address & kParamWindow))) {
    return reach_parameter(*t.launch, address, bytes, access);
  }
  const bool generic = space == kGeneric && (address & kSharedWindow);
  if (space == kShared || generic) return reach_shared(t, i, address, bytes, generic, access);
  return reach_global(t, i, address, bytes, access);
}

// ---- cp.async ----

void start_copy(Thread& t, const Ins& i, uint32_t to, uint64_t from, uint32_t bytes) {
  reach(t, i, from, bytes, kGlobal, {});
  uint8_t* const p = reach(t, i, to, bytes, kShared, {true, false, nullptr});
  memset(p, 0xff, bytes);
  size_t count = 0;
  Shadow* const s = t.block->shadows.of(to - kSharedBase, bytes, t.block->shared.size(), &count);
  for (size_t k = 0; k < count; ++k) s[k].pending = 1;
  t.open.push_back({from, to, bytes});
}

void commit_group(Thread& t) { t.groups.push_back(std::move(t.open)), t.open.clear(); }

void wait_groups(Thread& t, size_t left) {
  while (t.groups.size() > left) {
    for (const Copy& c : t.groups.front()) {
      memcpy(t.block->shared.data() + c.to - kSharedBase, reinterpret_cast<const void*>(c.from), c.bytes);
      size_t count = 0;
      Shadow* const s = t.block->shadows.of(c.to - kSharedBase, c.bytes, t.block->shared.size(), &count);
      for (size_t k = 0; k < count; ++k) s[k].pending = 0;
    }
    t.groups.erase(t.groups.begin());
  }
}

}  // namespace ptx

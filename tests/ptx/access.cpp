// Loads, stores, atomics and cp.async.
#include <algorithm>

#include "decode.h"

namespace ptx {
namespace {

uint64_t address_of(const Thread& t, const Ins& i) {
  const uint64_t address = raw(t, i.a) + static_cast<uint64_t>(i.off);
  return i.space == kShared ? address & 0xffffffffu : address;
}

void load(Thread& t, const Ins& i) {
  const uint64_t address = address_of(t, i);
  const uint8_t* p = reach(t, i, address, uint32_t{i.width} * i.n, i.space, {false, i.strong, nullptr});
  uint64_t value[4] = {};
  for (int k = 0; k < i.n; ++k) {
    memcpy(&value[k], p + k * i.width, i.width);
    const int above = 64 - 8 * i.width;
    if (i.sign) value[k] = static_cast<uint64_t>(static_cast<int64_t>(value[k] << above) >> above);
  }
  for (int k = 0; k < i.n; ++k) {
    if (i.v[k] >= 0) t.R[i.v[k]] = value[k];
  }
  if (i.acquire) acquire_from(t, address);
  if (i.strong) {
    if (!i.acquire) relaxed_from(t, address);
    ++t.polled;
    t.stop = true;
  }
}

void store(Thread& t, const Ins& i) {
  const uint64_t address = address_of(t, i);
  if (i.release) release_to(t, address);
  uint8_t value[16];
  for (int k = 0; k < i.n; ++k) {
    const uint64_t r = raw(t, i.v[k]);
    memcpy(value + k * i.width, &r, i.width);
  }
  const uint32_t bytes = uint32_t{i.width} * i.n;
  memcpy(reach(t, i, address, bytes, i.space, {true, i.strong, value}), value, bytes);
  if (i.strong && !i.release) relaxed_to(t, address);
}

enum Update { kAdd, kOr, kAnd, kExch, kMax, kMin, kCas };
template <class T, int U>
void update(Thread& t, const Ins& i) {
  const uint64_t address = address_of(t, i);
  uint8_t* const p = reach(t, i, address, sizeof(T), i.space, {true, true, nullptr});
  T old;
  memcpy(&old, p, sizeof old);
  const T b = get<T>(t, i.b);
  T now = old;
  if (U == kAdd) now = static_cast<T>(old + b);
  if (U == kOr) now = old | b;
  if (U == kAnd) now = old & b;
  if (U == kExch) now = b;
  if (U == kMax) now = std::max(old, b);
  if (U == kMin) now = std::min(old, b);
  if (U == kCas) now = old == b ? get<T>(t, i.c) : old;
  if (i.acquire) {
    acquire_from(t, address);
  } else {
    relaxed_from(t, address);
  }
  memcpy(p, &now, sizeof now);
  if (i.release) {
    release_to(t, address);
  } else {
    relaxed_to(t, address);
  }
  if (t.launch->cooperative && address - t.launch->grid_word < 16) ++t.launch->grid_arrivals;
  if (i.d >= 0) put<T>(t, i.d, old);
}
template <int U>
Handler update_of(Type type) {
  switch (type) {
    case tB32:
    case tU32:
      return &update<uint32_t, U>;
    case tB64:
    case tU64:
      return &update<uint64_t, U>;
    case tS32:
      return &update<int32_t, U>;
    default:
      return nullptr;
  }
}

// kind: it is one of .cg; c: the bytes, a constant
void copy(Thread& t, const Ins& i) {
  const uint32_t bytes = get<uint32_t>(t, i.c);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
  if (i.kind && bytes != 16) fail("cp.async.cg copies 16 bytes");
  start_copy(t, i, static_cast<uint32_t>(raw(t, i.a) + static_cast<uint64_t>(i.off)), raw(t, i.b), bytes);
}
void commit(Thread& t, const Ins&) { commit_group(t); }
void wait(Thread& t, const Ins& i) { wait_groups(t, get<uint32_t>(t, i.a)); }
void wait_all(Thread& t, const Ins&) { commit_group(t), wait_groups(t, 0); }

bool only(const Opcode& op, std::initializer_list<const char*> known) {
  return std::all_of(op.parts.begin() + 1, op.parts.end(), [&](const std::string& part) {
    return size_of(type_named(part)) > 0 || std::any_of(known.begin(), known.end(), [&](auto k) { return part == k; });
  });
}

}  // namespace

Handler loading(const Opcode& op, Ins* i) {
  if (!only(op, {"param",
                 "shared",
                 "shared::cta",
                 "global",
                 "nc",
                 "cs",
                 "cg",
                 "ca",
                 "lu",
                 "wb",
                 "wt",
                 "v2",
                 "v4",
                 "L1::no_allocate",
                 "L1::evict_first",
                 "L1::evict_last",
                 "acquire",
                 "release",
                 "relaxed",
                 "gpu",
                 "sys",
                 "volatile",
                 "weak"})) {
    return nullptr;
  }
  const bool shared = op.has("shared") || op.has("shared::cta");
  i->space = op.has("param") ? kParam : shared ? kShared : op.has("global") ? kGlobal : kGeneric;
  i->width = static_cast<uint8_t>(size_of(op.type()));
  i->sign = is_signed(op.type());
  i->nc = op.has("nc"), i->acquire = op.has("acquire"), i->release = op.has("release");
  i->strong = i->acquire || i->release || op.has("relaxed") || op.has("volatile");
  i->n = op.has("v4") ? 4 : op.has("v2") ? 2 : 1;
  const bool loads = op.name() == "ld";
  if (i->width == 0 || i->n * i->width > 16 || (i->nc && (i->space != kGlobal || !loads || i->strong))) return nullptr;
  if (loads ? i->release : i->acquire) return nullptr;
  return loads ? &load : &store;
}

Handler atomic(const Opcode& op, Ins* i) {
  if (!only(op, {"global", "shared", "relaxed", "acquire", "release", "acq_rel", "gpu", "sys", "cta", "add", "or",
                 "and", "exch", "max", "min", "cas"})) {
    return nullptr;
  }
  i->space = op.has("global") ? kGlobal : op.has("shared") ? kShared : kGeneric;
  i->release = op.has("release") || op.has("acq_rel"), i->acquire = op.has("acquire") || op.has("acq_rel");
  i->strong = true;
  const std::pair<const char*, Handler (*)(Type)> all[] = {
      {"add", &update_of<kAdd>}, {"or", &update_of<kOr>},   {"and", &update_of<kAnd>}, {"exch", &update_of<kExch>},
      {"max", &update_of<kMax>}, {"min", &update_of<kMin>}, {"cas", &update_of<kCas>}};
  for (const auto& [name, of] : all) {
    if (op.has(name)) return of(op.type());
  }
  return nullptr;
}

Handler copying(const Opcode& op) {
  if (op.whole == "cp.async.commit_group") return &commit;
  if (op.whole == "cp.async.wait_all") return &wait_all;
  if (op.whole == "cp.async.wait_group") return &wait;
  return op.whole == "cp.async.cg.shared.global" || op.whole == "cp.async.ca.shared.global" ? &copy : Handler{};
}

}  // namespace ptx

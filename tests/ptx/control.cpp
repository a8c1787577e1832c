// Branches, barriers, fences, what the lanes of a warp do together, addresses of other spaces, special registers.
#include <map>

#include "decode.h"

namespace ptx {
namespace {

void branch(Thread& t, const Ins& i) { t.pc = static_cast<uint32_t>(i.target); }
void leave(Thread& t, const Ins&) { t.state = kExited, t.stop = true; }
void trap(Thread&, const Ins&) { fail("trap"); }
void fence_of(Thread& t, const Ins&) { fence(t); }
void barrier(Thread& t, const Ins& i) {
  if (get<uint32_t>(t, i.a) != 0) fail("only barrier 0 is supported");
  t.state = kBar, t.stop = true;
}
void arrive(Thread& t, const Ins&) { cluster_arrive(t); }
void wait(Thread& t, const Ins&) { cluster_wait(t); }

// ---- warps ----

enum WarpKind { kWarpBfly, kWarpUp, kWarpDown, kWarpIdx, kWarpAny, kWarpAll, kWarpBallot, kWarpSync };

void warp(Thread& t, const Ins& i) {
  t.mask = get<uint32_t>(t, i.e);
  if (!(t.mask >> (t.tid % 32) & 1)) fail("a warp operation by a lane that its mask does not name");
  t.state = kWarp, t.stop = true;
}

// The lane that a shuffle's lane k reads, and whether that lies within its segment (PTX ISA, shfl.sync).
int source_of(const Ins& i, const Thread& lane, int k, bool* in) {
  const int by = static_cast<int>(get<uint32_t>(lane, i.b) & 31), c = static_cast<int>(get<uint32_t>(lane, i.c));
  const int clamp = c & 31, segment = c >> 8 & 31, most = (k & segment) | (clamp & ~segment), least = k & segment;
  int from = k;
  if (i.kind == kWarpUp) from = k - by, *in = from >= most;
  if (i.kind == kWarpDown) from = k + by, *in = from <= most;
  if (i.kind == kWarpBfly) from = k ^ by, *in = from <= most;
  if (i.kind == kWarpIdx) from = least | (by & ~segment), *in = from <= most;
  return *in ? from : k;
}

// ---- addresses ----

void to_global(Thread& t, const Ins& i) {
  const uint64_t a = raw(t, i.a);
  if (a & (kSharedWindow | kParamWindow)) fail("cvta.to.global of an address that is not global");
  t.R[i.d] = a;
}
void to_shared(Thread& t, const Ins& i) {
  const uint64_t a = raw(t, i.a);
  if (!(a & kSharedWindow)) fail("cvta.to.shared of an address that is not shared");
  t.R[i.d] = static_cast<uint32_t>(a) - kWindowLow;
}
void from_shared(Thread& t, const Ins& i) {
  t.R[i.d] = kSharedWindow | static_cast<uint32_t>(static_cast<uint32_t>(raw(t, i.a)) + kWindowLow);
}
void from_global(Thread& t, const Ins& i) { t.R[i.d] = raw(t, i.a); }
void mapa(Thread& t, const Ins& i) {
  const uint64_t a = raw(t, i.a);
  const uint32_t rank = get<uint32_t>(t, i.b);
  if (!(a & kSharedWindow)) fail("mapa of an address that is not shared");
  if (rank >= t.launch->cluster) {
    fail("mapa of rank " + std::to_string(rank) + " in a cluster of " + std::to_string(t.launch->cluster));
  }
  t.R[i.d] = kSharedWindow | static_cast<uint64_t>(rank + 1) << 32 | (a & 0xffffffffu);
}

// ---- special registers ----

using Special = uint32_t (*)(const Thread&);
const std::map<std::string, Special>& specials() {
  static const Special zero = [](const Thread&) -> uint32_t { return 0; };
  static const Special one = [](const Thread&) -> uint32_t { return 1; };
  static const Special rank = [](const Thread& t) -> uint32_t { return t.block->id - t.block->cluster_first; };
  static const Special size = [](const Thread& t) -> uint32_t { return t.launch->cluster; };
  static const std::map<std::string, Special> kAll = {
      {"%tid.x", [](const Thread& t) -> uint32_t { return t.tid; }},
      {"%tid.y", zero},
      {"%tid.z", zero},
      {"%ntid.x", [](const Thread& t) -> uint32_t { return t.launch->threads; }},
      {"%ntid.y", one},
      {"%ntid.z", one},
      {"%ctaid.x", [](const Thread& t) -> uint32_t { return t.block->id % t.launch->grid_x; }},
      {"%ctaid.y", [](const Thread& t) -> uint32_t { return t.block->id / t.launch->grid_x; }},
      {"%ctaid.z", zero},
      {"%nctaid.x", [](const Thread& t) -> uint32_t { return t.launch->grid_x; }},
      {"%nctaid.y", [](const Thread& t) -> uint32_t { return t.launch->grid / t.launch->grid_x; }},
      {"%nctaid.z", one},
      {"%laneid", [](const Thread& t) -> uint32_t { return t.tid % 32; }},
      // cooperative groups: the address of the grid's barrier
      {"%envreg1", [](const Thread& t) -> uint32_t { return static_cast<uint32_t>(t.launch->grid_word >> 32); }},
      {"%envreg2", [](const Thread& t) -> uint32_t { return static_cast<uint32_t>(t.launch->grid_word); }},
      {"%cluster_ctarank", rank},
      {"%cluster_ctaid.x", rank},
      {"%cluster_nctarank", size},
      {"%cluster_nctaid.x", size},
  };
  return kAll;
}
void read_special(Thread& t, const Ins& i) {
  put<uint32_t>(t, i.d, reinterpret_cast<Special>(static_cast<uintptr_t>(i.off))(t));
}

}  // namespace

void sync_warp(Thread& t) {
  Block& b = *t.block;
  Thread* const lanes = b.threads.data() + t.tid / 32 * 32;
  const auto& code = t.launch->kernel->code;
  const Ins& i = code[t.at];
  const auto named = [&](int k) { return (t.mask >> k & 1) != 0; };
  for (int k = 0; k < 32; ++k) {
    if (!named(k)) continue;
    if (lanes[k].state == kExited) fail("a warp operation names lane " + std::to_string(k) + ", which has ended");
    if (lanes[k].state != kWarp || lanes[k].mask != t.mask) return;
  }
  uint32_t ballot = 0, value[32] = {};
  for (int k = 0; k < 32; ++k) {
    if (!named(k)) continue;
    if (lanes[k].at != t.at) {
      fail("lanes meet in different warp operations: PTX lines " + std::to_string(i.line) + " and " +
           std::to_string(code[lanes[k].at].line));
    }
    if (i.kind != kWarpSync) value[k] = get<uint32_t>(lanes[k], i.a);
    ballot |= (value[k] & 1) << k;
  }
  for (int k = 0; k < 32; ++k) {
    if (!named(k)) continue;
    Thread& lane = lanes[k];
    if (i.kind == kWarpAny) put<uint32_t>(lane, i.d, ballot != 0);
    if (i.kind == kWarpAll) put<uint32_t>(lane, i.d, ballot == t.mask);
    if (i.kind == kWarpBallot) put<uint32_t>(lane, i.d, ballot);
    if (i.kind <= kWarpIdx) {
      bool in = false;
      const int from = source_of(i, lane, k, &in);
      if (!named(from)) fail("a shuffle reads lane " + std::to_string(from) + ", which its mask does not name");
      put<uint32_t>(lane, i.d, value[from]);
      if (i.v[0] >= 0) put<uint32_t>(lane, i.v[0], in);
    }
    lane.state = kReady;
    t.launch->ready.push_back(&lane);
  }
}

// strong: aligned, that is, for all threads of a warp at once.
Handler control(const Opcode& op, Ins* i) {
  static const std::map<std::string, std::pair<Handler, bool>> kAll = {
      {"bra", {&branch, false}},
      {"bra.uni", {&branch, false}},
      {"ret", {&leave, false}},
      {"exit", {&leave, false}},
      {"trap", {&trap, false}},
      {"bar.sync", {&barrier, true}},
      {"bar.cta.sync", {&barrier, true}},
      {"barrier.sync", {&barrier, false}},
      {"barrier.cta.sync", {&barrier, false}},
      {"barrier.sync.aligned", {&barrier, true}},
      {"barrier.cta.sync.aligned", {&barrier, true}},
      {"barrier.cluster.arrive", {&arrive, false}},
      {"barrier.cluster.arrive.release", {&arrive, false}},
      {"barrier.cluster.arrive.aligned", {&arrive, false}},
      {"barrier.cluster.wait", {&wait, false}},
      {"barrier.cluster.wait.acquire", {&wait, false}},
      {"barrier.cluster.wait.aligned", {&wait, false}},
      {"membar.gl", {&fence_of, false}},
      {"membar.sys", {&fence_of, false}},
      {"fence.acq_rel.gpu", {&fence_of, false}},
      {"fence.acq_rel.sys", {&fence_of, false}},
      {"fence.sc.gpu", {&fence_of, false}},
      {"fence.sc.sys", {&fence_of, false}},
  };
  const auto at = kAll.find(op.whole);
  if (at == kAll.end()) return nullptr;
  i->strong = at->second.second;
  return at->second.first;
}

Handler warp_operation(const Opcode& op, Ins* i) {
  static const std::map<std::string, WarpKind> kAll = {
      {"shfl.sync.bfly.b32", kWarpBfly}, {"shfl.sync.up.b32", kWarpUp},        {"shfl.sync.down.b32", kWarpDown},
      {"shfl.sync.idx.b32", kWarpIdx},   {"vote.sync.any.pred", kWarpAny},     {"vote.sync.all.pred", kWarpAll},
      {"bar.warp.sync", kWarpSync},      {"vote.sync.ballot.b32", kWarpBallot}};
  const auto at = kAll.find(op.whole);
  if (at == kAll.end()) return nullptr;
  i->kind = static_cast<uint8_t>(at->second);
  return &warp;
}

Handler address_change(const Opcode& op, Ins*) {
  if (op.whole == "cvta.to.global.u64") return &to_global;
  if (op.whole == "cvta.to.shared.u64") return &to_shared;
  if (op.whole == "cvta.shared.u64") return &from_shared;
  if (op.whole == "cvta.global.u64") return &from_global;
  return op.whole == "mapa.u64" ? &mapa : Handler{};
}

Handler special(const std::string& name, Ins* i) {
  const auto at = specials().find(name);
  if (at == specials().end()) return nullptr;
  i->off = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at->second));
  return &read_special;
}

}  // namespace ptx

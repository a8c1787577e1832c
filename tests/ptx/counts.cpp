// What kernels execute, where a test asks for it: instructions by class, barriers, and how often a warp's access to
// shared memory takes more than one turn of the banks.
#include <algorithm>
#include <deque>

#include "machine.h"

namespace ptx {

// The k-th access of each lane at one PTX line is one of the warp's.
struct SharedLine {
  struct Access {
    uint32_t lanes = 0, bytes = 0, at[32];
  };
  uint32_t line = 0;
  uint64_t first = 0, next[32] = {};
  std::deque<Access> accesses;
};

namespace {

enum Class { kFloat32, kFloat64, kInteger, kMemory, kOther, kClasses };
const char* const kNames[kClasses] = {"fp32", "fp64", "integer", "memory", "other"};

struct Counts {
  std::string kernel;
  uint64_t of_class[kClasses] = {}, barriers = 0, accesses = 0, least_turns = 0, turns = 0;
};
std::vector<Counts> all;
bool on = false;

Class class_of(const Ins& i) {
  std::string text = i.statement();
  if (text[0] == '@') text = text.substr(text.find_first_of(" \t") + 1);
  text = text.substr(text.find_first_not_of(" \t"));
  const std::string code = text.substr(0, text.find_first_of(" \t;"));
  const std::string name = code.substr(0, code.find('.'));
  const auto any = [&](std::initializer_list<const char*> of) {
    return std::any_of(of.begin(), of.end(), [&](const char* n) { return name == n; });
  };
  if (any({"ld", "st", "atom", "red", "cp"})) return kMemory;
  if (!any({"add", "sub", "mul",  "mad", "fma",   "div", "rem", "min", "max", "and",  "or",   "xor", "not",
            "neg", "abs", "sqrt", "rcp", "rsqrt", "ex2", "shl", "shr", "bfi", "prmt", "setp", "cvt", "selp"})) {
    return kOther;
  }
  if (code.find(".f64") != std::string::npos) return kFloat64;
  return code.find(".f32") != std::string::npos ? kFloat32 : kInteger;
}

// Turns that the banks take: 32 of 4 bytes; 8 bytes go by half warps, 16 by quarters. Lanes with one word share it.
void count(const SharedLine::Access& access) {
  Counts& c = all.back();
  const int lanes = 128 / std::max<int>(static_cast<int>(access.bytes), 4);
  ++c.accesses;
  for (int from = 0; from < 32; from += lanes) {
    std::vector<uint32_t> words[32];
    for (int lane = from; lane < from + lanes; ++lane) {
      if (!(access.lanes >> lane & 1)) continue;
      for (uint32_t w = access.at[lane] / 4; w <= (access.at[lane] + access.bytes - 1) / 4; ++w) {
        auto& of_bank = words[w % 32];
        if (std::find(of_bank.begin(), of_bank.end(), w) == of_bank.end()) of_bank.push_back(w);
      }
    }
    size_t most = 0;
    for (const auto& of_bank : words) most = std::max(most, of_bank.size());
    c.turns += most;
    c.least_turns += most > 0;
  }
}

}  // namespace

bool counting() { return on; }

void count_shared(Thread& t, const Ins& i, uint64_t at, uint32_t bytes) {
  auto& lines = t.block->shared_lines[t.tid / 32];
  auto found = std::find_if(lines.begin(), lines.end(), [&](const auto& l) { return l->line == i.line; });
  if (found == lines.end()) {
    lines.push_back(std::make_shared<SharedLine>());
    found = lines.end() - 1;
    (*found)->line = i.line;
  }
  SharedLine& l = **found;
  const int lane = t.tid % 32;
  const uint64_t k = l.next[lane]++ - l.first;
  while (l.accesses.size() <= k) l.accesses.emplace_back();
  auto& access = l.accesses[k];
  access.lanes |= 1u << lane;
  access.bytes = bytes;
  access.at[lane] = static_cast<uint32_t>(at);
  while (!l.accesses.empty() && l.accesses.front().lanes == UINT32_MAX) {
    count(l.accesses.front());
    l.accesses.pop_front();
    ++l.first;
  }
}

void finish_shared(Block& b) {
  for (auto& lines : b.shared_lines) {
    for (const auto& line : lines) {
      for (const auto& access : line->accesses) count(access);
    }
    lines.clear();
  }
}

void begin_counts(Kernel& k) {
  if (!on) return;
  all.emplace_back();
  all.back().kernel = k.name;
  for (Ins& i : k.code) i.count = 0;
}

void end_counts(const Kernel& k, uint32_t threads) {
  if (!on) return;
  for (const Ins& i : k.code) {
    if (i.count == 0) continue;
    all.back().of_class[class_of(i)] += i.count;
    const std::string text = i.statement();
    if (text.find("bar.sync") != std::string::npos || text.find("barrier.") != std::string::npos) {
      all.back().barriers += i.count / threads;
    }
  }
}

}  // namespace ptx

#define API extern "C" __attribute__((visibility("default")))

// Count from here on, or no more.
API void ptx_count(int on) {
  ptx::on = on != 0;
  ptx::all.clear();
}
// Of each launch since then, as JSON: instructions of all threads by class; barriers, of all blocks; accesses of warps
// to shared memory, the turns that the banks take for them, and those they would without conflicts.
API const char* ptx_counts() {
  static std::string text;
  text = "[";
  for (const auto& c : ptx::all) {
    text += std::string(text.size() > 1 ? "," : "") + "{\"kernel\":\"" + c.kernel + "\"";
    for (int k = 0; k < ptx::kClasses; ++k) {
      text += std::string(",\"") + ptx::kNames[k] + "\":" + std::to_string(c.of_class[k]);
    }
    text += ",\"barriers\":" + std::to_string(c.barriers) + ",\"shared_accesses\":" + std::to_string(c.accesses) +
            ",\"turns\":" + std::to_string(c.turns) + ",\"least_turns\":" + std::to_string(c.least_turns) + "}";
  }
  return (text += "]").c_str();
}

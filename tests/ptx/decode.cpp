// One statement of PTX to an instruction with its handler. What is not known is refused by name.
#include <algorithm>

#include "decode.h"

namespace ptx {

std::string trim(const std::string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == std::string::npos ? "" : s.substr(a, b - a + 1);
}

std::vector<std::string> split(const std::string& s, char by) {
  std::vector<std::string> r(1);
  int depth = 0;
  for (const char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == by && depth == 0) {
      r.emplace_back();
    } else {
      r.back() += c;
    }
  }
  for (std::string& one : r) one = trim(one);
  if (r.size() == 1 && r[0].empty()) r.clear();
  return r;
}

Opcode::Opcode(const std::string& text) : whole(text), parts(split(text, '.')) {}

bool Opcode::has(const char* part) const { return std::find(parts.begin() + 1, parts.end(), part) != parts.end(); }

namespace {

struct Reader {
  const Opcode& op;
  const std::vector<std::string>& o;  // operands
  Names& names;
  Ins* i;

  void need(size_t least, size_t most) {
    if (o.size() < least || o.size() > most) names.wrong(op.whole + " of " + std::to_string(o.size()) + " operands");
  }
  int32_t source(size_t k, Type type) { return names.source(o[k], type); }

  // [register+offset] or [symbol+offset]
  int32_t memory(size_t k, int64_t* offset) {
    const std::string& s = o[k];
    if (s.size() < 3 || s.front() != '[' || s.back() != ']') names.wrong("the memory operand " + s);
    const std::string inner = trim(s.substr(1, s.size() - 2));
    const size_t plus = inner.find('+');
    *offset = plus == std::string::npos ? 0 : std::stoll(inner.substr(plus + 1));
    return names.source(trim(inner.substr(0, plus)), tB64);
  }
  void vector(size_t k, bool destination) {
    const std::string& s = o[k];
    const auto parts = s[0] == '{' ? split(s.substr(1, s.size() - 2), ',') : std::vector<std::string>{s};
    if (parts.size() > 4) names.wrong("a vector of " + std::to_string(parts.size()));
    i->n = static_cast<uint8_t>(parts.size());
    for (size_t p = 0; p < parts.size(); ++p) {
      i->v[p] = destination ? names.reg(parts[p]) : names.source(parts[p], op.type());
    }
  }

  void read_load() {
    need(2, 2);
    const bool loads = op.name() == "ld";
    const int n = i->n;
    i->a = memory(loads ? 1 : 0, &i->off);
    vector(loads ? 0 : 1, loads);
    if (i->n != n) names.wrong("a vector of another size than " + op.whole + " says");
  }

  void read_atomic() {
    const bool returns = op.name() == "atom", compares = op.has("cas");
    need(2 + returns + compares, 2 + returns + compares);
    if (returns) i->d = names.reg(o[0]);
    i->a = memory(returns, &i->off);
    i->b = source(1 + returns, op.type());
    if (compares) i->c = source(2 + returns, op.type());
  }

  void read_copy() {
    if (op.has("commit_group") || op.has("wait_all")) return need(0, 0);
    if (op.has("wait_group")) return need(1, 1), void(i->a = source(0, tU32));
    need(3, 3);  // a fourth, the bytes of the source, would leave zeros behind them
    int64_t offset = 0;
    i->a = memory(0, &i->off);
    i->b = memory(1, &offset);
    if (offset != 0) names.wrong("an offset of cp.async's source");
    i->c = source(2, tU32);
    if (i->c >= 0) names.wrong("cp.async of a size that is no constant");
    i->kind = op.has("cg");
  }

  void read_warp() {
    if (op.name() == "bar") return need(1, 1), void(i->e = source(0, tB32));
    const bool shuffles = op.name() == "shfl";
    need(shuffles ? 5 : 3, shuffles ? 5 : 3);
    const auto results = split(o[0], '|');
    i->d = names.reg(results[0]);
    if (results.size() > 1) i->v[0] = names.reg(results[1]);
    i->a = source(1, shuffles ? tB32 : tPred);
    if (shuffles) i->b = source(2, tB32), i->c = source(3, tB32);
    i->e = source(shuffles ? 4 : 2, tB32);
  }

  Handler read_move() {
    need(2, 2);
    const Type type = op.type();
    if (op.parts.size() != 2 || type == tNone) return nullptr;
    if (const Handler h = special(o[1], i)) return i->d = names.reg(o[0]), h;
    i->width = static_cast<uint8_t>(size_of(type));
    if (o[0][0] == '{') return vector(0, true), i->a = source(1, type), kUnpack;
    i->d = names.reg(o[0]);
    if (o[1][0] == '{') return vector(1, false), kPack;
    i->a = source(1, type);
    return move_of(type);
  }

  // setp.cmp{.bool}.type p, a, b{, c}
  Handler read_comparison() {
    const Type type = op.type();
    const bool joins = op.parts.size() == 4;
    if (!joins && op.parts.size() != 3) return nullptr;
    need(3 + joins, 3 + joins);
    i->d = names.reg(o[0]);
    i->a = source(1, type), i->b = source(2, type);
    if (joins) {
      i->e = source(3, tPred);
      i->kind = op.parts[2] == "and" ? 1 : op.parts[2] == "or" ? 2 : op.parts[2] == "xor" ? 3 : 0;
      if (i->kind == 0) return nullptr;
    }
    return comparison(op.parts[1], type);
  }

  // d, a{, b{, c{, e}}}
  Handler read_arithmetic() {
    const Handler h = arithmetic(op);
    if (!h) return nullptr;
    const std::string& name = op.name();
    const Type type = op.type();
    const auto any = [&](std::initializer_list<const char*> of) {
      return std::any_of(of.begin(), of.end(), [&](const char* n) { return name == n; });
    };
    const size_t sources = any({"bfi"})                                                ? 4
                           : any({"fma", "mad", "selp", "prmt"})                       ? 3
                           : any({"neg", "not", "abs", "sqrt", "rcp", "rsqrt", "ex2"}) ? 1
                                                                                       : 2;
    need(sources + 1, sources + 1);
    i->d = names.reg(o[0]);
    i->a = source(1, type);
    if (sources > 1) i->b = source(2, any({"shl", "shr"}) ? tU32 : type);
    if (sources > 2) i->c = source(3, any({"selp"}) ? tPred : any({"bfi"}) ? tU32 : type);
    if (sources > 3) i->e = source(4, tU32);
    return h;
  }

  Handler read() {
    const std::string& name = op.name();
    if (const Handler h = control(op, i)) {
      if (name == "bra") return need(1, 1), names.branch_to(o[0]), h;
      if (op.has("sync")) need(1, 1), i->a = source(0, tU32);
      return h;
    }
    if (const Handler h = warp_operation(op, i)) return read_warp(), h;
    Handler h = nullptr;
    if (name == "ld" || name == "st") return h = loading(op, i), h ? read_load() : void(), h;
    if (name == "atom" || name == "red") return h = atomic(op, i), h ? read_atomic() : void(), h;
    if (name == "cp") return h = copying(op), h ? read_copy() : void(), h;
    if (name == "cvta" || name == "mapa") {
      if (!(h = address_change(op, i))) return nullptr;
      need(2 + (name == "mapa"), 2 + (name == "mapa"));
      i->d = names.reg(o[0]), i->a = source(1, tB64);
      if (name == "mapa") i->b = source(2, tU32);
      return h;
    }
    if (name == "mov") return read_move();
    if (name == "cvt") {
      if (!(h = conversion(op, i))) return nullptr;
      const bool two = op.has("bf16x2");
      need(2 + two, 2 + two);
      i->d = names.reg(o[0]), i->a = source(1, op.type());
      if (two) i->b = source(2, tF32);
      return h;
    }
    return name == "setp" ? read_comparison() : read_arithmetic();
  }
};

}  // namespace

Ins decode(const std::string& statement, Names& names) {
  Ins i;
  std::string s = statement;
  if (s[0] == '@') {
    const size_t end = s.find_first_of(" \t");
    i.negate = s[1] == '!';
    i.guard = names.reg(s.substr(1 + i.negate, end - 1 - i.negate));
    s = trim(s.substr(end));
  }
  const size_t end = s.find_first_of(" \t\n");
  const Opcode op(s.substr(0, end));
  const auto operands = end == std::string::npos ? std::vector<std::string>{} : split(s.substr(end), ',');
  i.fn = Reader{op, operands, names, &i}.read();
  if (!i.fn) names.wrong("an instruction that is not supported: " + s);
  return i;
}

}  // namespace ptx

// How decoding is divided: parse.cpp reads the text, decode.cpp names an instruction's operands, the others give the
// handlers. A handler of nullptr is an instruction that the machine does not know.
#pragma once

#include <string>
#include <vector>

#include "machine.h"

namespace ptx {

enum Type : uint8_t {
  tNone,
  tPred,
  tB8,
  tB16,
  tB32,
  tB64,
  tU8,
  tU16,
  tU32,
  tU64,
  tS8,
  tS16,
  tS32,
  tS64,
  tF16,
  tBF16,
  tF32,
  tF64
};  // clang-format keeps this
int size_of(Type t);
inline bool is_float(Type t) { return t >= tF16; }
inline bool is_signed(Type t) { return t >= tS8 && t <= tS64; }
Type type_named(const std::string& name);  // tNone: it is none

// An opcode by its parts: "ld.global.nc.v4.u32".
struct Opcode {
  std::string whole;
  std::vector<std::string> parts;
  explicit Opcode(const std::string& text);
  const std::string& name() const { return parts[0]; }
  bool has(const char* part) const;
  Type type() const { return type_named(parts.back()); }
};

// arithmetic.cpp
Handler arithmetic(const Opcode& op);
Handler move_of(Type type);
Handler comparison(const std::string& what, Type type);
// What ptxas may make of mul and add without a rounding modifier: a product that an addition of the same basic block
// takes is not rounded.
void contract(Kernel* k);

// convert.cpp
Handler conversion(const Opcode& op, Ins* i);
extern const Handler kPack, kUnpack;  // one value from, or to, its equal parts

// access.cpp
Handler loading(const Opcode& op, Ins* i);  // ld, st
Handler atomic(const Opcode& op, Ins* i);   // atom, red
Handler copying(const Opcode& op);          // cp.async

// control.cpp
Handler control(const Opcode& op, Ins* i);         // bra, ret, trap, barriers, fences
Handler warp_operation(const Opcode& op, Ins* i);  // shfl, vote
Handler address_change(const Opcode& op, Ins* i);  // cvta, mapa
Handler special(const std::string& name, Ins* i);  // mov from %tid.x and its like; nullptr: an ordinary register

// decode.cpp: names of operands to registers and constants, within one kernel.
struct Names {
  virtual int32_t reg(const std::string& name) = 0;
  virtual int32_t source(const std::string& text, Type type) = 0;
  virtual void branch_to(const std::string& label) = 0;
  [[noreturn]] virtual void wrong(const std::string& what) = 0;
  virtual ~Names() = default;
};
Ins decode(const std::string& statement, Names& names);
std::string trim(const std::string& s);
std::vector<std::string> split(const std::string& s, char by);  // not within brackets

}  // namespace ptx

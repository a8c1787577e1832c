// Types, conversions between them, and values from and to their parts.
#include <cmath>
#include <map>

#include "decode.h"

namespace ptx {

int size_of(Type t) {
  switch (t) {
    case tB8:
    case tU8:
    case tS8:
      return 1;
    case tB16:
    case tU16:
    case tS16:
    case tF16:
    case tBF16:
      return 2;
    case tB32:
    case tU32:
    case tS32:
    case tF32:
      return 4;
    case tB64:
    case tU64:
    case tS64:
    case tF64:
      return 8;
    default:
      return 0;
  }
}

Type type_named(const std::string& name) {
  static const std::map<std::string, Type> kAll = {
      {"pred", tPred}, {"b8", tB8},   {"b16", tB16}, {"b32", tB32}, {"b64", tB64},   {"u8", tU8},
      {"u16", tU16},   {"u32", tU32}, {"u64", tU64}, {"s8", tS8},   {"s16", tS16},   {"s32", tS32},
      {"s64", tS64},   {"f16", tF16}, {"f32", tF32}, {"f64", tF64}, {"bf16", tBF16}, {"bf16x2", tNone}};
  const auto at = kAll.find(name);
  return at == kAll.end() ? tNone : at->second;
}

namespace {

float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, 4);
  return v;
}

float from_half(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 0) return std::copysign(std::ldexp(static_cast<float>(m), -24), sign ? -1.0f : 1.0f);
  return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

// To the nearest, ties to even, of `digits` significant bits, the last of which is 2^least or more; infinity beyond the
// largest.
double round_to(double v, int digits, int least, double largest) {
  if (v == 0 || v != v || std::isinf(v)) return v;
  int e;
  std::frexp(v, &e);
  const int last = std::max(e - digits, least);
  const double r = std::ldexp(std::nearbyint(std::ldexp(v, -last)), last);
  return std::fabs(r) > largest ? std::copysign(INFINITY, v) : r;
}

uint16_t to_half(double v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (v != v) return 0x7fff;
  const double r = std::fabs(round_to(v, 11, -24, 65504));
  if (std::isinf(r)) return sign | 0x7c00;
  if (r < std::ldexp(1.0, -14)) return sign | static_cast<uint16_t>(std::ldexp(r, 24));
  int e;
  const double f = std::frexp(r, &e);
  return static_cast<uint16_t>(sign | (e + 14) << 10 | (static_cast<int>(std::ldexp(f, 11)) & 1023));
}

uint16_t to_bfloat(double v) {
  if (v != v) return 0x7fff;
  const float f = static_cast<float>(round_to(v, 8, -133, std::ldexp(255.0, 120)));
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return static_cast<uint16_t>(bits >> 16);
}

uint64_t low_bits(uint64_t v, int bits) { return bits == 64 ? v : v & ((1ull << bits) - 1); }

// kind: the type that it becomes; sign: the type that it is.
void from_integer(Thread& t, const Ins& i) {
  const Type to = static_cast<Type>(i.kind), from = static_cast<Type>(i.sign);
  const int bits = size_of(from) * 8;
  const uint64_t u = low_bits(raw(t, i.a), bits);
  const bool signs = is_signed(from);
  const int64_t s = signs ? static_cast<int64_t>(u << (64 - bits)) >> (64 - bits) : static_cast<int64_t>(u);
  if (to == tF32) return put<float>(t, i.d, signs ? static_cast<float>(s) : static_cast<float>(u));
  if (to == tF64) return put<double>(t, i.d, signs ? static_cast<double>(s) : static_cast<double>(u));
  t.R[i.d] = low_bits(static_cast<uint64_t>(s), size_of(to) * 8);
}

double float_value(const Thread& t, const Ins& i) {
  switch (static_cast<Type>(i.sign)) {
    case tF16:
      return from_half(get<uint16_t>(t, i.a));
    case tBF16:
      return float_of(static_cast<uint32_t>(get<uint16_t>(t, i.a)) << 16);
    case tF32:
      return get<float>(t, i.a);
    default:
      return get<double>(t, i.a);
  }
}
void between_floats(Thread& t, const Ins& i) {
  const double v = float_value(t, i);
  switch (static_cast<Type>(i.kind)) {
    case tF16:
      return put<uint16_t>(t, i.d, to_half(v));
    case tBF16:
      return put<uint16_t>(t, i.d, to_bfloat(v));
    case tF32:
      return put<float>(t, i.d, static_cast<float>(v));
    default:
      return put<double>(t, i.d, v);
  }
}
// n: rounding, 0 to nearest, 1 to zero, 2 down, 3 up. What does not fit becomes the nearest that does, NaN 0.
void to_s32(Thread& t, const Ins& i) {
  const double v = float_value(t, i);
  const double whole = i.n == 1   ? std::trunc(v)
                       : i.n == 2 ? std::floor(v)
                       : i.n == 3 ? std::ceil(v)
                                  : std::nearbyint(v);
  put<int32_t>(t, i.d,
               v != v                   ? 0
               : whole >= 2147483647.0  ? INT32_MAX
               : whole <= -2147483648.0 ? INT32_MIN
                                        : static_cast<int32_t>(whole));
}
void to_bf16x2(Thread& t, const Ins& i) {  // the first operand is the upper half
  put<uint32_t>(t, i.d, static_cast<uint32_t>(to_bfloat(get<float>(t, i.a))) << 16 | to_bfloat(get<float>(t, i.b)));
}

void pack(Thread& t, const Ins& i) {
  uint64_t r = 0;
  const int bits = i.width * 8 / i.n;
  for (int k = 0; k < i.n; ++k) r |= low_bits(raw(t, i.v[k]), bits) << (bits * k);
  t.R[i.d] = r;
}
void unpack(Thread& t, const Ins& i) {
  const uint64_t r = raw(t, i.a);
  const int bits = i.width * 8 / i.n;
  for (int k = 0; k < i.n; ++k) {
    if (i.v[k] >= 0) t.R[i.v[k]] = low_bits(r >> (bits * k), bits);
  }
}

}  // namespace

const Handler kPack = &pack, kUnpack = &unpack;

Handler conversion(const Opcode& op, Ins* i) {
  if (op.whole == "cvt.rn.bf16x2.f32") return &to_bf16x2;
  if (op.parts.size() < 3) return nullptr;
  const Type from = op.type(), to = type_named(op.parts[op.parts.size() - 2]);
  static const std::map<std::string, int> kRoundings = {{"rn", 0}, {"rni", 0}, {"rzi", 1}, {"rmi", 2}, {"rpi", 3}};
  bool whole = false, rounds = false;
  i->n = 0;
  for (size_t k = 1; k + 2 < op.parts.size(); ++k) {
    const auto at = kRoundings.find(op.parts[k]);
    if (at == kRoundings.end()) return nullptr;
    i->n = static_cast<uint8_t>(at->second);
    rounds = true;
    whole = at->first != "rn";
  }
  if (size_of(from) == 0 || size_of(to) == 0) return nullptr;
  i->kind = to, i->sign = from;
  if (!is_float(from)) {
    if (whole || rounds != is_float(to)) return nullptr;
    return to == tF16 || to == tBF16 ? nullptr : &from_integer;
  }
  if (is_float(to)) return whole ? nullptr : &between_floats;
  return whole && to == tS32 ? &to_s32 : nullptr;
}

}  // namespace ptx

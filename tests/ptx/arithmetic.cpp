// Arithmetic, logic and comparisons as the PTX ISA defines them; the approximations are exact here.
#include <cmath>
#include <limits>
#include <map>
#include <type_traits>

#include "arithmetic.h"

namespace ptx {
namespace {

template <class T>
bool is_nan(T v) {
  if constexpr (std::is_floating_point_v<T>) return v != v;
  return false;
}

PTX_BINARY(And, return static_cast<T>(a & b))
PTX_BINARY(Or, return static_cast<T>(a | b))
PTX_BINARY(Xor, return static_cast<T>(a ^ b))
// Of NaN and a number, the number; -0 is less than +0.
template <class T>
bool less(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == T(0) && b == T(0)) return std::signbit(a) && !std::signbit(b);
  }
  return a < b;
}
PTX_BINARY(Min, return is_nan(a) ? b : is_nan(b) ? a : less(b, a) ? b : a)
PTX_BINARY(Max, return is_nan(a) ? b : is_nan(b) ? a : less(a, b) ? b : a)
PTX_BINARY(
    Div, if constexpr (std::is_integral_v<T>) {
      if (b == 0) fail("an integer is divided by zero");
      if (std::is_signed_v<T> && b == T(-1)) return static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a));
    } return static_cast<T>(a / b))
PTX_BINARY(Rem, if (b == 0) fail("a remainder by zero"); if (std::is_signed_v<T> && b == T(-1)) return 0;
           return static_cast<T>(a % b))
#undef PTX_BINARY

struct Neg {
  template <class T>
  static T of(T a) {
    return static_cast<T>(-a);  // of NaN and zero too
  }
};
struct Not {
  template <class T>
  static T of(T a) {
    return static_cast<T>(~a);
  }
};
struct Abs {
  template <class T>
  static T of(T a) {
    if constexpr (std::is_floating_point_v<T>) {
      return std::fabs(a);
    } else {
      return a < T(0) ? static_cast<T>(0 - static_cast<std::make_unsigned_t<T>>(a)) : a;
    }
  }
};
struct Move {
  template <class T>
  static T of(T a) {
    return a;
  }
};
struct Sqrt {
  template <class T>
  static T of(T a) {
    return std::sqrt(a);
  }
};
struct Rcp {
  template <class T>
  static T of(T a) {
    return T(1) / a;
  }
};
// rcp.approx.ftz.f32 as far off as a GPU's may be: one unit in the last place, up or down by the argument's bits.
float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }
// 0 to 3, by the bits of a number.
uint32_t dice(float a) {
  uint32_t bits;
  memcpy(&bits, &a, sizeof bits);
  return (bits ^ bits >> 15) * 2654435761u >> 30;
}
struct EstimatedRcp {
  template <class T>
  static T of(T a) {
    const T exact = flushed(T(1) / flushed(a));
    if (!std::isfinite(exact) || exact == 0) return exact;
    const uint32_t way = dice(a);
    return way < 2 ? flushed(std::nextafter(exact, way ? std::numeric_limits<T>::infinity() : T(0))) : exact;
  }
};
struct Rsqrt {
  template <class T>
  static T of(T a) {
    return static_cast<T>(1.0 / std::sqrt(static_cast<double>(a)));
  }
};
// ex2.approx.ftz.f32 as far off as the PTX ISA allows, 2^-22 of the result.
struct EstimatedEx2 {
  template <class T>
  static T of(T a) {
    const double exact = std::exp2(static_cast<double>(flushed(a))), off = std::ldexp(exact, -22);
    const uint32_t way = dice(a);
    if (way > 1 || !std::isfinite(exact)) return flushed(static_cast<float>(exact));
    const float most = static_cast<float>(way ? exact + off : exact - off);
    const bool too_far = std::abs(most - exact) > off;
    return flushed(too_far ? std::nextafter(most, static_cast<float>(exact)) : most);
  }
};
struct Ex2 {
  template <class T>
  static T of(T a) {
    return static_cast<T>(std::exp2(static_cast<double>(a)));
  }
};
template <class T, class F>
void unary(Thread& t, const Ins& i) {
  put<T>(t, i.d, F::of(get<T>(t, i.a)));
}

// Shifts by more than the width leave nothing, or the sign.
template <class T>
void shl(Thread& t, const Ins& i) {
  const uint32_t n = get<uint32_t>(t, i.b);
  put<T>(t, i.d, n >= sizeof(T) * 8 ? T(0) : static_cast<T>(get<T>(t, i.a) << n));
}
template <class T>
void shr(Thread& t, const Ins& i) {
  const uint32_t n = get<uint32_t>(t, i.b);
  const T v = get<T>(t, i.a);
  const T none = std::is_signed_v<T> && v < T(0) ? static_cast<T>(-1) : T(0);
  put<T>(t, i.d, n >= sizeof(T) * 8 ? none : static_cast<T>(v >> n));
}

template <class T>
void fused(Thread& t, const Ins& i) {
  put<T>(t, i.d, std::fma(get<T>(t, i.a), get<T>(t, i.b), get<T>(t, i.c)));
}
template <class T>
void mad_lo(Thread& t, const Ins& i) {
  put<T>(t, i.d, static_cast<T>(get<T>(t, i.a) * get<T>(t, i.b) + get<T>(t, i.c)));
}
template <class T, class W>
void mul_wide(Thread& t, const Ins& i) {
  put<W>(t, i.d, static_cast<W>(static_cast<W>(get<T>(t, i.a)) * static_cast<W>(get<T>(t, i.b))));
}
template <class T, class W>
void mad_wide(Thread& t, const Ins& i) {
  put<W>(t, i.d, static_cast<W>(get<T>(t, i.a)) * static_cast<W>(get<T>(t, i.b)) + get<W>(t, i.c));
}
template <class T, class W>
void mul_hi(Thread& t, const Ins& i) {
  const W product = static_cast<W>(get<T>(t, i.a)) * static_cast<W>(get<T>(t, i.b));
  put<T>(t, i.d, static_cast<T>(product >> (8 * sizeof(T))));
}

uint32_t truth(const Thread& t, int32_t x) { return raw(t, x) & 1; }
void not_predicate(Thread& t, const Ins& i) { put<uint32_t>(t, i.d, !truth(t, i.a)); }
void move_predicate(Thread& t, const Ins& i) { put<uint32_t>(t, i.d, truth(t, i.a)); }
template <class F>
void predicates(Thread& t, const Ins& i) {
  put<uint32_t>(t, i.d, F::of(truth(t, i.a), truth(t, i.b)));
}
template <class T>
void select(Thread& t, const Ins& i) {
  put<T>(t, i.d, truth(t, i.c) ? get<T>(t, i.a) : get<T>(t, i.b));
}

template <class T>
void bfi(Thread& t, const Ins& i) {
  constexpr uint32_t kWidth = sizeof(T) * 8;
  const uint32_t at = get<uint32_t>(t, i.c) & 255, n = get<uint32_t>(t, i.e) & 255;
  const T a = get<T>(t, i.a), b = get<T>(t, i.b);
  if (at >= kWidth) return put<T>(t, i.d, b);
  const T mask = static_cast<T>((n >= kWidth ? ~T(0) : (T(1) << n) - 1) << at);
  put<T>(t, i.d, static_cast<T>((static_cast<T>(a << at) & mask) | (b & ~mask)));
}
void prmt(Thread& t, const Ins& i) {
  const uint64_t both = static_cast<uint64_t>(get<uint32_t>(t, i.b)) << 32 | get<uint32_t>(t, i.a);
  const uint32_t c = get<uint32_t>(t, i.c);
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t which = c >> (4 * k) & 15;
    uint32_t byte = both >> (8 * (which & 7)) & 255;
    if (which & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << (8 * k);
  }
  put<uint32_t>(t, i.d, r);
}

enum Compare { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
template <class T, int C>
void compare(Thread& t, const Ins& i) {
  const T a = get<T>(t, i.a), b = get<T>(t, i.b);
  const bool any = is_nan(a) || is_nan(b);
  bool r = false;
  if (C == kEq) r = !any && a == b;
  if (C == kNe) r = !any && a != b;
  if (C == kLt) r = a < b;
  if (C == kLe) r = a <= b;
  if (C == kGt) r = a > b;
  if (C == kGe) r = a >= b;
  if (C == kEqu) r = any || a == b;
  if (C == kNeu) r = any || a != b;
  if (C == kLtu) r = any || a < b;
  if (C == kLeu) r = any || a <= b;
  if (C == kGtu) r = any || a > b;
  if (C == kGeu) r = any || a >= b;
  if (C == kNum) r = !any;
  if (C == kNan) r = any;
  if (i.kind == 1) r = r && truth(t, i.e);
  if (i.kind == 2) r = r || truth(t, i.e);
  if (i.kind == 3) r = r != (truth(t, i.e) != 0);
  put<uint32_t>(t, i.d, r);
}

// ---- which handler ----

// `use` is given a zero of the C++ type.
template <class Use>
Handler of_bits(Type type, Use use) {
  switch (size_of(type)) {
    case 2:
      return use(uint16_t{});
    case 4:
      return use(uint32_t{});
    case 8:
      return use(uint64_t{});
    default:
      return nullptr;
  }
}
template <class Use>
Handler of_integer(Type type, Use use) {
  if (is_float(type)) return nullptr;
  if (!is_signed(type)) return of_bits(type, use);
  switch (type) {
    case tS16:
      return use(int16_t{});
    case tS32:
      return use(int32_t{});
    case tS64:
      return use(int64_t{});
    default:
      return nullptr;
  }
}
template <class Use>
Handler of_float(Type type, Use use) {
  return type == tF32 ? use(float{}) : type == tF64 ? use(double{}) : nullptr;
}

// By signedness where it matters, or as unsigned numbers that wrap around.
template <class F>
Handler binary_of(Type type, bool by_sign) {
  const auto use = [](auto zero) -> Handler { return &binary<decltype(zero), F>; };
  if (is_float(type)) return of_float(type, use);
  return by_sign ? of_integer(type, use) : of_bits(type, use);
}
template <class F>
Handler logic_of(Type type) {
  if (type == tPred) return &predicates<F>;
  return is_float(type) ? nullptr : of_bits(type, [](auto zero) -> Handler { return &binary<decltype(zero), F>; });
}
template <class F>
Handler float_of(Type type) {
  return of_float(type, [](auto zero) -> Handler { return &unary<decltype(zero), F>; });
}

Handler widening(const std::string& op, Type type, bool hi) {
  const bool mad = op == "mad";
  switch (type) {
    case tU16:
      return hi ? nullptr : mad ? &mad_wide<uint16_t, uint32_t> : &mul_wide<uint16_t, uint32_t>;
    case tS16:
      return hi ? nullptr : mad ? &mad_wide<int16_t, int32_t> : &mul_wide<int16_t, int32_t>;
    case tU32:
      return hi ? &mul_hi<uint32_t, uint64_t> : mad ? &mad_wide<uint32_t, uint64_t> : &mul_wide<uint32_t, uint64_t>;
    case tS32:
      return hi ? &mul_hi<int32_t, int64_t> : mad ? &mad_wide<int32_t, int64_t> : &mul_wide<int32_t, int64_t>;
    case tU64:
      return hi ? &mul_hi<uint64_t, unsigned __int128> : nullptr;
    case tS64:
      return hi ? &mul_hi<int64_t, __int128> : nullptr;
    default:
      return nullptr;
  }
}

Handler multiplication(const Opcode& op, Type type) {
  if (op.has("wide")) return widening(op.name(), type, false);
  if (op.has("hi")) return op.name() == "mul" ? widening("mul", type, true) : nullptr;
  if (op.name() == "mul") return is_float(type) || op.has("lo") ? binary_of<Mul>(type, false) : nullptr;
  if (!op.has("lo") || is_float(type)) return nullptr;
  return of_bits(type, [](auto zero) -> Handler { return &mad_lo<decltype(zero)>; });
}

// The modifiers that an opcode may have beside its type.
bool known_modifiers(const Opcode& op) {
  const bool rounds = op.has("rn"), approximates = op.has("approx") || op.has("full");
  for (size_t k = 1; k + 1 < op.parts.size(); ++k) {
    const std::string& part = op.parts[k];
    if (part != "rn" && part != "approx" && part != "full" && part != "lo" && part != "hi" && part != "wide")
      return false;
  }
  return !(rounds && approximates);
}

template <int C>
Handler compare_of(Type type) {
  const auto use = [](auto zero) -> Handler { return &compare<decltype(zero), C>; };
  if (is_float(type)) return of_float(type, use);
  return C <= kGe ? of_integer(type, use) : nullptr;
}

}  // namespace

Handler arithmetic(const Opcode& op) {
  const std::string& name = op.name();
  const Type type = op.type();
  if (op.whole == "rcp.approx.ftz.f32") return &unary<float, EstimatedRcp>;
  if (op.whole == "ex2.approx.ftz.f32") return &unary<float, EstimatedEx2>;
  if (!known_modifiers(op)) return nullptr;
  const bool rounded = op.has("rn"), approximate = op.has("approx") || op.has("full"), exact = rounded || approximate;
  if (name == "add") return approximate ? nullptr : binary_of<Add>(type, false);
  if (name == "sub") return approximate ? nullptr : binary_of<Sub>(type, false);
  if (name == "mul" || name == "mad") return multiplication(op, type);
  if (name == "fma" && rounded) return of_float(type, [](auto zero) -> Handler { return &fused<decltype(zero)>; });
  if (name == "div") return is_float(type) && !exact ? nullptr : binary_of<Div>(type, true);
  if (name == "rem") return of_integer(type, [](auto zero) -> Handler { return &binary<decltype(zero), Rem>; });
  if (name == "min") return binary_of<Min>(type, true);
  if (name == "max") return binary_of<Max>(type, true);
  if (name == "and") return logic_of<And>(type);
  if (name == "or") return logic_of<Or>(type);
  if (name == "xor") return logic_of<Xor>(type);
  if (name == "not") {
    if (type == tPred) return &not_predicate;
    return of_bits(type, [](auto zero) -> Handler { return &unary<decltype(zero), Not>; });
  }
  if (name == "neg" && is_float(type)) return float_of<Neg>(type);
  if (name == "neg") return of_bits(type, [](auto zero) -> Handler { return &unary<decltype(zero), Neg>; });
  if (name == "abs" && is_float(type)) return float_of<Abs>(type);
  if (name == "abs") return type == tS32 ? &unary<int32_t, Abs> : type == tS64 ? &unary<int64_t, Abs> : Handler{};
  if (name == "sqrt" && exact) return float_of<Sqrt>(type);
  if (name == "rcp" && exact) return float_of<Rcp>(type);
  if (name == "rsqrt" && approximate) return float_of<Rsqrt>(type);
  if (name == "ex2" && approximate) return type == tF32 ? &unary<float, Ex2> : Handler{};
  if (name == "shl") return of_bits(type, [](auto zero) -> Handler { return &shl<decltype(zero)>; });
  if (name == "shr") return of_integer(type, [](auto zero) -> Handler { return &shr<decltype(zero)>; });
  if (name == "selp") return of_bits(type, [](auto zero) -> Handler { return &select<decltype(zero)>; });
  if (name == "bfi" && (type == tB32 || type == tB64)) {
    return of_bits(type, [](auto zero) -> Handler { return &bfi<decltype(zero)>; });
  }
  return name == "prmt" && op.whole == "prmt.b32" ? &prmt : Handler{};
}

Handler move_of(Type type) {
  if (type == tPred) return &move_predicate;
  return of_bits(type, [](auto zero) -> Handler { return &unary<decltype(zero), Move>; });
}

Handler comparison(const std::string& what, Type type) {
  static const std::map<std::string, Handler (*)(Type)> kAll = {
      {"eq", &compare_of<kEq>},   {"ne", &compare_of<kNe>},   {"lt", &compare_of<kLt>},   {"le", &compare_of<kLe>},
      {"gt", &compare_of<kGt>},   {"ge", &compare_of<kGe>},   {"equ", &compare_of<kEqu>}, {"neu", &compare_of<kNeu>},
      {"ltu", &compare_of<kLtu>}, {"leu", &compare_of<kLeu>}, {"gtu", &compare_of<kGtu>}, {"geu", &compare_of<kGeu>},
      {"num", &compare_of<kNum>}, {"nan", &compare_of<kNan>}};
  const auto at = kAll.find(what);
  return at == kAll.end() ? nullptr : at->second(type);
}

}  // namespace ptx

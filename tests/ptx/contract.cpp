// What ptxas may do to products and sums. For tests that results do not hang on their being rounded.
#include <cmath>

#include "arithmetic.h"

namespace ptx {
namespace {

template <class T>
bool is_sum(Handler fn, bool* difference) {
  *difference = fn == &binary<T, Sub>;
  return *difference || fn == &binary<T, Add>;
}

// kind: 0 a * b + c, 1 a * b - c, 2 c - a * b
template <class T>
void contracted(Thread& t, const Ins& i) {
  const T a = get<T>(t, i.a), b = get<T>(t, i.b), c = get<T>(t, i.c);
  put<T>(t, i.d, i.kind == 0 ? std::fma(a, b, c) : i.kind == 1 ? std::fma(a, b, -c) : std::fma(-a, b, c));
}
template <class T>
bool take_product(Ins* i, const std::map<int32_t, Ins>& products) {
  bool difference = false;
  if (!is_sum<T>(i->fn, &difference)) return false;
  const auto second = products.find(i->b), first = products.find(i->a);
  const bool by_second = second != products.end() && second->second.fn == &binary<T, Mul>;
  if (!by_second && (first == products.end() || first->second.fn != &binary<T, Mul>)) return false;
  const Ins& m = by_second ? second->second : first->second;
  i->c = by_second ? i->a : i->b;
  i->kind = !difference ? 0 : by_second ? 2 : 1;
  i->a = m.a, i->b = m.b;
  i->fn = &contracted<T>;
  return true;
}

}  // namespace

void contract(Kernel* k) {
  std::vector<bool> leader(k->code.size() + 1, false);
  for (const Ins& i : k->code) {
    if (i.target >= 0) leader[i.target] = true;
  }
  std::map<int32_t, Ins> products;  // by the register that holds one
  const auto define = [&](int32_t r) {
    for (auto at = products.begin(); r >= 0 && at != products.end();) {
      const bool gone = at->first == r || at->second.a == r || at->second.b == r;
      at = gone ? products.erase(at) : std::next(at);
    }
  };
  for (size_t n = 0; n < k->code.size(); ++n) {
    Ins& i = k->code[n];
    if (leader[n] || i.target >= 0) products.clear();
    const bool rounded = i.statement().find(".rn.") != std::string::npos;
    if (!rounded && (take_product<float>(&i, products) || take_product<double>(&i, products))) ++k->contracted;
    define(i.d);
    for (const int32_t r : i.v) define(r);
    const bool product = i.fn == &binary<float, Mul> || i.fn == &binary<double, Mul>;
    if (product && !rounded && i.guard < 0 && i.d != i.a && i.d != i.b) products[i.d] = i;
  }
}

}  // namespace ptx

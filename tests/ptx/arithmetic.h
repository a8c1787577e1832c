// The operations that contract.cpp knows again by their handlers.
#pragma once

#include "decode.h"

namespace ptx {

#define PTX_BINARY(NAME, ...) \
  struct NAME {               \
    template <class T>        \
    static T of(T a, T b) {   \
      __VA_ARGS__;            \
    }                         \
  };
PTX_BINARY(Add, return static_cast<T>(a + b))
PTX_BINARY(Sub, return static_cast<T>(a - b))
PTX_BINARY(Mul, return static_cast<T>(a * b))

template <class T, class F>
void binary(Thread& t, const Ins& i) {
  put<T>(t, i.d, F::of(get<T>(t, i.a), get<T>(t, i.b)));
}

}  // namespace ptx

#!/usr/bin/env bash
# The CPU code under the compiler's sanitizers. Nothing is installed; all that it makes lies in build/sanitize.
#
#     scripts/sanitize.sh [quick|full]        PYTHON (with what the tests need) and SEED may be given
#
# 1. The kernels without torch (tests/sanitize/kernels.cpp): ThreadSanitizer with threads of the standard library, and
#    AddressSanitizer with UndefinedBehaviorSanitizer, at every level that the machine has.
# 2. The library built with these two: the fuzzer (tests/fuzz.py) and the CPU tests.
# quick takes one level, a minute of each fuzzer and the tests of hostile arguments, the same cases each time; full takes
# about an hour, and others each time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

mode=${1:-full}
case $mode in
  quick) optimize=-O0 levels=default seconds=20 fuzz=40 tests=(tests/test_hostile.py) ;;
  full) optimize=-O1 levels='default avx2 avx512' seconds=120 fuzz=600 tests=(
    tests/test_{autograd,convert,determinism,double_backward,dtypes,errors,func,functional,hostile,layouts}.py
    tests/test_{modules,moduleinfo,nonfinite,numerics,ops,property,state,transforms}.py tests/test_drop_in*.py
    tests/test_{entry,stages}.py tests/test_fusion{,_autograd,_classes,_container,_convert,_fuzz,_replaced,_saved}.py) ;;
  *) sed -n '2,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2 && exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
python=$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")
if [[ $mode == full ]]; then seed=$((RANDOM * 32768 + RANDOM)); else seed=1; fi
seed=${SEED:-$seed}
out=$PWD/build/sanitize
memory=-fsanitize=address,undefined\ -fno-sanitize=vptr\ -fno-sanitize-recover=all
export UBSAN_OPTIONS=print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
mkdir -p "$out"

# kernels <name> <flags>: builds tests/sanitize/kernels.cpp and runs it at every level
kernels() {
  local name=$1 flags="-std=c++17 $optimize -g1 -fno-omit-frame-pointer -ffp-contract=off -Icsrc $2"
  local sources=(tests/sanitize/kernels.cpp csrc/cpu/level_default.cpp csrc/cpu/level_avx{2,512}.cpp) objects=()
  if [[ $mode == quick ]]; then sources=("${sources[@]:0:2}" tests/sanitize/one_level.cpp); fi
  mkdir -p "$out/$name"
  for source in "${sources[@]}"; do objects+=("$out/$name/$(basename "$source" .cpp).o"); done
  # shellcheck disable=SC2086
  printf '%s\n' "${sources[@]}" | xargs -P "$(nproc)" -I{} sh -c \
    "c++ $flags -c {} -o '$out/$name/'\$(basename {} .cpp).o"
  # shellcheck disable=SC2086
  c++ $2 "${objects[@]}" -o "$out/$name/kernels" -pthread
  for level in $levels; do
    if [[ $level != default ]] && ! grep -qw "${level/avx512/avx512dq}" /proc/cpuinfo; then
      echo "sanitize: this machine has no $level"
      continue
    fi
    echo "sanitize: $name, $level"
    "$out/$name/kernels" "$seconds" "$seed" "$level"
  done
}

echo "sanitize: $mode, seed $seed"
kernels thread '-fsanitize=thread'
kernels memory "$memory"

# What the build passes to the compiler ends with its own -O3, so these come behind that.
printf '#!/bin/sh\nexec c++ "$@" %s -g1 -fno-omit-frame-pointer %s\n' "$optimize" "$memory" > "$out/c++"
chmod +x "$out/c++"
CXX=$out/c++ LDFLAGS="$memory" FORCE_CPU=1 "$python" setup.py -q build --build-base "$out/base" --build-lib "$out/lib" \
  > "$out/build.log" 2>&1 || { tail -30 "$out/build.log" >&2 && exit 1; }
cp bn_ext/*.py "$out/lib/bn_ext/"

preload=$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libubsan.so):$(c++ -print-file-name=libstdc++.so)
# Python itself keeps memory until the process ends.
sanitized() {
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 PYTHONPATH=$out/lib "$@"
}
where=$(cd "$out" && sanitized "$python" -c 'import bn_ext; print(bn_ext.__file__)')
[[ $where == "$out"/* ]] || { echo "sanitize: the library of $where was imported instead" >&2 && exit 1; }
cd tests
sanitized "$python" -X faulthandler fuzz.py --seconds "$fuzz" --seed "$seed"
sanitized "$python" -X faulthandler -m pytest -q -p no:cacheprovider --rootdir .. "${tests[@]#tests/}"
echo "sanitize: clean"

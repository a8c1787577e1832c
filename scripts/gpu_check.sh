#!/usr/bin/env bash
# All that needs a GPU, offline and within nine minutes: build, test, compute-sanitizer, benchmark.
#
#   scripts/gpu_check.sh [--dry] [--cpu] [--only STEP,STEP] [OUT]
#
# OUT (default gpu-check) gets a log of each step, the benchmark's results (bench-*.jsonl) and summary.txt. A step that
# fails does not keep the later ones from running; the exit status is 1 if one failed, ran out of time or had none left.
# --dry prints what would be run; --cpu tries the script out where there is no GPU; --only keeps what it builds in OUT.
#
# Wanted on PATH: python3 with torch, pytest, hypothesis and rich (PYTHON names another), nvcc, compute-sanitizer, ncu.
# GPU_CHECK_SECONDS is the time for everything (default 530). BENCH_COMMIT names the commit where there is no .git.
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
TOTAL=${GPU_CHECK_SECONDS:-530}
STEPS=(environment build cuda-tests large-tests memcheck racecheck synccheck initcheck suite
  bench-replay bench-calls bench-fusion bench-compile traffic)
# Tests that need no GPU and take long, or that have a step of their own.
ELSEWHERE="cuda cuda_fusion cuda_large cuda_compile distributed examples examples_batches gpu_check instructions packaging"

left() { echo $((TOTAL - SECONDS)); }
wanted() { [[ -z $ONLY || ",$ONLY," == *",$1,"* ]]; }
record() { printf '%s\t%s\t%s\n' "$2" "$3" "$4" >"$RESULTS/$1"; } # name, verdict, seconds, note

# What the logs say of places: nothing.
scrub() {
  local place
  for place in "$WORK=work" "$ROOT=." "$PREFIX=python" "$HOME=~"; do
    [[ ${place%%=*} == / || -z ${place%%=*} ]] || sed -i "s#${place%%=*}#${place#*=}#g" "$1"
  done
}

# step NAME LIMIT COMMAND...: runs it, a function of this script or a program, for at most LIMIT seconds. Exit status 77
# means that there is nothing to do here.
step() {
  local name=$1 limit=$2 log=$OUT/$1.log started=$SECONDS status verdict
  shift 2
  wanted "$name" || return 0
  if $DRY; then
    printf '%-14s %4ss  %s\n' "$name" "$limit" "$*"
    return 0
  fi
  ((limit < $(left))) || limit=$(left)
  if (($(left) < 5)); then
    record "$name" 'NO TIME' 0 "none of the $TOTAL seconds is left"
    return 0
  fi
  echo "$name ..."
  # An interrupt, so that pytest and the benchmark still print what they have.
  timeout -s INT -k 10 "$limit" bash -c 'set -uo pipefail; "$@"' step "$@" >"$log" 2>&1 </dev/null
  status=$?
  scrub "$log"
  case $status in
    0) verdict=ok ;;
    77) verdict=skipped ;;
    124 | 137) verdict="TIMED OUT" ;;
    *) verdict=FAILED ;;
  esac
  record "$name" "$verdict" $((SECONDS - started)) "$(note "$log")"
}

# A step in the background. With job control, or an interrupt would not reach it.
beside() {
  if $DRY; then
    step "$@"
  else
    set -m
    step "$@" &
    set +m
  fi
}

# The last line of a log that says something.
note() { grep -v '^[[:space:]]*$' "$1" | tail -1 | tr '\t' ' ' | cut -c1-110; }

skip() {
  wanted "$1" || return 0
  if $DRY; then printf '%-14s        %s\n' "$1" "skipped: $2"; else record "$1" skipped 0 "$2"; fi
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,compute_cap --format=csv || [[ $DEVICE == cpu ]] || return 1
  nvcc --version | tail -2
  "$PYTHON" - "$DEVICE" <<'E2'
import sys, torch
print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
assert sys.argv[1] == "cpu" or torch.cuda.is_available(), "torch sees no GPU"
E2
}

# An environment of its own whose Python finds the outside one's packages after those that are installed into it.
build() {
  set -e
  "$PYTHON" -m venv --without-pip --clear "$WORK/venv"
  "$PYTHON" - "$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'E2'
import site, sys
folders = [*site.getsitepackages(), site.getusersitepackages()]
with open(sys.argv[1] + "/outside.pth", "w") as file:
    file.writelines(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
E2
  mkdir -p "$WORK/source"
  cp -r "$ROOT"/{setup.py,pyproject.toml,README.md,LICENSE,bn_ext,buildtools,csrc} "$WORK/source"
  rm -rf "$WORK"/source/bn_ext/{*.so,_build.json,__pycache__}
  if [[ $DEVICE == cpu ]]; then
    export FORCE_CPU=1
  else
    export FORCE_CUDA=1
    if [[ -z ${TORCH_CUDA_ARCH_LIST:-} ]]; then
      TORCH_CUDA_ARCH_LIST=$("$PY" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
      export TORCH_CUDA_ARCH_LIST
    fi
  fi
  cd "$WORK/source"
  "$PY" -m pip install --no-index --no-build-isolation --no-deps --no-cache-dir --ignore-installed -v .
  cd "$WORK"
  "$PY" -m bn_ext
}

# tests NAME... -- OPTIONS...: pytest on these files, from a folder without sources, so that what was built is tested.
tests() {
  local files=()
  while [[ $1 != -- ]]; do
    files+=("$1")
    shift
  done
  shift
  cd "$WORK" || return 1
  "$PY" -m pytest -q --tb=short --maxfail=50 -p no:cacheprovider -c "$ROOT/pyproject.toml" --rootdir "$ROOT" "$@" "${files[@]}"
}

# Each file in a process of its own: after an illegal access nothing in a process can use the GPU any more.
suite() {
  local name files=() workers=$(($(nproc) / 2))
  for name in "$ROOT"/tests/test_*.py; do
    [[ $name == */test_simt_* || $name == */test_ptx_* ]] && continue
    [[ " $ELSEWHERE " == *" $(expr "$name" : '.*/test_\(.*\)\.py') "* ]] || files+=("$name")
  done
  rm -rf "$WORK/suite" && mkdir "$WORK/suite"
  trap suite_report EXIT # also when the time is over
  printf '%s\0' "${files[@]}" |
    OMP_NUM_THREADS=2 xargs -0 -n 1 -P $((workers < 1 ? 1 : workers < 8 ? workers : 8)) bash -c 'suite_file "$1"' file
}

suite_file() {
  local log=$WORK/suite/${1##*/}
  tests "$1" -- -k "not at_every_level and not every_level_is" >"$log" 2>&1
  echo "exit status $?" >>"$log" # 5: no test of this file is left
}

suite_report() {
  local log ended bad=0
  for log in "$WORK"/suite/*; do
    printf '\n==== %s\n' "${log##*/}"
    cat "$log"
    ended=$(tail -1 "$log")
    [[ $ended == "exit status 0" || $ended == "exit status 5" ]] || bad=$((bad + 1))
  done
  echo
  # pytest's own counts, added up
  grep -hE '^[0-9]+ [a-z]+.* in [0-9.]+s' "$WORK"/suite/* | grep -oE '[0-9]+ (passed|failed|skipped|errors?)' |
    awk '{ sum[$2] += $1 } END { for (word in sum) printf "%d %s, ", sum[word], word }'
  echo "files: $(find "$WORK/suite" -type f | wc -l), not right: $bad"
  exit $((bad > 0))
}

sanitize() { # TOOL OPTIONS...
  local tool=$1 filter=()
  shift
  case $tool in
    # Only our kernels; but what initcheck may call initialised, other kernels have to be seen to write.
    racecheck | synccheck)
      case $(compute-sanitizer --help) in
        *--kernel-name*) filter=(--kernel-name kns=bn_ext) ;;
        *--kernel-regex*) filter=(--kernel-regex kns=bn_ext) ;;
      esac
      ;;
    # torch tries calls that may fail; ours are checked and raise.
    memcheck) filter=(--report-api-errors no) ;;
  esac
  cd "$WORK" || return 1
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 compute-sanitizer --tool "$tool" --error-exitcode 99 \
    "${filter[@]}" "$PY" "$ROOT/tests/regimes.py" "$@"
}

bench() { # NAME SECONDS OPTIONS...
  local name=$1 seconds=$2
  shift 2
  cd "$WORK" || return 1
  "$PY" "$ROOT/bench/bench_batchnorm.py" --device "$DEVICE" --seconds "$seconds" --json "$OUT/$name.jsonl" "$@"
}

# What the memory of the GPU really moved, beside the model's bytes.
traffic() {
  cd "$WORK" || return 1
  ncu --clock-control none --kernel-name-base demangled --kernel-name regex:bn_ext --csv --print-units base \
    --log-file "$WORK/traffic.csv" --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
    "$PY" "$ROOT/bench/traffic.py" run || return 1
  "$PY" "$ROOT/bench/traffic.py" read "$WORK/traffic.csv"
}

has() { command -v "$1" >/dev/null; }

all_steps() {
  local seconds tool
  step environment 60 environment
  step build 300 build
  if [[ $DEVICE == cpu ]]; then
    for tool in cuda-tests large-tests memcheck racecheck synccheck initcheck; do skip $tool "no GPU"; done
  elif ! has compute-sanitizer; then
    for tool in memcheck racecheck synccheck initcheck; do skip $tool "compute-sanitizer is not on PATH"; done
  else
    # All beside each other: results do not depend on who else is there, and nothing is timed yet.
    beside memcheck 170 sanitize memcheck
    beside racecheck 170 sanitize racecheck --largest 1100000
    beside synccheck 170 sanitize synccheck --largest 1100000
    beside initcheck 170 sanitize initcheck --largest 1100000
  fi
  beside suite 200 suite
  if [[ $DEVICE != cpu ]]; then
    step cuda-tests 150 tests "$ROOT/tests/test_cuda.py" "$ROOT/tests/test_cuda_fusion.py" --
    step large-tests 90 tests "$ROOT/tests/test_cuda_large.py" --
  fi
  wait
  # What is left is shared by the measurements, alone on the machine.
  seconds=$(left)
  if [[ $DEVICE == cpu ]]; then
    skip bench-replay "no GPU"
    step bench-calls $((seconds / 2)) bench bench-calls $((seconds / 4)) --no-rivals
    skip bench-fusion "no GPU"
    skip bench-compile "no GPU"
    skip traffic "no GPU"
    return
  fi
  step bench-replay $((seconds * 40 / 100)) bench bench-replay $((seconds * 30 / 100)) --no-rivals --replay
  step bench-calls $((seconds * 35 / 100)) bench bench-calls $((seconds * 25 / 100)) --no-rivals
  step bench-fusion $((seconds * 15 / 100)) bench bench-fusion $((seconds * 10 / 100)) --no-rivals --fusion
  if has ncu; then step traffic 60 traffic; else skip traffic "ncu is not on PATH"; fi
  step bench-compile "$(left)" bench bench-compile "$(($(left) * 6 / 10))" --modes forward_backward,eval \
    --filter 1024x1024,65536x256,64x128x1024,16x512x1024 --filter float32 --filter contiguous
}

# The table, printed last; returns 1 if a step failed.
summary() {
  local name verdict seconds text failed=0
  echo
  # Where nothing was built there is nothing to compare.
  if [[ -x ${PY:-} ]]; then (cd "$WORK" && "$PY" "$ROOT/bench/gpu_table.py" "$OUT"); fi
  echo
  for name in "${STEPS[@]}"; do
    [[ -f $RESULTS/$name ]] || continue
    IFS=$'\t' read -r verdict seconds text <"$RESULTS/$name"
    [[ $verdict == ok || $verdict == skipped ]] || failed=1
    printf '%-14s %-10s %4ss  %s\n' "$name" "$verdict" "$seconds" "$text"
  done
  echo "send us this file, and the bench-*.jsonl beside it: ${OUT##*/}/summary.txt"
  ((failed)) && echo "FAILED after $SECONDS s" || echo "all well after $SECONDS s"
  return "$failed"
}

main() {
  DRY=false DEVICE=cuda ONLY='' OUT=$ROOT/gpu-check
  while (($#)); do
    case $1 in
      --dry) DRY=true ;;
      --cpu) DEVICE=cpu ;;
      --only)
        ONLY=${2:-}
        shift
        ;;
      -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        return 0
        ;;
      -*)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
        return 2
        ;;
      *) OUT=$1 ;;
    esac
    shift
  done
  if ! $DRY; then
    mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || return 2
    rm -f "$OUT"/*.log "$OUT"/bench-*.jsonl "$OUT"/summary.txt
  fi
  if [[ -n $ONLY ]] && ! $DRY; then WORK=$OUT/work && mkdir -p "$WORK"; else WORK=$(mktemp -d); fi
  [[ -n $ONLY ]] || trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$WORK"' EXIT
  RESULTS=$(mktemp -d "$WORK/results.XXXX")
  PY=$WORK/venv/bin/python
  PREFIX=$("$PYTHON" -c 'import sys; print(sys.prefix)')
  export ROOT WORK OUT PY PYTHON PREFIX DEVICE ELSEWHERE PYTHONDONTWRITEBYTECODE=1
  export -f environment build tests suite suite_file suite_report sanitize bench traffic
  export PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH
  SECONDS=0
  all_steps
  $DRY || summary | tee "$OUT/summary.txt"
  return "${PIPESTATUS[0]}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then main "$@"; fi

#!/usr/bin/env bash
# Builds dataeff on a CUDA machine, runs the tests that need CUDA, the benchmarks in the order of
# what they are worth there, and then, in what time is left, the other tests and quick benchmarks.
# Leaves one results file, benchmarks/results/<device>-<date>.json, within ten minutes.
#
# Needs no network: Python with torch, triton, numpy, setuptools, pybind11, ninja, pytest (with
# pytest-timeout, hypothesis), typer, rich; nvcc on the PATH or in CUDA_HOME (and, for a check of
# every access, compute-sanitizer). Nothing is installed
# into that Python: a scratch environment borrows its packages. Without a GPU everything runs on the
# CPU and the summary says so. Every part has a time limit and a log of its own; one that fails, or
# is cut off, does not stop the next, and keeps the records of the cases it has ended. The exit code
# is then 1. A peer that is not installed is a record that says so.
#
#   PYTHON=python3          the Python whose packages are used
#   LIMIT_S=560             seconds for everything
#   PARTS="gather epoch"    run only these after the build (see the list at the end; default: all)
#   TESTS=tests             what pytest runs
#   JOBS=12                 pytest processes, where pytest-xdist is installed; no more than cores
#   WHEELS=folder           peers to install as they lie, without what they depend on: WholeGraph is
#                           pylibwholegraph-, libwholegraph-, libraft-, librmm- and rmm-cu13 with
#                           rapids-logger (some 56 MiB); torchtune and trl are small
#   DATAEFF_COMMIT=abc      the commit to record, where the copy of the tree has no .git
#   OUT=folder              after every part, also leave the records and logs so far there: files
#                           logs.tar.gz, records.tar.gz, summary.txt, and at the end the results
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT_S:-560}))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A limit of the caller's that comes too early finds everything but the results file in OUT.
trap 'exit 143' TERM INT
logs=$work/logs
mkdir -p "$logs" "$work/records" benchmarks/results
[ -z "${OUT:-}" ] || mkdir -p "$OUT"
summary=()
failures=0

remaining() { echo $((deadline > SECONDS ? deadline - SECONDS : 0)); }

# save: what there is so far, to OUT.
save() {
  [ -n "${OUT:-}" ] || return 0
  tar -czf "$OUT/logs.tar.gz" -C "$work" logs
  tar -czf "$OUT/records.tar.gz" -C "$work" records
  printf '%s\n' "${summary[@]}" >"$OUT/summary.txt"
}

# part NAME LIMIT_S COMMAND...: runs it with a log of its own and notes how it went.
part() {
  local name=$1 limit=$2 start=$SECONDS code left
  shift 2
  [ "$name" = build ] || [ -z "${PARTS:-}" ] || [[ " $PARTS " == *" $name "* ]] || return 0
  left=$(remaining)
  limit=$((limit < left ? limit : left))
  if [ "$limit" -lt 5 ]; then
    summary+=("NO TIME $name") && failures=$((failures + 1))
    return 1
  fi
  echo "== $name (at most $limit s, $left s left)"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$logs/$name.log" 2>&1 </dev/null
  code=$?
  tail -n 4 "$logs/$name.log"
  case $code in
    0) summary+=("ok      $name, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("TIMEOUT $name after $limit s") && failures=$((failures + 1)) ;;
    *) summary+=("FAILED  $name, exit code $code, $((SECONDS - start)) s") && failures=$((failures + 1)) ;;
  esac
  save
  return $code
}

gpu=$("$python" -c 'import torch
p = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(f"{p.major}{p.minor} {p.name}" if p else "")')
if [ -n "$gpu" ]; then
  # One architecture builds several times faster than all of them.
  export DATAEFF_CUDA=1 DATAEFF_CUDA_ARCHS=${gpu%% *}
  echo "GPU: ${gpu#* }"
else
  echo "No GPU here: this is a dry run on the CPU."
fi

build() {
  "$python" -m venv --without-pip "$work/venv" || return
  local site
  site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$python" -c 'import sys
print("\n".join(p for p in sys.path if p.endswith("-packages")))' >"$site/borrowed.pth"
  "$work/venv/bin/python" -m pip install --no-build-isolation --no-deps --no-index --quiet \
    --disable-pip-version-check -e . || return
  [ -z "${WHEELS:-}" ] || "$work/venv/bin/python" -m pip install --no-deps --no-index --quiet \
    --disable-pip-version-check "$WHEELS"/*.whl || echo "the wheels in $WHEELS did not install"
}
export -f build
export work python
if ! part build 240 bash -c build; then
  cat "$logs/build.log"
  save
  exit 1
fi
bin=$work/venv/bin

cores=$(nproc)
jobs=()
if "$bin/python" -c 'import xdist' 2>/dev/null; then
  jobs=(-n "${JOBS:-$((cores < 12 ? cores : 12))}" --dist worksteal)
fi
# tests PART LIMIT_S SELECTION: each process gets its share of the cores. A warning of this
# machine's libraries is shown, and is no failure: elsewhere warnings are errors.
tests() {
  part "$1" "$2" env OMP_NUM_THREADS=$((cores > 24 ? cores / 12 : 2)) PYTHONFAULTHANDLER=1 \
    "$bin/python" -m pytest "${TESTS:-tests}" -k "$3" "${jobs[@]}" \
    -p no:cacheprovider -W default --timeout 120 --max-worker-restart 20 -rfE
}
# bench PART LIMIT_S WORKLOAD OPTIONS...: keeps the records of every case that has ended.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$bin/python" -m dataeff bench "$@" --json "$work/records/$name.json"
}

# What a GPU alone can show comes first, and of that what is worth most, lest time run out.
part doctor 40 "$bin/python" -m dataeff doctor --json
compiling=
if [ -n "$gpu" ] && [[ -z "${PARTS:-}" || "$PARTS" == *rgnn-* ]]; then
  # Beside the tests, which nobody times: one after another these take longer than what they do.
  timeout 170 "$bin/python" benchmarks/compile_kernels.py {RGCN,RGAT,HGT}"Conv training biokg " \
    {RGCN,RGAT,HGT}"Conv training am " >"$logs/compile.log" 2>&1 </dev/null &
  compiling=$!
fi
tests tests-cuda 170 cuda
if [ -n "$gpu" ]; then
  [ -z "$compiling" ] || wait "$compiling" || summary+=("FAILED  compile, exit code $?: what it lacks is compiled later")
  bench gather 110 gather
  bench rgnn-biokg 45 rgnn --only ' training biokg '
  bench offload 120 offload --quick --only ssdtrain
  bench epoch 60 sample --only 'GraphSAGE epoch'
  bench rgnn-am 45 rgnn --only ' training am '
  if command -v compute-sanitizer >/dev/null; then
    part sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \
      "$bin/python" -m pytest tests/gpu/test_feature_table_cuda.py tests/gpu/test_sampling_cuda.py \
      -k "alignment and 353 or wrong or weighted" -p no:cacheprovider -W default -x
  fi
fi
tests tests-others 240 "not cuda"
for name in $("$bin/python" -c 'from dataeff.bench import workloads; print(*workloads())'); do
  bench "quick-$name" 60 "$name" --quick
done

shopt -s nullglob
parts=("$work"/records/*.json)
if [ ${#parts[@]} -gt 0 ]; then
  results=$("$bin/python" benchmarks/merge_results.py "${parts[@]}") || failures=$((failures + 1))
fi
[ -z "${OUT:-}" ] || [ -z "${results:-}" ] || cp "$results" "$OUT/"

report() {
  [ -n "$gpu" ] && echo "GPU: ${gpu#* }" || echo "No GPU was there: nothing here was checked on CUDA."
  printf '%s\n' "${summary[@]}"
  for log in "$logs"/tests-*.log; do
    grep -hE '^(FAILED|ERROR) ' "$log" | head -40
    echo "$(basename "$log" .log): $(grep -E '[0-9]+ (passed|failed|skipped|error)' "$log" | tail -n 1)"
  done
  echo "results: ${results:-none}"
}
echo "== summary"
report
[ -z "${OUT:-}" ] || report >"$OUT/summary.txt"
[ "$failures" -eq 0 ]

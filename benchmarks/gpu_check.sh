#!/usr/bin/env bash
# Builds dataeff on a CUDA machine, runs the tests that need CUDA, every benchmark (quick sizes) and
# then, in what time is left, the other tests, and leaves one results file,
# benchmarks/results/<device>-<date>.json, within ten minutes.
#
# Needs no network: Python with torch, triton, numpy, setuptools, pybind11, ninja, pytest (with
# pytest-timeout, hypothesis), typer, rich; nvcc on the PATH or in CUDA_HOME. Nothing is installed
# into that Python: a scratch environment borrows its packages. Without a GPU everything runs on the
# CPU and the summary says so. A part that fails does not stop the next; the exit code is then 1.
#
#   PYTHON=python3          the Python whose packages are used
#   LIMIT_S=570             seconds for everything
#   TESTS=tests             what pytest runs
#   JOBS=8                  pytest processes, where pytest-xdist is installed; no more than cores
#   WHEELS=folder           peers (torch_geometric, pylibwholegraph-cu13, ...) to install as they lie
#   DATAEFF_COMMIT=abc      the commit to record, where the copy of the tree has no .git
#   OUT=folder              also copy the results and logs there
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT_S:-570}))
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
logs=$work/logs
mkdir -p "$logs" benchmarks/results
summary=()
failures=0

remaining() { echo $((deadline - SECONDS > 10 ? deadline - SECONDS : 10)); }

# part NAME LIMIT_S COMMAND...: runs it with a log of its own and notes how it went.
part() {
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name (at most $limit s)"
  timeout --signal=INT --kill-after=15 "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  tail -n 4 "$logs/$name.log"
  case $code in
    0) summary+=("ok      $name, $((SECONDS - start)) s") ;;
    124 | 137) summary+=("TIMEOUT $name after $limit s") && failures=$((failures + 1)) ;;
    *) summary+=("FAILED  $name, exit code $code, $((SECONDS - start)) s") && failures=$((failures + 1)) ;;
  esac
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
    --disable-pip-version-check "$WHEELS"/*.whl
}
export -f build
export work python
if ! part build 240 bash -c build; then
  cat "$logs/build.log"
fi
bin=$work/venv/bin

part doctor 60 "$bin/python" -m dataeff doctor --json
jobs=()
if "$bin/python" -c 'import xdist' 2>/dev/null; then
  cores=$(nproc)
  jobs=(-n "${JOBS:-$((cores < 8 ? cores : 8))}")
fi
# tests PART LIMIT_S SELECTION: what a GPU alone can show comes first, lest time run out before it.
tests() {
  part "$1" "$2" "$bin/python" -m pytest "${TESTS:-tests}" -k "$3" "${jobs[@]}" \
    -p no:cacheprovider --timeout 120
}
tests tests-cuda $(($(remaining) / 2)) cuda

names=$("$bin/python" -c 'from dataeff.bench import workloads; print(*workloads())')
left=$(wc -w <<<"$names")
for name in $names; do
  part "bench-$name" $(($(remaining) / (left + 1))) \
    "$bin/python" -m dataeff bench "$name" --quick --json "$work/$name.json"
  left=$((left - 1))
done
tests tests-others "$(remaining)" "not cuda"

shopt -s nullglob
parts=("$work"/*.json)
if [ ${#parts[@]} -gt 0 ]; then
  results=$("$bin/python" benchmarks/merge_results.py "${parts[@]}") || failures=$((failures + 1))
fi
if [ -n "${OUT:-}" ]; then
  mkdir -p "$OUT"
  tar -czf "$OUT/logs.tar.gz" -C "$work" logs
  [ -z "${results:-}" ] || cp "$results" "$OUT/"
fi

echo "== summary"
[ -n "$gpu" ] && echo "GPU: ${gpu#* }" || echo "No GPU was there: nothing here was checked on CUDA."
printf '%s\n' "${summary[@]}"
grep -hE '^(FAILED|ERROR) ' "$logs"/tests-*.log | head -40
for log in "$logs"/tests-*.log; do
  echo "$(basename "$log" .log): $(grep -E '[0-9]+ (passed|failed|skipped|error)' "$log" | tail -n 1)"
done
echo "results: ${results:-none}"
[ "$failures" -eq 0 ]

#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests what runs on the GPU against the CPU and PyTorch's
# numbers, and prints the table of speeds. Words choose rows, see benches/gpu.rs.
#
#   benches/gpu.sh [WORD...]
#   benches/gpu.sh --build DIR             # builds only, with or without a GPU
#   benches/gpu.sh --built DIR [WORD...]   # runs what was built; needs no Rust
#
# What was built looks for the tests' data where this folder was when it was built.
set -euo pipefail
mode=${1:-}
case $mode in
--build | --built)
  dir=${2:?a folder is expected behind $mode}
  shift 2
  mkdir -p "$dir"
  dir=$(cd "$dir" && pwd)
  cd "$(dirname "$0")/.."
  ;;
*)
  mode=
  cd "$(dirname "$0")/.."
  dir=$PWD/target/gpu
  mkdir -p "$dir"
  ;;
esac
# Builds what cargo is told to, under a name of ours.
build() { # NAME ARGUMENT...
  local name=$1 log
  shift
  log=$(CARGO_TERM_COLOR=never cargo "$@" --no-run 2>&1 | tee >(cat >&2))
  cp "$(sed -n 's/^ *Executable .* (\(.*\))$/\1/p' <<<"$log")" "$dir/$name"
}
if [[ $mode != --built ]]; then
  build tests test --locked --release --test flow
  build bench bench --locked --bench gpu
fi
[[ $mode != --build ]] || exit 0
# One after the other: one of them fills the memory.
"$dir/tests" gpu:: --ignored --test-threads=1
"$dir/bench" "$@"

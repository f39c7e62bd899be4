#!/usr/bin/env bash
# Compiles the kernels to the PTX that is committed in ptx/, packed: src/learn/cuda/ptx.sh
# Needs nvcc 12.8 or newer and zstd on the PATH. compute_80 runs on every card from Ampere on,
# compute_90a on Hopper alone. The version of PTX is set down to that of CUDA 12.3, so that drivers
# from there on take it (ptxas checks that nothing newer is in it). ptx/sources holds the digests
# of what went in and came out; a test compares them.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p ptx
made=$(mktemp)
trap 'rm -f "$made"' EXIT
compile() { # NAME SOURCE [FLAG...]
  local name=$1 source=$2 arch=${arch:-compute_80}
  shift 2
  nvcc -ptx "-arch=$arch" -O3 -std=c++17 -diag-suppress 177 "$@" "$source" -o - |
    sed 's/^\.version .*/.version 8.3/' >"$made"
  ptxas "-arch=${arch/compute/sm}" "$made" -o /dev/null
  zstd -19 -q -c "$made" >"ptx/$name.zst"
}
compile kernels_f32 kernels.cu
compile kernels_bf16 kernels.cu -DBF16
for head in 32 64 96 128; do compile "attention_$head" attention.cu "-DHEAD=$head"; done
compile attention_any attention.cu -DHEAD=0
arch=compute_90a compile hopper hopper.cu
sha256sum ./*.cu ./*.cuh ptx.sh ptx/*.zst >ptx/sources

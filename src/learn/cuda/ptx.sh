#!/usr/bin/env bash
# Compiles the kernels to the PTX that is committed in ptx/, packed: src/learn/cuda/ptx.sh
# Needs nvcc 12.8 or newer and zstd on the PATH. compute_80 runs on every card from Ampere on,
# compute_90a on Hopper alone.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p ptx
compile() { # NAME SOURCE [FLAG...]
  local name=$1 source=$2
  shift 2
  nvcc -ptx "-arch=${arch:-compute_80}" -O3 -std=c++17 -diag-suppress 177 "$@" "$source" -o - | zstd -19 -q -f -o "ptx/$name.zst"
}
compile kernels_f32 kernels.cu
compile kernels_bf16 kernels.cu -DBF16
for head in 32 64 96 128; do compile "attention_$head" attention.cu "-DHEAD=$head"; done
compile attention_any attention.cu -DHEAD=0
arch=compute_90a compile hopper hopper.cu

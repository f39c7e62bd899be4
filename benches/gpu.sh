#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests what runs on the GPU against the CPU and PyTorch's
# numbers, and prints the table of speeds. Words choose rows, see benches/gpu.rs.
set -euo pipefail
cd "$(dirname "$0")/.."
# One after the other: one of them fills the memory.
cargo test --locked --release --test flow -- gpu:: --ignored --test-threads=1
cargo bench --locked --bench gpu -- "$@"

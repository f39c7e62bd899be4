// The loss where blocks can share a row (sm_90). A part of hopper.cu.
#pragma once

#include <cooperative_groups.h>

#include "tensor.cuh"

namespace attention {
namespace loss {

constexpr int WARPS = 32;

/// A maximum and the sum of the exponentials below it.
struct Part {
    float top, sum;
};

__device__ __forceinline__ Part join(Part a, Part b) {
    const float top = fmaxf(a.top, b.top);
    if (top == -INFINITY) return {top, 0.f};
    return {top, a.sum * ex2((a.top - top) * LOG2E) + b.sum * ex2((b.top - top) * LOG2E)};
}

/// As `cross_entropy` in loss.cuh; but every block of a cluster keeps its part of a row in shared
/// memory, so that the logits are read once. What is written may lie where they were: by then all
/// blocks have read theirs. `each` columns a block, a multiple of 4, as `ldl` is.
template <int BLOCKS>
__device__ __forceinline__ void cross_entropy(const float *logits, int ldl, const int *targets,
                                              float *loss, bf16 *grads, int ldg, int n, int each,
                                              float scale) {
    namespace cg = cooperative_groups;
    const cg::cluster_group cluster = cg::this_cluster();
    __shared__ Part parts[WARPS], whole;
    __shared__ float wanted;
    float *row = reinterpret_cast<float *>(memory);
    const int r = blockIdx.x / BLOCKS, rank = cluster.block_rank(), target = targets[r];
    const int first = rank * each, count = min(n - first, each), fours = count / 4 * 4;
    logits += int64_t(r) * ldl + first;
    grads += int64_t(r) * ldg + first;

    // A thread reads what it copied: the first half while the second is on its way.
    const int step = blockDim.x * 4, half = (fours / 2 + step - 1) / step * step;
    const auto fetch = [&](int from, int to) {
        for (int c = from + threadIdx.x * 4; c < to; c += step)
            copy16(shared_address(row + c), logits + c, 16);
        commit();
    };
    Part own = {-INFINITY, 0.f};
    const auto take = [&](int from, int to) {
        for (int c = from + threadIdx.x * 4; c < to; c += step) {
            const float4 x = *reinterpret_cast<const float4 *>(row + c);
            const float m = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
            if (m > own.top) {
                own.sum *= ex2((own.top - m) * LOG2E);
                own.top = m;
            }
            const float base = own.top * LOG2E;
            own.sum += ex2(fmaf(x.x, LOG2E, -base)) + ex2(fmaf(x.y, LOG2E, -base)) +
                       ex2(fmaf(x.z, LOG2E, -base)) + ex2(fmaf(x.w, LOG2E, -base));
        }
    };
    fetch(0, min(half, fours));
    fetch(half, fours);
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    take(0, min(half, fours));
    asm volatile("cp.async.wait_group 0;" ::: "memory");
    take(half, fours);
    for (int c = max(fours, 0) + threadIdx.x; c < count; c += blockDim.x) {
        const float x = row[c] = logits[c];
        own = join(own, {x, 1.f});
    }
    if (threadIdx.x == 0 && target >= first && target < first + count)
        wanted = logits[target - first];
    for (int k = 16; k; k >>= 1)
        own = join(own, {__shfl_xor_sync(~0u, own.top, k), __shfl_xor_sync(~0u, own.sum, k)});
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < int(blockDim.x) / 32; ++i) own = join(own, parts[i]);
        whole = own;
    }
    cluster.sync();
    own = *cluster.map_shared_rank(&whole, 0);
    for (int i = 1; i < BLOCKS; ++i) own = join(own, *cluster.map_shared_rank(&whole, i));
    const float log_sum = own.top + logf(own.sum);
    if (threadIdx.x == 0 && target >= first && target < first + count) loss[r] = log_sum - wanted;
    // No block ends while another reads its part.
    cluster.sync();

    const auto gradient = [&](float x, int c) {
        return scale * (ex2((x - log_sum) * LOG2E) - (first + c == target ? 1.f : 0.f));
    };
    for (int c = threadIdx.x * 4; c < fours; c += step) {
        const float4 x = *reinterpret_cast<const float4 *>(row + c);
        *reinterpret_cast<uint2 *>(grads + c) =
            make_uint2(pack(gradient(x.x, c), gradient(x.y, c + 1)),
                       pack(gradient(x.z, c + 2), gradient(x.w, c + 3)));
    }
    for (int c = max(fours, 0) + threadIdx.x; c < count; c += blockDim.x)
        grads[c] = __float2bfloat16_rn(gradient(row[c], c));
}

}  // namespace loss
}  // namespace attention

/// By the number of blocks of a row.
#define SHARED_LOSS(BLOCKS)                                                                         \
    extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(1024)               \
        cross_entropy_##BLOCKS##_sm90(const float *logits, int ldl, const int *targets,             \
                                      float *loss, attention::bf16 *grads, int ldg, int n,          \
                                      int each, float scale) {                                      \
        attention::loss::cross_entropy<BLOCKS>(logits, ldl, targets, loss, grads, ldg, n, each,     \
                                               scale);                                              \
    }

SHARED_LOSS(2)
SHARED_LOSS(4)
SHARED_LOSS(8)

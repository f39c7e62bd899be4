// What comes before the queries and keys of attention: the rotary embedding, and before that
// perhaps a root-mean-square norm of each head. A part of hopper.cu.
#pragma once

#include "tensor.cuh"

namespace attention {

/// What the gradients of queries or keys go back through. Null `cosines`: nothing; null `weight`:
/// no norm.
struct Before {
    const int *positions;
    const float *cosines, *sines;  // [positions, head / 2]
    const bf16 *x;                 // what the norm read
    int ldx;
    const float *weight, *rstd;  // rstd: [tokens, heads]
};

__device__ __forceinline__ float2 two(const bf16 *at) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(at));
}

/// Takes the gradients of a warp's 16 rows of a head back, from token `token` on; `valid` rows
/// exist. As `rope` and `norm_heads_backward` in heads.cuh, but nothing is rounded in between.
template <int D>
__device__ __forceinline__ void turn_back(float (&o)[D / 8][4], const Before &b, int token,
                                          int valid, int head, int heads) {
    if (!b.cosines || valid <= 0) return;
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int64_t at = token + min(r * 8 + g, valid - 1);
        const int64_t turn = int64_t(b.positions[at]) * (D / 2) + c * 2;
#pragma unroll
        for (int t = 0; t < D / 16; ++t) {
            const float2 cs = *reinterpret_cast<const float2 *>(b.cosines + turn + t * 8);
            const float2 sn = *reinterpret_cast<const float2 *>(b.sines + turn + t * 8);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                float &x = o[t][2 * r + k], &y = o[t + D / 16][2 * r + k];
                const float e = x, cosine = k ? cs.y : cs.x, sine = k ? sn.y : sn.x;
                x = e * cosine + y * sine;
                y = y * cosine - e * sine;
            }
        }
        if (!b.weight) continue;
        const bf16 *x = b.x + at * b.ldx + head * D + c * 2;
        float dot = 0.f;
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
            const float2 w = *reinterpret_cast<const float2 *>(b.weight + t * 8 + c * 2);
            const float2 e = two(x + t * 8);
            o[t][2 * r] *= w.x, o[t][2 * r + 1] *= w.y;
            dot += o[t][2 * r] * e.x + o[t][2 * r + 1] * e.y;
        }
        dot += __shfl_xor_sync(~0u, dot, 1);
        dot += __shfl_xor_sync(~0u, dot, 2);
        const float inverse = b.rstd[at * heads + head], mean = dot * inverse * inverse / D;
#pragma unroll
        for (int t = 0; t < D / 8; ++t) {
            const float2 e = two(x + t * 8);
            o[t][2 * r] = inverse * (o[t][2 * r] - e.x * mean);
            o[t][2 * r + 1] = inverse * (o[t][2 * r + 1] - e.y * mean);
        }
    }
}

}  // namespace attention

// Arguments that the kernels begin with.
#define BEFORE                                                                                     \
    const int *positions, const float *cosines, const float *sines, const attention::bf16 *before, \
        int ldb, const float *weight, const float *rstd
#define BEFORE_GIVEN                                                                               \
    attention::Before { positions, cosines, sines, before, ldb, weight, rstd }

// What the attention kernels share: arguments, Philox, conversions.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

namespace attention {

using bf16 = __nv_bfloat16;

/// Shape and options of one attention; leading dimensions are in elements.
struct Shape {
    const int *starts;
    const int2 *hidden;
    int tokens, heads, kv_heads, head;
    int causal, window;
    float scale;
};

/// A dropout mask (threshold 0: none). `key` and `high` are those of the CPU's `Stream`.
struct Dropout {
    uint32_t threshold;
    float scale;
    uint32_t key0, key1, high0, high1;
};

constexpr float LOG2E = 1.4426950408889634f;

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ uint4 philox(uint32_t k0, uint32_t k1, uint4 c) {
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        const uint64_t p0 = 0xD2511F53ull * c.x, p1 = 0xCD9E8D57ull * c.z;
        c = make_uint4(uint32_t(p1 >> 32) ^ c.y ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c.w ^ k1,
                       uint32_t(p0));
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

/// The mask of a numbered part: `Stream::at`.
__device__ __forceinline__ Dropout at(const Dropout &d, uint32_t number) {
    const uint4 w = philox(d.key0, d.key1, make_uint4(number, 0, ~0u, ~0u));
    return {d.threshold, d.scale, w.x, w.y, w.z ^ d.high0, w.w ^ d.high1};
}

__device__ __forceinline__ uint32_t kept(const Dropout &d, uint64_t block) {
    const uint4 w =
        philox(d.key0, d.key1, make_uint4(uint32_t(block), uint32_t(block >> 32), d.high0, d.high1));
    return uint32_t(w.x >= d.threshold) | uint32_t(w.y >= d.threshold) << 1 |
           uint32_t(w.z >= d.threshold) << 2 | uint32_t(w.w >= d.threshold) << 3;
}

/// Bit t of the low four: whether element e + 16 t is kept. The words of one Philox block belong to
/// elements 16 apart in a group of 64; elements past the group need the next group's block.
__device__ __forceinline__ uint32_t keep4(const Dropout &d, uint64_t e) {
    const uint64_t block = (e >> 6) * 16 + (e & 15);
    const uint32_t word = uint32_t(e >> 4) & 3;
    uint32_t bits = kept(d, block);
    if (word) bits |= kept(d, block + 16) << 4;
    return bits >> word;
}

/// Keep bits of the 64 elements of U groups, in every lane; each half of a warp has its own groups.
template <int U>
__device__ __forceinline__ void draw(const Dropout &d, const uint64_t (&group)[U],
                                     uint64_t (&bits)[U]) {
    const int lane = threadIdx.x & 31;
    uint32_t mine[U];
#pragma unroll
    for (int u = 0; u < U; ++u) mine[u] = kept(d, group[u] * 16 + (lane & 15));
#pragma unroll
    for (int u = 0; u < U; ++u) {
        uint32_t w[4];
#pragma unroll
        for (int t = 0; t < 4; ++t)
            w[t] = __ballot_sync(~0u, mine[u] >> t & 1) >> (lane & 16) & 0xFFFF;
        bits[u] = uint64_t(w[2] | w[3] << 16) << 32 | w[0] | w[1] << 16;
    }
}

/// A warp draws the keep bits of 64 keys from `j0` (a multiple of 64) of ROWS queries from `i`, to
/// `mask[row * STRIDE]`. Rows do not begin at groups, so a part of the last group that was drawn
/// serves the keys that follow: it is left in `after`, and found there unless `fresh`.
template <int ROWS, int STRIDE>
__device__ __forceinline__ void draw_rows(const Dropout &d, uint64_t *mask, uint64_t *after, int i,
                                          int n, int j0, bool fresh) {
    constexpr int U = 4;
    static_assert(ROWS % (2 * U) == 0);
    const int half = threadIdx.x >> 4 & 1;
    const bool aligned = n % 64 == 0, writes = (threadIdx.x & 15) == 0;
    __syncwarp();
#pragma unroll 1
    for (int first = half; first < ROWS; first += 2 * U) {
        uint64_t group[U], bits[U], next[U];
        int shift[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
            const uint64_t e = uint64_t(i + first + 2 * u) * n + j0;
            group[u] = e >> 6;
            shift[u] = int(e & 63);
        }
        if (aligned || fresh) {
            draw(d, group, bits);
        } else {
#pragma unroll
            for (int u = 0; u < U; ++u) bits[u] = after[first + 2 * u];
        }
        if (!aligned) {
#pragma unroll
            for (int u = 0; u < U; ++u) ++group[u];
            draw(d, group, next);
            __syncwarp();
#pragma unroll
            for (int u = 0; u < U; ++u) {
                if (writes) after[first + 2 * u] = next[u];
                if (shift[u]) bits[u] = bits[u] >> shift[u] | next[u] << (64 - shift[u]);
            }
        }
#pragma unroll
        for (int u = 0; u < U; ++u)
            if (writes) mask[(first + 2 * u) * STRIDE] = bits[u];
    }
    __syncwarp();
}

/// Keys that a query of a sequence of `n` sees, without hidden ones.
__device__ __forceinline__ int2 seen(const Shape &s, int i, int n) {
    const int lo = s.window ? i - s.window + 1 : 0;
    return make_int2(lo, s.causal ? min(i + 1, n) : n);
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float *p, float x) { *p = x; }
__device__ __forceinline__ void store(bf16 *p, float x) { *p = __float2bfloat16(x); }

}  // namespace attention

// Arguments that every kernel ends with, in this order.
#define ATTENTION_OPTIONS                                                                           \
    const int *starts, const int2 *hidden, int tokens, int heads, int kv_heads, int head,           \
        int causal, int window, float scale, uint32_t threshold, float keep, uint32_t key0,         \
        uint32_t key1, uint32_t high0, uint32_t high1
#define ATTENTION_SHAPE                                                                             \
    attention::Shape { starts, hidden, tokens, heads, kv_heads, head, causal, window, scale }
#define ATTENTION_DROPOUT                                                                           \
    attention::Dropout { threshold, keep, key0, key1, high0, high1 }

#define FORWARD(T) const T *q, const T *k, const T *v, T *o, float *lse, int ldq, int ldk, int ldv, \
        int ldo, ATTENTION_OPTIONS
#define BACKWARD_Q(T) const T *q, const T *k, const T *v, const T *grad, const float *lse,          \
        float *delta, T *dq, int ldq, int ldk, int ldv, int ldg, int lddq, ATTENTION_OPTIONS
#define BACKWARD_KV(T) const T *q, const T *k, const T *v, const T *grad, const float *lse,         \
        const float *delta, T *dk, T *dv, int ldq, int ldk, int ldv, int ldg, int lddk, int lddv,   \
        ATTENTION_OPTIONS
#define BACKWARD(T) const T *q, const T *k, const T *v, const T *grad, const float *lse,            \
        const float *delta, T *dq, T *dk, T *dv, int ldq, int ldk, int ldv, int ldg, int lddq,      \
        int lddk, int lddv, ATTENTION_OPTIONS
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

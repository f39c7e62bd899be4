// Attention over packed sequences, equal to flow's CPU operation; see LAUNCH.md.
//
// bf16 kernels for heads of 32, 64, 96 and 128 elements use tensor cores: a block is four warps,
// each of which owns rows of the result. Other head sizes and f32 use generic.cuh.
// Define HEAD to compile one head size only, or HEAD=0 for the generic kernels.

#include "generic.cuh"
#include "tensor.cuh"

namespace attention {

constexpr int WARPS = 4, THREADS = 32 * WARPS;
/// Rows of a query tile of the kernels that own queries.
constexpr int QUERIES = 128;

template <int D> struct Forward {
    static constexpr int KEYS = 64, MT = QUERIES / WARPS / 16, NT = KEYS / 8;
    static constexpr int Q = QUERIES * PITCH<D>, KV = KEYS * PITCH<D>;
    static constexpr int BYTES = Q + 4 * KV;
};

template <int D, bool MASKED>
__device__ __forceinline__ void forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o,
                                        float *lse, int ldq, int ldk, int ldv, int ldo,
                                        const Shape &s, const Dropout &dropout) {
    using F = Forward<D>;
    constexpr int MT = F::MT, NT = F::NT, KEYS = F::KEYS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int h = blockIdx.x, kv = h / (s.heads / s.kv_heads);
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + QUERIES - 1) / QUERIES - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * QUERIES, row = i0 + warp * 16 * MT, past = row + 16 * MT;
    const float scale = s.scale * LOG2E;
    const int first = s.window ? max(0, i0 - s.window + 1) / KEYS : 0;
    const int last = ((s.causal ? min(n, i0 + QUERIES) : n) + KEYS - 1) / KEYS;
    const int2 *hidden = MASKED && s.hidden ? s.hidden + start : nullptr;

    __shared__ uint64_t mask[MASKED ? QUERIES : 1], after[MASKED ? QUERIES : 1];
    const int local = warp * 16 * MT;
    int drawn = -2;
    Dropout drop = dropout;
    if (MASKED && drop.threshold) drop = at(dropout, blockIdx.y * s.heads + h);

    const uint32_t sq = shared_address(memory), sk = sq + F::Q, sv = sk + 2 * F::KV;
    const bf16 *gk = k + int64_t(start) * ldk + kv * D, *gv = v + int64_t(start) * ldv + kv * D;
    const auto fetch = [&](int t, int stage) {
        const int j0 = t * KEYS;
        load<D, KEYS, THREADS>(sk + stage * F::KV, gk + int64_t(j0) * ldk, ldk, n - j0);
        load<D, KEYS, THREADS>(sv + stage * F::KV, gv + int64_t(j0) * ldv, ldv, n - j0);
        commit();
    };
    load<D, QUERIES, THREADS>(sq, q + int64_t(start + i0) * ldq + h * D, ldq, n - i0);
    fetch(first, 0);

    const uint32_t a = sq + warp * 16 * MT * PITCH<D> + lane_a<D>();
    float out[MT][D / 8][4] = {}, top[MT][2], total[MT][2] = {};
#pragma unroll
    for (int m = 0; m < MT; ++m) top[m][0] = top[m][1] = -INFINITY;

    for (int t = first; t < last; ++t) {
        const int stage = t - first & 1, j0 = t * KEYS;
        arrived();
        __syncthreads();
        if (t + 1 < last) fetch(t + 1, stage ^ 1);
        if (row >= n || (s.causal && j0 >= past) || (s.window && j0 + KEYS <= row - s.window + 1))
            continue;
        if (MASKED && drop.threshold) {
            draw_rows<16 * MT, 1>(drop, mask + local, after + local, row, n, j0, drawn != t - 1);
            drawn = t;
        }
        float p[MT][NT][4];
        scores<D>(p, a, sk + stage * F::KV + lane_b<D>());
        if ((s.causal && j0 + KEYS - 1 > row) || (s.window && j0 <= past - 1 - s.window) ||
            j0 + KEYS > n || (MASKED && hidden))
            hide(p, s, hidden, row, j0, n);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float x = top[m][r];
#pragma unroll
                for (int t = 0; t < NT; ++t) x = fmaxf(x, fmaxf(p[m][t][2 * r], p[m][t][2 * r + 1]));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                const float base = x == -INFINITY ? 0.f : x * scale;
                const float fade = ex2(top[m][r] * scale - base);
                top[m][r] = x;
                float sum = total[m][r] * fade;
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int k = 2 * r; k < 2 * r + 2; ++k) {
                        p[m][t][k] = ex2(fmaf(p[m][t][k], scale, -base));
                        sum += p[m][t][k];
                    }
                total[m][r] = sum;
#pragma unroll
                for (int t = 0; t < D / 8; ++t) out[m][t][2 * r] *= fade, out[m][t][2 * r + 1] *= fade;
            }
        if (MASKED && drop.threshold) {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(mask);
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int t = 0; t < NT; ++t) {
                        const uint32_t w = words[2 * (local + m * 16 + r * 8 + g) + t / 4];
#pragma unroll
                        for (int k = 0; k < 2; ++k)
                            if (!(w >> (t % 4 * 8 + c * 2 + k) & 1)) p[m][t][2 * r + k] = 0.f;
                    }
        }
        uint32_t bits[MT][NT / 2][4];
        pack(bits, p);
        accumulate<D>(out, bits, sv + stage * F::KV + lane_a<D>());
    }

    float by[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x = total[m][r];
            x += __shfl_xor_sync(~0u, x, 1);
            x += __shfl_xor_sync(~0u, x, 2);
            by[m][r] = (MASKED && drop.threshold ? drop.scale : 1.f) / x;
            const int i = row + m * 16 + r * 8 + g;
            if (c == 0 && i < n)
                lse[int64_t(h) * s.tokens + start + i] = top[m][r] * scale + log2f(x);
        }
    write<D>(out, by, memory + warp * 16 * MT * PITCH<D>, o + int64_t(start + row) * ldo + h * D, ldo,
             n - row);
}

/// A row of D elements takes SEGMENT lanes of 16 bytes each.
template <int D>
__device__ __forceinline__ void delta(const bf16 *o, const bf16 *g, float *delta, int ldo, int ldg,
                                      int tokens, int heads) {
    constexpr int SEGMENT = D <= 32 ? 4 : D <= 64 ? 8 : 16;
    const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / SEGMENT;
    const int c = threadIdx.x % SEGMENT * 8, t = int(i / heads), h = int(i % heads);
    float x = 0.f;
    if (t < tokens && c < D)
        x = dot8(o + int64_t(t) * ldo + h * D + c, g + int64_t(t) * ldg + h * D + c);
#pragma unroll
    for (int k = SEGMENT / 2; k; k >>= 1) x += __shfl_xor_sync(~0u, x, k);
    if (t < tokens && c == 0) delta[int64_t(h) * tokens + t] = x;
}

template <int D> struct BackwardQ {
    static constexpr int KEYS = D <= 64 ? 64 : 32, MT = QUERIES / WARPS / 16, NT = KEYS / 8;
    static constexpr int Q = QUERIES * PITCH<D>, KV = KEYS * PITCH<D>;
    static constexpr int BYTES = 2 * Q + 4 * KV;
};

template <int D, bool MASKED>
__device__ __forceinline__ void backward_q(const bf16 *q, const bf16 *k, const bf16 *v,
                                           const bf16 *grad, const float *lse, const float *delta,
                                           bf16 *dq, int ldq, int ldk, int ldv, int ldg, int lddq,
                                           const Shape &s, const Dropout &dropout) {
    using B = BackwardQ<D>;
    constexpr int MT = B::MT, NT = B::NT, KEYS = B::KEYS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int h = blockIdx.x, kv = h / (s.heads / s.kv_heads);
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + QUERIES - 1) / QUERIES - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * QUERIES, row = i0 + warp * 16 * MT, past = row + 16 * MT;
    const float scale = s.scale * LOG2E;
    const int first = s.window ? max(0, i0 - s.window + 1) / KEYS : 0;
    const int last = ((s.causal ? min(n, i0 + QUERIES) : n) + KEYS - 1) / KEYS;

    __shared__ uint64_t mask[MASKED ? QUERIES : 1], after[MASKED ? QUERIES : 1];
    const int local = warp * 16 * MT;
    int drawn = -2;
    Dropout drop = dropout;
    if (MASKED && drop.threshold) drop = at(dropout, blockIdx.y * s.heads + h);

    const uint32_t sq = shared_address(memory), sg = sq + B::Q, sk = sg + B::Q, sv = sk + 2 * B::KV;
    const bf16 *gk = k + int64_t(start) * ldk + kv * D, *gv = v + int64_t(start) * ldv + kv * D;
    const auto fetch = [&](int t, int stage) {
        const int j0 = t * KEYS;
        load<D, KEYS, THREADS>(sk + stage * B::KV, gk + int64_t(j0) * ldk, ldk, n - j0);
        load<D, KEYS, THREADS>(sv + stage * B::KV, gv + int64_t(j0) * ldv, ldv, n - j0);
        commit();
    };
    load<D, QUERIES, THREADS>(sq, q + int64_t(start + i0) * ldq + h * D, ldq, n - i0);
    load<D, QUERIES, THREADS>(sg, grad + int64_t(start + i0) * ldg + h * D, ldg, n - i0);
    fetch(first, 0);

    const uint32_t a = warp * 16 * MT * PITCH<D> + lane_a<D>();
    float sum[MT][D / 8][4] = {}, l[MT][2], dl[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = row + m * 16 + r * 8 + g;
            const int64_t at = int64_t(h) * s.tokens + start + i;
            l[m][r] = i < n ? lse[at] : INFINITY;
            dl[m][r] = i < n ? delta[at] : 0.f;
        }

    for (int t = first; t < last; ++t) {
        const int stage = t - first & 1, j0 = t * KEYS;
        arrived();
        __syncthreads();
        if (t + 1 < last) fetch(t + 1, stage ^ 1);
        if (row >= n || (s.causal && j0 >= past) || (s.window && j0 + KEYS <= row - s.window + 1))
            continue;
        if (MASKED && drop.threshold && j0 / 64 != drawn) {
            draw_rows<16 * MT, 1>(drop, mask + local, after + local, row, n, j0 / 64 * 64,
                                  drawn != j0 / 64 - 1);
            drawn = j0 / 64;
        }
        float p[MT][NT][4], ds[MT][NT][4];
        scores<D>(p, sq + a, sk + stage * B::KV + lane_b<D>());
        if ((s.causal && j0 + KEYS - 1 > row) || (s.window && j0 <= past - 1 - s.window) ||
            j0 + KEYS > n)
            hide(p, s, nullptr, row, j0, n);
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 4; ++k)
                    p[m][t][k] = ex2(fmaf(p[m][t][k], scale, -l[m][k / 2]));
        scores<D>(ds, sg + a, sv + stage * B::KV + lane_b<D>());
        if (MASKED && drop.threshold) {
            const uint32_t *words = reinterpret_cast<const uint32_t *>(mask);
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int r = 0; r < 2; ++r)
#pragma unroll
                    for (int t = 0; t < NT; ++t) {
                        const int at = 2 * (local + m * 16 + r * 8 + g) + (j0 >> 5 & 1) + t / 4;
                        const uint32_t w = words[at];
#pragma unroll
                        for (int k = 0; k < 2; ++k)
                            ds[m][t][2 * r + k] *=
                                w >> (t % 4 * 8 + c * 2 + k) & 1 ? drop.scale : 0.f;
                    }
        }
#pragma unroll
        for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 4; ++k) ds[m][t][k] = p[m][t][k] * (ds[m][t][k] - dl[m][k / 2]);
        uint32_t bits[MT][NT / 2][4];
        pack(bits, ds);
        accumulate<D>(sum, bits, sk + stage * B::KV + lane_a<D>());
    }

    float by[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) by[m][0] = by[m][1] = s.scale;
    write<D>(sum, by, memory + warp * 16 * MT * PITCH<D>, dq + int64_t(start + row) * lddq + h * D,
             lddq, n - row);
}

template <int D> struct BackwardKv {
    static constexpr int MT = D <= 64 ? 2 : 1, KEYS = MT * 16 * WARPS;
    static constexpr int ROWS = D <= 64 ? 32 : 64, NT = ROWS / 8;
    static constexpr int KV = KEYS * PITCH<D>, Q = ROWS * PITCH<D>;
    static constexpr int BYTES = 2 * KV + 4 * Q + 4 * ROWS * 4;
};

template <int D, bool MASKED>
__device__ __forceinline__ void backward_kv(const bf16 *q, const bf16 *k, const bf16 *v,
                                            const bf16 *grad, const float *lse, const float *delta,
                                            bf16 *dk, bf16 *dv, int ldq, int ldk, int ldv, int ldg,
                                            int lddk, int lddv, const Shape &s,
                                            const Dropout &dropout) {
    using B = BackwardKv<D>;
    constexpr int MT = B::MT, NT = B::NT, KEYS = B::KEYS, ROWS = B::ROWS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int kv = blockIdx.x, group = s.heads / s.kv_heads;
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int j0 = blockIdx.z * KEYS;
    if (j0 >= n) return;
    const int key = j0 + warp * 16 * MT, past = key + 16 * MT;
    const float scale = s.scale * LOG2E;
    const int first = s.causal ? j0 / ROWS : 0;
    const int last = ((s.window ? min(n, j0 + KEYS - 1 + s.window) : n) + ROWS - 1) / ROWS;
    const int tiles = last - first;

    constexpr int WORDS = KEYS / 32;
    __shared__ uint64_t mask[MASKED ? ROWS * WORDS / 2 : 1], after[MASKED ? ROWS : 1];
    Dropout drop = dropout;

    const uint32_t sk = shared_address(memory), sv = sk + B::KV, sq = sv + B::KV, sg = sq + 2 * B::Q;
    const uint32_t sl = sg + 2 * B::Q;
    const float *ml = reinterpret_cast<const float *>(memory + 2 * B::KV + 4 * B::Q);
    const auto fetch = [&](int h, int t, int stage) {
        const int i0 = t * ROWS, left = n - i0;
        load<D, ROWS, THREADS>(sq + stage * B::Q, q + int64_t(start + i0) * ldq + h * D, ldq, left);
        load<D, ROWS, THREADS>(sg + stage * B::Q, grad + int64_t(start + i0) * ldg + h * D, ldg,
                               left);
        if (threadIdx.x < 2 * ROWS) {
            const float *from = threadIdx.x < ROWS ? lse : delta;
            const int r = threadIdx.x % ROWS;
            copy4(sl + (stage * 2 * ROWS + threadIdx.x) * 4,
                  from + int64_t(h) * s.tokens + start + i0 + (r < left ? r : 0), r < left ? 4 : 0);
        }
        commit();
    };
    load<D, KEYS, THREADS>(sk, k + int64_t(start + j0) * ldk + kv * D, ldk, n - j0);
    load<D, KEYS, THREADS>(sv, v + int64_t(start + j0) * ldv + kv * D, ldv, n - j0);
    fetch(kv * group, first, 0);

    const uint32_t a = warp * 16 * MT * PITCH<D> + lane_a<D>();
    float sum_k[MT][D / 8][4] = {}, sum_v[MT][D / 8][4] = {};

    int h = kv * group, t = first;
    for (int step = 0; step < group * tiles; ++step) {
        const int stage = step & 1, i0 = t * ROWS, head = h;
        const bool fresh = t == first;
        if (++t == last) t = first, ++h;
        arrived();
        __syncthreads();
        if (step + 1 < group * tiles) fetch(h, t, stage ^ 1);
        if (MASKED && dropout.threshold) {
            if (fresh) drop = at(dropout, blockIdx.y * s.heads + head);
            constexpr int OWN = ROWS / WARPS;
            const int r = warp * OWN;
#pragma unroll
            for (int b = 0; b < KEYS / 64; ++b)
                draw_rows<OWN, KEYS / 64>(drop, mask + r * (KEYS / 64) + b, after + r, i0 + r, n,
                                          j0 + b * 64, b == 0);
            __syncthreads();
        }
        if (key >= n || (s.causal && i0 + ROWS <= key) || (s.window && i0 >= past - 1 + s.window))
            continue;
        float p[MT][NT][4], ds[MT][NT][4];
        scores<D>(p, sk + a, sq + stage * B::Q + lane_b<D>());
        if ((s.causal && i0 < past - 1) || (s.window && i0 + ROWS - 1 - s.window >= key)) {
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int t = 0; t < NT; ++t)
#pragma unroll
                    for (int x = 0; x < 4; ++x) {
                        const int j = key + m * 16 + x / 2 * 8 + g, i = i0 + t * 8 + c * 2 + x % 2;
                        if ((s.causal && j > i) || (s.window && j <= i - s.window))
                            p[m][t][x] = -INFINITY;
                    }
        }
        const float *row = ml + stage * 2 * ROWS + c * 2;
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const float2 l = *reinterpret_cast<const float2 *>(row + t * 8);
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x)
                    p[m][t][x] = ex2(fmaf(p[m][t][x], scale, -(x % 2 ? l.y : l.x)));
        }
        scores<D>(ds, sv + a, sg + stage * B::Q + lane_b<D>());
        uint32_t bits[MT][NT / 2][4];
        if (MASKED && dropout.threshold) {
            float kept[MT][NT][4];
            const uint32_t *words = reinterpret_cast<const uint32_t *>(mask);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int m = 0; m < MT; ++m)
#pragma unroll
                    for (int x = 0; x < 4; ++x) {
                        const int local = key - j0 + m * 16 + x / 2 * 8 + g;
                        const uint32_t w = words[(t * 8 + c * 2 + x % 2) * WORDS + local / 32];
                        const bool stays = w >> (local & 31) & 1;
                        kept[m][t][x] = stays ? p[m][t][x] : 0.f;
                        ds[m][t][x] *= stays ? drop.scale : 0.f;
                    }
            pack(bits, kept);
        } else {
            pack(bits, p);
        }
        accumulate<D>(sum_v, bits, sg + stage * B::Q + lane_a<D>());
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const float2 dl = *reinterpret_cast<const float2 *>(row + ROWS + t * 8);
#pragma unroll
            for (int m = 0; m < MT; ++m)
#pragma unroll
                for (int x = 0; x < 4; ++x)
                    ds[m][t][x] = p[m][t][x] * (ds[m][t][x] - (x % 2 ? dl.y : dl.x));
        }
        pack(bits, ds);
        accumulate<D>(sum_k, bits, sq + stage * B::Q + lane_a<D>());
    }

    float by_v[MT][2], by_k[MT][2];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
        by_v[m][0] = by_v[m][1] = MASKED && dropout.threshold ? dropout.scale : 1.f;
        by_k[m][0] = by_k[m][1] = s.scale;
    }
    // Own rows of K and V: no other warp reads them.
    const int local = warp * 16 * MT * PITCH<D>;
    write<D>(sum_k, by_k, memory + local, dk + int64_t(start + key) * lddk + kv * D, lddk, n - key);
    write<D>(sum_v, by_v, memory + B::KV + local, dv + int64_t(start + key) * lddv + kv * D, lddv,
             n - key);
}

}  // namespace attention

#define VARIANT(D, SUFFIX, MASKED)                                                                  \
    KERNEL(128, 2) attention_forward_bf16_##D##SUFFIX(FORWARD(attention::bf16)) {                   \
        attention::forward<D, MASKED>(q, k, v, o, lse, ldq, ldk, ldv, ldo, ATTENTION_SHAPE,         \
                                      ATTENTION_DROPOUT);                                           \
    }                                                                                               \
    KERNEL(128, 2) attention_backward_q_bf16_##D##SUFFIX(BACKWARD_Q(attention::bf16)) {             \
        attention::backward_q<D, MASKED>(q, k, v, grad, lse, delta, dq, ldq, ldk, ldv, ldg, lddq,   \
                                         ATTENTION_SHAPE, ATTENTION_DROPOUT);                       \
    }                                                                                               \
    KERNEL(128, 2) attention_backward_kv_bf16_##D##SUFFIX(BACKWARD_KV(attention::bf16)) {           \
        attention::backward_kv<D, MASKED>(q, k, v, grad, lse, delta, dk, dv, ldq, ldk, ldv, ldg,    \
                                          lddk, lddv, ATTENTION_SHAPE, ATTENTION_DROPOUT);          \
    }

#define HEAD_SIZE(D)                                                                                \
    VARIANT(D, , false)                                                                             \
    VARIANT(D, _masked, true)                                                                       \
    KERNEL(256, 1) attention_delta_bf16_##D(const attention::bf16 *o, const attention::bf16 *grad,  \
                                            float *delta, int ldo, int ldg, int tokens,             \
                                            int heads, int head) {                                  \
        attention::delta<D>(o, grad, delta, ldo, ldg, tokens, heads);                               \
    }

// For heads of 32 CHUNKS elements at most.
#define GENERIC(NAME, T, CHUNKS, BLOCKS)                                                            \
    KERNEL(256, 2) attention_forward_##NAME(FORWARD(T)) {                                           \
        attention::generic::forward<CHUNKS>(q, k, v, o, lse, ldq, ldk, ldv, ldo, ATTENTION_SHAPE,   \
                                            ATTENTION_DROPOUT);                                     \
    }                                                                                               \
    KERNEL(256, 1) attention_delta_##NAME(const T *o, const T *grad, float *delta, int ldo,         \
                                          int ldg, int tokens, int heads, int head) {               \
        attention::generic::delta(o, grad, delta, ldo, ldg, tokens, heads, head);                   \
    }                                                                                               \
    KERNEL(256, 2) attention_backward_q_##NAME(BACKWARD_Q(T)) {                                     \
        attention::generic::backward_q<CHUNKS>(q, k, v, grad, lse, delta, dq, ldq, ldk, ldv, ldg,   \
                                               lddq, ATTENTION_SHAPE, ATTENTION_DROPOUT);           \
    }                                                                                               \
    KERNEL(256, BLOCKS) attention_backward_kv_##NAME(BACKWARD_KV(T)) {                              \
        attention::generic::backward_kv<CHUNKS, false, T>(                                          \
            q, k, v, grad, lse, delta, nullptr, dk, dv, ldq, ldk, ldv, ldg, 0, lddk, lddv,          \
            ATTENTION_SHAPE, ATTENTION_DROPOUT);                                                    \
    }

#if !defined(HEAD) || HEAD == 32
HEAD_SIZE(32)
#endif
#if !defined(HEAD) || HEAD == 64
HEAD_SIZE(64)
#endif
#if !defined(HEAD) || HEAD == 96
HEAD_SIZE(96)
#endif
#if !defined(HEAD) || HEAD == 128
HEAD_SIZE(128)
#endif
#if !defined(HEAD) || HEAD == 0
GENERIC(f32_64, float, 2, 2)
KERNEL(256, 2) attention_backward_f32_64(BACKWARD(float)) {
    attention::generic::backward_kv<2, true>(q, k, v, grad, lse, delta, dq, dk, dv, ldq, ldk, ldv,
                                             ldg, lddq, lddk, lddv, ATTENTION_SHAPE,
                                             ATTENTION_DROPOUT);
}
GENERIC(f32, float, 8, 1)
GENERIC(bf16, attention::bf16, 8, 1)
#endif

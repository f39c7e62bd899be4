// The kernels of attention.cu without masks for heads of 64 and 128 elements, by Hopper's warpgroup
// products, and the loss (loss_sm90.cuh); compiled for sm_90a only. A warpgroup owns 64 rows of the
// result.

#include "turned.cuh"
#include "wgmma.cuh"

namespace attention {
namespace hopper {

/// The first 1024-byte boundary of the dynamic shared memory.
__device__ __forceinline__ uint32_t base() { return (shared_address(memory) + 1023) & ~1023u; }
__device__ __forceinline__ char *base_pointer() {
    return memory + (base() - shared_address(memory));
}

template <int D> struct Forward {
    static constexpr int GROUPS = 1, BLOCKS = D <= 64 ? 4 : 2, THREADS = GROUPS * 128;
    static constexpr int QUERIES = GROUPS * 64, KEYS = 64, NT = KEYS / 8;
    static constexpr int Q = QUERIES * D * 2, KV = KEYS * D * 2, BYTES = Q + 4 * KV + 1024;
};

template <int D>
__device__ __forceinline__ void forward(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *o,
                                        float *lse, int ldq, int ldk, int ldv, int ldo,
                                        const Shape &s) {
    using F = Forward<D>;
    constexpr int NT = F::NT, KEYS = F::KEYS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int h = blockIdx.x, kv = h / (s.heads / s.kv_heads);
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + F::QUERIES - 1) / F::QUERIES - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * F::QUERIES, row = i0 + warp * 16;
    const float scale = s.scale * LOG2E;
    const int first = s.window ? max(0, i0 - s.window + 1) / KEYS : 0;
    const int last = ((s.causal ? min(n, i0 + F::QUERIES) : n) + KEYS - 1) / KEYS;

    const uint32_t sq = base(), sk = sq + F::Q, sv = sk + 2 * F::KV;
    const uint32_t own = sq + warp / 4 * 64 * 128;
    const bf16 *gk = k + int64_t(start) * ldk + kv * D, *gv = v + int64_t(start) * ldv + kv * D;
    const auto fetch_k = [&](int t) {
        load_panels<D, KEYS, F::THREADS>(sk + (t - first & 1) * F::KV, gk + int64_t(t) * KEYS * ldk,
                                         ldk, n - t * KEYS);
    };
    const auto fetch_v = [&](int t) {
        load_panels<D, KEYS, F::THREADS>(sv + (t - first & 1) * F::KV, gv + int64_t(t) * KEYS * ldv,
                                         ldv, n - t * KEYS);
    };
    load_panels<D, F::QUERIES, F::THREADS>(sq, q + int64_t(start + i0) * ldq + h * D, ldq, n - i0);
    fetch_k(first);
    commit();
    if (first + 1 < last) fetch_k(first + 1);
    fetch_v(first);
    commit();
    asm volatile("cp.async.wait_group 1;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();

    float out[1][D / 8][4] = {}, p[1][NT][4], top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    float fade[2];
    uint32_t bits[1][NT / 2][4];

    // Softmax of the scores of a tile; what was summed must still be multiplied by `fade`.
    const auto softmax = [&](int t) {
        const int j0 = t * KEYS;
        if ((s.causal && j0 + KEYS - 1 > row) || (s.window && j0 <= row + 15 - s.window) ||
            j0 + KEYS > n)
            hide(p, s, nullptr, row, j0, n);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float x = top[r];
#pragma unroll
            for (int t = 0; t < NT; ++t) x = fmaxf(x, fmaxf(p[0][t][2 * r], p[0][t][2 * r + 1]));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
            x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
            const float base = x == -INFINITY ? 0.f : x * scale;
            fade[r] = ex2(top[r] * scale - base);
            top[r] = x;
            float sum[2] = {total[r] * fade[r], 0.f};
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    p[0][t][2 * r + k] = ex2(fmaf(p[0][t][2 * r + k], scale, -base));
                    sum[k] += p[0][t][2 * r + k];
                }
            total[r] = sum[0] + sum[1];
        }
    };

    wg_fence();
    wg_scores<D, F::QUERIES>(p[0], own, sk);
    wg_commit();
    wg_wait<0>();
    pin(p[0]);
    softmax(first);
    pack(bits, p);
    for (int t = first; t < last - 1; ++t) {
        const int stage = t - first & 1;
        publish();
        __syncthreads();
        if (t + 2 < last) fetch_k(t + 2);
        fetch_v(t + 1);
        commit();
        pin(out[0]), pin(bits[0]);
        wg_fence();
        wg_scores<D, F::QUERIES>(p[0], own, sk + (stage ^ 1) * F::KV);
        wg_commit();
        wg_accumulate<D>(out[0], bits[0], sv + stage * F::KV);
        wg_commit();
        wg_wait<1>();
        pin(p[0]);
        softmax(t + 1);
        wg_wait<0>();
        pin(out[0]), pin(bits[0]);
#pragma unroll
        for (int t = 0; t < D / 8; ++t)
#pragma unroll
            for (int k = 0; k < 4; ++k) out[0][t][k] *= fade[k / 2];
        pack(bits, p);
    }
    publish();
    __syncthreads();
    pin(out[0]), pin(bits[0]);
    wg_fence();
    wg_accumulate<D>(out[0], bits[0], sv + (last - 1 - first & 1) * F::KV);
    wg_commit();
    wg_wait<0>();
    pin(out[0]);

    float by[1][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float x = total[r];
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        by[0][r] = 1.f / x;
        const int i = row + r * 8 + g;
        if (c == 0 && i < n) lse[int64_t(h) * s.tokens + start + i] = top[r] * scale + log2f(x);
    }
    __syncthreads();
    write<D>(out, by, base_pointer() + warp * 16 * PITCH<D>, o + int64_t(start + row) * ldo + h * D,
             ldo, n - row);
}

template <int D> struct BackwardQ {
    static constexpr int GROUPS = 1, BLOCKS = D <= 64 ? 3 : 2, THREADS = GROUPS * 128;
    static constexpr int QUERIES = GROUPS * 64, KEYS = 64, NT = KEYS / 8, STAGES = 2;
    static constexpr int Q = QUERIES * D * 2, KV = KEYS * D * 2;
    static constexpr int BYTES = 2 * Q + 2 * STAGES * KV + 1024;
};

/// Also gives each row's `delta`, the sum of the products of the result `out` and its gradient,
/// which `backward_kv` reads.
template <int D>
__device__ __forceinline__ void backward_q(const bf16 *out, int ldo, const Before &before,
                                           const bf16 *q, const bf16 *k, const bf16 *v,
                                           const bf16 *grad, const float *lse, float *delta,
                                           bf16 *dq, int ldq, int ldk, int ldv, int ldg, int lddq,
                                           const Shape &s) {
    using B = BackwardQ<D>;
    constexpr int NT = B::NT, KEYS = B::KEYS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int h = blockIdx.x, kv = h / (s.heads / s.kv_heads);
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + B::QUERIES - 1) / B::QUERIES - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * B::QUERIES, row = i0 + warp * 16;
    const float scale = s.scale * LOG2E;
    const int first = s.window ? max(0, i0 - s.window + 1) / KEYS : 0;
    const int last = ((s.causal ? min(n, i0 + B::QUERIES) : n) + KEYS - 1) / KEYS;

    const uint32_t sq = base(), sg = sq + B::Q, sk = sg + B::Q, sv = sk + B::STAGES * B::KV;
    const uint32_t own = warp / 4 * 64 * 128;
    const bf16 *gk = k + int64_t(start) * ldk + kv * D, *gv = v + int64_t(start) * ldv + kv * D;
    const auto fetch = [&](int t, int stage) {
        const int j0 = t * KEYS;
        load_panels<D, KEYS, B::THREADS>(sk + stage * B::KV, gk + int64_t(j0) * ldk, ldk, n - j0);
        load_panels<D, KEYS, B::THREADS>(sv + stage * B::KV, gv + int64_t(j0) * ldv, ldv, n - j0);
        commit();
    };
    load_panels<D, B::QUERIES, B::THREADS>(sq, q + int64_t(start + i0) * ldq + h * D, ldq, n - i0);
    load_panels<D, B::QUERIES, B::THREADS>(sg, grad + int64_t(start + i0) * ldg + h * D, ldg, n - i0);
    fetch(first, 0);

    float sum[1][D / 8][4] = {}, p[1][NT][4], ds[1][NT][4], l[2], dl[2];
    uint32_t bits[1][NT / 2][4] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int i = row + r * 8 + g;
        const int64_t at = int64_t(h) * s.tokens + start + i;
        l[r] = i < n ? lse[at] : INFINITY;
        float x = 0.f;
        if (i < n) {
            const bf16 *a = out + int64_t(start + i) * ldo + h * D + c * 8;
            const bf16 *b = grad + int64_t(start + i) * ldg + h * D + c * 8;
#pragma unroll
            for (int k = 0; k < D; k += 32) x += dot8(a + k, b + k);
        }
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        if (c == 0 && i < n) delta[at] = x;
        dl[r] = x;
    }

    int stage = 0;
    for (int t = first; t < last; ++t) {
        const int j0 = t * KEYS;
        publish();
        __syncthreads();
        if (t + 1 < last) fetch(t + 1, stage ^ 1);
        wg_fence();
        wg_scores<D, B::QUERIES>(p[0], sq + own, sk + stage * B::KV);
        wg_commit();
        wg_scores<D, B::QUERIES>(ds[0], sg + own, sv + stage * B::KV);
        wg_commit();
        wg_wait<1>();
        pin(p[0]);
        if ((s.causal && j0 + KEYS - 1 > row) || (s.window && j0 <= row + 15 - s.window) ||
            j0 + KEYS > n)
            hide(p, s, nullptr, row, j0, n);
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int k = 0; k < 4; ++k) p[0][t][k] = ex2(fmaf(p[0][t][k], scale, -l[k / 2]));
        wg_wait<0>();
        pin(ds[0]);
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int k = 0; k < 4; ++k) ds[0][t][k] = p[0][t][k] * (ds[0][t][k] - dl[k / 2]);
        pack(bits, ds);
        pin(bits[0]);
        wg_fence();
        wg_accumulate<D>(sum[0], bits[0], sk + stage * B::KV);
        wg_commit();
        wg_wait<0>();
        pin(sum[0]), pin(bits[0]);
        stage ^= 1;
    }
    __syncthreads();
    turn_back<D>(sum[0], before, start + row, n - row, h, s.heads);
    const float by[1][2] = {{s.scale, s.scale}};
    write<D>(sum, by, base_pointer() + warp * 16 * PITCH<D>,
             dq + int64_t(start + row) * lddq + h * D, lddq, n - row);
}

template <int D> struct BackwardKv {
    static constexpr int GROUPS = D <= 64 ? 1 : 2, BLOCKS = D <= 64 ? 2 : 1, THREADS = GROUPS * 128;
    static constexpr int KEYS = GROUPS * 64, ROWS = 64, NT = ROWS / 8, STAGES = 3;
    static constexpr int KV = KEYS * D * 2, Q = ROWS * D * 2;
    static constexpr int BYTES = 2 * KV + 2 * STAGES * Q + STAGES * 2 * ROWS * 4 + 1024;
};

template <int D>
__device__ __forceinline__ void backward_kv(const Before &before, const bf16 *q, const bf16 *k,
                                            const bf16 *v, const bf16 *grad, const float *lse,
                                            const float *delta, bf16 *dk, bf16 *dv, int ldq,
                                            int ldk, int ldv, int ldg, int lddk, int lddv,
                                            const Shape &s) {
    using B = BackwardKv<D>;
    constexpr int NT = B::NT, KEYS = B::KEYS, ROWS = B::ROWS;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    const int kv = blockIdx.x, group = s.heads / s.kv_heads;
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int j0 = blockIdx.z * KEYS;
    if (j0 >= n) return;
    const int key = j0 + warp * 16;
    const float scale = s.scale * LOG2E;
    const int first = s.causal ? j0 / ROWS : 0;
    const int last = ((s.window ? min(n, j0 + KEYS - 1 + s.window) : n) + ROWS - 1) / ROWS;
    const int steps = group * (last - first);

    const uint32_t sk = base(), sv = sk + B::KV, sq = sv + B::KV, sg = sq + B::STAGES * B::Q;
    const uint32_t sl = sg + B::STAGES * B::Q, own = warp / 4 * 64 * 128;
    const float *ml = reinterpret_cast<const float *>(base_pointer() + (sl - sk));
    const auto fetch = [&](int h, int t, int stage) {
        const int i0 = t * ROWS, left = n - i0;
        load_panels<D, ROWS, B::THREADS>(sq + stage * B::Q, q + int64_t(start + i0) * ldq + h * D,
                                         ldq, left);
        load_panels<D, ROWS, B::THREADS>(sg + stage * B::Q, grad + int64_t(start + i0) * ldg + h * D,
                                         ldg, left);
        if (threadIdx.x < 2 * ROWS) {
            const float *from = threadIdx.x < ROWS ? lse : delta;
            const int r = threadIdx.x % ROWS;
            copy4(sl + (stage * 2 * ROWS + threadIdx.x) * 4,
                  from + int64_t(h) * s.tokens + start + i0 + (r < left ? r : 0), r < left ? 4 : 0);
        }
        commit();
    };
    load_panels<D, KEYS, B::THREADS>(sk, k + int64_t(start + j0) * ldk + kv * D, ldk, n - j0);
    load_panels<D, KEYS, B::THREADS>(sv, v + int64_t(start + j0) * ldv + kv * D, ldv, n - j0);
    fetch(kv * group, first, 0);

    float sum_k[1][D / 8][4] = {}, sum_v[1][D / 8][4] = {}, p[1][NT][4], ds[1][NT][4];
    uint32_t bits_p[1][NT / 2][4] = {}, bits_s[1][NT / 2][4] = {};
    int h = kv * group, t = first, stage = 0;
    for (int step = 0; step < steps; ++step) {
        const int i0 = t * ROWS, next = stage == B::STAGES - 1 ? 0 : stage + 1;
        if (++t == last) t = first, ++h;
        publish();
        __syncthreads();
        if (step + 1 < steps) fetch(h, t, next);
        wg_fence();
        wg_scores<D, KEYS>(p[0], sk + own, sq + stage * B::Q);
        wg_commit();
        wg_scores<D, KEYS>(ds[0], sv + own, sg + stage * B::Q);
        wg_commit();
        wg_wait<1>();  // the last step's sums too
        pin(p[0]), pin(bits_p[0]), pin(bits_s[0]);
        if ((s.causal && i0 < key + 15) || (s.window && i0 + ROWS - 1 - s.window >= key)) {
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int x = 0; x < 4; ++x) {
                    const int j = key + x / 2 * 8 + g, i = i0 + t * 8 + c * 2 + x % 2;
                    if ((s.causal && j > i) || (s.window && j <= i - s.window))
                        p[0][t][x] = -INFINITY;
                }
        }
        const float *row = ml + stage * 2 * ROWS + c * 2;
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const float2 l = *reinterpret_cast<const float2 *>(row + t * 8);
#pragma unroll
            for (int x = 0; x < 4; ++x)
                p[0][t][x] = ex2(fmaf(p[0][t][x], scale, -(x % 2 ? l.y : l.x)));
        }
        pack(bits_p, p);
        wg_wait<0>();
        pin(ds[0]), pin(bits_p[0]), pin(sum_v[0]), pin(sum_k[0]);
        wg_fence();
        wg_accumulate<D>(sum_v[0], bits_p[0], sg + stage * B::Q);
        wg_commit();
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const float2 dl = *reinterpret_cast<const float2 *>(row + ROWS + t * 8);
#pragma unroll
            for (int x = 0; x < 4; ++x)
                ds[0][t][x] = p[0][t][x] * (ds[0][t][x] - (x % 2 ? dl.y : dl.x));
        }
        pack(bits_s, ds);
        pin(bits_s[0]);
        wg_fence();
        wg_accumulate<D>(sum_k[0], bits_s[0], sq + stage * B::Q);
        wg_commit();
        stage = next;
    }
    wg_wait<0>();
    pin(sum_k[0]), pin(sum_v[0]);
    __syncthreads();
    const float one[1][2] = {{1.f, 1.f}}, by[1][2] = {{s.scale, s.scale}};
    char *tile = base_pointer() + warp * 16 * PITCH<D>;
    turn_back<D>(sum_k[0], before, start + key, n - key, kv, s.kv_heads);
    write<D>(sum_k, by, tile, dk + int64_t(start + key) * lddk + kv * D, lddk, n - key);
    write<D>(sum_v, one, tile, dv + int64_t(start + key) * lddv + kv * D, lddv, n - key);
}

}  // namespace hopper
}  // namespace attention

#define HOPPER(D)                                                                                   \
    KERNEL(attention::hopper::Forward<D>::THREADS, attention::hopper::Forward<D>::BLOCKS)           \
    attention_forward_bf16_##D##_sm90(FORWARD(attention::bf16)) {                                   \
        attention::hopper::forward<D>(q, k, v, o, lse, ldq, ldk, ldv, ldo, ATTENTION_SHAPE);        \
    }                                                                                               \
    KERNEL(attention::hopper::BackwardQ<D>::THREADS, attention::hopper::BackwardQ<D>::BLOCKS)       \
    attention_backward_q_bf16_##D##_sm90(const attention::bf16 *out, int ldo, BEFORE,               \
                                         BACKWARD_Q(attention::bf16)) {                             \
        attention::hopper::backward_q<D>(out, ldo, BEFORE_GIVEN, q, k, v, grad, lse, delta, dq,     \
                                         ldq, ldk, ldv, ldg, lddq, ATTENTION_SHAPE);                \
    }                                                                                               \
    KERNEL(attention::hopper::BackwardKv<D>::THREADS, attention::hopper::BackwardKv<D>::BLOCKS)     \
    attention_backward_kv_bf16_##D##_sm90(BEFORE, BACKWARD_KV(attention::bf16)) {                   \
        attention::hopper::backward_kv<D>(BEFORE_GIVEN, q, k, v, grad, lse, delta, dk, dv, ldq,     \
                                          ldk, ldv, ldg, lddk, lddv, ATTENTION_SHAPE);              \
    }

#if !defined(HEAD) || HEAD == 64
HOPPER(64)
#endif
#if !defined(HEAD) || HEAD == 128
HOPPER(128)
#endif

#include "loss_sm90.cuh"

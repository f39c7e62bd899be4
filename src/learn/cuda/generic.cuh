// Attention by plain multiply-adds for any head size up to 256: the f32 kernels, and bf16 ones for
// head sizes without tensor-core kernels. 256 threads; a thread (ty, tx) of 16 x 16 holds rows
// ty + 16 r and columns tx + 16 c of a 64 x 64 tile.
#pragma once

#include "common.cuh"

namespace attention {
namespace generic {

constexpr int TILE = 64, CHUNK = 32;
/// Rows are read four numbers at a time; 16 rows apart by this fall into different banks.
constexpr int PAD = 4;

struct __align__(16) Shared {
    float a[TILE][CHUNK + PAD];
    float b[TILE][CHUNK + PAD];
    float p[TILE][TILE + PAD];
};

__device__ __forceinline__ void read4(float (&x)[4], const float *from) {
    const float4 v = *reinterpret_cast<const float4 *>(from);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

/// Rows of one head of one sequence.
template <typename T> struct Rows {
    const T *data;
    int64_t ld;
    int n;
};

template <typename T>
__device__ __forceinline__ void load(float (*to)[CHUNK + PAD], const Rows<T> &m, int row, int col,
                                     int d) {
    static_assert(CHUNK == 32);
    const int c = threadIdx.x & 31;
    const T *from = m.data + (row + threadIdx.x / 32) * m.ld + col + c;
#pragma unroll 4
    for (int r = threadIdx.x / 32; r < TILE; r += 8, from += 8 * m.ld)
        to[r][c] = row + r < m.n && col + c < d ? wide(*from) : 0.f;
}

/// s = A[i0..][..d] B[j0..][..d]^T.
template <typename T>
__device__ __forceinline__ void scores(float (&s)[4][4], Shared &sh, const Rows<T> &a, int i0,
                                       const Rows<T> &b, int j0, int d) {
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) s[r][c] = 0.f;
    for (int col = 0; col < d; col += CHUNK) {
        __syncthreads();
        load(sh.a, a, i0, col, d);
        load(sh.b, b, j0, col, d);
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < CHUNK; k += 4) {
            float x[4][4], y[4][4];
#pragma unroll
            for (int r = 0; r < 4; ++r)
                read4(x[r], &sh.a[ty + 16 * r][k]), read4(y[r], &sh.b[tx + 16 * r][k]);
#pragma unroll
            for (int e = 0; e < 4; ++e)
#pragma unroll
                for (int r = 0; r < 4; ++r)
#pragma unroll
                    for (int c = 0; c < 4; ++c) s[r][c] = fmaf(x[r][e], y[c][e], s[r][c]);
        }
    }
}

/// Columns 2 tx and 2 tx + 1 of each chunk of the thread's rows; a head has so many chunks at most.
template <int CHUNKS> using Sum = float[CHUNKS][4][2];

/// sum += P B[j0..j0 + 64][..d], where P is what the threads hold in `p`.
template <int CHUNKS, typename T>
__device__ __forceinline__ void accumulate(Sum<CHUNKS> &sum, Shared &sh, const float (&p)[4][4],
                                           const Rows<T> &b, int j0, int d) {
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) sh.p[ty + 16 * r][tx + 16 * c] = p[r][c];
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (chunk * CHUNK >= d) break;
        __syncthreads();
        load(sh.b, b, j0, chunk * CHUNK, d);
        __syncthreads();
#pragma unroll 2
        for (int k = 0; k < TILE; k += 4) {
            float x[4][4];
#pragma unroll
            for (int r = 0; r < 4; ++r) read4(x[r], &sh.p[ty + 16 * r][k]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float2 y = *reinterpret_cast<const float2 *>(&sh.b[k + e][2 * tx]);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    sum[chunk][r][0] = fmaf(x[r][e], y.x, sum[chunk][r][0]);
                    sum[chunk][r][1] = fmaf(x[r][e], y.y, sum[chunk][r][1]);
                }
            }
        }
    }
}

/// to[i0..] += by P^T B[j0..j0 + 64][..d], where P is what `accumulate` left in shared memory; the
/// first tile of B is not added to what is there.
template <int CHUNKS, typename T>
__device__ __forceinline__ void add_turned(Shared &sh, const Rows<T> &b, int j0, int d, T *to,
                                           int64_t ld, int i0, int n, float by) {
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        if (chunk * CHUNK >= d) break;
        float sum[4][2] = {};
        __syncthreads();
        load(sh.b, b, j0, chunk * CHUNK, d);
        __syncthreads();
#pragma unroll 8
        for (int k = 0; k < TILE; ++k) {
            const float2 y = *reinterpret_cast<const float2 *>(&sh.b[k][2 * tx]);
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                const float x = sh.p[k][ty + 16 * r];
                sum[r][0] = fmaf(x, y.x, sum[r][0]);
                sum[r][1] = fmaf(x, y.y, sum[r][1]);
            }
        }
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int i = i0 + ty + 16 * r, c = chunk * CHUNK + 2 * tx + h;
                if (i >= n || c >= d) continue;
                T *at = to + i * ld + c;
                store(at, by * sum[r][h] + (j0 ? wide(*at) : 0.f));
            }
    }
}

/// Row r of the thread times `by[r]`, to rows i0.. of `to`.
template <int CHUNKS, typename T>
__device__ __forceinline__ void write(const Sum<CHUNKS> &sum, T *to, int64_t ld, int i0, int n, int d,
                                      const float (&by)[4]) {
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int i = i0 + ty + 16 * r, c = chunk * CHUNK + 2 * tx + h;
                if (i < n && c < d) store(to + i * ld + c, sum[chunk][r][h] * by[r]);
            }
}

/// Over the 16 threads of a row.
__device__ __forceinline__ float row_max(float x) {
    for (int k = 8; k; k >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
    return x;
}
__device__ __forceinline__ float row_sum(float x) {
    for (int k = 8; k; k >>= 1) x += __shfl_xor_sync(~0u, x, k);
    return x;
}

template <int CHUNKS, typename T>
__device__ __forceinline__ void forward(const T *q, const T *k, const T *v, T *o, float *lse,
                                        int ldq, int ldk, int ldv, int ldo, const Shape &s,
                                        const Dropout &dropout) {
    __shared__ Shared sh;
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4, h = blockIdx.x, d = s.head;
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + TILE - 1) / TILE - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * TILE, kv = h / (s.heads / s.kv_heads);
    const Rows<T> rq{q + int64_t(start) * ldq + h * d, ldq, n};
    const Rows<T> rk{k + int64_t(start) * ldk + kv * d, ldk, n};
    const Rows<T> rv{v + int64_t(start) * ldv + kv * d, ldv, n};
    const float scale = s.scale * LOG2E;
    const Dropout drop = dropout.threshold ? at(dropout, blockIdx.y * s.heads + h) : dropout;

    Sum<CHUNKS> sum = {};
    float top[4], total[4] = {};
    for (int r = 0; r < 4; ++r) top[r] = -INFINITY;
    const int end = s.causal ? min(n, i0 + TILE) : n;
    const int begin = s.window ? max(0, i0 - s.window + 1) / TILE * TILE : 0;
    for (int j0 = begin; j0 < end; j0 += TILE) {
        float p[4][4];
        scores(p, sh, rq, i0, rk, j0, d);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int i = i0 + ty + 16 * r;
            const int2 see = seen(s, i, n);
            const int2 hide = s.hidden && i < n ? s.hidden[start + i] : make_int2(0, 0);
            float m = -INFINITY;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int j = j0 + tx + 16 * c;
                if (j < see.x || j >= see.y || (j >= hide.x && j < hide.y)) p[r][c] = -INFINITY;
                m = fmaxf(m, p[r][c]);
            }
            m = fmaxf(top[r], row_max(m));
            const float base = m == -INFINITY ? 0.f : m * scale;
            const float fade = ex2(top[r] * scale - base);
            top[r] = m;
            const uint32_t bits =
                drop.threshold ? keep4(drop, uint64_t(i) * n + j0 + tx) : 0xF;
            float t = 0.f;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                p[r][c] = ex2(p[r][c] * scale - base);
                t += p[r][c];
                if (!(bits >> c & 1)) p[r][c] = 0.f;
            }
            total[r] = total[r] * fade + row_sum(t);
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; ++chunk)
                sum[chunk][r][0] *= fade, sum[chunk][r][1] *= fade;
        }
        accumulate<CHUNKS>(sum, sh, p, rv, j0, d);
    }
    float by[4];
    for (int r = 0; r < 4; ++r) {
        const int i = i0 + ty + 16 * r;
        by[r] = (drop.threshold ? drop.scale : 1.f) / total[r];
        if (tx == 0 && i < n)
            lse[int64_t(h) * s.tokens + start + i] = top[r] * scale + log2f(total[r]);
    }
    write<CHUNKS>(sum, o + int64_t(start) * ldo + h * d, ldo, i0, n, d, by);
}

template <typename T>
__device__ __forceinline__ void delta(const T *o, const T *g, float *delta, int ldo, int ldg,
                                      int tokens, int heads, int d) {
    const int lane = threadIdx.x & 31;
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= tokens * heads) return;
    const int t = row / heads, h = row % heads;
    float x = 0.f;
    for (int c = lane; c < d; c += 32)
        x = fmaf(wide(o[int64_t(t) * ldo + h * d + c]), wide(g[int64_t(t) * ldg + h * d + c]), x);
    for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(~0u, x, k);
    if (lane == 0) delta[int64_t(h) * tokens + t] = x;
}

template <int CHUNKS, typename T>
__device__ __forceinline__ void backward_q(const T *q, const T *k, const T *v, const T *g,
                                           const float *lse, const float *delta, T *dq, int ldq,
                                           int ldk, int ldv, int ldg, int lddq, const Shape &s,
                                           const Dropout &dropout) {
    __shared__ Shared sh;
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4, h = blockIdx.x, d = s.head;
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int tile = (n + TILE - 1) / TILE - 1 - int(blockIdx.z);
    if (tile < 0) return;
    const int i0 = tile * TILE, kv = h / (s.heads / s.kv_heads);
    const Rows<T> rq{q + int64_t(start) * ldq + h * d, ldq, n};
    const Rows<T> rg{g + int64_t(start) * ldg + h * d, ldg, n};
    const Rows<T> rk{k + int64_t(start) * ldk + kv * d, ldk, n};
    const Rows<T> rv{v + int64_t(start) * ldv + kv * d, ldv, n};
    const float scale = s.scale * LOG2E;
    const Dropout drop = dropout.threshold ? at(dropout, blockIdx.y * s.heads + h) : dropout;
    const float keep = drop.threshold ? drop.scale : 1.f;

    Sum<CHUNKS> sum = {};
    const int end = s.causal ? min(n, i0 + TILE) : n;
    const int begin = s.window ? max(0, i0 - s.window + 1) / TILE * TILE : 0;
    for (int j0 = begin; j0 < end; j0 += TILE) {
        float p[4][4], dp[4][4];
        scores(p, sh, rq, i0, rk, j0, d);
        scores(dp, sh, rg, i0, rv, j0, d);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int i = i0 + ty + 16 * r;
            const int2 see = seen(s, i, n);
            const int64_t at = int64_t(h) * s.tokens + start + min(i, n - 1);
            const float l = lse[at], dl = delta[at];
            const uint32_t bits =
                drop.threshold ? keep4(drop, uint64_t(i) * n + j0 + tx) : 0xF;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int j = j0 + tx + 16 * c;
                const float x = j < see.x || j >= see.y ? 0.f : ex2(p[r][c] * scale - l);
                p[r][c] = x * ((bits >> c & 1 ? dp[r][c] * keep : 0.f) - dl);
                if (j < see.x || j >= see.y) p[r][c] = 0.f;
            }
        }
        accumulate<CHUNKS>(sum, sh, p, rk, j0, d);
    }
    const float by[4] = {s.scale, s.scale, s.scale, s.scale};
    write<CHUNKS>(sum, dq + int64_t(start) * lddq + h * d, lddq, i0, n, d, by);
}

/// With WHOLE a block has all keys of a sequence, one tile after the other, and adds up the
/// gradients of the queries in memory on its way: there must be no window.
template <int CHUNKS, bool WHOLE, typename T>
__device__ __forceinline__ void backward_kv(const T *q, const T *k, const T *v, const T *g,
                                            const float *lse, const float *delta, T *dq, T *dk,
                                            T *dv, int ldq, int ldk, int ldv, int ldg, int lddq,
                                            int lddk, int lddv, const Shape &s,
                                            const Dropout &dropout) {
    __shared__ Shared sh;
    const int tx = threadIdx.x & 15, ty = threadIdx.x >> 4, kv = blockIdx.x, d = s.head;
    const int start = s.starts[blockIdx.y], n = s.starts[blockIdx.y + 1] - start;
    const int group = s.heads / s.kv_heads;
    const Rows<T> rk{k + int64_t(start) * ldk + kv * d, ldk, n};
    const Rows<T> rv{v + int64_t(start) * ldv + kv * d, ldv, n};
    const float scale = s.scale * LOG2E;

    for (int j0 = WHOLE ? 0 : blockIdx.z * TILE; j0 < n; j0 += TILE) {
        Sum<CHUNKS> sk = {}, sv = {};
        const int begin = s.causal ? j0 : 0;
        const int end = s.window ? min(n, j0 + TILE - 1 + s.window) : n;
        for (int h = kv * group; h < (kv + 1) * group; ++h) {
            const Rows<T> rq{q + int64_t(start) * ldq + h * d, ldq, n};
            const Rows<T> rg{g + int64_t(start) * ldg + h * d, ldg, n};
            const Dropout drop = dropout.threshold ? at(dropout, blockIdx.y * s.heads + h) : dropout;
            const float keep = drop.threshold ? drop.scale : 1.f;
            for (int i0 = begin; i0 < end; i0 += TILE) {
                float p[4][4], dp[4][4];
                scores(p, sh, rk, j0, rq, i0, d);
                scores(dp, sh, rv, j0, rg, i0, d);
    #pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int i = i0 + tx + 16 * c;
                    const int2 see = seen(s, i, n);
                    const int64_t at = int64_t(h) * s.tokens + start + min(i, n - 1);
                    const float l = lse[at], dl = delta[at];
                    const uint32_t bits =
                        drop.threshold ? keep4(drop, uint64_t(i) * n + j0 + ty) : 0xF;
    #pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int j = j0 + ty + 16 * r;
                        const bool in = i < n && j >= see.x && j < see.y;
                        const bool stays = bits >> r & 1;
                        const float x = in ? ex2(p[r][c] * scale - l) : 0.f;
                        dp[r][c] = in ? x * ((stays ? dp[r][c] * keep : 0.f) - dl) : 0.f;
                        p[r][c] = stays ? x * keep : 0.f;
                    }
                }
                accumulate<CHUNKS>(sv, sh, p, rg, i0, d);
                accumulate<CHUNKS>(sk, sh, dp, rq, i0, d);
                if (WHOLE)
                    add_turned<CHUNKS>(sh, rk, j0, d, dq + int64_t(start) * lddq + h * d, lddq, i0, n,
                                       s.scale);
            }
        }
        const float one[4] = {1.f, 1.f, 1.f, 1.f};
        const float by[4] = {s.scale, s.scale, s.scale, s.scale};
        write<CHUNKS>(sv, dv + int64_t(start) * lddv + kv * d, lddv, j0, n, d, one);
        write<CHUNKS>(sk, dk + int64_t(start) * lddk + kv * d, lddk, j0, n, d, by);
        if (!WHOLE) break;
    }
}

}  // namespace generic
}  // namespace attention

// Pieces of the tensor-core kernels: asynchronous copies, fragments, products (sm_80 and later).
//
// A tile lies in shared memory row by row, each row followed by 16 bytes of padding: with a head of
// a multiple of 16 elements a row is then an odd number of 16-byte chunks, and eight rows that
// `ldmatrix` reads at once fall into different banks.
#pragma once

#include "common.cuh"

namespace attention {

extern __shared__ __align__(1024) char memory[];

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return uint32_t(__cvta_generic_to_shared(p));
}

/// Copies `bytes` of 16 (0: zeros are written instead).
__device__ __forceinline__ void copy16(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy4(uint32_t to, const void *from, int bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

__device__ __forceinline__ void ldmatrix_t(uint32_t (&r)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from));
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t pack(float lo, float hi) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

/// Eight products of two rows, added.
__device__ __forceinline__ float dot8(const bf16 *a, const bf16 *b) {
    const uint4 x = *reinterpret_cast<const uint4 *>(a), y = *reinterpret_cast<const uint4 *>(b);
    const auto two = [](uint32_t u, uint32_t v) {
        return __uint_as_float(u << 16) * __uint_as_float(v << 16) +
               __uint_as_float(u & 0xffff0000u) * __uint_as_float(v & 0xffff0000u);
    };
    return two(x.x, y.x) + two(x.y, y.y) + two(x.z, y.z) + two(x.w, y.w);
}

/// Bytes of a row of a tile.
template <int D> constexpr int PITCH = D * 2 + 16;

/// Copies rows 0..ROWS of a matrix of which `valid` exist (zeros for the others).
template <int D, int ROWS, int THREADS>
__device__ __forceinline__ void load(uint32_t to, const bf16 *from, int64_t ld, int valid) {
    constexpr int CH = D / 8, STEP = THREADS / CH;
    static_assert(ROWS * CH % THREADS == 0);
    if constexpr (THREADS % CH == 0) {
        const int r = threadIdx.x / CH, c = threadIdx.x % CH;
        to += r * PITCH<D> + c * 16;
        from += r * ld + c * 8;
        valid -= r;
#pragma unroll
        for (int k = 0; k < ROWS; k += STEP) {
            copy16(to + k * PITCH<D>, from, k < valid ? 16 : 0);
            from += STEP * ld;
        }
    } else {
#pragma unroll
        for (int k = 0; k < ROWS * CH / THREADS; ++k) {
            const int i = k * THREADS + threadIdx.x, r = i / CH, c = i % CH;
            copy16(to + r * PITCH<D> + c * 16, from + r * ld + c * 8, r < valid ? 16 : 0);
        }
    }
}

/// Where a lane reads the fragments of a row-major A, or of a B that lies [k][n] (transposed).
template <int D> __device__ __forceinline__ uint32_t lane_a() {
    const int lane = threadIdx.x & 31;
    return (lane & 15) * PITCH<D> + (lane >> 4) * 16;
}

/// Likewise for a B that lies [n][k].
template <int D> __device__ __forceinline__ uint32_t lane_b() {
    const int lane = threadIdx.x & 31;
    return ((lane & 7) + (lane >> 4) * 8) * PITCH<D> + (lane >> 3 & 1) * 16;
}

/// s = A B^T over D: A has 16 MT rows, B 8 NT; `a` and `b` are addresses of the lane.
template <int D, int MT, int NT>
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], uint32_t a, uint32_t b) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int k = 0; k < 4; ++k) s[m][t][k] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t fa[MT][4];
#pragma unroll
        for (int m = 0; m < MT; ++m) ldmatrix(fa[m], a + m * 16 * PITCH<D> + k * 32);
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
            uint32_t fb[4];
            ldmatrix(fb, b + t * 8 * PITCH<D> + k * 32);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma(s[m][t], fa[m], fb[0], fb[1]);
                mma(s[m][t + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

/// Rounds what `scores` gave to the A operand of a product over its columns.
template <int MT, int NT>
__device__ __forceinline__ void pack(uint32_t (&p)[MT][NT / 2][4], const float (&s)[MT][NT][4]) {
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int t = 0; t < NT / 2; ++t) {
            p[m][t][0] = pack(s[m][2 * t][0], s[m][2 * t][1]);
            p[m][t][1] = pack(s[m][2 * t][2], s[m][2 * t][3]);
            p[m][t][2] = pack(s[m][2 * t + 1][0], s[m][2 * t + 1][1]);
            p[m][t][3] = pack(s[m][2 * t + 1][2], s[m][2 * t + 1][3]);
        }
}

/// o += P B, where B lies [k][D].
template <int D, int MT, int KT>
__device__ __forceinline__ void accumulate(float (&o)[MT][D / 8][4], const uint32_t (&p)[MT][KT][4],
                                           uint32_t b) {
#pragma unroll
    for (int k = 0; k < KT; ++k)
#pragma unroll
        for (int t = 0; t < D / 8; t += 2) {
            uint32_t fb[4];
            ldmatrix_t(fb, b + k * 16 * PITCH<D> + t * 16);
#pragma unroll
            for (int m = 0; m < MT; ++m) {
                mma(o[m][t], p[m][k], fb[0], fb[1]);
                mma(o[m][t + 1], p[m][k], fb[2], fb[3]);
            }
        }
}

/// Writes a warp's 16 MT rows, `by[m][r]` times each, through its own part of shared memory;
/// `valid` rows exist.
template <int D, int MT>
__device__ __forceinline__ void write(const float (&o)[MT][D / 8][4], const float (&by)[MT][2],
                                      char *tile, bf16 *to, int64_t ld, int valid) {
    const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int t = 0; t < D / 8; ++t)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *reinterpret_cast<uint32_t *>(tile + (m * 16 + r * 8 + g) * PITCH<D> + t * 16 +
                                              c * 4) =
                    pack(o[m][t][2 * r] * by[m][r], o[m][t][2 * r + 1] * by[m][r]);
    __syncwarp();
    constexpr int CH = D / 8;
#pragma unroll
    for (int k = 0; k < MT * 16 * CH / 32; ++k) {
        const int i = k * 32 + lane, r = i / CH, x = i % CH;
        if (r < valid)
            *reinterpret_cast<uint4 *>(to + r * ld + x * 8) =
                *reinterpret_cast<const uint4 *>(tile + r * PITCH<D> + x * 16);
    }
}

/// Sets scores of keys that are not seen to -inf; rows of the warp begin at `row`.
template <int MT, int NT>
__device__ __forceinline__ void hide(float (&s)[MT][NT][4], const Shape &shape, const int2 *hidden,
                                     int row, int j0, int n) {
    const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = row + m * 16 + r * 8 + g;
            const int2 see = seen(shape, i, n);
            const int2 not_seen = hidden && i < n ? hidden[i] : make_int2(0, 0);
#pragma unroll
            for (int t = 0; t < NT; ++t)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const int j = j0 + t * 8 + c * 2 + k;
                    const bool in =
                        j >= see.x && j < see.y && !(j >= not_seen.x && j < not_seen.y);
                    if (!in) s[m][t][2 * r + k] = -INFINITY;
                }
        }
}

}  // namespace attention

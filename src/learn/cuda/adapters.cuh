// Kernels of low-rank adapters: where they lie beside their weights, and their gradients. A part of
// kernels.cu.
#pragma once

// A low-rank adapter and where it goes beside its frozen weight: A below it, scale * B on its
// right, zeros on the right of B's neighbours.
struct Adapter {
  const float* a;  // [r, inputs]
  const float* b;  // [outputs, r]
  T* to;           // null: the kernel's argument
  int r, inputs, outputs;
  int start;    // of the module's rows
  int offset;   // of its ranks among all
  int ranks;    // all, padded
  int below;    // the row where all A begin
  int last;     // whether the padding of A is this one's to fill
  float scale;
  int ld;
};

// Thread `i` of `threads` puts its share in place.
static __device__ __forceinline__ void place(const Adapter& p, T* unpacked, uint32_t i,
                                             uint32_t threads) {
  T* out = p.to ? p.to : unpacked;
  uint32_t fill = p.last ? p.ranks - p.offset : p.r;
  uint32_t inputs = p.inputs, ranks = p.ranks, na = fill * inputs, nb = p.outputs * ranks;
  for (; i < na + nb; i += threads) {
    if (i < na) {
      uint32_t row = i / inputs, col = i % inputs;
      put(out + (size_t)(p.below + p.offset + row) * p.ld + col,
          row < p.r ? p.a[(size_t)row * inputs + col] : 0.f);
    } else {
      uint32_t row = (i - na) / ranks, col = (i - na) % ranks;
      int j = (int)col - p.offset;
      bool own = j >= 0 && j < p.r;
      put(out + (size_t)(p.start + row) * p.ld + inputs + col,
          own ? p.scale * p.b[(size_t)row * p.r + j] : 0.f);
    }
  }
}

extern "C" __global__ void place_adapters(const Adapter* parts, T* unpacked) {
  place(parts[blockIdx.y], unpacked, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
}

// A part of the gradients of adapters: `width` columns, 64 at most, of one of the two matrices
// that a product's backward has (the input x; the output's gradient g, followed by dz) against r
// ranks, 64 at most, of the other's: dA = dz^T x, dB = scale * g^T z.
struct Tile {
  float* to;  // the gradient of the first column's first rank
  int of_gradient;
  int col, width;
  int rank, r;  // where the ranks begin: a column of g or of z
  int ld;       // A: from rank to rank; B: from column to column
  float scale;
  int mask;  // that x is dropped by; of the next ranks the next
  int each;  // ranks of a mask
};

#ifdef BF16
#define PITCH 72
#define MASKS 4

static __device__ __forceinline__ void copy16(void* to, const void* from, bool whole) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
               "r"(whole ? 16 : 0));
}

static __device__ __forceinline__ void matrices(uint32_t (&r)[4], const bf16* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(at)));
}

static __device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1,
                                                uint32_t a2, uint32_t a3, uint32_t b0,
                                                uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

static __device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1,
                                                uint32_t b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(b));
}

// The masks that the adapters of a projection drop their input by, see Stream of the CPU.
struct Masks {
  uint32_t state[MASKS][4];
  uint32_t threshold;
  float scale;
};

// What is kept, as bits: for each adapter, 64 columns and 16 rows there are 32 words; bit
// 16 h + 4 j + i of word 4 g + c is row g + 8 h, column 16 j + 4 c + i. They are the elements that
// a lane holds of a factor whose depth is taken in this order, and that it draws by itself.
static __device__ __forceinline__ size_t kept_at(int mask, int chunk, int row, int chunks,
                                                 int rows) {
  return (((size_t)mask * chunks + chunk) * ((rows + 15) / 16) + row / 16) * 32;
}

// z = scale * (mask * x) A^T of an adapter (blockIdx.y), and what its mask keeps. A block has 16
// rows, its warps share the columns; shared: r sums of each row and warp.
extern "C" __global__ void __launch_bounds__(256, 2)
    dropped_ranks(const bf16* x, int ldx, const bf16* a, int lda, bf16* z, uint32_t* kept, int rows,
                  int inputs, int r, const Masks masks) {
  extern __shared__ __align__(16) char memory[];
  float* sums = (float*)memory;
  int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  int g = lane / 4, c = lane % 4, which = blockIdx.y, chunks = inputs / 64;
  int first = blockIdx.x * 16;
  uint32_t k0 = masks.state[which][0], k1 = masks.state[which][1];
  uint32_t h0 = masks.state[which][2], h1 = masks.state[which][3];
  const bf16* upper = x + (size_t)min(first + g, rows - 1) * ldx + 4 * c;
  const bf16* lower = x + (size_t)min(first + g + 8, rows - 1) * ldx + 4 * c;
  a += (size_t)(which * r + g) * lda + 4 * c;
  float sum[8][4] = {};
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    uint2 v[2][4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[0][j] = *(const uint2*)(upper + chunk * 64 + 16 * j);
      v[1][j] = *(const uint2*)(lower + chunk * 64 + 16 * j);
    }
    uint32_t mine = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      size_t block = ((size_t)(first + g + 8 * half) * chunks + chunk) * 16 + 4 * c;
#pragma unroll
      for (int i = 0; i < 4; i++, block++) {
        uint4 u = philox(k0, k1, make_uint4((uint32_t)block, (uint32_t)(block >> 32), h0, h1));
        uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          uint32_t& pair = i < 2 ? v[half][j].x : v[half][j].y;
          if (words[j] >= masks.threshold)
            mine |= 1u << (half * 16 + j * 4 + i);
          else
            pair &= i % 2 ? 0xffffu : 0xffff0000u;
        }
      }
    }
    kept[kept_at(which, chunk, first, chunks, rows) + lane] = mine;
#pragma unroll
    for (int n = 0; n < 8; n++) {
      if (n * 8 >= r) break;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        uint2 b = *(const uint2*)(a + (size_t)n * 8 * lda + chunk * 64 + 16 * j);
        multiply(sum[n], v[0][j].x, v[1][j].x, v[0][j].y, v[1][j].y, b.x, b.y);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < 8; n++) {
    if (n * 8 >= r) break;
    float* at = sums + (warp * 16 + g) * r + n * 8 + 2 * c;
    *(float2*)at = make_float2(sum[n][0], sum[n][1]);
    *(float2*)(at + 8 * r) = make_float2(sum[n][2], sum[n][3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * r; i += blockDim.x) {
    int row = first + i / r;
    if (row >= rows) break;
    float all = 0;
    for (int w = 0; w < warps; w++) all += sums[w * 16 * r + i];
    put(z + (size_t)row * ldx + which * r + i % r, masks.scale * all);
  }
}

// y = plus + scale * the sum over adapters of mask * (dz A): what they add to the gradient of their
// input. A block has 128 rows of 64 columns (blockIdx.x); shared: these columns of every A. plus
// may be null.
extern "C" __global__ void __launch_bounds__(256)
    dropped_gradient(const bf16* dz, int ldz, const bf16* a, int lda, const uint32_t* kept,
                     const bf16* plus, int ldp, bf16* y, int ldy, int rows, int inputs, int r,
                     int adapters, float scale) {
  extern __shared__ __align__(16) char memory[];
  bf16* own = (bf16*)memory;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  int chunk = blockIdx.x, chunks = inputs / 64;
  // Columns in the order that lets a lane end with four side by side.
  for (int i = threadIdx.x; i < adapters * r * 16; i += blockDim.x) {
    int rank = i / 16, four = i % 16;
    uint2 v = *(const uint2*)(a + (size_t)rank * lda + chunk * 64 + four * 4);
    bf16* to = own + rank * PITCH + four / 4 * 16 + four % 4 * 2;
    *(uint32_t*)to = v.x;
    *(uint32_t*)(to + 8) = v.y;
  }
  __syncthreads();
  int first = (blockIdx.y * 8 + warp) * 16;
  if (first >= rows) return;
  const bf16* upper = dz + (size_t)min(first + g, rows - 1) * ldz + 2 * c;
  const bf16* lower = dz + (size_t)min(first + g + 8, rows - 1) * ldz + 2 * c;
  float sum[8][4] = {};
  for (int k = 0; k < adapters; k++) {
    float part[8][4] = {};
    for (int rank = k * r; rank < k * r + r; rank += 8) {
      uint32_t u = *(const uint32_t*)(upper + rank), l = *(const uint32_t*)(lower + rank);
#pragma unroll
      for (int n = 0; n < 8; n += 4) {
        uint32_t b[4];
        matrices(b, own + (rank + lane % 8) * PITCH + (n + lane / 8) * 8);
#pragma unroll
        for (int t = 0; t < 4; t++) multiply(part[n + t], u, l, b[t]);
      }
    }
    uint32_t bits = kept[kept_at(k, chunk, first, chunks, rows) + lane];
#pragma unroll
    for (int i = 0; i < 32; i++)
      if (bits >> i & 1) sum[i / 2 % 8][i / 16 * 2 + i % 2] += part[i / 2 % 8][i / 16 * 2 + i % 2];
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = first + g + 8 * half;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int col = chunk * 64 + 16 * j + 4 * c;
      float4 v = plus ? load4(plus + (size_t)row * ldp + col) : make_float4(0, 0, 0, 0);
      v.x += scale * sum[2 * j][2 * half];
      v.y += scale * sum[2 * j][2 * half + 1];
      v.z += scale * sum[2 * j + 1][2 * half];
      v.w += scale * sum[2 * j + 1][2 * half + 1];
      store4(y + (size_t)row * ldy + col, v);
    }
  }
}

// Sums over a span of rows for each tile: parts[span][tile][rank][column]. `kept` is null where
// nothing is dropped. With `rstd` the input is what a root-mean-square norm of weight `w` makes of
// x: rounded as it makes it.
extern "C" __global__ void __launch_bounds__(128)
    adapter_gradients(const bf16* x, int ldx, const bf16* z, int ldz, const bf16* g, int ldg,
                      const Tile* tiles, float* parts, int largest, int rows, int span, int inputs,
                      const uint32_t* kept, float scale, const float* rstd, const float* w) {
  __shared__ __align__(16) bf16 wide[2][64 * PITCH], thin[2][64 * PITCH];
  __shared__ __align__(16) float inverse[2][64];
  __shared__ __align__(16) uint32_t masks[2][MASKS * 128];
  Tile t = tiles[blockIdx.x];
  const bf16* big = (t.of_gradient ? g : x) + t.col;
  const bf16* small = (t.of_gradient ? z : g) + t.rank;
  int ldb = t.of_gradient ? ldg : ldx, lds = t.of_gradient ? ldz : ldg, thinner = t.r / 8;
  int first = blockIdx.y * span, last = min(rows, first + span);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool masked = kept && !t.of_gradient, normed = rstd && !t.of_gradient;
  float weights[2] = {1.f, 1.f};  // of the lane's columns
  for (int i = 0; i < 2; i++) {
    int c = warp * 16 + i * 8 + lane / 4;
    if (normed && c < t.width) weights[i] = w[t.col + c];
  }
  float by = masked ? scale : 1.f;
  float sum[4][2][4] = {};
  int turns = 0;  // bit m: with ranks 16 m a mask begins
  for (int m = 0; m < 4; m++) turns |= (m * 16 % t.each == 0) << m;
  auto fetch = [&](int stage, int row) {
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      int r = k + threadIdx.x / 8, c = threadIdx.x % 8 * 8, at = row + r;
      bool in = at < last && c < t.width;
      copy16(&wide[stage][r * PITCH + c], in ? big + (size_t)at * ldb + c : big, in);
    }
    // Ranks past r are not written: they only reach sums that are not kept.
    for (int i = threadIdx.x; i < 64 * thinner; i += 128) {
      int r = i / thinner, c = i % thinner * 8, at = row + r;
      bool in = at < last;
      copy16(&thin[stage][r * PITCH + c], in ? small + (size_t)at * lds + c : small, in);
    }
    if (masked && warp * t.each < t.r) {
      bool in = row + lane / 8 * 16 < rows;
      const uint32_t* from = kept + kept_at(t.mask + warp, t.col / 64, row, inputs / 64, rows);
      copy16(&masks[stage][warp * 128 + lane * 4], in ? from + lane * 4 : kept, in);
    }
    if (normed && threadIdx.x < 64) {
      uint32_t to = (uint32_t)__cvta_generic_to_shared(&inverse[stage][threadIdx.x]);
      int at = row + threadIdx.x;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to),
                   "l"(at < last ? rstd + at : rstd), "r"(at < last ? 4 : 0));
    }
    asm volatile("cp.async.commit_group;");
  };
  int stage = 0;
  fetch(0, first);
  for (int row = first; row < last; row += 64, stage ^= 1) {
    if (row + 64 < last) {
      fetch(stage ^ 1, row + 64);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      uint32_t all[4], b[4];
      const uint32_t* bits = &masks[stage][k * 2 + lane % 4 * 8 + lane / 16];
      int bit = warp * 4 + lane / 4 % 4;
      int deep = k + lane / 8 % 2 * 8 + lane % 8;
      matrices(all, &wide[stage][deep * PITCH + warp * 16 + lane / 16 * 8]);
      if (normed) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float2 by = *(const float2*)&inverse[stage][k + i % 2 * 8 + lane % 4 * 2];
          __nv_bfloat162 two = __floats2bfloat162_rn(
              __uint_as_float(all[i] << 16) * (by.x * weights[i / 2]),
              __uint_as_float(all[i] & 0xffff0000u) * (by.y * weights[i / 2]));
          all[i] = *(uint32_t*)&two;
        }
      }
#pragma unroll
      for (int m = 0; m < 4; m++) {
        if (m * 16 >= t.r) break;
        uint32_t a[4];
        deep = k + lane / 16 * 8 + lane % 8;
        matrices(a, &thin[stage][deep * PITCH + m * 16 + lane / 8 % 2 * 8]);
        if (turns >> m & 1) {
#pragma unroll
          for (int i = 0; i < 4; i++) {
            uint32_t one = masked ? bits[i / 2 * 2] >> bit : ~0u;
            uint32_t other = masked ? bits[i / 2 * 2 + 4] >> bit : ~0u;
            if (i % 2) one >>= 16, other >>= 16;
            b[i] = all[i] & ((one & 1) * 0xffffu | (other & 1) * 0xffff0000u);
          }
          bits += 128;
        }
#pragma unroll
        for (int n = 0; n < 2; n++)
          multiply(sum[m][n], a[0], a[1], a[2], a[3], b[2 * n], b[2 * n + 1]);
      }
    }
    __syncthreads();
  }
  float* out = parts + ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * largest * 64;
#pragma unroll
  for (int m = 0; m < 4; m++) {
    if (m * 16 >= t.r) break;
#pragma unroll
    for (int n = 0; n < 2; n++) {
      int r = m * 16 + lane / 4, c = warp * 16 + n * 8 + lane % 4 * 2;
      *(float2*)(out + r * 64 + c) = make_float2(by * sum[m][n][0], by * sum[m][n][1]);
      if (r + 8 < t.r)
        *(float2*)(out + (r + 8) * 64 + c) = make_float2(by * sum[m][n][2], by * sum[m][n][3]);
    }
  }
}
#endif

// Adds the sums of all spans to the gradients; blockIdx.y is a part of the tile.
extern "C" __global__ void add_tiles(const Tile* tiles, const float* parts, int largest,
                                     int spans) {
  Tile t = tiles[blockIdx.x];
  int i = blockIdx.y * blockDim.x + threadIdx.x, r = i / 64, c = i % 64;
  if (r >= t.r || c >= t.width) return;
  size_t each = (size_t)gridDim.x * largest * 64;
  parts += (size_t)blockIdx.x * largest * 64 + i;
  float sum = 0;
#pragma unroll 8
  for (int s = 0; s < spans; s++) sum += parts[s * each];
  float* to = t.of_gradient ? t.to + (size_t)c * t.ld + r : t.to + (size_t)r * t.ld + c;
  *to += t.scale * sum;
}

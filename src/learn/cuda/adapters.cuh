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

extern "C" __global__ void place_adapters(const Adapter* parts, T* unpacked) {
  Adapter p = parts[blockIdx.y];
  T* out = p.to ? p.to : unpacked;
  int ld = p.ld;
  int fill = p.last ? p.ranks - p.offset : p.r;
  size_t na = (size_t)fill * p.inputs, nb = (size_t)p.outputs * p.ranks;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < na + nb;
       i += (size_t)gridDim.x * blockDim.x) {
    if (i < na) {
      size_t row = i / p.inputs, col = i % p.inputs;
      put(out + (p.below + p.offset + row) * ld + col, row < p.r ? p.a[row * p.inputs + col] : 0.f);
    } else {
      size_t row = (i - na) / p.ranks;
      int col = (int)((i - na) % p.ranks), j = col - p.offset;
      bool own = j >= 0 && j < p.r;
      put(out + (p.start + row) * ld + p.inputs + col, own ? p.scale * p.b[row * p.r + j] : 0.f);
    }
  }
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
  int mask;  // that x is dropped by
};

#ifdef BF16
#define PITCH 72
#define MASKS 4

static __device__ __forceinline__ void copy16(bf16* to, const bf16* from, bool whole) {
  uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from),
               "r"(whole ? 16 : 0));
}

static __device__ __forceinline__ void matrices(uint32_t (&r)[4], const bf16* at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"((uint32_t)__cvta_generic_to_shared(at)));
}

// The masks of a projection's adapters (threshold 0: none), see Stream of the CPU.
struct Masks {
  uint32_t state[MASKS][4];
  uint32_t threshold;
  float scale;
};

// Drops elements of 16 rows of 64 columns that begin with a multiple of 64; `group` is the first
// row's number in units of 64 elements, `groups` those of a row.
static __device__ __forceinline__ void drop_rows(bf16* rows, const uint32_t (&s)[4],
                                                 uint32_t threshold, size_t group, int groups) {
  int lane = threadIdx.x % 32, half = lane / 16;
#pragma unroll 2
  for (int r = 0; r < 16; r += 2) {
    size_t i = (group + (size_t)(r + half) * groups) * 16 + lane % 16;
    uint4 u = philox(s[0], s[1], make_uint4((uint32_t)i, (uint32_t)(i >> 32), s[2], s[3]));
    uint32_t words[4] = {u.x, u.y, u.z, u.w}, kept = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      uint32_t all = __ballot_sync(~0u, words[j] >= threshold);
      if (lane / 4 % 4 == j) kept = all >> (half * 16 + lane % 4 * 4);
    }
    uint2* at = (uint2*)(rows + (r + half) * PITCH + lane % 16 * 4);
    uint2 x = *at;
    x.x &= (kept & 1 ? 0xffffu : 0u) | (kept & 2 ? 0xffff0000u : 0u);
    x.y &= (kept & 4 ? 0xffffu : 0u) | (kept & 8 ? 0xffff0000u : 0u);
    *at = x;
  }
}

// Sums over a span of rows for each tile: parts[span][tile][rank][column].
extern "C" __global__ void __launch_bounds__(128)
    adapter_gradients(const bf16* x, int ldx, const bf16* z, int ldz, const bf16* g, int ldg,
                      const Tile* tiles, float* parts, int largest, int rows, int span, int inputs,
                      const Masks masks) {
  __shared__ __align__(16) bf16 wide[2][64 * PITCH], thin[2][64 * PITCH];
  Tile t = tiles[blockIdx.x];
  const bf16* big = (t.of_gradient ? g : x) + t.col;
  const bf16* small = (t.of_gradient ? z : g) + t.rank;
  int ldb = t.of_gradient ? ldg : ldx, lds = t.of_gradient ? ldz : ldg, thinner = t.r / 8;
  int first = blockIdx.y * span, last = min(rows, first + span);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  bool masked = masks.threshold && !t.of_gradient;
  float by = masked ? masks.scale : 1.f;
  float sum[4][2][4] = {};
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
    if (masked) {
      drop_rows(&wide[stage][warp * 16 * PITCH], masks.state[t.mask], masks.threshold,
                ((size_t)(row + warp * 16) * inputs + t.col) / 64, inputs / 64);
      __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < 64; k += 16) {
      uint32_t b[4];
      matrices(b, &wide[stage][(k + lane / 8 % 2 * 8 + lane % 8) * PITCH + warp * 16 + lane / 16 * 8]);
#pragma unroll
      for (int m = 0; m < 4; m++) {
        if (m * 16 >= t.r) break;
        uint32_t a[4];
        matrices(a, &thin[stage][(k + lane / 16 * 8 + lane % 8) * PITCH + m * 16 + lane / 8 % 2 * 8]);
#pragma unroll
        for (int n = 0; n < 2; n++)
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
              "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
              : "+f"(sum[m][n][0]), "+f"(sum[m][n][1]), "+f"(sum[m][n][2]), "+f"(sum[m][n][3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * n]), "r"(b[2 * n + 1]));
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
extern "C" __global__ void add_tiles(const Tile* tiles, const float* parts, int largest, int spans) {
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

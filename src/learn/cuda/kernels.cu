// Kernels of the GPU path, all but attention (attention.cu).
//
// A matrix is row-major with a row stride in elements. Storage is f32 or bf16, arithmetic is f32.
// Widths and strides are multiples of 8, so that every access is 16 bytes wide. Nothing uses
// atomics: equal inputs give equal bits.
//
// It is compiled twice, for matrices of f32 and of bf16; see ptx.sh.
// Heads, the loss and adapters have files of their own: heads.cuh, loss.cuh, adapters.cuh.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

typedef __nv_bfloat16 bf16;
#ifdef BF16
typedef bf16 T;
#else
typedef float T;
#endif

struct Eight {
  float v[8];
};

static __device__ __forceinline__ Eight load(const float* p) {
  float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

static __device__ __forceinline__ Eight load(const bf16* p) {
  uint4 u = *reinterpret_cast<const uint4*>(p);
  uint32_t w[4] = {u.x, u.y, u.z, u.w};
  Eight e;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    e.v[2 * i] = __uint_as_float(w[i] << 16);
    e.v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
  return e;
}

static __device__ __forceinline__ void store(float* p, const Eight& e) {
  reinterpret_cast<float4*>(p)[0] = make_float4(e.v[0], e.v[1], e.v[2], e.v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(e.v[4], e.v[5], e.v[6], e.v[7]);
}

static __device__ __forceinline__ void store(bf16* p, const Eight& e) {
  union {
    __nv_bfloat162 h[4];
    uint4 u;
  } out;
#pragma unroll
  for (int i = 0; i < 4; i++) out.h[i] = __floats2bfloat162_rn(e.v[2 * i], e.v[2 * i + 1]);
  *reinterpret_cast<uint4*>(p) = out.u;
}

static __device__ __forceinline__ float as_float(float x) { return x; }
static __device__ __forceinline__ float as_float(bf16 x) { return __bfloat162float(x); }
static __device__ __forceinline__ void put(float* p, float x) { *p = x; }
static __device__ __forceinline__ void put(bf16* p, float x) { *p = __float2bfloat16_rn(x); }

// The sum over the threads of a row. blockDim is (threads of a row, rows); one row if more than 32.
static __device__ __forceinline__ float row_sum(float x) {
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  if (blockDim.x > 32) {
    __shared__ float part[32];
    int warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < warps; i++) x += part[i];
  }
  return x;
}

static __device__ __forceinline__ float row_max(float x) {
  for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, o));
  if (blockDim.x > 32) {
    __shared__ float part[32];
    int warps = blockDim.x / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < warps; i++) x = fmaxf(x, part[i]);
  }
  return x;
}

// Row r of matrices whose rows hold `group` vectors of d side by side.
static __device__ __forceinline__ size_t row_at(int r, int group, int ld, int d) {
  return (size_t)(r / group) * ld + (size_t)(r % group) * d;
}

extern "C" __global__ void rms_norm(const T* x, int ldx, const float* w, T* out, int ldo, float* rstd,
                                int d, int rows, float eps) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  x += (size_t)r * ldx;
  out += (size_t)r * ldo;
  float square = 0;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(x + c);
#pragma unroll
    for (int i = 0; i < 8; i++) square += e.v[i] * e.v[i];
  }
  float inverse = rsqrtf(row_sum(square) / d + eps);
  if (threadIdx.x == 0 && rstd) rstd[r] = inverse;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(x + c), g = load(w + c);
#pragma unroll
    for (int i = 0; i < 8; i++) e.v[i] *= inverse * g.v[i];
    store(out + c, e);
  }
}

// dx = residual + the gradient of the norm's input; residual may be null, or dx itself.
extern "C" __global__ void rms_norm_backward(const T* x, int ldx, const float* w, const float* rstd,
                                         const T* g, int ldg, const T* residual, int ldr, T* dx,
                                         int ldd, int d, int rows) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  x += (size_t)r * ldx;
  g += (size_t)r * ldg;
  dx += (size_t)r * ldd;
  if (residual) residual += (size_t)r * ldr;
  float inverse = rstd[r], dot = 0;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(x + c), h = load(g + c), k = load(w + c);
#pragma unroll
    for (int i = 0; i < 8; i++) dot += h.v[i] * k.v[i] * e.v[i];
  }
  float mean = row_sum(dot) * inverse * inverse / d;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(x + c), h = load(g + c), k = load(w + c), out;
    if (residual) out = load(residual + c);
#pragma unroll
    for (int i = 0; i < 8; i++)
      out.v[i] = (residual ? out.v[i] : 0.f) + inverse * (h.v[i] * k.v[i] - e.v[i] * mean);
    store(dx + c, out);
  }
}

// sum = x + residual (which may be null); out = its layer norm.
extern "C" __global__ void layer_norm(const T* x, int ldx, const T* residual, int ldr, const float* w,
                                  const float* b, T* sum, int lds, T* out, int ldo, float* mean,
                                  float* rstd, int d, int rows, float eps) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  x += (size_t)r * ldx;
  sum += (size_t)r * lds;
  out += (size_t)r * ldo;
  if (residual) residual += (size_t)r * ldr;
  float total = 0;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(x + c);
    if (residual) {
      Eight f = load(residual + c);
#pragma unroll
      for (int i = 0; i < 8; i++) e.v[i] += f.v[i];
    }
    store(sum + c, e);
    e = load(sum + c);
#pragma unroll
    for (int i = 0; i < 8; i++) total += e.v[i];
  }
  float m = row_sum(total) / d, square = 0;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(sum + c);
#pragma unroll
    for (int i = 0; i < 8; i++) square += (e.v[i] - m) * (e.v[i] - m);
  }
  float inverse = rsqrtf(row_sum(square) / d + eps);
  if (threadIdx.x == 0) {
    mean[r] = m;
    rstd[r] = inverse;
  }
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(sum + c), g = load(w + c), h = load(b + c);
#pragma unroll
    for (int i = 0; i < 8; i++) e.v[i] = (e.v[i] - m) * inverse * g.v[i] + h.v[i];
    store(out + c, e);
  }
}

extern "C" __global__ void layer_norm_backward(const T* sum, int lds, const float* w, const float* mean,
                                           const float* rstd, const T* g, int ldg, T* dx, int ldd,
                                           int d, int rows) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  sum += (size_t)r * lds;
  g += (size_t)r * ldg;
  dx += (size_t)r * ldd;
  float m = mean[r], inverse = rstd[r], all = 0, dot = 0;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(sum + c), h = load(g + c), k = load(w + c);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float a = h.v[i] * k.v[i];
      all += a;
      dot += a * (e.v[i] - m) * inverse;
    }
  }
  all = row_sum(all) / d;
  dot = row_sum(dot) / d;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(sum + c), h = load(g + c), k = load(w + c);
#pragma unroll
    for (int i = 0; i < 8; i++)
      e.v[i] = inverse * (h.v[i] * k.v[i] - all - (e.v[i] - m) * inverse * dot);
    store(dx + c, e);
  }
}

// Sums over rows, by blocks of rows: weights[b][c] = sum of g * (x - mean) * rstd, biases[b][c] =
// sum of g. x may be null (then there are no weights), so may mean and biases.
extern "C" __global__ void column_sums(const T* x, int ldx, const float* mean, const float* rstd,
                                   const T* g, int ldg, float* weights, float* biases, int d,
                                   int rows, int group, int block) {
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= d) return;
  int first = blockIdx.y * block, last = min(rows, first + block);
  float dw = 0, db = 0;
  for (int r = first; r < last; r++) {
    float h = as_float(g[row_at(r, group, ldg, d) + c]);
    db += h;
    if (x) {
      float e = as_float(x[row_at(r, group, ldx, d) + c]);
      dw += h * (e - (mean ? mean[r] : 0.f)) * rstd[r];
    }
  }
  if (x) weights[(size_t)blockIdx.y * d + c] = dw;
  if (biases) biases[(size_t)blockIdx.y * d + c] = db;
}

// out[i] += the sum over b of parts[b][i].
extern "C" __global__ void add_parts(const float* parts, float* out, int n, int blocks) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float sum = 0;
  for (int b = 0; b < blocks; b++) sum += parts[(size_t)b * n + i];
  out[i] += sum;
}

#include "heads.cuh"

static __device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// x holds gates and then ups, n each; out = silu(gate) * up.
extern "C" __global__ void swiglu(const T* x, int ldx, T* out, int ldo, int n, int rows) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  int wide = n / 8;
  if (i >= (long)rows * wide) return;
  int c = (int)(i % wide) * 8;
  size_t r = i / wide;
  Eight g = load(x + r * ldx + c), u = load(x + r * ldx + n + c);
#pragma unroll
  for (int j = 0; j < 8; j++) g.v[j] = g.v[j] * sigmoid(g.v[j]) * u.v[j];
  store(out + r * ldo + c, g);
}

// Also gives the forward's result again, unless out is null.
extern "C" __global__ void swiglu_backward(const T* x, int ldx, const T* g, int ldg, T* dx, int ldd,
                                       T* out, int ldo, int n, int rows) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  int wide = n / 8;
  if (i >= (long)rows * wide) return;
  int c = (int)(i % wide) * 8;
  size_t r = i / wide;
  Eight a = load(x + r * ldx + c), u = load(x + r * ldx + n + c), h = load(g + r * ldg + c);
  Eight da, du, y;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float s = sigmoid(a.v[j]), silu = a.v[j] * s;
    y.v[j] = silu * u.v[j];
    du.v[j] = h.v[j] * silu;
    da.v[j] = h.v[j] * u.v[j] * (s + silu * (1.f - s));
  }
  store(dx + r * ldd + c, da);
  store(dx + r * ldd + n + c, du);
  if (out) store(out + r * ldo + c, y);
}

extern "C" __global__ void gelu(const T* x, int ldx, T* out, int ldo, int n, int rows) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  int wide = n / 8;
  if (i >= (long)rows * wide) return;
  int c = (int)(i % wide) * 8;
  size_t r = i / wide;
  Eight e = load(x + r * ldx + c);
#pragma unroll
  for (int j = 0; j < 8; j++) e.v[j] = 0.5f * e.v[j] * (1.f + erff(e.v[j] * 0.70710678f));
  store(out + r * ldo + c, e);
}

// Also gives the forward's result again, unless out is null.
extern "C" __global__ void gelu_backward(const T* x, int ldx, const T* g, int ldg, T* dx, int ldd,
                                     T* out, int ldo, int n, int rows) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  int wide = n / 8;
  if (i >= (long)rows * wide) return;
  int c = (int)(i % wide) * 8;
  size_t r = i / wide;
  Eight e = load(x + r * ldx + c), h = load(g + r * ldg + c), y;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float a = e.v[j], cdf = 0.5f * (1.f + erff(a * 0.70710678f));
    y.v[j] = a * cdf;
    e.v[j] = h.v[j] * (cdf + a * 0.39894228f * expf(-0.5f * a * a));
  }
  store(dx + r * ldd + c, e);
  if (out) store(out + r * ldo + c, y);
}

// kind 0: max(x, 0); 1: tanh. Contiguous.
extern "C" __global__ void activate(const T* x, T* y, int n, int kind) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float a = as_float(x[i]);
  put(y + i, kind ? tanhf(a) : fmaxf(a, 0.f));
}

// g becomes the gradient of what led to y, which is contiguous.
extern "C" __global__ void activate_backward(const T* y, T* g, int ldg, int width, int rows,
                                             int kind) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  T* at = g + (size_t)(i / width) * ldg + i % width;
  float a = as_float(y[i]), h = as_float(*at);
  put(at, kind ? h * (1.f - a * a) : (a > 0.f ? h : 0.f));
}

// The sum of rows of one to three tables. positions and types may be null.
extern "C" __global__ void embed(const int* ids, const T* words, const int* positions, const T* places,
                             const int* types, const T* kinds, T* out, int ldo, int d, int rows) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8) {
    Eight e = load(words + (size_t)ids[r] * d + c);
    if (places) {
      Eight f = load(places + (size_t)positions[r] * d + c);
#pragma unroll
      for (int i = 0; i < 8; i++) e.v[i] += f.v[i];
    }
    if (kinds) {
      Eight f = load(kinds + (size_t)types[r] * d + c);
#pragma unroll
      for (int i = 0; i < 8; i++) e.v[i] += f.v[i];
    }
    store(out + (size_t)r * ldo + c, e);
  }
}

// For each distinct id a block: adds the gradients of its rows, order[starts[b]..starts[b + 1]].
extern "C" __global__ void embed_backward(const T* g, int ldg, const int* order, const int* starts,
                                      const int* ids, float* table, int d) {
  int first = starts[blockIdx.x], last = starts[blockIdx.x + 1];
  float* out = table + (size_t)ids[blockIdx.x] * d;
  for (int c = threadIdx.x; c < d; c += blockDim.x) {
    float sum = 0;
    for (int i = first; i < last; i++) sum += as_float(g[(size_t)order[i] * ldg + c]);
    out[c] += sum;
  }
}

// y[i] = x[rows[i]], or (back) y[rows[i]] = x[i].
extern "C" __global__ void pick(const T* x, int ldx, const int* index, T* y, int ldy, int d, int rows,
                            int back) {
  int r = blockIdx.x * blockDim.y + threadIdx.y;
  if (r >= rows) return;
  size_t from = back ? r : index[r], to = back ? index[r] : r;
  for (int c = threadIdx.x * 8; c < d; c += blockDim.x * 8)
    store(y + to * ldy + c, load(x + from * ldx + c));
}

// Columns of a matrix.
extern "C" __global__ void copy_columns(const T* x, int ldx, T* y, int ldy, int n, int rows) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, wide = n / 8;
  if (i >= rows * wide) return;
  size_t r = i / wide;
  int c = i % wide * 8;
  store(y + r * ldy + c, load(x + r * ldx + c));
}

static __device__ __forceinline__ float4 load4(const float* p) { return *(const float4*)p; }
static __device__ __forceinline__ float4 load4(const bf16* p) {
  uint2 u = *(const uint2*)p;
  return make_float4(__uint_as_float(u.x << 16), __uint_as_float(u.x & 0xffff0000u),
                     __uint_as_float(u.y << 16), __uint_as_float(u.y & 0xffff0000u));
}
static __device__ __forceinline__ void store4(float* p, float4 x) { *(float4*)p = x; }
static __device__ __forceinline__ void store4(bf16* p, float4 x) {
  union {
    __nv_bfloat162 h[2];
    uint2 u;
  } out;
  out.h[0] = __floats2bfloat162_rn(x.x, x.y);
  out.h[1] = __floats2bfloat162_rn(x.z, x.w);
  *(uint2*)p = out.u;
}

#include "loss.cuh"

static __device__ __forceinline__ uint4 philox(uint32_t k0, uint32_t k1, uint4 c) {
#pragma unroll
  for (int i = 0; i < 10; i++) {
    uint64_t p0 = 0xD2511F53ull * c.x, p1 = 0xCD9E8D57ull * c.z;
    c = make_uint4((uint32_t)(p1 >> 32) ^ c.y ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.w ^ k1,
                   (uint32_t)p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// y = mask * x, or (add) y += mask * x, over [rows, cols]. A thread draws one block of the
// generator, which serves the elements g*64 + {0, 16, 32, 48} + b of the matrix in row order; the
// threads of a warp then share what they drew, so that each has 4 elements side by side.
extern "C" __global__ void dropout(const T* x, int ldx, T* y, int ldy, int rows, int cols, uint32_t k0,
                               uint32_t k1, uint32_t h0, uint32_t h1, uint32_t threshold,
                               float scale, int add) {
  size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = (size_t)rows * cols, e = i * 4;
  uint4 u = philox(k0, k1, make_uint4((uint32_t)i, (uint32_t)(i >> 32), h0, h1));
  uint32_t words[4] = {u.x, u.y, u.z, u.w}, kept = 0;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    uint32_t all = __ballot_sync(~0u, words[j] >= threshold);
    if (lane / 4 % 4 == j) kept = all >> (lane / 16 * 16 + lane % 4 * 4);
  }
  if (e >= n) return;
  size_t r, c;
  if (n >> 32) {
    r = e / cols;
    c = e % cols;
  } else {
    r = (uint32_t)e / (uint32_t)cols;
    c = (uint32_t)e % (uint32_t)cols;
  }
  float4 v = load4(x + r * ldx + c);
  v = make_float4(kept & 1 ? v.x * scale : 0.f, kept & 2 ? v.y * scale : 0.f,
                  kept & 4 ? v.z * scale : 0.f, kept & 8 ? v.w * scale : 0.f);
  y += r * ldy + c;
  if (add) {
    float4 w = load4(y);
    v = make_float4(w.x + v.x, w.y + v.y, w.z + v.z, w.w + v.w);
  }
  store4(y, v);
}

// A few numbers as f32; y is [rows, n].
extern "C" __global__ void widen(const T* x, int ldx, float* y, int ldy, int n, int rows) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= rows * n) return;
  y[(size_t)(i / n) * ldy + i % n] = as_float(x[(size_t)(i / n) * ldx + i % n]);
}

#include "adapters.cuh"

// A matrix in 4-bit NormalFloat and where its numbers go.
struct Packed {
  const uint8_t* packed;
  const uint8_t* codes;  // of the scales; null: scales holds them as they are
  const float* scales;
  float offset;
  int rows, cols;
  int start;  // of the rows in the output
  int round;  // the numbers are rounded to 1: bf16, 2: f16 before they are stored
};

static __constant__ float NF4[16] = {
    -1.0f,        -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f,
    -0.091050036f, 0.0f,        0.0795803f,   0.1609302f,  0.2461123f,   0.33791524f,
    0.44070983f,  0.562617f,   0.72295684f,  1.0f};

// One part for each blockIdx.y, and the adapter beside it unless `adapters` is null. A thread unpacks
// 8 numbers at a time; it reads for a few such times at once, so that it waits for memory once.
extern "C" __global__ void nf4_dequantize(const Packed* parts, const Adapter* adapters,
                                          const float* map, T* out, int ld) {
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = NF4[threadIdx.x];
  __syncthreads();
  const int TIMES = 4;
  Packed p = parts[blockIdx.y];
  uint32_t wide = p.cols / 8, n = p.rows * wide, stride = gridDim.x * blockDim.x;
  uint32_t down = stride / wide, right = stride % wide;
  uint32_t i = blockIdx.x * blockDim.x + threadIdx.x, row = i / wide, col = i % wide;
  if (adapters) place(adapters[blockIdx.y], out, i, stride);
  out += (size_t)p.start * ld;
  for (; i < n; i += TIMES * stride) {
    uint32_t bytes[TIMES];
    float scale[TIMES];
#pragma unroll
    for (int k = 0; k < TIMES; k++) {
      uint32_t at = min(i + k * stride, n - 1), block = at / 8;
      bytes[k] = __ldg(reinterpret_cast<const uint32_t*>(p.packed) + at);
      scale[k] = p.codes ? __ldg(map + __ldg(p.codes + block)) * __ldg(p.scales + block / 256) + p.offset
                         : __ldg(p.scales + block);
    }
#pragma unroll
    for (int k = 0; k < TIMES; k++) {
      Eight e;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        e.v[2 * j] = values[(bytes[k] >> (8 * j + 4)) & 15] * scale[k];
        e.v[2 * j + 1] = values[(bytes[k] >> (8 * j)) & 15] * scale[k];
      }
      if (sizeof(T) == 4 && p.round) {
#pragma unroll
        for (int j = 0; j < 8; j++)
          e.v[j] = p.round == 1 ? __bfloat162float(__float2bfloat16_rn(e.v[j]))
                                : __half2float(__float2half_rn(e.v[j]));
      }
      if (i + k * stride < n) store(out + (size_t)row * ld + col * 8, e);
      row += down;
      col += right;
      if (col >= wide) {
        col -= wide;
        row++;
      }
    }
  }
}

// A trained matrix and its copy in the type of the arithmetic.
struct Copy {
  const float* from;  // contiguous
  void* to;
  int rows, cols, ld;
};

extern "C" __global__ void copy_trained(const Copy* parts) {
  Copy p = parts[blockIdx.y];
  size_t n = (size_t)p.rows * p.cols;
  for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    put((T*)p.to + i / p.cols * p.ld + i % p.cols, p.from[i]);
}

// A run of parameters: so many from there, with or without weight decay.
struct Chunk {
  long start;
  int len, decays;
};

// The sum of the squares of each run.
extern "C" __global__ void square_sums(const float* x, const Chunk* chunks, double* sums) {
  __shared__ double part[8];
  Chunk k = chunks[blockIdx.x];
  double sum = 0;
  for (int i = threadIdx.x; i < k.len; i += blockDim.x) {
    double v = x[k.start + i];
    sum += v * v;
  }
  for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int i = 0; i < blockDim.x / 32; i++) sum += part[i];
    sums[blockIdx.x] = sum;
  }
}

extern "C" __global__ void adamw(float* p, const float* g, float* mean, float* square,
                                 const Chunk* chunks, float b1, float b2, float c1, float c2,
                                 float epsilon, float step, float root, float keep, float scale) {
  Chunk k = chunks[blockIdx.x];
  float left = k.decays ? keep : 1.f;
  for (int i = threadIdx.x; i < k.len; i += blockDim.x) {
    long j = k.start + i;
    float h = g[j] * scale;
    float m = b1 * mean[j] + c1 * h, v = b2 * square[j] + c2 * h * h;
    mean[j] = m;
    square[j] = v;
    p[j] = p[j] * left - step * (m / (sqrtf(v) / root + epsilon));
  }
}

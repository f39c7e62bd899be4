// Kernels over the heads of queries and keys: rotary embedding, and norms of heads. A part of
// kernels.cu.
#pragma once

// Turns vectors whose halves a and b are, 8 elements of each; sign -1 turns back.
static __device__ __forceinline__ void turn(Eight& a, Eight& b, const float* cosines,
                                            const float* sines, size_t at, float sign) {
  Eight cs = load(cosines + at), sn = load(sines + at);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    float s = sign * sn.v[j], e = a.v[j];
    a.v[j] = e * cs.v[j] - b.v[j] * s;
    b.v[j] = b.v[j] * cs.v[j] + e * s;
  }
}

// Rotates `heads` heads of every row in place, in the half-split form; sign -1 turns back.
extern "C" __global__ void rope(T* x, int ldx, const int* positions, const float* cosines,
                            const float* sines, int heads, int head, int rows, float sign) {
  int half = head / 2, per_head = half / 8;
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (long)rows * heads * per_head) return;
  int c = (int)(i % per_head) * 8;
  int h = (int)(i / per_head % heads);
  int r = (int)(i / per_head / heads);
  T* p = x + (size_t)r * ldx + (size_t)h * head + c;
  Eight a = load(p), b = load(p + half);
  turn(a, b, cosines, sines, (size_t)positions[r] * half + c, sign);
  store(p, a);
  store(p + half, b);
}

// Where a thread works of rows of `heads` query heads and then `kv_heads` key heads: `lanes`
// threads, a power of two, for each head.
struct Place {
  int row, head, c;
  bool in;    // whether it has elements
  bool query;
};

static __device__ __forceinline__ Place place(int heads, int kv_heads, int half, int rows,
                                              int lanes) {
  long i = (long)blockIdx.x * blockDim.x + threadIdx.x, n = i / lanes;
  int all = heads + kv_heads, h = (int)(n % all), c = (int)(i % lanes) * 8;
  return {(int)(n / all), h, c, n / all < rows && c < half, h < heads};
}

static __device__ __forceinline__ float lanes_sum(float x, int lanes) {
  for (int o = lanes / 2; o > 0; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// Of the statistics of all query heads or all key heads those of one.
static __device__ __forceinline__ float* of_head(float* query, float* key, const Place& p,
                                                 int heads, int kv_heads) {
  return p.query ? query + (size_t)p.row * heads + p.head
                 : key + (size_t)p.row * kv_heads + p.head - heads;
}

// The root-mean-square norm of each head, then the rotary embedding (if there are cosines).
extern "C" __global__ void norm_heads(const T* x, int ldx, const float* wq, const float* wk, T* out,
                                      int ldo, float* rq, float* rk, const int* positions,
                                      const float* cosines, const float* sines, int heads,
                                      int kv_heads, int head, int rows, int lanes, float eps) {
  int half = head / 2;
  Place p = place(heads, kv_heads, half, rows, lanes);
  Eight a = {}, b = {};
  if (p.in) {
    x += (size_t)p.row * ldx + (size_t)p.head * head + p.c;
    a = load(x), b = load(x + half);
  }
  float square = 0;
#pragma unroll
  for (int j = 0; j < 8; j++) square += a.v[j] * a.v[j] + b.v[j] * b.v[j];
  float inverse = rsqrtf(lanes_sum(square, lanes) / head + eps);
  if (!p.in) return;
  if (p.c == 0) *of_head(rq, rk, p, heads, kv_heads) = inverse;
  const float* w = (p.query ? wq : wk) + p.c;
  Eight u = load(w), v = load(w + half);
#pragma unroll
  for (int j = 0; j < 8; j++) {
    a.v[j] *= inverse * u.v[j];
    b.v[j] *= inverse * v.v[j];
  }
  if (cosines) turn(a, b, cosines, sines, (size_t)positions[p.row] * half + p.c, 1.f);
  out += (size_t)p.row * ldo + (size_t)p.head * head + p.c;
  store(out, a);
  store(out + half, b);
}

// From the gradient d of what norm_heads gives that of x, in place. Without cosines d is that of
// the norm's result.
extern "C" __global__ void norm_heads_backward(const T* x, int ldx, const float* wq,
                                               const float* wk, float* rq, float* rk, T* d,
                                               int ldd, const int* positions,
                                               const float* cosines, const float* sines, int heads,
                                               int kv_heads, int head, int rows, int lanes) {
  int half = head / 2;
  Place p = place(heads, kv_heads, half, rows, lanes);
  Eight a = {}, b = {}, g = {}, h = {};
  float dot = 0;
  if (p.in) {
    x += (size_t)p.row * ldx + (size_t)p.head * head + p.c;
    d += (size_t)p.row * ldd + (size_t)p.head * head + p.c;
    a = load(x), b = load(x + half), g = load(d), h = load(d + half);
    if (cosines) turn(g, h, cosines, sines, (size_t)positions[p.row] * half + p.c, -1.f);
    const float* w = (p.query ? wq : wk) + p.c;
    Eight u = load(w), v = load(w + half);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      g.v[j] *= u.v[j];
      h.v[j] *= v.v[j];
      dot += g.v[j] * a.v[j] + h.v[j] * b.v[j];
    }
  }
  dot = lanes_sum(dot, lanes);
  if (!p.in) return;
  float inverse = *of_head(rq, rk, p, heads, kv_heads);
  float mean = dot * inverse * inverse / head;
#pragma unroll
  for (int j = 0; j < 8; j++) {
    g.v[j] = inverse * (g.v[j] - a.v[j] * mean);
    h.v[j] = inverse * (h.v[j] - b.v[j] * mean);
  }
  store(d, g);
  store(d + half, h);
}

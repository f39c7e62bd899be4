// The loss. A part of kernels.cu.
#pragma once

static __device__ __forceinline__ float power(float x) { return exp2f(1.4426950408889634f * x); }

// loss[r] = -log softmax(logits[r])[target]; grads (may be null) = its gradient times scale. The
// rows of grads may begin where those of the logits do: what is written was read before.
extern "C" __global__ void cross_entropy(const float* logits, int ldl, const int* targets,
                                     float* loss, T* grads, int ldg, int n, float scale) {
  int r = blockIdx.x, step = blockDim.x * 4, target = targets[r];
  logits += (size_t)r * ldl;
  int whole = ldl % 4 ? 0 : n & ~3;
  float wanted = logits[target], top = -INFINITY, sum = 0;
  for (int c = threadIdx.x * 4; c < whole; c += step) {
    float4 x = load4(logits + c);
    float m = fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
    if (m > top) {
      sum *= power(top - m);
      top = m;
    }
    sum += power(x.x - top) + power(x.y - top) + power(x.z - top) + power(x.w - top);
  }
  for (int c = whole + threadIdx.x; c < n; c += blockDim.x) {
    float x = logits[c];
    if (x > top) {
      sum *= power(top - x);
      top = x;
    }
    sum += power(x - top);
  }
  float all = row_max(top);
  sum = row_sum(top == -INFINITY ? 0.f : sum * power(top - all));
  float log_sum = all + logf(sum);
  if (threadIdx.x == 0) loss[r] = log_sum - wanted;
  if (!grads) return;
  grads += (size_t)r * ldg;
  auto gradient = [&](float x, int c) {
    return scale * (power(x - log_sum) - (c == target ? 1.f : 0.f));
  };
  for (int from = 0; from < whole; from += step) {
    int c = from + threadIdx.x * 4;
    bool in = c < whole;
    float4 x = in ? load4(logits + c) : make_float4(0, 0, 0, 0);
    __syncthreads();
    if (in)
      store4(grads + c, make_float4(gradient(x.x, c), gradient(x.y, c + 1), gradient(x.z, c + 2),
                                    gradient(x.w, c + 3)));
  }
  for (int c = whole + threadIdx.x; c < n; c += blockDim.x)
    put(grads + c, gradient(logits[c], c));
}

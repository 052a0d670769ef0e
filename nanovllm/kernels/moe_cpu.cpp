// The CPU's kernels of a mixture of experts: routing, sorting by expert, and the weighted sum.
//
// The result of a token depends on that token alone. The grouped products stand with the
// other products, in cpu.cpp and blocks.cpp.

#include "vectors.h"

namespace {

// logits [tokens, experts] -> the `top_k` most likely experts of each token, the likeliest
// first. The lowest id wins a tie. The softmax is over all experts.
template <class T>
void route(const T* logits, int64_t stride, float* weights, int32_t* ids, int64_t tokens, int64_t experts, int64_t top_k,
           int64_t renormalise) {
#pragma omp parallel for schedule(static) if (tokens * experts * top_k > PARALLEL)
  for (int64_t t = 0; t < tokens; t++) {
    const std::unique_ptr<float[]> probs(new float[experts + W]);
    Vec tops = Vec{} - INFINITY, sums = {};
    for (int64_t e = 0; e < experts; e += W) {
      Vec x = load(logits + t * stride + e, experts - e);
      if (experts - e < W) x = lanes() < int(experts - e) ? x : Vec{} - INFINITY;
      store(&probs[e], x);
      tops = max(tops, x);
    }
    const float top = max(tops);
    for (int64_t e = 0; e < experts; e += W) {
      const Vec p = exp2((load(&probs[e]) - top) * LOG2E);
      store(&probs[e], p);
      sums += p;
    }
    float chosen = 0;
    const float all = sum(sums);
    for (int64_t k = 0; k < top_k; k++) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; e++)
        if (probs[e] >= 0 && (best < 0 || probs[e] > probs[best])) best = e;
      if (best < 0) best = 0;  // of NaN
      ids[t * top_k + k] = best;
      weights[t * top_k + k] = probs[best] / all;
      chosen += weights[t * top_k + k];
      probs[best] = -1;
    }
    if (renormalise)
      for (int64_t k = 0; k < top_k; k++) weights[t * top_k + k] /= chosen;
  }
}

// Sorts the routes by expert: a counting sort, which keeps the order of an expert's routes.
// Experts outside first .. first + count - 1 come last.
void group(const int32_t* experts, int32_t* tokens, int32_t* rows, int32_t* offsets, int64_t routes, int64_t top_k,
           int64_t first, int64_t count) {
  const auto local = [&](int64_t route) {
    const int64_t e = experts[route] - first;
    return e >= 0 && e < count ? e : count;
  };
  std::vector<int32_t> next(count + 2);
  for (int64_t r = 0; r < routes; r++) next[local(r) + 1]++;
  for (int64_t e = 0; e <= count; e++) {
    next[e + 1] += next[e];
    offsets[e] = next[e];
  }
  for (int64_t r = 0; r < routes; r++) {
    const int32_t row = next[local(r)]++;
    rows[r] = row;
    tokens[row] = r / top_k;
  }
}

template <class T> void gather(const T* x, int64_t stride, const int32_t* tokens, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++) std::copy_n(x + tokens[r] * stride, size, out + r * size);
}

// The weighted sum of the `top_k` rows of each token, in the order of its routes.
template <class T>
void combine(const T* y, const int32_t* rows, const float* weights, T* out, int64_t tokens, int64_t top_k, int64_t size) {
#pragma omp parallel for schedule(static) if (tokens * top_k * size > PARALLEL)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t d = 0; d < size; d += W) {
      Vec total = {};
      for (int64_t k = t * top_k; k < (t + 1) * top_k; k++)
        total = multiply_add(load(y + rows[k] * size + d, size - d), weights[k] - Vec{}, total);
      store(out + t * size + d, total, size - d);
    }
}

// out += sigmoid(gate) * x, with one gate a token.
template <class T> void add_gated(T* out, const T* x, const T* gate, int64_t tokens, int64_t size) {
#pragma omp parallel for schedule(static) if (tokens * size > PARALLEL)
  for (int64_t t = 0; t < tokens; t++) {
    const float share = 1 / (1 + std::exp(-load(gate + t, 1)[0]));
    for (int64_t d = t * size; d < (t + 1) * size; d += W) {
      const int64_t here = (t + 1) * size - d;
      store(out + d, multiply_add(load(x + d, here), share - Vec{}, load(out + d, here)), here);
    }
  }
}

// gate * sigmoid(alpha * gate) * (up + 1), where `limit` bounds the gate from above and up from
// both sides. The gates of a row come first.
template <class T>
void clamped_swiglu(const T* x, int64_t stride, float alpha, float limit, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > PARALLEL)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < size; i += W) {
      const T* gates = x + r * stride + i;
      Vec gate = load(gates, size - i), up = load(gates + size, size - i);
      gate = gate > limit ? Vec{} + limit : gate;
      up = up > limit ? Vec{} + limit : up < -limit ? Vec{} - limit : up;
      const Vec z = alpha * gate, e = exp2((z > 0 ? -z : z) * LOG2E);  // of -|z|, which cannot overflow
      store(out + r * size + i, gate * ((z > 0 ? Vec{} + 1.f : e) / (1.f + e)) * (up + 1.f), size - i);
    }
}

}  // namespace

#define EXPORT(T)                                                               \
  extern "C" void route_##T(const Arg* args) { apply(route<T>, args); }         \
  extern "C" void gather_##T(const Arg* args) { apply(gather<T>, args); }       \
  extern "C" void combine_##T(const Arg* args) { apply(combine<T>, args); }     \
  extern "C" void add_gated_##T(const Arg* args) { apply(add_gated<T>, args); } \
  extern "C" void clamped_swiglu_##T(const Arg* args) { apply(clamped_swiglu<T>, args); }
EXPORT(bf16)
EXPORT(fp16)
EXPORT(fp32)
extern "C" void group_by_expert(const Arg* args) { apply(group, args); }

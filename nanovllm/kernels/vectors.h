// Vectors, types and tiles of the CPU's kernels. Every C++ source of this folder includes it.
//
// Vectors are the compiler's own, as wide as the machine's. Intrinsics stand only for
// operations without a portable spelling: dot products, conversions of halves, sums across
// a vector.

#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

// ------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t Ints __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
using fp32 = float;

// Any type at any address. It is no memcpy, because gcc 12 copies AVX2 vectors of a
// memcpy through the stack.
template <class V> struct __attribute__((packed, may_alias)) Unaligned { V value; };
template <class V> INLINE V read(const void* p) { return ((const Unaligned<V>*)p)->value; }
template <class V> INLINE void put(void* p, V v) { ((Unaligned<V>*)p)->value = v; }

INLINE Vec load(const float* p) { return read<Vec>(p); }
INLINE void store(float* p, Vec v) { put(p, v); }

INLINE Vec load(const bf16* p) { return (Vec)(__builtin_convertvector(read<Halves>(p), Bits) << 16); }
INLINE void store(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  put(p, _mm512_cvtneps_pbh((__m512)v));
#else
  Bits u = (Bits)v;
  u = v == v ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;  // to nearest, ties to even; NaN stays NaN
  put(p, __builtin_convertvector(u >> 16, Halves));
#endif
}

#if defined(__AVX512F__)
INLINE Vec load(const fp16* p) { return (Vec)_mm512_cvtph_ps(read<__m256i>(p)); }
INLINE void store(fp16* p, Vec v) { put(p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__AVX__) && defined(__F16C__)
INLINE Vec load(const fp16* p) { return (Vec)_mm256_cvtph_ps(read<__m128i>(p)); }
INLINE void store(fp16* p, Vec v) { put(p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
typedef _Float16 Float16s __attribute__((vector_size(2 * W)));
INLINE Vec load(const fp16* p) { return __builtin_convertvector(read<Float16s>(p), Vec); }
INLINE void store(fp16* p, Vec v) { put(p, __builtin_convertvector(v, Float16s)); }
#endif

// The first min(n, W) elements. The other elements read as 0.
template <class T> INLINE Vec load(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T rest[W] = {};
  std::copy(p, p + n, rest);
  return load(rest);
}
template <class T> INLINE void store(T* p, Vec v, int64_t n) {
  if (n >= W) return store(p, v);
  T rest[W];
  store(rest, v);
  std::copy(rest, rest + n, p);
}
template <class T> INLINE Vec rounded(Vec v) {  // to T's precision
  T t[W];
  store(t, v);
  return load(t);
}

INLINE Ints lanes() {
  Ints v;
  for (int i = 0; i < W; i++) v[i] = i;
  return v;
}
INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#if defined(__AVX512F__)
INLINE float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float max(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE float sum(Vec v) {
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] += v[i + n];
  return v[0];
}
INLINE float max(Vec v) {
  for (int n = W / 2; n; n /= 2)
    for (int i = 0; i < n; i++) v[i] = std::max(v[i], v[i + n]);
  return v[0];
}
#endif

// 2^x for x <= 0, and exactly 0 below 2^-126. 2^round(x) is set in the bits of the
// exponent; a polynomial computes the rest (relative error 8e-8).
INLINE Vec exp2(Vec x) {
  const Vec shifted = x + 12582912.f;  // 1.5 * 2^23: the sum has round(x) in its low bits
  const Vec r = x - (shifted - 12582912.f);
  Vec y = 0.00132764671f * r + 0.00967554124f;
  y = ((y * r + 0.0555071329f) * r + 0.240221197f) * r;
  y = (y + 0.693146967f) * r + 1.f;
  return x > -126.f ? (Vec)((Bits)y + ((Bits)shifted << 23)) : Vec{};
}
constexpr float LOG2E = 1.44269504f;

// sum + a * b, rounded once wherever the machine can. It is explicit, because compilers
// choose between one and two roundings loop by loop. The result of a row would then
// depend on the number of rows.
INLINE Vec multiply_add(Vec a, Vec b, Vec sum) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;
#endif
}

// One step of a dot product: P neighbouring elements of each operand are added to each of
// W float32 sums.
template <class T> struct Dot {
  static constexpr int P = 1;
  using Element = float;  // of an operand that is broadcast
  using In = Vec;
  static INLINE In load_in(const T* p) { return load(p); }
  // x - 0 is x for every x, so this is one broadcast. x + 0 would be an addition, because
  // of -0.
  static INLINE In splat(const Element* p) { return *p - Vec{}; }
  static INLINE In first_of_pair(In v) { return v; }
  static INLINE Vec step(Vec sum, In a, In b) { return multiply_add(a, b, sum); }
};
#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {
  static constexpr int P = 2;
  using Element = bf16;
  using In = __m512bh;
  static INLINE In load_in(const bf16* p) { return read<In>(p); }
  static INLINE In splat(const bf16* p) { return (In)_mm512_set1_epi32(read<int32_t>(p)); }
  static INLINE In first_of_pair(In v) { return (In)((Bits)v & 0xffff); }
  static INLINE Vec step(Vec sum, In a, In b) { return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#endif
template <class T> using Element = typename Dot<T>::Element;

// sums[i][j] += a(i) * b(j), with the sums in registers.
template <class T, int M, int N, class A, class B> INLINE void multiply(Vec (&sums)[M][N], A a, B b) {
  typename Dot<T>::In v[N];
  UNROLL for (int j = 0; j < N; j++) v[j] = b(j);
  UNROLL for (int i = 0; i < M; i++) {
    const typename Dot<T>::In u = a(i);
    UNROLL for (int j = 0; j < N; j++) sums[i][j] = Dot<T>::step(sums[i][j], u, v[j]);
  }
}

// Calls f(first row, number of rows as a type) for one block of at most MOST rows. Blocks
// have almost equal numbers of rows. The number is a type, because sums stay in registers
// only if the compiler knows it.
template <int M, class F> INLINE void with_rows(int m, F f) {
  if (m == M) f(std::integral_constant<int, M>());
  else if constexpr (M > 1) with_rows<M - 1>(m, f);
}
template <int MOST, class F> INLINE void for_block(int64_t rows, int64_t block, F f) {
  const int64_t blocks = (rows + MOST - 1) / MOST, first = rows * block / blocks;
  with_rows<MOST>(rows * (block + 1) / blocks - first, [&](auto m) { f(first, m); });
}
template <int MOST, class F> INLINE void for_rows(int64_t rows, F f) {
  for (int64_t block = 0; block * MOST < rows; block++) for_block<MOST>(rows, block, f);
}
// The same for vectors, four at a time and then one.
template <class F> INLINE void for_vectors(int n, F f) {
  int j = 0;
  for (; j + 4 <= n; j += 4) f(j, std::integral_constant<int, 4>());
  for (; j < n; j++) f(j, std::integral_constant<int, 1>());
}

// Calls f(group, first panel, last panel) for this thread's share of the panels of all groups
// with rows. Every group has `panels` of them. The shares are of about equal work: a panel is
// read once, and multiplied by the rows of its group. Shares are consecutive, because memory
// is fast where it is read in order.
template <class F> INLINE void for_share(const int32_t* offsets, int64_t groups, int64_t panels, F f) {
  constexpr int64_t READ = 8;  // rows whose products take as long as reading a panel
  const auto work = [&](int64_t g) {
    const int64_t rows = offsets[g + 1] - offsets[g];
    return rows ? std::max(READ, rows) : 0;
  };
  int64_t total = 0, before = 0;
  for (int64_t g = 0; g < groups; g++) total += work(g) * panels;
  const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const int64_t begin = total * thread / threads, end = total * (thread + 1) / threads;
  for (int64_t g = 0; g < groups; before += work(g++) * panels) {
    if (!work(g)) continue;
    // Panels whose work begins in begin .. end - 1.
    const auto panel = [&](int64_t at) {
      return std::clamp<int64_t>(at > before ? (at - before + work(g) - 1) / work(g) : 0, 0, panels);
    };
    if (panel(begin) < panel(end)) f(g, panel(begin), panel(end));
  }
}

// Bytes between a weight that is used and one that is fetched into the cache, so that memory
// answers in time. The hardware alone stops at the end of every page (docs/experiments.md).
constexpr int64_t AHEAD = 1 << 15;

// With fewer elements, waking the other threads takes longer than the work.
constexpr int64_t PARALLEL = 1 << 15;

// --------------------------------------------------------------------------------- calls

// The form in which Python calls a kernel, at once or in a recorded program: the
// arguments of the kernel's function, eight bytes each.
union Arg {
  int64_t integer;
  const void* address;
  double number;
};
struct Call {
  void (*kernel)(const Arg*);
  Arg args[CALL_ARGS];
};

template <class A> INLINE A value(const Arg& arg) {
  if constexpr (std::is_reference_v<A>) return *(std::remove_reference_t<A>*)arg.address;
  else if constexpr (std::is_pointer_v<A>) return (A)arg.address;
  else if constexpr (std::is_floating_point_v<A>) return (A)arg.number;
  else return (A)arg.integer;
}
template <class... A, size_t... I>
INLINE void apply(void (*kernel)(A...), const Arg* args, std::index_sequence<I...>) {
  static_assert(sizeof...(A) <= CALL_ARGS);
  kernel(value<A>(args[I])...);
}
template <class... A> INLINE void apply(void (*kernel)(A...), const Arg* args) {
  apply(kernel, args, std::index_sequence_for<A...>());
}

}  // namespace

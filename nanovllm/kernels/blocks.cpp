// Products with matrices in the block formats of GGUF files.
//
// A weight is scale * code + bias. Codes have 2 to 8 bits, and the weights of a group share
// scale and bias. The inputs of a product are rounded to 16 bits, GROUP neighbours with one
// scale. A product is then a sum of integer products, one a group. The result of a row of
// inputs depends on that row alone: groups are added in one order for every number of rows
// and threads.
//
// A panel holds W output features: first the codes of the whole depth, then the scales. A
// vector of codes has two neighbours in depth of each feature.

#include "gguf_formats.h"
#include "vectors.h"

namespace {

typedef uint16_t Codes __attribute__((vector_size(4 * W)));  // [W][2 neighbours]
typedef int8_t Bytes __attribute__((vector_size(W)));        // one of each feature
typedef int16_t Words __attribute__((vector_size(2 * W)));
constexpr int GROUP = 32;               // inputs with one scale
constexpr int STEPS = GROUP / 2;        // vectors of codes of a group
constexpr int64_t VECTOR = 4 * W;       // bytes
constexpr int ROWS = W == 16 ? 12 : 4;  // of inputs whose sums stay in registers

// In two steps, because gcc 12 converts element by element from 8 bits to 32.
INLINE Ints widen(Bytes v) { return __builtin_convertvector(__builtin_convertvector(v, Words), Ints); }

// ------------------------------------------------------------------------------- formats

// Bytes of a block of W features in a panel.
template <class F> constexpr int64_t code_bytes() { return F::BLOCK / GROUP * (F::LOW + F::HIGH) * VECTOR; }
template <class F> constexpr int64_t bytes_of_group() {
  return F::SCALES == Scales::NONE ? 0 : F::SCALES == Scales::BOTH ? 2 : 1;
}
template <class F> constexpr int64_t scale_bytes() {
  return (2 * F::HALVES + F::BLOCK / F::GROUP * bytes_of_group<F>()) * W;
}
template <class F> int64_t panel_bytes(int64_t depth) {
  const int64_t bytes = depth / F::BLOCK * (code_bytes<F>() + scale_bytes<F>());
  return (bytes + VECTOR - 1) / VECTOR * VECTOR;
}

template <int shift> INLINE Codes shifted(Codes v) {  // to the right; the caller masks foreign bits
  if constexpr (shift >= 0) return v >> shift;
  else return v << -shift;
}

// The table has 16 values. Codes stand for value + zero.
INLINE Codes look_up(const int8_t* table, int zero, Codes codes) {
  uint8_t values[16];
  for (int i = 0; i < 16; i++) values[i] = table[i] + zero;
#if defined(__AVX512BW__)
  const __m512i bytes = (__m512i)(codes | 0x8000);  // the upper byte becomes 0
  return (Codes)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(read<__m128i>(values)), bytes);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i bytes = (__m256i)(codes | 0x8000);
  return (Codes)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(read<__m128i>(values)), bytes);
#else
  for (int i = 0; i < 2 * W; i++) codes[i] = values[codes[i]];
  return codes;
#endif
}

// Vector `I` of the codes of a group of inputs: 2 I and 2 I + 1 in depth.
template <class F, int I> INLINE Codes code(const uint8_t* planes) {
  constexpr uint16_t low_mask = (1 << F::LOW) - 1, high_mask = ((1 << F::HIGH) - 1) << F::LOW;
  Codes v = shifted<I / F::LOW * F::LOW>(read<Codes>(planes + I % F::LOW * VECTOR));
  if constexpr (I / F::LOW * F::LOW + F::LOW < 16) v &= low_mask;
  if constexpr (F::HIGH > 0) {
    const Codes high = read<Codes>(planes + (F::LOW + I % F::HIGH) * VECTOR);
    v |= shifted<I / F::HIGH * F::HIGH - F::LOW>(high) & high_mask;
  }
  if constexpr (F::TABLE::ANY) v = look_up(F::TABLE::VALUES, F::ZERO, v);
  return v;
}
// The same numbers into planes.
template <class F> void write_planes(const Codes* codes, uint8_t* planes) {
  Codes low[F::LOW] = {}, high[F::HIGH + 1] = {};
  for (int i = 0; i < STEPS; i++) {
    low[i % F::LOW] |= (codes[i] & (uint16_t)((1 << F::LOW) - 1)) << (i / F::LOW * F::LOW);
    if constexpr (F::HIGH > 0) high[i % F::HIGH] |= codes[i] >> F::LOW << (i / F::HIGH * F::HIGH);
  }
  for (int i = 0; i < F::LOW; i++) put(planes + i * VECTOR, low[i]);
  for (int i = 0; i < F::HIGH; i++) put(planes + (F::LOW + i) * VECTOR, high[i]);
}

// Scale and bias of a group, one of each feature. `block`: the scales of a block in a panel.
struct Linear {
  Vec scale, bias;
};
template <class F> INLINE Linear scales(const uint8_t* block, int group) {
  const uint8_t* bytes = block + 2 * F::HALVES * W + group * bytes_of_group<F>() * W;
  if constexpr (F::SCALES == Scales::EXPONENT) {
    const Bits e = (Bits)widen(read<Bytes>(bytes)) & 255;
    const Vec scale = (Vec)(e < 2 ? (Bits{} + 0x200000) << (e & 1) : (e - 1) << 23);  // below 2 not normal
    return {scale, scale * -float(F::ZERO)};
  } else {
    Vec scale = load((const fp16*)block), bias = {};
    if constexpr (F::HALVES == 2) bias = load((const fp16*)(block + 2 * W));
    if constexpr (F::SCALES != Scales::NONE) {
      const Ints s = widen(read<Bytes>(bytes));
      if constexpr (F::SCALES == Scales::NIBBLES) {
        scale *= __builtin_convertvector(s & 15, Vec);
        bias *= -__builtin_convertvector(s >> 4 & 15, Vec);
      } else {
        scale *= __builtin_convertvector(s, Vec);
      }
      if constexpr (F::SCALES == Scales::BOTH)
        bias *= -__builtin_convertvector(widen(read<Bytes>(bytes + W)), Vec);
    }
    if constexpr (F::HALVES == 1) bias = scale * -float(F::ZERO);
    return {scale, bias};
  }
}
template <class F> constexpr bool has_bias() { return F::HALVES == 2 || F::ZERO != 0; }

// ---------------------------------------------------------------------------- dot products

// sum += products of two neighbours, for each feature. `pair`: two inputs.
INLINE Ints add_pairs(Ints sum, Codes codes, const int32_t* pair) {
#if defined(__AVX512VNNI__)
  // Not an intrinsic, because gcc 12 does not let the instruction broadcast.
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*pair));
  return sum;
#else
  const Codes x = (Codes)(*pair - Ints{});
#if defined(__AVX512BW__)
  return sum + (Ints)_mm512_madd_epi16((__m512i)codes, (__m512i)x);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (Ints)_mm256_madd_epi16((__m256i)codes, (__m256i)x);
#else
  return sum + ((Ints)codes << 16 >> 16) * ((Ints)x << 16 >> 16) + ((Ints)codes >> 16) * ((Ints)x >> 16);
#endif
#endif
}

// A block of at most ROWS rows of inputs, rounded to 16 bits. The rows lie side by side, so
// that a product reads them in order.
struct Inputs {
  int32_t* codes;  // [depth / 2][rows] two neighbours each
  float* scales;   // [depth / GROUP][rows]
  float* sums;     // [depth / GROUP][3][rows] of the rounded inputs: first half, second half, both
  float* floats;   // [depth][rows] not rounded, for matrices of floats
};

template <int N, int I = 0, class F> INLINE void for_steps(F f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    for_steps<N, I + 1>(f);
  }
}

// acc[m] += scale * (codes . inputs) + bias * (sum of inputs), over one group of inputs.
// code(half, i) gives a vector of codes, linear(half) the Linear of a half. HALVES: 1 where
// the weights of the whole group share it.
template <int HALVES, bool BIAS, int M, class C, class L>
INLINE void add_group(Vec (&acc)[M], const Inputs& x, int64_t group, C code, L linear) {
  constexpr int N = STEPS / HALVES;
  const int32_t* pairs = x.codes + group * STEPS * M;
  const float* scales = x.scales + group * M;
  for_steps<HALVES>([&](auto half) {
    Ints total[M] = {};
    for_steps<N>([&](auto i) {
      constexpr int step = half() * N + i();
      const Codes c = code(half, i);
      UNROLL for (int m = 0; m < M; m++) total[m] = add_pairs(total[m], c, pairs + step * M + m);
    });
    const Linear to = linear(half);
    const float* sums = x.sums + (group * 3 + (HALVES == 2 ? half() : 2)) * M;
    UNROLL for (int m = 0; m < M; m++) {
      const Vec product = __builtin_convertvector(total[m], Vec) * to.scale;
      acc[m] = multiply_add(product, scales[m] - Vec{}, acc[m]);
      if constexpr (BIAS) acc[m] = multiply_add(to.bias, sums[m] - Vec{}, acc[m]);
    }
  });
}

// ------------------------------------------------------------------------------ the panel

// Fetches the codes of a later group into the cache.
template <class F> INLINE void fetch(const uint8_t* planes) {
  constexpr int64_t LINE = 64;
  for (int64_t i = 0; i < (F::LOW + F::HIGH) * VECTOR; i += LINE) __builtin_prefetch(planes + AHEAD + i, 0, 2);
}

template <int M> INLINE void write_sums(const Vec (&acc)[M], float* out) {
  for (int m = 0; m < M; m++) store(out + m * W, acc[m]);
}

// M rows of inputs times a panel -> out [M][W]. The codes are taken apart in registers.
template <class F, int M>
__attribute__((noinline)) void times_panel(const uint8_t* panel, const Inputs& x, int64_t depth, float* out) {
  constexpr int HALVES = GROUP / F::GROUP;
  const uint8_t *planes = panel, *block = panel + depth / F::BLOCK * code_bytes<F>();
  Vec acc[M] = {};
  for (int64_t first = 0; first < depth; first += F::BLOCK, block += scale_bytes<F>())
    for (int g = 0; g < F::BLOCK / GROUP; g++, planes += (F::LOW + F::HIGH) * VECTOR) {
      fetch<F>(planes);
      add_group<HALVES, has_bias<F>()>(
          acc, x, first / GROUP + g,
          [&](auto half, auto i) { return code<F, half() * STEPS / HALVES + i()>(planes); },
          [&](int half) { return scales<F>(block, g * HALVES + half); });
    }
  write_sums(acc, out);
}

// A panel, taken apart once for many rows.
struct Unpacked {
  Codes* codes;    // [depth / GROUP][STEPS]
  float* linear;   // [depth / GROUP][HALVES][scale, bias][W]
};
constexpr int64_t unpacked_bytes(int64_t depth) { return depth / GROUP * (STEPS * VECTOR + 2 * 2 * W * sizeof(float)); }
template <class F> void unpack(const uint8_t* panel, int64_t depth, const Unpacked& to) {
  constexpr int HALVES = GROUP / F::GROUP;
  const uint8_t *planes = panel, *block = panel + depth / F::BLOCK * code_bytes<F>();
  int64_t group = 0;
  for (int64_t first = 0; first < depth; first += F::BLOCK, block += scale_bytes<F>())
    for (int g = 0; g < F::BLOCK / GROUP; g++, group++, planes += (F::LOW + F::HIGH) * VECTOR) {
      fetch<F>(planes);
      for_steps<STEPS>([&](auto i) { to.codes[group * STEPS + i()] = code<F, i()>(planes); });
      for (int half = 0; half < HALVES; half++) {
        const Linear linear = scales<F>(block, g * HALVES + half);
        float* at = to.linear + (group * HALVES + half) * 2 * W;
        store(at, linear.scale);
        store(at + W, linear.bias);
      }
    }
}
template <int HALVES, bool BIAS, int M>
__attribute__((noinline)) void times_unpacked(const Unpacked& panel, const Inputs& x, int64_t depth, float* out) {
  Vec acc[M] = {};
  for (int64_t group = 0; group < depth / GROUP; group++)
    add_group<HALVES, BIAS>(
        acc, x, group, [&](auto half, auto i) { return panel.codes[group * STEPS + half() * STEPS / HALVES + i()]; },
        [&](int half) {
          const float* at = panel.linear + (group * HALVES + half) * 2 * W;
          return Linear{load(at), load(at + W)};
        });
  write_sums(acc, out);
}

// M rows of inputs times a panel of floats [depth][W].
template <class B, int M>
__attribute__((noinline)) void times_floats(const uint8_t* panel, const Inputs& x, int64_t depth, float* out) {
  Vec acc[M] = {};
  for (int64_t d = 0; d < depth; d++) {
    const Vec w = load((const B*)panel + d * W);
    UNROLL for (int m = 0; m < M; m++) acc[m] = multiply_add(w, x.floats[d * M + m] - Vec{}, acc[m]);
  }
  write_sums(acc, out);
}

// -------------------------------------------------------------------- into and out of panels

// Puts rows of a file into panels. `row_order`: the row of the file for each feature.
template <class F>
void pack(const uint8_t* rows, int64_t stride, const int64_t* row_order, int64_t features, int64_t depth,
          uint8_t* out) {
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < (features + W - 1) / W; panel++) {
    uint8_t *planes = out + panel * panel_bytes<F>(depth), *block = planes + depth / F::BLOCK * code_bytes<F>();
    for (int64_t b = 0; b < depth / F::BLOCK; b++, block += scale_bytes<F>()) {
      alignas(64) uint16_t codes[F::BLOCK / 2][W][2];
      std::memset(codes, 0, sizeof(codes));
      std::memset(block, 0, scale_bytes<F>());
      for (int lane = 0; lane < W && panel * W + lane < features; lane++) {
        Fields fields;
        F::decode(rows + row_order[panel * W + lane] * stride + b * F::BYTES, fields);
        for (int i = 0; i < F::BLOCK; i++) codes[i / 2][lane][i % 2] = fields.codes[i];
        uint8_t* to = block;
        for (int i = 0; i < F::HALVES; i++, to += 2 * W) std::memcpy(to + 2 * lane, fields.halves + i, 2);
        for (int g = 0; g < F::BLOCK / F::GROUP; g++) {
          if constexpr (F::SCALES != Scales::NONE) to[lane] = fields.scales[g];
          if constexpr (F::SCALES == Scales::BOTH) to[W + lane] = fields.biases[g];
          to += bytes_of_group<F>() * W;
        }
      }
      for (int g = 0; g < F::BLOCK / GROUP; g++, planes += (F::LOW + F::HIGH) * VECTOR)
        write_planes<F>((const Codes*)codes + g * STEPS, planes);
    }
  }
}
template <class B>
void pack_floats(const uint8_t* rows, int64_t stride, const int64_t* row_order, int64_t features, int64_t depth,
                 uint8_t* out) {
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < (features + W - 1) / W; panel++)
    for (int lane = 0; lane < W; lane++) {
      const int64_t feature = panel * W + lane;
      B* to = (B*)out + panel * W * depth + lane;
      const B* from = feature < features ? (const B*)(rows + row_order[feature] * stride) : nullptr;
      for (int64_t d = 0; d < depth; d++) to[d * W] = from ? from[d] : B{};
    }
}

// One feature of a panel -> out [depth].
template <class F> void feature(const uint8_t* panel, int64_t depth, int lane, float* out) {
  constexpr int HALVES = GROUP / F::GROUP;
  const uint8_t *planes = panel, *block = panel + depth / F::BLOCK * code_bytes<F>();
  for (int64_t first = 0; first < depth; first += F::BLOCK, block += scale_bytes<F>())
    for (int g = 0; g < F::BLOCK / GROUP; g++, planes += (F::LOW + F::HIGH) * VECTOR) {
      Codes codes[STEPS];
      for_steps<STEPS>([&](auto i) { codes[i()] = code<F, i()>(planes); });
      for (int half = 0; half < HALVES; half++) {
        const Linear linear = scales<F>(block, g * HALVES + half);
        const float scale = linear.scale[lane], bias = linear.bias[lane];
        for (int i = 0; i < F::GROUP; i++) *out++ = scale * codes[(half * F::GROUP + i) / 2][lane * 2 + i % 2] + bias;
      }
    }
}
template <class B> void feature_of_floats(const uint8_t* panel, int64_t depth, int lane, float* out) {
  for (int64_t d = 0; d < depth; d++) out[d] = load((const B*)panel + d * W)[lane];
}

// -------------------------------------------------------------------------------- the table

using Times = void (*)(const uint8_t*, const Inputs&, int64_t, float*);
using TimesUnpacked = void (*)(const Unpacked&, const Inputs&, int64_t, float*);

// What a format can do. times and times_unpacked: by the number of rows, from 1.
struct Operations {
  bool floats;
  Times times[ROWS];  // floats: all; else up to FEW_ROWS
  void (*unpack)(const uint8_t*, int64_t, const Unpacked&);
  TimesUnpacked times_unpacked[ROWS];
  int64_t (*bytes)(int64_t);
  void (*pack)(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, uint8_t*);
  void (*feature)(const uint8_t*, int64_t, int, float*);
};

template <class F, size_t... I> Operations quantised(std::index_sequence<I...>) {
  Operations found = {};
  for_steps<FEW_ROWS>([&](auto m) { found.times[m()] = times_panel<F, m() + 1>; });
  found.unpack = unpack<F>;
  ((found.times_unpacked[I] = times_unpacked<GROUP / F::GROUP, has_bias<F>(), I + 1>), ...);
  found.bytes = panel_bytes<F>;
  found.pack = pack<F>;
  found.feature = feature<F>;
  return found;
}
template <class B, size_t... I> Operations of_floats(std::index_sequence<I...>) {
  Operations found = {};
  found.floats = true;
  ((found.times[I] = times_floats<B, I + 1>), ...);
  found.bytes = [](int64_t depth) { return depth * W * (int64_t)sizeof(B); };
  found.pack = pack_floats<B>;
  found.feature = feature_of_floats<B>;
  return found;
}

// By the number that GGUF files give to a type. nullptr for other types.
const Operations* operations(int64_t type) {
  constexpr auto counts = std::make_index_sequence<ROWS>();
  struct Entry {
    int64_t type;
    Operations operations;
  };
  static const Entry table[] = {
      {0, of_floats<fp32>(counts)},     {1, of_floats<fp16>(counts)},     {30, of_floats<bf16>(counts)},
      {2, quantised<Q4_0>(counts)},     {3, quantised<Q4_1>(counts)},     {6, quantised<Q5_0>(counts)},
      {7, quantised<Q5_1>(counts)},     {8, quantised<Q8_0>(counts)},     {10, quantised<Q2_K>(counts)},
      {11, quantised<Q3_K>(counts)},    {12, quantised<Q4_K>(counts)},    {13, quantised<Q5_K>(counts)},
      {14, quantised<Q6_K>(counts)},    {20, quantised<IQ4_NL>(counts)},  {23, quantised<IQ4_XS>(counts)},
      {39, quantised<MXFP4>(counts)},
  };
  for (const Entry& entry : table)
    if (entry.type == type) return &entry.operations;
  return nullptr;
}

// ------------------------------------------------------------------------------ the product

// Consecutive features of a matrix that have one type.
struct Segment {
  int64_t type, offset, first, features;  // offset: of its panels in the matrix, in bytes
};

template <class T> void round_inputs(const T* x, int64_t stride, int rows, int64_t depth, const Inputs& to) {
  constexpr int MOST = 32767;
  for (int m = 0; m < rows; m++)
    for (int64_t g = 0; g < depth / GROUP; g++) {
      const T* from = x + m * stride + g * GROUP;
      Vec top = {}, nothing = {};
      for (int i = 0; i < GROUP; i += W) {
        const Vec v = load(from + i);
        top = max(top, v < 0 ? -v : v);
        nothing += v * 0.f;  // NaN for NaN and infinity
      }
      const float most = max(top), scale = most / MOST + sum(nothing), inverse = most > MOST / FLT_MAX ? MOST / most : 0;
      int16_t codes[GROUP];
      float* sums = to.sums + g * 3 * rows + m;
      for (int half = 0; half < 2; half++) {
        Ints total = {};
        for (int i = half * GROUP / 2; i < (half + 1) * GROUP / 2; i += W) {
          const Vec near = load(from + i) * inverse + 12582912.f;  // 1.5 * 2^23: the low bits hold the integer
          const Ints v = (Ints)near - 0x4b400000;
          put(codes + i, __builtin_convertvector(v, Words));
          total += v;
        }
        int all = 0;
        for (int i = 0; i < W; i++) all += total[i];
        sums[half * rows] = scale * all;
      }
      sums[2 * rows] = sums[0] + sums[rows];
      to.scales[g * rows + m] = scale;
      for (int i = 0; i < STEPS; i++) std::memcpy(to.codes + (g * STEPS + i) * rows + m, codes + 2 * i, 4);
    }
}
template <class T> void copy_inputs(const T* x, int64_t stride, int rows, int64_t depth, float* to) {
  for (int m = 0; m < rows; m++)
    for (int64_t d = 0; d < depth; d += W) {
      const Vec v = load(x + m * stride + d, depth - d);
      for (int i = 0; i < W && d + i < depth; i++) to[(d + i) * rows + m] = v[i];
    }
}

// The inputs of a product, block by block.
struct AllInputs {
  int64_t depth;
  bool rounded, floats;
  std::unique_ptr<int32_t[]> codes;
  std::unique_ptr<float[]> scales, sums, copies;

  AllInputs(int64_t rows, int64_t depth, bool rounded, bool floats) : depth(depth), rounded(rounded), floats(floats) {
    if (rounded) {
      codes.reset(new int32_t[rows * depth / 2]);
      scales.reset(new float[rows * depth / GROUP]);
      sums.reset(new float[3 * rows * depth / GROUP]);
    }
    if (floats) copies.reset(new float[rows * depth]);
  }
  Inputs block(int64_t first) const {
    const int64_t groups = first * (depth / GROUP);
    return {codes.get() + groups * STEPS, scales.get() + groups, sums.get() + 3 * groups, copies.get() + first * depth};
  }
  template <class T> void fill(const T* x, int64_t stride, int64_t first, int rows) {
    const Inputs to = block(first);
    if (rounded) round_inputs(x + first * stride, stride, rows, depth, to);
    if (floats) copy_inputs(x + first * stride, stride, rows, depth, to.floats);
  }
};

// Memory of one thread for a panel of `depth` that is taken apart.
struct Scratch {
  std::unique_ptr<uint8_t[]> memory;
  Unpacked unpacked;

  explicit Scratch(int64_t depth) : memory(new uint8_t[unpacked_bytes(depth) + VECTOR]) {
    unpacked.codes = (Codes*)(((uintptr_t)memory.get() + VECTOR - 1) / VECTOR * VECTOR);
    unpacked.linear = (float*)(unpacked.codes + depth / GROUP * STEPS);
  }
};

// The first `here` sums of each row, and the bias -> out.
template <class T>
INLINE void write_rows(const float* sums, int rows, const T* bias, T* out, int64_t stride, int64_t here) {
  for (int i = 0; i < rows; i++) {
    Vec v = load(sums + i * W);
    if (bias) v += load(bias, here);
    store(out + i * stride, v, here);
  }
}

template <class T>
void linear_blocks(const T* x, int64_t x_stride, const uint8_t* w, const Segment* segments, int64_t num_segments,
                   const T* bias, T* out, int64_t rows, int64_t cols, int64_t depth) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS;
  int64_t panels = 0;
  bool rounded = false, floats = false;
  for (int64_t s = 0; s < num_segments; s++) {
    panels += (segments[s].features + W - 1) / W;
    (operations(segments[s].type)->floats ? floats : rounded) = true;
  }
  // Few rows are rounded by every thread, because waiting for the others takes longer.
  const bool shared = rows > FEW_ROWS;
  AllInputs everyones(shared ? rows : 0, depth, rounded, floats);
#pragma omp parallel if (cols * depth > PARALLEL)
  {
    AllInputs own(shared ? 0 : rows, depth, rounded, floats);
    AllInputs& inputs = shared ? everyones : own;
    if (!shared) own.fill(x, x_stride, 0, rows);
    else {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; block++)
        for_block<ROWS>(rows, block, [&](int64_t first, auto m) { inputs.fill(x, x_stride, first, m()); });
    }
    const Scratch scratch(shared && rounded ? depth : 0);
    int64_t unpacked_panel = -1;
#pragma omp for schedule(static) nowait
    for (int64_t unit = 0; unit < panels * blocks; unit++) {
      int64_t panel = unit / blocks;
      const Segment* segment = segments;
      while (panel >= (segment->features + W - 1) / W) panel -= (segment++->features + W - 1) / W;
      const Operations& can = *operations(segment->type);
      const uint8_t* from = w + segment->offset + panel * can.bytes(depth);
      const bool few = can.floats || rows <= FEW_ROWS;
      if (!few && unit / blocks != unpacked_panel) {
        can.unpack(from, depth, scratch.unpacked);
        unpacked_panel = unit / blocks;
      }
      const int64_t col = segment->first + panel * W, here = std::min<int64_t>(W, segment->features - panel * W);
      for_block<ROWS>(rows, unit % blocks, [&](int64_t first, auto m) {
        alignas(64) float sums[ROWS * W];
        const Inputs block = inputs.block(first);
        if (few) can.times[m() - 1](from, block, depth, sums);
        else can.times_unpacked[m() - 1](scratch.unpacked, block, depth, sums);
        write_rows<T>(sums, m(), bias ? bias + col : nullptr, out + first * cols + col, cols, here);
      });
    }
  }
}

// A matrix [cols, depth] for each of `groups`, one below the other, each of `num_segments`
// segments. The rows of group g are offsets[g] .. offsets[g + 1] - 1, and rows after the last
// group become 0. Panels of groups without rows are not read.
template <class T>
void grouped_blocks(const T* x, const uint8_t* w, const Segment* segments, int64_t num_segments, const T* bias, T* out,
                    const int32_t* offsets, int64_t groups, int64_t rows, int64_t cols, int64_t depth) {
  const int64_t used = offsets[groups];
  int64_t panels = 0, most = 0;
  bool rounded = false, floats = false;
  for (int64_t s = 0; s < num_segments; s++) panels += (segments[s].features + W - 1) / W;
  for (int64_t s = 0; s < groups * num_segments; s++) (operations(segments[s].type)->floats ? floats : rounded) = true;
  std::vector<int64_t> blocks;  // (group, block of its rows)
  for (int64_t g = 0; g < groups; g++) {
    const int64_t count = offsets[g + 1] - offsets[g];
    most = std::max(most, count);
    for (int64_t block = 0; block * ROWS < count; block++) blocks.insert(blocks.end(), {g, block});
  }
  AllInputs inputs(used, depth, rounded, floats);
#pragma omp parallel if (used * cols * depth > PARALLEL)
  {
#pragma omp for schedule(static)
    for (size_t i = 0; i < blocks.size(); i += 2) {
      const int64_t start = offsets[blocks[i]], count = offsets[blocks[i] + 1] - start;
      for_block<ROWS>(count, blocks[i + 1], [&](int64_t first, auto m) { inputs.fill(x, depth, start + first, m()); });
    }
#pragma omp for schedule(static) nowait
    for (int64_t r = used; r < rows; r++) std::fill_n(out + r * cols, cols, T{});
    const Scratch scratch(most > FEW_ROWS && rounded ? depth : 0);
    for_share(offsets, groups, panels, [&](int64_t group, int64_t first_panel, int64_t last_panel) {
      const int64_t start = offsets[group], count = offsets[group + 1] - start;
      for (int64_t at = first_panel; at < last_panel; at++) {
        int64_t panel = at;
        const Segment* segment = segments + group * num_segments;
        while (panel >= (segment->features + W - 1) / W) panel -= (segment++->features + W - 1) / W;
        const Operations& can = *operations(segment->type);
        const uint8_t* from = w + segment->offset + panel * can.bytes(depth);
        const bool few = can.floats || count <= FEW_ROWS;
        if (!few) can.unpack(from, depth, scratch.unpacked);
        const int64_t feature = segment->first + panel * W, here = std::min<int64_t>(W, segment->features - panel * W);
        T* to = out + start * cols + feature - group * cols;
        for_rows<ROWS>(count, [&](int64_t first, auto m) {
          alignas(64) float sums[ROWS * W];
          const Inputs block = inputs.block(start + first);
          if (few) can.times[m() - 1](from, block, depth, sums);
          else can.times_unpacked[m() - 1](scratch.unpacked, block, depth, sums);
          write_rows<T>(sums, m(), bias ? bias + feature : nullptr, to + first * cols, cols, here);
        });
      }
    });
  }
}

// Rows `ids` of a matrix. An id outside the matrix gives zeros.
template <class T>
void embed_blocks(const int64_t* ids, const uint8_t* w, const Segment* segments, int64_t num_segments, T* out,
                  int64_t count, int64_t depth) {
#pragma omp parallel for schedule(static) if (count * depth > PARALLEL)
  for (int64_t i = 0; i < count; i++) {
    const std::unique_ptr<float[]> row(new float[depth + W]());
    for (const Segment* s = segments; s < segments + num_segments; s++) {
      const int64_t at = ids[i] - s->first;
      if (at < 0 || at >= s->features) continue;
      const Operations& can = *operations(s->type);
      can.feature(w + s->offset + at / W * can.bytes(depth), depth, at % W, row.get());
    }
    for (int64_t d = 0; d < depth; d += W) store(out + i * depth + d, load(row.get() + d), depth - d);
  }
}

}  // namespace

#define EXPORT(T)                                                                         \
  extern "C" void linear_blocks_##T(const Arg* args) { apply(linear_blocks<T>, args); }   \
  extern "C" void grouped_blocks_##T(const Arg* args) { apply(grouped_blocks<T>, args); } \
  extern "C" void embed_blocks_##T(const Arg* args) { apply(embed_blocks<T>, args); }
EXPORT(bf16)
EXPORT(fp16)
EXPORT(fp32)

// Bytes of `features` rows in panels; 0 for a type without kernels.
extern "C" int64_t packed_bytes(int64_t type, int64_t features, int64_t depth) {
  const Operations* can = operations(type);
  return can ? (features + W - 1) / W * can->bytes(depth) : 0;
}
extern "C" void pack(int64_t type, const uint8_t* rows, int64_t stride, const int64_t* row_order, int64_t features,
                     int64_t depth, uint8_t* out) {
  operations(type)->pack(rows, stride, row_order, features, depth, out);
}

// The block formats of GGUF files: what a block stores, one struct a format.
//
// Source of the layouts: ggml's ggml-common.h and ggml-quants.c. A format says
//   BLOCK    weights of a block, neighbours in a row
//   BYTES    bytes of a block in the file
//   GROUP    weights with one scale
//   LOW      bits of a code in the low plane of a panel: 2, 4 or 8
//   HIGH     bits of a code in the high plane: 0, 1 or 2
//   ZERO     the code of weight 0, where there is no bias of its own
//   TABLE    what a code stands for, or no table
//   HALVES   float16 numbers of a block: the scale, and with two the scale of biases
//   SCALES   how the bytes of a group scale the numbers of the block (Scales)
// and decode(block, fields) takes a block apart.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

enum class Scales {
  NONE,      // weight = d * code + (m or -d * ZERO)
  SIGNED,    // d * scale
  BOTH,      // d * scale and -m * bias, a byte each
  NIBBLES,   // d * scale and -m * bias, half a byte each
  EXPONENT,  // 2^(scale - 128), no numbers of the block
};

constexpr int MAX_BLOCK = 256;

// A block, taken apart.
struct Fields {
  uint8_t codes[MAX_BLOCK];
  uint16_t halves[2];                // d and m, bits of float16
  uint8_t scales[16], biases[16];    // of each group
};

struct NoTable {
  static constexpr bool ANY = false;
};
struct Iq4Table {  // in the order of codes
  static constexpr bool ANY = true;
  static constexpr int8_t VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
};
struct Fp4Table {  // E2M1, doubled
  static constexpr bool ANY = true;
  static constexpr int8_t VALUES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
};

template <int block, int bytes, int group, int low, int high, int zero, int halves, Scales scales, class Table = NoTable>
struct Format {
  static constexpr int BLOCK = block, BYTES = bytes, GROUP = group, LOW = low, HIGH = high;
  static constexpr int ZERO = zero, HALVES = halves;
  static constexpr Scales SCALES = scales;
  using TABLE = Table;
};

// Bytes of half codes: n low halves, then n high halves.
inline void halves_of(const uint8_t* bytes, int n, uint8_t* codes) {
  for (int i = 0; i < n; i++) codes[i] = bytes[i] & 15;
  for (int i = 0; i < n; i++) codes[n + i] = bytes[i] >> 4;
}
// Adds bit i of `bits` to code i, as its bit 4.
inline void fifth_bits(const uint8_t* bits, uint8_t* codes) {
  uint32_t all;
  std::memcpy(&all, bits, 4);
  for (int i = 0; i < 32; i++) codes[i] |= (all >> i & 1) << 4;
}

struct Q4_0 : Format<32, 18, 32, 4, 0, 8, 1, Scales::NONE> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 2);
    halves_of(b + 2, 16, f.codes);
  }
};
struct Q4_1 : Format<32, 20, 32, 4, 0, 0, 2, Scales::NONE> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 4);
    halves_of(b + 4, 16, f.codes);
  }
};
struct Q5_0 : Format<32, 22, 32, 4, 1, 16, 1, Scales::NONE> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 2);
    halves_of(b + 6, 16, f.codes);
    fifth_bits(b + 2, f.codes);
  }
};
struct Q5_1 : Format<32, 24, 32, 4, 1, 0, 2, Scales::NONE> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 4);
    halves_of(b + 8, 16, f.codes);
    fifth_bits(b + 4, f.codes);
  }
};
struct Q8_0 : Format<32, 34, 32, 8, 0, 128, 1, Scales::NONE> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 2);
    for (int i = 0; i < 32; i++) f.codes[i] = b[2 + i] ^ 0x80;  // code = weight + 128
  }
};
struct IQ4_NL : Format<32, 18, 32, 4, 0, 128, 1, Scales::NONE, Iq4Table> {
  static void decode(const uint8_t* b, Fields& f) { Q4_0::decode(b, f); }
};
struct MXFP4 : Format<32, 17, 32, 4, 0, 12, 0, Scales::EXPONENT, Fp4Table> {
  static void decode(const uint8_t* b, Fields& f) {
    f.scales[0] = b[0];
    halves_of(b + 1, 16, f.codes);
  }
};
struct Q2_K : Format<256, 84, 16, 2, 0, 0, 2, Scales::NIBBLES> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.scales, b, 16);
    std::memcpy(f.halves, b + 80, 4);
    for (int i = 0; i < 256; i++) f.codes[i] = b[16 + i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
  }
};
struct Q3_K : Format<256, 110, 16, 2, 1, 4, 1, Scales::SIGNED> {
  static void decode(const uint8_t* b, Fields& f) {
    const uint8_t *high = b, *low = b + 32, *scales = b + 96;
    for (int i = 0; i < 256; i++) {
      const int bits = low[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
      f.codes[i] = bits | (high[i % 32] >> (i / 32) & 1) << 2;
    }
    for (int g = 0; g < 16; g++) {
      const int bits = scales[g % 8] >> (g / 8 * 4) & 15;
      f.scales[g] = (bits | (scales[8 + g % 4] >> (g / 4 * 2) & 3) << 4) - 32;
    }
    std::memcpy(f.halves, b + 108, 2);
  }
};
// The scales and biases of Q4_K and Q5_K: 6 bits each, in 12 bytes.
inline void six_bits(const uint8_t* b, Fields& f) {
  for (int g = 0; g < 4; g++) {
    f.scales[g] = b[g] & 63;
    f.biases[g] = b[g + 4] & 63;
    f.scales[g + 4] = (b[g + 8] & 15) | (b[g] >> 6) << 4;
    f.biases[g + 4] = b[g + 8] >> 4 | (b[g + 4] >> 6) << 4;
  }
}
struct Q4_K : Format<256, 144, 32, 4, 0, 0, 2, Scales::BOTH> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 4);
    six_bits(b + 4, f);
    for (int g = 0; g < 4; g++) halves_of(b + 16 + g * 32, 32, f.codes + g * 64);
  }
};
struct Q5_K : Format<256, 176, 32, 4, 1, 0, 2, Scales::BOTH> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 4);
    six_bits(b + 4, f);
    for (int g = 0; g < 4; g++) halves_of(b + 48 + g * 32, 32, f.codes + g * 64);
    for (int i = 0; i < 256; i++) f.codes[i] |= (b[16 + i % 32] >> (i / 32) & 1) << 4;
  }
};
struct Q6_K : Format<256, 210, 16, 4, 2, 32, 1, Scales::SIGNED> {
  static void decode(const uint8_t* b, Fields& f) {
    for (int n = 0; n < 2; n++) {
      const uint8_t *low = b + n * 64, *high = b + 128 + n * 32;
      halves_of(low, 64, f.codes + n * 128);
      for (int i = 0; i < 128; i++) f.codes[n * 128 + i] |= (high[i % 32] >> (i / 32 * 2) & 3) << 4;
    }
    std::memcpy(f.scales, b + 192, 16);
    std::memcpy(f.halves, b + 208, 2);
  }
};
struct IQ4_XS : Format<256, 136, 32, 4, 0, 128, 1, Scales::SIGNED, Iq4Table> {
  static void decode(const uint8_t* b, Fields& f) {
    std::memcpy(f.halves, b, 2);
    const int high = b[2] | b[3] << 8;
    for (int g = 0; g < 8; g++) {
      const int low = b[4 + g / 2] >> (g % 2 * 4) & 15;
      f.scales[g] = (low | (high >> 2 * g & 3) << 4) - 32;
      halves_of(b + 8 + g * 16, 16, f.codes + g * 32);
    }
  }
};

}  // namespace

// What both scorers by matrix tiles share: keys' codes and queries as bfloat16 numbers.
//
// Keys' codes are integers up to 127, which bfloat16 holds; queries are cut into terms that it holds, one if they are
// bfloat16 already, else three. A product's sum over E runs in one order in both scorers, heads are added one after the
// other, and what else a tile computes does not matter: a score has the same bits in decoding and in prompts.
#pragma once

#include "index_inputs.h"

#ifdef FULMEN_TILES
#include <cmath>

// How E is cut: a chunk of 8 to 32 numbers is a tile's row of bfloat16.
struct Chunks {
    int64_t width, count, chunk_width;

    explicit Chunks(int64_t width)
        : width(width), count((width + LINE_NUMBERS - 1) / LINE_NUMBERS),
          chunk_width(round_up((width + count - 1) / count, 8)) {}

    int64_t bytes() const { return 2 * chunk_width; }
    int64_t rows() const { return bytes() / 4; }
    int64_t low(int64_t chunk) const { return chunk * chunk_width; }
    int64_t numbers(int64_t chunk) const { return std::min(chunk_width, width - low(chunk)); }
};

// Codes are widened by way of float16, whose bits, three bits to the right, are bfloat16's of a number 2^-112 as
// large. Queries are taken 2^64 times as large, so that no product is less than float32's least normal number; scales
// of keys make up for both.
constexpr int QUERY_EXPONENT = 64;
constexpr float PRODUCT_FACTOR = 0x1p48f;

static inline __m512i widen_codes(__m256i codes) {
    const __m512i half = _mm512_castph_si512(_mm512_cvtepi16_ph(_mm512_cvtepi8_epi16(codes)));
    return _mm512_and_si512(_mm512_srai_epi16(half, 3), _mm512_set1_epi16(short(0x8fff)));
}

// The codes of a head of `count` keys to rows [chunk][key] of their numbers. Those of the keys `ahead` are fetched into
// the level 2 cache: two chunks are one of its lines or less.
static inline void widen_keys(const int8_t *const *keys, int64_t count, int64_t at, const Chunks &chunks, Line *to,
                              int64_t ahead = 0) {
    for (int64_t chunk = 0; chunk < chunks.count; chunk++, to += TILE_ROWS) {
        const __mmask32 present = ~uint32_t(0) >> (LINE_NUMBERS - chunks.numbers(chunk));
        const int64_t from = at + chunks.low(chunk);
        for (int64_t s = 0; s < count; s++) {
            if (chunk % 2 == 0) _mm_prefetch((const char *)keys[s + ahead] + from, _MM_HINT_T1);
            _mm512_store_si512(to + s, widen_codes(_mm256_maskz_loadu_epi8(present, keys[s] + from)));
        }
    }
}

// A query's numbers as sums of bfloat16 numbers.
class Terms {
    static constexpr uint32_t HIGH = 0xffff0000;

  public:
    static constexpr int64_t MOST = 3;

    // How many terms all of these numbers need. One that is not finite becomes NaN as a sum of three.
    static int64_t needed(const float *x, int64_t count) {
        const __m512i exponent = _mm512_set1_epi32(0x7f800000);
        __m512i low = _mm512_setzero_si512();
        __mmask16 infinite = 0;
        for (int64_t i = 0; i < count; i += LANES) {
            const __m512i bits = (__m512i)load_some(x + i, count - i);
            low = _mm512_or_si512(low, _mm512_andnot_si512(_mm512_set1_epi32(int(HIGH)), bits));
            infinite |= _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, exponent), exponent);
        }
        return _mm512_test_epi32_mask(low, low) || infinite ? MOST : 1;
    }

    // 0 unless a head's numbers are extreme: they are then taken 2^-shift times as large, with its `b`, and its `w` 2^shift
    // times.
    static int shift(const float *q, int64_t width) {
        constexpr int BIAS = 127, ORDINARY = 60, SHIFT = 64;
        __m512i most = _mm512_setzero_si512();
        for (int64_t e = 0; e < width; e += LANES) {
            const __m512 size = _mm512_abs_ps(load_some(q + e, width - e));
            most = _mm512_max_epi32(most, (__m512i)size);
        }
        const int bits = _mm512_reduce_max_epi32(most), exponent = (bits >> 23) - BIAS;
        if (bits == 0 || std::abs(exponent) <= ORDINARY) return 0;
        return exponent > 0 ? SHIFT : -SHIFT;
    }

    static float scaled(float x, int exponent) { return exponent ? std::ldexp(x, exponent) : x; }

    // Of a head's numbers, to [term][chunk] rows, `stride` lines apart.
    static void write_row(const float *q, int shift, const Chunks &chunks, int64_t terms, Line *to, int64_t stride) {
        const int64_t per_term = chunks.count * stride * LINE_NUMBERS;
        for (int64_t chunk = 0; chunk < chunks.count; chunk++, to += stride)
            for (int64_t low = 0; low < chunks.numbers(chunk); low += 16) {
                const int64_t some = std::min<int64_t>(16, chunks.numbers(chunk) - low);
                const __m512 numbers = load_some(q + chunks.low(chunk) + low, some);
                const __m512 taken = _mm512_scalef_ps(numbers, _mm512_set1_ps(float(QUERY_EXPONENT - shift)));
                write(taken, terms, (uint16_t *)to->bytes + low, per_term);
            }
    }

  private:
    // Terms of 16 numbers, `stride` apart.
    static void write(__m512 left, int64_t terms, uint16_t *to, int64_t stride) {
        for (int64_t t = 0; t < terms; t++, to += stride) {
            const __m512i bits = _mm512_and_si512((__m512i)left, _mm512_set1_epi32(int(HIGH)));
            left = _mm512_sub_ps(left, (__m512)bits);  // exact; of infinity: NaN, in further terms
            _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
        }
    }
};

// Tiles 0 to 3: sums, 4 and 5: left matrices, 6 and 7: right ones.
class IndexTileScope {
    TileScope tiles;

    static TileConfig config(const Chunks &chunks) {
        TileConfig config;
        for (int tile = 0; tile < 4; tile++) config.set(tile, TILE_ROWS, TILE_BYTES);
        for (int tile = 4; tile < 6; tile++) config.set(tile, TILE_ROWS, chunks.bytes());
        for (int tile = 6; tile < 8; tile++) config.set(tile, chunks.rows(), TILE_BYTES);
        return config;
    }

  public:
    explicit IndexTileScope(const IndexInputs &in) : tiles(config(Chunks(in.shape.width))) {}
};

// Of up to 16 keys and one head: the bits of their scales, as they are.
static inline void copy_scales(const int8_t *const *keys, int64_t count, int64_t at, uint32_t *to) {
    for (int64_t s = 0; s < count; s++) {
        uint16_t bits;
        std::memcpy(&bits, keys[s] + at, sizeof bits);
        to[s] = uint32_t(bits) << 16;
    }
}

// By which products of 16 keys are multiplied, from their scales.
static inline __m512 product_scales(const void *scales, float factor) {
    return _mm512_mul_ps(_mm512_load_ps(scales), _mm512_set1_ps(factor * PRODUCT_FACTOR));
}

// One more head to the scores of 16 keys.
static inline __m512 add_head(__m512 total, __m512 product, __m512 scale, float w, float b) {
    const __m512 logit = _mm512_fmadd_ps(product, scale, _mm512_set1_ps(b));
    const __m512 relu = _mm512_max_ps(_mm512_setzero_ps(), logit);  // NaN, as the second of the two, stays
    return _mm512_fmadd_ps(relu, _mm512_set1_ps(w), total);
}
#endif

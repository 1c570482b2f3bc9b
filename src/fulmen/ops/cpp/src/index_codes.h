// Codes of packed keys, by lanes: many keys' next four codes at once.
#pragma once

#include "index_inputs.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

static inline IntVec load_ints(const int32_t *from) {
    IntVec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
static inline void store_ints(int32_t *to, IntVec x) { std::memcpy(to, &x, sizeof x); }

#ifdef __AVX512F__
static inline void transpose_lanes(IntVec *rows) { transpose_dwords((__m512i *)rows); }
#else
// Rows of numbers to columns, in place: rounds that interleave each row with the one half of all further.
template <bool UPPER, int... LANE> static inline IntVec interleave(IntVec x, IntVec y, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, y, ((LANE % 2) * LANES + UPPER * LANES / 2 + LANE / 2)...);
}

static inline void transpose_lanes(IntVec *rows) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 4
    for (int round = 1; round < LANES; round *= 2) {
        IntVec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) {
            next[2 * i] = interleave<false>(rows[i], rows[i + LANES / 2], lanes);
            next[2 * i + 1] = interleave<true>(rows[i], rows[i + LANES / 2], lanes);
        }
        std::copy_n(next, LANES, rows);
    }
}
#endif

// Four codes a lane, of `count` codes; what is beyond them is 0, and not read.
static inline IntVec load_codes(const int8_t *from, int64_t count) {
    IntVec codes = {};
#if defined(__AVX512BW__)
    return (IntVec)_mm512_maskz_loadu_epi8(~uint64_t(0) >> (64 - std::min<int64_t>(count, 64)), from);
#elif defined(__AVX2__)
    static const int32_t present[] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
    if (count < 4 * LANES && count % 4 == 0)
        return (IntVec)_mm256_maskload_epi32((const int *)from, (__m256i)load_ints(present + LANES - count / 4));
#endif
    std::memcpy(&codes, from, std::min<int64_t>(count, sizeof codes));
    return codes;
}

// The codes of LANES keys' heads to four(i, codes 4 i to 4 i + 3 of all of them); null keys have zeros.
template <class Four> static inline void for_fours(const int8_t *const *keys, int64_t at, int64_t width, const Four &four) {
    for (int64_t low = 0; low < width; low += 4 * LANES) {
        IntVec rows[LANES];
        for (int64_t s = 0; s < LANES; s++) rows[s] = keys[s] ? load_codes(keys[s] + at + low, width - low) : IntVec{};
        transpose_lanes(rows);
        for (int64_t i = 0; 4 * i < std::min<int64_t>(width - low, 4 * LANES); i++) four(low / 4 + i, rows[i]);
    }
}

// Where the keys of a tile are; null beyond the last. Those of the next tile are fetched: they are waited for otherwise.
struct TileKeys {
    const int8_t *keys[TILE] = {};

    TileKeys(const IndexInputs &in, int64_t batch, int64_t tile) {
        const int64_t first = tile * TILE, last = in.shape.keys;
        for (int64_t s = first; s < std::min(first + TILE, last); s++) keys[s - first] = in.key<int8_t>(batch, s, 0);
        for (int64_t s = first + TILE; s < std::min(first + 2 * TILE, last); s++)
            for (int64_t i = 0; i < in.shape.key_heads; i++) __builtin_prefetch(in.key<int8_t>(batch, s, i), 0, 2);
    }

    // Of a head that begins `at` bytes into each key.
    void copy_scales(int64_t at, int64_t width, float *to) const {
        for (int64_t s = 0; s < TILE; s++) to[s] = keys[s] ? scale_of_packed(keys[s] + at, width) : 0.0f;
    }
};

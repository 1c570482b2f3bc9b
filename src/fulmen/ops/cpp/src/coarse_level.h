// Coarse scores: products of 8-bit codes, summed as integers, so that every machine and every order gives the same.
#pragma once

#include "index_inputs.h"

// IntVec of one key: lanes whose sum is the product with a query's codes. Codes of queries are widened once.
#if defined(__AVX512BW__)
constexpr int64_t CODES = 32;  // that one instruction multiplies
#elif defined(__AVX2__)
#include <immintrin.h>
constexpr int64_t CODES = 16;
#else
constexpr int64_t CODES = 8;
#endif

class CoarseScorer {
    const IndexInputs &in;
    const CoarseLevel &level;
    const int64_t batch, chunks;
    std::vector<int16_t> q;     // [row][chunk][CODES]
    std::vector<float> scales;  // [row]
#ifdef FULMEN_TILES
    static constexpr int64_t MOST_ROWS = 2 * TILE_ROWS;
    const int64_t lines = (level.width + TILE_BYTES - 1) / TILE_BYTES;  // of a query's codes
    std::unique_ptr<Line[]> left;                                       // [tile of queries][line][query]
#endif

  public:
    static constexpr int64_t ROWS_AT_ONCE = 1;

    struct Workspace {
        const int8_t *rows[TILE];
        alignas(64) float scales[TILE];
#ifdef FULMEN_TILES
        std::unique_ptr<Line[]> right;  // [line][dword][key]
        explicit Workspace(const IndexInputs &in) : right(new Line[(in.coarse->width + TILE_BYTES - 1) / TILE_BYTES * TILE_ROWS]) {}
#else
        explicit Workspace(const IndexInputs &) {}
#endif
    };

#ifdef FULMEN_TILES
    class Scope {
        TileScope tiles;

      public:
        explicit Scope(const IndexInputs &) : tiles(TileConfig::full()) {}
    };
#else
    struct Scope {
        explicit Scope(const IndexInputs &) {}
    };
#endif

    CoarseScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), level(*in.coarse), batch(block.batch), chunks((level.width + CODES - 1) / CODES),
          q(block.rows.size() * chunks * CODES), scales(block.rows.size()) {
        for (size_t r = 0; r < block.rows.size(); r++) {
            const int8_t *codes = level.q + block.rows[r] * (level.width + 2);
            std::copy_n(codes, level.width, q.data() + r * chunks * CODES);
            scales[r] = scale_of_packed(codes, level.width);
        }
#ifdef FULMEN_TILES
        if (!by_tiles(block.rows.size())) return;
        left.reset(new Line[MOST_ROWS * lines]());
        for (size_t r = 0; r < block.rows.size(); r++)
            for (int64_t i = 0; i < lines; i++) {
                const int64_t some = std::min(TILE_BYTES, level.width - i * TILE_BYTES);
                Line &to = left[(r / TILE_ROWS * lines + i) * TILE_ROWS + r % TILE_ROWS];
                std::copy_n(level.q + block.rows[r] * (level.width + 2) + i * TILE_BYTES, some, to.bytes);
            }
#endif
    }

    // Scores of the block's queries for one tile of keys; those of positions beyond the last key are not used.
    void score(int64_t index, Workspace &workspace, int64_t n_rows, float *scores, int64_t stride) const {
        for (int64_t c = 0; c < TILE; c++) {
            workspace.rows[c] = level.key(batch, std::min(index * TILE + c, in.shape.keys - 1), in.shape.keys);
            workspace.scales[c] = scale_of_packed(workspace.rows[c], level.width);
        }
#ifdef FULMEN_TILES
        if (by_tiles(n_rows)) return score_by_tiles(workspace, n_rows, scores, stride);
#endif
        for (int64_t r = 0; r < n_rows; r++)
            for (int64_t c = 0; c < TILE; c += LANES) {
                const IntVec sums = products(q.data() + r * chunks * CODES, workspace.rows + c);
                store(scores + r * stride + c, scored(sums, scales[r], workspace.scales + c));
            }
    }

  private:
    static Vec scored(IntVec sums, float scale, const float *key_scales) {
        const Vec score = __builtin_convertvector(sums, Vec) * (load(key_scales) * scale);
        return score == score ? score : broadcast(INFINITY);
    }

    // Of one query and LANES keys.
    IntVec products(const int16_t *query, const int8_t *const *keys) const {
#if defined(__AVX512BW__) || defined(__AVX2__)
        IntVec parts[LANES];
        for (int key = 0; key < LANES; key++) {
            parts[key] = IntVec{};
            for (int64_t c = 0; c < chunks; c++)
                parts[key] += multiplied(query + c * CODES, keys[key] + c * CODES, level.width - c * CODES);
        }
        return add_lanes<LANES>(parts);
#else
        IntVec sums;
        for (int key = 0; key < LANES; key++) {
            int32_t sum = 0;
            for (int64_t n = 0; n < level.width; n++) sum += int32_t(query[n]) * keys[key][n];
            sums[key] = sum;
        }
        return sums;
#endif
    }

#if defined(__AVX512BW__)
    static IntVec multiplied(const int16_t *query, const int8_t *key, int64_t count) {
        const __mmask32 present = count >= CODES ? ~__mmask32(0) : (__mmask32(1) << count) - 1;
        const __m512i codes = _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(present, key));
        return (IntVec)_mm512_madd_epi16(codes, _mm512_loadu_si512(query));
    }
#elif defined(__AVX2__)
    static IntVec multiplied(const int16_t *query, const int8_t *key, int64_t count) {
        __m128i codes = _mm_setzero_si128();
        if (count >= CODES) codes = _mm_loadu_si128((const __m128i *)key);
        else if (count == 8) codes = _mm_loadl_epi64((const __m128i *)key);
        else std::memcpy(&codes, key, count);
        return (IntVec)_mm256_madd_epi16(_mm256_cvtepi8_epi16(codes), _mm256_loadu_si256((const __m256i *)query));
    }
#endif

#ifdef FULMEN_TILES
    bool by_tiles(int64_t n_rows) const { return in.shape.use_tiles && n_rows > 4 && n_rows <= MOST_ROWS; }

    void score_by_tiles(Workspace &workspace, int64_t n_rows, float *scores, int64_t stride) const {
        alignas(64) int32_t sums[MOST_ROWS * 16];
        for (int64_t v = 0; v < TILE; v += 16) {
            transpose_keys(workspace, v);
            settle_memory();
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t i = 0; i < lines; i++) {
                _tile_loadd(6, workspace.right.get() + i * TILE_ROWS, TILE_BYTES);
                _tile_loadd(4, left.get() + i * TILE_ROWS, TILE_BYTES);
                _tile_dpbssd(0, 4, 6);
                if (n_rows <= TILE_ROWS) continue;
                _tile_loadd(5, left.get() + (lines + i) * TILE_ROWS, TILE_BYTES);
                _tile_dpbssd(1, 5, 6);
            }
            _tile_stored(0, sums, TILE_BYTES);
            _tile_stored(1, sums + TILE_ROWS * 16, TILE_BYTES);
            settle_memory();
            for (int64_t r = 0; r < n_rows; r++) {
                const IntVec some = (IntVec)_mm512_load_si512(sums + r * 16);
                store(scores + r * stride + v, scored(some, scales[r], workspace.scales + v));
            }
        }
    }

    // 16 keys as the columns of right matrices.
    void transpose_keys(Workspace &workspace, int64_t v) const {
        for (int64_t i = 0; i < lines; i++) {
            const int64_t some = std::min(TILE_BYTES, level.width - i * TILE_BYTES);
            const __mmask64 present = ~uint64_t(0) >> (TILE_BYTES - some);
            __m512i rows[TILE_ROWS];
            for (int64_t s = 0; s < TILE_ROWS; s++)
                rows[s] = _mm512_maskz_loadu_epi8(present, workspace.rows[v + s] + i * TILE_BYTES);
            transpose_dwords(rows);
            for (int64_t s = 0; s < TILE_ROWS; s++) _mm512_store_si512(workspace.right.get() + i * TILE_ROWS + s, rows[s]);
        }
    }
#endif
};

// Attention of many bfloat16 queries over selected keys by matrix tiles (FlashAttention-2, arXiv 2307.08691).
//
// 16 neighbouring queries read the union of what they select, and each counts only its own: neighbours select much
// alike, and a tile's product costs so little that even keys which one of them wants alone pay.
#pragma once

#include "attention.h"
#include "tiles.h"

#include <cfloat>
#include <cmath>

// Queries of a block: rows of a tile.
constexpr int64_t TILE_QUERIES = TILE_ROWS;

#ifdef FULMEN_TILES

// The keys that some of a block's queries select, ascending, and for each which of the queries, as bits.
class KeyUnion {
    std::vector<uint16_t> member;  // [S] and up to a whole vector; zero between calls

  public:
    std::vector<int32_t> positions;
    std::vector<uint16_t> queries;

    explicit KeyUnion(int64_t keys) : member(round_up(keys, 32)) {}

    int64_t size() const { return positions.size(); }

    // Returns how many keys are selected, those of several queries as often.
    int64_t find(const int32_t *topk, int64_t count, int64_t width) {
        int32_t first = INT32_MAX, last = -1;
        int64_t found = 0;
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < width; i++) {
                const int32_t s = topk[t * width + i];
                if (s < 0) continue;
                member[s] |= uint16_t(1 << t);
                found++;
                first = std::min(first, s), last = std::max(last, s);
            }
        positions.clear(), queries.clear();
        for (int64_t low = first / 32 * 32; low <= last; low += 32) {
            const __m512i some = _mm512_loadu_si512(member.data() + low);
            for (uint32_t left = _mm512_test_epi16_mask(some, some); left; left &= left - 1) {
                const int64_t s = low + __builtin_ctz(left);
                positions.push_back(int32_t(s)), queries.push_back(member[s]);
            }
            _mm512_storeu_si512(member.data() + low, _mm512_setzero_si512());
        }
        return found;
    }
};

class TileAttention {
    // Keys of a step: of 128 numbers and as many values, packed, they take 64 KB of a core's level 2 cache.
    static constexpr int64_t KEYS = 128;
    // Queries that a key of the union must have, on average. Measured with random selections: at 4.2, and 3 heads of
    // 64, this takes as long as query by query; at 8, and 4 heads of 128, half of the time.
    static constexpr int64_t LEAST_ALIKE = 4;
    static constexpr int64_t SUMS_ROOM = 1 << 16;

    const AttentionInputs &in;
    const int64_t most_heads, d_chunks, v_tiles;  // 32 numbers of a key, 16 of a value (an even count)
    KeyUnion chosen;
    int64_t b = 0, row = 0, count = 0;  // the queries: their batch row, the first among all, how many
    // Left matrices [head][chunk of D][query], [chunk of 32 keys][query]; right ones [16 keys][chunk of D][pair of D],
    // [chunk of 32 keys][16 of V][pair of keys].
    std::unique_ptr<Line[]> q, probs, k, v;
    std::unique_ptr<Line[]> scores, sums;  // [query][key], [head][query][V]
    std::vector<float> peak, total;        // [head][query]
    __mmask16 seen[TILE_QUERIES][KEYS / 16];
    std::vector<int64_t> bad;  // keys of this step whose values are not finite

    int64_t value_width() const { return v_tiles * 16; }
    float *sums_of(int64_t h) { return (float *)(sums.get() + h * TILE_QUERIES * v_tiles); }

    static std::unique_ptr<Line[]> lines(int64_t count) { return std::unique_ptr<Line[]>(new Line[count]()); }

  public:
    static TileConfig config() {
        TileConfig config;
        for (int tile = 0; tile < 8; tile++) config.set(tile, TILE_ROWS, TILE_BYTES);
        return config;
    }

    explicit TileAttention(const AttentionInputs &in)
        : in(in), most_heads(std::clamp<int64_t>(SUMS_ROOM / (TILE_QUERIES * in.v.padded), 1, in.shared())),
          d_chunks((in.shape.width + 31) / 32), v_tiles(round_up(in.v.width, 32) / 16), chosen(in.shape.keys),
          q(lines(most_heads * d_chunks * TILE_ROWS)), probs(lines(KEYS / 32 * TILE_ROWS)),
          k(lines(KEYS / 16 * d_chunks * TILE_ROWS)), v(lines(KEYS / 32 * v_tiles * TILE_ROWS)),
          scores(lines(TILE_QUERIES * KEYS / 16)), sums(lines(most_heads * TILE_QUERIES * v_tiles)),
          peak(most_heads * TILE_QUERIES), total(most_heads * TILE_QUERIES) {}

    // Takes up the queries low <= t < high of batch row b. Whether they select enough alike for this to pay.
    bool choose(int64_t of_batch, int64_t low, int64_t high) {
        b = of_batch, row = b * in.shape.queries + low, count = high - low;
        const int64_t selected = chosen.find(in.topk + row * in.shape.topk, count, in.shape.topk);
        return LEAST_ALIKE * chosen.size() <= selected;
    }

    // Those queries, by the key heads from `first` on.
    void attend(int64_t first, int64_t groups, float scale, float *out, float *lse) {
        for (int64_t g = first; g < first + groups; g++)
            for (int64_t h = 0; h < in.shared(); h += most_heads) {
                const int64_t heads = std::min(most_heads, in.shared() - h);
                begin(g * in.shared() + h, heads);
                for (int64_t i = 0; i < chosen.size(); i += KEYS) step(g, i, heads, scale);
                finish(g * in.shared() + h, heads, out, lse);
            }
    }

  private:
    void begin(int64_t head, int64_t heads) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < count; t++) {
                const float *from = in.q + ((row + t) * in.shape.heads + head + h) * in.shape.width;
                for (int64_t d = 0; d < in.shape.width; d++) {
                    uint32_t bits;  // of a number that bfloat16 holds
                    std::memcpy(&bits, from + d, sizeof bits);
                    Line &line = q[(h * d_chunks + d / 32) * TILE_ROWS + t];
                    ((uint16_t *)line.bytes)[d % 32] = uint16_t(bits >> 16);
                }
            }
        std::fill_n(sums_of(0), heads * TILE_QUERIES * value_width(), 0.0f);
        std::fill(peak.begin(), peak.end(), -FLT_MAX);
        std::fill(total.begin(), total.end(), 0.0f);
    }

    void step(int64_t g, int64_t first, int64_t heads, float scale) {
        const int64_t keys = std::min<int64_t>(KEYS, chosen.size() - first);
        pack_keys(g, first, keys);
        pack_values(g, first, keys);
        find_seen(first, keys);
        for (int64_t h = 0; h < heads; h++) {
            multiply_keys(h, keys);
            for (const int64_t key : bad)
                for (int64_t t = 0; t < TILE_QUERIES; t++) ((float *)scores.get())[t * KEYS + key] = NAN;
            for (int64_t t = 0; t < TILE_QUERIES; t++) weigh(h, t, keys, scale * LOG2_E);
            add_values(h, keys);
        }
    }

    const uint16_t *row_of(const Source &from, int64_t g, int64_t i) const {
        const int64_t s = chosen.positions[i];
        return (const uint16_t *)from.data + b * from.stride_b + g * from.stride_g + s * from.stride_s;
    }

    void pack_keys(int64_t g, int64_t first, int64_t keys) {
        Line *to = k.get();
        for (int64_t low = 0; low < keys; low += 16)
            for (int64_t c = 0; c < d_chunks; c++, to += TILE_ROWS) {
                const __mmask32 present = ~uint32_t(0) >> (32 - std::min<int64_t>(32, in.shape.width - c * 32));
                __m512i rows[16] = {};
                for (int64_t i = low; i < std::min(low + 16, keys); i++)
                    rows[i - low] = _mm512_maskz_loadu_epi16(present, row_of(in.k, g, first + i) + c * 32);
                transpose_dwords(rows);
                for (int64_t r = 0; r < 16; r++) _mm512_store_si512(to + r, rows[r]);
            }
    }

    // Hidden values count as 0 times themselves, so that those that are not finite are taken out.
    void pack_values(int64_t g, int64_t first, int64_t keys) {
        bad.clear();
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        __m512i low, high;  // where in two rows the pairs of 16 columns are
        for (int n = 0; n < 32; n++) {
            ((uint16_t *)&low)[n] = uint16_t(n / 2 + n % 2 * 32);
            ((uint16_t *)&high)[n] = uint16_t(16 + n / 2 + n % 2 * 32);
        }
        const auto load_32 = [&](int64_t i, int64_t c) {
            if (i >= keys) return _mm512_setzero_si512();
            const __mmask32 present = ~uint32_t(0) >> (32 - std::min<int64_t>(32, in.shape.value_width - c * 16));
            const uint16_t *row = row_of(in.v, g, first + i) + c * 16;
            const __m512i numbers = _mm512_maskz_loadu_epi16(present, row);
            const __mmask32 infinite = _mm512_cmpeq_epi16_mask(_mm512_and_si512(numbers, exponent), exponent);
            if (infinite) bad.push_back(i);
            return _mm512_maskz_mov_epi16(~infinite, numbers);
        };
        for (int64_t i = 0; i < round_up(keys, 32); i += 2)
            for (int64_t c = 0; c < v_tiles; c += 2) {
                const __m512i even = load_32(i, c), odd = load_32(i + 1, c);
                Line *to = &v[(i / 32 * v_tiles + c) * TILE_ROWS + i % 32 / 2];
                _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_store_si512(to + TILE_ROWS, _mm512_permutex2var_epi16(even, high, odd));
            }
    }

    void find_seen(int64_t first, int64_t keys) {
        for (int64_t low = 0; low < round_up(keys, 32); low += 16) {
            const int64_t some = std::clamp<int64_t>(keys - low, 0, 16);
            const __m256i bits = _mm256_maskz_loadu_epi16(0xffffu >> (16 - some), chosen.queries.data() + first + low);
            for (int64_t t = 0; t < TILE_QUERIES; t++)
                seen[t][low / 16] = _mm256_test_epi16_mask(bits, _mm256_set1_epi16(int16_t(1 << t)));
        }
    }

    // Scores of one head, two vectors of keys at a time.
    void multiply_keys(int64_t h, int64_t keys) {
        settle_memory();
        for (int64_t n = 0; n < (keys + 15) / 16; n += 2) {
            const Line *queries = q.get() + h * d_chunks * TILE_ROWS, *left = k.get() + n * d_chunks * TILE_ROWS;
            const Line *right = left + d_chunks * TILE_ROWS;
            _tile_zero(0);
            _tile_zero(1);
            for (int64_t c = 0; c < d_chunks; c++) {
                _tile_loadd(4, queries + c * TILE_ROWS, TILE_BYTES);
                _tile_loadd(5, left + c * TILE_ROWS, TILE_BYTES);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, right + c * TILE_ROWS, TILE_BYTES);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, scores.get() + n, KEYS * sizeof(float));
            _tile_stored(1, scores.get() + n + 1, KEYS * sizeof(float));
        }
    }

    // One query's scores to weights; sums so far fade if the peak rises.
    void weigh(int64_t h, int64_t t, int64_t keys, float scale) {
        const int64_t vectors = round_up(keys, 32) / 16;
        const float *from = (float *)scores.get() + t * KEYS;
        float &top = peak[h * TILE_QUERIES + t];
        const __m512 hidden = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
        __m512 x[KEYS / 16], highest = _mm512_set1_ps(top);
        for (int64_t n = 0; n < vectors; n++) {
            x[n] = _mm512_mask_mul_ps(hidden, seen[t][n], _mm512_load_ps(from + n * 16), factor);
            highest = _mm512_max_ps(x[n], highest);  // the second, where the first is NaN
        }
        const float higher = _mm512_reduce_max_ps(highest);
        __m512 added = _mm512_setzero_ps();
        for (int64_t n = 0; n < vectors; n++) {
            const __m512 weight = _mm512_maskz_mov_ps(seen[t][n], (__m512)exp2_vec((Vec)x[n] - higher));
            added = _mm512_add_ps(added, weight);
            char *to = probs[n / 2 * TILE_ROWS + t].bytes + n % 2 * 32;
            _mm256_store_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(weight));
        }
        if (higher > top) fade(h, t, std::exp2(top - higher)), top = higher;
        total[h * TILE_QUERIES + t] += _mm512_reduce_add_ps(added);
    }

    void fade(int64_t h, int64_t t, float by) {
        total[h * TILE_QUERIES + t] *= by;
        float *row = sums_of(h) + t * value_width();
        for (int64_t d = 0; d < value_width(); d++) row[d] *= by;
    }

    void add_values(int64_t h, int64_t keys) {
        const int64_t stride = value_width() * sizeof(float), chunks = (keys + 31) / 32;
        settle_memory();
        for (int64_t c = 0; c < v_tiles; c += 2) {
            float *left = sums_of(h) + c * 16, *right = left + 16;
            _tile_loadd(0, left, stride);
            _tile_loadd(1, right, stride);
            for (int64_t i = 0; i < chunks; i++) {
                const Line *values = v.get() + (i * v_tiles + c) * TILE_ROWS;
                _tile_loadd(4, probs.get() + i * TILE_ROWS, TILE_BYTES);
                _tile_loadd(5, values, TILE_BYTES);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, values + TILE_ROWS, TILE_BYTES);
                _tile_dpbf16ps(1, 4, 6);
            }
            _tile_stored(0, left, stride);
            _tile_stored(1, right, stride);
        }
    }

    void finish(int64_t head, int64_t heads, float *out, float *lse) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < count; t++) {
                const int64_t at = (row + t) * in.shape.heads + head + h;
                const float sum = total[h * TILE_QUERIES + t], scale = sum == 0 ? 0.0f : 1 / sum;
                const float *from = sums_of(h) + t * value_width();
                for (int64_t d = 0; d < in.shape.value_width; d++) out[at * in.shape.value_width + d] = from[d] * scale;
                lse[at] = (peak[h * TILE_QUERIES + t] + std::log2(sum)) / LOG2_E;
            }
    }
};

#endif

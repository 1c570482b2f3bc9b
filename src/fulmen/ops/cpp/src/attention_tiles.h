// Attention of many bfloat16 queries over selected keys by matrix tiles (FlashAttention-2, arXiv 2307.08691).
//
// Up to 32 neighbouring queries read the union of what they select, and each counts only its own: neighbours select much
// alike, and a tile's product costs so little that even keys which one of them wants alone pay.
#pragma once

#include "attention.h"
#include "tiles.h"

#include <cfloat>
#include <cmath>

// Queries of a block: rows of two tiles.
constexpr int64_t TILE_QUERIES = 2 * TILE_ROWS;

#ifdef FULMEN_TILES

// The keys that some of a block's queries select, ascending, and for each which of the queries, as bits.
class KeyUnion {
    const __m512i FIRST_16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::vector<uint32_t> member;  // [S] and up to a whole vector; zero between calls
    int64_t n_keys = 0;

  public:
    // The first `size()`; what follows up to a whole vector has no query.
    std::vector<int32_t> positions;
    std::vector<uint32_t> queries;

    explicit KeyUnion(int64_t keys) : member(round_up(keys, 16)), positions(keys + 16), queries(keys + 16) {}

    int64_t size() const { return n_keys; }

    // Returns how many keys are selected, those of several queries as often.
    int64_t find(const int32_t *topk, int64_t count, int64_t width) {
        __m512i lowest = _mm512_set1_epi32(INT32_MAX), highest = _mm512_set1_epi32(-1);
        int64_t found = 0;
        for (int64_t t = 0; t < count; t++)
            for (int64_t i = 0; i < width; i += 16) {
                const __mmask16 inside = __mmask16(0xffff >> (16 - std::min<int64_t>(16, width - i)));
                const __m512i some = _mm512_mask_loadu_epi32(_mm512_set1_epi32(-1), inside, topk + t * width + i);
                const __mmask16 taken = _mm512_cmpge_epi32_mask(some, _mm512_setzero_si512());
                lowest = _mm512_mask_min_epi32(lowest, taken, lowest, some);
                highest = _mm512_max_epi32(highest, some);
                alignas(64) int32_t keys[16];
                _mm512_store_si512(keys, _mm512_maskz_compress_epi32(taken, some));
                const int64_t n = __builtin_popcount(taken);
                for (int64_t j = 0; j < n; j++) member[keys[j]] |= uint32_t(1) << t;
                found += n;
            }
        collect(_mm512_reduce_min_epi32(lowest), _mm512_reduce_max_epi32(highest));
        return found;
    }

  private:
    void collect(int32_t first, int32_t last) {
        int64_t size = 0;
        for (int64_t low = first / 16 * 16; low <= last; low += 16) {
            const __m512i some = _mm512_loadu_si512(member.data() + low);
            const __mmask16 wanted = _mm512_test_epi32_mask(some, some);
            const __m512i position = _mm512_add_epi32(_mm512_set1_epi32(int32_t(low)), FIRST_16);
            _mm512_storeu_si512(positions.data() + size, _mm512_maskz_compress_epi32(wanted, position));
            _mm512_storeu_si512(queries.data() + size, _mm512_maskz_compress_epi32(wanted, some));
            size += __builtin_popcount(wanted);
            _mm512_storeu_si512(member.data() + low, _mm512_setzero_si512());
        }
        _mm512_storeu_si512(queries.data() + size, _mm512_setzero_si512());
        n_keys = size;
    }
};

class TileAttention {
    // Keys of a step: of 128 numbers and as many values, packed, they take 64 KB of a core's level 2 cache.
    static constexpr int64_t KEYS = 128, KEY_VECTORS = KEYS / 16;
    // Queries that a key of the union must have, on average. Measured with random selections, in tiles of 16: at 4.2,
    // and 3 heads of 64, this takes as long as query by query; at 8, and 4 heads of 128, half of the time.
    static constexpr int64_t LEAST_ALIKE = 4;
    static constexpr int64_t SUMS_ROOM = 1 << 16;
    // Heads that pass through a step's products and weights together. A tile waits for what was just stored: by then
    // the others' weights are computed.
    static constexpr int64_t TOGETHER = 2;

    struct Query {
        __m512 total = _mm512_setzero_ps();  // of its weights, lane by lane
        // Finite, so that infinity is never subtracted from itself where no key counts yet.
        float peak = -FLT_MAX;
    };

    const AttentionInputs &in;
    const int64_t most_heads, d_chunks, v_tiles;  // 32 numbers of a key, 16 of a value (an even count)
    KeyUnion chosen;
    int64_t b = 0, row = 0, count = 0;  // the queries: their batch row, the first among all, how many
    // Left matrices [head][chunk of D][query], [head][chunk of 32 keys][query]; right ones [16 keys][chunk of D][pair of
    // D], [chunk of 32 keys][16 of V][pair of keys].
    std::unique_ptr<Line[]> q, probs, k, v;
    std::unique_ptr<Line[]> scores, sums;  // [head][query][key], [head][query][V]
    std::vector<Query> queries;            // [head][query]
    std::vector<__mmask16> visible;           // [16 keys of the union][query]
    std::vector<int64_t> k_places, v_places;  // of the union's rows in a head's keys and values
    std::vector<uint16_t> zeros;              // a row of values
    std::vector<int64_t> bad;                 // keys of this step whose values are not finite

    int64_t value_width() const { return v_tiles * 16; }
    float *sums_of(int64_t h) { return (float *)(sums.get() + h * TILE_QUERIES * v_tiles); }
    // Of one of the heads that are together.
    float *scores_of(int64_t slot) { return (float *)scores.get() + slot * TILE_QUERIES * KEYS; }
    Line *probs_of(int64_t slot) { return probs.get() + slot * KEYS / 32 * TILE_QUERIES; }

    static std::unique_ptr<Line[]> lines(int64_t count) { return std::unique_ptr<Line[]>(new Line[count]()); }

  public:
    explicit TileAttention(const AttentionInputs &in)
        : in(in), most_heads(std::clamp<int64_t>(SUMS_ROOM / (TILE_QUERIES * in.v.padded), 1, in.shared())),
          d_chunks((in.shape.width + 31) / 32), v_tiles(round_up(in.v.width, 32) / 16), chosen(in.shape.keys),
          q(lines(most_heads * d_chunks * TILE_QUERIES)), probs(lines(TOGETHER * KEYS / 32 * TILE_QUERIES)),
          k(lines(KEYS / 16 * d_chunks * TILE_ROWS)), v(lines(KEYS / 32 * v_tiles * TILE_ROWS)),
          scores(lines(TOGETHER * TILE_QUERIES * KEYS / 16)), sums(lines(most_heads * TILE_QUERIES * v_tiles)),
          queries(most_heads * TILE_QUERIES), zeros(value_width()) {}

    // Takes up the queries low <= t < high of batch row b. Whether they select enough alike for this to pay.
    bool choose(int64_t of_batch, int64_t low, int64_t high) {
        b = of_batch, row = b * in.shape.queries + low, count = high - low;
        const int64_t selected = chosen.find(in.chosen(row), count, in.shape.topk);
        if (LEAST_ALIKE * chosen.size() > selected) return false;
        find_seen();
        find_places();
        return true;
    }

    // Those queries, by the key heads from `first` on.
    void attend(int64_t first, int64_t groups, float scale, const Results &results) {
        for (int64_t g = first; g < first + groups; g++)
            for (int64_t h = 0; h < in.shared(); h += most_heads) {
                const int64_t heads = std::min(most_heads, in.shared() - h);
                begin(g * in.shared() + h, heads);
                for (int64_t i = 0; i < chosen.size(); i += KEYS) step(g, i, heads, scale * LOG2_E);
                finish(g * in.shared() + h, heads, results);
            }
    }

  private:
    int64_t query_tiles() const { return (count + TILE_ROWS - 1) / TILE_ROWS; }

    bool has_keys(int64_t t) const {
        const uint32_t bit = uint32_t(1) << t;
        const auto end = chosen.queries.begin() + chosen.size();
        return std::any_of(chosen.queries.begin(), end, [&](uint32_t of_key) { return of_key & bit; });
    }

    // The keys of each query as masks.
    void find_seen() {
        const int64_t vectors = (chosen.size() + 15) / 16;
        visible.assign(round_up(vectors, KEY_VECTORS) * TILE_QUERIES, 0);
        for (int64_t n = 0; n < vectors; n++) {
            const __m512i bits = _mm512_loadu_si512(chosen.queries.data() + n * 16);
            for (int64_t t = 0; t < count; t++)
                visible[n * TILE_QUERIES + t] = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(int32_t(uint32_t(1) << t)));
        }
    }

    void find_places() {
        k_places.resize(chosen.size()), v_places.resize(chosen.size());
        for (int64_t i = 0; i < chosen.size(); i++) {
            const int64_t at = in.row_of_key(b, chosen.positions[i]);
            k_places[i] = at * in.k.stride_s, v_places[i] = at * in.v.stride_s;
        }
    }

    void begin(int64_t head, int64_t heads) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t c = 0; c < d_chunks; c++) {
                const int64_t width = in.shape.width;
                const __mmask32 present = ~uint32_t(0) >> (32 - std::min<int64_t>(32, width - c * 32));
                for (int64_t t = 0; t < count; t++) {
                    const uint16_t *from = (const uint16_t *)in.q + ((row + t) * in.shape.heads + head + h) * width;
                    const __m512i numbers = _mm512_maskz_loadu_epi16(present, from + c * 32);
                    _mm512_store_si512(q.get() + (h * d_chunks + c) * TILE_QUERIES + t, numbers);
                }
            }
        std::fill_n(sums_of(0), heads * TILE_QUERIES * value_width(), 0.0f);
        std::fill(queries.begin(), queries.end(), Query{});
    }

    void step(int64_t g, int64_t first, int64_t heads, float scale) {
        const int64_t keys = std::min<int64_t>(KEYS, chosen.size() - first);
        pack_keys(g, first, keys);
        pack_values(g, first, keys);
        for (int64_t h = 0; h < heads; h += TOGETHER) {
            const int64_t some = std::min(TOGETHER, heads - h);
            for (int64_t i = 0; i < some; i++) {
                if (query_tiles() == 1) multiply_keys<1>(h + i, scores_of(i), keys);
                else multiply_keys<2>(h + i, scores_of(i), keys);
            }
            for (const int64_t key : bad)
                for (int64_t t = 0; t < some * TILE_QUERIES; t++) scores_of(0)[t * KEYS + key] = NAN;
            for (int64_t i = 0; i < some; i++)
                for (int64_t t = 0; t < count; t++) {
                    float *of_query = scores_of(i) + t * KEYS;
                    if (in.softcap) cap_logits(of_query, keys, scale, in.softcap * LOG2_E);
                    weigh(h + i, t, of_query, probs_of(i) + t, first, keys, in.softcap ? 1 : scale);
                }
            for (int64_t i = 0; i < some; i++) {
                if (query_tiles() == 1) add_values<1>(h + i, probs_of(i), keys);
                else add_values<2>(h + i, probs_of(i), keys);
            }
        }
    }

    void pack_keys(int64_t g, int64_t first, int64_t keys) {
        const uint16_t *base = in.k.head<uint16_t>(b, g);
        Line *to = k.get();
        for (int64_t low = 0; low < keys; low += 16)
            for (int64_t c = 0; c < d_chunks; c++, to += TILE_ROWS) {
                const __mmask32 present = ~uint32_t(0) >> (32 - std::min<int64_t>(32, in.shape.width - c * 32));
                __m512i rows[16] = {};
                for (int64_t i = 0; i < std::min<int64_t>(16, keys - low); i++)
                    rows[i] = _mm512_maskz_loadu_epi16(present, base + k_places[first + low + i] + c * 32);
                transpose_dwords(rows);
                for (int64_t r = 0; r < 16; r++) _mm512_store_si512(to + r, rows[r]);
            }
    }

    // Hidden values count as 0 times themselves, so that those that are not finite are taken out.
    void pack_values(int64_t g, int64_t first, int64_t keys) {
        const uint16_t *base = in.v.head<uint16_t>(b, g);
        bad.clear();
        __m512i low, high;  // where in two rows the pairs of 16 columns are
        for (int n = 0; n < 32; n++) {
            ((uint16_t *)&low)[n] = uint16_t(n / 2 + n % 2 * 32);
            ((uint16_t *)&high)[n] = uint16_t(16 + n / 2 + n % 2 * 32);
        }
        for (int64_t i = 0; i < round_up(keys, 32); i += 2) {
            const uint16_t *left = i < keys ? base + v_places[first + i] : zeros.data();
            const uint16_t *right = i + 1 < keys ? base + v_places[first + i + 1] : zeros.data();
            Line *to = &v[i / 32 * v_tiles * TILE_ROWS + i % 32 / 2];
            for (int64_t c = 0; c < v_tiles; c += 2, to += 2 * TILE_ROWS) {
                const __mmask32 present = ~uint32_t(0) >> (32 - std::min<int64_t>(32, in.shape.value_width - c * 16));
                __m512i even = _mm512_maskz_loadu_epi16(present, left + c * 16);
                __m512i odd = _mm512_maskz_loadu_epi16(present, right + c * 16);
                const __mmask32 nan_even = not_finite(even), nan_odd = not_finite(odd);
                if (__builtin_expect(nan_even | nan_odd, 0)) {
                    if (nan_even) bad.push_back(i), even = _mm512_maskz_mov_epi16(~nan_even, even);
                    if (nan_odd) bad.push_back(i + 1), odd = _mm512_maskz_mov_epi16(~nan_odd, odd);
                }
                _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_store_si512(to + TILE_ROWS, _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }

    static __mmask32 not_finite(__m512i numbers) {
        const __m512i exponent = _mm512_set1_epi16(0x7f80);
        return _mm512_cmpeq_epi16_mask(_mm512_and_si512(numbers, exponent), exponent);
    }

    // Scores of one head and T tiles of queries, two vectors of keys at a time.
    template <int T> void multiply_keys(int64_t h, float *to, int64_t keys) {
        const Line *queries = q.get() + h * d_chunks * TILE_QUERIES;
        settle_memory();
        for (int64_t n = 0; n < (keys + 15) / 16; n += 2) {
            const Line *left = k.get() + n * d_chunks * TILE_ROWS, *right = left + d_chunks * TILE_ROWS;
            zero_tiles<T>();
            for (int64_t c = 0; c < d_chunks; c++)
                add_to_queries<T>(queries + c * TILE_QUERIES, left + c * TILE_ROWS, right + c * TILE_ROWS);
            store_tiles<T>(to + n * 16, KEYS);
        }
    }

    template <int T> static void add_to_queries(const Line *rows, const Line *left, const Line *right) {
        add_products<T>(rows, rows + TILE_ROWS, TILE_BYTES, left, right);
    }

    template <int T> static void load_tiles(const float *from, int64_t stride) {
        _tile_loadd(0, from, stride * sizeof(float));
        _tile_loadd(1, from + 16, stride * sizeof(float));
        if constexpr (T > 1) {
            _tile_loadd(2, from + TILE_ROWS * stride, stride * sizeof(float));
            _tile_loadd(3, from + TILE_ROWS * stride + 16, stride * sizeof(float));
        }
    }

    // One query's scores to weights; sums so far fade if the peak rises.
    void weigh(int64_t h, int64_t t, const float *from, Line *to, int64_t first, int64_t keys, float scale) {
        const int64_t vectors = round_up(keys, 32) / 16;
        const __mmask16 *of_query = visible.data() + first / 16 * TILE_QUERIES + t;
        Query &query = queries[h * TILE_QUERIES + t];
        const __m512 hidden = _mm512_set1_ps(-INFINITY), factor = _mm512_set1_ps(scale);
        __m512 x[KEY_VECTORS], highest = _mm512_set1_ps(query.peak);
        for (int64_t n = 0; n < vectors; n++) {
            x[n] = _mm512_mask_mul_ps(hidden, of_query[n * TILE_QUERIES], _mm512_load_ps(from + n * 16), factor);
            highest = _mm512_max_ps(x[n], highest);  // the second, where the first is NaN
        }
        if (_mm512_cmp_ps_mask(highest, _mm512_set1_ps(query.peak), _CMP_GT_OQ))
            raise(query, sums_of(h) + t * value_width(), _mm512_reduce_max_ps(highest));
        const __m512 peak = _mm512_set1_ps(query.peak);
        __m512 total = query.total;  // in a register
        for (int64_t n = 0; n < vectors; n += 2, to += TILE_QUERIES) {
            const __m512 even = weight_of(of_query[n * TILE_QUERIES], x[n], peak);
            const __m512 odd = weight_of(of_query[(n + 1) * TILE_QUERIES], x[n + 1], peak);
            total = _mm512_add_ps(total, _mm512_add_ps(even, odd));
            _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        }
        query.total = total;
    }

    static __m512 weight_of(__mmask16 visible, __m512 x, __m512 peak) {
        return _mm512_maskz_mov_ps(visible, (__m512)exp2_vec((Vec)_mm512_sub_ps(x, peak)));
    }

    void raise(Query &query, float *row, float peak) const {
        const Vec fade = exp2_vec(broadcast(query.peak - peak));
        query.peak = peak;
        query.total = _mm512_mul_ps(query.total, (__m512)fade);
        for (int64_t d = 0; d < value_width(); d += LANES) store(row + d, load(row + d) * fade);
    }

    template <int T> void add_values(int64_t h, const Line *weights, int64_t keys) {
        settle_memory();
        for (int64_t c = 0; c < v_tiles; c += 2) {
            float *to = sums_of(h) + c * 16;
            load_tiles<T>(to, value_width());
            for (int64_t i = 0; i < (keys + 31) / 32; i++) {
                const Line *values = v.get() + (i * v_tiles + c) * TILE_ROWS;
                add_to_queries<T>(weights + i * TILE_QUERIES, values, values + TILE_ROWS);
            }
            store_tiles<T>(to, value_width());
        }
    }

    void finish(int64_t head, int64_t heads, const Results &results) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t t = 0; t < count; t++) {
                const Query &query = queries[h * TILE_QUERIES + t];
                const int64_t at = (row + t) * in.shape.heads + head + h;
                const float total = _mm512_reduce_add_ps(query.total);
                results.write(at, sums_of(h) + t * value_width(), total, query.peak, total == 0 && has_keys(t));
            }
    }
};

#endif

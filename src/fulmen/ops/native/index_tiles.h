// Index scores of packed keys by products of integers: exact, so that no order of addition exists to depend on.
//
// The keys' levels are integers as they lie in the cache. A query's numbers become integers of 24 bits, in units of
// 2^-23 of a power of 2 above its largest, which is what float32 keeps of that one; each is three digits of 8 bits.
// Only what follows the sums is rounded: digits to one number, scales, shift, ReLU, weight, heads one after the other.
#pragma once

#include "index_inputs.h"

#ifdef FULMEN_TILES
#include <cfloat>
#include <cmath>

// E is cut into chunks that a tile's row has room for.
struct Chunks {
    int64_t count, bytes;

    explicit Chunks(int64_t width)
        : count((width + TILE_BYTES - 1) / TILE_BYTES), bytes(round_up((width + count - 1) / count, 4)) {}
    int64_t rows() const { return bytes / 4; }
};

// A query's numbers as integers: so many times a power of 2.
struct Fixed {
    float times, factor;  // the power, and what undoes it

    Fixed(const float *q, int64_t width) : times(0), factor(0) {
        // The largest that three digits of -128..127 hold.
        constexpr float LARGEST = 127 * 65536 + 127 * 256 + 127;
        float peak = 0;
        bool finite = true;
        for (int64_t e = 0; e < width; e++) {
            const float size = std::abs(q[e]);
            finite &= size <= FLT_MAX;
            peak = size > peak ? size : peak;
        }
        if (!finite) factor = NAN;  // spoils every score of this query
        if (!finite || peak == 0) return;
        int power;
        std::frexp(peak, &power);
        power = std::min(23 - power, 126);  // of a query below 2^-103 less is kept
        if (std::ldexp(peak, power) > LARGEST) power--;
        times = std::ldexp(1.0f, power);
        factor = std::ldexp(1.0f, -power);
    }
};

class TileScorer {
    static constexpr int64_t DIGITS = 3, MOST_ROWS = 32, VECTORS = TILE / 16;

    struct Pair {
        int64_t row;
        float factor, w, b;
    };
    // Up to 16 pairs of a query and a head that reads this key head. Their digits are the rows of a left matrix: all
    // first digits, all second, all third, in as few tiles as that takes.
    struct Group {
        int64_t key_head, tiles;
        std::vector<Pair> pairs;
        std::unique_ptr<Line[]> digits;  // [chunk][row]
    };

    const IndexInputs &in;
    const Chunks chunks;
    std::vector<Group> groups;

  public:
    class Scope {
        TileScope tiles;

      public:
        explicit Scope(const IndexInputs &in) : tiles(config(in)) {}
    };

    static constexpr int64_t ROWS_AT_ONCE = 1;

    // Queries of a block, if the scores of so many fit.
    static int64_t block_rows(int64_t fit) { return std::clamp<int64_t>(fit / 16 * 16, 16, MOST_ROWS); }
    static int64_t tile_lines(const IndexInputs &in) { return in.shape.key_heads * head_lines(Chunks(in.shape.width)); }

    TileScorer(const IndexInputs &in, const QueryRows &block) : in(in), chunks(in.shape.width) {
        const int64_t n_rows = block.rows.size(), all = n_rows * in.shared();
        const int64_t parts = (all + TILE_ROWS - 1) / TILE_ROWS, size = (all + parts - 1) / parts;
        for (int64_t i = 0; i < in.shape.key_heads; i++)
            for (int64_t low = 0; low < all; low += size) {
                const int64_t count = std::min(size, all - low), tiles = (DIGITS * count + TILE_ROWS - 1) / TILE_ROWS;
                Group group{i, tiles, {}, std::unique_ptr<Line[]>(new Line[chunks.count * tiles * TILE_ROWS]())};
                // Head after head: a query's heads are added in their order.
                for (int64_t p = 0; p < count; p++)
                    add_pair(group, count, block, (low + p) % n_rows, i * in.shared() + (low + p) / n_rows);
                groups.push_back(std::move(group));
            }
    }

    // Tile of keys to [key head]: [vector of keys][chunk][4 E][key][4], then the scales; zero beyond the last key.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        const Chunks chunks(in.shape.width);
        const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, in.shape.keys - first);
        const int8_t *rows[TILE];
        for (int64_t c = 0; c < count; c++) rows[c] = in.key<int8_t>(batch, first + c, 0);
        for (int64_t i = 0; i < in.shape.key_heads; i++, to += head_lines(chunks)) {
            float *scales = (float *)(to + VECTORS * chunks.count * chunks.rows());
            for (int64_t v = 0; v < VECTORS; v++) {
                const int64_t some = std::clamp<int64_t>(count - v * 16, 0, 16);
                pack_vector(in.shape, chunks, rows + v * 16, some, i, to + v * chunks.count * chunks.rows(), scales + v * 16);
            }
        }
    }

    // Scores of the block's queries for one tile, into rows `stride` apart.
    void score(const Line *tile, int64_t n_rows, float *scores, int64_t stride) const {
        // Summed here: rows far apart would push each other out of the level 1 cache, head after head.
        alignas(64) float total[MOST_ROWS * TILE] = {};
        for (const Group &group : groups) {
            const Line *keys = tile + group.key_head * head_lines(chunks);
            const float *scales = (const float *)(keys + VECTORS * chunks.count * chunks.rows());
            for (int64_t v = 0; v < VECTORS; v++) {
                alignas(64) int32_t sums[DIGITS * TILE_ROWS * 16];
                multiply(group, keys + v * chunks.count * chunks.rows(), sums);
                add_heads(group, sums, scales + v * 16, total + v * 16);
            }
        }
        for (int64_t r = 0; r < n_rows; r++) std::copy_n(total + r * TILE, TILE, scores + r * stride);
    }

  private:
    static int64_t head_lines(const Chunks &chunks) {
        return VECTORS * chunks.count * chunks.rows() + TILE * int64_t(sizeof(float)) / TILE_BYTES;
    }

    // Tiles 0 to 2: sums, 3 to 5: queries, 6: keys.
    static TileConfig config(const IndexInputs &in) {
        const Chunks chunks(in.shape.width);
        TileConfig config;
        for (int t = 0; t < DIGITS; t++) {
            config.set(t, TILE_ROWS, TILE_BYTES);
            config.set(DIGITS + t, TILE_ROWS, chunks.bytes);
        }
        config.set(2 * DIGITS, chunks.rows(), TILE_BYTES);
        return config;
    }

    void add_pair(Group &group, int64_t count, const QueryRows &block, int64_t row, int64_t head) {
        const int64_t width = in.shape.width, from = block.rows[row] * in.shape.heads + head;
        const int64_t place = group.pairs.size();
        const Fixed fixed(in.q + from * width, width);
        group.pairs.push_back({row, fixed.factor, in.w[from], in.b ? in.b[from] : 0.0f});
        Line *rows = group.digits.get() + place;
        for (int64_t c = 0; c < chunks.count; c++, rows += group.tiles * TILE_ROWS)
            for (int64_t low = 0, e; low < chunks.bytes && (e = c * chunks.bytes + low) < width; low += 16) {
                const int64_t numbers = std::min<int64_t>({16, chunks.bytes - low, width - e});
                write_digits(in.q + from * width + e, fixed.times, numbers, rows->bytes + low, count);
            }
    }

    // Up to 16 numbers' first, second and third digits, `count` lines apart.
    static void write_digits(const float *q, float times, int64_t numbers, char *to, int64_t count) {
        const __mmask16 present = __mmask16(0xffff >> (16 - numbers));
        const auto last_digit = [](__m512i x) { return _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24); };
        const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(present, q), _mm512_set1_ps(times));
        const __m512i whole = _mm512_cvtps_epi32(scaled), third = last_digit(whole);
        const __m512i rest = _mm512_srai_epi32(_mm512_sub_epi32(whole, third), 8), second = last_digit(rest);
        const __m512i digits[DIGITS] = {_mm512_srai_epi32(_mm512_sub_epi32(rest, second), 8), second, third};
        for (int64_t d = 0; d < DIGITS; d++)
            _mm512_mask_cvtepi32_storeu_epi8(to + d * count * TILE_BYTES, present, digits[d]);
    }

    // 16 keys of a head, the rows' first `count`.
    static void pack_vector(const IndexShape &shape, const Chunks &chunks, const int8_t *const *keys, int64_t count,
                            int64_t head, Line *to, float *scales) {
        for (int64_t c = 0; c < chunks.count; c++, to += chunks.rows()) {
            const int64_t low = c * chunks.bytes, bytes = std::min(shape.width - low, chunks.bytes);
            // The scale behind the last levels comes along where there is room; queries are zero there.
            const bool with_scale = c == chunks.count - 1 && bytes + 2 <= TILE_BYTES;
            const __mmask64 present = ~uint64_t(0) >> (TILE_BYTES - bytes - (with_scale ? 2 : 0));
            __m512i rows[16] = {};
            for (int64_t s = 0; s < count; s++)
                rows[s] = _mm512_maskz_loadu_epi8(present, keys[s] + head * shape.k_stride_i + low);
            transpose_dwords(rows);
            for (int64_t r = 0; r < chunks.rows(); r++) _mm512_store_si512(to + r, rows[r]);
            if (with_scale) {
                const __m512i last = rows[bytes / 4], high = _mm512_set1_epi32(0xffff0000);
                _mm512_store_si512(scales, bytes % 4 ? _mm512_and_si512(last, high) : _mm512_slli_epi32(last, 16));
            } else if (c == chunks.count - 1)
                for (int64_t s = 0; s < 16; s++)
                    scales[s] = s < count ? scale_of_packed(keys[s] + head * shape.k_stride_i, shape.width) : 0.0f;
        }
    }

    void multiply(const Group &group, const Line *keys, int32_t *sums) const {
        switch (group.tiles) {
        case 1: multiply_tiles<1>(group, keys, sums); break;
        case 2: multiply_tiles<2>(group, keys, sums); break;
        default: multiply_tiles<3>(group, keys, sums);
        }
    }

    // The compiler takes tiles by number only.
    template <int T> void multiply_tiles(const Group &group, const Line *keys, int32_t *sums) const {
        const Line *digits = group.digits.get();
        settle_memory();
        _tile_zero(0);
        if constexpr (T > 1) _tile_zero(1);
        if constexpr (T > 2) _tile_zero(2);
        for (int64_t c = 0; c < chunks.count; c++, digits += T * TILE_ROWS, keys += chunks.rows()) {
            _tile_loadd(6, keys, TILE_BYTES);
            _tile_loadd(3, digits, TILE_BYTES);
            _tile_dpbssd(0, 3, 6);
            if constexpr (T > 1) {
                _tile_loadd(4, digits + TILE_ROWS, TILE_BYTES);
                _tile_dpbssd(1, 4, 6);
            }
            if constexpr (T > 2) {
                _tile_loadd(5, digits + 2 * TILE_ROWS, TILE_BYTES);
                _tile_dpbssd(2, 5, 6);
            }
        }
        _tile_stored(0, sums, TILE_BYTES);
        if constexpr (T > 1) _tile_stored(1, sums + 256, TILE_BYTES);
        if constexpr (T > 2) _tile_stored(2, sums + 512, TILE_BYTES);
    }

    static void add_heads(const Group &group, const int32_t *sums, const float *scales, float *total) {
        const int64_t count = group.pairs.size();
        const __m512 scale = _mm512_load_ps(scales), none = _mm512_setzero_ps();
        const __m512 first = _mm512_set1_ps(65536), second = _mm512_set1_ps(256);
        for (int64_t p = 0; p < count; p++) {
            const Pair &pair = group.pairs[p];
            const auto digit = [&](int64_t d) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums + (d * count + p) * 16)); };
            const __m512 whole = _mm512_fmadd_ps(digit(0), first, _mm512_fmadd_ps(digit(1), second, digit(2)));
            const __m512 product = _mm512_mul_ps(whole, _mm512_set1_ps(pair.factor));
            const __m512 logit = _mm512_fmadd_ps(product, scale, _mm512_set1_ps(pair.b));
            const __m512 relu = _mm512_max_ps(none, logit);  // NaN, as the second of the two, stays
            float *at = total + pair.row * TILE;
            _mm512_store_ps(at, _mm512_fmadd_ps(relu, _mm512_set1_ps(pair.w), _mm512_load_ps(at)));
        }
    }
};
#endif

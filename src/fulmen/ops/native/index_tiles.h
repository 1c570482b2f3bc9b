// Index scores of packed keys by matrix tiles: one query over many keys, or many queries over many keys.
//
// Keys' levels are integers up to 127, which bfloat16 holds; queries are cut into terms that it holds, one if they are
// bfloat16 already, else three. A product's sum over E runs in one order in both scorers, heads are added one after the
// other, and what else a tile computes does not matter: a score has the same bits in decoding and in prompts.
#pragma once

#include "index_inputs.h"

#ifdef FULMEN_TILES
#include <cmath>

// How E is cut. Up to 32 numbers are one chunk: a tile's row of bfloat16. More are cut into blocks, a vector of levels
// each, and every block into two chunks: one holds every other 8 numbers, as instructions that widen bytes leave them.
struct Chunks {
    int64_t width, per_block, blocks, block_width;

    explicit Chunks(int64_t width)
        : width(width), per_block(width > TILE_BYTES / 2 ? 2 : 1), blocks((width + TILE_BYTES - 1) / TILE_BYTES),
          block_width(round_up((width + blocks - 1) / blocks, 8 * per_block)) {}

    int64_t count() const { return per_block * blocks; }
    int64_t bytes() const { return 2 * block_width / per_block; }
    int64_t rows() const { return bytes() / 4; }
};

// 64 levels to bfloat16, by tables of its two bytes for every size.
class Widening {
    __m512i high_bytes[2], low_bytes[2];

    Widening() {
        for (int size = 0; size < 128; size++) {
            const float number = float(size);
            uint32_t bits;
            std::memcpy(&bits, &number, sizeof bits);
            ((uint8_t *)high_bytes)[size] = uint8_t(bits >> 24), ((uint8_t *)low_bytes)[size] = uint8_t(bits >> 16);
        }
    }

    void widen(__m512i levels, __m512i &first, __m512i &second) const {
        const __m512i size = _mm512_abs_epi8(levels), sign = _mm512_set1_epi8(char(0x80));
        const __m512i low = _mm512_permutex2var_epi8(low_bytes[0], size, low_bytes[1]);
        __m512i high = _mm512_permutex2var_epi8(high_bytes[0], size, high_bytes[1]);
        high = _mm512_ternarylogic_epi32(high, levels, sign, 0xf8);  // high | (levels & sign)
        first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    }

  public:
    // The levels of a head of `count` keys to rows [chunk][key] of their numbers.
    static void widen_keys(const int8_t *const *keys, int64_t count, int64_t at, const Chunks &chunks, Line *to) {
        static const Widening shared;
        const Widening widening = shared;  // in registers
        // 8 levels to each lane of 16, whose first half is all that a single chunk takes.
        const __m512i spread = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        for (int64_t block = 0; block < chunks.blocks; block++, to += chunks.per_block * TILE_ROWS) {
            const int64_t low = block * chunks.block_width, some = std::min(chunks.block_width, chunks.width - low);
            const __mmask64 present = ~uint64_t(0) >> (TILE_BYTES - some);
            for (int64_t s = 0; s < count; s++) {
                __m512i levels = _mm512_maskz_loadu_epi8(present, keys[s] + at + low), first, second;
                if (chunks.per_block == 1) levels = _mm512_permutexvar_epi64(spread, levels);
                widening.widen(levels, first, second);
                _mm512_store_si512(to + s, first);
                if (chunks.per_block == 2) _mm512_store_si512(to + TILE_ROWS + s, second);
            }
        }
    }
};

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

    // Terms of up to 8 numbers, `stride` apart.
    static void write(const float *x, int64_t count, int64_t terms, uint16_t *to, int64_t stride) {
        __m256 left = _mm256_maskz_loadu_ps(__mmask8(0xff >> (8 - count)), x);
        for (int64_t t = 0; t < terms; t++, to += stride) {
            const __m256i bits = _mm256_and_si256((__m256i)left, _mm256_set1_epi32(int(HIGH)));
            left = _mm256_sub_ps(left, (__m256)bits);  // exact; of infinity: NaN, in further terms
            _mm_storeu_si128((__m128i *)to, _mm256_cvtepi32_epi16(_mm256_srli_epi32(bits, 16)));
        }
    }

    // Of a query's numbers, to [term][chunk] rows, `stride` lines apart.
    static void write_row(const float *q, const Chunks &chunks, int64_t terms, Line *to, int64_t stride) {
        const int64_t per_term = chunks.count() * stride * (TILE_BYTES / 2);
        for (int64_t block = 0; block < chunks.blocks; block++, to += chunks.per_block * stride) {
            const int64_t first = block * chunks.block_width, some = std::min(chunks.block_width, chunks.width - first);
            for (int64_t low = 0; low < some; low += 8) {
                const int64_t eight = low / 8, chunk = eight % chunks.per_block;
                uint16_t *at = (uint16_t *)to[chunk * stride].bytes + eight / chunks.per_block * 8;
                write(q + first + low, std::min<int64_t>(8, some - low), terms, at, per_term);
            }
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

// Of 16 keys and one head: their scales, times E^-1/2; 0 where there is no key.
static inline void write_scales(const IndexInputs &in, const int8_t *const *keys, int64_t count, int64_t head, float *to) {
    const int64_t at = head * in.shape.k_stride_i + in.shape.width;
    alignas(64) uint32_t bits[16] = {};
    for (int64_t s = 0; s < count; s++) {
        uint16_t some;
        std::memcpy(&some, keys[s] + at, sizeof some);
        bits[s] = uint32_t(some) << 16;
    }
    _mm512_store_ps(to, _mm512_mul_ps((__m512)_mm512_load_si512(bits), _mm512_set1_ps(in.factor)));
}

// One more head to the scores of 16 keys.
static inline __m512 add_head(__m512 total, __m512 product, __m512 scale, float w, float b) {
    const __m512 logit = _mm512_fmadd_ps(product, scale, _mm512_set1_ps(b));
    const __m512 relu = _mm512_max_ps(_mm512_setzero_ps(), logit);  // NaN, as the second of the two, stays
    return _mm512_fmadd_ps(relu, _mm512_set1_ps(w), total);
}

// One query: 16 keys are the rows of a left matrix, as they lie in the cache, and the query's heads the columns of a
// right one. Heads of several key heads share a product: elsewhere a column is zero.
class QueryScorer {
    static constexpr int64_t VECTORS = TILE / 16;

    struct Group {
        int64_t first_head, heads, first_key_head, key_heads;
        std::unique_ptr<Line[]> columns;  // [key head][term][chunk][pair of numbers]
    };

    const IndexInputs &in;
    const QueryRows &query;
    const Chunks chunks;
    const int64_t terms;
    std::vector<Group> groups;

  public:
    using Scope = IndexTileScope;
    static constexpr int64_t ROWS_AT_ONCE = 1;

    static int64_t block_rows(int64_t) { return 1; }
    static int64_t tile_lines(const IndexInputs &in) { return in.shape.key_heads * head_lines(Chunks(in.shape.width)); }

    QueryScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), query(block), chunks(in.shape.width), terms(Terms::needed(query.q.data(), query.q.size())) {
        const int64_t shared = in.shared(), together = std::max<int64_t>(TILE_ROWS / shared, 1);
        for (int64_t i = 0; i < in.shape.key_heads; i += together) {
            const int64_t key_heads = std::min(together, in.shape.key_heads - i);
            for (int64_t m = 0; m < key_heads * shared; m += TILE_ROWS)
                add_group(i * shared + m, std::min(TILE_ROWS, key_heads * shared - m), i, key_heads);
        }
    }

    // Tile of keys to [vector of keys][key head]: [chunk][key], then the scales; zero beyond the last key.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        const Chunks chunks(in.shape.width);
        const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, in.shape.keys - first);
        const int8_t *rows[TILE];
        for (int64_t c = 0; c < count; c++) rows[c] = in.key<int8_t>(batch, first + c, 0);
        for (int64_t v = 0; v < VECTORS; v++)
            for (int64_t i = 0; i < in.shape.key_heads; i++, to += vector_lines(chunks)) {
                const int64_t some = std::clamp<int64_t>(count - v * 16, 0, 16);
                Widening::widen_keys(rows + v * 16, some, i * in.shape.k_stride_i, chunks, to);
                // Rows without a key are whatever was there: their scores are not used.
                write_scales(in, rows + v * 16, some, i, (float *)(to + chunks.count() * TILE_ROWS));
            }
    }

    void score(const Line *tile, int64_t, float *scores, int64_t) const {
        const int64_t lines = vector_lines(chunks), stride = in.shape.key_heads * lines;
        __m512 total[VECTORS] = {};
        for (const Group &group : groups) {
            __m512i sums[VECTORS][TILE_ROWS];
            multiply(group, tile + group.first_key_head * lines, stride, sums[0]);
            for (int64_t v = 0; v < VECTORS; v++) {
                transpose_dwords(sums[v]);
                for (int64_t m = 0; m < group.heads; m++) {
                    const int64_t head = group.first_head + m;
                    const Line *scales = tile + v * stride + head / in.shared() * lines + chunks.count() * TILE_ROWS;
                    const __m512 scale = _mm512_load_ps(scales);
                    total[v] = add_head(total[v], (__m512)sums[v][m], scale, query.w[head], query.b[head]);
                }
            }
        }
        for (int64_t v = 0; v < VECTORS; v++) _mm512_storeu_ps(scores + v * 16, total[v]);
    }

  private:
    static int64_t vector_lines(const Chunks &chunks) { return chunks.count() * TILE_ROWS + 1; }
    static int64_t head_lines(const Chunks &chunks) { return VECTORS * vector_lines(chunks); }

    void add_group(int64_t first_head, int64_t heads, int64_t first_key_head, int64_t key_heads) {
        const int64_t per_chunk = chunks.rows(), per_term = chunks.count() * per_chunk;
        Group group{first_head, heads, first_key_head, key_heads,
                    std::unique_ptr<Line[]>(new Line[key_heads * terms * per_term]())};
        std::unique_ptr<Line[]> rows(new Line[terms * chunks.count() * TILE_ROWS]);
        for (int64_t i = 0; i < key_heads; i++) {
            std::fill_n(rows.get(), terms * chunks.count() * TILE_ROWS, Line{});
            for (int64_t m = 0; m < heads; m++) {
                const float *q = query.q.data() + (first_head + m) * chunks.width;
                if ((first_head + m) / in.shared() == first_key_head + i)
                    Terms::write_row(q, chunks, terms, rows.get() + m, TILE_ROWS);
            }
            for (int64_t c = 0; c < terms * chunks.count(); c++) {
                __m512i *numbers = (__m512i *)(rows.get() + c * TILE_ROWS);
                transpose_dwords(numbers);
                std::copy_n(numbers, per_chunk, (__m512i *)(group.columns.get() + i * terms * per_term + c * per_chunk));
            }
        }
        groups.push_back(std::move(group));
    }

    // Sums [vector of keys][key][head], of tiles whose vectors are `stride` lines apart.
    void multiply(const Group &group, const Line *keys, int64_t stride, __m512i *sums) const {
        const Line *columns = group.columns.get();
        static_assert(VECTORS == 4, "a tile of sums for each");
        settle_memory();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t i = 0; i < group.key_heads; i++, keys += vector_lines(chunks))
            for (int64_t t = 0; t < terms; t++)
                for (int64_t c = 0; c < chunks.count(); c++, columns += chunks.rows()) {
                    const Line *some = keys + c * TILE_ROWS;
                    _tile_loadd(6, columns, TILE_BYTES);
                    _tile_loadd(4, some, TILE_BYTES);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_loadd(5, some + stride, TILE_BYTES);
                    _tile_dpbf16ps(1, 5, 6);
                    _tile_loadd(4, some + 2 * stride, TILE_BYTES);
                    _tile_dpbf16ps(2, 4, 6);
                    _tile_loadd(5, some + 3 * stride, TILE_BYTES);
                    _tile_dpbf16ps(3, 5, 6);
                }
        _tile_stored(0, sums, TILE_BYTES);
        _tile_stored(1, sums + TILE_ROWS, TILE_BYTES);
        _tile_stored(2, sums + 2 * TILE_ROWS, TILE_BYTES);
        _tile_stored(3, sums + 3 * TILE_ROWS, TILE_BYTES);
        settle_memory();
    }
};

// Many queries: 16 of them, of one head, are the rows of a left matrix, 16 keys the columns of a right one.
class BlockScorer {
    static constexpr int64_t MOST_ROWS = 2 * TILE_ROWS, VECTORS = TILE / 16, SUMS = TILE_ROWS * 16;
    // Heads whose products are computed before the first is added: a sum is not read while its tile is being stored.
    static constexpr int64_t TOGETHER = 4;

    const IndexInputs &in;
    const Chunks chunks;
    const int64_t tiles;  // of queries: one or two
    int64_t terms = 1;
    std::unique_ptr<Line[]> numbers;  // [head][tile][term][chunk][query]
    std::vector<float> w, b;          // [head][query]

    int64_t query_lines() const { return terms * chunks.count() * TILE_ROWS; }

  public:
    using Scope = IndexTileScope;
    static constexpr int64_t ROWS_AT_ONCE = 1;

    // Queries of a block, if the scores of so many fit.
    static int64_t block_rows(int64_t fit) { return std::clamp<int64_t>(fit / 16 * 16, 16, MOST_ROWS); }
    static int64_t tile_lines(const IndexInputs &in) { return in.shape.key_heads * head_lines(Chunks(in.shape.width)); }

    BlockScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), chunks(in.shape.width), tiles((int64_t(block.rows.size()) + TILE_ROWS - 1) / TILE_ROWS),
          w(in.shape.heads * MOST_ROWS), b(w.size()) {
        const int64_t heads = in.shape.heads;
        terms = Terms::needed(block.q.data(), block.q.size());
        numbers.reset(new Line[heads * tiles * query_lines()]);
        // Where a tile is whole, every number that is read is written.
        const bool whole = block.rows.size() % TILE_ROWS == 0 && chunks.width == chunks.blocks * chunks.block_width;
        if (!whole) std::fill_n(numbers.get(), heads * tiles * query_lines(), Line{});
        for (int64_t j = 0; j < heads; j++)
            for (int64_t r = 0; r < int64_t(block.rows.size()); r++) {
                const int64_t from = r * heads + j;
                w[j * MOST_ROWS + r] = block.w[from], b[j * MOST_ROWS + r] = block.b[from];
                Line *to = numbers.get() + (j * tiles + r / TILE_ROWS) * query_lines() + r % TILE_ROWS;
                Terms::write_row(block.q.data() + from * chunks.width, chunks, terms, to, TILE_ROWS);
            }
    }

    // Tile of keys to [key head]: [vector of keys][chunk][pair of numbers][key], then the scales; zero beyond the last.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        const Chunks chunks(in.shape.width);
        const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, in.shape.keys - first);
        const int8_t *rows[TILE];
        for (int64_t c = 0; c < count; c++) rows[c] = in.key<int8_t>(batch, first + c, 0);
        std::unique_ptr<Line[]> room(new Line[chunks.count() * TILE_ROWS]());
        for (int64_t i = 0; i < in.shape.key_heads; i++, to += head_lines(chunks))
            for (int64_t v = 0; v < VECTORS; v++) {
                const int64_t some = std::clamp<int64_t>(count - v * 16, 0, 16);
                Widening::widen_keys(rows + v * 16, some, i * in.shape.k_stride_i, chunks, room.get());
                for (int64_t c = 0; c < chunks.count(); c++) {
                    __m512i *numbers = (__m512i *)(room.get() + c * TILE_ROWS);
                    transpose_dwords(numbers);
                    std::copy_n(numbers, chunks.rows(), (__m512i *)(to + (v * chunks.count() + c) * chunks.rows()));
                }
                write_scales(in, rows + v * 16, some, i, (float *)(to + VECTORS * vector_lines(chunks) + v));
            }
    }

    // Scores of the block's queries for one tile, into rows `stride` apart.
    void score(const Line *tile, int64_t n_rows, float *scores, int64_t stride) const {
        for (int64_t v = 0; v < VECTORS; v += 2) {
            // Summed here: rows far apart would push each other out of the level 1 cache, head after head.
            alignas(64) float total[MOST_ROWS * 32] = {};
            for (int64_t j = 0; j < in.shape.heads; j += in.shared()) {
                const Line *keys = tile + j / in.shared() * head_lines(chunks);
                const float *scales = (const float *)(keys + VECTORS * vector_lines(chunks)) + v * 16;
                add_heads(j, keys + v * vector_lines(chunks), scales, total);
            }
            for (int64_t r = 0; r < n_rows; r++)
                for (int64_t half = 0; half < 2; half++) {
                    const __m512 some = _mm512_load_ps(total + r * 32 + half * 16);
                    _mm512_storeu_ps(scores + r * stride + (v + half) * 16, some);
                }
        }
    }

  private:
    static int64_t vector_lines(const Chunks &chunks) { return chunks.count() * chunks.rows(); }
    static int64_t head_lines(const Chunks &chunks) { return VECTORS * (vector_lines(chunks) + 1); }

    // All heads of a key head to the scores of two vectors of keys.
    void add_heads(int64_t first, const Line *keys, const float *scales, float *total) const {
        alignas(64) float sums[TOGETHER * 4 * SUMS];
        for (int64_t j = first; j < first + in.shared(); j += TOGETHER) {
            const int64_t some = std::min(TOGETHER, first + in.shared() - j);
            for (int64_t i = 0; i < some; i++) {
                if (tiles == 1) multiply<1>(j + i, keys, sums + i * 4 * SUMS);
                else multiply<2>(j + i, keys, sums + i * 4 * SUMS);
            }
            for (int64_t t = 0; t < tiles; t++) {
                float *to = total + t * TILE_ROWS * 32;
                const float *from = sums + 2 * t * SUMS;
                if (some == 1) add_tile<1>(j, t, from, scales, to);
                else if (some == 2) add_tile<2>(j, t, from, scales, to);
                else if (some == 3) add_tile<3>(j, t, from, scales, to);
                else add_tile<4>(j, t, from, scales, to);
            }
        }
    }

    // Of T tiles of queries and two vectors of keys: sums [tile][vector][query][key].
    template <int T> void multiply(int64_t head, const Line *keys, float *sums) const {
        const Line *left = numbers.get() + head * tiles * query_lines(), *other = left + query_lines();
        settle_memory();
        zero_tiles<T>();
        for (int64_t t = 0; t < terms; t++)
            for (int64_t c = 0; c < chunks.count(); c++, left += TILE_ROWS, other += TILE_ROWS) {
                const Line *columns = keys + c * chunks.rows();
                add_products<T>(left, other, TILE_BYTES, columns, columns + vector_lines(chunks));
            }
        _tile_stored(0, sums, TILE_BYTES);
        _tile_stored(1, sums + SUMS, TILE_BYTES);
        if constexpr (T > 1) {
            _tile_stored(2, sums + 2 * SUMS, TILE_BYTES);
            _tile_stored(3, sums + 3 * SUMS, TILE_BYTES);
        }
        settle_memory();
    }

    // N heads to the scores of a tile of queries and two vectors of keys.
    template <int N> void add_tile(int64_t head, int64_t tile, const float *sums, const float *scales, float *total) const {
        const __m512 first = _mm512_load_ps(scales), second = _mm512_load_ps(scales + 16);
        const float *ws = w.data() + head * MOST_ROWS + tile * TILE_ROWS, *bs = b.data() + head * MOST_ROWS + tile * TILE_ROWS;
        for (int64_t r = 0; r < TILE_ROWS; r++, total += 32, sums += 16) {
            __m512 left = _mm512_load_ps(total), right = _mm512_load_ps(total + 16);
            for (int n = 0; n < N; n++) {
                const float *from = sums + n * 4 * SUMS;
                const float weight = ws[n * MOST_ROWS + r], shift = bs[n * MOST_ROWS + r];
                left = add_head(left, _mm512_load_ps(from), first, weight, shift);
                right = add_head(right, _mm512_load_ps(from + SUMS), second, weight, shift);
            }
            _mm512_store_ps(total, left), _mm512_store_ps(total + 16, right);
        }
    }
};
#endif

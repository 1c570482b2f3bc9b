// Index scores of many queries over many packed keys, by matrix tiles: prompts.
#pragma once

#include "index_tiles.h"

#ifdef FULMEN_TILES
// Many queries: 16 of them, of one head, are the rows of a left matrix, 16 keys the columns of a right one.
class BlockScorer {
    static constexpr int64_t MOST_ROWS = 2 * TILE_ROWS, VECTORS = TILE / 16, SUMS = TILE_ROWS * 16;
    // Heads whose products are computed before the first is added: a sum is not read while its tile is being stored.
    static constexpr int64_t TOGETHER = 4;

    const IndexInputs &in;
    const int64_t batch;
    const Chunks chunks;
    const int64_t tiles;  // of queries: one or two
    int64_t terms = 1;
    std::unique_ptr<Line[]> numbers;  // [head][tile][term][chunk][query]
    std::vector<float> w, b;          // [head][query]

    int64_t query_lines() const { return terms * chunks.count * TILE_ROWS; }

  public:
    using Scope = IndexTileScope;
    using Workspace = TileWorkspace<BlockScorer>;
    static constexpr int64_t ROWS_AT_ONCE = 1;
    static constexpr bool PACKS = true;

    // Queries of a block, if the scores of so many fit.
    static int64_t block_rows(int64_t fit) { return std::clamp<int64_t>(fit / 16 * 16, 16, MOST_ROWS); }
    static int64_t tile_lines(const IndexInputs &in) { return in.shape.key_heads * head_lines(Chunks(in.shape.width)); }

    BlockScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), batch(block.batch), chunks(in.shape.width), tiles((int64_t(block.rows.size()) + TILE_ROWS - 1) / TILE_ROWS),
          w(in.shape.heads * MOST_ROWS), b(w.size()) {
        const int64_t heads = in.shape.heads;
        terms = Terms::needed(block.q.data(), block.q.size());
        numbers.reset(new Line[heads * tiles * query_lines()]);
        // Where a tile is complete, every number that is read is written.
        const bool complete = block.rows.size() % TILE_ROWS == 0 && chunks.width == chunks.count * chunks.chunk_width;
        if (!complete) std::fill_n(numbers.get(), heads * tiles * query_lines(), Line{});
        for (int64_t j = 0; j < heads; j++)
            for (int64_t r = 0; r < int64_t(block.rows.size()); r++) {
                const int64_t from = r * heads + j, at = j * MOST_ROWS + r;
                const float *q = block.q.data() + from * chunks.width;
                const int shift = Terms::shift(q, chunks.width);
                w[at] = Terms::scaled(block.w[from], shift), b[at] = Terms::scaled(block.b[from], -shift);
                Line *to = numbers.get() + (j * tiles + r / TILE_ROWS) * query_lines() + r % TILE_ROWS;
                Terms::write_row(q, shift, chunks, terms, to, TILE_ROWS);
            }
    }

    // Tile of keys to [key head]: [vector of keys][chunk][pair of numbers][key], then the scales; zero beyond the last.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        const Chunks chunks(in.shape.width);
        const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, in.shape.keys - first);
        const int8_t *rows[TILE];
        for (int64_t c = 0; c < count; c++) rows[c] = in.key<int8_t>(batch, first + c, 0);
        std::unique_ptr<Line[]> widened(new Line[chunks.count * TILE_ROWS]());
        for (int64_t i = 0; i < in.shape.key_heads; i++, to += head_lines(chunks))
            for (int64_t v = 0; v < VECTORS; v++) {
                const int64_t some = std::clamp<int64_t>(count - v * 16, 0, 16);
                widen_keys(rows + v * 16, some, i * in.shape.k_stride_i, chunks, widened.get());
                for (int64_t c = 0; c < chunks.count; c++) {
                    __m512i *numbers = (__m512i *)(widened.get() + c * TILE_ROWS);
                    transpose_dwords(numbers);
                    std::copy_n(numbers, chunks.rows(), (__m512i *)(to + (v * chunks.count + c) * chunks.rows()));
                }
                Line *scales = to + VECTORS * vector_lines(chunks) + v;
                *scales = {};
                copy_scales(rows + v * 16, some, i * in.shape.k_stride_i + chunks.width, (uint32_t *)scales);
                _mm512_store_ps(scales, product_scales(scales, in.factor));
            }
    }

    // Scores of the block's queries for one tile, into rows `stride` apart.
    void score(int64_t index, Workspace &workspace, int64_t n_rows, float *scores, int64_t stride) const {
        const Line *tile = workspace.tile(in, batch, index);
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
    static int64_t vector_lines(const Chunks &chunks) { return chunks.count * chunks.rows(); }
    static int64_t head_lines(const Chunks &chunks) { return VECTORS * (vector_lines(chunks) + 1); }

    // All heads of a key head to the scores of two vectors of keys.
    void add_heads(int64_t first, const Line *keys, const float *scales, float *total) const {
        alignas(64) float sums[TOGETHER * 4 * SUMS];
        for (int64_t j = first; j < first + in.shared(); j += TOGETHER) {
            const int64_t some = std::min(TOGETHER, first + in.shared() - j);
            // Four tiles of sums at once: of two tiles of queries, or of two heads.
            for (int64_t i = 0; i < some; i++) {
                float *to = sums + i * 4 * SUMS;
                if (tiles > 1) multiply<2>(j + i, keys, to, 2 * SUMS);
                else if (i + 1 < some) multiply<2>(j + i, keys, to, 4 * SUMS), i++;
                else multiply<1>(j + i, keys, to, 0);
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

    // Of T tiles of queries, the first of them this head's first, and two vectors of keys: sums [tile][vector][query][key],
    // tiles `apart`.
    template <int T> void multiply(int64_t head, const Line *keys, float *sums, int64_t apart) const {
        const Line *left = numbers.get() + head * tiles * query_lines(), *other = left + query_lines();
        settle_memory();
        zero_tiles<T>();
        for (int64_t t = 0; t < terms; t++)
            for (int64_t c = 0; c < chunks.count; c++, left += TILE_ROWS, other += TILE_ROWS) {
                const Line *columns = keys + c * chunks.rows();
                add_products<T>(left, other, TILE_BYTES, columns, columns + vector_lines(chunks));
            }
        _tile_stored(0, sums, TILE_BYTES);
        _tile_stored(1, sums + SUMS, TILE_BYTES);
        if constexpr (T > 1) {
            _tile_stored(2, sums + apart, TILE_BYTES);
            _tile_stored(3, sums + apart + SUMS, TILE_BYTES);
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

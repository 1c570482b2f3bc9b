// Index scores of one query over many packed keys, by matrix tiles: decoding.
#pragma once

#include "index_tiles.h"

#ifdef FULMEN_TILES
// One query: 16 keys are the rows of a left matrix, as they lie in the cache, and the query's heads the columns of a
// right one. Heads of several key heads share a product: elsewhere a column is zero.
class QueryScorer {
    static constexpr int64_t VECTORS = TILE / 16;

    struct Group {
        int64_t first_head, heads, first_key_head, key_heads;
        std::unique_ptr<Line[]> columns;  // [key head][term][chunk][pair of numbers]
    };

    const IndexInputs &in;
    const int64_t batch;
    const Chunks chunks;
    const int64_t terms;
    std::vector<float> w, b;
    std::vector<Group> groups;

  public:
    using Scope = IndexTileScope;
    static constexpr int64_t ROWS_AT_ONCE = 1;
    static constexpr bool PACKS = false;

    // One key head of 64 keys at a time: it stays in the level 1 cache until its products have been taken.
    struct Workspace {
        const int8_t *rows[2 * TILE];    // of a tile's keys, then of the next one's
        int64_t next = -1;               // the tile of those
        int64_t head = -1;               // whose numbers are here
        std::unique_ptr<Line[]> numbers;  // [vector of keys][chunk][key]
        Line scales[TILE_ROWS][VECTORS];  // of a group's key heads

        explicit Workspace(const IndexInputs &in) : numbers(new Line[VECTORS * vector_lines(Chunks(in.shape.width))]) {}
    };

    static int64_t block_rows(int64_t) { return 1; }

    QueryScorer(const IndexInputs &in, const QueryRows &query)
        : in(in), batch(query.batch), chunks(in.shape.width), terms(Terms::needed(query.q.data(), query.q.size())),
          w(query.w), b(query.b) {
        const int64_t shared = in.shared(), together = std::max<int64_t>(TILE_ROWS / shared, 1);
        for (int64_t i = 0; i < in.shape.key_heads; i += together) {
            const int64_t key_heads = std::min(together, in.shape.key_heads - i);
            for (int64_t m = 0; m < key_heads * shared; m += TILE_ROWS)
                add_group(query, {i * shared + m, std::min(TILE_ROWS, key_heads * shared - m), i, key_heads, nullptr});
        }
    }

    // Scores of one tile of keys; those of positions beyond the last key are not used.
    void score(int64_t tile, Workspace &workspace, int64_t, float *scores, int64_t) const {
        look_up(tile, workspace);
        __m512 total[VECTORS] = {};
        for (const Group &group : groups) {
            __m512i sums[VECTORS][TILE_ROWS];
            multiply(group, workspace, sums[0]);
            for (int64_t v = 0; v < VECTORS; v++) {
                transpose_dwords(sums[v]);
                for (int64_t m = 0; m < group.heads; m++) {
                    const int64_t head = group.first_head + m, key_head = head / in.shared() - group.first_key_head;
                    const __m512 scale = product_scales(&workspace.scales[key_head][v], in.factor);
                    total[v] = add_head(total[v], (__m512)sums[v][m], scale, w[head], b[head]);
                }
            }
        }
        for (int64_t v = 0; v < VECTORS; v++) _mm512_storeu_ps(scores + v * 16, total[v]);
    }

  private:
    static int64_t vector_lines(const Chunks &chunks) { return chunks.count * TILE_ROWS; }

    void add_group(const QueryRows &query, Group group) {
        const int64_t per_chunk = chunks.rows(), per_term = chunks.count * per_chunk, shared = in.shared();
        group.columns.reset(new Line[group.key_heads * terms * per_term]());
        std::unique_ptr<Line[]> rows(new Line[terms * chunks.count * TILE_ROWS]);
        for (int64_t i = 0; i < group.key_heads; i++) {
            std::fill_n(rows.get(), terms * chunks.count * TILE_ROWS, Line{});
            for (int64_t m = 0; m < group.heads; m++) {
                const int64_t head = group.first_head + m;
                if (head / shared != group.first_key_head + i) continue;
                const float *q = query.q.data() + head * chunks.width;
                const int shift = Terms::shift(q, chunks.width);
                w[head] = Terms::scaled(query.w[head], shift), b[head] = Terms::scaled(query.b[head], -shift);
                Terms::write_row(q, shift, chunks, terms, rows.get() + m, TILE_ROWS);
            }
            for (int64_t c = 0; c < terms * chunks.count; c++) {
                __m512i *numbers = (__m512i *)(rows.get() + c * TILE_ROWS);
                transpose_dwords(numbers);
                std::copy_n(numbers, per_chunk, (__m512i *)(group.columns.get() + i * terms * per_term + c * per_chunk));
            }
        }
        groups.push_back(std::move(group));
    }

    // Where a tile's keys are, and those of the next one.
    void look_up(int64_t tile, Workspace &workspace) const {
        const bool known = workspace.next == tile;
        if (known) std::copy_n(workspace.rows + TILE, TILE, workspace.rows);
        for (int64_t c = known ? TILE : 0; c < 2 * TILE; c++)
            workspace.rows[c] = in.key<int8_t>(batch, std::min(tile * TILE + c, in.shape.keys - 1), 0);
        workspace.next = tile + 1, workspace.head = -1;
    }

    // Sums [vector of keys][key][head]. Numbers are not multiplied right after they were written: they would be waited for.
    void multiply(const Group &group, Workspace &workspace, __m512i *sums) const {
        const int64_t per_head = terms * chunks.count * chunks.rows();
        const Line *columns = group.columns.get();
        zero_tiles<2>();
        for (int64_t i = 0; i < group.key_heads; i++, columns += per_head) {
            if (group.first_key_head + i == workspace.head) {  // of the group before
                add_products(0, workspace, columns), add_products(1, workspace, columns), add_products(2, workspace, columns);
                continue;
            }
            take_keys(group, i, 0, workspace);
            if (i > 0) add_products(3, workspace, columns - per_head);
            take_keys(group, i, 1, workspace);
            add_products(0, workspace, columns);
            take_keys(group, i, 2, workspace);
            add_products(1, workspace, columns);
            take_keys(group, i, 3, workspace);
            add_products(2, workspace, columns);
            workspace.head = group.first_key_head + i;
        }
        add_products(3, workspace, columns - per_head);
        _tile_stored(0, sums, TILE_BYTES);
        _tile_stored(1, sums + TILE_ROWS, TILE_BYTES);
        _tile_stored(2, sums + 2 * TILE_ROWS, TILE_BYTES);
        _tile_stored(3, sums + 3 * TILE_ROWS, TILE_BYTES);
        settle_memory();
    }

    // A key head of 16 keys: numbers and scales.
    void take_keys(const Group &group, int64_t i, int64_t v, Workspace &workspace) const {
        const int64_t at = (group.first_key_head + i) * in.shape.k_stride_i;
        const int8_t *const *rows = workspace.rows + v * 16;
        widen_keys(rows, 16, at, chunks, workspace.numbers.get() + v * vector_lines(chunks), TILE);
        copy_scales(rows, 16, at + chunks.width, (uint32_t *)&workspace.scales[i][v]);
    }

    // A key head of 16 keys to their tile of sums.
    void add_products(int64_t v, const Workspace &workspace, const Line *columns) const {
        const Line *keys = workspace.numbers.get() + v * vector_lines(chunks);
        settle_memory();
        for (int64_t t = 0; t < terms; t++)
            for (int64_t c = 0; c < chunks.count; c++, columns += chunks.rows()) {
                _tile_loadd(6, columns, TILE_BYTES);
                _tile_loadd(4, keys + c * TILE_ROWS, TILE_BYTES);
                switch (v) {
                case 0: _tile_dpbf16ps(0, 4, 6); break;
                case 1: _tile_dpbf16ps(1, 4, 6); break;
                case 2: _tile_dpbf16ps(2, 4, 6); break;
                default: _tile_dpbf16ps(3, 4, 6);
                }
            }
    }
};
#endif

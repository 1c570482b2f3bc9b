// What the kernels that take an indexer's inputs share: the inputs, intervals, and queries in blocks.
#pragma once

#include "tiles.h"
#include "threads.h"
#include "vectors.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <memory>
#include <vector>

// Keys scored together.
constexpr int COLUMNS = LANES == 8 ? 2 : 4;
constexpr int TILE = COLUMNS * LANES;

// `IndexShape.key_kind`. PACKED: rows of `pack_index_keys`, int8 codes and then the bytes of their bfloat16 scale.
enum KeyKind : int64_t { FLOAT32 = 0, BFLOAT16 = 1, PACKED = 2 };

// Mirrored by `IndexShape` in abi.py. A selection has `columns`: enough for all keys of queries that see no
// more, for the best `topk` of the others. Strides count numbers (bytes of packed keys); all but k are
// contiguous.
struct IndexShape {
    int64_t batch, queries, keys, heads, key_heads, width, topk, columns;
    int64_t key_kind, k_stride_b, k_stride_s, k_stride_i, threads, use_tiles;
};

struct Interval {
    int64_t start, stop;
};

// Without `start`, from the first key on.
static inline Interval interval_of(const int64_t *start, const int64_t *stop, int64_t row, int64_t keys) {
    return {start ? std::clamp<int64_t>(start[row], 0, keys) : 0, std::clamp<int64_t>(stop[row], 0, keys)};
}

// Mirrored by `CoarseLevelStruct` in abi.py: an indexer of one key head, whose heads all have weight 1.
struct CoarseLevel {
    int64_t heads, width, candidates, all_up_to, k_stride_b, k_stride_s;  // up to all_up_to keys all are candidates
    const void *q, *b;    // [B, T, heads, width], [B, T, heads], of the indexer's dtype
    const int8_t *k;      // rows of `pack_index_keys`
    const int32_t *rows;  // as those of `IndexInputs`
};

struct IndexInputs {
    IndexShape shape;
    const void *q, *w, *b;  // float32, or all bfloat16; w and b may be null: 1 and 0
    const float factor;     // E^-1/2, on products
    const void *k;
    const int64_t *start, *stop;  // start may be null
    const int32_t *rows;  // [B, S]: which row of k is a key's; null: in order
    const bool is_bf16;   // q, w and b
    std::unique_ptr<IndexInputs> coarse;  // null: every visible key is scored
    int64_t candidates = 0, all_up_to = 0;
    std::unique_ptr<Line[]> packed;  // all tiles of all keys, or null: then they are packed as they are needed

    IndexInputs(const IndexShape &given, const void *q, const void *w, const void *b, const void *k,
                const int64_t *start, const int64_t *stop, const int32_t *rows = nullptr, bool is_bf16 = false)
        : shape(given), q(q), w(w), b(b), factor(float(std::pow(double(given.width), -0.5))), k(k), start(start), stop(stop),
          rows(rows), is_bf16(is_bf16) {
        const int64_t products = shape.batch * shape.queries * shape.keys * shape.heads * shape.width;
        shape.threads = useful_threads(shape.threads, products);
    }

    void add_coarse(const CoarseLevel &level) {
        IndexShape of = shape;
        of.heads = level.heads, of.key_heads = 1, of.width = level.width;
        of.key_kind = PACKED, of.k_stride_b = level.k_stride_b, of.k_stride_s = level.k_stride_s, of.k_stride_i = 0;
        coarse.reset(new IndexInputs(of, level.q, nullptr, level.b, level.k, start, stop, level.rows, is_bf16));
        candidates = level.candidates, all_up_to = level.all_up_to;
    }

    bool by_tiles() const { return shape.use_tiles && shape.key_kind == PACKED; }
    int64_t shared() const { return shape.heads / shape.key_heads; }
    int64_t tiles() const { return (shape.keys + TILE - 1) / TILE; }
    const void *of_batch(int64_t batch) const {
        const int64_t bytes = shape.key_kind == FLOAT32 ? 4 : shape.key_kind == BFLOAT16 ? 2 : 1;
        return (const char *)k + batch * shape.k_stride_b * bytes;
    }
    template <class Number> const Number *key(int64_t batch, int64_t s, int64_t i) const {
        const int64_t row = rows ? rows[batch * shape.keys + s] : s;
        return (const Number *)k + batch * shape.k_stride_b + row * shape.k_stride_s + i * shape.k_stride_i;
    }
};

// Where a thread finds tiles of keys as a scorer reads them: packed before, or one by one.
template <class Scorer> class TileWorkspace {
    std::unique_ptr<Line[]> lines;

  public:
    explicit TileWorkspace(const IndexInputs &in) : lines(in.packed ? nullptr : new Line[Scorer::tile_lines(in)]) {}

    const Line *tile(const IndexInputs &in, int64_t batch, int64_t tile) {
        if (in.packed) return in.packed.get() + (batch * in.tiles() + tile) * Scorer::tile_lines(in);
        Scorer::pack(in, batch, tile, lines.get());
        return lines.get();
    }
};

static inline float scale_of_packed(const int8_t *row, int64_t width) {
    uint16_t bits;
    std::memcpy(&bits, row + width, sizeof bits);
    return bf16_to_float(bits);
}

// In index_keys.cpp: `width` numbers to their codes and the two bytes of their scale.
void pack_index_head(const float *k, int64_t width, int8_t *to);

// Some queries of one batch row.
struct QueryRows {
    int64_t batch;
    std::vector<int64_t> rows;  // indices into [B * T]
    std::vector<Interval> intervals;
    int64_t first, last;  // hull of the intervals
    std::vector<float> q, w, b;  // [row][J][E], [row][J]

    QueryRows(const IndexInputs &in, int64_t batch, std::vector<int64_t> some)
        : batch(batch), rows(std::move(some)), first(in.shape.keys), last(0),
          q(floats(in.q, in.shape.heads * in.shape.width, in.is_bf16, 0)), w(floats(in.w, in.shape.heads, in.is_bf16, 1)),
          b(floats(in.b, in.shape.heads, in.is_bf16, 0)) {
        for (const int64_t row : rows) {
            const Interval visible = interval_of(in.start, in.stop, row, in.shape.keys);
            intervals.push_back(visible);
            if (visible.start >= visible.stop) continue;
            first = std::min(first, visible.start);
            last = std::max(last, visible.stop);
        }
    }

    int64_t first_tile() const { return first / TILE; }
    int64_t tiles() const { return std::max<int64_t>((last + TILE - 1) / TILE - first_tile(), 0); }

  private:
    // These rows of `width` numbers; `otherwise` where there are none.
    std::vector<float> floats(const void *numbers, int64_t width, bool is_bf16, float otherwise) const {
        std::vector<float> to(rows.size() * width, otherwise);
        for (size_t r = 0; numbers && r < rows.size(); r++) {
            if (is_bf16) to_floats((const uint16_t *)numbers + rows[r] * width, width, to.data() + r * width);
            else to_floats((const float *)numbers + rows[r] * width, width, to.data() + r * width);
        }
        return to;
    }

    template <class Number> static void to_floats(const Number *from, int64_t count, float *to) {
        for (int64_t i = 0; i < count; i += LANES) store_some(to + i, load_some(from + i, count - i), count - i);
    }
};

// chosen [B, T, columns] (index_topk.cpp). Throws std::bad_alloc.
void choose_best(IndexInputs &in, int32_t *chosen);
// Of the queries low <= t < high of a batch row alone, on the calling thread: chosen [high - low, columns]. All their keys
// are packed once by `pack_index_keys`; `workspace` is kept for the next ones.
void pack_index_keys(IndexInputs &in);
void choose_some(const IndexInputs &in, int64_t batch, int64_t low, int64_t high, ChoiceWorkspace &workspace, int32_t *chosen);

// Softmax attention of every query over its own keys, forward; each query gathers its keys, tile by tile.
//
// Why not the union of neighbouring queries' keys, as the blocked torch code has it: a product with rows of single
// keys needs no matrix here, so that keys which only some of the queries want cost nothing.

#include "attention_tiles.h"

#include <atomic>
#include <cfloat>
#include <cmath>

namespace {

// Queries that a thread takes at a time, one key head after the other: what they select alike stays in its cache.
constexpr int64_t BLOCK_QUERIES = 16;

// One query, the heads of one key head.
struct QueryState {
    int64_t heads, width;
    std::vector<float> q, sum, peak, total;

    QueryState(const AttentionInputs &in, int64_t heads)
        : heads(heads), width(in.v.padded), q(heads * in.k.padded), sum(heads * in.v.padded), peak(heads), total(heads) {}

    // From the head `first` on, counted over all.
    void begin(const AttentionInputs &in, int64_t first, float scale) {
        if (in.shape.is_bf16) take_queries(in, (const uint16_t *)in.q + first * in.shape.width, scale);
        else take_queries(in, (const float *)in.q + first * in.shape.width, scale);
        std::fill(sum.begin(), sum.end(), 0.0f);
        // Finite, so that infinity is never subtracted from itself where no key counts yet.
        std::fill(peak.begin(), peak.end(), -FLT_MAX);
        std::fill(total.begin(), total.end(), 0.0f);
    }

    // Scores (in powers of 2) to weights, in place; sums so far fade if the peak rises.
    void weigh(int64_t h, float *scores, int64_t count) {
        for (int64_t i = count; i < round_up(count, LANES); i++) scores[i] = -INFINITY;
        Vec highest = broadcast(peak[h]);
        for (int64_t i = 0; i < count; i += LANES) {
            const Vec x = load(scores + i);
            highest = x > highest ? x : highest;
        }
        const float higher = largest_lane(highest);
        Vec added = {};
        for (int64_t i = 0; i < count; i += LANES) {
            const Vec weight = exp2_vec(load(scores + i) - higher);
            store(scores + i, weight);
            added += weight;
        }
        if (higher > peak[h]) {
            const float fade = std::exp2(peak[h] - higher);
            peak[h] = higher;
            total[h] *= fade;
            for (int64_t d = 0; d < width; d++) sum[h * width + d] *= fade;
        }
        total[h] += sum_of_lanes(added);
    }

    template <int N, class Number>
    void attend_heads(int64_t h, const AttentionInputs &in, const KeyTile<Number> &tile) {
        alignas(64) float scores[N * WIDEST_TILE];
        const float *heads_q = q.data() + h * in.k.padded;
        for (int64_t low = 0; low < tile.count; low += LANES) {
            if (h == 0) prefetch_tile(in, tile, low, low + LANES);
            dot_rows<N>(heads_q, tile.k + low, LANES, in.k.padded, scores + low);
        }
        for (int n = 0; in.softcap && n < N; n++)
            cap_logits(scores + n * WIDEST_TILE, tile.count, 1, in.softcap * LOG2_E);
        for (int n = 0; n < N; n++) weigh(h + n, scores + n * WIDEST_TILE, tile.count);
        add_rows<N>(scores, tile.v, tile.count, width, sum.data() + h * width);
    }

    template <class Number> void attend(const AttentionInputs &in, const KeyTile<Number> &tile) {
        for_heads(heads, [&](auto n, int64_t h) { attend_heads<decltype(n)::value>(h, in, tile); });
    }

    void finish(int64_t first, bool has_keys, const Results &results) const {
        for (int64_t h = 0; h < heads; h++)
            results.write(first + h, sum.data() + h * width, total[h], peak[h], has_keys);
    }

    template <class Number> void take_queries(const AttentionInputs &in, const Number *from, float scale) {
        const int64_t size = in.shape.width;
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < size; d += LANES)
                store(q.data() + h * in.k.padded + d, load_some(from + h * size + d, size - d) * scale);
    }
};

// How the work is cut: items of a block of queries, one key head, some of its query heads. Queries by themselves read
// their tokens' keys of several heads together: they lie together, and each token is another page of memory.
struct Cut {
    int64_t block, blocks, heads, parts, groups;

    Cut(const AttentionInputs &in) {
        const AttentionShape &shape = in.shape;
        const bool few = shape.batch * shape.queries * shape.key_heads < 4 * shape.threads;
        block = std::clamp<int64_t>(shape.queries / (4 * shape.threads), 1, BLOCK_QUERIES);
        blocks = (shape.queries + block - 1) / block;
        heads = few ? std::min<int64_t>(in.shared(), MOST_HEADS) : in.shared();
        parts = (in.shared() + heads - 1) / heads;
        groups = block > 1 ? 1 : (shape.key_heads + shape.threads - 1) / shape.threads;
    }
};

// Queries low <= t < high of batch row b; of the key heads from g on, each with `heads` heads from `first` on.
struct Work {
    int64_t b, low, high, g, groups, first, heads;
};

template <class Number>
void attend_rows(const AttentionInputs &in, const Work &work, float scale, const Results &results) {
    const AttentionShape &shape = in.shape;
    std::vector<QueryState> states(work.groups, QueryState(in, work.heads));
    KeyTile<Number> tile(in);
    std::vector<int32_t> scratch(shape.topk + 1);
    for (int64_t t = work.low; t < work.high; t++) {
        const int64_t row = work.b * shape.queries + t;
        const KeyList keys = in.keys_of(row, scratch.data());
        const auto head = [&](int64_t g) { return row * shape.heads + (work.g + g) * in.shared() + work.first; };
        for (int64_t g = 0; g < work.groups; g++) states[g].begin(in, head(g), scale * LOG2_E);
        for (int64_t i = 0; i < keys.count; i += in.tile_keys())
            for (int64_t g = 0; g < work.groups; g++) {
                tile.fill(in, keys, i, work.b, work.g + g);
                states[g].attend(in, tile);
            }
        for (int64_t g = 0; g < work.groups; g++) states[g].finish(head(g), keys.count > 0, results);
    }
}

void attend(const AttentionInputs &in, const Work &work, float scale, const Results &results) {
    if (in.in_place<uint16_t>()) attend_rows<uint16_t>(in, work, scale, results);
    else attend_rows<float>(in, work, scale, results);
}

void attend_all(const AttentionInputs &in, float scale, const Results &results) {
    const Cut cut(in);
    const int64_t key_heads = in.shape.key_heads, ranges = (key_heads + cut.groups - 1) / cut.groups;
    parallel_for(in.shape.batch * cut.blocks * ranges * cut.parts, in.shape.threads, [&](int64_t item) {
        const int64_t first = item % cut.parts * cut.heads, block = item / cut.parts / ranges;
        const int64_t low = block % cut.blocks * cut.block, high = std::min(low + cut.block, in.shape.queries);
        const int64_t g = item / cut.parts % ranges * cut.groups, groups = std::min(cut.groups, key_heads - g);
        const int64_t heads = std::min(cut.heads, in.shared() - first);
        attend(in, {block / cut.blocks, low, high, g, groups, first, heads}, scale, results);
    });
}

#ifdef FULMEN_TILES
// Whether queries come by the tile.
bool by_tiles(const AttentionInputs &in) {
    const AttentionShape &shape = in.shape;
    return shape.use_tiles && shape.is_bf16 && !in.start && shape.queries >= TILE_ROWS;
}

int64_t tile_blocks(const AttentionShape &shape) { return (shape.queries + TILE_QUERIES - 1) / TILE_QUERIES; }

// Too few for every thread: they share the key heads of a block.
bool few_blocks(const AttentionShape &shape) { return shape.batch * tile_blocks(shape) < 4 * shape.threads; }

// Queries low <= t < high of a batch row, by the key heads from g on.
void attend_block(const AttentionInputs &in, TileAttention &attention, const Work &work, float scale, const Results &results) {
    const auto attend_by_tile = [&](int64_t from, int64_t to) {
        const bool alike = attention.choose(work.b, from, to);
        if (alike) attention.attend(work.g, work.groups, scale, results);
        return alike;
    };
    if (attend_by_tile(work.low, work.high)) return;
    for (int64_t from = work.low; from < work.high; from += TILE_ROWS) {
        const int64_t to = std::min(from + TILE_ROWS, work.high);
        if (attend_by_tile(from, to)) continue;
        for (int64_t g = work.g; g < work.g + work.groups; g++)
            attend(in, {work.b, from, to, g, 1, 0, in.shared()}, scale, results);
    }
}

// Selections are those of `in`, or of each block what `choose` fills in.
void attend_by_tiles(const AttentionInputs &in, float scale, const Results &results, const Choose *choose = nullptr) {
    const AttentionShape &shape = in.shape;
    const int64_t blocks = tile_blocks(shape), parts = few_blocks(shape) ? shape.key_heads : 1;
    const int64_t items = shape.batch * blocks * parts, threads = std::min(shape.threads, items);
    std::atomic<int64_t> taken{0};
    parallel_for(threads, threads, [&](int64_t) {
        AttentionInputs own = in;
        SelectionWorkspace workspace{std::vector<int32_t>(choose ? TILE_QUERIES * shape.topk : 0), {}};
        const TileScope scope(TileConfig::full());
        TileAttention attention(own);
        // The last queries, which have the most to read, come first.
        for (int64_t item; (item = items - ++taken) >= 0;) {
            const int64_t block = item / parts, groups = shape.key_heads / parts, g = item % parts * groups;
            const int64_t low = block % blocks * TILE_QUERIES, high = std::min(low + TILE_QUERIES, shape.queries);
            if (choose) {
                (*choose)(block / blocks, low, high, workspace);
                own.topk = workspace.chosen.data(), own.first = block / blocks * shape.queries + low;
            }
            attend_block(own, attention, {block / blocks, low, high, g, groups, 0, in.shared()}, scale, results);
        }
    });
}
#endif

}  // namespace

void attend_to_keys(const AttentionInputs &in, float scale, const Results &results) {
#ifdef FULMEN_TILES
    if (by_tiles(in)) return attend_by_tiles(in, scale, results);
#endif
    attend_all(in, scale, results);
}

bool comes_in_blocks(const AttentionInputs &in) {
#ifdef FULMEN_TILES
    return by_tiles(in) && !few_blocks(in.shape);
#else
    return false;
#endif
}

void choose_and_attend(const AttentionInputs &in, float scale, const Results &results, const Choose &choose) {
#ifdef FULMEN_TILES
    attend_by_tiles(in, scale, results, &choose);
#endif
}

extern "C" {

// out [B, T, H, V], lse [B, T, H]; either topk, or start and stop; a softcap of 0 is none.
int fulmen_attention(const void *q, const void *k, const void *v, const int32_t *topk, const int64_t *start,
                     const int64_t *stop, void *out, float *lse, const AttentionShape *shape, float scale,
                     float softcap) try {
    AttentionInputs in(*shape, q, k, v, topk, start, stop);
    in.softcap = softcap;
    attend_to_keys(in, scale, Results(*shape, out, lse));
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

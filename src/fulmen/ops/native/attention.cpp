// Softmax attention of every query over its own keys, forward; each query gathers its keys, tile by tile.
//
// Why not the union of neighbouring queries' keys, as the blocked torch code has it: a product with rows of single
// keys needs no matrix here, so that keys which only some of the queries want cost nothing.

#include "attention.h"

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

    void begin(const AttentionInputs &in, const float *from, float scale) {
        for (int64_t h = 0; h < heads; h++)
            for (int64_t d = 0; d < in.shape.width; d++)
                q[h * in.k.padded + d] = from[h * in.shape.width + d] * scale;
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

    template <int N> void attend_heads(int64_t h, const AttentionInputs &in, const KeyTile &tile) {
        alignas(64) float scores[N * WIDEST_TILE];
        const float *heads_q = q.data() + h * in.k.padded;
        for (int64_t low = 0; low < tile.count; low += LANES) {
            if (h == 0) prefetch_tile(in, tile, low, low + LANES);
            dot_rows<N>(heads_q, tile.k + low, LANES, in.k.padded, scores + low);
        }
        for (int n = 0; n < N; n++) weigh(h + n, scores + n * WIDEST_TILE, tile.count);
        add_rows<N>(scores, tile.v, tile.count, width, sum.data() + h * width);
    }

    void attend(const AttentionInputs &in, const KeyTile &tile) {
        for_heads(heads, [&](auto n, int64_t h) { attend_heads<decltype(n)::value>(h, in, tile); });
    }

    void finish(float *out, float *lse, int64_t value_width) const {
        for (int64_t h = 0; h < heads; h++) {
            const float scale = total[h] == 0 ? 0.0f : 1 / total[h];
            for (int64_t d = 0; d < value_width; d++) out[h * value_width + d] = sum[h * width + d] * scale;
            lse[h] = (peak[h] + std::log2(total[h])) / LOG2_E;
        }
    }
};

// How the work is cut: items of a block of queries, one key head, some of its query heads.
struct Cut {
    int64_t block, blocks, heads, parts;

    Cut(const AttentionInputs &in) {
        const AttentionShape &shape = in.shape;
        const bool few = shape.batch * shape.queries * shape.key_heads < 4 * shape.threads;
        block = std::clamp<int64_t>(shape.queries / (4 * shape.threads), 1, BLOCK_QUERIES);
        blocks = (shape.queries + block - 1) / block;
        heads = few ? std::min<int64_t>(in.shared(), MOST_HEADS) : in.shared();
        parts = (in.shared() + heads - 1) / heads;
    }
};

void attend_item(const AttentionInputs &in, const Cut &cut, int64_t item, float scale, float *out, float *lse) {
    const AttentionShape &shape = in.shape;
    const int64_t part = item % cut.parts, g = item / cut.parts % shape.key_heads;
    const int64_t block = item / cut.parts / shape.key_heads, b = block / cut.blocks;
    const int64_t first_head = g * in.shared() + part * cut.heads;
    QueryState state(in, std::min(cut.heads, in.shared() - part * cut.heads));
    KeyTile tile(in);
    std::vector<int32_t> room(shape.topk + 1);
    const int64_t low = block % cut.blocks * cut.block;
    for (int64_t t = low; t < std::min(low + cut.block, shape.queries); t++) {
        const int64_t row = b * shape.queries + t, head = row * shape.heads + first_head;
        const KeyList keys = in.keys_of(row, room.data());
        state.begin(in, in.q + head * shape.width, scale * LOG2_E);
        for (int64_t i = 0; i < keys.count; i += in.tile_keys()) {
            tile.fill(in, keys, i, b, g);
            state.attend(in, tile);
        }
        state.finish(out + head * shape.value_width, lse + head, shape.value_width);
    }
}

}  // namespace

extern "C" {

// out [B, T, H, V], lse [B, T, H]; either topk, or start and stop.
int fulmen_attention(const float *q, const void *k, const void *v, const int32_t *rows, const int32_t *topk,
                     const int64_t *start, const int64_t *stop, float *out, float *lse, const AttentionShape *shape,
                     float scale) try {
    const AttentionInputs in(*shape, q, k, v, topk, start, stop, rows);
    const Cut cut(in);
    parallel_for(shape->batch * cut.blocks * shape->key_heads * cut.parts, in.shape.threads,
                 [&](int64_t item) { attend_item(in, cut, item, scale, out, lse); });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

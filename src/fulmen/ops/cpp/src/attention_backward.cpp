// Gradients of softmax attention over selected keys (FlashAttention-2, arXiv 2307.08691, algorithm 2: the weights are
// computed anew from the saved log-sum-exp).
//
// Two steps for every block of queries. First, query by query: weights, their gradients, and dq. Second, range of keys
// by range of keys: dk and dv, each key adding its queries in ascending order. So no two threads write to one row, and
// the sums have the same bits with any number of threads.

#include "attention.h"

#include <cmath>

namespace {

// Numbers of one block's weights (and as many of their gradients).
constexpr int64_t BLOCK_WEIGHTS = 1 << 20;
// Queries that a thread takes at a time, as in the forward pass.
constexpr int64_t ITEM_QUERIES = 16;

// All with rows padded as `Source` pads them: q and dq [B, T, H, D], dout [B, T, H, V], dk [B, S, G, D],
// dv [B, S, G, V]; lse and delta [B, T, H]. dk and dv come as zeros.
struct Gradients {
    const float *q, *dout, *lse, *delta;
    float *dq, *dk, *dv;
    float scale;
};

// Some queries of one batch row, with the keys of each in ascending order.
struct Block {
    const AttentionInputs &in;
    const Gradients &grads;
    int64_t batch, first, count;
    std::vector<int32_t> positions;         // [count][K]
    std::vector<int64_t> lengths;           // [count]
    std::unique_ptr<float[]> probs, dscores;  // [count][H][K]

    Block(const AttentionInputs &in, const Gradients &grads, int64_t batch, int64_t most)
        : in(in), grads(grads), batch(batch), first(0), count(0), positions(most * in.shape.topk), lengths(most),
          probs(new float[most * in.shape.heads * in.shape.topk]),
          dscores(new float[most * in.shape.heads * in.shape.topk]) {}

    KeyList keys(int64_t t) const { return {positions.data() + t * in.shape.topk, 0, lengths[t]}; }

    int64_t head(int64_t t, int64_t h) const { return (batch * in.shape.queries + first + t) * in.shape.heads + h; }

    void begin(int64_t low, int64_t high) {
        first = low, count = high - low;
        for (int64_t t = 0; t < count; t++) {
            int32_t *scratch = positions.data() + t * in.shape.topk;
            lengths[t] = in.keys_of(batch * in.shape.queries + low + t, scratch).count;
            if (!std::is_sorted(scratch, scratch + lengths[t])) std::sort(scratch, scratch + lengths[t]);
        }
    }
};

// Weights and their gradients for N heads and one tile of keys; adds to dq.
template <int N> void differentiate_heads(Block &block, int64_t t, int64_t h, const KeyTile<float> &tile,
                                                int64_t low) {
    const AttentionInputs &in = block.in;
    const Gradients &grads = block.grads;
    const int64_t head = block.head(t, h), width = in.k.padded;
    alignas(64) float probs[N * WIDEST_TILE], dscores[N * WIDEST_TILE];
    dot_rows<N>(grads.q + head * width, tile.k, tile.count, width, probs);
    dot_rows<N>(grads.dout + head * in.v.padded, tile.v, tile.count, in.v.padded, dscores);
    for (int n = 0; n < N; n++) {
        const float lse = grads.lse[head + n], delta = grads.delta[head + n];
        float *prob = probs + n * WIDEST_TILE, *dscore = dscores + n * WIDEST_TILE;
        for (int64_t i = 0; i < tile.count; i += LANES) {
            Vec logit = load(prob + i) * grads.scale, slope = broadcast(grads.scale);
            if (in.softcap) {
                const Vec part = tanh_vec(logit / in.softcap);
                logit = part * in.softcap, slope *= 1.0f - part * part;
            }
            const Vec weight = exp2_vec((logit - lse) * LOG2_E);
            store(prob + i, weight);
            store(dscore + i, weight * (load(dscore + i) - delta) * slope);
        }
        const int64_t at = (t * in.shape.heads + h + n) * in.shape.topk + low;
        std::copy_n(prob, tile.count, block.probs.get() + at);
        std::copy_n(dscore, tile.count, block.dscores.get() + at);
    }
    add_rows<N>(dscores, tile.k, tile.count, width, grads.dq + head * width);
}

void differentiate_query(Block &block, int64_t t, int64_t g, KeyTile<float> &tile) {
    const AttentionInputs &in = block.in;
    const KeyList keys = block.keys(t);
    for (int64_t low = 0; low < keys.count; low += in.tile_keys()) {
        tile.fill(in, keys, low, block.batch, g);
        for_heads(in.shared(), [&](auto n, int64_t h) {
            if (h == 0) prefetch_tile(in, tile, 0, tile.count);
            differentiate_heads<decltype(n)::value>(block, t, g * in.shared() + h, tile, low);
        });
    }
}

// sum += over the heads of weights[h * stride] * rows[h], for C vectors.
template <int C>
void add_heads(const float *weights, int64_t stride, const float *rows, int64_t heads, int64_t width, float *sum) {
    Vec total[C];
    for (int c = 0; c < C; c++) total[c] = load(sum + c * LANES);
    for (int64_t h = 0; h < heads; h++)
        for (int c = 0; c < C; c++) total[c] += load(rows + h * width + c * LANES) * weights[h * stride];
    for (int c = 0; c < C; c++) store(sum + c * LANES, total[c]);
}

void add_to_key(const float *weights, int64_t stride, const float *rows, int64_t heads, int64_t width, float *sum) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) add_heads<4>(weights, stride, rows + d, heads, width, sum + d);
    for (; d < width; d += LANES) add_heads<1>(weights, stride, rows + d, heads, width, sum + d);
}

// dk and dv of the keys low <= s < high of one key head.
void gather_range(const Block &block, int64_t g, int64_t low, int64_t high) {
    const AttentionInputs &in = block.in;
    const AttentionShape &shape = in.shape;
    const Gradients &grads = block.grads;
    const int64_t shared = in.shared(), topk = shape.topk;
    for (int64_t t = 0; t < block.count; t++) {
        const KeyList keys = block.keys(t);
        const int32_t *end = keys.positions + keys.count;
        const int64_t head = block.head(t, g * shared), at = (t * shape.heads + g * shared) * topk;
        for (const int32_t *s = std::lower_bound(keys.positions, end, low); s < end && *s < high; s++) {
            const int64_t row = (block.batch * shape.keys + *s) * shape.key_heads + g, i = at + (s - keys.positions);
            add_to_key(block.dscores.get() + i, topk, grads.q + head * in.k.padded, shared, in.k.padded,
                       grads.dk + row * in.k.padded);
            add_to_key(block.probs.get() + i, topk, grads.dout + head * in.v.padded, shared, in.v.padded,
                       grads.dv + row * in.v.padded);
        }
    }
}

void differentiate_block(Block &block) {
    const AttentionShape &shape = block.in.shape;
    const int64_t groups = shape.key_heads, parts = (block.count + ITEM_QUERIES - 1) / ITEM_QUERIES;
    parallel_for(parts * groups, shape.threads, [&](int64_t item) {
        KeyTile<float> tile(block.in);
        const int64_t low = item / groups * ITEM_QUERIES;
        for (int64_t t = low; t < std::min(low + ITEM_QUERIES, block.count); t++)
            differentiate_query(block, t, item % groups, tile);
    });
    const int64_t ranges = shape.threads == 1 ? 4 : 8 * shape.threads, width = (shape.keys + ranges - 1) / ranges;
    parallel_for(ranges * groups, shape.threads, [&](int64_t item) {
        const int64_t low = item / groups * width;
        gather_range(block, item % groups, low, std::min(low + width, shape.keys));
    });
}

}  // namespace

extern "C" {

int fulmen_attention_backward(const float *q, const void *k, const void *v, const int32_t *topk, const float *dout,
                              const float *lse, const float *delta, float *dq, float *dk, float *dv,
                              const AttentionShape *shape, float scale, float softcap) try {
    AttentionInputs in(*shape, nullptr, k, v, topk, nullptr, nullptr);
    in.softcap = softcap;
    const Gradients grads{q, dout, lse, delta, dq, dk, dv, scale};
    const int64_t most = std::clamp<int64_t>(BLOCK_WEIGHTS / (shape->heads * shape->topk + 1), 1, shape->queries + 1);
    for (int64_t b = 0; b < shape->batch; b++) {
        Block block(in, grads, b, most);
        for (int64_t low = 0; low < shape->queries; low += most) {
            block.begin(low, std::min(low + most, shape->queries));
            differentiate_block(block);
        }
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

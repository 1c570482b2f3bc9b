// What the forward and the backward pass of attention share: the inputs, and the keys of one query in tiles.
#pragma once

#include "threads.h"
#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

// Mirrored by `AttentionShape` in abi.py. Strides count numbers; q and all results are contiguous. Keys and
// values are bfloat16 or float32; forward, so are queries and results.
struct AttentionShape {
    int64_t batch, queries, keys, heads, key_heads, width, value_width, topk;
    int64_t is_bf16, k_stride_b, k_stride_s, k_stride_g, v_stride_b, v_stride_s, v_stride_g, threads, use_tiles;
};

constexpr int64_t WIDEST_TILE = 128;
// Rows are padded to a multiple of so many numbers: a whole number of vectors on every machine.
constexpr int64_t ROW_MULTIPLE = 16;
constexpr float LOG2_E = 1.4426950408889634f;

// The keys of a query, as rows of the keys and values: from a list, or (without one) from first on.
struct KeyList {
    const int32_t *positions;
    int64_t first, count;

    int64_t at(int64_t i) const { return positions ? positions[i] : first + i; }
};

// Rows of one head's keys or values: used in place where they are whole vectors of numbers, else copied as float32.
struct Source {
    const void *data;
    int64_t stride_b, stride_s, stride_g, width, padded;
    bool is_bf16;

    template <class Number> bool in_place() const { return width == padded && is_bf16 == (sizeof(Number) == 2); }

    // Row 0 of a head.
    template <class Number> const Number *head(int64_t b, int64_t g) const {
        return (const Number *)data + b * stride_b + g * stride_g;
    }

    // Where the rows of some keys are; `copies` is as large as all of them.
    template <class Number>
    void find_rows(int64_t b, int64_t g, const KeyList &keys, int64_t low, int64_t count, float *copies,
                   const Number **rows) const {
        const int64_t base = b * stride_b + g * stride_g;
        if (in_place<Number>())
            for (int64_t i = 0; i < count; i++) rows[i] = (const Number *)data + base + keys.at(low + i) * stride_s;
        else if constexpr (sizeof(Number) == 4) copy_rows(base, keys, low, count, copies, rows);
    }

    void copy_rows(int64_t base, const KeyList &keys, int64_t low, int64_t count, float *copies,
                   const float **rows) const {
        const float *first = (const float *)data + base;
        for (int64_t i = 0; i < count; i++, copies += padded) {
            const int64_t at = keys.at(low + i) * stride_s;
            if (is_bf16)
                for (int64_t d = 0; d < width; d++) copies[d] = bf16_to_float(((const uint16_t *)data)[base + at + d]);
            else std::copy_n(first + at, width, copies);
            std::fill(copies + width, copies + padded, 0.0f);
            rows[i] = copies;
        }
    }
};

struct AttentionInputs {
    AttentionShape shape;
    const void *q;
    Source k, v;
    const int32_t *topk;          // [B, T, K], from the query `first` on; read if there are no
    const int64_t *start, *stop;  // intervals
    const int32_t *rows;          // [B, S]: which row of k and v holds selected key s; null: in order
    int64_t first = 0;
    float softcap = 0;  // c of logits c tanh(l / c); 0: l

    AttentionInputs(const AttentionShape &shape, const void *q, const void *k, const void *v, const int32_t *topk,
                    const int64_t *start, const int64_t *stop, const int32_t *rows = nullptr)
        : shape(shape), q(q), k{k, shape.k_stride_b, shape.k_stride_s, shape.k_stride_g, shape.width,
                                round_up(shape.width, ROW_MULTIPLE), shape.is_bf16 != 0},
          v{v, shape.v_stride_b, shape.v_stride_s, shape.v_stride_g, shape.value_width,
            round_up(shape.value_width, ROW_MULTIPLE), shape.is_bf16 != 0},
          topk(topk), start(start), stop(stop), rows(rows) {
        const int64_t most = start ? shape.keys : shape.topk;
        const int64_t products = shape.batch * shape.queries * shape.heads * most * (shape.width + shape.value_width);
        this->shape.threads = useful_threads(shape.threads, products);
    }

    int64_t shared() const { return shape.heads / shape.key_heads; }

    template <class Number> bool in_place() const { return k.in_place<Number>() && v.in_place<Number>(); }

    // Keys of a tile. A tile of wide rows should not fill the level 2 cache.
    int64_t tile_keys() const { return k.padded + v.padded > 512 ? 32 : WIDEST_TILE; }

    int64_t row_of_key(int64_t b, int64_t s) const { return rows ? rows[b * shape.keys + s] : s; }

    const int32_t *chosen(int64_t row) const { return topk + (row - first) * shape.topk; }

    // `scratch`, of K numbers, takes the rows of what is selected, without the -1 among it.
    KeyList keys_of(int64_t row, int32_t *scratch) const {
        if (start) {
            const int64_t first = std::clamp<int64_t>(start[row], 0, shape.keys);
            return {nullptr, first, std::max<int64_t>(std::clamp<int64_t>(stop[row], 0, shape.keys) - first, 0)};
        }
        int64_t count = 0;
        for (int64_t i = 0; i < shape.topk; i++) {
            scratch[count] = chosen(row)[i];
            count += scratch[count] >= 0;
        }
        for (int64_t i = 0; rows && i < count; i++) scratch[i] = row_of_key(row / shape.queries, scratch[i]);
        return {scratch, 0, count};
    }
};

// out [B, T, H, V] of the queries' numbers; lse [B, T, H], or null where nobody asks for it; sinks [H], or null: logits
// that take part in a head's softmax and have no value.
struct Results {
    void *out;
    float *lse;
    const float *sinks;
    int64_t heads, width;
    bool is_bf16;

    Results(const AttentionShape &shape, void *out, float *lse, const float *sinks = nullptr)
        : out(out), lse(lse), sinks(sinks), heads(shape.heads), width(shape.value_width), is_bf16(shape.is_bf16 != 0) {}

    // Of one query's head, counted over all: sums of weighted values, the sum of the weights, and the power of 2 that
    // they lack. Keys that are there, but weigh nothing, have scores of -inf alone: as their softmax, no number.
    void write(int64_t head, const float *sums, float total, float peak, bool has_keys) const {
        if (total == 0 && has_keys) total = NAN;
        float fade = 1;
        if (sinks) {
            const float sink = sinks[head % heads] * LOG2_E, higher = std::max(peak, sink);
            fade = std::exp2(peak - higher);
            total = total * fade + std::exp2(sink - higher);
            peak = higher;
        }
        const float scale = total == 0 ? 0.0f : fade / total;
        if (is_bf16) write_row(sums, scale, (uint16_t *)out + head * width);
        else write_row(sums, scale, (float *)out + head * width);
        if (lse) lse[head] = (peak + std::log2(total)) / LOG2_E;
    }

  private:
    template <class Number> void write_row(const float *sums, float scale, Number *to) const {
        for (int64_t d = 0; d < width; d += LANES)
            put(rounded<Number>(load_some(sums + d, width - d) * scale), width - d, to + d);
    }
};

// Some keys and values of one query and key head. Number: float, or uint16_t (bfloat16) if all are in place.
template <class Number> struct KeyTile {
    int64_t count = 0;
    const Number *k[WIDEST_TILE], *v[WIDEST_TILE];
    std::vector<float> k_copy, v_copy;

    explicit KeyTile(const AttentionInputs &in)
        : k_copy(in.k.in_place<Number>() ? 0 : in.tile_keys() * in.k.padded),
          v_copy(in.v.in_place<Number>() ? 0 : in.tile_keys() * in.v.padded) {}

    void fill(const AttentionInputs &in, const KeyList &keys, int64_t low, int64_t b, int64_t g) {
        count = std::min(in.tile_keys(), keys.count - low);
        in.k.find_rows(b, g, keys, low, count, k_copy.data(), k);
        in.v.find_rows(b, g, keys, low, count, v_copy.data(), v);
        // Whole vectors of keys are computed; what lies beyond the last is thrown away.
        for (int64_t i = count; i < round_up(count, LANES); i++) k[i] = k[0], v[i] = v[0];
    }
};

// Rows reduced together: their sums take this many registers.
constexpr int KEYS = LANES < 8 ? LANES : 8;

// Start to bring some rows from memory to the level 2 cache. They lie anywhere, so no hardware guesses them:
// without this, half of the time goes into waiting.
template <class Number>
static inline void prefetch_rows(const Number *const *rows, int64_t low, int64_t high, int64_t width) {
    for (int64_t i = low; i < high; i++)
        for (int64_t d = 0; d < width; d += 64 / sizeof(Number)) __builtin_prefetch(rows[i] + d, 0, 2);
    asm volatile("");  // else GCC takes a function that only prefetches for one that does nothing, and does not call it
}

// The values of the keys low <= i < high of a tile, and the keys that come next.
template <class Number>
static inline void prefetch_tile(const AttentionInputs &in, const KeyTile<Number> &tile, int64_t low, int64_t high) {
    if (in.k.in_place<Number>())
        prefetch_rows(tile.k, std::min(high, tile.count), std::min(2 * high - low, tile.count), in.k.padded);
    if (in.v.in_place<Number>()) prefetch_rows(tile.v, low, std::min(high, tile.count), in.v.padded);
}

// out[h * WIDEST_TILE + i] = x[h] . rows[i] for N heads and whole vectors of rows.
template <int N, class Number>
static inline void dot_rows(const float *x, const Number *const *rows, int64_t count, int64_t width, float *out) {
    for (int64_t low = 0; low < count; low += LANES) {
        Vec parts[N][LANES / KEYS];
        for (int half = 0; half < LANES / KEYS; half++) {
            const Number *const *row = rows + low + half * KEYS;
            Vec sums[N][KEYS] = {};
            for (int64_t d = 0; d < width; d += LANES) {
                Vec factor[N];
                for (int n = 0; n < N; n++) factor[n] = load(x + n * width + d);
                for (int i = 0; i < KEYS; i++) {
                    const Vec numbers = load(row[i] + d);
                    for (int n = 0; n < N; n++) sums[n][i] += numbers * factor[n];
                }
            }
            for (int n = 0; n < N; n++) parts[n][half] = add_lanes<KEYS>(sums[n]);
        }
        for (int n = 0; n < N; n++) {
            Vec total = parts[n][0];
            if constexpr (LANES / KEYS == 2) total = add_halves<1>(parts[n][0], parts[n][1]);
            store(out + n * WIDEST_TILE + low, total);
        }
    }
}

// x to logits l = x * scale, and these to c tanh(l / c) with c = `softcap`: whole vectors of them.
static inline void cap_logits(float *x, int64_t count, float scale, float softcap) {
    for (int64_t i = 0; i < count; i += LANES) store(x + i, tanh_vec(load(x + i) * (scale / softcap)) * softcap);
}

// sums[h] += sum over i of weights[h * WIDEST_TILE + i] * rows[i], for N heads and C vectors from `from` on.
template <int N, int C, class Number>
static inline void add_rows_part(const float *weights, const Number *const *rows, int64_t count, int64_t width,
                                 int64_t from, float *sums) {
    Vec total[N][C];
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) total[n][c] = load(sums + n * width + from + c * LANES);
    for (int64_t i = 0; i < count; i++) {
        Vec numbers[C];
        for (int c = 0; c < C; c++) numbers[c] = load(rows[i] + from + c * LANES);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < C; c++) total[n][c] += numbers[c] * weights[n * WIDEST_TILE + i];
    }
    for (int n = 0; n < N; n++)
        for (int c = 0; c < C; c++) store(sums + n * width + from + c * LANES, total[n][c]);
}

template <int N, class Number>
static inline void add_rows(const float *weights, const Number *const *rows, int64_t count, int64_t width,
                            float *sums) {
    int64_t from = 0;
    for (; from + 4 * LANES <= width; from += 4 * LANES) add_rows_part<N, 4>(weights, rows, count, width, from, sums);
    for (; from < width; from += LANES) add_rows_part<N, 1>(weights, rows, count, width, from, sums);
}

// Heads computed together, for which registers suffice.
constexpr int MOST_HEADS = LANES == 8 ? 1 : 3;

// work(std::integral_constant<int, N>, first) for all heads, N of them at a time.
template <class Work> void for_heads(int64_t heads, const Work &work) {
    for (int64_t h = 0; h < heads;) {
        // 4 are two pairs: a head by itself uses a third of what it reads.
        const int64_t left = heads - h, now = std::min<int64_t>(left == 4 ? 2 : left, MOST_HEADS);
        if (now == 3) work(std::integral_constant<int, 3>{}, h);
        else if (now == 2) work(std::integral_constant<int, 2>{}, h);
        else work(std::integral_constant<int, 1>{}, h);
        h += now;
    }
}

// In attention.cpp. They throw std::bad_alloc.
void attend_to_keys(const AttentionInputs &in, float scale, const Results &results);
// Whether many queries come in blocks, whose selections may be found one after the other: then
// choose(batch, low, high, workspace) is called for each on the thread that attends to it, and fills in what is chosen.
struct SelectionWorkspace {
    std::vector<int32_t> chosen;  // [high - low, K]
    ChoiceWorkspace scores;
};
bool comes_in_blocks(const AttentionInputs &in);
using Choose = std::function<void(int64_t, int64_t, int64_t, SelectionWorkspace &)>;
void choose_and_attend(const AttentionInputs &in, float scale, const Results &results, const Choose &choose);

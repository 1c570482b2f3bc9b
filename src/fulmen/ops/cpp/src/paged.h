// A layer's paged caches and new tokens: RoPE, and where keys, values and index keys are stored.
#pragma once

#include "index_inputs.h"

#include <cmath>

// index_keys.cpp
extern "C" int fulmen_store_index_keys(const float *k, const int64_t *rows, int8_t *to, int64_t tokens, int64_t heads,
                                       int64_t width, int64_t row_bytes);

// Mirrored by `PagedLayerStruct` in abi.py. Strides count numbers (bytes of packed keys).
struct PagedLayer {
    int64_t heads, key_heads, width, index_heads, index_key_heads, index_width, topk, dense_up_to, is_bf16;
    int64_t kv_stride_r, kv_stride_g, packed_stride_r, use_tiles;
    int64_t coarse_heads, coarse_width, candidates, all_up_to, coarse_stride_r;  // no heads: one level
    void *kv;                     // [R, G, 2 D]: a head's key, then its value
    int8_t *packed;               // [R, I * (E + 2)]
    const int64_t *rope_pairs;    // [I, E / 2]: of the model's pairs; beyond them: is not rotated
    int8_t *coarse;               // [R, N + 2]
    const int64_t *coarse_pairs;  // [N / 2], as rope_pairs
    const float *sinks;           // [H]; null: none
    double scale, softcap;        // of the logits; softcap 0: none
};

// Mirrored there, too: the tokens of a step.
struct NewTokens {
    int64_t count, pairs, threads;
    const int64_t *rows, *index_rows, *coarse_rows;  // [T]: where they are stored
    const float *cos, *sin;            // [T, P], numbers of the model's dtype
};

// Mirrored by `KeyRowsStruct` in abi.py: B sequences, and how many keys each of their queries sees.
struct KeyRows {
    int64_t keys;
    const int32_t *rows, *index_rows, *coarse_rows;  // [B, S]: in which rows of the caches key s lies
    const int64_t *stop;                             // [B, T]
};

// Mirrored there, too: T queries of each of B sequences, rotated, in the model's dtype.
struct PagedQueries {
    int64_t batch, count, threads;
    const void *q, *index_q, *w, *b;   // [B, T, H, D], [B, T, J, E], [B, T, J]
    const void *coarse_q, *coarse_b;  // [B, T, M, N], [B, T, M]; null: no query has candidates
};

// Mirrored by `ProjectionsStruct` in abi.py: matrices of the model's dtype, row after row.
struct Projections {
    int64_t q_width, k_width, x_width;
    const void *q, *k, *w_and_b;      // [J E, X], [I E, X], [2 J + M, C]: weights, shifts, coarse shifts
    const void *coarse_q, *coarse_k;  // [M N, X], [N, X], as wide as q and k
    const float *bias;                // [2 J + M]
};

// In paged_sparse.cpp: out [B, T, H, D] in the model's dtype. Where every query sees `dense_up_to` keys at most, nothing is read
// of what the indexer has. Throws std::bad_alloc.
void attend_to_paged(const PagedLayer &layer, const PagedQueries &queries, const KeyRows &key_rows, void *out);

// Of T tokens, all in the model's dtype and before RoPE: heads side by side, tokens `stride` apart.
struct Heads {
    const void *numbers;
    int64_t stride;

    template <class Number> const Number *of(int64_t token) const { return (const Number *)numbers + token * stride; }
    template <class Number> Heads from(int64_t offset) const { return {(const Number *)numbers + offset, stride}; }
};

// Angles of the indexer's pairs, each one of the model's.
class IndexAngles {
    std::vector<int32_t> pairs;  // of the model's, for each of the indexer's; P: none

  public:
    std::vector<float> cos, sin;

    IndexAngles(const int64_t *rope_pairs, int64_t count, int64_t model_pairs) : pairs(count), cos(count), sin(count) {
        for (int64_t p = 0; p < count; p++) pairs[p] = int32_t(std::min(rope_pairs[p], model_pairs));
    }

    // From the model's [P + 1].
    void take(const std::vector<float> &model_cos, const std::vector<float> &model_sin) {
        gather(model_cos.data(), cos.data());
        gather(model_sin.data(), sin.data());
    }

  private:
    void gather(const float *__restrict__ from, float *__restrict__ to) const {
        const int32_t *__restrict__ indices = pairs.data();
        for (size_t p = 0; p < pairs.size(); p++) to[p] = from[indices[p]];
    }
};

// One token's heads by RoPE.
template <class Number> class RotaryTable {
    const PagedLayer &layer;
    const NewTokens &tokens;
    IndexAngles index, coarse;                // of [I, E / 2] and [N / 2] pairs
    std::vector<float> model_cos, model_sin;  // [P + 1]: the last is not rotated

    // Dims p and p + `half`, for all p, of a head; further ones stay.
    template <class To>
    static void rotate(const Number *x, int64_t half, int64_t width, const float *cos, const float *sin, To *to) {
        for (int64_t p = 0; p < half; p += LANES) {
            const int64_t count = half - p;
            const Vec first = load_some(x + p, count), second = load_some(x + half + p, count);
            const Vec c = load_some(cos + p, count), s = load_some(sin + p, count);
            put(rounded<Number>(rounded<Number>(first * c) - rounded<Number>(second * s)), count, to + p);
            put(rounded<Number>(rounded<Number>(second * c) + rounded<Number>(first * s)), count, to + half + p);
        }
        for (int64_t d = 2 * half; d < width; d += LANES) put(load_some(x + d, width - d), width - d, to + d);
    }

  public:
    RotaryTable(const PagedLayer &layer, const NewTokens &tokens)
        : layer(layer), tokens(tokens), index(layer.rope_pairs, layer.index_key_heads * layer.index_width / 2, tokens.pairs),
          coarse(layer.coarse_pairs, layer.coarse_width / 2, tokens.pairs), model_cos(tokens.pairs + 1, 1.0f),
          model_sin(tokens.pairs + 1, 0.0f) {}

    void begin(int64_t token) {
        std::copy_n(tokens.cos + token * tokens.pairs, tokens.pairs, model_cos.data());
        std::copy_n(tokens.sin + token * tokens.pairs, tokens.pairs, model_sin.data());
        index.take(model_cos, model_sin);
        coarse.take(model_cos, model_sin);
    }

    template <class To> void rotate_heads(const Number *x, int64_t heads, To *to) const {
        for (int64_t h = 0; h < heads; h++)
            rotate(x + h * layer.width, tokens.pairs, layer.width, model_cos.data(), model_sin.data(), to + h * layer.width);
    }

    // `heads` heads in all, those of one index key head side by side.
    template <class To> void rotate_index_heads(const Number *x, int64_t heads, To *to) const {
        const int64_t width = layer.index_width, half = width / 2;
        for (int64_t j = 0; j < heads; j++) {
            const int64_t at = j * layer.index_key_heads / heads * half;
            rotate(x + j * width, half, width, index.cos.data() + at, index.sin.data() + at, to + j * width);
        }
    }

    template <class To> void rotate_coarse(const Number *x, int64_t heads, To *to) const {
        const int64_t width = layer.coarse_width;
        for (int64_t m = 0; m < heads; m++)
            rotate(x + m * width, width / 2, width, coarse.cos.data(), coarse.sin.data(), to + m * width);
    }
};

// One token's heads before RoPE; index_q and coarse_q may be null, coarse_k where there is one level.
template <class Number> struct TokenHeads {
    const Number *q, *k, *v, *index_q, *index_k, *coarse_q, *coarse_k;
};

// Of all tokens, in the model's dtype: rotated queries, and what the indexer selects by (null: nothing is selected).
template <class Number> struct SelectionInputs {
    Number *q, *index_q, *coarse_q;  // the last: null where there is one level, or none asks the other
};

// Keys, values and index keys into their caches, token by token; queries and index queries, rotated, to those of all tokens.
template <class Number> class TokenWriter {
    const PagedLayer &layer;
    const NewTokens &tokens;
    RotaryTable<Number> rotary;
    std::vector<float> index_rotated, coarse_rotated;

  public:
    TokenWriter(const PagedLayer &layer, const NewTokens &tokens)
        : layer(layer), tokens(tokens), rotary(layer, tokens), index_rotated(layer.index_key_heads * layer.index_width),
          coarse_rotated(layer.coarse_width) {}

    void take(int64_t token, const TokenHeads<Number> &heads, const SelectionInputs<Number> &to) {
        rotary.begin(token);
        store(token, heads.k, heads.v, heads.index_k);
        if (layer.coarse_width) {
            rotary.rotate_coarse(heads.coarse_k, 1, coarse_rotated.data());
            int8_t *row = layer.coarse + tokens.coarse_rows[token] * layer.coarse_stride_r;
            pack_index_head(coarse_rotated.data(), layer.coarse_width, row);
        }
        rotary.rotate_heads(heads.q, layer.heads, to.q + token * layer.heads * layer.width);
        if (!heads.index_q) return;
        rotary.rotate_index_heads(heads.index_q, layer.index_heads, to.index_q + token * layer.index_heads * layer.index_width);
        const int64_t numbers = layer.coarse_heads * layer.coarse_width;
        if (numbers && to.coarse_q) rotary.rotate_coarse(heads.coarse_q, layer.coarse_heads, to.coarse_q + token * numbers);
    }

  private:
    void store(int64_t token, const Number *k, const Number *v, const Number *index_k) {
        Number *row = (Number *)layer.kv + tokens.rows[token] * layer.kv_stride_r;
        for (int64_t g = 0; g < layer.key_heads; g++, row += layer.kv_stride_g) {
            rotary.rotate_heads(k + g * layer.width, 1, row);
            std::copy_n(v + g * layer.width, layer.width, row + layer.width);
        }
        rotary.rotate_index_heads(index_k, layer.index_key_heads, index_rotated.data());
        fulmen_store_index_keys(index_rotated.data(), tokens.index_rows + token, layer.packed, 1, layer.index_key_heads,
                                layer.index_width, layer.packed_stride_r);
    }
};

// New tokens over paged caches: rotated and stored; and one token of each of B sequences to the end of its attention.
//
// Each part exists as an operation of its own. At one token a sequence, what lies between them (tensors, checks,
// calls) takes longer than they do.

#include "paged.h"

namespace {

// Indices in a list of heads.
enum { Q, K, V, INDEX_Q, INDEX_K, COARSE_Q, COARSE_K, W, B, COARSE_B };

template <class Number>
void store_tokens(const PagedLayer &layer, const NewTokens &tokens, const Heads *heads, const SelectionInputs<Number> &to) {
    constexpr int64_t PER_ITEM = 32;
    const int64_t numbers = layer.heads * layer.width, index_numbers = layer.index_heads * layer.index_width;
    const int64_t threads = useful_threads(tokens.threads, 16 * tokens.count * (numbers + index_numbers));
    parallel_for((tokens.count + PER_ITEM - 1) / PER_ITEM, threads, [&](int64_t item) {
        TokenWriter<Number> writer(layer, tokens);
        for (int64_t t = item * PER_ITEM; t < std::min(tokens.count, (item + 1) * PER_ITEM); t++) {
            const auto of = [&](int which) { return heads[which].numbers ? heads[which].of<Number>(t) : nullptr; };
            writer.take(t, {of(Q), of(K), of(V), of(INDEX_Q), of(INDEX_K), of(COARSE_Q), of(COARSE_K)}, to);
        }
    });
}

float number(const float *x) { return *x; }
float number(const uint16_t *x) { return bf16_to_float(*x); }

// x is read once, and what follows it comes next: left to the hardware, rows from memory take half as long again.
template <class Number> float dot(const Number *x, const float *y, int64_t count) {
    constexpr int64_t STEP = 4 * LANES, LINE = 64 / sizeof(Number), AHEAD = 4096 / sizeof(Number);
    Vec sums[4] = {};
    int64_t at = 0;
    for (; at + STEP <= count; at += STEP) {
        for (int64_t i = 0; i < STEP; i += LINE) __builtin_prefetch(x + at + AHEAD + i, 0, 2);
        for (int part = 0; part < 4; part++) sums[part] += load(x + at + part * LANES) * load(y + at + part * LANES);
    }
    for (; at < count; at += LANES) sums[0] += load_some(x + at, count - at) * load_some(y + at, count - at);
    return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Index queries, keys, weights and shifts of the new tokens, before RoPE. Few tokens take as long as the matrices take to
// be read, so the threads share their rows.
template <class Number> class RowProjector {
    const PagedLayer &layer;
    const NewTokens &tokens;
    const int64_t n_q, n_k, n_w, n_coarse_q, n_coarse_k;  // rows of the matrices

    struct Matrix {
        const Number *rows;
        int64_t count, width, offset;  // where its results go
        Heads from;
        const float *bias;
        std::vector<float> inputs;  // [B, width]
    };

    Matrix matrix(const void *rows, int64_t count, int64_t width, int64_t offset, const Heads &from, const float *bias) const {
        Matrix made{(const Number *)rows, count, width, offset, from, bias, std::vector<float>(tokens.count * width)};
        for (int64_t t = 0; t < tokens.count; t++)
            for (int64_t i = 0; i < width; i++) made.inputs[t * width + i] = number(from.of<Number>(t) + i);
        return made;
    }

    void project_row(const Matrix &by, int64_t y) {
        for (int64_t t = 0; t < tokens.count; t++) {
            const float sum = dot(by.rows + y * by.width, by.inputs.data() + t * by.width, by.width);
            const Vec result = rounded<Number>(broadcast(sum + (by.bias ? by.bias[y] : 0.0f)));
            put(result, 1, out.data() + t * stride() + by.offset + y);
        }
    }

    int64_t coarse_from() const { return n_q + n_k + n_w; }
    int64_t stride() const { return coarse_from() + n_coarse_q + n_coarse_k; }

  public:
    std::vector<Number> out;  // [B]: index queries, index keys, weights and shifts, coarse shifts, coarse queries, coarse keys

    RowProjector(const PagedLayer &layer, const NewTokens &tokens)
        : layer(layer), tokens(tokens), n_q(layer.index_heads * layer.index_width),
          n_k(layer.index_key_heads * layer.index_width), n_w(2 * layer.index_heads + layer.coarse_heads),
          n_coarse_q(layer.coarse_heads * layer.coarse_width), n_coarse_k(layer.coarse_width), out(tokens.count * stride()) {}

    // From queries and keys of all heads, side by side, and hidden states; keys alone where nothing is selected, and without
    // coarse queries where all visible keys are candidates.
    void project(const Projections &by, const Heads &all_qk, const Heads &x, bool selects, bool asks_coarse) {
        constexpr int64_t PER_ITEM = 48;
        std::vector<Matrix> matrices{matrix(by.k, n_k, by.k_width, n_q, all_qk.from<Number>(by.q_width), nullptr)};
        const Heads keys = all_qk.from<Number>(by.q_width);
        if (n_coarse_k) matrices.push_back(matrix(by.coarse_k, n_coarse_k, by.k_width, coarse_from() + n_coarse_q, keys, nullptr));
        if (asks_coarse) matrices.push_back(matrix(by.coarse_q, n_coarse_q, by.q_width, coarse_from(), all_qk, nullptr));
        if (selects) {
            matrices.push_back(matrix(by.q, n_q, by.q_width, 0, all_qk, nullptr));
            matrices.push_back(matrix(by.w_and_b, n_w, by.x_width, n_q + n_k, x, by.bias));
        }
        std::vector<std::pair<const Matrix *, int64_t>> items;
        int64_t products = 0;
        for (const Matrix &some : matrices) {
            for (int64_t y = 0; y < some.count; y += PER_ITEM) items.push_back({&some, y});
            products += tokens.count * some.count * some.width;
        }
        parallel_for(items.size(), useful_threads(tokens.threads, 2 * products), [&](int64_t item) {
            const auto [by, low] = items[item];
            for (int64_t y = low; y < std::min(by->count, low + PER_ITEM); y++) project_row(*by, y);
        });
    }

    Heads index_q() const { return {out.data(), stride()}; }
    Heads index_k() const { return {out.data() + n_q, stride()}; }
    Heads w() const { return {out.data() + n_q + n_k, stride()}; }
    Heads b() const { return {out.data() + n_q + n_k + layer.index_heads, stride()}; }
    Heads coarse_b() const { return {out.data() + n_q + n_k + 2 * layer.index_heads, stride()}; }
    Heads coarse_q() const { return {out.data() + coarse_from(), stride()}; }
    Heads coarse_k() const { return {out.data() + coarse_from() + n_coarse_q, stride()}; }
};

// One token of each sequence is stored; what is needed to attend, rotated and side by side.
template <class Number> class NewQueries {
    const PagedLayer &layer;
    const NewTokens &tokens;
    std::vector<Number> q, index_q, w, b, coarse_q, coarse_b;

  public:
    NewQueries(const PagedLayer &layer, const NewTokens &tokens)
        : layer(layer), tokens(tokens), q(tokens.count * layer.heads * layer.width),
          index_q(tokens.count * layer.index_heads * layer.index_width), w(tokens.count * layer.index_heads), b(w.size()),
          coarse_q(tokens.count * layer.coarse_heads * layer.coarse_width), coarse_b(tokens.count * layer.coarse_heads) {}

    void store(const Heads *heads) {
        store_tokens<Number>(layer, tokens, heads, {q.data(), index_q.data(), coarse_q.data()});
        for (int64_t t = 0; heads[INDEX_Q].numbers && t < tokens.count; t++) {
            std::copy_n(heads[W].of<Number>(t), layer.index_heads, w.data() + t * layer.index_heads);
            std::copy_n(heads[B].of<Number>(t), layer.index_heads, b.data() + t * layer.index_heads);
            std::copy_n(heads[COARSE_B].of<Number>(t), layer.coarse_heads, coarse_b.data() + t * layer.coarse_heads);
        }
    }

    PagedQueries queries() const {
        return {tokens.count, 1, tokens.threads, q.data(), index_q.data(), w.data(), b.data(), coarse_q.data(), coarse_b.data()};
    }
};

template <class Number>
void decode(const PagedLayer &layer, const Projections &projections, const NewTokens &tokens, const KeyRows &key_rows,
            const Heads &qkv, const Heads &all_qk, const Heads &x, Number *out) {
    const int64_t longest = *std::max_element(key_rows.stop, key_rows.stop + tokens.count);
    const bool selects = longest > layer.dense_up_to, asks_coarse = layer.coarse_heads && longest > layer.all_up_to;
    RowProjector<Number> projected(layer, tokens);
    projected.project(projections, all_qk, x, selects, asks_coarse);
    const int64_t k = layer.heads * layer.width, v = k + layer.key_heads * layer.width;
    const Heads heads[] = {qkv, qkv.from<Number>(k), qkv.from<Number>(v), selects ? projected.index_q() : Heads{},
                           projected.index_k(), projected.coarse_q(), projected.coarse_k(), projected.w(), projected.b(),
                           projected.coarse_b()};
    NewQueries<Number> stored(layer, tokens);
    stored.store(heads);
    attend_to_paged(layer, stored.queries(), key_rows, out);
}

}  // namespace

extern "C" {

// heads: q, k, v, index_q (or null), index_k, coarse_q (or null) and coarse_k of the tokens. q_out [T, H, D] and
// index_q_out [T, J, E] and coarse_q_out [T, M, N], in the model's dtype, are rotated; the keys and values are stored.
int fulmen_paged_store(const PagedLayer *layer, const NewTokens *tokens, const Heads *heads, void *q_out,
                       void *index_q_out, void *coarse_q_out) try {
    if (layer->is_bf16)
        store_tokens<uint16_t>(*layer, *tokens, heads, {(uint16_t *)q_out, (uint16_t *)index_q_out, (uint16_t *)coarse_q_out});
    else store_tokens<float>(*layer, *tokens, heads, {(float *)q_out, (float *)index_q_out, (float *)coarse_q_out});
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// qkv: heads of queries, keys and values side by side; all_qk: queries and keys of all heads; x: hidden states. out
// [B, H, D] in the model's dtype.
int fulmen_paged_decode(const PagedLayer *layer, const Projections *projections, const NewTokens *tokens,
                        const KeyRows *key_rows, const void *qkv, int64_t qkv_stride, const void *all_qk,
                        int64_t all_qk_stride, const void *x, int64_t x_stride, void *out) try {
    const Heads of_qkv{qkv, qkv_stride}, of_all{all_qk, all_qk_stride}, of_x{x, x_stride};
    if (layer->is_bf16) decode(*layer, *projections, *tokens, *key_rows, of_qkv, of_all, of_x, (uint16_t *)out);
    else decode(*layer, *projections, *tokens, *key_rows, of_qkv, of_all, of_x, (float *)out);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

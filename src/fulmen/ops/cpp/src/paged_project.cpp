// Many new tokens: what the indexer makes of them by matrix tiles, RoPE, and what is stored; see paged_project.py.
//
// As matrix products of their own, then a pass over all heads, this takes twice as long: a token's numbers come from
// memory again for each of them.

#include "paged.h"

#ifdef FULMEN_TILES

namespace {

using Number = uint16_t;

// Tokens of an item: their inputs, their results and a matrix of a small model fit in a core's level 2 cache.
constexpr int64_t TOKENS = 128;
// Rows and columns of what four tiles of sums hold.
constexpr int64_t SQUARE = 2 * TILE_ROWS, CHUNK = TILE_BYTES / 2;

// A matrix [rows, width] for products with `from`, as right matrices [16 rows][chunk][pair of numbers][row].
struct Matrix {
    const Number *numbers;
    const int64_t rows, width, offset;  // the last: where its results go
    const Heads from;
    const float *bias;  // null: none
    const int64_t chunks = (width + CHUNK - 1) / CHUNK;
    std::unique_ptr<Line[]> packed{new Line[tiles() * chunks * TILE_ROWS]};

    // Whole squares.
    int64_t tiles() const { return round_up(rows, SQUARE) / TILE_ROWS; }
    const Line *tile(int64_t n) const { return packed.get() + n * chunks * TILE_ROWS; }

    void pack(int64_t n) {
        Line *to = packed.get() + n * chunks * TILE_ROWS;
        for (int64_t c = 0; c < chunks; c++, to += TILE_ROWS) {
            const __mmask32 present = ~uint32_t(0) >> (CHUNK - std::min(CHUNK, width - c * CHUNK));
            __m512i columns[TILE_ROWS] = {};
            for (int64_t r = 0; r < std::min(TILE_ROWS, rows - n * TILE_ROWS); r++)
                columns[r] = _mm512_maskz_loadu_epi16(present, numbers + (n * TILE_ROWS + r) * width + c * CHUNK);
            transpose_dwords(columns);
            for (int64_t r = 0; r < TILE_ROWS; r++) _mm512_store_si512(to + r, columns[r]);
        }
    }
};

// Rows that a matrix multiplies, in whole chunks: where they are, or, of other widths or counts, copies with zeros beyond.
class Inputs {
    const Matrix &matrix;
    std::unique_ptr<Line[]> copies;  // [token][chunk]; null until some are needed
    const char *first = nullptr;

  public:
    int64_t stride = 0;  // bytes

    explicit Inputs(const Matrix &matrix) : matrix(matrix) {}

    // Tokens low <= t < high; further rows hold anything.
    void take(int64_t low, int64_t high) {
        if (matrix.width % CHUNK == 0 && (high - low) % SQUARE == 0) {
            first = (const char *)matrix.from.of<Number>(low), stride = matrix.from.stride * sizeof(Number);
            return;
        }
        if (!copies) copies.reset(new Line[TOKENS * matrix.chunks]());
        first = (const char *)copies.get(), stride = matrix.chunks * TILE_BYTES;
        for (int64_t t = low; t < high; t++)
            std::copy_n(matrix.from.of<Number>(t), matrix.width, (Number *)(copies.get() + (t - low) * matrix.chunks));
    }

    const char *row(int64_t t) const { return first + t * stride; }
};

// What an item's tokens give, [token][all matrices' rows].
class Products {
    const int64_t stride;
    std::vector<Number> numbers;
    alignas(64) float sums[SQUARE * SQUARE];

  public:
    explicit Products(int64_t stride) : stride(stride), numbers(TOKENS * stride) {}

    const Number *of(int64_t token) const { return numbers.data() + token * stride; }

    void multiply(const Inputs &inputs, const Matrix &matrix, int64_t tokens) {
        for (int64_t n = 0; n < matrix.tiles(); n += 2)
            for (int64_t t = 0; t < tokens; t += SQUARE) {
                add_square(inputs, t, matrix.tile(n), matrix.chunks);
                keep(matrix, n * TILE_ROWS, t, std::min(tokens - t, SQUARE));
            }
    }

  private:
    void add_square(const Inputs &inputs, int64_t token, const Line *tile, int64_t chunks) {
        const char *rows = inputs.row(token), *others = inputs.row(token + TILE_ROWS);
        settle_memory();
        zero_tiles<2>();
        for (int64_t c = 0; c < chunks; c++, rows += TILE_BYTES, others += TILE_BYTES)
            add_products<2>(rows, others, inputs.stride, tile + c * TILE_ROWS, tile + (chunks + c) * TILE_ROWS);
        store_tiles<2>(sums, SQUARE);
        settle_memory();
    }

    // Rounds sums of the matrix's rows from `row` on.
    void keep(const Matrix &matrix, int64_t row, int64_t token, int64_t tokens) {
        for (int64_t i = 0; i < SQUARE && row + i < matrix.rows; i += LANES) {
            const int64_t count = matrix.rows - row - i;
            const Vec bias = matrix.bias ? load_some(matrix.bias + row + i, count) : Vec{};
            Number *to = numbers.data() + token * stride + matrix.offset + row + i;
            for (int64_t t = 0; t < tokens; t++) put(rounded<Number>(load(sums + t * SQUARE + i) + bias), count, to + t * stride);
        }
    }
};

class StoringProjector {
    const PagedLayer &layer;
    const NewTokens &tokens;
    const Heads qkv;
    const SelectionInputs<Number> to;
    Number *const w, *const b, *const coarse_b;
    const int64_t q_width, k_width, w_width, coarse_q_width, coarse_k_width;  // of what the indexer has
    std::vector<Matrix> matrices;  // of keys of both levels; then, if anything is selected, of their queries, w and b

  public:
    StoringProjector(const PagedLayer &layer, const NewTokens &tokens, const Projections &by, const Heads &qkv,
                         const Heads &all_qk, const Heads &x, const SelectionInputs<Number> &to, Number *w, Number *b, Number *coarse_b)
        : layer(layer), tokens(tokens), qkv(qkv), to(to), w(w), b(b), coarse_b(coarse_b), q_width(layer.index_heads * layer.index_width),
          k_width(layer.index_key_heads * layer.index_width), w_width(2 * layer.index_heads + (to.coarse_q ? layer.coarse_heads : 0)),
          coarse_q_width(to.coarse_q ? layer.coarse_heads * layer.coarse_width : 0), coarse_k_width(layer.coarse_width) {
        const int64_t coarse = k_width + q_width + w_width;
        const Heads keys = all_qk.from<Number>(by.q_width);
        if (coarse_k_width) add(by.coarse_k, coarse_k_width, by.k_width, coarse + coarse_q_width, keys, nullptr);
        if (coarse_q_width) add(by.coarse_q, coarse_q_width, by.q_width, coarse, all_qk, nullptr);
        add(by.k, k_width, by.k_width, 0, keys, nullptr);
        if (!to.index_q) return;
        add(by.q, q_width, by.q_width, k_width, all_qk, nullptr);
        add(by.w_and_b, w_width, by.x_width, k_width + q_width, x, by.bias);
    }

    void run() {
        std::vector<std::pair<Matrix *, int64_t>> tiles;
        int64_t products = 0;
        for (Matrix &matrix : matrices) {
            for (int64_t n = 0; n < matrix.tiles(); n++) tiles.push_back({&matrix, n});
            products += tokens.count * matrix.rows * matrix.width;
        }
        const int64_t threads = useful_threads(tokens.threads, products);
        parallel_for(tiles.size(), threads, [&](int64_t item) { tiles[item].first->pack(tiles[item].second); });
        std::atomic<int64_t> taken{0};
        parallel_for(threads, threads, [&](int64_t) {
            const TileScope scope(TileConfig::full());
            std::vector<Inputs> inputs(matrices.begin(), matrices.end());
            Products made(k_width + q_width + w_width + coarse_q_width + coarse_k_width);
            for (int64_t low; (low = TOKENS * taken++) < tokens.count;) {
                const int64_t high = std::min(low + TOKENS, tokens.count);
                for (size_t i = 0; i < matrices.size(); i++) {
                    inputs[i].take(low, high);
                    made.multiply(inputs[i], matrices[i], high - low);
                }
                store(made, low, high);
            }
        });
    }

  private:
    void add(const void *numbers, int64_t rows, int64_t width, int64_t offset, const Heads &from, const float *bias) {
        matrices.push_back({(const Number *)numbers, rows, width, offset, from, bias});
    }

    void store(const Products &products, int64_t low, int64_t high) const {
        const int64_t k = layer.heads * layer.width, v = k + layer.key_heads * layer.width, heads = layer.index_heads;
        TokenWriter<Number> writer(layer, tokens);
        for (int64_t t = low; t < high; t++) {
            const Number *own = qkv.of<Number>(t), *made = products.of(t - low);
            const Number *w_and_b = made + k_width + q_width, *coarse = w_and_b + w_width;
            writer.take(t, {own, own + k, own + v, to.index_q ? made + k_width : nullptr, made, coarse, coarse + coarse_q_width}, to);
            if (!to.index_q) continue;
            std::copy_n(w_and_b, heads, w + t * heads);
            std::copy_n(w_and_b + heads, heads, b + t * heads);
            if (coarse_b) std::copy_n(w_and_b + 2 * heads, layer.coarse_heads, coarse_b + t * layer.coarse_heads);
        }
    }
};

}  // namespace

extern "C" {

// qkv: heads of queries, keys and values side by side; all_qk: queries and keys of all heads; x: hidden states. q [T, H, D];
// index_q [T, J, E], w and b [T, J], or all three null; coarse_q [T, M, N] and coarse_b [T, M], or null: all bfloat16.
int fulmen_paged_project(const PagedLayer *layer, const Projections *projections, const NewTokens *tokens, const void *qkv,
                         int64_t qkv_stride, const void *all_qk, int64_t all_qk_stride, const void *x, int64_t x_stride,
                         void *q, void *index_q, void *w, void *b, void *coarse_q, void *coarse_b) try {
    const SelectionInputs<Number> to{(Number *)q, (Number *)index_q, (Number *)coarse_q};
    StoringProjector(*layer, *tokens, *projections, {qkv, qkv_stride}, {all_qk, all_qk_stride}, {x, x_stride}, to,
                     (Number *)w, (Number *)b, (Number *)coarse_b).run();
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
#endif

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

// Rows of numbers side by side, in whole chunks of 32; zero beyond `width`.
class Inputs {
    const int64_t width, chunks;
    std::unique_ptr<Line[]> lines;  // [token][chunk]

  public:
    explicit Inputs(int64_t width) : width(width), chunks((width + CHUNK - 1) / CHUNK), lines(new Line[TOKENS * chunks]()) {}

    // Tokens low <= t < high of `from`; further rows hold what they held.
    void take(const Heads &from, int64_t low, int64_t high) {
        for (int64_t t = low; t < high; t++)
            std::copy_n(from.of<Number>(t), width, (Number *)(lines.get() + (t - low) * chunks));
    }

    const Line *rows(int64_t first) const { return lines.get() + first * chunks; }
    int64_t row_bytes() const { return chunks * TILE_BYTES; }
};

// A matrix [rows, width] for products with inputs, as right matrices [16 rows][chunk][pair of numbers][row].
class Matrix {
    const Number *numbers;
    const int64_t width, chunks;

  public:
    const int64_t rows, place;  // where its results go
    const float *bias;          // null: none

  private:
    std::unique_ptr<Line[]> packed;

  public:
    Matrix(const void *numbers, int64_t rows, int64_t width, int64_t place, const float *bias)
        : numbers((const Number *)numbers), width(width), chunks((width + CHUNK - 1) / CHUNK), rows(rows), place(place),
          bias(bias), packed(new Line[tiles() * chunks * TILE_ROWS]) {}

    // Whole squares.
    int64_t tiles() const { return round_up(rows, SQUARE) / TILE_ROWS; }
    int64_t n_chunks() const { return chunks; }
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
                add_square(inputs.rows(t), inputs.row_bytes(), matrix.tile(n), matrix.n_chunks());
                keep(matrix, n * TILE_ROWS, t, std::min(tokens - t, SQUARE));
            }
    }

  private:
    void add_square(const Line *rows, int64_t row_bytes, const Line *tile, int64_t chunks) {
        const char *upper = rows->bytes, *lower = upper + TILE_ROWS * row_bytes;
        const Line *next = tile + chunks * TILE_ROWS;
        settle_memory();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t c = 0; c < chunks; c++, tile += TILE_ROWS, next += TILE_ROWS) {
            _tile_loadd(4, upper + c * TILE_BYTES, row_bytes);
            _tile_loadd(6, tile, TILE_BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, next, TILE_BYTES);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, lower + c * TILE_BYTES, row_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, sums, SQUARE * sizeof(float));
        _tile_stored(1, sums + TILE_ROWS, SQUARE * sizeof(float));
        _tile_stored(2, sums + TILE_ROWS * SQUARE, SQUARE * sizeof(float));
        _tile_stored(3, sums + TILE_ROWS * SQUARE + TILE_ROWS, SQUARE * sizeof(float));
        settle_memory();
    }

    // Rounds sums of the matrix's rows from `row` on.
    void keep(const Matrix &matrix, int64_t row, int64_t token, int64_t tokens) {
        for (int64_t i = 0; i < SQUARE && row + i < matrix.rows; i += LANES) {
            const int64_t count = matrix.rows - row - i;
            const Vec bias = matrix.bias ? load_some(matrix.bias + row + i, count) : Vec{};
            Number *to = numbers.data() + token * stride + matrix.place + row + i;
            for (int64_t t = 0; t < tokens; t++) put(rounded<Number>(load(sums + t * SQUARE + i) + bias), count, to + t * stride);
        }
    }
};

// Of all tokens, in the model's dtype: turned queries, and what the indexer selects by (null: nothing is selected).
struct ToSelect {
    Number *q, *index_q, *w, *b;
};

class ProjectingAndStoring {
    const PagedLayer &layer;
    const NewTokens &tokens;
    const Heads qkv, all_qk, x;
    const ToSelect to;
    const int64_t index_q_width, index_k_width;
    std::vector<Matrix> matrices;  // of index keys; then, if anything is selected, of the index queries, and w and b

    std::vector<Matrix> matrices_of(const Projections &by) const {
        std::vector<Matrix> made;
        made.emplace_back(by.k, index_k_width, by.k_width, 0, nullptr);
        if (!to.index_q) return made;
        made.emplace_back(by.q, index_q_width, by.q_width, index_k_width, nullptr);
        made.emplace_back(by.w_and_b, 2 * layer.index_heads, by.x_width, index_k_width + index_q_width, by.bias);
        return made;
    }

    int64_t stride() const { return index_k_width + index_q_width + 2 * layer.index_heads; }

  public:
    ProjectingAndStoring(const PagedLayer &layer, const NewTokens &tokens, const Projections &by, const Heads &qkv,
                         const Heads &all_qk, const Heads &x, const ToSelect &to)
        : layer(layer), tokens(tokens), qkv(qkv), all_qk(all_qk), x(x), to(to),
          index_q_width(layer.index_heads * layer.index_width),
          index_k_width(layer.index_key_heads * layer.index_width), matrices(matrices_of(by)) {}

    void run(const Projections &by) {
        std::vector<std::pair<Matrix *, int64_t>> tiles;
        for (Matrix &matrix : matrices)
            for (int64_t n = 0; n < matrix.tiles(); n++) tiles.push_back({&matrix, n});
        const int64_t threads = useful_threads(tokens.threads, tokens.count * index_q_width * by.q_width);
        parallel_for(tiles.size(), threads, [&](int64_t item) { tiles[item].first->pack(tiles[item].second); });
        std::atomic<int64_t> taken{0};
        parallel_for(threads, threads, [&](int64_t) {
            TileConfig config;
            for (int tile = 0; tile < 8; tile++) config.set(tile, TILE_ROWS, TILE_BYTES);
            const TileScope scope(config);
            Inputs of_k(by.k_width), of_q(by.q_width), of_x(by.x_width);
            Products products(stride());
            for (int64_t low; (low = TOKENS * taken++) < tokens.count;) {
                const int64_t high = std::min(low + TOKENS, tokens.count);
                of_k.take(all_qk.from<Number>(by.q_width), low, high);
                products.multiply(of_k, matrices[0], high - low);
                if (to.index_q) {
                    of_q.take(all_qk, low, high), of_x.take(x, low, high);
                    products.multiply(of_q, matrices[1], high - low);
                    products.multiply(of_x, matrices[2], high - low);
                }
                finish(products, low, high);
            }
        });
    }

  private:
    void finish(const Products &products, int64_t low, int64_t high) const {
        const int64_t q_width = layer.heads * layer.width, kv_width = layer.key_heads * layer.width;
        Turning<Number> turning(layer, tokens);
        Storing<Number> storing(layer, tokens);
        for (int64_t t = low; t < high; t++) {
            const Number *heads = qkv.of<Number>(t), *made = products.of(t - low);
            turning.begin(t);
            turning.turn_heads(heads, layer.heads, to.q + t * q_width);
            storing.store(turning, t, heads + q_width, heads + q_width + kv_width, made);
            if (!to.index_q) continue;
            turning.turn_index_heads(made + index_k_width, layer.index_heads, to.index_q + t * index_q_width);
            const Number *w = made + index_k_width + index_q_width;
            std::copy_n(w, layer.index_heads, to.w + t * layer.index_heads);
            std::copy_n(w + layer.index_heads, layer.index_heads, to.b + t * layer.index_heads);
        }
    }
};

}  // namespace

extern "C" {

// qkv: heads of queries, keys and values side by side; all_qk: queries and keys of all heads; x: hidden states. q [T, H, D];
// index_q [T, J, E], w and b [T, J], or all three null. All bfloat16.
int fulmen_paged_project(const PagedLayer *layer, const Projections *projections, const NewTokens *tokens, const void *qkv,
                         int64_t qkv_stride, const void *all_qk, int64_t all_qk_stride, const void *x, int64_t x_stride,
                         void *q, void *index_q, void *w, void *b) try {
    const ToSelect to{(Number *)q, (Number *)index_q, (Number *)w, (Number *)b};
    ProjectingAndStoring(*layer, *tokens, *projections, {qkv, qkv_stride}, {all_qk, all_qk_stride}, {x, x_stride}, to)
        .run(*projections);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}
#endif

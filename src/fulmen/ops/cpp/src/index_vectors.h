// Index scores in vectors: a lane holds a key, every lane adds its products over E one after the other and its heads
// one after the other, and whatever else is computed lies in other lanes.
#pragma once

#include "index_codes.h"

template <class Number> float to_float(Number x) {
    if constexpr (sizeof(Number) == 2) return bf16_to_float(x);
    else return x;
}

class VectorScorer {
    // Queries x vectors of keys whose sums stay in registers at once, of 32 or (AVX2) of 16.
    static constexpr int ROWS = 6;

    const IndexInputs &in;
    const int64_t batch;
    const int64_t groups;
    // As [group][head][E][ROWS] and [group][head][ROWS].
    std::vector<float> q, w, b;

  public:
    static constexpr int64_t ROWS_AT_ONCE = ROWS;
    static constexpr bool PACKS = true;
    using Workspace = TileWorkspace<VectorScorer>;
    struct Scope {
        explicit Scope(const IndexInputs &) {}
    };

    // Queries of a block, if the scores of so many fit.
    static int64_t block_rows(int64_t fit) { return std::clamp<int64_t>(fit / ROWS * ROWS, ROWS, 4 * ROWS); }
    static int64_t tile_lines(const IndexInputs &in) {
        return in.shape.key_heads * in.shape.width * TILE * int64_t(sizeof(float)) / TILE_BYTES;
    }

    VectorScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), batch(block.batch), groups((int64_t(block.rows.size()) + ROWS - 1) / ROWS), q(groups * in.shape.heads * in.shape.width * ROWS),
          w(groups * in.shape.heads * ROWS), b(w.size()) {
        const int64_t heads = in.shape.heads, width = in.shape.width;
        // Infinity becomes NaN: else it would score by the signs of the keys, and by tiles it cannot.
        const auto taken = [&](float x) { return std::isfinite(x) ? x * in.factor : NAN; };
        for (size_t r = 0; r < block.rows.size(); r++)
            for (int64_t j = 0; j < heads; j++) {
                const int64_t head = (r / ROWS) * heads + j, from = r * heads + j;
                w[head * ROWS + r % ROWS] = block.w[from];
                b[head * ROWS + r % ROWS] = block.b[from];
                for (int64_t e = 0; e < width; e++) q[(head * width + e) * ROWS + r % ROWS] = taken(block.q[from * width + e]);
            }
    }

    // Tile of keys to [key head][E][TILE], zero beyond the last key.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        if (in.shape.key_kind == PACKED) pack_codes(in, batch, tile, (float *)to);
        else if (in.shape.key_kind == BFLOAT16) pack_numbers<uint16_t>(in, batch, tile, (float *)to);
        else pack_numbers<float>(in, batch, tile, (float *)to);
    }

    // Scores of the block's queries for one tile, into rows `stride` apart.
    void score(int64_t index, Workspace &workspace, int64_t n_rows, float *scores, int64_t stride) const {
        const float *tile = (const float *)workspace.tile(in, batch, index);
        for (int64_t group = 0; group < groups; group++, scores += ROWS * stride)
            switch (std::min<int64_t>(ROWS, n_rows - group * ROWS)) {
            case 1: score_group<1>(group, tile, scores, stride); break;
            case 2: score_group<2>(group, tile, scores, stride); break;
            case 3: score_group<3>(group, tile, scores, stride); break;
            case 4: score_group<4>(group, tile, scores, stride); break;
            case 5: score_group<5>(group, tile, scores, stride); break;
            default: score_group<6>(group, tile, scores, stride);
            }
    }

  private:
    template <class Number> static void pack_numbers(const IndexInputs &in, int64_t batch, int64_t tile, float *to) {
        const IndexShape &shape = in.shape;
        const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, shape.keys - first);
        for (int64_t i = 0; i < shape.key_heads; i++, to += shape.width * TILE) {
            std::fill(to, to + shape.width * TILE, 0.0f);
            for (int64_t c = 0; c < count; c++) {
                const Number *from = in.key<Number>(batch, first + c, i);
                for (int64_t e = 0; e < shape.width; e++) to[e * TILE + c] = to_float(from[e]);
            }
        }
    }

    static void pack_codes(const IndexInputs &in, int64_t batch, int64_t tile, float *to) {
        const int64_t width = in.shape.width;
        const TileKeys tile_keys(in, batch, tile);
        for (int64_t i = 0; i < in.shape.key_heads; i++, to += width * TILE) {
            const int64_t at = i * in.shape.k_stride_i;
            float scales[TILE];
            tile_keys.copy_scales(at, width, scales);
            for (int64_t c = 0; c < TILE; c += LANES) {
                const Vec scale = load(scales + c);
                for_fours(tile_keys.keys + c, at, width, [&](int64_t four, IntVec codes) {
                    for (int64_t e = 4 * four; e < std::min(4 * four + 4, width); e++, codes >>= 8)
                        store(to + e * TILE + c, __builtin_convertvector((codes << 24) >> 24, Vec) * scale);
                });
            }
        }
    }

    // One head's part of the scores of N queries.
    //
    // Products and sums stand in one expression, so that the compiler fuses them in every instance or in none.
    template <int N, bool FIRST>
    static void score_head(const float *q, const float *w, const float *b, const float *k, int64_t width,
                           float *scores, int64_t stride) {
        Vec sums[N][COLUMNS];
        for (int n = 0; n < N; n++)
            for (int c = 0; c < COLUMNS; c++) sums[n][c] = broadcast(b[n]);
        for (int64_t e = 0; e < width; e++, k += TILE, q += ROWS) {
            Vec keys[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) keys[c] = load(k + c * LANES);
            for (int n = 0; n < N; n++)
                for (int c = 0; c < COLUMNS; c++) sums[n][c] += keys[c] * q[n];
        }
        for (int n = 0; n < N; n++)
            for (int c = 0; c < COLUMNS; c++) {
                float *at = scores + n * stride + c * LANES;
                const Vec relu = sums[n][c] < 0.0f ? Vec{} : sums[n][c];  // NaN stays
                if constexpr (FIRST) store(at, relu * w[n]);
                else store(at, load(at) + relu * w[n]);
            }
    }

    template <int N> void score_group(int64_t group, const float *tile, float *scores, int64_t stride) const {
        const int64_t width = in.shape.width, heads = in.shape.heads, first = group * heads;
        for (int64_t j = 0; j < heads; j++) {
            const float *head_q = q.data() + (first + j) * width * ROWS, *k = tile + j / in.shared() * width * TILE;
            const float *head_w = w.data() + (first + j) * ROWS, *head_b = b.data() + (first + j) * ROWS;
            if (j == 0) score_head<N, true>(head_q, head_w, head_b, k, width, scores, stride);
            else score_head<N, false>(head_q, head_w, head_b, k, width, scores, stride);
        }
    }
};

// Index scores of packed keys by integer products (AVX512-VNNI), where there are no matrix tiles.
//
// Keys' codes are integers. Each head of a query becomes integers, too, of 22 bits and a sign, times a power of two.
// Products and their sums are exact: a score has the same bits alone and among others, in any order.
#pragma once

#include "index_codes.h"

#ifdef __AVX512VNNI__
class IntegerScorer {
    // Queries whose sums stay in registers at once, with all digits.
    static constexpr int ROWS = 2;
    // Of a query's integers, and their digits, the highest first, each 256 times the next.
    static constexpr int BITS = 22, DIGITS = 3;
    static constexpr int32_t OFFSET = 128;  // codes are multiplied as unsigned numbers

    const IndexInputs &in;
    const int64_t batch, groups, steps;
    std::vector<int32_t> digits, starts;  // [group][head][step][digit][ROWS], and what sums begin with: [group][head][digit][ROWS]
    std::vector<float> unit, w, b;        // [group][head][ROWS]
    std::vector<bool> has_low;            // [group][head]: whether the last digits are not all 0

    static int64_t steps_of(int64_t width) { return (width + 3) / 4; }

  public:
    static constexpr int64_t ROWS_AT_ONCE = ROWS;
    static constexpr bool PACKS = true;
    // Sums of wider heads may be more than 32 bits hold.
    static constexpr int64_t MOST_WIDTH = 1024;
    using Workspace = TileWorkspace<IntegerScorer>;
    struct Scope {
        explicit Scope(const IndexInputs &) {}
    };

    // Queries of a block, if the scores of so many fit.
    static int64_t block_rows(int64_t fit) { return std::clamp<int64_t>(fit / ROWS * ROWS, ROWS, 12 * ROWS); }
    static int64_t tile_lines(const IndexInputs &in) {
        return in.shape.key_heads * (steps_of(in.shape.width) + 1) * TILE * int64_t(sizeof(int32_t)) / TILE_BYTES;
    }

    IntegerScorer(const IndexInputs &in, const QueryRows &block)
        : in(in), batch(block.batch), groups((int64_t(block.rows.size()) + ROWS - 1) / ROWS), steps(steps_of(in.shape.width)),
          digits(groups * in.shape.heads * steps * DIGITS * ROWS), starts(groups * in.shape.heads * DIGITS * ROWS),
          unit(groups * in.shape.heads * ROWS), w(unit.size()), b(unit.size()), has_low(groups * in.shape.heads) {
        const int64_t heads = in.shape.heads;
        for (size_t r = 0; r < block.rows.size(); r++)
            for (int64_t j = 0; j < heads; j++) {
                const int64_t from = r * heads + j;
                take_head(block.q.data() + from * in.shape.width, block.w[from], block.b[from], r / ROWS * heads + j, r % ROWS);
            }
    }

    // Tile of keys to [key head]: [step][TILE] four codes each, then [TILE] scales; zero beyond the last key.
    static void pack(const IndexInputs &in, int64_t batch, int64_t tile, Line *to) {
        const int64_t width = in.shape.width, steps = steps_of(width);
        const TileKeys tile_keys(in, batch, tile);
        int32_t *codes = (int32_t *)to;
        for (int64_t i = 0; i < in.shape.key_heads; i++, codes += (steps + 1) * TILE) {
            const int64_t at = i * in.shape.k_stride_i;
            float *scales = (float *)(codes + steps * TILE);
            tile_keys.copy_scales(at, width, scales);
            for (int64_t c = 0; c < TILE; c++) scales[c] *= in.factor;
            for (int64_t c = 0; c < TILE; c += LANES)
                for_fours(tile_keys.keys + c, at, width, [&](int64_t step, IntVec four) {
                    store_ints(codes + step * TILE + c, four ^ int32_t(0x80808080));
                });
        }
    }

    // Scores of the block's queries for one tile, into rows `stride` apart.
    void score(int64_t index, Workspace &workspace, int64_t n_rows, float *scores, int64_t stride) const {
        const int32_t *tile = (const int32_t *)workspace.tile(in, batch, index);
        for (int64_t group = 0; group < groups; group++, scores += ROWS * stride) {
            if (n_rows - group * ROWS == 1) score_group<1>(group, tile, scores, stride);
            else score_group<ROWS>(group, tile, scores, stride);
        }
    }

  private:
    // Head `head`, counted over groups, of a query in row `r` of its group.
    void take_head(const float *q, float weight, float shift, int64_t head, int64_t r) {
        const int64_t width = in.shape.width;
        float most = 0;
        bool finite = true;
        for (int64_t e = 0; e < width; e++) {
            finite &= bool(std::isfinite(q[e]));
            most = std::max(most, std::abs(q[e]));
        }
        int exponent = 0;
        if (finite) std::frexp(most, &exponent);
        // An extreme head is taken smaller or larger, with its shift, and its weight the other way round.
        constexpr int ORDINARY = 60, LESS = 64;
        const int less = std::abs(exponent) <= ORDINARY ? 0 : exponent > 0 ? LESS : -LESS;
        exponent -= less;
        const int64_t at = head * ROWS + r;
        // A query that is no number scores NaN: infinity would score by the signs of the keys.
        unit[at] = finite ? std::ldexp(1.0f, exponent - BITS) : NAN;
        w[at] = less ? std::ldexp(weight, less) : weight, b[at] = less ? std::ldexp(shift, -less) : shift;
        if (!finite) return;
        const float smaller = std::ldexp(1.0f, -less), to_integers = std::ldexp(1.0f, BITS - exponent);
        for (int64_t e = 0; e < width; e++) put_digits(int32_t(std::nearbyint(q[e] * smaller * to_integers)), e, head, r);
    }

    // Number `e` of a head. All digits but the first are of both signs, so that each fits its bits.
    void put_digits(int32_t number, int64_t e, int64_t head, int64_t r) {
        int32_t *to = digits.data() + (head * steps + e / 4) * DIGITS * ROWS + r;
        for (int d = DIGITS - 1; d >= 0; d--) {
            const int32_t rest = d ? (number + 128) >> 8 : 0, digit = number - (rest << 8);
            ((int8_t *)(to + d * ROWS))[e % 4] = int8_t(digit);
            starts[(head * DIGITS + d) * ROWS + r] -= OFFSET * digit;
            if (d == DIGITS - 1 && digit) has_low[head] = true;
            number = rest;
        }
    }

    // Of four codes a lane and as many digits.
    static IntVec add_products(IntVec sum, IntVec codes, int32_t digits) {
        return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(digits));
    }

    template <int N> void score_group(int64_t group, const int32_t *tile, float *scores, int64_t stride) const {
        const int64_t heads = in.shape.heads, per_head = (steps + 1) * TILE;
        for (int64_t j = 0; j < heads; j++) {
            const int64_t head = group * heads + j;
            const int32_t *codes = tile + j / in.shared() * per_head;
            if (has_low[head]) score_head<N, DIGITS>(head, codes, j == 0, scores, stride);
            else score_head<N, DIGITS - 1>(head, codes, j == 0, scores, stride);
        }
    }

    // One head's part of the scores of N queries, by their first D digits.
    template <int N, int D>
    void score_head(int64_t head, const int32_t *codes, bool first, float *scores, int64_t stride) const {
        IntVec sums[N][D][COLUMNS];
        for (int n = 0; n < N; n++)
            for (int d = 0; d < D; d++)
                for (int c = 0; c < COLUMNS; c++) sums[n][d][c] = starts[(head * DIGITS + d) * ROWS + n] - IntVec{};
        const int32_t *q = digits.data() + head * steps * DIGITS * ROWS;
        for (int64_t s = 0; s < steps; s++, codes += TILE, q += DIGITS * ROWS) {
            IntVec some[COLUMNS];
            for (int c = 0; c < COLUMNS; c++) some[c] = load_ints(codes + c * LANES);
            for (int n = 0; n < N; n++)
                for (int d = 0; d < D; d++)
                    for (int c = 0; c < COLUMNS; c++) sums[n][d][c] = add_products(sums[n][d][c], some[c], q[d * ROWS + n]);
        }
        for (int n = 0; n < N; n++)
            for (int c = 0; c < COLUMNS; c++) {
                const IntVec high = (sums[n][0][c] << 8) + sums[n][1][c];
                Vec sum = __builtin_convertvector(high, Vec) * (256 * unit[head * ROWS + n]);
                if constexpr (D == DIGITS) sum += __builtin_convertvector(sums[n][D - 1][c], Vec) * unit[head * ROWS + n];
                add_relu(sum, load((const float *)codes + c * LANES), head * ROWS + n, first, scores + n * stride + c * LANES);
            }
    }

    void add_relu(Vec product, Vec scale, int64_t at, bool first, float *to) const {
        const Vec logit = product * scale + b[at], relu = logit < 0.0f ? Vec{} : logit;  // NaN stays
        store(to, (first ? Vec{} : load(to)) + relu * w[at]);
    }
};
#endif

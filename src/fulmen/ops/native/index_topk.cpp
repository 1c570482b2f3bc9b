// Index scores and the exact selection of the K best keys of every query; see ops/README.md for both rules.
//
// A score's bits depend on its query and its key alone: a lane holds a key, every lane adds its products over E
// one after the other and its heads one after the other, and whatever else is computed lies in other lanes.

#include "threads.h"
#include "vectors.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <memory>
#include <vector>

// Queries x vectors of keys whose sums stay in registers at once, of 32 or (AVX2) of 16.
constexpr int ROWS = 6;
constexpr int COLUMNS = LANES == 8 ? 2 : 4;
constexpr int TILE = COLUMNS * LANES;
// Scores of one block of queries: they should stay in a core's level 2 cache.
constexpr int64_t BLOCK_SCORES = 1 << 18;
constexpr int64_t MOST_BLOCK_ROWS = 4 * ROWS;

// Mirrored by `IndexShape` in native_library.py. Strides count numbers; all but k and rows are contiguous.
//
// Queries that see at most `whole` keys choose them all, the others topk of them, into rows of `columns`. Packed keys
// (`index_keys.py`) have one stride of bytes. With `rows`, key s of batch row b is row rows[b, s] of k.
struct IndexShape {
    int64_t batch, queries, keys, heads, key_heads, width, topk, whole, columns;
    int64_t k_kind, k_stride_b, k_stride_s, k_stride_i, rows_stride, threads;
};

enum KeyKind : int64_t { FLOAT32, BFLOAT16, PACKED };

namespace {

struct Inputs {
    IndexShape shape;
    const float *q, *w, *b;  // q is scaled; b may be null
    const void *k;
    const int32_t *rows;  // or null
    const int64_t *start, *stop;
    std::unique_ptr<float[]> packed;  // all tiles of all keys, or null: then they are packed as they are needed

    int64_t tiles() const { return (shape.keys + TILE - 1) / TILE; }
    int64_t tile_numbers() const { return shape.key_heads * shape.width * TILE; }
    int64_t row_of(int64_t batch, int64_t key) const { return rows ? rows[batch * shape.rows_stride + key] : key; }
};

IndexShape with_useful_threads(IndexShape shape) {
    const int64_t products = shape.batch * shape.queries * shape.keys * shape.heads * shape.width;
    shape.threads = useful_threads(shape.threads, products);
    return shape;
}

struct Interval {
    int64_t start, stop;
};

Interval interval_of(const int64_t *start, const int64_t *stop, int64_t row, int64_t keys) {
    return {std::max<int64_t>(start[row], 0), std::min(stop[row], keys)};
}

// ---- scores ----

template <class Number> float to_float(Number x) {
    if constexpr (sizeof(Number) == 2) return bf16_to_float(x);
    else return x;
}

// Tile of keys to [key head][E][TILE], zero beyond the last key.
template <class Number> void pack_keys(const Inputs &in, const Number *k, int64_t batch, int64_t tile, float *to) {
    const IndexShape &shape = in.shape;
    const int64_t first = tile * TILE, count = std::min<int64_t>(TILE, shape.keys - first);
    for (int64_t i = 0; i < shape.key_heads; i++) {
        const Number *from = k + batch * shape.k_stride_b + first * shape.k_stride_s + i * shape.k_stride_i;
        float *rows = to + i * shape.width * TILE;
        for (int64_t e = 0; e < shape.width; e++)
            for (int64_t c = 0; c < TILE; c++)
                rows[e * TILE + c] = c < count ? to_float(from[c * shape.k_stride_s + e]) : 0.0f;
    }
}

// Where the bytes of a row of packed keys go: those of levels to the next vector of numbers, those of scales nowhere.
struct RowSink {
    const Vec *scales;
    float *to;
    int64_t width, place;  // place: byte within a head
    Vec scale;

    RowSink(const Vec *scales, float *to, int64_t width, int64_t byte)
        : scales(scales + byte / (width + 2)), to(to + std::min(byte % (width + 2), width) * TILE), width(width),
          place(byte % (width + 2)), scale(*this->scales) {
        this->to += byte / (width + 2) * width * TILE;
    }

    // One byte of each key, in the highest bits of its lane.
    void put(IntVec bytes) {
        if (place < width) {
            store(to, __builtin_convertvector(bytes >> 24, Vec) * scale);
            to += TILE;
            place++;
        } else if (++place == width + 2) {
            place = 0;
            scale = *++scales;
        }
    }
};

// The same from packed keys: transposed as words of 4 bytes, then each byte becomes a number of its key's lane.
void unpack_keys(const Inputs &in, int64_t batch, int64_t tile, float *to) {
    const IndexShape &shape = in.shape;
    constexpr int64_t CHUNK = 4 * LANES;
    const int64_t head_bytes = shape.width + 2, row_bytes = shape.key_heads * head_bytes;
    std::vector<Vec> scales(shape.key_heads + 1);
    for (int c = 0; c < TILE; c += LANES) {
        const int8_t *keys[LANES];
        for (int lane = 0; lane < LANES; lane++) {
            // Beyond the last key, that one again: nobody reads those scores.
            const int64_t key = std::min(tile * TILE + c + lane, shape.keys - 1);
            keys[lane] = (const int8_t *)in.k + in.row_of(batch, key) * shape.k_stride_s;
        }
        for (int64_t i = 0; i < shape.key_heads; i++)
            for (int lane = 0; lane < LANES; lane++) {
                uint16_t scale;
                std::memcpy(&scale, keys[lane] + i * head_bytes + shape.width, sizeof scale);
                scales[i][lane] = bf16_to_float(scale);
            }
        for (int64_t done = 0; done < row_bytes; done += CHUNK) {
            // The last chunk overlaps the one before it, as nothing may be read beyond the row.
            const int64_t at = std::max<int64_t>(std::min(done, row_bytes - CHUNK), 0);
            const int64_t bytes = std::min(CHUNK, row_bytes);
            IntVec words[LANES] = {};
            if (bytes == CHUNK)
                for (int lane = 0; lane < LANES; lane++) std::memcpy(&words[lane], keys[lane] + at, CHUNK);
            else
                for (int lane = 0; lane < LANES; lane++) std::memcpy(&words[lane], keys[lane] + at, bytes);
            transpose_words(words);
            RowSink sink(scales.data(), to + c, shape.width, at);
            for (int64_t word = 0; word < bytes / 4; word++) {
                sink.put(words[word] << 24);
                sink.put(words[word] << 16);
                sink.put(words[word] << 8);
                sink.put(words[word]);
            }
            if (bytes % 4) {  // rows have an even number of bytes
                sink.put(words[bytes / 4] << 24);
                sink.put(words[bytes / 4] << 16);
            }
        }
    }
}

void pack_tile(const Inputs &in, int64_t batch, int64_t tile, float *to) {
    if (in.shape.k_kind == PACKED) unpack_keys(in, batch, tile, to);
    else if (in.shape.k_kind == BFLOAT16) pack_keys(in, (const uint16_t *)in.k, batch, tile, to);
    else pack_keys(in, (const float *)in.k, batch, tile, to);
}

const float *tile_of(const Inputs &in, int64_t batch, int64_t tile, float *scratch) {
    if (in.packed) return in.packed.get() + (batch * in.tiles() + tile) * in.tile_numbers();
    pack_tile(in, batch, tile, scratch);
    return scratch;
}

// Queries whose scores are computed together, up to ROWS at a time, with q as [group][head][E][ROWS].
struct QueryBlock {
    int64_t batch;
    std::vector<int64_t> rows;  // indices into [B * T]
    std::vector<Interval> intervals;
    int64_t first, last;  // hull of the intervals
    std::vector<float> q, w, b;

    int64_t groups() const { return (int64_t(rows.size()) + ROWS - 1) / ROWS; }
    int group_rows(int64_t group) const { return int(std::min<int64_t>(ROWS, rows.size() - group * ROWS)); }
};

QueryBlock make_block(const Inputs &in, int64_t batch, const std::vector<int64_t> &rows) {
    const int64_t heads = in.shape.heads, width = in.shape.width;
    QueryBlock block{batch, rows, {}, in.shape.keys, 0, {}, {}, {}};
    block.q.resize(block.groups() * heads * width * ROWS);
    block.w.resize(block.groups() * heads * ROWS);
    block.b.resize(block.w.size());
    for (size_t r = 0; r < rows.size(); r++) {
        const Interval seen = interval_of(in.start, in.stop, rows[r], in.shape.keys);
        block.intervals.push_back(seen);
        if (seen.start < seen.stop) {
            block.first = std::min(block.first, seen.start);
            block.last = std::max(block.last, seen.stop);
        }
        for (int64_t j = 0; j < heads; j++) {
            const int64_t head = (r / ROWS) * heads + j, from = rows[r] * heads + j;
            block.w[head * ROWS + r % ROWS] = in.w[from];
            block.b[head * ROWS + r % ROWS] = in.b ? in.b[from] : 0.0f;
            for (int64_t e = 0; e < width; e++)
                block.q[(head * width + e) * ROWS + r % ROWS] = in.q[from * width + e];
        }
    }
    return block;
}

// One head's part of the scores of N queries for a tile of keys, into rows `stride` apart.
//
// Products and sums stand in one expression, so that the compiler fuses them in every instance or in none.
template <int N, bool FIRST>
void score_head(const float *q, const float *w, const float *b, const float *k, int64_t width, float *scores,
                int64_t stride) {
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

template <int N>
void score_group(const Inputs &in, const float *q, const float *w, const float *b, const float *tile, float *scores,
                 int64_t stride) {
    const int64_t width = in.shape.width, shared = in.shape.heads / in.shape.key_heads;
    score_head<N, true>(q, w, b, tile, width, scores, stride);
    for (int64_t j = 1; j < in.shape.heads; j++) {
        const float *k = tile + j / shared * width * TILE;
        score_head<N, false>(q + j * width * ROWS, w + j * ROWS, b + j * ROWS, k, width, scores, stride);
    }
}

// `score_head` for one query and N further heads of one key head, which meet each key while it is in a register.
template <int N>
void score_heads(const float *q, const float *w, const float *b, const float *k, int64_t width, float *scores) {
    Vec sums[N][COLUMNS];
    for (int n = 0; n < N; n++)
        for (int c = 0; c < COLUMNS; c++) sums[n][c] = broadcast(b[n * ROWS]);
    for (int64_t e = 0; e < width; e++, k += TILE) {
        Vec keys[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) keys[c] = load(k + c * LANES);
        for (int n = 0; n < N; n++)
            for (int c = 0; c < COLUMNS; c++) sums[n][c] += keys[c] * q[(n * width + e) * ROWS];
    }
    for (int c = 0; c < COLUMNS; c++) {
        Vec total = load(scores + c * LANES);
        for (int n = 0; n < N; n++) {
            const Vec relu = sums[n][c] < 0.0f ? Vec{} : sums[n][c];
            total = total + relu * w[n * ROWS];
        }
        store(scores + c * LANES, total);
    }
}

void score_query(const Inputs &in, const float *q, const float *w, const float *b, const float *tile, float *scores) {
    constexpr int64_t MOST = 3;
    const int64_t width = in.shape.width, shared = in.shape.heads / in.shape.key_heads;
    score_head<1, true>(q, w, b, tile, width, scores, 0);
    for (int64_t j = 1, now; j < in.shape.heads; j += now) {
        const float *k = tile + j / shared * width * TILE, *q_j = q + j * width * ROWS;
        now = std::min(MOST, shared - j % shared);
        if (now == 3) score_heads<3>(q_j, w + j * ROWS, b + j * ROWS, k, width, scores);
        else if (now == 2) score_heads<2>(q_j, w + j * ROWS, b + j * ROWS, k, width, scores);
        else score_heads<1>(q_j, w + j * ROWS, b + j * ROWS, k, width, scores);
    }
}

void score_tile(const Inputs &in, const QueryBlock &block, const float *tile, float *scores, int64_t stride) {
    const int64_t heads = in.shape.heads, width = in.shape.width;
    for (int64_t group = 0; group < block.groups(); group++, scores += ROWS * stride) {
        const float *q = block.q.data() + group * heads * width * ROWS;
        const float *w = block.w.data() + group * heads * ROWS, *b = block.b.data() + group * heads * ROWS;
        switch (block.group_rows(group)) {
        case 1: score_query(in, q, w, b, tile, scores); break;
        case 2: score_group<2>(in, q, w, b, tile, scores, stride); break;
        case 3: score_group<3>(in, q, w, b, tile, scores, stride); break;
        case 4: score_group<4>(in, q, w, b, tile, scores, stride); break;
        case 5: score_group<5>(in, q, w, b, tile, scores, stride); break;
        default: score_group<6>(in, q, w, b, tile, scores, stride);
        }
    }
}

// Scores of a block in rows of `stride`; column 0 is the first key of the block's first tile.
void score_block(const Inputs &in, const QueryBlock &block, int64_t threads, float *scores, int64_t stride) {
    const int64_t first = block.first / TILE, count = (block.last + TILE - 1) / TILE - first;
    const int64_t chunk = threads > 1 ? std::max<int64_t>((count + 2 * threads - 1) / (2 * threads), 8) : count;
    if (count <= 0) return;
    parallel_for((count + chunk - 1) / chunk, threads, [&](int64_t item) {
        std::unique_ptr<float[]> scratch(in.packed ? nullptr : new float[in.tile_numbers()]);
        for (int64_t i = item * chunk; i < std::min(count, (item + 1) * chunk); i++) {
            const float *tile = tile_of(in, block.batch, first + i, scratch.get());
            score_tile(in, block, tile, scores + i * TILE, stride);
        }
    });
}

// ---- selection ----

// Floats to integers of the same order; -0 equals 0, and NaN is below all numbers.
void rank_scores(const float *scores, int64_t count, int32_t *ranks) {
    for (int64_t s = 0; s < count; s++) {
        const float number = scores[s] + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        bits ^= (bits >> 31) & INT_MAX;
        ranks[s] = number == number ? bits : INT_MIN;
    }
}

int64_t count_from(const int32_t *ranks, int64_t count, int32_t least) {
    int64_t total = 0;
    for (int64_t low = 0; low < count; low += 1 << 16) {
        int32_t found = 0;
        for (int64_t s = low; s < std::min<int64_t>(count, low + (1 << 16)); s++) found += ranks[s] >= least;
        total += found;
    }
    return total;
}

struct Threshold {
    int32_t rank;    // every rank above it is chosen
    int64_t excess;  // so many of those equal to it, the oldest, are not
};

// Halves the range of ranks until `topk` of them (0 < topk < count) lie from the threshold on.
Threshold find_threshold(const int32_t *ranks, int64_t count, int64_t topk) {
    int32_t least = INT_MAX, most = INT_MIN;
    for (int64_t s = 0; s < count; s++) {
        least = std::min(least, ranks[s]);
        most = std::max(most, ranks[s]);
    }
    int64_t low = least, high = int64_t(most) + 1, from_low = count;
    while (high - low > 1 && from_low != topk) {
        const int64_t middle = low + (high - low) / 2, from_middle = count_from(ranks, count, int32_t(middle));
        if (from_middle >= topk) low = middle, from_low = from_middle;
        else high = middle;
    }
    return {int32_t(low), from_low - topk};
}

void take_all(Interval seen, int64_t columns, int32_t *chosen) {
    for (int64_t i = 0; i < columns; i++) chosen[i] = seen.start + i < seen.stop ? int32_t(seen.start + i) : -1;
}

// Appends the positions low <= s < high with ranks from `least` on; no branch, so one number too many is written.
int64_t append_from(const int32_t *__restrict ranks, int64_t low, int64_t high, int32_t least,
                    int32_t *__restrict positions, int64_t taken) {
    for (int64_t s = low; s < high; s++) {
        positions[taken] = int32_t(s);
        taken += ranks[s] >= least;
    }
    return taken;
}

// Room for one row's selection.
struct SelectionRoom {
    std::unique_ptr<int32_t[]> ranks, positions;

    SelectionRoom(int64_t keys, int64_t topk) : ranks(new int32_t[keys]), positions(new int32_t[topk + 1]) {}
};

// `scores` are those of the interval, longer than topk.
void take_best(const float *scores, Interval seen, int64_t topk, const SelectionRoom &room, int32_t *chosen) {
    const int32_t *ranks = room.ranks.get();
    const int64_t count = seen.stop - seen.start;
    rank_scores(scores, count, room.ranks.get());
    const Threshold threshold = find_threshold(ranks, count, topk);
    int64_t passed = 0;  // so far, ties lose
    for (int64_t excess = threshold.excess; excess > 0; passed++) excess -= ranks[passed] == threshold.rank;
    int32_t *positions = room.positions.get();
    const int64_t taken = append_from(ranks, 0, passed, threshold.rank + 1, positions, 0);
    append_from(ranks, passed, count, threshold.rank, positions, taken);
    for (int64_t i = 0; i < topk; i++) chosen[i] = int32_t(seen.start + positions[i]);
}

// ---- blocks of queries ----

int64_t block_rows(const IndexShape &shape) {
    return std::clamp(BLOCK_SCORES / std::max<int64_t>(shape.keys, 1) / ROWS * ROWS, int64_t(ROWS), MOST_BLOCK_ROWS);
}

// finish(block, scores, stride, threads) for blocks of those queries that `wanted` names.
template <class Wanted, class Finish> void for_scored_blocks(Inputs &in, const Wanted &wanted, const Finish &finish) {
    const IndexShape &shape = in.shape;
    const int64_t per_block = block_rows(shape), blocks = (shape.queries + per_block - 1) / per_block;
    if (shape.queries > 2 * per_block) {
        in.packed.reset(new float[shape.batch * in.tiles() * in.tile_numbers()]);
        parallel_for(shape.batch * in.tiles(), shape.threads, [&](int64_t item) {
            const int64_t batch = item / in.tiles(), tile = item % in.tiles();
            pack_tile(in, batch, tile, in.packed.get() + item * in.tile_numbers());
        });
    }
    // Few blocks (decoding): the threads share each block's keys instead.
    const int64_t outer = blocks * shape.batch >= 2 * shape.threads ? shape.threads : 1;
    const int64_t inner = outer == 1 ? shape.threads : 1;
    parallel_for(blocks * shape.batch, outer, [&](int64_t item) {
        const int64_t batch = item / blocks, low = (blocks - 1 - item % blocks) * per_block;
        std::vector<int64_t> rows;
        for (int64_t t = low; t < std::min(low + per_block, shape.queries); t++)
            if (wanted(batch * shape.queries + t)) rows.push_back(batch * shape.queries + t);
        if (rows.empty()) return;
        const QueryBlock block = make_block(in, batch, rows);
        const int64_t tiles = (block.last + TILE - 1) / TILE - block.first / TILE;
        const int64_t stride = std::max<int64_t>(tiles, 0) * TILE;
        std::unique_ptr<float[]> scores(new float[block.groups() * ROWS * stride]);
        score_block(in, block, inner, scores.get(), stride);
        finish(block, scores.get(), stride, inner);
    });
}

const float *row_scores(const QueryBlock &block, const float *scores, int64_t stride, int64_t r) {
    return scores + r * stride + block.intervals[r].start - block.first / TILE * TILE;
}

// One head's key as `index_keys.py` packs it.
void pack_head(const float *k, int64_t width, int8_t *to) {
    float peak = 0;
    bool finite = true;
    for (int64_t e = 0; e < width; e++) {
        finite &= std::isfinite(k[e]);
        peak = std::max(peak, std::fabs(k[e]));
    }
    const float least = finite ? peak / 127 : NAN;
    uint32_t bits;
    std::memcpy(&bits, &least, sizeof bits);
    // The least bfloat16 that is not below; what is not finite stays so.
    const uint16_t scale = uint16_t((bits >> 16) + (finite && (bits & 0xffff)));
    const float divisor = bf16_to_float(scale) == 0 ? 1 : bf16_to_float(scale);
    for (int64_t e = 0; e < width; e++) {
        const float level = finite ? std::nearbyint(k[e] / divisor) : 0;
        to[e] = int8_t(std::clamp(level, -127.0f, 127.0f));
    }
    std::memcpy(to + width, &scale, sizeof scale);
}

}  // namespace

extern "C" {

// Token t of k [tokens, heads, width] goes, packed, to row rows[t] of `to`.
int fulmen_store_index_keys(const float *k, const int64_t *rows, int8_t *to, int64_t tokens, int64_t heads,
                            int64_t width, int64_t row_bytes) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < heads; i++)
            pack_head(k + (t * heads + i) * width, width, to + rows[t] * row_bytes + i * (width + 2));
    return 0;
}

// 0, or 1 where memory ran out (as in all functions here).
int fulmen_index_topk(const float *q, const void *k, const int32_t *rows, const float *w, const float *b,
                      const int64_t *start, const int64_t *stop, int32_t *chosen, const IndexShape *shape) try {
    Inputs in{with_useful_threads(*shape), q, w, b, k, rows, start, stop, nullptr};
    const int64_t topk = shape->topk, columns = shape->columns;
    auto wanted = [&](int64_t row) {
        const Interval seen = interval_of(start, stop, row, shape->keys);
        const bool must_choose = seen.stop - seen.start > std::max(topk, shape->whole);
        if (!must_choose) take_all(seen, columns, chosen + row * columns);
        return must_choose;
    };
    for_scored_blocks(in, wanted, [&](const QueryBlock &block, const float *scores, int64_t stride, int64_t threads) {
        parallel_for(block.rows.size(), threads, [&](int64_t r) {
            const SelectionRoom room(stride, topk);
            const float *row = row_scores(block, scores, stride, r);
            int32_t *to = chosen + block.rows[r] * columns;
            take_best(row, block.intervals[r], topk, room, to);
            std::fill(to + topk, to + columns, -1);
        });
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// `scores` [B, T, S] is filled with -inf by the caller.
int fulmen_index_scores(const float *q, const void *k, const int32_t *rows, const float *w, const float *b,
                        const int64_t *start, const int64_t *stop, float *scores, const IndexShape *shape) try {
    Inputs in{with_useful_threads(*shape), q, w, b, k, rows, start, stop, nullptr};
    auto wanted = [&](int64_t row) {
        const Interval seen = interval_of(start, stop, row, shape->keys);
        return seen.start < seen.stop;
    };
    for_scored_blocks(in, wanted, [&](const QueryBlock &block, const float *found, int64_t stride, int64_t) {
        for (size_t r = 0; r < block.rows.size(); r++) {
            const Interval seen = block.intervals[r];
            const float *from = row_scores(block, found, stride, r);
            std::copy_n(from, seen.stop - seen.start, scores + block.rows[r] * shape->keys + seen.start);
        }
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// Selection from scores [rows, keys].
int fulmen_select_topk(const float *scores, const int64_t *start, const int64_t *stop, int32_t *chosen,
                       int64_t rows, int64_t keys, int64_t topk, int64_t threads) try {
    constexpr int64_t PER_ITEM = 16;
    threads = useful_threads(threads, 8 * rows * keys);
    parallel_for((rows + PER_ITEM - 1) / PER_ITEM, threads, [&](int64_t item) {
        const SelectionRoom room(keys, topk);
        for (int64_t row = item * PER_ITEM; row < std::min(rows, (item + 1) * PER_ITEM); row++) {
            const Interval seen = interval_of(start, stop, row, keys);
            const float *from = scores + row * keys + seen.start;
            if (seen.stop - seen.start <= topk) take_all(seen, topk, chosen + row * topk);
            else take_best(from, seen, topk, room, chosen + row * topk);
        }
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

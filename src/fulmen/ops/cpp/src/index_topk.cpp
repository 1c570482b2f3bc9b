// Index scores and the exact selection of the K best keys of every query; see ops/README.md for both rules.
//
// A score's bits depend on its query and its key alone, whatever else is computed: every sum has
// one order, by vectors (index_vectors.h) and by tiles (index_query.h, index_block.h).

#include "index_block.h"
#include "index_query.h"
#include "index_vectors.h"
#include "selection.h"

namespace {

// Scores of one block of queries: they should stay in a core's level 2 cache.
constexpr int64_t BLOCK_SCORES = 1 << 18;

// Scores of a block in rows of `stride`; column 0 is the first key of the block's first tile.
template <class Scorer>
void score_block(const IndexInputs &in, const QueryRows &block, int64_t threads, float *scores, int64_t stride) {
    const int64_t first = block.first_tile(), count = block.tiles();
    const int64_t chunk = threads > 1 ? std::max<int64_t>((count + 2 * threads - 1) / (2 * threads), 8) : count;
    if (count <= 0) return;
    const Scorer scorer(in, block);
    parallel_for((count + chunk - 1) / chunk, threads, [&](int64_t item) {
        const typename Scorer::Scope scope(in);
        typename Scorer::Workspace workspace(in);
        for (int64_t i = item * chunk; i < std::min(count, (item + 1) * chunk); i++)
            scorer.score(first + i, workspace, block.rows.size(), scores + i * TILE, stride);
    });
}

// Queries scored together.
template <class Scorer> int64_t rows_of_block(const IndexInputs &in) {
    return Scorer::block_rows(BLOCK_SCORES / std::max<int64_t>(in.shape.keys, 1));
}

// All tiles of all keys at once, where more than two blocks read them.
template <class Scorer> void pack_tiles(IndexInputs &in) {
    if constexpr (Scorer::PACKS) {
        if (in.shape.queries <= 2 * rows_of_block<Scorer>(in)) return;
        const int64_t lines = Scorer::tile_lines(in);
        in.packed.reset(new Line[in.shape.batch * in.tiles() * lines]);
        parallel_for(in.shape.batch * in.tiles(), in.shape.threads, [&](int64_t item) {
            Scorer::pack(in, item / in.tiles(), item % in.tiles(), in.packed.get() + item * lines);
        });
    }
}

// Some queries of a batch row, low <= t < high, and who works for them.
struct Part {
    int64_t batch, low, high, threads;
    FloatWorkspace &workspace;  // for scores
};

// finish(block, scores, stride, threads) for those queries that `wanted` names.
template <class Scorer, class Wanted, class Finish>
void score_part(const IndexInputs &in, const Part &part, const Wanted &wanted, const Finish &finish) {
    std::vector<int64_t> rows;
    for (int64_t t = part.low; t < part.high; t++)
        if (wanted(part.batch * in.shape.queries + t)) rows.push_back(part.batch * in.shape.queries + t);
    if (rows.empty()) return;
    const QueryRows block(in, part.batch, std::move(rows));
    // Not a power of two: rows would share their lines of the caches.
    const int64_t stride = block.tiles() * TILE + LANES;
    float *scores = part.workspace.of(round_up(block.rows.size(), Scorer::ROWS_AT_ONCE) * stride);
    score_block<Scorer>(in, block, part.threads, scores, stride);
    finish(block, scores, stride, part.threads);
}

// The same for all queries, block by block.
template <class Scorer, class Wanted, class Finish>
void score_all(IndexInputs &in, const Wanted &wanted, const Finish &finish) {
    const IndexShape &shape = in.shape;
    const int64_t per_block = rows_of_block<Scorer>(in), blocks = (shape.queries + per_block - 1) / per_block;
    pack_tiles<Scorer>(in);
    // Few blocks (decoding): the threads share each block's keys instead.
    const int64_t outer = blocks * shape.batch >= 2 * shape.threads ? shape.threads : 1;
    parallel_for(blocks * shape.batch, outer, [&](int64_t item) {
        FloatWorkspace workspace;
        const int64_t low = (blocks - 1 - item % blocks) * per_block, high = std::min(low + per_block, shape.queries);
        score_part<Scorer>(in, {item / blocks, low, high, outer == 1 ? shape.threads : 1, workspace}, wanted, finish);
    });
}

template <class Scorer> struct ScorerType {
    using Type = Scorer;
};

// work(ScorerType<the scorer for these inputs>).
template <class Work> void with_scorer(const IndexInputs &in, const Work &work) {
#ifdef FULMEN_TILES
    if (in.by_tiles() && in.shape.queries == 1) return work(ScorerType<QueryScorer>{});
    if (in.by_tiles()) return work(ScorerType<BlockScorer>{});
#endif
    work(ScorerType<VectorScorer>{});
}

const float *row_scores(const QueryRows &block, const float *scores, int64_t stride, int64_t r) {
    return scores + r * stride + block.intervals[r].start - block.first_tile() * TILE;
}

// chosen [.., columns], of the queries from `first` on, counted over all.
struct RowChooser {
    const IndexInputs &in;
    int64_t first;
    int32_t *chosen;

    int32_t *of(int64_t row) const { return chosen + (row - first) * in.shape.columns; }

    // Whether scores must choose; if not, all keys are.
    bool must(int64_t row) const {
        const Interval visible = interval_of(in.start, in.stop, row, in.shape.keys);
        if (visible.stop - visible.start > in.shape.columns) return true;
        take_all(visible, in.shape.columns, of(row));
        return false;
    }

    void choose(const QueryRows &block, const float *scores, int64_t stride, int64_t threads) const {
        const int64_t topk = in.shape.topk, rows = block.rows.size(), parts = std::min(threads, rows);
        parallel_for(parts, threads, [&](int64_t part) {
            const SelectionScratch scratch(stride, topk);
            for (int64_t r = part; r < rows; r += parts) {
                int32_t *to = of(block.rows[r]);
                take_best(row_scores(block, scores, stride, r), block.intervals[r], topk, scratch, to);
                std::fill(to + topk, to + in.shape.columns, -1);
            }
        });
    }
};

}  // namespace

void choose_best(IndexInputs &in, int32_t *chosen) {
    const RowChooser chooser{in, 0, chosen};
    with_scorer(in, [&](auto use) {
        score_all<typename decltype(use)::Type>(
            in, [&](int64_t row) { return chooser.must(row); },
            [&](const auto &...scored) { chooser.choose(scored...); });
    });
}

void pack_index_keys(IndexInputs &in) {
    with_scorer(in, [&](auto use) { pack_tiles<typename decltype(use)::Type>(in); });
}

void choose_some(const IndexInputs &in, int64_t batch, int64_t low, int64_t high, FloatWorkspace &workspace, int32_t *chosen) {
    const RowChooser chooser{in, batch * in.shape.queries + low, chosen};
    with_scorer(in, [&](auto use) {
        using Scorer = typename decltype(use)::Type;
        const int64_t per_block = rows_of_block<Scorer>(in);
        for (int64_t from = low; from < high; from += per_block)
            score_part<Scorer>(
                in, {batch, from, std::min(from + per_block, high), 1, workspace},
                [&](int64_t row) { return chooser.must(row); },
                [&](const auto &...scored) { chooser.choose(scored...); });
    });
}

extern "C" {

// 0, or 1 where memory ran out (as in all functions here).
int fulmen_index_topk(const float *q, const void *k, const float *w, const float *b, const int64_t *start,
                      const int64_t *stop, int32_t *chosen, const IndexShape *shape) try {
    IndexInputs in(*shape, q, w, b, k, start, stop);
    choose_best(in, chosen);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

// `scores` [B, T, S] is filled with -inf by the caller.
int fulmen_index_scores(const float *q, const void *k, const float *w, const float *b, const int64_t *start,
                        const int64_t *stop, float *scores, const IndexShape *shape) try {
    IndexInputs in(*shape, q, w, b, k, start, stop);
    auto wanted = [&](int64_t row) {
        const Interval visible = interval_of(start, stop, row, shape->keys);
        return visible.start < visible.stop;
    };
    auto copy = [&](const QueryRows &block, const float *found, int64_t stride, int64_t) {
        for (size_t r = 0; r < block.rows.size(); r++) {
            const Interval visible = block.intervals[r];
            const float *from = row_scores(block, found, stride, r);
            std::copy_n(from, visible.stop - visible.start, scores + block.rows[r] * shape->keys + visible.start);
        }
    };
    with_scorer(in, [&](auto use) { score_all<typename decltype(use)::Type>(in, wanted, copy); });
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
        const SelectionScratch scratch(keys, topk);
        for (int64_t row = item * PER_ITEM; row < std::min(rows, (item + 1) * PER_ITEM); row++) {
            const Interval visible = interval_of(start, stop, row, keys);
            const float *from = scores + row * keys + visible.start;
            if (visible.stop - visible.start <= topk) take_all(visible, topk, chosen + row * topk);
            else take_best(from, visible, topk, scratch, chosen + row * topk);
        }
    });
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

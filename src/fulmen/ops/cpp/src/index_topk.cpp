// Index scores and the exact selection of the K best keys of every query; see ops/README.md for both rules.
//
// A score's bits depend on its query and its key alone, whatever else is computed: every sum has
// one order, by vectors (index_vectors.h), by integers (index_integers.h) and by tiles (index_query.h, index_block.h).

#include "index_block.h"
#include "index_integers.h"
#include "index_query.h"
#include "index_vectors.h"
#include "selection.h"

namespace {

// Scores of one block of queries: up to some thousand keys they stay in a core's level 2 cache. Beyond, blocks that share
// their packed keys and candidates are worth more.
constexpr int64_t BLOCK_SCORES = 1 << 20;

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

// Whether the candidates of a block's queries together are so few of the keys that these are looked up and packed for each
// block; else a block scores all keys, packed once for all blocks.
bool scores_candidates_alone(const IndexInputs &in) {
    constexpr int64_t SHARE = 6;  // neighbours share most of theirs; a guess, not tuned
    return in.coarse && (in.shape.queries == 1 || in.shape.keys > SHARE * in.candidates);
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
    ChoiceWorkspace &workspace;
};

// Those queries of a part that `wanted` names.
template <class Wanted> QueryRows wanted_rows(const IndexInputs &in, const Part &part, const Wanted &wanted) {
    std::vector<int64_t> rows;
    for (int64_t t = part.low; t < part.high; t++)
        if (wanted(part.batch * in.shape.queries + t)) rows.push_back(part.batch * in.shape.queries + t);
    return {in, part.batch, std::move(rows)};
}

// Scores of a block's queries in rows, which `stride` receives the distance of.
template <class Scorer>
float *scores_of(const IndexInputs &in, const QueryRows &block, int64_t threads, FloatWorkspace &workspace, int64_t &stride) {
    // Not a power of two: rows would share their lines of the caches.
    stride = block.tiles() * TILE + LANES;
    float *scores = workspace.of(round_up(block.rows.size(), Scorer::ROWS_AT_ONCE) * stride);
    score_block<Scorer>(in, block, threads, scores, stride);
    return scores;
}

// work(part) for all queries, block by block.
template <class Scorer, class Work> void for_parts(IndexInputs &in, const Work &work) {
    const IndexShape &shape = in.shape;
    const int64_t per_block = rows_of_block<Scorer>(in), blocks = (shape.queries + per_block - 1) / per_block;
    // Few blocks (decoding): the threads share each block's keys instead.
    const int64_t outer = blocks * shape.batch >= 2 * shape.threads ? shape.threads : 1;
    parallel_for(blocks * shape.batch, outer, [&](int64_t item) {
        ChoiceWorkspace workspace;
        const int64_t low = (blocks - 1 - item % blocks) * per_block, high = std::min(low + per_block, shape.queries);
        work(Part{item / blocks, low, high, outer == 1 ? shape.threads : 1, workspace});
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
#ifdef __AVX512VNNI__
    if (in.shape.key_kind == PACKED && in.shape.width <= IntegerScorer::MOST_WIDTH) return work(ScorerType<IntegerScorer>{});
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

// A block of queries that all see more keys than they leave to the indexer, by two levels: what the coarse scores leave to
// each query is scored together, each key once.
template <class Scorer> class TwoLevels {
    const IndexInputs &in;
    const QueryRows &block;
    const int64_t threads, rows, most;
    ChoiceWorkspace &workspace;
    const bool candidates_alone = scores_candidates_alone(in);

  public:
    TwoLevels(const IndexInputs &in, const QueryRows &block, int64_t threads, ChoiceWorkspace &workspace)
        : in(in), block(block), threads(threads), rows(block.rows.size()),
          most(in.candidates), workspace(workspace) {}

    void choose(const RowChooser &chooser) {
        take_candidates();
        if (candidates_alone) number_columns();
        int64_t stride;
        const float *scores = candidates_alone ? score_candidates(stride)
                                               : scores_of<Scorer>(in, block, threads, workspace.fine, stride);
        const int64_t topk = in.shape.topk, parts = std::min(threads, rows);
        parallel_for(parts, threads, [&](int64_t part) {
            const SelectionScratch scratch(most, topk);
            std::vector<float> own(most + LANES);
            for (int64_t r = part; r < rows; r += parts) {
                const int32_t *candidates = workspace.candidates.data() + r * most;
                for (int64_t i = 0; i < most; i++) own[i] = scores[r * stride + column(candidates[i], i)];
                int32_t *to = chooser.of(block.rows[r]);
                take_best(own.data(), {0, most}, topk, scratch, to);
                for (int64_t i = 0; i < topk; i++) to[i] = candidates[to[i]];
                std::fill(to + topk, to + in.shape.columns, -1);
            }
        });
    }

  private:
    // Of a key among those that are scored; a single query's are its candidates in their order.
    int64_t column(int32_t position, int64_t i) const {
        if (!candidates_alone) return position - block.first_tile() * TILE;
        return rows == 1 ? i : workspace.columns[position - block.first];
    }

    void take_candidates() {
        int64_t stride;
        float *scores = coarse_scores(stride);
        workspace.candidates.resize(rows * most + LANES);
        const int64_t parts = std::min(threads, rows);
        parallel_for(parts, threads, [&](int64_t part) {
            const SelectionScratch scratch(stride, most);
            for (int64_t r = part; r < rows; r += parts) {
                int32_t *to = workspace.candidates.data() + r * most;
                most_for_nan(scores + r * stride, stride);
                take_best(row_scores(block, scores, stride, r), block.intervals[r], most, scratch, to);
            }
        });
    }

    float *coarse_scores(int64_t &stride) {
        float *scores = nullptr;
        const QueryRows queries(*in.coarse, block.batch, block.rows);
        with_scorer(*in.coarse, [&](auto use) {
            scores = scores_of<typename decltype(use)::Type>(*in.coarse, queries, threads, workspace.scores, stride);
        });
        return scores;
    }

    // The indexer decides on a key whose coarse score is no number.
    static void most_for_nan(float *scores, int64_t count) {
        for (int64_t s = 0; s < count; s += LANES) {
            const Vec score = load(scores + s);
            store(scores + s, score == score ? score : broadcast(INFINITY));
        }
    }

    // `positions` of all keys that are a candidate of some query, ascending, and the column of each.
    void number_columns() {
        std::vector<int32_t> &positions = workspace.positions, &columns = workspace.columns;
        positions.clear();
        if (rows == 1) {
            positions.assign(workspace.candidates.data(), workspace.candidates.data() + most);
            return;
        }
        columns.assign(block.last - block.first, -1);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = 0; i < most; i++) columns[workspace.candidates[r * most + i] - block.first] = 0;
        for (int64_t s = 0; s < int64_t(columns.size()); s++) {
            if (columns[s] < 0) continue;
            columns[s] = int32_t(positions.size());
            positions.push_back(int32_t(block.first + s));
        }
    }

    // Index scores of the block's queries for these keys.
    const float *score_candidates(int64_t &stride) {
        const std::vector<int32_t> &positions = workspace.positions;
        workspace.rows = positions;
        for (int32_t &row : workspace.rows)
            if (in.rows) row = in.rows[block.batch * in.shape.keys + row];
        IndexShape shape = in.shape;
        shape.batch = 1, shape.keys = positions.size();
        const IndexInputs some(shape, in.q, in.w, in.b, in.of_batch(block.batch), nullptr, nullptr, workspace.rows.data(), in.is_bf16);
        QueryRows queries = block;
        queries.batch = 0, queries.first = 0, queries.last = shape.keys;
        return scores_of<Scorer>(some, queries, threads, workspace.fine, stride);
    }
};

template <class Scorer> void choose_part(const IndexInputs &in, const Part &part, const RowChooser &chooser) {
    const auto is_far = [&](int64_t row) {
        const Interval visible = interval_of(in.start, in.stop, row, in.shape.keys);
        return in.coarse && visible.stop - visible.start > in.all_up_to;
    };
    const QueryRows far = wanted_rows(in, part, [&](int64_t row) { return is_far(row) && chooser.must(row); });
    if (!far.rows.empty()) TwoLevels<Scorer>(in, far, part.threads, part.workspace).choose(chooser);
    const QueryRows block = wanted_rows(in, part, [&](int64_t row) { return !is_far(row) && chooser.must(row); });
    if (block.rows.empty()) return;
    int64_t stride;
    const float *scores = scores_of<Scorer>(in, block, part.threads, part.workspace.scores, stride);
    chooser.choose(block, scores, stride, part.threads);
}

}  // namespace

void choose_best(IndexInputs &in, int32_t *chosen) {
    const RowChooser chooser{in, 0, chosen};
    pack_index_keys(in);
    with_scorer(in, [&](auto use) {
        using Scorer = typename decltype(use)::Type;
        for_parts<Scorer>(in, [&](const Part &part) { choose_part<Scorer>(in, part, chooser); });
    });
}

void pack_index_keys(IndexInputs &in) {
    with_scorer(in, [&](auto use) { pack_tiles<typename decltype(use)::Type>(in); });
    if (in.coarse) pack_index_keys(*in.coarse);
}

void choose_some(const IndexInputs &in, int64_t batch, int64_t low, int64_t high, ChoiceWorkspace &workspace, int32_t *chosen) {
    const RowChooser chooser{in, batch * in.shape.queries + low, chosen};
    with_scorer(in, [&](auto use) {
        using Scorer = typename decltype(use)::Type;
        const int64_t per_block = rows_of_block<Scorer>(in);
        for (int64_t from = low; from < high; from += per_block)
            choose_part<Scorer>(in, {batch, from, std::min(from + per_block, high), 1, workspace}, chooser);
    });
}

extern "C" {

// 0, or 1 where memory ran out (as in all functions here). `coarse` may be null.
int fulmen_index_topk(const float *q, const void *k, const float *w, const float *b, const int64_t *start,
                      const int64_t *stop, int32_t *chosen, const IndexShape *shape, const CoarseLevel *coarse) try {
    IndexInputs in(*shape, q, w, b, k, start, stop);
    if (coarse) in.add_coarse(*coarse);
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
    auto copy = [&](const QueryRows &block, const float *found, int64_t stride) {
        for (size_t r = 0; r < block.rows.size(); r++) {
            const Interval visible = block.intervals[r];
            const float *from = row_scores(block, found, stride, r);
            std::copy_n(from, visible.stop - visible.start, scores + block.rows[r] * shape->keys + visible.start);
        }
    };
    with_scorer(in, [&](auto use) {
        using Scorer = typename decltype(use)::Type;
        pack_tiles<Scorer>(in);
        for_parts<Scorer>(in, [&](const Part &part) {
            const QueryRows block = wanted_rows(in, part, wanted);
            if (block.rows.empty()) return;
            int64_t stride;
            const float *found = scores_of<Scorer>(in, block, part.threads, part.workspace.scores, stride);
            copy(block, found, stride);
        });
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

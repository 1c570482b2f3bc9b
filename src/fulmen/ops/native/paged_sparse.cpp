// Queries over paged caches: what each keeps is chosen, then attended to, in one call.

#include "attention.h"
#include "paged.h"

namespace {

template <class Number> std::vector<float> floats_of(const void *numbers, int64_t count, int64_t threads) {
    constexpr int64_t PER_ITEM = 1 << 14;
    std::vector<float> to(count);
    parallel_for((count + PER_ITEM - 1) / PER_ITEM, useful_threads(threads, count), [&](int64_t item) {
        for (int64_t i = item * PER_ITEM; i < std::min(count, (item + 1) * PER_ITEM); i += LANES)
            store_some(to.data() + i, load_some((const Number *)numbers + i, count - i), count - i);
    });
    return to;
}

template <class Number>
void choose(const PagedLayer &layer, const PagedQueries &queries, const Sequences &seen, int64_t columns, int32_t *chosen) {
    const int64_t rows = queries.batch * queries.count, heads = layer.index_heads;
    const std::vector<float> q = floats_of<Number>(queries.index_q, rows * heads * layer.index_width, queries.threads);
    const std::vector<float> w = floats_of<Number>(queries.w, rows * heads, queries.threads);
    const std::vector<float> b = floats_of<Number>(queries.b, rows * heads, queries.threads);
    const std::vector<int64_t> start(rows);
    const IndexShape shape{queries.batch, queries.count, seen.keys, heads, layer.index_key_heads, layer.index_width,
                           std::min(layer.topk, seen.keys), columns, PACKED, 0, layer.packed_stride_r,
                           layer.index_width + 2, queries.threads, layer.use_tiles};
    IndexInputs in(shape, q.data(), w.data(), b.data(), layer.packed, start.data(), seen.stop, seen.index_rows);
    choose_best(in, chosen);
}

template <class Number>
void attend(const PagedLayer &layer, const PagedQueries &queries, const Sequences &seen, void *out) {
    const int64_t columns = std::min(seen.keys, std::max(layer.topk, layer.whole));
    const std::unique_ptr<int32_t[]> chosen(new int32_t[queries.batch * queries.count * columns]);
    choose<Number>(layer, queries, seen, columns, chosen.get());
    const AttentionShape shape{queries.batch, queries.count, seen.keys, layer.heads, layer.key_heads, layer.width,
                               layer.width, columns, layer.is_bf16, 0, layer.kv_stride_r, layer.kv_stride_g, 0,
                               layer.kv_stride_r, layer.kv_stride_g, queries.threads, layer.use_tiles};
    const Number *values = (const Number *)layer.kv + layer.width;
    const AttentionInputs in(shape, queries.q, layer.kv, values, chosen.get(), nullptr, nullptr, seen.rows);
    attend_to_keys(in, float(layer.scale), Results(shape, out, nullptr));
}

}  // namespace

extern "C" {

// out [B, T, H, D] in the model's dtype.
int fulmen_paged_sparse(const PagedLayer *layer, const PagedQueries *queries, const Sequences *seen, void *out) try {
    if (layer->is_bf16) attend<uint16_t>(*layer, *queries, *seen, out);
    else attend<float>(*layer, *queries, *seen, out);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

// Queries over paged caches: what each keeps is chosen, then attended to, in one call.

#include "attention.h"
#include "paged.h"

namespace {

int64_t columns_of(const PagedLayer &layer, const KeyRows &key_rows) {
    return std::min(key_rows.keys, std::max(layer.topk, layer.dense_up_to));
}

IndexInputs index_inputs(const PagedLayer &layer, const PagedQueries &queries, const KeyRows &key_rows) {
    const IndexShape shape{queries.batch, queries.count, key_rows.keys, layer.index_heads, layer.index_key_heads,
                           layer.index_width, std::min(layer.topk, key_rows.keys), columns_of(layer, key_rows), PACKED, 0,
                           layer.packed_stride_r, layer.index_width + 2, queries.threads, layer.use_tiles};
    const bool is_bf16 = layer.is_bf16 != 0;
    return {shape, queries.index_q, queries.w, queries.b, layer.packed, nullptr, key_rows.stop, key_rows.index_rows, is_bf16};
}

CoarseLevel coarse_level(const PagedLayer &layer, const PagedQueries &queries, const KeyRows &key_rows) {
    return {layer.coarse_heads, layer.coarse_width, layer.candidates, layer.all_up_to, 0, layer.coarse_stride_r,
            queries.coarse_q, queries.coarse_b, layer.coarse, key_rows.coarse_rows};
}

// Without selections.
AttentionInputs attention_inputs(const PagedLayer &layer, const PagedQueries &queries, const KeyRows &key_rows) {
    const AttentionShape shape{queries.batch, queries.count, key_rows.keys, layer.heads, layer.key_heads, layer.width,
                               layer.width, columns_of(layer, key_rows), layer.is_bf16, 0, layer.kv_stride_r,
                               layer.kv_stride_g, 0, layer.kv_stride_r, layer.kv_stride_g, queries.threads, layer.use_tiles};
    const void *values = (const char *)layer.kv + layer.width * (layer.is_bf16 ? 2 : 4);
    AttentionInputs in(shape, queries.q, layer.kv, values, nullptr, nullptr, nullptr, key_rows.rows);
    in.softcap = float(layer.softcap);
    return in;
}

}  // namespace

void attend_to_paged(const PagedLayer &layer, const PagedQueries &queries, const KeyRows &key_rows, void *out) {
    IndexInputs index = index_inputs(layer, queries, key_rows);
    if (layer.coarse_heads && queries.coarse_q) index.add_coarse(coarse_level(layer, queries, key_rows));
    AttentionInputs in = attention_inputs(layer, queries, key_rows);
    const Results results(in.shape, out, nullptr, layer.sinks);
    if (comes_in_blocks(in)) {
        pack_index_keys(index);
        choose_and_attend(in, float(layer.scale), results, [&](int64_t batch, int64_t low, int64_t high, SelectionWorkspace &workspace) {
            choose_some(index, batch, low, high, workspace.scores, workspace.chosen.data());
        });
        return;
    }
    const std::unique_ptr<int32_t[]> chosen(new int32_t[queries.batch * queries.count * in.shape.topk]);
    choose_best(index, chosen.get());
    in.topk = chosen.get();
    attend_to_keys(in, float(layer.scale), results);
}

extern "C" {

// out [B, T, H, D] in the model's dtype.
int fulmen_paged_sparse(const PagedLayer *layer, const PagedQueries *queries, const KeyRows *key_rows, void *out) try {
    attend_to_paged(*layer, *queries, *key_rows, out);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

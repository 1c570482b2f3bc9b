// Queries over paged caches: what each keeps is chosen, then attended to, in one call.

#include "attention.h"
#include "paged.h"

namespace {

int64_t columns_of(const PagedLayer &layer, const Sequences &seen) {
    return std::min(seen.keys, std::max(layer.topk, layer.whole));
}

IndexInputs index_inputs(const PagedLayer &layer, const PagedQueries &queries, const Sequences &seen) {
    const IndexShape shape{queries.batch, queries.count, seen.keys, layer.index_heads, layer.index_key_heads,
                           layer.index_width, std::min(layer.topk, seen.keys), columns_of(layer, seen), PACKED, 0,
                           layer.packed_stride_r, layer.index_width + 2, queries.threads, layer.use_tiles};
    const bool is_bf16 = layer.is_bf16 != 0;
    return {shape, queries.index_q, queries.w, queries.b, layer.packed, nullptr, seen.stop, seen.index_rows, is_bf16};
}

// Without selections.
AttentionInputs attention_inputs(const PagedLayer &layer, const PagedQueries &queries, const Sequences &seen) {
    const AttentionShape shape{queries.batch, queries.count, seen.keys, layer.heads, layer.key_heads, layer.width,
                               layer.width, columns_of(layer, seen), layer.is_bf16, 0, layer.kv_stride_r,
                               layer.kv_stride_g, 0, layer.kv_stride_r, layer.kv_stride_g, queries.threads, layer.use_tiles};
    const void *values = (const char *)layer.kv + layer.width * (layer.is_bf16 ? 2 : 4);
    return {shape, queries.q, layer.kv, values, nullptr, nullptr, nullptr, seen.rows};
}

}  // namespace

void attend_to_paged(const PagedLayer &layer, const PagedQueries &queries, const Sequences &seen, void *out) {
    IndexInputs index = index_inputs(layer, queries, seen);
    AttentionInputs in = attention_inputs(layer, queries, seen);
    const Results results(in.shape, out, nullptr);
    if (comes_in_blocks(in)) {
        pack_index_keys(index);
        choose_and_attend(in, float(layer.scale), results, [&](int64_t batch, int64_t low, int64_t high, ChoosingRoom &room) {
            choose_some(index, batch, low, high, room.scores, room.chosen.data());
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
int fulmen_paged_sparse(const PagedLayer *layer, const PagedQueries *queries, const Sequences *seen, void *out) try {
    attend_to_paged(*layer, *queries, *seen, out);
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}
}

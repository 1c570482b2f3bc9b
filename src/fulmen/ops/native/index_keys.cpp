// Index keys to 8 bits, as `index_keys.py` packs them.

#include "vectors.h"

#include <algorithm>
#include <cmath>

namespace {

// One head's key.
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
}

// Index keys to 8 bits, as `index_keys.py` packs them.

#include "index_inputs.h"

#include <algorithm>
#include <cmath>

namespace {

// int8 codes of LANES numbers, `count` of them: to the nearest, ties to even.
void write_codes(const float *k, int64_t count, float divisor, int8_t *to) {
    typedef int8_t ByteVec __attribute__((vector_size(LANES)));
    // Adding 1.5 * 2**23 rounds to an integer.
    const Vec magic = broadcast(12582912.0f), most = broadcast(127.0f);
    Vec code = load_some(k, count) / divisor + magic - magic;
    code = code > most ? most : code;
    code = code < -most ? -most : code;
    const ByteVec bytes = __builtin_convertvector(__builtin_convertvector(code, IntVec), ByteVec);
    std::memcpy(to, &bytes, std::min<int64_t>(count, LANES));
}

}  // namespace

void pack_index_head(const float *k, int64_t width, int8_t *to) {
    int32_t peak_bits = 0;  // of the largest size; numbers that are not finite are the largest
    for (int64_t e = 0; e < width; e++) {
        int32_t bits;
        std::memcpy(&bits, k + e, sizeof bits);
        peak_bits = std::max(peak_bits, bits & INT32_MAX);
    }
    float peak;
    std::memcpy(&peak, &peak_bits, sizeof peak);
    const bool finite = std::isfinite(peak);
    const float least = finite ? peak / 127 : NAN;
    uint32_t bits;
    std::memcpy(&bits, &least, sizeof bits);
    // The least bfloat16 that is not below; what is not finite stays so.
    const uint16_t scale = uint16_t((bits >> 16) + (finite && (bits & 0xffff)));
    const float divisor = bf16_to_float(scale) == 0 ? 1 : bf16_to_float(scale);
    if (finite)
        for (int64_t e = 0; e < width; e += LANES) write_codes(k + e, width - e, divisor, to + e);
    else std::fill_n(to, width, int8_t(0));
    std::memcpy(to + width, &scale, sizeof scale);
}

extern "C" {

// Token t of k [tokens, heads, width] goes, packed, to row rows[t] of `to`.
int fulmen_store_index_keys(const float *k, const int64_t *rows, int8_t *to, int64_t tokens, int64_t heads,
                            int64_t width, int64_t row_bytes) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < heads; i++)
            pack_index_head(k + (t * heads + i) * width, width, to + rows[t] * row_bytes + i * (width + 2));
    return 0;
}
}

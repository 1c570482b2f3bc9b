// Vectors of floats in the compiler's own notation (GCC and clang), as wide as the machine has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));

static inline Vec load(const float *from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// 16-bit floats (bfloat16) become vectors of float32.
static inline Vec load(const uint16_t *from) {
    typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));
    typedef uint32_t WordVec __attribute__((vector_size(4 * LANES)));
    HalfVec x;
    std::memcpy(&x, from, sizeof x);
    return (Vec)(__builtin_convertvector(x, WordVec) << 16);
}

static inline void store(float *to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Some of the LANES numbers; the others are 0.
template <class Number> static inline Vec load_some(const Number *from, int64_t count) {
    if (count >= LANES) return load(from);
    Number room[LANES] = {};
    std::copy_n(from, count, room);
    return load(room);
}

static inline void store_some(float *to, Vec x, int64_t count) {
    if (count >= LANES) return store(to, x);
    float room[LANES];
    store(room, x);
    std::copy_n(room, count, to);
}

static inline Vec broadcast(float x) { return x - Vec{}; }

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

static inline float bf16_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// 2 ** x for x <= 0 (up to rounding); 0 below -126.5; NaN stays NaN. Within 2 units in the last place.
static inline Vec exp2_vec(Vec x) {
    const Vec low = broadcast(-127.0f);
    x = x < low ? low : x;
    // Adding 1.5 * 2**23 rounds to an integer, which then lies in the low bits.
    const Vec magic = broadcast(12582912.0f);
    const Vec shifted = x + magic;
    const Vec part = x - (shifted - magic);
    // The coefficients interpolate 2**x on [-0.5, 0.5] in its Chebyshev points.
    Vec y = broadcast(0.000154614447f);
    y = y * part + 0.00134004282f;
    y = y * part + 0.00961805668f;
    y = y * part + 0.0555032723f;
    y = y * part + 0.240226509f;
    y = y * part + 0.693147207f;
    y = y * part + 1.0f;
    const IntVec whole = (IntVec)shifted - (IntVec)magic;
    return y * (Vec)((whole + 127) << 23);
}

template <int WIDTH, bool ODD, int... LANE>
static inline Vec half_blocks(Vec x, Vec y, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, y, ((LANE / WIDTH * 2 + ODD) * WIDTH + LANE % WIDTH)...);
}

// Of x and y, each a row of blocks of 2 * WIDTH lanes: every block's halves added, x's blocks before y's.
template <int WIDTH> static inline Vec add_halves(Vec x, Vec y) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
    return half_blocks<WIDTH, false>(x, y, lanes) + half_blocks<WIDTH, true>(x, y, lanes);
}

// N vectors into one: lanes i * LANES / N and up hold the partial sums of vector i.
template <int N> static inline Vec add_lanes(const Vec *x) {
    if constexpr (N == 1) {
        return x[0];
    } else {
        return add_halves<LANES / N>(add_lanes<N / 2>(x), add_lanes<N / 2>(x + N / 2));
    }
}

static inline float largest_lane(Vec x) {
    float largest = x[0];
    for (int lane = 1; lane < LANES; lane++) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

static inline float sum_of_lanes(Vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

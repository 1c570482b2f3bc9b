// Vectors of floats in the compiler's own notation (GCC and clang), as wide as the machine has them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LANES)));

static inline Vec load(const float *from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

// 16-bit floats (bfloat16) become vectors of float32.
static inline Vec widen(HalfVec x) { return (Vec)(__builtin_convertvector(x, WordVec) << 16); }

static inline Vec load(const uint16_t *from) {
    HalfVec x;
    std::memcpy(&x, from, sizeof x);
    return widen(x);
}

static inline void store(float *to, Vec x) { std::memcpy(to, &x, sizeof x); }

// Some of the LANES numbers; the others are 0.
template <class Number> static inline Vec load_some(const Number *from, int64_t count) {
    if (count >= LANES) return load(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 some = __mmask16((1 << count) - 1);
    if constexpr (sizeof(Number) == 4) return (Vec)_mm512_maskz_loadu_ps(some, from);
    else return widen((HalfVec)_mm256_maskz_loadu_epi16(some, from));
#else
    Number padded[LANES] = {};
    std::copy_n(from, count, padded);
    return load(padded);
#endif
}

static inline void store_some(float *to, Vec x, int64_t count) {
    if (count >= LANES) return store(to, x);
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, __mmask16((1 << count) - 1), (__m512)x);
#else
    float padded[LANES];
    store(padded, x);
    std::copy_n(padded, count, to);
#endif
}

static inline Vec broadcast(float x) { return x - Vec{}; }

#ifdef __AVX512F__
// 16 x 16 numbers of 32 bits, rows to columns, in place.
static inline void transpose_dwords(__m512i *rows) {
    __m512i x[16];
    for (int i = 0; i < 8; i++) {
        x[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        x[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++) {
            rows[4 * i + 2 * half] = _mm512_unpacklo_epi64(x[4 * i + half], x[4 * i + 2 + half]);
            rows[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(x[4 * i + half], x[4 * i + 2 + half]);
        }
    // Now rows[4 * i + j] holds, in its block b, column 4 * b + j of the rows 4 * i and up.
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x44);
        const __m512i high = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xee);
        const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xee);
        x[j] = _mm512_shuffle_i32x4(low, low2, 0x88);
        x[4 + j] = _mm512_shuffle_i32x4(low, low2, 0xdd);
        x[8 + j] = _mm512_shuffle_i32x4(high, high2, 0x88);
        x[12 + j] = _mm512_shuffle_i32x4(high, high2, 0xdd);
    }
    for (int i = 0; i < 16; i++) rows[i] = x[i];
}
#endif

// Memory for numbers, kept for the next ones; what it holds is anything.
class FloatWorkspace {
    std::unique_ptr<float[]> numbers;
    int64_t size = 0;

  public:
    float *of(int64_t count) {
        if (count > size) numbers.reset(new float[count]), size = count;
        return numbers.get();
    }
};

// Memory that choosing for a block of queries needs, kept for the next one.
struct ChoiceWorkspace {
    FloatWorkspace scores, fine;
    std::vector<int32_t> candidates, positions, columns, rows;
};

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

static inline float bf16_to_float(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// 2 ** x for x <= 0 (up to rounding); 0, or with AVX-512 next to nothing, below -126.5; NaN stays NaN, and
// 128 and more is infinity. Within 2 units in the last place.
static inline Vec exp2_vec(Vec x) {
#ifdef __AVX512DQ__
    // 2**x on [0, 1], 1 at 0, within 2e-7 of itself; then by the power of what lies below x.
    const Vec part = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Vec y = broadcast(0.00186713098f);
    y = y * part + 0.00901702791f;
    y = y * part + 0.0557999164f;
    y = y * part + 0.240164444f;
    y = y * part + 0.693151295f;
    y = y * part + 1.0f;
    return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    const Vec low = broadcast(-127.0f), high = broadcast(128.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
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
    const IntVec integer = (IntVec)shifted - (IntVec)magic;
    return y * (Vec)((integer + 127) << 23);
#endif
}

// tanh(x), within 4 units in the last place; NaN where x is not finite.
static inline Vec tanh_vec(Vec x) {
    const Vec zero = {}, size = x < zero ? -x : x, square = x * x;
    // Near 0, where the other one cancels: the coefficients interpolate (tanh(x) / x - 1) / x**2, by x**2, on [0, 0.55**2]
    // in its Chebyshev points.
    Vec near = broadcast(0.0172957517f);
    near = near * square - 0.053146746f;
    near = near * square + 0.133284643f;
    near = near * square - 0.333332866f;
    near = x + x * (square * near);
    const Vec power = exp2_vec(size * -2.88539008f), far = (1.0f - power) / (1.0f + power);  // exp(-2 |x|)
    return (size < broadcast(0.55f) ? near : x < zero ? -far : far) + x * 0.0f;
}

template <int WIDTH, bool ODD, class Lanes, int... LANE>
static inline Lanes half_blocks(Lanes x, Lanes y, std::integer_sequence<int, LANE...>) {
    return __builtin_shufflevector(x, y, ((LANE / WIDTH * 2 + ODD) * WIDTH + LANE % WIDTH)...);
}

// Of x and y, each a row of blocks of 2 * WIDTH lanes: every block's halves added, x's blocks before y's.
template <int WIDTH, class Lanes> static inline Lanes add_halves(Lanes x, Lanes y) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
    return half_blocks<WIDTH, false>(x, y, lanes) + half_blocks<WIDTH, true>(x, y, lanes);
}

// N vectors into one: lanes i * LANES / N and up hold the partial sums of vector i.
template <int N, class Lanes> static inline Lanes add_lanes(const Lanes *x) {
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

// Hides where numbers came from: else the compiler fuses a product with the sum it goes into, and torch does not.
static inline Vec opaque(Vec x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// Results of one operation as torch stores them: to the nearest, ties to even.
template <class Number> static inline Vec rounded(Vec x) {
    x = opaque(x);
    if constexpr (sizeof(Number) == 4) return x;
    else {
        const IntVec bits = (IntVec)x;
        const IntVec near = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
        return x != x ? x : (Vec)near;
    }
}

// Some of LANES numbers that `to`'s type holds.
static inline void put(Vec x, int64_t count, float *to) { store_some(to, x, count); }
static inline void put(Vec x, int64_t count, uint16_t *to) {
    const HalfVec halves = __builtin_convertvector((WordVec)x >> 16, HalfVec);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 some = count >= LANES ? __mmask16(-1) : __mmask16((1 << count) - 1);
    _mm256_mask_storeu_epi16(to, some, (__m256i)halves);
#else
    for (int64_t i = 0; i < std::min<int64_t>(count, LANES); i++) to[i] = halves[i];
#endif
}

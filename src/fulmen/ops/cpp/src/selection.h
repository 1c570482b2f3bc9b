// The exact selection of the K best keys of a row of scores; see ops/README.md for the rule.
#pragma once

#include "index_inputs.h"

#include <cmath>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

// Floats to integers of the same order; -0 equals 0, and NaN is below all numbers.
static inline void rank_scores(const float *scores, int64_t count, int32_t *ranks) {
    for (int64_t s = 0; s < count; s++) {
        const float number = scores[s] + 0.0f;
        int32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        bits ^= (bits >> 31) & INT_MAX;
        ranks[s] = number == number ? bits : INT_MIN;
    }
}

static inline int64_t count_from(const int32_t *ranks, int64_t count, int64_t least) {
    if (least > INT_MAX) return 0;
    const int32_t least_rank = int32_t(least);
    int64_t total = 0;
    for (int64_t low = 0; low < count; low += 1 << 16) {
        int32_t found = 0;
        for (int64_t s = low; s < std::min<int64_t>(count, low + (1 << 16)); s++) found += ranks[s] >= least_rank;
        total += found;
    }
    return total;
}

static inline float of_rank(int32_t rank) {
    const int32_t bits = rank ^ ((rank >> 31) & INT_MAX);
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

// Appends to `taken` of `to` the values (POSITIONS: where they are) of those of numbers[low] to numbers[high - 1] that
// are `least` or more; NaN is not. Writes up to a vector beyond them; `to` may be `numbers`.
template <bool POSITIONS, class To>
static inline int64_t append_from(const float *numbers, int64_t low, int64_t high, float least, To *to, int64_t taken) {
    int64_t s = low;
#ifdef __AVX512F__
    __m512i position = _mm512_add_epi32(_mm512_set1_epi32(int32_t(low)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; s + 16 <= high; s += 16, position = _mm512_add_epi32(position, _mm512_set1_epi32(16))) {
        const __m512i some = _mm512_loadu_si512(numbers + s);
        const __mmask16 wanted = _mm512_cmp_ps_mask((__m512)some, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_si512(to + taken, _mm512_maskz_compress_epi32(wanted, POSITIONS ? position : some));
        taken += __builtin_popcount(wanted);
    }
#endif
    for (; s < high; s++) {
        to[taken] = POSITIONS ? To(s) : To(numbers[s]);
        taken += numbers[s] >= least;
    }
    return taken;
}

struct Threshold {
    int32_t rank;    // every rank above it is chosen
    int64_t excess;  // so many of those equal to it, the oldest, are not
};

// The threshold is among low <= rank < high; how many ranks there are from low on, and from high on.
struct Bracket {
    int64_t low, high, from_low, from_high;

    // The bracket above `middle` or below it, `from` ranks being from there on.
    void cut(int64_t middle, int64_t from, int64_t topk) {
        if (middle <= low || middle >= high) return;
        if (from >= topk) low = middle, from_low = from;
        else high = middle, from_high = from;
    }
};

// Those of the ranks that are in the bracket, to `few`; returns how many.
static inline int64_t keep_inside(const int32_t *ranks, int64_t count, const Bracket &bracket, int32_t *few) {
    int64_t s = 0, taken = 0;
    const int32_t low = int32_t(bracket.low), most = int32_t(bracket.high - 1);
#ifdef __AVX512F__
    for (; s + 16 <= count; s += 16) {
        const __m512i some = _mm512_loadu_si512(ranks + s);
        const __mmask16 wanted = _mm512_mask_cmple_epi32_mask(
            _mm512_cmpge_epi32_mask(some, _mm512_set1_epi32(low)), some, _mm512_set1_epi32(most));
        _mm512_storeu_si512(few + taken, _mm512_maskz_compress_epi32(wanted, some));
        taken += __builtin_popcount(wanted);
    }
#endif
    for (; s < count; s++) {
        few[taken] = ranks[s];
        taken += ranks[s] >= low && ranks[s] <= most;
    }
    return taken;
}

static inline Bracket full_bracket(const int32_t *ranks, int64_t count) {
    int32_t least = INT_MAX, most = INT_MIN;
    for (int64_t s = 0; s < count; s++) {
        least = std::min(least, ranks[s]);
        most = std::max(most, ranks[s]);
    }
    return {least, int64_t(most) + 1, count, 0};
}

// Halves the range of ranks until `topk` of them (0 < topk < count) lie from the threshold on. Once those in the range
// are a quarter of all, `few` takes them.
static inline Threshold find_threshold(const int32_t *ranks, int64_t count, int64_t topk, int32_t *few) {
    Bracket bracket = full_bracket(ranks, count);
    while (bracket.high - bracket.low > 1 && bracket.from_low != topk) {
        if (4 * (bracket.from_low - bracket.from_high) < count) {
            count = keep_inside(ranks, count, bracket, few);
            ranks = few;
            topk -= bracket.from_high, bracket.from_low -= bracket.from_high, bracket.from_high = 0;
        }
        const int64_t middle = bracket.low + (bracket.high - bracket.low) / 2;
        bracket.cut(middle, count_from(ranks, count, middle), topk);
    }
    return {int32_t(bracket.low), bracket.from_low - topk};
}

// Scratch memory of one row's selection.
struct SelectionScratch {
    std::unique_ptr<float[]> high;
    std::unique_ptr<int32_t[]> ranks, few, positions;

    SelectionScratch(int64_t keys, int64_t topk)
        : high(new float[keys + LANES]), ranks(new int32_t[keys]), few(new int32_t[keys / 4 + LANES]),
          positions(new int32_t[topk + LANES]) {}
};

// A score that probably is no higher than the threshold, though only a few times as many scores as are wanted reach it;
// from a sample.
static inline float probable_floor(const float *scores, int64_t count, int64_t topk) {
    constexpr int64_t SAMPLE = 128;
    const int64_t beyond = topk * SAMPLE / count, rank_in_sample = beyond + 3 + int64_t(3 * std::sqrt(double(beyond)));
    if (count < 8 * SAMPLE || 2 * rank_in_sample > SAMPLE) return -INFINITY;
    float sample[SAMPLE];
    int32_t ranks[SAMPLE], few[SAMPLE / 4 + LANES];
    for (int64_t i = 0; i < SAMPLE; i++) sample[i] = scores[i * count / SAMPLE];
    rank_scores(sample, SAMPLE, ranks);
    const int32_t rank = find_threshold(ranks, SAMPLE, rank_in_sample, few).rank;
    return rank == INT_MIN ? -INFINITY : of_rank(rank);
}

// Of scores that are longer than topk.
static inline Threshold find_score_threshold(const float *scores, int64_t count, int64_t topk, const SelectionScratch &scratch) {
    const float *some = scratch.high.get();
    int64_t n = append_from<false>(scores, 0, count, probable_floor(scores, count, topk), scratch.high.get(), 0);
    // Too few: the sample misled, or there are fewer numbers than are wanted.
    if (n < topk) some = scores, n = count;
    rank_scores(some, n, scratch.ranks.get());
    if (n == topk) return {*std::min_element(scratch.ranks.get(), scratch.ranks.get() + n), 0};
    return find_threshold(scratch.ranks.get(), n, topk, scratch.few.get());
}

// All numbers, and as many of what is no number, the most recent, as are still wanted.
static inline void take_with_nan(const float *scores, int64_t count, int64_t topk, int32_t *positions) {
    int64_t n_nan = topk;
    for (int64_t s = 0; s < count; s++) n_nan -= scores[s] == scores[s];
    for (int64_t s = count, to = topk; to > 0;) {
        s--;
        if (scores[s] == scores[s]) positions[--to] = int32_t(s);
        else if (n_nan > 0) n_nan--, positions[--to] = int32_t(s);
    }
}

static inline void take_all(Interval visible, int64_t topk, int32_t *chosen) {
    for (int64_t i = 0; i < topk; i++) chosen[i] = visible.start + i < visible.stop ? int32_t(visible.start + i) : -1;
}

// `scores` are those of the interval, longer than topk.
static inline void take_best(const float *scores, Interval visible, int64_t topk, const SelectionScratch &scratch,
                             int32_t *chosen) {
    const int64_t count = visible.stop - visible.start;
    const Threshold threshold = find_score_threshold(scores, count, topk, scratch);
    int32_t *positions = scratch.positions.get();
    if (threshold.rank == INT_MIN) take_with_nan(scores, count, topk, positions);
    else {
        const float least = of_rank(threshold.rank), above = of_rank(threshold.rank + 1);
        int64_t passed = 0;  // so far, ties lose
        for (int64_t excess = threshold.excess; excess > 0; passed++) excess -= scores[passed] == least;
        // Above infinity there is NaN, which no number reaches.
        const int64_t taken = append_from<true>(scores, 0, passed, above, positions, 0);
        append_from<true>(scores, passed, count, least, positions, taken);
    }
    for (int64_t i = 0; i < topk; i++) chosen[i] = int32_t(visible.start + positions[i]);
}

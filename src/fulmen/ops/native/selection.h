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

// Appends to `taken` of `to` the values (positions: `first` and up) of those low <= s < high with ranks from `least`
// on. Writes up to a vector beyond them; `to` may be `ranks`.
template <bool POSITIONS>
static inline int64_t append_from(const int32_t *ranks, int64_t low, int64_t high, int32_t least, int32_t *to,
                                  int64_t taken) {
    int64_t s = low;
#ifdef __AVX512F__
    __m512i place = _mm512_add_epi32(_mm512_set1_epi32(int32_t(low)),
                                     _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (; s + 16 <= high; s += 16, place = _mm512_add_epi32(place, _mm512_set1_epi32(16))) {
        const __m512i some = _mm512_loadu_si512(ranks + s);
        const __mmask16 wanted = _mm512_cmpge_epi32_mask(some, _mm512_set1_epi32(least));
        if (!wanted) continue;
        _mm512_storeu_si512(to + taken, _mm512_maskz_compress_epi32(wanted, POSITIONS ? place : some));
        taken += __builtin_popcount(wanted);
    }
#endif
    for (; s < high; s++) {
        to[taken] = POSITIONS ? int32_t(s) : ranks[s];
        taken += ranks[s] >= least;
    }
    return taken;
}

struct Threshold {
    int32_t rank;    // every rank above it is chosen
    int64_t excess;  // so many of those equal to it, the oldest, are not
};

// The threshold is among low <= rank < high; how many ranks there are from low on.
struct Bracket {
    int64_t low, high, from_low;

    // The bracket above `middle` or below it, `from` ranks being from there on.
    void cut(int64_t middle, int64_t from, int64_t topk) {
        if (middle <= low || middle >= high) return;
        if (from >= topk) low = middle, from_low = from;
        else high = middle;
    }
};

static inline Bracket whole_bracket(const int32_t *ranks, int64_t count) {
    int32_t least = INT_MAX, most = INT_MIN;
    for (int64_t s = 0; s < count; s++) {
        least = std::min(least, ranks[s]);
        most = std::max(most, ranks[s]);
    }
    return {least, int64_t(most) + 1, count};
}

// Two ranks that probably have the threshold between them, from a sample; in a long row that saves two thirds of the
// time of halving alone, in a short one it takes as long.
static inline void cut_by_sample(const int32_t *ranks, int64_t count, int64_t topk, Bracket &bracket) {
    constexpr int64_t SAMPLE = 128, LONG = 64 * SAMPLE;
    if (count < LONG) return;
    int32_t sample[SAMPLE];
    for (int64_t i = 0; i < SAMPLE; i++) sample[i] = ranks[i * count / SAMPLE];
    const int64_t beyond = topk * SAMPLE / count, place = SAMPLE - 1 - beyond;
    const int64_t margin = 2 + int64_t(3 * std::sqrt(double(beyond)));
    for (const int64_t at : {place - margin, place + margin}) {
        int32_t *wanted = sample + std::clamp<int64_t>(at, 0, SAMPLE - 1);
        std::nth_element(sample, wanted, sample + SAMPLE);
        bracket.cut(*wanted, count_from(ranks, count, *wanted), topk);
    }
}

// Halves the range of ranks until `topk` of them (0 < topk < count) lie from the threshold on. Once those that may
// matter are a quarter of all, `few` takes them.
static inline Threshold find_threshold(const int32_t *ranks, int64_t count, int64_t topk, int32_t *few) {
    Bracket bracket = whole_bracket(ranks, count);
    cut_by_sample(ranks, count, topk, bracket);
    while (bracket.high - bracket.low > 1 && bracket.from_low != topk) {
        if (4 * bracket.from_low < count) {
            count = append_from<false>(ranks, 0, count, int32_t(bracket.low), few, 0);
            ranks = few;
        }
        const int64_t middle = bracket.low + (bracket.high - bracket.low) / 2;
        bracket.cut(middle, count_from(ranks, count, middle), topk);
    }
    return {int32_t(bracket.low), bracket.from_low - topk};
}

// Room for one row's selection.
struct SelectionRoom {
    std::unique_ptr<int32_t[]> ranks, few, positions;

    SelectionRoom(int64_t keys, int64_t topk)
        : ranks(new int32_t[keys]), few(new int32_t[keys / 4 + LANES]), positions(new int32_t[topk + LANES]) {}
};

static inline void take_all(Interval seen, int64_t topk, int32_t *chosen) {
    for (int64_t i = 0; i < topk; i++) chosen[i] = seen.start + i < seen.stop ? int32_t(seen.start + i) : -1;
}

// `scores` are those of the interval, longer than topk.
static inline void take_best(const float *scores, Interval seen, int64_t topk, const SelectionRoom &room,
                             int32_t *chosen) {
    const int32_t *ranks = room.ranks.get();
    const int64_t count = seen.stop - seen.start;
    rank_scores(scores, count, room.ranks.get());
    const Threshold threshold = find_threshold(ranks, count, topk, room.few.get());
    int64_t passed = 0;  // so far, ties lose
    for (int64_t excess = threshold.excess; excess > 0; passed++) excess -= ranks[passed] == threshold.rank;
    int32_t *positions = room.positions.get();
    // No rank is INT_MAX: that would be a NaN.
    const int64_t taken = append_from<true>(ranks, 0, passed, threshold.rank + 1, positions, 0);
    append_from<true>(ranks, passed, count, threshold.rank, positions, taken);
    for (int64_t i = 0; i < topk; i++) chosen[i] = int32_t(seen.start + positions[i]);
}

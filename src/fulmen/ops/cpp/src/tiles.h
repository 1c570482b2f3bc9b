// Matrix products by Intel's AMX tiles, where the library was compiled for them and this CPU and kernel allow it.
#pragma once

#include "vectors.h"

#if defined(__linux__) && defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && \
    defined(__AVX512BW__) && defined(__AVX512BF16__) && defined(__AVX512FP16__)
#define FULMEN_TILES 1
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Rows of a tile, and bytes of a row.
constexpr int64_t TILE_ROWS = 16, TILE_BYTES = 64, LINE_NUMBERS = TILE_BYTES / 2;

// A line of the cache; tiles are loaded fastest from whole lines.
struct alignas(64) Line {
    char bytes[TILE_BYTES];
};

#ifdef FULMEN_TILES

// Whether tiles may be used: the CPU has them, and Linux grants their state to this process (once, for all threads).
static inline bool tiles_granted() {
    static const bool granted = [] {
        constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, INT8 = 1u << 25;
        constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || ~d & (BF16 | TILE | INT8)) return false;
        return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    }();
    return granted;
}

// As the instruction reads it.
struct alignas(64) TileConfig {
    uint8_t palette = 0, start_row = 0, unused[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t n_rows, int64_t n_bytes) {
        palette = 1;
        rows[tile] = uint8_t(n_rows);
        row_bytes[tile] = uint16_t(n_bytes);
    }

    // All tiles as large as they can be.
    static TileConfig full() {
        TileConfig config;
        for (int tile = 0; tile < 8; tile++) config.set(tile, TILE_ROWS, TILE_BYTES);
        return config;
    }
};

// GCC 12 does not know that loading a tile, or the configuration, reads memory: all that is written must be there.
static inline void settle_memory() { __asm__ volatile("" ::: "memory"); }

// The tiles of this thread in some shape for as long as this lives; then as others (torch) had left them.
class TileScope {
    TileConfig before;

  public:
    explicit TileScope(const TileConfig &config) {
        settle_memory();
        _tile_storeconfig(&before);
        _tile_loadconfig(&config);
        settle_memory();
    }
    ~TileScope() {
        settle_memory();
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
    TileScope(const TileScope &) = delete;
};

// Products of T tiles of rows by two of columns: sums in tiles 0 and 1, then 2 and 3.
template <int T> static inline void zero_tiles() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (T > 1) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

template <int T>
static inline void add_products(const void *upper, const void *lower, int64_t row_bytes, const Line *left, const Line *right) {
    _tile_loadd(6, left, TILE_BYTES);
    _tile_loadd(7, right, TILE_BYTES);
    _tile_loadd(4, upper, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (T > 1) {
        _tile_loadd(5, lower, row_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// Into rows of `stride` numbers.
template <int T> static inline void store_tiles(float *to, int64_t stride) {
    _tile_stored(0, to, stride * sizeof(float));
    _tile_stored(1, to + 16, stride * sizeof(float));
    if constexpr (T > 1) {
        _tile_stored(2, to + TILE_ROWS * stride, stride * sizeof(float));
        _tile_stored(3, to + TILE_ROWS * stride + 16, stride * sizeof(float));
    }
}

#else
static inline bool tiles_granted() { return false; }
#endif

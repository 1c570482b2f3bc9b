// Whether this library may run here: each is compiled for one level of instructions (setup.py).

#include "tiles.h"

extern "C" {

// Raised with every change of a function's arguments, and with new functions; `native_library.py` expects the same number.
int fulmen_native_version() { return 9; }

// The instruction sets that the library was compiled for, those that set the kernels' speed.
const char *fulmen_native_simd() {
    return ""
#ifdef __AVX__
        "AVX "
#endif
#ifdef __AVX2__
        "AVX2 "
#endif
#ifdef __FMA__
        "FMA "
#endif
#ifdef __AVX512F__
        "AVX512F "
#endif
#ifdef __AVX512BF16__
        "AVX512BF16 "
#endif
#ifdef __AVX512FP16__
        "AVX512FP16 "
#endif
#ifdef __AMX_BF16__
        "AMX_BF16 "
#endif
#ifdef __ARM_NEON
        "NEON "
#endif
#ifdef __ARM_FEATURE_SVE
        "SVE "
#endif
        ;
}

// 1 if matrix tiles (AMX) were compiled in and may be used here, else 0.
int fulmen_native_tiles() { return tiles_granted(); }

// An instruction set that the library was compiled for and that cannot be used here; null if there is none.
const char *fulmen_native_lacks() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
#ifdef __AVX__
    if (!__builtin_cpu_supports("avx")) return "AVX";
#endif
#ifdef __AVX2__
    if (!__builtin_cpu_supports("avx2")) return "AVX2";
#endif
#ifdef __FMA__
    if (!__builtin_cpu_supports("fma")) return "FMA";
#endif
#ifdef __BMI2__
    if (!__builtin_cpu_supports("bmi2")) return "BMI2";
#endif
#ifdef __AVX512F__
    if (!__builtin_cpu_supports("avx512f")) return "AVX512F";
#endif
#ifdef __AVX512BW__
    if (!__builtin_cpu_supports("avx512bw")) return "AVX512BW";
#endif
#ifdef __AVX512DQ__
    if (!__builtin_cpu_supports("avx512dq")) return "AVX512DQ";
#endif
#ifdef __AVX512VL__
    if (!__builtin_cpu_supports("avx512vl")) return "AVX512VL";
#endif
#ifdef __AVX512BF16__
    if (!__builtin_cpu_supports("avx512bf16")) return "AVX512BF16";
#endif
#ifdef __AVX512FP16__
    if (!__builtin_cpu_supports("avx512fp16")) return "AVX512FP16";
#endif
#ifdef FULMEN_TILES
    if (!tiles_granted()) return "AMX, or a kernel that grants it";
#endif
#endif
    return nullptr;
}
}

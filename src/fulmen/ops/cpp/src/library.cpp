// Whether this library may run here: each is compiled for one level of instructions (setup.py).

#include "attention.h"
#include "index_inputs.h"
#include "paged.h"
#include "tiles.h"

#include <cstddef>
#include <string>
#include <type_traits>

namespace {

template <class Field> constexpr char kind_of() {
    return std::is_pointer_v<Field> ? 'p' : std::is_floating_point_v<Field> ? 'f' : 'i';
}

// "name bytes" of a structure, then "name:offset:kind" of its fields, in a line.
class Layout {
    std::string text;

  public:
    Layout(const char *name, size_t bytes) : text(std::string(name) + " " + std::to_string(bytes)) {}

    template <class Field> Layout &field(const char *name, size_t offset) {
        text += std::string(" ") + name + ":" + std::to_string(offset) + ":" + kind_of<Field>();
        return *this;
    }

    std::string line() const { return text + "\n"; }
};

#define LAYOUT(Struct) Layout(#Struct, sizeof(Struct))
#define FIELD(Struct, name) field<decltype(Struct::name)>(#name, offsetof(Struct, name))

std::string index_shape() {
    using S = IndexShape;
    return LAYOUT(IndexShape)
        .FIELD(S, batch).FIELD(S, queries).FIELD(S, keys).FIELD(S, heads).FIELD(S, key_heads).FIELD(S, width)
        .FIELD(S, topk).FIELD(S, columns).FIELD(S, key_kind).FIELD(S, k_stride_b).FIELD(S, k_stride_s)
        .FIELD(S, k_stride_i).FIELD(S, threads).FIELD(S, use_tiles).line();
}

std::string coarse_level() {
    using S = CoarseLevel;
    return LAYOUT(CoarseLevel)
        .FIELD(S, heads).FIELD(S, width).FIELD(S, candidates).FIELD(S, all_up_to).FIELD(S, k_stride_b).FIELD(S, k_stride_s)
        .FIELD(S, q).FIELD(S, b).FIELD(S, k).FIELD(S, rows).line();
}

std::string attention_shape() {
    using S = AttentionShape;
    return LAYOUT(AttentionShape)
        .FIELD(S, batch).FIELD(S, queries).FIELD(S, keys).FIELD(S, heads).FIELD(S, key_heads).FIELD(S, width)
        .FIELD(S, value_width).FIELD(S, topk).FIELD(S, is_bf16).FIELD(S, k_stride_b).FIELD(S, k_stride_s)
        .FIELD(S, k_stride_g).FIELD(S, v_stride_b).FIELD(S, v_stride_s).FIELD(S, v_stride_g).FIELD(S, threads)
        .FIELD(S, use_tiles).line();
}

std::string paged_layer() {
    using S = PagedLayer;
    return LAYOUT(PagedLayer)
        .FIELD(S, heads).FIELD(S, key_heads).FIELD(S, width).FIELD(S, index_heads).FIELD(S, index_key_heads)
        .FIELD(S, index_width).FIELD(S, topk).FIELD(S, dense_up_to).FIELD(S, is_bf16).FIELD(S, kv_stride_r)
        .FIELD(S, kv_stride_g).FIELD(S, packed_stride_r).FIELD(S, use_tiles)
        .FIELD(S, coarse_heads).FIELD(S, coarse_width).FIELD(S, candidates).FIELD(S, all_up_to).FIELD(S, coarse_stride_r)
        .FIELD(S, kv).FIELD(S, packed).FIELD(S, rope_pairs).FIELD(S, coarse).FIELD(S, coarse_pairs).FIELD(S, sinks)
        .FIELD(S, scale).FIELD(S, softcap).line();
}

// What a step of a layer is given.
std::string step() {
    return LAYOUT(NewTokens)
               .FIELD(NewTokens, count).FIELD(NewTokens, pairs).FIELD(NewTokens, threads).FIELD(NewTokens, rows)
               .FIELD(NewTokens, index_rows).FIELD(NewTokens, coarse_rows).FIELD(NewTokens, cos).FIELD(NewTokens, sin).line() +
           LAYOUT(KeyRows)
               .FIELD(KeyRows, keys).FIELD(KeyRows, rows).FIELD(KeyRows, index_rows).FIELD(KeyRows, coarse_rows)
               .FIELD(KeyRows, stop).line() +
           LAYOUT(PagedQueries)
               .FIELD(PagedQueries, batch).FIELD(PagedQueries, count).FIELD(PagedQueries, threads)
               .FIELD(PagedQueries, q).FIELD(PagedQueries, index_q).FIELD(PagedQueries, w).FIELD(PagedQueries, b)
               .FIELD(PagedQueries, coarse_q).FIELD(PagedQueries, coarse_b).line() +
           LAYOUT(Projections)
               .FIELD(Projections, q_width).FIELD(Projections, k_width).FIELD(Projections, x_width)
               .FIELD(Projections, q).FIELD(Projections, k).FIELD(Projections, w_and_b)
               .FIELD(Projections, coarse_q).FIELD(Projections, coarse_k).FIELD(Projections, bias).line() +
           LAYOUT(Heads).FIELD(Heads, numbers).FIELD(Heads, stride).line();
}

}  // namespace

extern "C" {

// Raised with every change of a function's arguments, and with new functions; `abi.py` expects the same number.
int fulmen_abi_version() { return 14; }

// The structures that callers fill in, a line each; `abi.py` compares them with its own.
const char *fulmen_layouts() {
    static const std::string text = index_shape() + coarse_level() + attention_shape() + paged_layer() + step();
    return text.c_str();
}

// The instruction sets that the library was compiled for, those that set the kernels' speed.
const char *fulmen_simd() {
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
#ifdef __AVX512VNNI__
        "AVX512VNNI "
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
int fulmen_has_tiles() { return tiles_granted(); }

// An instruction set that the library was compiled for and that cannot be used here; null if there is none.
const char *fulmen_lacks() {
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
#ifdef __AVX512VNNI__
    if (!__builtin_cpu_supports("avx512vnni")) return "AVX512VNNI";
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

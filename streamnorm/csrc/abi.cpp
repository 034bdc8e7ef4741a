// What the loader checks before it uses the library. Compiled for every instruction set, exported once, from the base.
#include "isa.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

// Increased with every change of an exported function's arguments or meaning; streamnorm/ops/library.py expects it.
SN_COMMON(int, streamnorm_abi)(void) { return 12; }

// The best instruction set of this machine that the library contains: 4 and 3 for x86-64-v4 and v3, 0 for the base.
SN_COMMON(int, streamnorm_isa)(void) {
#ifdef __x86_64__
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    const bool v3 = __builtin_cpu_supports("x86-64-v3"), v4 = __builtin_cpu_supports("x86-64-v4");
#else  // the features that distinguish the levels, by names that older compilers know
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512cd");
#endif
    return v4 ? 4 : v3 ? 3 : 0;
#else
    return 0;
#endif
}

#endif

// One source, several instruction sets: every file is compiled once for each SN_ISA (v4, v3, base), and its exports are
// named after the set, `SN_EXPORT(int, forward)(...)` -> `forward_v4`. Python selects the set at run time.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifndef SN_ISA
#define SN_ISA base
#endif
#define SN_JOIN_(a, b) a##_##b
#define SN_JOIN(a, b) SN_JOIN_(a, b)
#define SN_EXPORT(type, name) extern "C" __attribute__((visibility("default"))) type SN_JOIN(name, SN_ISA)
#define SN_COMMON(type, name) extern "C" __attribute__((visibility("default"))) type name
#define SN_MEMBER inline __attribute__((always_inline))
#define SN_INLINE static SN_MEMBER

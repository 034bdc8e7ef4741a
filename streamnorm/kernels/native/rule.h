#pragma once
#include <stdint.h>

// F or G in numbers; mirrored by `RuleNumbers` in kernels/calls.py.
struct sn_rule {
    int64_t kind;
    double a[3];                       // LONG_SHORT: mix; EXPONENTIAL: rate; POOLED: memory, prior; RESIDUAL: memory
};
enum { LONG_SHORT, EXPONENTIAL, POOLED, RESIDUAL };

// A layer's parameters for one kind of input: constant, so made once and passed as a tensor of bytes. Mirrored by
// `Call` in streamnorm/ops/cpu.py.
#pragma once
#include "norm.h"

constexpr int SN_AXES = 8;

// The indices of a memory's members in its two buffers, and how many there are.
struct sn_places {
    int32_t long_, short_, estimate, tables;
    int32_t count, updates, seen, skipped, counts;
};

struct sn_stream {
    sn_rule rule;
    sn_places at;
    double keep[2];                    // LONG_SHORT: the shares of long and short in long after a weight update
};

enum sn_dtype { SN_F32, SN_F64, SN_BF16, SN_F16 };

struct sn_call {
    sn_plan plan;
    int64_t ndim, shape[SN_AXES], stride[SN_AXES];
    int64_t slots, kept, scratch;      // of a step; values for the backward pass; scratch values after them
    int32_t dtype, has_f, has_g, reserved;
    sn_stream f, g;
};

// A multi-layer perceptron that learns one sample after another: the kernel's structures, and its parameters.
#pragma once
#include "call.h"

enum sn_kind { NONE, STREAMING, LAYER };
enum sn_loss { CROSS_ENTROPY, SQUARED_ERROR };
enum sn_optimizer { SGD, ADAM_L2, ADAM_W };

// The constant parameters of a layer; mirrored by `Layer` in streamnorm/train/online/plan.py.
struct sn_spec {
    int64_t in, out;
    int32_t kind, p, about_zero, relu;
    double eps, trust;               // `trust`: factor on the gradients of gain and shift
    int32_t group[4];                // of weight, bias, gain and shift, among the optimizer's; -1: there is none
    sn_stream f, g;
};
// An optimizer's group of parameters; in the order of `Rates` in streamnorm/train/online/rates.py.
struct sn_rates {
    double kind, lr, decay, momentum, dampening, nesterov;  // Adam's beta1 is `momentum`
    double beta2, eps;

    bool is(sn_optimizer one) const { return kind == (double)one; }
};
// A parameter, or null.
struct sn_param {
    void *at, *average, *square;     // `average`: momentum buffer or first moment; `square`: second moment
    void *count;                     // Adam's steps, a float or, where `wide_count`, a double
    const sn_rates *rates;
    bool fresh, wide_count;          // whether the average is still empty
};
// Without a weight it is a norm of the input, and `in` is `out`.
struct sn_online : sn_spec {
    sn_param weight, bias, gain, shift;
    sn_memory F, G;                  // tables (2, out)
    bool pending, proven, back;      // weights: an update is pending; known to be finite; where their next pass starts

    bool learns() const { return weight.at || gain.at || shift.at; }
};

struct sn_net {
    int64_t depth, samples;
    sn_online *layers;
    void *scratch;                   // for `sn_scratch` values of every layer
    const void *x, *targets;         // (samples, in); (samples) int64, or (samples, out)
    void *losses, *outputs;          // (samples), (samples, out): NaN for those that are skipped
    int loss, threads;
    bool moves, raises;              // update parameters, or only norms (a warm-up); non-finite values end the run
    int64_t learned, skipped, latest;  // samples; the last one learned, or -1
    int64_t why;                     // why the run ended
};
enum sn_why { REFUSED = -1, FINE, INPUT, TARGET, ACTIVATIONS, LOSS, GRADIENT, WEIGHTS };

static inline int64_t sn_rounded(int64_t n) { return (n + 15) / 16 * 16; }
static inline int64_t sn_scratch(const sn_spec &l) { return 17 * sn_rounded(l.out); }

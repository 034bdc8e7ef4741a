#pragma once
#include <stdint.h>

// The parameters of F or G; mirrored by `RuleNumbers` in streamnorm/ops/cpu.py.
struct sn_rule {
    int64_t kind;
    double a[3];                       // LONG_SHORT: mix; EXPONENTIAL: rate; POOLED: memory, prior, updates; RESIDUAL: memory
};
enum { LONG_SHORT, EXPONENTIAL, POOLED, RESIDUAL };

// POOLED: the samples M that long counts as in a row, 0 for the mean and 1 for sigma, which starts from a prior; and M
// after a weight update at which N had arrived.
static inline double sn_pooled(const sn_rule *rule, int64_t held, int row) {
    const double known = (double)held, most = rule->a[0], more = known + (row ? rule->a[1] : 0);
    const double limited = more < most ? more : most;
    return limited > known ? limited : known;
}
static inline int64_t sn_pooled_after(const sn_rule *rule, int64_t held, int64_t N) {
    const double all = (double)(held + N), of_updates = rule->a[2] * (double)N;
    const double most = of_updates > rule->a[0] ? of_updates : rule->a[0];
    return (int64_t)(all < most ? all : most);
}

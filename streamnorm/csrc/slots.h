// Computations on slots: statistics from sums, F and G, and the inputs of the next pass. The same for every layout.
#pragma once
#include "norm.h"

namespace {

// The pointers of one call. Tables hold k0 steps of S slots.
template <class T> struct Job {
    typedef A_<T> A;
    sn_plan p;
    const sn_memory *h;                 // H1 forward, H2 backward, or null
    int64_t S;                          // slots of a step
    A count;                            // activations in a reference
    const T *x, *dy;
    T *y, *dx;
    const A *weight, *bias;             // (S), or null
    A *mu, *sigma, *est_mu, *est_sigma, *tilt;
    A *fresh;                           // (2, S): the memory after this call, written back if all is finite
    A *last;                            // (2, S): G's latest estimate
    bool refused;                       // G's arrival is not finite: estimate without it
    A *dweight, *dbias;                 // (S), or null
    bool past;                          // stores bypass the caches
    bool once;                          // the estimates are known beforehand: one pass over the data is enough
};

// The weights of the memory's members at step j, for an arrival s of `samples` samples:  m <- m + r (s - m),
// estimate = lng long + mem m + own s.  m is short, or the running average itself for EXPONENTIAL. If one of long and
// short is empty, the other stands in for it; if both are (only for a skipped arrival), s does.
struct Shares { double r, lng, mem, own; };

SN_INLINE Shares shares(const sn_memory &h, int row, int64_t j, double samples, bool taken = true) {
    const double *a = h.rule.a;
    if (h.rule.kind == POOLED) {
        const double N = (double)*h.count + samples * (double)(j + taken), M = sn_pooled(&h.rule, *h.updates, row), all = M + N;
        return {taken ? samples / N : 0, all > 0 ? M / all : 0, all > 0 ? N / all : 0, all > 0 ? 0.0 : 1.0};
    }
    const bool running = h.rule.kind == EXPONENTIAL;
    const int64_t count = *h.count + j + taken;
    const double has_short = count > 0, has_long = !running && *h.updates > 0, r = taken ? 1.0 / (double)count : 0;
    if (running) return {taken && count > 1 ? a[0] : r, 0, has_short, 1 - has_short};
    const double lng = has_long * (a[0] + a[1] * (1 - has_short));
    const double mem = has_short * (a[1] + a[0] * (1 - has_long));
    return {r, lng, mem, has_long + has_short > 0 ? a[2] : a[0] + a[1] + a[2]};
}
// x long + y m. With weights that add up to 1 it has to be long where m is long, to the last digit: rounded one by one,
// they would add up to 1 + e, and a memory of n updates would end n e of the mean away from it. So the smaller weight
// takes as much from the one as it adds of the other, as two products, since a difference may overflow.
template <class A> struct Mix {
    const bool to_long;
    const vec<A> sum, share;
    Mix(double x, double y) : to_long(fabs(x) >= fabs(y)), sum(all((A)(x + y))), share(all((A)(to_long ? y : x))) {}
    vec<A> operator()(vec<A> lng, vec<A> m) const {
        const vec<A> base = to_long ? lng : m, other = to_long ? m : lng;
        return sum * base + (share * other - share * base);
    }
};
// Whether estimates do not depend on the arrivals, so that one pass is enough.
SN_INLINE bool ahead(const sn_memory *h) {
    if (!h || h->rule.kind != LONG_SHORT) return false;
    Shares s = shares(*h, 0, 0, 1);
    return s.mem == 0 && s.own == 0;
}

// f(i, k) over n slots, a vector at a time; work arrays are padded to whole vectors, tables are not.
template <class A, class F> SN_INLINE void slots(int64_t n, const F &f) {
    constexpr int W = lanes<A>::W;
    int64_t i = 0;
    for (; i + W <= n; i += W) f(i, W);
    if (i < n) f(i, (int)(n - i));
}
template <class A> SN_INLINE vec<A> table(const A *p, int k) { return k == lanes<A>::W ? load(p) : load_part(p, k); }
template <class A> SN_INLINE void keep(A *p, int k, vec<A> v) {
    if (k == lanes<A>::W) store(p, v);
    else store_part(p, k, v);
}
template <class A> SN_INLINE mask<A> not_finite(vec<A> v) { return ~(mask<A>)(v - v == vec<A>{}); }
// Where a deviation's fourth power or its inverse would overflow or lose precision, or it is NaN: such calls use the
// fallback. `squarable` of streamnorm/definition/stats.py.
template <class A> SN_INLINE mask<A> extreme(vec<A> sigma) {
    const vec<A> most = all(sizeof(A) == 4 ? (A)0x1p32 : (A)0x1p256), least = all((A)1) / most;
    return ~(mask<A>)((mask<A>)(sigma >= least) & (mask<A>)(sigma <= most));
}
template <class A> SN_INLINE bool any(mask<A> m) {
    uint64_t words[BYTES / 8], found = 0;
    memcpy(words, &m, BYTES);
    for (uint64_t word : words) found |= word;
    return found != 0;
}

// Of n values, whether all are numbers; whether all are such deviations.
template <class A> bool finite(const A *v, int64_t n) {
    mask<A> bad{};
    slots<A>(n, [&](int64_t i, int k) { bad |= not_finite<A>(table(v + i, k)); });
    return !any<A>(bad);
}
template <class A> bool squarable(const A *v, int64_t n) {
    mask<A> bad{};
    slots<A>(n, [&](int64_t i, int k) { bad |= extreme<A>(table(v + i, k)) & before<A>(k); });
    return !any<A>(bad);
}

// The memory takes in `s` at step j, for slots a .. a+n of one row of its tables (0: of the mean, 1: of sigma).
template <class A>
void observe(const sn_memory &h, double samples, int row, int64_t S, int64_t a, int64_t n, int64_t j, bool taken,
             const A *s, A *fresh, A *estimate) {
    Shares share = shares(h, row, j, samples, taken);
    const A *lng = (const A *)h.long_ + row * S + a;
    const A *old = j > 0 ? fresh + row * S + a : h.has_short() ? (const A *)h.short_ + row * S + a : lng;
    A *out = fresh + row * S + a;
    const Mix<A> mix(share.lng, share.mem);
    vec<A> r = all((A)share.r), O = all((A)share.own);
    slots<A>(n, [&](int64_t i, int k) {
        vec<A> now = load(s + i), m = table(old + i, k);
        if (taken) m += r * (now - m);
        keep(out + i, k, m);
        vec<A> known = mix(table(lng + i, k), m);
        store(estimate + i, share.own == 0 ? known : known + O * now);  // skip: 0 * NaN is NaN
    });
}
template <class A> void predict(const sn_memory &h, int row, int64_t S, int64_t a, int64_t n, A *estimate) {
    vec<A> L = all((A)shares(h, row, 0, 1).lng);
    const A *lng = (const A *)h.long_ + row * S + a;
    slots<A>(n, [&](int64_t i, int k) { store(estimate + i, L * table(lng + i, k)); });
}
// Stores the new state of slots a .. a+n; `arrived` then counts the steps.
template <class A>
void commit(const sn_memory &h, int64_t S, int64_t a, int64_t n, const A *fresh, const A *mean, const A *sigma) {
    A *now = (A *)(h.has_short() ? h.short_ : h.long_), *estimate = (A *)h.estimate;
    const size_t bytes = n * sizeof(A);
    memcpy(now + a, fresh + a, bytes), memcpy(now + S + a, fresh + S + a, bytes);
    memcpy(estimate + a, mean + a, bytes), memcpy(estimate + S + a, sigma + a, bytes);
}
SN_INLINE void arrived(const sn_memory &h, int64_t steps, double samples) {
    *h.count += h.counts_samples() ? steps * (int64_t)samples : steps;
    *h.seen += steps;
}

// A weight update: long <- keep1 long + keep2 short, the first one copies short; short is emptied. For POOLED, keep are
// the shares of the samples behind each.
template <class A> void fold(const sn_memory &h, int64_t S, double keep1, double keep2) {
    if (!h.has_short() || *h.count == 0) return;
    for (int row = 0; row < 2; row++) {
        A *lng = (A *)h.long_ + row * S, *brief = (A *)h.short_ + row * S;
        double first = *h.updates > 0 ? keep1 : 0, second = *h.updates > 0 ? keep2 : 1;
        if (h.rule.kind == POOLED) {
            const Shares share = shares(h, row, 0, 0, false);
            first = share.lng, second = share.mem;
        }
        const Mix<A> mix(first, second);
        slots<A>(S, [&](int64_t i, int k) {
            keep(lng + i, k, mix(table(lng + i, k), table(brief + i, k)));
            keep(brief + i, k, vec<A>{});
        });
    }
    *h.updates = h.rule.kind == POOLED ? sn_pooled_after(&h.rule, *h.updates, *h.count) : *h.updates + 1;
    *h.count = 0;
}

// G as the residual of a regression of the gradient on 1 and y over the stream: updates the coefficients theta = (v, u)
// with the gradients of the statistics of step j, and computes G's estimate, for slots a .. a+n.
//     (M + m A) theta <- M theta + m b,  A = [[1, y], [y, y^2]] of this step's means
// Returns whether theta is finite: the square of a mean that jumps by 1e15 deviations overflows.
template <class A>
bool regress(const sn_memory &h, double samples, int64_t S, int64_t a, int64_t n, int64_t j, bool taken, const A *mu,
             const A *sigma, const A *mu_hat, const A *sigma_hat, const A *g_mu, const A *g_sigma, A *fresh, A *hat_mu,
             A *hat_sigma) {
    const double held = (double)*h.count + samples * (double)j + 1, m = samples, M = held < h.rule.a[0] ? held : h.rule.a[0];
    const A *old = j > 0 ? fresh : (const A *)h.long_;
    const vec<A> all_m = all((A)m), all_M = all((A)M), d_v = all((A)(M + m)), one = all((A)1);
    mask<A> wrong{};
    slots<A>(n, [&](int64_t i, int k) {
        const vec<A> s_hat = table(sigma_hat + i, k), inverse = one / s_hat;
        const vec<A> mean = (table(mu + i, k) - table(mu_hat + i, k)) * inverse, scale = table(sigma + i, k) * inverse;
        vec<A> v = table(old + a + i, k), u = table(old + S + a + i, k);
        if (taken) {
            const vec<A> over = scale * scale, under = mean * mean, square = choose<A>((mask<A>)(over < under), under, over);
            const vec<A> d_u = all_M + all_m * square, off = all_m * mean;
            const vec<A> det = all_M * (d_v + all_m * square) + all_m * all_m * (square - under);
            const vec<A> per = one / det;  // below, M theta stands first: the product that is not rounded by itself
            const vec<A> t_v = all_M * v + all_m * (-load(g_mu + i) * s_hat);
            const vec<A> t_u = all_M * u + all_m * (-load(g_sigma + i) * s_hat);
            v = (d_u * t_v - off * t_u) * per, u = (d_v * t_u - off * t_v) * per;
            wrong |= (not_finite<A>(v) | not_finite<A>(u)) & before<A>(k);
        }
        keep(fresh + a + i, k, v);
        keep(fresh + S + a + i, k, u);
        store(hat_mu + i, -v * inverse);
        store(hat_sigma + i, -u * scale * inverse);
    });
    return !any<A>(wrong);
}

// One step of the stream on n slots, forward: statistics, F, map. `e` runs the passes over the data.
template <class T, class E> bool forward_step(const Job<T> &J, int64_t j, int64_t a, int64_t n, E &e) {
    typedef A_<T> A;
    const sn_plan &p = J.p;
    alignas(64) A mu[ROOM], sigma[ROOM], est_mu[ROOM], est_sigma[ROOM];
    Work<A> &w = e.w;
    const int64_t at = j * J.S + a;
    const bool about_zero = p.center == 2;
    const bool known = J.once;
    const bool one_value = J.count == 1 && !known;  // k1 is the value itself
    const vec<A> per = all((A)1 / J.count), none{};

    auto ready = [&](const A *center, const A *spread) {  // y = (x - m) a + b
        slots<A>(n, [&](int64_t i, int k) {
            vec<A> gain = J.weight ? table(J.weight + a + i, k) : all((A)1);
            store(w.m + i, p.scale ? none : load(center + i));
            store(w.a + i, gain / load(spread + i));
            store(w.b + i, J.bias ? table(J.bias + a + i, k) : none);
        });
    };
    if (known) {
        predict(*J.h, 0, J.S, a, n, est_mu);
        predict(*J.h, 1, J.S, a, n, est_sigma);
        ready(est_mu, est_sigma);
        memcpy(w.k1, est_mu, sizeof est_mu);
    } else e.first(n, w.k1);
    slots<A>(n, [&](int64_t i, int) { store(w.k2 + i, about_zero ? none : load(w.k1 + i)); });

    if (known) p.p == 2 ? e.template moments<SQUARE, true>(n) : e.template moments<ABS, true>(n);
    else if (one_value) {
        memset(w.s1, 0, sizeof w.s1);
        slots<A>(n, [&](int64_t i, int) {
            vec<A> d = load(w.k1 + i) - load(w.k2 + i);
            store(w.s2 + i, p.p == 2 ? d * d : absolute<A>(d));
        });
    } else if (p.p == 2) e.template moments<SQUARE, false>(n);
    else if (about_zero) e.template moments<ABS, false>(n);
    else e.template moments<MEAN_ONLY, false>(n);

    slots<A>(n, [&](int64_t i, int k) {
        vec<A> m = load(w.k1 + i) + load(w.s1 + i) * per;
        store(mu + i, m);
        keep(J.mu + at + i, k, m);
    });
    if (J.h) observe(*J.h, p.samples, 0, J.S, a, n, j, true, mu, J.fresh, est_mu);
    const A *center = p.center == 0 ? mu : est_mu;

    // The moment about the center from the sums about k2; where nearly all of it cancels, from the data again. A slot's
    // rounding must not depend on other slots: the tiling depends on the number of threads.
    mask<A> lost{};
    slots<A>(n, [&](int64_t i, int k) {
        vec<A> s2 = load(w.s2 + i) * per, value = s2;
        mask<A> bad{};
        if (!about_zero && (p.p == 2 || one_value)) {
            vec<A> d = load(center + i) - load(w.k1 + i);
            value = p.p == 2 ? s2 - d * (2 * per * load(w.s1 + i) - d) : absolute<A>(d);
            if (p.p == 2) bad = (mask<A>)(s2 > 64 * value) & before<A>(k);
        }
        lost |= bad;
        store(w.c + i, (vec<A>)bad);
        store(sigma + i, value);
    });
    const bool again = p.p == 1 && !about_zero && !one_value && !(known && p.center == 1);
    if (again || any<A>(lost)) {
        memcpy(w.k1, center, sizeof mu);
        memcpy(w.k2, center, sizeof mu);
        if (p.p == 2) e.template moments<SQUARE, false>(n);
        else if (p.center == 0) e.template moments<SIGN, false>(n);
        else e.template moments<ABS, false>(n);
        slots<A>(n, [&](int64_t i, int) {
            vec<A> value = load(w.s2 + i) * per;
            store(sigma + i, again ? value : choose<A>((mask<A>)load(w.c + i), value, load(sigma + i)));
        });
    }
    if (p.p == 1 && p.center == 0)
        slots<A>(n, [&](int64_t i, int k) { keep(J.tilt + at + i, k, load(w.s1 + i) * per); });

    vec<A> eps = all((A)p.eps), floor = all((A)sqrt(p.eps));
    mask<A> wrong{};
    slots<A>(n, [&](int64_t i, int k) {
        vec<A> v = load(sigma + i);
        v = p.p == 2 ? root<A>(choose<A>((mask<A>)(v < none), none, v) + eps) : v + floor;
        store(sigma + i, v);
        keep(J.sigma + at + i, k, v);
        wrong |= (extreme<A>(v) | not_finite<A>(load(mu + i))) & before<A>(k);
    });
    if (J.h) {
        observe(*J.h, p.samples, 1, J.S, a, n, j, true, sigma, J.fresh, est_sigma);
        slots<A>(n, [&](int64_t i, int k) {
            keep(J.est_mu + at + i, k, load(est_mu + i));
            keep(J.est_sigma + at + i, k, load(est_sigma + i));
        });
    }
    if (!known) {
        p.uses_estimate ? ready(est_mu, est_sigma) : ready(mu, sigma);
        e.map(n);
    }
    return !any<A>(wrong);
}

// One step of the stream on n slots, backward: gradients of the statistics, G, gradient of the input. Step j arrives
// as the i-th.
template <class T, class E> bool backward_step(const Job<T> &J, int64_t arrival, int64_t j, int64_t a, int64_t n, E &e) {
    typedef A_<T> A;
    const sn_plan &p = J.p;
    alignas(64) A g_mu[ROOM], g_sigma[ROOM], hat_mu[ROOM], hat_sigma[ROOM];
    Work<A> &w = e.w;
    const int64_t at = j * J.S + a;
    const vec<A> per = all((A)(1 / (p.unit * J.count))), unit = all((A)p.unit), trust = all((A)p.trust), none{};
    const bool known = J.once;
    const A *used_mu = p.uses_estimate ? J.est_mu : J.mu, *used_sigma = p.uses_estimate ? J.est_sigma : J.sigma;

    alignas(64) A inverse[ROOM];  // 1 / sigma_hat
    slots<A>(n, [&](int64_t i, int k) {
        vec<A> inv = all((A)1) / table(used_sigma + at + i, k);
        store(inverse + i, inv);
        store(w.m + i, p.scale ? none : table(used_mu + at + i, k));
        store(w.a + i, J.weight ? inv * table(J.weight + a + i, k) : inv);
    });
    auto ready = [&](const A *mean, const A *sigma) {  // dx = a dy + gs slope(x - c) + gm
        const A *center = p.center == 0 ? J.mu : J.est_mu;
        slots<A>(n, [&](int64_t i, int k) {
            vec<A> gs = load(sigma + i) * per, gm = load(mean + i) * per;
            if (p.p == 2) gs /= table(J.sigma + at + i, k);
            else if (p.center == 0) gm -= gs * table(J.tilt + at + i, k);
            store(w.c + i, p.center == 2 ? none : table(center + at + i, k));
            store(w.gs + i, gs);
            store(w.gm + i, gm);
        });
    };
    if (known) {
        predict(*J.h, 0, J.S, a, n, hat_mu);
        predict(*J.h, 1, J.S, a, n, hat_sigma);
        ready(hat_mu, hat_sigma);
        p.p == 2 ? e.template grads<2, true>(n) : e.template grads<1, true>(n);
    } else e.template grads<0, true>(n);

    mask<A> wrong{};
    slots<A>(n, [&](int64_t i, int k) {
        vec<A> s1 = load(w.s1 + i), s2 = load(w.s2 + i) * load(inverse + i);
        vec<A> scale = load(w.a + i) * unit, gm = p.scale ? none : -s1 * scale, gs = -s2 * scale;
        store(g_mu + i, gm);
        store(g_sigma + i, gs);
        wrong |= (not_finite<A>(gm) | not_finite<A>(gs)) & before<A>(k);
        s1 *= trust, s2 *= trust;
        if (J.dweight) keep(J.dweight + a + i, k, arrival ? table(J.dweight + a + i, k) + s2 : s2);
        if (J.dbias) keep(J.dbias + a + i, k, arrival ? table(J.dbias + a + i, k) + s1 : s1);
    });
    bool fine = !any<A>(wrong);
    if (J.h) {
        if (J.h->rule.kind == RESIDUAL)
            fine &= regress(*J.h, p.samples, J.S, a, n, arrival, !J.refused, J.mu + at, J.sigma + at, used_mu + at,
                            used_sigma + at, g_mu, g_sigma, J.fresh, hat_mu, hat_sigma);
        else {
            observe(*J.h, p.samples, 0, J.S, a, n, arrival, !J.refused, g_mu, J.fresh, hat_mu);
            observe(*J.h, p.samples, 1, J.S, a, n, arrival, !J.refused, g_sigma, J.fresh, hat_sigma);
        }
        if (arrival == p.k0 - 1) slots<A>(n, [&](int64_t i, int k) {
            keep(J.last + a + i, k, load(hat_mu + i));
            keep(J.last + J.S + a + i, k, load(hat_sigma + i));
        });
    }
    if (J.dx && !known) {
        J.h ? ready(hat_mu, hat_sigma) : ready(g_mu, g_sigma);
        p.p == 2 ? e.template grads<2, false>(n) : e.template grads<1, false>(n);
    }
    return fine;
}

// --- the four separate functions, for rules without kernels; tables are complete, (k0, S) ---

// out = the mean of x, or with a center the mean of |x - c|^p.
template <class T, class E>
bool moments_step(const Job<T> &J, int64_t j, int64_t a, int64_t n, E &e, const A_<T> *center, A_<T> *out) {
    typedef A_<T> A;
    Work<A> &w = e.w;
    const int64_t at = j * J.S + a;
    const vec<A> per = all((A)1 / J.count);
    if (center) slots<A>(n, [&](int64_t i, int k) { store(w.k1 + i, table(center + at + i, k)); });
    else e.first(n, w.k1);
    memcpy(w.k2, w.k1, sizeof w.k1);
    if (!center) e.template moments<MEAN_ONLY, false>(n);
    else if (J.p.p == 2) e.template moments<SQUARE, false>(n);
    else e.template moments<ABS, false>(n);
    slots<A>(n, [&](int64_t i, int k) {
        keep(out + at + i, k, center ? load(w.s2 + i) * per : load(w.k1 + i) + load(w.s1 + i) * per);
    });
    return true;
}
// y = (x - m) a
template <class T, class E>
bool map_step(const Job<T> &J, int64_t j, int64_t a, int64_t n, E &e, const A_<T> *m, const A_<T> *scale) {
    typedef A_<T> A;
    const int64_t at = j * J.S + a;
    slots<A>(n, [&](int64_t i, int k) {
        store(e.w.m + i, m ? table(m + at + i, k) : vec<A>{});
        store(e.w.a + i, table(scale + at + i, k));
        store(e.w.b + i, vec<A>{});
    });
    e.map(n);
    return true;
}
// s1 = sum of dy, s2 = sum of dy (x - m)
template <class T, class E>
bool sums_step(const Job<T> &J, int64_t j, int64_t a, int64_t n, E &e, const A_<T> *m, A_<T> *s1, A_<T> *s2) {
    typedef A_<T> A;
    const int64_t at = j * J.S + a;
    slots<A>(n, [&](int64_t i, int k) { store(e.w.m + i, m ? table(m + at + i, k) : vec<A>{}); });
    e.template grads<0, true>(n);
    slots<A>(n, [&](int64_t i, int k) {
        keep(s1 + at + i, k, load(e.w.s1 + i));
        keep(s2 + at + i, k, load(e.w.s2 + i));
    });
    return true;
}
// dx = a dy + gs slope(x - c) + gm
template <class T, class E>
bool input_step(const Job<T> &J, int64_t j, int64_t a, int64_t n, E &e, const A_<T> *scale, const A_<T> *c,
                const A_<T> *gs, const A_<T> *gm) {
    typedef A_<T> A;
    const int64_t at = j * J.S + a;
    slots<A>(n, [&](int64_t i, int k) {
        store(e.w.a + i, table(scale + at + i, k));
        store(e.w.c + i, c ? table(c + at + i, k) : vec<A>{});
        store(e.w.gs + i, table(gs + at + i, k));
        store(e.w.gm + i, table(gm + at + i, k));
    });
    J.p.p == 2 ? e.template grads<2, false>(n) : e.template grads<1, false>(n);
    return true;
}

}  // namespace

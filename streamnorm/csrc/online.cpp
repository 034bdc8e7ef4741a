// A whole training step of a multi-layer perceptron for one sample after another: forward, loss, backward, SGD or Adam,
// fold.
//
//     [streaming or layer norm -> gain and bias, or nothing] of the input, then
//     [linear -> streaming or layer norm or nothing -> gain and bias -> ReLU or nothing] x L,  the last of them linear
//
// The cost of such a step is the memory traffic of the weights, so they are accessed as rarely as possible: twice per
// sample, and those of the first layer once. The backward pass reads them and computes the gradient of the layer below.
// The forward pass applies the update of the previous sample, and computes the products of the new sample with each row
// that it has just updated.
//
// As weights are updated only in the next forward pass, nothing changes until all gradients of a sample are known. A
// sample is learned if its input, target, activations, loss and gradients are finite; otherwise it has no effect: it is
// skipped, or the run ends before it. Weights that are no longer finite also end a run; detecting them is free, since
// then no product of a finite input is finite.
//
// Each thread has its own rows of a large layer, always the same, which stay in its core's cache from step to step: two
// threads process 3 MB of weights in half the time of one. Results do not depend on the number of threads.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // the compiler must vectorize the loops over units
#endif
#include "online.h"

namespace {

typedef sn_online Layer;
typedef sn_param Param;
typedef sn_net Net;
typedef sn_why Why;
constexpr int64_t ALONE = 1 << 18;  // weights that one thread has processed before a second one could start

// --- Scratch: what a forward pass saves for the backward pass, and that for the next forward pass ---

template <class T> struct Room {
    T *s, *s_hat, *g, *g_hat;   // (2, out): row 0 the mean, row 1 sigma. For a layer norm, s_hat holds y
    T *out;                     // (out,): the output to the layer above, one for each `side`
    T *grad, *by_gain, *by_shift;  // (out,): gradient from the layer above, then of the products; of gain and shift

    Room(const Net &net, int64_t k, int side) {
        T *at = (T *)net.scratch;
        for (int64_t i = 0; i < k; i++) at += sn_scratch(net.layers[i]);
        int64_t n = sn_rounded(net.layers[k].out);
        s = at, s_hat = at + 2 * n, g = at + 4 * n, g_hat = at + 6 * n, out = at + (8 + side) * n;
        grad = at + 10 * n, by_gain = at + 11 * n, by_shift = at + 12 * n;
    }
};

template <class T> constexpr T largest() { return sizeof(T) == 4 ? (T)__FLT_MAX__ : (T)__DBL_MAX__; }
template <class T> bool finite(const T *v, int64_t n) {
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(fabs(v[i]) <= largest<T>());
    return !bad;
}
// `squarable` of streamnorm/definition/stats.py
template <class T> bool squarable(const T *v, int64_t n) {
    const T most = sizeof(T) == 4 ? (T)0x1p32 : (T)0x1p256, least = 1 / most;
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(v[i] >= least && v[i] <= most);
    return !bad;
}
template <class T> struct bits_of { typedef int32_t type; };
template <> struct bits_of<double> { typedef int64_t type; };
template <class T> T peak(const T *v, int64_t n) {  // the largest magnitude; NaN is larger than infinity
    typedef typename bits_of<T>::type Bits;
    Bits most = 0;
    for (int64_t i = 0; i < n; i++) {
        T a = fabs(v[i]);
        Bits now;
        memcpy(&now, &a, sizeof a);
        most = now > most ? now : most;
    }
    T top;
    memcpy(&top, &most, sizeof top);
    return top;
}
template <class T> SN_INLINE T sum_of(vec<T> v) {  // pairwise: it is needed for every row, so latency matters
    T part[lanes<T>::W];
    store(part, v);
    for (int w = lanes<T>::W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) part[i] += part[i + w];
    return part[0];
}

// --- F and G: one arrival of one sample, then a weight update (observe and fold of LongShort and Pooled) ---

template <class T> struct Arrival {
    const sn_memory &m;
    bool ok, known;  // whether it is taken in; whether there is an estimate
    T share, to_long, to_short, to_now;

    Arrival(const sn_memory &memory, bool is_ok, int row = 0) : m(memory), ok(is_ok) {
        if (m.rule.kind == POOLED) {
            const double M = sn_pooled(&m.rule, *m.updates, row), N = (double)(*m.count + ok);
            known = M + N > 0;
            share = (T)(1 / (N > 0 ? N : 1)), to_long = (T)(known ? M / (M + N) : 0), to_short = (T)(known ? N / (M + N) : 0);
            to_now = (T)!known;
            return;
        }
        const double *mix = m.rule.a;
        int64_t count = *m.count + ok;
        bool has_long = *m.updates > 0, has_short = count > 0;  // if one is empty, the other stands in for it
        known = has_long || has_short;
        share = (T)1 / (T)(count > 0 ? count : 1);
        to_long = (T)(has_long ? mix[0] + (has_short ? 0 : mix[1]) : 0);
        to_short = (T)(has_short ? mix[1] + (has_long ? 0 : mix[0]) : 0);
        to_now = (T)mix[2];
        if (!known) to_now = (T)(mix[0] + mix[1] + mix[2]);
    }
    SN_INLINE T short_term(const T *old, const T *s, int64_t i, bool taken, T share) {
        return taken ? old[i] + share * (s[i] - old[i]) : old[i];
    }
    void estimate(const T *s, T *s_hat, int64_t begin, int64_t end) const {
        const T *lng = (const T *)m.long_, *old = (const T *)m.short_;
        if (!known)
            for (int64_t i = begin; i < end; i++) s_hat[i] = to_now * s[i];
        else if (to_now != 0)
            for (int64_t i = begin; i < end; i++)
                s_hat[i] = to_long * lng[i] + short_term(old, s, i, ok, share) * to_short + to_now * s[i];
        else
            for (int64_t i = begin; i < end; i++)
                s_hat[i] = to_long * lng[i] + short_term(old, s, i, ok, share) * to_short;
    }
    void remember_and_fold(const T *s, const T *s_hat, int64_t n, const double *shares) const {
        T *lng = (T *)m.long_, *old = (T *)m.short_;
        if (ok || finite(s_hat, n)) memcpy(m.estimate, s_hat, n * sizeof(T));
        *(ok ? m.seen : m.skipped) += 1;
        if (*m.count + ok == 0) return;
        if (m.rule.kind == POOLED) {  // long becomes the estimate
            memcpy(lng, s_hat, n * sizeof(T));
            memset(old, 0, n * sizeof(T));
            *m.updates = sn_pooled_after(&m.rule, *m.updates, *m.count + ok), *m.count = 0;
            return;
        }
        T keep = (T)shares[0], take = (T)shares[1];
        if (*m.updates > 0)
            for (int64_t i = 0; i < n; i++) lng[i] = keep * lng[i] + take * short_term(old, s, i, ok, share);
        else
            for (int64_t i = 0; i < n; i++) lng[i] = short_term(old, s, i, ok, share);
        memset(old, 0, n * sizeof(T));
        *m.count = 0, *m.updates += 1;
    }
};

// G as the residual of a regression over the stream, for one sample (`regress` of slots.h): the estimate, and in place
// of g the new coefficients.
template <class T> void regress(const sn_memory &m, const T *s, const T *s_hat, T *g, T *g_hat, int64_t n) {
    const T *v = (const T *)m.long_, *u = v + n;
    const double held = (double)*m.count + 1;
    const T M = (T)(held < m.rule.a[0] ? held : m.rule.a[0]), d_v = M + 1;
    for (int64_t i = 0; i < n; i++) {
        const T inverse = 1 / s_hat[n + i], mean = (s[i] - s_hat[i]) * inverse, scale = s[n + i] * inverse;
        const T over = scale * scale, under = mean * mean, square = over < under ? under : over;
        const T t_v = M * v[i] - g[i] * s_hat[n + i], t_u = M * u[i] - g[n + i] * s_hat[n + i];
        const T d_u = M + square, per = 1 / (M * (d_v + square) + (square - under));
        const T new_v = (d_u * t_v - mean * t_u) * per, new_u = (d_v * t_u - mean * t_v) * per;
        g[i] = new_v, g[n + i] = new_u;
        g_hat[i] = -new_v * inverse, g_hat[n + i] = -new_u * scale * inverse;
    }
}
template <class T> void remember_coefficients(const sn_memory &m, const T *theta, const T *g_hat, int64_t n) {
    memcpy(m.long_, theta, n * sizeof(T));
    memcpy(m.estimate, g_hat, n * sizeof(T));
    *m.seen += 1, *m.count += 1;
}

// --- The optimizer's step ---

enum How { HOLD, PLAIN, DECAY, HEAVY, ADAM };  // nothing, SGD, SGD with decay, with decay and momentum, Adam

SN_INLINE float root_of(float v) { return sqrtf(v); }
SN_INLINE double root_of(double v) { return sqrt(v); }
SN_INLINE vec<float> root_of(vec<float> v) { return root<float>(v); }
SN_INLINE vec<double> root_of(vec<double> v) { return root<double>(v); }

template <class T> struct Move {  // one step of a parameter
    How how = HOLD;
    bool nesterov = false;
    T lr = 0, decay = 0, momentum = 0, gain = 0;   // `gain`: of the gradient in the average
    T keep = 1, beta2 = 0, gain2 = 0, scale = 0, eps = 0;  // of w; of squares and of their bias-corrected root

    Move() {}
    Move(const sn_rates &r, const Param &p) : nesterov(r.nesterov != 0), momentum((T)r.momentum) {
        lr = (T)r.lr, decay = (T)r.decay, gain = (T)(p.fresh ? 1 : 1 - r.dampening);
        how = r.momentum != 0 ? HEAVY : r.decay != 0 ? DECAY : PLAIN;
        if (r.is(SGD)) return;
        double count = (p.wide_count ? *(double *)p.count : *(float *)p.count) + 1;
        how = ADAM;
        if (r.is(ADAM_W)) decay = 0, keep = (T)(1 - r.lr * r.decay);
        gain = (T)(1 - r.momentum), beta2 = (T)r.beta2, gain2 = (T)(1 - r.beta2), eps = (T)r.eps;
        lr = (T)(r.lr / (1 - pow(r.momentum, count))), scale = (T)(1 / sqrt(1 - pow(r.beta2, count)));
    }
    // Updates w by its gradient g, with its average a and its square b; scalars or vectors.
    template <int how, class V> __attribute__((always_inline)) void step(V g, V &w, V &a, V &b) const {
        if (how == PLAIN) w -= lr * g;
        if (how == DECAY) w -= lr * (g + decay * w);
        if (how == HEAVY) {
            g += decay * w;
            a = momentum * a + gain * g;
            w -= lr * (nesterov ? g + momentum * a : a);
        }
        if (how == ADAM) {
            g += decay * w;
            a += gain * (g - a);
            b = beta2 * b + gain2 * g * g;
            w = keep * w - lr * a / (scale * root_of(b) + eps);
        }
    }
};

// The next step of a parameter; increases its step count.
template <class T> Move<T> next_move(Param &p) {
    Move<T> move(*p.rates, p);
    p.fresh = false;
    if (p.count && p.wide_count) *(double *)p.count += 1;
    if (p.count && !p.wide_count) *(float *)p.count += 1;
    return move;
}

// body(how) with a constant.
template <int how> struct constant { constexpr operator int() const { return how; } };
template <class Body> SN_INLINE void by_constant(How how, const Body &body) {
    if (how == HOLD) body(constant<HOLD>{});
    if (how == PLAIN) body(constant<PLAIN>{});
    if (how == DECAY) body(constant<DECAY>{});
    if (how == HEAVY) body(constant<HEAVY>{});
    if (how == ADAM) body(constant<ADAM>{});
}

// Whether gradients of at most this magnitude do not overflow in the optimizer: in the step of SGD, in Adam's square.
template <class T> bool fits(const Param &p, T most) {
    if (!p.at) return true;
    const sn_rates &r = *p.rates;
    return most <= largest<T>() && most * (r.is(SGD) ? (T)fabs(r.lr) : most) <= largest<T>();
}

template <class T> bool finite(const Param &p, int64_t n) { return !p.at || finite((const T *)p.at, n); }

// Updates a parameter of n values at once. False: it is no longer finite.
template <class T> bool move(Param &p, const T *grad, int64_t n) {
    if (!p.at) return true;
    const Move<T> m = next_move<T>(p);
    T *w = (T *)p.at, *average = (T *)p.average, *square = (T *)p.square, none = 0;
    by_constant(m.how, [&](auto how) {
        for (int64_t i = 0; i < n; i++)
            m.template step<how>(grad[i], w[i], how >= HEAVY ? average[i] : none, how == ADAM ? square[i] : none);
    });
    return finite(w, n);
}

// --- Weights ---

enum What { AHEAD, BELOW };  // a forward pass, which may update weights, or a backward pass

template <class T> struct Pass {
    T *w, *average, *square;
    const T *g, *x;     // the gradients of the products (out,), and the input (in,) that they belong to
    T *below;           // W^T g, (in,), is added to it
    const T *ahead;     // the next input, (in,)
    T *products;        // W ahead, (out,), with the bias
    const T *bias;
};

// n rows from the i-th. A row's sum does not depend on n.
template <class T, int n, int how, int what> void pass_rows(const Pass<T> &p, const Move<T> &m, int64_t i, int64_t in) {
    constexpr int W = lanes<T>::W;
    const T *x = p.x, *ahead = p.ahead;  // copies, so that stores cannot alias them
    const Move<T> move = m;
    T *w[n], *average[n] = {}, *square[n] = {}, *below = p.below;
    vec<T> g[n] = {}, rate[n] = {}, sum[n] = {};
    for (int r = 0; r < n; r++) {
        w[r] = p.w + (i + r) * in;
        if (how >= HEAVY) average[r] = p.average + (i + r) * in;
        if (how == ADAM) square[r] = p.square + (i + r) * in;
        if (how != HOLD || what == BELOW) g[r] = all(p.g[i + r]), rate[r] = move.lr * g[r];
    }
    auto step = [=, &sum](int64_t j, int k, auto get, auto put) {
        vec<T> v[n], a[n] = {}, b[n] = {}, xj{}, sum_below{}, next{};
        if (how != HOLD) xj = get(x + j);
        if (what == BELOW) sum_below = get(below + j);
        if (what == AHEAD) next = get(ahead + j);
        for (int r = 0; r < n; r++) {  // load all rows before storing any: no load waits for a store
            v[r] = get(w[r] + j);
            if (how >= HEAVY) a[r] = get(average[r] + j);
            if (how == ADAM) b[r] = get(square[r] + j);
            if (what == BELOW) sum_below += g[r] * v[r];
            if (how == PLAIN) v[r] -= rate[r] * xj;  // fewer operations per cache line than below, and faster
            if (how > PLAIN) move.template step<how>(g[r] * xj, v[r], a[r], b[r]);
            if (how == ADAM && k < W) v[r] = choose<T>(before<T>(k), v[r], vec<T>{});  // with an eps of 0, 0 / 0
            if (what == AHEAD) sum[r] += v[r] * next;
        }
        for (int r = 0; r < n; r++) {
            if (how != HOLD) put(w[r] + j, v[r]);
            if (how >= HEAVY) put(average[r] + j, a[r]);
            if (how == ADAM) put(square[r] + j, b[r]);
        }
        if (what == BELOW) put(below + j, sum_below);
    };
    int64_t j = 0;
    for (; j + W <= in; j += W) step(j, W, [](const T *a) { return load(a); }, [](T *a, vec<T> v) { store(a, v); });
    if (int k = (int)(in - j); k > 0)
        step(j, k, [k](const T *a) { return load_part(a, k); }, [k](T *a, vec<T> v) { store_part(a, k, v); });
    if (what == AHEAD)
        for (int r = 0; r < n; r++) p.products[i + r] = sum_of<T>(sum[r]) + (p.bias ? p.bias[i + r] : 0);
}

// Rows from .. to, several at a time so that shared data is loaded once. `back`: the last first, which may still be in
// the caches.
template <class T, int how, int what>
void pass_some(const Pass<T> &p, const Move<T> &m, bool back, int64_t in, int64_t from, int64_t to) {
    constexpr int n = what == BELOW ? 4 : 2;
    int64_t whole = from + (to - from) / n * n;
    if (back) {
        for (int64_t i = to - 1; i >= whole; i--) pass_rows<T, 1, how, what>(p, m, i, in);
        for (int64_t i = whole - n; i >= from; i -= n) pass_rows<T, n, how, what>(p, m, i, in);
    } else {
        for (int64_t i = from; i < whole; i += n) pass_rows<T, n, how, what>(p, m, i, in);
        for (int64_t i = whole; i < to; i++) pass_rows<T, 1, how, what>(p, m, i, in);
    }
}

// All rows. Each thread has its own, always the same, which may stay in its cache between steps; rows are added to the
// gradient below one after another.
template <class T, int how, int what>
void pass_all(const Net &net, const Layer &l, const Pass<T> &p, const Move<T> &m, bool back) {
    const int threads = what == BELOW || l.in * l.out < ALONE ? 1 : (int)net.threads;
    parallel(threads, threads, [&](int64_t task) {
        pass_some<T, how, what>(p, m, back, l.in, l.out * task / threads, l.out * (task + 1) / threads);
    });
}

// --- The norms, on the products a = s[0 ... out) of a layer ---

template <class T> bool forward_norm(const Layer &l, const Room<T> &at) {
    int64_t n = l.out;
    T *a = at.s, *sigma = at.s + n, *mu_hat = at.s_hat, *sigma_hat = at.s_hat + n, *y = at.out;
    const T *gain = (const T *)l.gain.at, *shift = (const T *)l.shift.at;
    if (!finite(a, n)) return false;
    if (l.kind == STREAMING) {
        Arrival<T>(l.F, true).estimate(at.s, at.s_hat, 0, n);
        T floor = (T)sqrt(l.eps), eps = (T)l.eps;
        for (int64_t i = 0; i < n; i++) {
            T d = l.about_zero ? a[i] : a[i] - mu_hat[i];
            sigma[i] = l.p == 2 ? (T)sqrt(d * d + eps) : (T)fabs(d) + floor;
        }
        if (!squarable(sigma, n)) {
            for (int64_t i = 0; i < n && l.p == 2; i++)
                sigma[i] = (T)hypot((double)(l.about_zero ? a[i] : a[i] - mu_hat[i]), (double)floor);
            if (!finite(sigma, n)) return false;
        }
        Arrival<T>(l.F, true, 1).estimate(at.s, at.s_hat, n, 2 * n);
        for (int64_t i = 0; i < n; i++) y[i] = (a[i] - mu_hat[i]) / sigma_hat[i];
    } else if (l.kind == LAYER) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n; i++) mean += a[i];
        mean /= (double)n;
        for (int64_t i = 0; i < n; i++) square += (a[i] - mean) * (a[i] - mean);
        double sd = sqrt(square / (double)n + l.eps);
        if (!(square / (double)n <= largest<T>())) return false;  // as in torch, where it would overflow T
        sigma[0] = (T)sd;
        for (int64_t i = 0; i < n; i++) at.s_hat[i] = y[i] = (T)((a[i] - mean) / sd);
    } else
        memcpy(y, a, n * sizeof(T));
    if (gain)
        for (int64_t i = 0; i < n; i++) y[i] *= gain[i];
    if (shift)
        for (int64_t i = 0; i < n; i++) y[i] += shift[i];
    if (!finite(y, n)) return false;
    if (l.relu)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i];
    return true;
}

// Turns `grad` from the layer above into the gradient of the products, and computes those of gain and shift. False: the
// norm's arrival is not finite.
template <class T> bool backward_norm(const Layer &l, const Room<T> &at) {
    int64_t n = l.out;
    T *grad = at.grad, *out = at.out, *a = at.s, *sigma = at.s + n, *sigma_hat = at.s_hat + n;
    T *g_mu = at.g, *g_sigma = at.g + n;
    const T *gain = (const T *)l.gain.at;
    if (l.relu)
        for (int64_t i = 0; i < n; i++) grad[i] = out[i] <= 0 ? 0 : grad[i];
    if (l.kind == NONE) return true;
    if (l.kind == STREAMING)
        for (int64_t i = 0; i < n; i++) at.by_gain[i] = grad[i] * ((a[i] - at.s_hat[i]) / sigma_hat[i]);
    else
        for (int64_t i = 0; i < n; i++) at.by_gain[i] = grad[i] * at.s_hat[i];
    const T trust = (T)l.trust;
    for (int64_t i = 0; i < n; i++) at.by_gain[i] *= trust, at.by_shift[i] = trust * grad[i];
    if (!l.weight.at) return true;  // the gradient of the input is not needed
    if (gain)
        for (int64_t i = 0; i < n; i++) grad[i] *= gain[i];
    if (l.kind == LAYER) {
        double mean = 0, slope = 0, sd = sigma[0];
        for (int64_t i = 0; i < n; i++) mean += grad[i], slope += (double)grad[i] * at.s_hat[i];
        mean /= (double)n, slope /= (double)n;
        for (int64_t i = 0; i < n; i++) grad[i] = (T)((grad[i] - mean - at.s_hat[i] * slope) / sd);
        return true;
    }
    for (int64_t i = 0; i < n; i++) {
        g_mu[i] = -grad[i] / sigma_hat[i];
        g_sigma[i] = -((a[i] - at.s_hat[i]) / sigma_hat[i] * grad[i]) / sigma_hat[i];  // its square may overflow
    }
    if (!finite(at.g, 2 * n)) return false;
    if (l.G.rule.kind == RESIDUAL) {
        regress(l.G, at.s, at.s_hat, at.g, at.g_hat, n);
        if (!finite(at.g, 2 * n)) return false;
    } else
        Arrival<T>(l.G, true).estimate(at.g, at.g_hat, 0, 2 * n);
    for (int64_t i = 0; i < n; i++) {
        T d = l.about_zero ? a[i] : a[i] - at.s_hat[i], to_mu = at.g_hat[i], to_sigma = at.g_hat[n + i];
        T slope = l.p == 2 ? d / sigma[i] * to_sigma : to_sigma * (T)((d > 0) - (d < 0));
        grad[i] = grad[i] / sigma_hat[i] + to_mu + slope;
    }
    return true;
}

// --- The loss of one sample, its mean over classes or outputs as torch takes it, and its gradient ---

template <class T> double loss_of(const Net &net, const T *out, int64_t n, const void *target, T *grad) {
    double loss = 0;
    if (net.loss == SQUARED_ERROR) {
        const T *want = (const T *)target;
        for (int64_t i = 0; i < n; i++) {
            T d = out[i] - want[i];
            loss += (double)d * d / (double)n;
            grad[i] = (T)(2 * d / (double)n);
        }
        return loss;
    }
    int64_t label = *(const int64_t *)target;
    double most = out[0], total = 0;
    for (int64_t i = 1; i < n; i++) most = out[i] > most ? out[i] : most;
    for (int64_t i = 0; i < n; i++) total += exp(out[i] - most);
    for (int64_t i = 0; i < n; i++) grad[i] = (T)(exp(out[i] - most) / total - (i == label));
    return log(total) + most - out[label];
}

// --- Steps ---

template <class T> struct Run {
    Net &net;
    Layer *layers = net.layers, &top = layers[net.depth - 1];
    int side = 0;                // where the outputs of the current sample go; the last learned sample keeps the other
    const T *learned = nullptr;  // the input of that one, whose weight update is pending

    Room<T> room(int64_t k) { return Room<T>(net, k, side); }
    const T *input(int64_t k, const T *x, int of) { return k ? Room<T>(net, k - 1, of).out : x; }
    bool has_below(int64_t k) { return k && layers[k - 1].learns(); }

    // Applies a pending update; then computes the products of an input.
    void forward_products(int64_t k, const T *ahead) {
        Layer &l = layers[k];
        Room<T> at = room(k);
        Pass<T> pass{};
        pass.w = (T *)l.weight.at, pass.average = (T *)l.weight.average, pass.square = (T *)l.weight.square;
        pass.bias = (const T *)l.bias.at, pass.ahead = ahead, pass.products = at.s;
        Move<T> m;
        if (l.pending) {
            m = next_move<T>(l.weight);
            pass.g = at.grad, pass.x = input(k, learned, !side);
            l.pending = l.proven = false;
        }
        by_constant(m.how, [&](auto how) { pass_all<T, how, AHEAD>(net, l, pass, m, l.back); });
        l.back = !has_below(k) && !l.back;
    }

    bool broken(int64_t k) {  // a layer whose activations are not finite may have lost its parameters
        Layer &l = layers[k];
        if (!l.proven) l.proven = finite<T>(l.weight, l.in * l.out);
        if (l.proven && finite<T>(l.bias, l.out) && finite<T>(l.gain, l.out) && finite<T>(l.shift, l.out)) return false;
        return true;
    }

    Why forward(const T *x) {
        for (int64_t k = 0; k < net.depth; k++) {
            if (layers[k].weight.at)
                forward_products(k, input(k, x, side));
            else
                memcpy(room(k).s, x, layers[k].out * sizeof(T));
            if (!forward_norm(layers[k], room(k))) return broken(k) ? WEIGHTS : ACTIVATIONS;
        }
        return FINE;
    }

    Why backward(const T *x) {
        for (int64_t k = net.depth - 1; k >= 0 && layers[k].learns(); k--) {
            const Layer &l = layers[k];
            Room<T> at = room(k);
            bool ok = backward_norm(l, at) && fits(l.gain, peak(at.by_gain, l.gain.at ? l.out : 0)) &&
                      fits(l.shift, peak(at.by_shift, l.shift.at ? l.out : 0));
            if (!l.weight.at) return ok ? FINE : GRADIENT;
            T most = peak(at.grad, l.out);
            ok = ok && most <= largest<T>() && fits(l.bias, most);
            if (!ok || !fits(l.weight, most * peak(input(k, x, side), l.in))) return GRADIENT;
            if (!has_below(k)) continue;
            Pass<T> pass{};
            pass.w = (T *)l.weight.at, pass.g = at.grad, pass.below = room(k - 1).grad;
            memset(pass.below, 0, l.in * sizeof(T));
            pass_all<T, HOLD, BELOW>(net, l, pass, Move<T>(), true);
        }
        return FINE;
    }

    // Learns a sample: updates memories of norms and parameters, but weights only later.
    Why learn(const T *x, int64_t number) {
        Why why = FINE;
        for (int64_t k = 0; k < net.depth; k++) {
            Layer &l = layers[k];
            Room<T> at = room(k);
            if (l.kind == STREAMING) Arrival<T>(l.F, true).remember_and_fold(at.s, at.s_hat, 2 * l.out, l.f.keep);
            if (!net.moves || !l.learns()) continue;
            if (l.kind == STREAMING && l.weight.at) {
                if (l.G.rule.kind == RESIDUAL) remember_coefficients(l.G, at.g, at.g_hat, 2 * l.out);
                else Arrival<T>(l.G, true).remember_and_fold(at.g, at.g_hat, 2 * l.out, l.g.keep);
            }
            bool ok = move(l.gain, at.by_gain, l.out);
            ok = move(l.shift, at.by_shift, l.out) && ok;
            ok = move(l.bias, at.grad, l.out) && ok;
            if (!ok) why = WEIGHTS;
            l.pending = l.weight.at != nullptr;
        }
        net.learned += 1, net.latest = number, learned = x, side = !side;
        return why;
    }

    // Applies pending updates.
    Why finish(Why why) {
        for (int64_t k = 0; k < net.depth; k++) {
            if (!layers[k].pending) continue;
            forward_products(k, input(k, learned, !side));
            if (why != WEIGHTS && !finite(room(k).s, layers[k].out) && broken(k)) why = WEIGHTS;
        }
        return why;
    }

    void steps() {
        const T *x = (const T *)net.x;
        const char *targets = (const char *)net.targets;
        T *out = (T *)net.outputs, *losses = (T *)net.losses;
        const bool squared = net.loss == SQUARED_ERROR;
        const int64_t target_size = squared ? top.out * (int64_t)sizeof(T) : (int64_t)sizeof(int64_t);
        net.learned = net.skipped = 0, net.latest = -1;
        Why why = FINE;
        for (int64_t t = 0; t < net.samples; t++, x += layers[0].in, targets += target_size, out += top.out) {
            bool has_target = !squared || finite((const T *)targets, top.out);
            why = !finite(x, layers[0].in) ? INPUT : !has_target ? TARGET : forward(x);
            if (why == FINE) {
                Room<T> last = room(net.depth - 1);
                memcpy(out, last.out, top.out * sizeof(T));
                losses[t] = (T)loss_of(net, last.out, top.out, targets, last.grad);
                why = !finite(losses + t, 1) ? LOSS : net.moves ? backward(x) : FINE;
            }
            if (why == FINE)
                why = learn(x, t);
            else if (why != WEIGHTS && !net.raises) {
                losses[t] = (T)NAN, net.skipped += 1, why = FINE;
                for (int64_t i = 0; i < top.out; i++) out[i] = (T)NAN;
            }
            if (why != FINE) break;
        }
        net.why = finish(why);
    }
};

}  // namespace

// Trains on the samples in order, and stores the results.
SN_EXPORT(void, online_f32)(sn_net *net) { Run<float>{*net}.steps(); }
SN_EXPORT(void, online_f64)(sn_net *net) { Run<double>{*net}.steps(); }

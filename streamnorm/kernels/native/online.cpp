// A whole training step of a multi-layer perceptron for one sample after another: forward, loss, backward, SGD, fold.
//
//     [linear -> streaming or layer norm or nothing -> gain and bias -> ReLU or nothing] x L,  the last of them linear
//
// What such a step costs is the memory traffic of the weights, so they are touched as seldom as can be: a pass forward
// (rows times the layer's input), and one backward that gives the layer below its gradient and moves the weights in
// place. Nobody wants a gradient of the first layer's input; its pass makes the next sample's products instead, with
// each row of weights that it has just moved: in a run of samples the first layer is read and written once for each.
//
// Nothing has changed when a forward pass turns out not to be finite: `online_steps` says at which sample, and its
// caller takes that one the ordinary way. Backward, a norm refuses gradients that are not finite as `Memory.take` does.
//
// A thread has rows of its own of a large layer, always the same, which stay in its core's cache from step to step: two
// threads pass 3 MB of weights in half the time of one. Nothing that is computed depends on how many there are.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")  // loops over units are left to the compiler, which has to see that they are vectors
#endif
#include "parallel.h"
#include "rule.h"
#include "vec.h"

namespace {

// --- The network, mirrored by the structures of streamnorm/online.py ---

struct Rates {             // of an optimizer's group of parameters
    double lr, decay, momentum, dampening, nesterov;
};
struct Param {             // a parameter of T, or null
    void *at, *average;    // `average`: the momentum buffer
    int64_t group, fresh;  // the group of its rates; whether the average holds nothing yet
};
struct Stream {            // H1 with F, or H2 with G: tables (2, out) of T
    void *long_, *short_, *estimate;
    int64_t *count, *updates, *seen, *skipped;
    sn_rule rule;
    double keep[2];

    bool begins() const { return rule.kind == POOLED && rule.a[1] > 0 && *count == 0 && *updates == 0; }
};
enum Kind { NONE, STREAMING, LAYER };
struct Layer {
    int64_t in, out, kind, p, about_zero, relu;
    double eps, trust;         // `trust`: what gradients of gain and shift are multiplied by
    Param weight, bias, gain, shift;
    Stream F, G;
};
enum Loss { CROSS_ENTROPY, SQUARED_ERROR };
struct Net {
    int64_t depth, loss;
    Layer *layers;
    Rates *rates;
    void *scratch;
    int64_t threads;
};
constexpr int64_t SERIAL = 1 << 18;  // weights that one thread has passed before a second one has begun

// --- Scratch: what a forward pass leaves for the backward pass ---

template <class T> struct Room {
    T *s, *s_hat, *g, *g_hat;  // (2, out): row 0 the mean, row 1 sigma. For a layer norm, s_hat holds y
    T *out, *grad;             // (out,): what goes to the layer above and what comes from it

    static int64_t size(const Layer &l) { return 10 * padded(l.out); }
    static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
    Room(const Net &net, int64_t k) {
        T *at = (T *)net.scratch;
        for (int64_t i = 0; i < k; i++) at += size(net.layers[i]);
        int64_t n = padded(net.layers[k].out);
        s = at, s_hat = at + 2 * n, g = at + 4 * n, g_hat = at + 6 * n, out = at + 8 * n, grad = at + 9 * n;
    }
};

template <class T> constexpr T largest() { return sizeof(T) == 4 ? (T)__FLT_MAX__ : (T)__DBL_MAX__; }
template <class T> bool finite(const T *v, int64_t n) {
    int bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= !(fabs(v[i]) <= largest<T>());
    return !bad;
}
template <class T> SN_INLINE T sum_of(vec<T> v) {  // in pairs: a row has one, so that it should not be a chain
    T part[lanes<T>::W];
    store(part, v);
    for (int w = lanes<T>::W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) part[i] += part[i + w];
    return part[0];
}

// --- F and G: one arrival of one sample, then a weight update (observe and fold of LongShort and Pooled) ---

template <class T> struct Arrival {
    const Stream &m;
    bool ok, known;  // whether it is taken in; whether there is anything to make an estimate of
    T share, to_long, to_short, to_now;

    Arrival(const Stream &memory, bool is_ok, int row = 0) : m(memory), ok(is_ok) {
        if (m.rule.kind == POOLED) {
            const double held = (double)*m.updates + (row ? m.rule.a[1] : 0), N = (double)(*m.count + ok);
            const double M = held < m.rule.a[0] ? held : m.rule.a[0];
            known = M + N > 0;
            share = (T)(1 / (N > 0 ? N : 1)), to_long = (T)(known ? M / (M + N) : 0), to_short = (T)(known ? N / (M + N) : 0);
            to_now = (T)!known;
            return;
        }
        const double *mix = m.rule.a;
        int64_t count = *m.count + ok;
        bool has_long = *m.updates > 0, has_short = count > 0;  // whichever is empty, the other stands in for it
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
    void remember_and_fold(const T *s, const T *s_hat, int64_t n) const {
        T *lng = (T *)m.long_, *old = (T *)m.short_;
        if (ok || finite(s_hat, n)) memcpy(m.estimate, s_hat, n * sizeof(T));
        *(ok ? m.seen : m.skipped) += 1;
        if (*m.count + ok == 0) return;
        if (m.rule.kind == POOLED) {  // long becomes the estimate
            memcpy(lng, s_hat, n * sizeof(T));
            memset(old, 0, n * sizeof(T));
            *m.updates += *m.count + ok, *m.count = 0;
            return;
        }
        T keep = (T)m.keep[0], take = (T)m.keep[1];
        if (*m.updates > 0)
            for (int64_t i = 0; i < n; i++) lng[i] = keep * lng[i] + take * short_term(old, s, i, ok, share);
        else
            for (int64_t i = 0; i < n; i++) lng[i] = short_term(old, s, i, ok, share);
        memset(old, 0, n * sizeof(T));
        *m.count = 0, *m.updates += 1;
    }
};

// G as the residual of a regression over the stream, for one sample (`regress` of slots.h).
template <class T> void regress(const Stream &m, const T *s, const T *s_hat, const T *g, T *g_hat, int64_t n, bool ok) {
    T *v = (T *)m.long_, *u = v + n;
    const double held = (double)*m.count + 1;
    const T M = (T)(held < m.rule.a[0] ? held : m.rule.a[0]);
    for (int64_t i = 0; i < n; i++) {
        const T inverse = 1 / s_hat[n + i], mean = (s[i] - s_hat[i]) * inverse, scale = s[n + i] * inverse;
        if (ok) {
            const T over = scale * scale, under = mean * mean, square = over < under ? under : over;
            const T e_v = -g[i] * s_hat[n + i] - v[i] - mean * u[i];
            const T e_u = -g[n + i] * s_hat[n + i] - mean * v[i] - square * u[i];
            const T d_v = M + 1, d_u = M + square, per = 1 / (d_v * d_u - under);
            v[i] += (d_u * e_v - mean * e_u) * per, u[i] += (d_v * e_u - mean * e_v) * per;
        }
        g_hat[i] = -v[i] * inverse, g_hat[n + i] = -u[i] * scale * inverse;
    }
    if (ok || finite(g_hat, 2 * n)) memcpy(m.estimate, g_hat, 2 * n * sizeof(T));
    *(ok ? m.seen : m.skipped) += 1;
    *m.count += ok;
}

// --- Small parameters ---

template <class T> struct Move {  // what SGD does to a parameter
    T lr, decay, momentum, gain;  // `gain`: of the gradient in the average
    bool nesterov;

    Move(const Net &net, const Param &p) {
        const Rates &r = net.rates[p.group];
        lr = (T)r.lr, decay = (T)r.decay, momentum = (T)r.momentum;
        gain = (T)(p.fresh ? 1 : 1 - r.dampening), nesterov = r.nesterov != 0;
    }
};

template <class T> void move(const Net &net, Param &p, const T *grad, int64_t n) {
    Move<T> m(net, p);
    T *w = (T *)p.at, *average = (T *)p.average;
    if (!w) return;
    if (m.momentum == 0) {
        for (int64_t i = 0; i < n; i++) w[i] -= m.lr * (m.decay == 0 ? grad[i] : grad[i] + m.decay * w[i]);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        T g = m.decay == 0 ? grad[i] : grad[i] + m.decay * w[i], a = m.momentum * average[i] + m.gain * g;
        average[i] = a;
        w[i] -= m.lr * (m.nesterov ? g + m.momentum * a : a);
    }
    p.fresh = 0;
}

// --- Weights ---

enum How { HOLD, PLAIN, DECAY, HEAVY };  // weights stay, move, move with decay, move with decay and momentum
enum What { MOVE, BELOW, AHEAD };        // and besides: the gradient to the layer below, or the next input's products

template <class T> struct Pass {
    T *w, *average;
    const T *g, *x;     // the gradients of the products (out,), and the input (in,)
    T *below;           // W^T g, (in,), is added to it
    const T *ahead;     // the next input, (in,)
    T *products;        // W ahead, (out,), with the bias
    const T *bias;
};

// n rows from the i-th. What a row's sum is does not depend on n.
template <class T, int n, int how, int what> void pass_rows(const Pass<T> &p, const Move<T> &m, int64_t i, int64_t in) {
    constexpr int W = lanes<T>::W;
    const T *x = p.x, *ahead = p.ahead;  // copies, which no store can change
    const T lr = m.lr, decay = m.decay, momentum = m.momentum, gain = m.gain;
    const bool nesterov = m.nesterov;
    T *w[n], *average[n] = {}, *below = p.below;
    vec<T> g[n] = {}, rate[n] = {}, sum[n] = {};
    for (int r = 0; r < n; r++) {
        w[r] = p.w + (i + r) * in;
        if (how == HEAVY) average[r] = p.average + (i + r) * in;
        if (how != HOLD) g[r] = all(p.g[i + r]), rate[r] = lr * g[r];
    }
    auto step = [=, &sum](int64_t j, auto get, auto put) {
        vec<T> v[n], a[n] = {}, xj{}, sum_below{}, next{};
        if (how != HOLD) xj = get(x + j);
        if (what == BELOW) sum_below = get(below + j);
        if (what == AHEAD) next = get(ahead + j);
        for (int r = 0; r < n; r++) {  // all rows are loaded before one is stored: no load waits for a store
            v[r] = get(w[r] + j);
            if (how == HEAVY) a[r] = get(average[r] + j);
            if (what == BELOW) sum_below += g[r] * v[r];
            if (how == PLAIN) v[r] -= rate[r] * xj;  // fewer operations a line of the cache than the next, and faster
            if (how == DECAY || how == HEAVY) {
                vec<T> d = g[r] * xj + decay * v[r];
                if (how == HEAVY) {
                    a[r] = momentum * a[r] + gain * d;
                    d = nesterov ? d + momentum * a[r] : a[r];
                }
                v[r] -= lr * d;
            }
            if (what == AHEAD) sum[r] += v[r] * next;
        }
        for (int r = 0; r < n; r++) {
            if (how != HOLD) put(w[r] + j, v[r]);
            if (how == HEAVY) put(average[r] + j, a[r]);
        }
        if (what == BELOW) put(below + j, sum_below);
    };
    int64_t j = 0;
    for (; j + W <= in; j += W) step(j, [](const T *a) { return load(a); }, [](T *a, vec<T> v) { store(a, v); });
    if (int k = (int)(in - j); k > 0)
        step(j, [k](const T *a) { return load_part(a, k); }, [k](T *a, vec<T> v) { store_part(a, k, v); });
    if (what == AHEAD)
        for (int r = 0; r < n; r++) p.products[i + r] = sum_of<T>(sum[r]) + (p.bias ? p.bias[i + r] : 0);
}

// Rows from .. to, some together so that what they share is loaded once. `back`: the last first, which caches may still
// hold.
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

// All rows. Each thread has its own of them, always the same, which its cache may hold from one step to the next; rows
// add to the gradient below one after another.
template <class T, int how, int what>
void pass_all(const Net &net, const Layer &l, const Pass<T> &p, const Move<T> &m, bool back) {
    const int threads = what == BELOW || l.in * l.out < SERIAL ? 1 : (int)net.threads;
    parallel(threads, threads, [&](int64_t task) {
        pass_some<T, how, what>(p, m, back, l.in, l.out * task / threads, l.out * (task + 1) / threads);
    });
}

template <class T, int what> void move_weights(const Net &net, Layer &l, const Pass<T> &p, bool back) {
    Move<T> m(net, l.weight);
    if (m.momentum == 0 && m.decay == 0)
        pass_all<T, PLAIN, what>(net, l, p, m, back);
    else if (m.momentum == 0)
        pass_all<T, DECAY, what>(net, l, p, m, back);
    else {
        pass_all<T, HEAVY, what>(net, l, p, m, back);
        l.weight.fresh = 0;
    }
}

// --- The norms, on the products a = s[0 ... out) of a layer ---

template <class T> bool forward_norm(const Layer &l, const Room<T> &at) {
    int64_t n = l.out;
    T *a = at.s, *sigma = at.s + n, *mu_hat = at.s_hat, *sigma_hat = at.s_hat + n, *y = at.out;
    const T *gain = (const T *)l.gain.at, *shift = (const T *)l.shift.at;
    if (!finite(a, n)) return false;
    if (l.kind == STREAMING) {
        if (l.F.begins()) return false;
        Arrival<T>(l.F, true).estimate(at.s, at.s_hat, 0, n);
        T floor = (T)sqrt(l.eps), eps = (T)l.eps;
        for (int64_t i = 0; i < n; i++) {
            T d = l.about_zero ? a[i] : a[i] - mu_hat[i];
            sigma[i] = l.p == 2 ? (T)sqrt(d * d + eps) : (T)fabs(d) + floor;
        }
        if (!finite(sigma, n)) return false;
        Arrival<T>(l.F, true, 1).estimate(at.s, at.s_hat, n, 2 * n);
        for (int64_t i = 0; i < n; i++) y[i] = (a[i] - mu_hat[i]) / sigma_hat[i];
    } else if (l.kind == LAYER) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n; i++) mean += a[i];
        mean /= (double)n;
        for (int64_t i = 0; i < n; i++) square += (a[i] - mean) * (a[i] - mean);
        double sd = sqrt(square / (double)n + l.eps);
        if (!(square / (double)n <= largest<T>())) return false;  // as in torch, where it is no number of T
        sigma[0] = (T)sd;
        for (int64_t i = 0; i < n; i++) at.s_hat[i] = y[i] = (T)((a[i] - mean) / sd);
    } else
        memcpy(y, a, n * sizeof(T));
    if (gain)
        for (int64_t i = 0; i < n; i++) y[i] *= gain[i];
    if (shift)
        for (int64_t i = 0; i < n; i++) y[i] += shift[i];
    if (l.relu)
        for (int64_t i = 0; i < n; i++) y[i] = y[i] < 0 ? 0 : y[i];  // NaN stays
    return true;
}

// `grad` from the layer above becomes the gradient of the products; gain, shift and what the norm remembers move on.
template <class T> void backward_norm(const Net &net, Layer &l, const Room<T> &at) {
    int64_t n = l.out;
    T *grad = at.grad, *out = at.out, *a = at.s, *sigma = at.s + n, *sigma_hat = at.s_hat + n;
    T *g_mu = at.g, *g_sigma = at.g + n, *for_gain = at.g_hat;
    const T *gain = (const T *)l.gain.at;
    if (l.relu)
        for (int64_t i = 0; i < n; i++) grad[i] = out[i] <= 0 ? 0 : grad[i];
    if (l.kind == NONE) return;
    if (l.kind == STREAMING)
        for (int64_t i = 0; i < n; i++) for_gain[i] = grad[i] * ((a[i] - at.s_hat[i]) / sigma_hat[i]);
    else
        for (int64_t i = 0; i < n; i++) for_gain[i] = grad[i] * at.s_hat[i];
    const T trust = (T)l.trust;
    for (int64_t i = 0; i < n; i++) for_gain[i] *= trust, out[i] = trust * grad[i];  // the latter of the shift
    if (gain)
        for (int64_t i = 0; i < n; i++) grad[i] *= gain[i];
    move(net, l.gain, for_gain, n);
    move(net, l.shift, out, n);
    if (l.kind == LAYER) {
        double mean = 0, slope = 0, sd = sigma[0];
        for (int64_t i = 0; i < n; i++) mean += grad[i], slope += (double)grad[i] * at.s_hat[i];
        mean /= (double)n, slope /= (double)n;
        for (int64_t i = 0; i < n; i++) grad[i] = (T)((grad[i] - mean - at.s_hat[i] * slope) / sd);
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        g_mu[i] = -grad[i] / sigma_hat[i];
        g_sigma[i] = -((a[i] - at.s_hat[i]) * grad[i]) / (sigma_hat[i] * sigma_hat[i]);
    }
    const bool ok = finite(at.g, 2 * n), regresses = l.G.rule.kind == RESIDUAL;
    const Arrival<T> arrival(l.G, ok);
    if (regresses) regress(l.G, at.s, at.s_hat, at.g, at.g_hat, n, ok);
    else arrival.estimate(at.g, at.g_hat, 0, 2 * n);
    for (int64_t i = 0; i < n; i++) {
        T d = l.about_zero ? a[i] : a[i] - at.s_hat[i], to_mu = at.g_hat[i], to_sigma = at.g_hat[n + i];
        T slope = l.p == 2 ? d * (to_sigma / sigma[i]) : to_sigma * (T)((d > 0) - (d < 0));
        grad[i] = grad[i] / sigma_hat[i] + to_mu + slope;
    }
    if (!regresses) arrival.remember_and_fold(at.g, at.g_hat, 2 * n);
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

template <class T> Pass<T> of(const Layer &l) {
    Pass<T> pass{};
    pass.w = (T *)l.weight.at, pass.average = (T *)l.weight.average, pass.bias = (const T *)l.bias.at;
    return pass;
}

template <class T>
int64_t steps(Net &net, const T *x, const char *targets, int64_t samples, bool moves, T *outputs, T *losses) {
    Layer *layers = net.layers, &top = layers[net.depth - 1];
    int64_t target_size = net.loss == SQUARED_ERROR ? top.out * (int64_t)sizeof(T) : (int64_t)sizeof(int64_t);
    bool carried = false, back = false;  // the first layer's products are made already; where its next pass starts
    for (int64_t t = 0; t < samples; t++, x += layers[0].in, targets += target_size) {
        const T *input = x;
        for (int64_t k = 0; k < net.depth; k++) {
            Layer &l = layers[k];
            Room<T> at(net, k);
            if (k || !carried) {
                Pass<T> pass = of<T>(l);
                pass.ahead = input, pass.products = at.s;
                pass_all<T, HOLD, AHEAD>(net, l, pass, Move<T>(net, l.weight), k == 0 && back);
                if (k == 0) back = !back;
            }
            if (!forward_norm(l, at)) return t;
            input = at.out;
        }
        Room<T> last(net, net.depth - 1);
        memcpy(outputs + t * top.out, last.out, top.out * sizeof(T));
        losses[t] = (T)loss_of(net, last.out, top.out, targets, last.grad);
        for (int64_t k = net.depth - 1; k >= 0; k--) {
            Layer &l = layers[k];
            Room<T> at(net, k);
            if (l.kind == STREAMING) Arrival<T>(l.F, true).remember_and_fold(at.s, at.s_hat, 2 * l.out);
            if (!moves) continue;
            backward_norm(net, l, at);
            move(net, l.bias, at.grad, l.out);
            Pass<T> pass = of<T>(l);
            pass.g = at.grad, pass.x = x;
            if (k) {
                Room<T> under(net, k - 1);
                memset(under.grad, 0, l.in * sizeof(T));
                pass.x = under.out, pass.below = under.grad;
                move_weights<T, BELOW>(net, l, pass, true);
            } else if (t + 1 < samples) {
                carried = true;
                pass.ahead = x + l.in, pass.products = at.s;
                move_weights<T, AHEAD>(net, l, pass, back);
            } else
                move_weights<T, MOVE>(net, l, pass, back);
            if (k == 0) back = !back;
        }
    }
    return samples;
}

}  // namespace

// How many elements `Net.scratch` has to hold.
SN_EXPORT(int64_t, online_scratch)(const void *network) {
    const Net &net = *(const Net *)network;
    int64_t size = 0;
    for (int64_t k = 0; k < net.depth; k++) size += Room<float>::size(net.layers[k]);
    return size;
}

// Trains on `samples` samples in their order, x (samples, in), targets (samples,) int64 or (samples, out), and writes
// their losses (samples,) and outputs (samples, out), each of float, or of double where `wide`. Unless `moves`, only
// what norms remember of statistics changes (a warm-up). Returns how many were finite: the next one changed nothing.
SN_EXPORT(int64_t, online_steps)(void *network, const void *x, const void *targets, void *losses, void *outputs,
                                 int64_t samples, int wide, int moves) {
    Net &net = *(Net *)network;
    const char *target = (const char *)targets;
    if (wide) return steps(net, (const double *)x, target, samples, moves, (double *)outputs, (double *)losses);
    return steps(net, (const float *)x, target, samples, moves, (float *)outputs, (float *)losses);
}

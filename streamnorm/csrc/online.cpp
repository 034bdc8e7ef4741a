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
#include "optimizer.h"
#include "slots.h"

namespace {

typedef sn_online Layer;
typedef sn_net Net;
typedef sn_why Why;
constexpr int64_t ALONE = 1 << 18;  // weights that one thread has processed before a second one could start

// --- Scratch: what a forward pass saves for the backward pass, and that for the next forward pass ---

template <class T> struct Room {
    T *a, *sigma, *mu_hat, *sigma_hat;  // products, which are their own mean. For a layer norm, mu_hat holds y
    T *g_mu, *g_sigma, *g_mu_hat, *g_sigma_hat;
    T *f, *g;                           // (2, out): what F and G remember once the sample is learned
    T *out;                             // the output to the layer above, one for each `side`
    T *grad, *by_gain, *by_shift;       // gradient from the layer above, then of the products; of gain and shift

    Room(const Net &net, int64_t k, int side) {
        T *at = (T *)net.scratch;
        for (int64_t i = 0; i < k; i++) at += sn_scratch(net.layers[i]);
        const int64_t n = sn_rounded(net.layers[k].out);
        T **const rows[] = {&a, &sigma, &mu_hat, &sigma_hat, &g_mu, &g_sigma,
                            &g_mu_hat, &g_sigma_hat, &grad, &by_gain, &by_shift};
        for (T **row : rows) *row = at, at += n;
        f = at, g = at + 2 * n, out = at + (4 + side) * n;
    }
};

template <class T> SN_INLINE T sum_of(vec<T> v) {  // pairwise: needed for every row, so latency matters
    T part[lanes<T>::W];
    store(part, v);
    for (int w = lanes<T>::W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) part[i] += part[i + w];
    return part[0];
}

// --- F and G, as slots.h computes them: a sample is one arrival, and then a weight update ---

template <class T> void arrive(const sn_memory &h, int row, int64_t n, const T *s, T *fresh, T *s_hat) {
    observe(h, 1, row, n, 0, n, 0, true, s, fresh, s_hat);
}
template <class T> bool arrive_at_g(sn_memory h, int64_t n, const Room<T> &at) {  // false: a coefficient is not finite
    if (h.rule.kind == RESIDUAL) {
        h.rule.a[0] = (T)h.rule.a[0];  // rounded before the sample is added to it, not after
        return regress<T>(h, 1, n, 0, n, 0, true, at.a, at.sigma, at.mu_hat, at.sigma_hat, at.g_mu, at.g_sigma, at.g,
                          at.g_mu_hat, at.g_sigma_hat);
    }
    arrive(h, 0, n, at.g_mu, at.g, at.g_mu_hat), arrive(h, 1, n, at.g_sigma, at.g, at.g_sigma_hat);
    return true;
}
template <class T>
void remember(const sn_memory &h, const sn_stream &s, int64_t n, const T *fresh, const T *mu_hat, const T *sigma_hat) {
    commit(h, n, 0, n, fresh, mu_hat, sigma_hat), arrived(h, 1, 1), fold<T>(h, n, s.keep[0], s.keep[1]);
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

// --- The norms, on the products a of a layer ---
//
// Statistics, their gradients and the map have another last digit than in slots.h, which multiplies by inverses: shared
// with it are the rules alone.

template <class T> bool forward_norm(const Layer &l, const Room<T> &at) {
    int64_t n = l.out;
    T *a = at.a, *sigma = at.sigma, *mu_hat = at.mu_hat, *y = at.out;
    const T *gain = (const T *)l.gain.at, *shift = (const T *)l.shift.at;
    if (!finite(a, n)) return false;
    if (l.kind == STREAMING) {
        arrive(l.F, 0, n, a, at.f, mu_hat);
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
        arrive(l.F, 1, n, sigma, at.f, at.sigma_hat);
        for (int64_t i = 0; i < n; i++) y[i] = (a[i] - mu_hat[i]) / at.sigma_hat[i];
    } else if (l.kind == LAYER) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n; i++) mean += a[i];
        mean /= (double)n;
        for (int64_t i = 0; i < n; i++) square += (a[i] - mean) * (a[i] - mean);
        double sd = sqrt(square / (double)n + l.eps);
        if (!(square / (double)n <= largest<T>())) return false;  // as in torch, where it would overflow T
        sigma[0] = (T)sd;
        for (int64_t i = 0; i < n; i++) mu_hat[i] = y[i] = (T)((a[i] - mean) / sd);
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
    T *grad = at.grad, *out = at.out, *a = at.a, *sigma = at.sigma, *mu_hat = at.mu_hat, *sigma_hat = at.sigma_hat;
    const T *gain = (const T *)l.gain.at;
    if (l.relu)
        for (int64_t i = 0; i < n; i++) grad[i] = out[i] <= 0 ? 0 : grad[i];
    if (l.kind == NONE) return true;
    if (l.kind == STREAMING)
        for (int64_t i = 0; i < n; i++) at.by_gain[i] = grad[i] * ((a[i] - mu_hat[i]) / sigma_hat[i]);
    else
        for (int64_t i = 0; i < n; i++) at.by_gain[i] = grad[i] * mu_hat[i];
    const T trust = (T)l.trust;
    for (int64_t i = 0; i < n; i++) at.by_gain[i] *= trust, at.by_shift[i] = trust * grad[i];
    if (!l.weight.at) return true;  // the gradient of the input is not needed
    if (gain)
        for (int64_t i = 0; i < n; i++) grad[i] *= gain[i];
    if (l.kind == LAYER) {
        double mean = 0, slope = 0, sd = sigma[0];
        for (int64_t i = 0; i < n; i++) mean += grad[i], slope += (double)grad[i] * mu_hat[i];
        mean /= (double)n, slope /= (double)n;
        for (int64_t i = 0; i < n; i++) grad[i] = (T)((grad[i] - mean - mu_hat[i] * slope) / sd);
        return true;
    }
    for (int64_t i = 0; i < n; i++) {
        at.g_mu[i] = -grad[i] / sigma_hat[i];
        at.g_sigma[i] = -((a[i] - mu_hat[i]) / sigma_hat[i] * grad[i]) / sigma_hat[i];  // its square may overflow
    }
    if (!finite(at.g_mu, n) || !finite(at.g_sigma, n) || !arrive_at_g(l.G, n, at)) return false;
    for (int64_t i = 0; i < n; i++) {
        T d = l.about_zero ? a[i] : a[i] - mu_hat[i], to_mu = at.g_mu_hat[i], to_sigma = at.g_sigma_hat[i];
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
        pass.bias = (const T *)l.bias.at, pass.ahead = ahead, pass.products = at.a;
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
                memcpy(room(k).a, x, layers[k].out * sizeof(T));
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
            if (l.kind == STREAMING) remember(l.F, l.f, l.out, at.f, at.mu_hat, at.sigma_hat);
            if (!net.moves || !l.learns()) continue;
            if (l.kind == STREAMING && l.weight.at) remember(l.G, l.g, l.out, at.g, at.g_mu_hat, at.g_sigma_hat);
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
            if (why != WEIGHTS && !finite(room(k).a, layers[k].out) && broken(k)) why = WEIGHTS;
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

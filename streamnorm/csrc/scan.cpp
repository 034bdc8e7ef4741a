// Recurrent layers over all time steps in one call, forward and backward, with normalization in the recurrence. The
// products of the input are computed beforehand; their norms are part of the call.
#include "activation.h"
#include "scan.h"

namespace {

// h = f(x + norm(W h)), x = norm(W x)
template <class A> void Scan<A>::rnn_forward() {
    begin_forward();
    for (int64_t t = 0; t < l.T; t++) {
        from_input(0, t);
        from_state(0, t, states(t));
        blocks([&](const Block &b) {
            const A *x = work.at(room.left[PATHS], b), *y = work.at(room.left[0], b);
            A *out = kept.at(tape.states + (t + 1) * l.n, b);
            each(b, [&](int64_t i, int64_t, int k) {
                put_at(out, i, k, activate<A>(get(x, i, k) + get(y, i, k), l.relu));
            });
        });
        meet(states(t + 1));
        put_out(t);
    }
    end_forward();
}
template <class A> void Scan<A>::rnn_backward() {
    begin_backward();
    for (int64_t t = l.T - 1; t >= 0; t--) {
        const A *dout = this->dout(t);
        blocks([&](const Block &b) {
            const A *out = kept.at(tape.states + (t + 1) * l.n, b), *dh = work.at(room.dh, b);
            A *da = work.at(room.dgate[0] + slot(t, 2), b);
            each(b, [&](int64_t i, int64_t j, int k) {
                put_at(da, i, k, deactivate<A>(get(dh, i, k) + get(dout, j, k), get(out, i, k), l.relu));
            });
        });
        denormalize(0, t);
        meet(dproduct(0, t));
        if (settle(0, t)) member.wait();
        forget(t);
        blocks([&](const Block &b) { multiply(0, dproduct(0, t), work.at(room.dh, b), b); });
        put_out_dx(t);
        take_in(0, t, states(t));
    }
    end_backward();
}

// r, z = sigmoid(x + norm(W h)); c = f(x + norm(W (r h))); h = z c + (1 - z) h; x = norm(W x)
template <class A> void Scan<A>::gru_forward() {
    begin_forward();
    for (int64_t t = 0; t < l.T; t++) {
        const int64_t now = t * l.n;
        paths([&](int i) { from_input(i, t); });
        from_state(0, t, states(t));
        from_state(1, t, states(t));
        blocks([&](const Block &b) {
            const A *h = kept.at(tape.states + now, b);
            const A *xr = work.at(room.left[PATHS], b), *xz = work.at(room.left[PATHS + 1], b);
            const A *yr = work.at(room.left[0], b), *yz = work.at(room.left[1], b);
            A *r = kept.at(tape.gate[0] + now, b), *z = kept.at(tape.gate[1] + now, b), *rh = work.at(room.masked, b);
            each(b, [&](int64_t i, int64_t, int k) {
                vec<A> g = sigmoid<A>(get(xr, i, k) + get(yr, i, k));
                put_at(r, i, k, g);
                put_at(rh, i, k, g * get(h, i, k));
                put_at(z, i, k, sigmoid<A>(get(xz, i, k) + get(yz, i, k)));
            });
        });
        meet(masked(t));
        from_state(2, t, masked(t));
        blocks([&](const Block &b) {
            const A *h = kept.at(tape.states + now, b), *z = kept.at(tape.gate[1] + now, b);
            const A *x = work.at(room.left[PATHS + 2], b), *y = work.at(room.left[2], b);
            A *c = kept.at(tape.gate[2] + now, b), *out = kept.at(tape.states + now + l.n, b);
            each(b, [&](int64_t i, int64_t, int k) {
                vec<A> fresh = activate<A>(get(x, i, k) + get(y, i, k), l.relu), old = get(h, i, k);
                put_at(c, i, k, fresh);
                put_at(out, i, k, old + get(z, i, k) * (fresh - old));
            });
        });
        meet(states(t + 1));
        put_out(t);
    }
    end_forward();
}
template <class A> void Scan<A>::gru_backward() {
    begin_backward();
    for (int64_t t = l.T - 1; t >= 0; t--) {
        const int64_t now = t * l.n;
        const A *dout = this->dout(t);
        blocks([&](const Block &b) {
            const A *h = kept.at(tape.states + now, b), *z = kept.at(tape.gate[1] + now, b);
            const A *c = kept.at(tape.gate[2] + now, b);
            A *dh = work.at(room.dh, b), *dz = work.at(room.dgate[1] + slot(t, 2), b);
            A *dc = work.at(room.dgate[2] + slot(t, 2), b);
            each(b, [&](int64_t i, int64_t j, int k) {
                vec<A> g = get(dh, i, k) + get(dout, j, k), u = get(z, i, k), fresh = get(c, i, k);
                put_at(dc, i, k, deactivate<A>(g * u, fresh, l.relu));
                put_at(dz, i, k, g * (fresh - get(h, i, k)) * u * (all((A)1) - u));
                put_at(dh, i, k, g * (all((A)1) - u));
            });
        });
        denormalize(2, t);
        denormalize(1, t);
        meet(dproduct(2, t), dproduct(1, t));
        if (settle(2, t) | settle(1, t)) member.wait();
        forget(t);
        blocks([&](const Block &b) {
            const A *h = kept.at(tape.states + now, b), *r = kept.at(tape.gate[0] + now, b);
            A *drh = work.at(room.dmasked, b), *dh = work.at(room.dh, b);
            A *dr = work.at(room.dgate[0] + slot(t, 2), b), *rh = work.at(room.masked + slot(t, room.deep), b);
            multiply(2, dproduct(2, t), drh, b);
            each(b, [&](int64_t i, int64_t, int k) {
                vec<A> g = get(drh, i, k), reset = get(r, i, k), through = reset * get(h, i, k);
                put_at(rh, i, k, through);
                put_at(dr, i, k, g * through * (all((A)1) - reset));
                put_at(dh, i, k, get(dh, i, k) + g * reset);
            });
        });
        denormalize(0, t);
        meet(dproduct(0, t));
        if (settle(0, t)) member.wait();
        blocks([&](const Block &b) {
            multiply<true>(0, dproduct(0, t), work.at(room.dh, b), b);
            multiply<true>(1, dproduct(1, t), work.at(room.dh, b), b);
        });
        put_out_dx(t);
        paths([&](int i) { take_in(i, t, i == 2 ? masked(t) : states(t)); });
    }
    end_backward();
}

// Forward: whether everything was finite, and no memory has its first arrival.
template <class A, class F> bool scan(const sn_layer &l, bool back, const F &run) {
    bool begins = false;
    if (!back) sites(l, [&](int s) { begins |= site_of(l, s).h1 && site_of(l, s).h1->begins(); });
    if (begins) return false;
    News news;
    together(l.threads, [&](const sn_member &member) {
        Scan<A> one(l, member, news, back);
        run(one);
    });
    bool wrong = false;
    for (int s = 0; s < SITES; s++) wrong |= news.at(0, s) != 0;
    return !wrong;
}

}  // namespace

// Forward: 0, or 1 if a value was not finite, with memories unchanged.
#define SCANS(A, name)                                                                                                 \
    SN_EXPORT(int, scan_forward_##name)(const sn_layer *l) {                                                           \
        return !scan<A>(*l, false, [&](Scan<A> &one) { l->paths > 1 ? one.gru_forward() : one.rnn_forward(); });       \
    }                                                                                                                  \
    SN_EXPORT(void, scan_backward_##name)(const sn_layer *l) {                                                         \
        scan<A>(*l, true, [&](Scan<A> &one) { l->paths > 1 ? one.gru_backward() : one.rnn_backward(); });              \
    }

SCANS(float, f32)
SCANS(double, f64)

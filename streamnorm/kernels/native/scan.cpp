// Recurrent layers over all time steps in one call, forward and backward, with normalization in the recurrence.
//
// What is done in a step: matrix products as in product.h; the normalization of each product as in slots.h, with its
// memories; and the gates. What does not depend on the step before is done outside: the input's
// products and their normalization before, the gradients of the weights after. All matrices are dense, features last.
//
// A thread has a range of the hidden units, whose products, statistics and gates are its own. It waits for the others
// where a product needs what all of them have made: once or twice a step. Rows that are whole cache lines apart keep two
// threads from writing into one line.
#include "direct.h"
#include "product.h"

// One normalized product W h of the recurrence; mirrored by `Path` in streamnorm/fusedscan.py.
struct sn_path {
    const sn_plan *plan;
    const sn_memory *h1, *h2;
    const void *matrix;                // (H, H), row i makes feature i
    void *packed;                      // (H, H up to the next 16): room for it as it is read
    const void *weight, *bias;         // gain and bias of the norm
    const void *input;                 // (T, n, H), dense: what the input contributes, normalized
    void *product, *tables;            // (T, n, H): W h before its norm; (T, room) as `forward` leaves it
    void *gate;                        // (T, n, H): after the non-linearity
    void *dproduct, *dgate;            // (T, n, H): their gradients, the latter before the non-linearity
    void *dweight, *dbias;             // (H)
};

// A layer: mirrored by `Layer` in streamnorm/fusedscan.py.
struct sn_layer {
    int64_t T, n, H, apart;            // apart: values from row to row in whatever is not said to be dense
    int64_t room, scratch;             // values in a step's tables, the last of them from `scratch` on to work in
    int32_t relu, threads;
    sn_path path[3];                   // RNN: one; GRU: reset, update, candidate
    void *states;                      // (T + 1, n, H): h before the first step, which is given, and after each
    void *masked;                      // GRU: (T, n, H): reset times h before
    const void *dout;                  // (T, n, H), dense
    void *dh, *dmasked;                // (n, H): the gradient that goes back in time; GRU
    void *spare;                       // (2, n, H): room for norms' outputs
};

namespace {

// e^x by its remainder after powers of 2, to about one unit in the last place.
SN_INLINE vec<float> exponential(vec<float> x) {
    vec<float> high = all(88.0f), low = all(-87.0f);
    x = choose<float>((mask<float>)(x > high), high, choose<float>((mask<float>)(x < low), low, x));
    vec<float> k = x * 1.44269504f + 12582912.0f;  // rounded to a whole number in the low bits
    mask<float> n = (mask<float>)k - 0x4b400000;
    k -= 12582912.0f;
    vec<float> r = x - k * 0.693359375f + k * 2.12194440e-4f;
    vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec<float>)((n + 127) << 23);
}
SN_INLINE vec<double> exponential(vec<double> x) {
    for (int i = 0; i < lanes<double>::W; i++) x[i] = exp(x[i]);
    return x;
}
template <class A> SN_INLINE vec<A> sigmoid(vec<A> x) {
    return all((A)1) / (all((A)1) + exponential(-x));
}
SN_INLINE vec<float> tangent(vec<float> x) {
    vec<float> z = x * x, near = z * -5.70498872745e-3f + 2.06390887954e-2f;
    near = near * z - 5.37397155531e-2f;
    near = near * z + 1.33314422036e-1f;
    near = (near * z - 3.33332819422e-1f) * z * x + x;
    vec<float> far = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
    return choose<float>((mask<float>)(absolute<float>(x) < all(0.625f)), near, far);
}
SN_INLINE vec<double> tangent(vec<double> x) {
    for (int i = 0; i < lanes<double>::W; i++) x[i] = tanh(x[i]);
    return x;
}

template <class A> SN_INLINE vec<A> activate(vec<A> x, bool relu) {
    return relu ? choose<A>((mask<A>)(x < vec<A>{}), vec<A>{}, x) : tangent(x);  // what is no number stays
}
// The derivative from what comes out.
template <class A> SN_INLINE vec<A> slope_at(vec<A> y, bool relu) {
    return relu ? choose<A>((mask<A>)(y <= vec<A>{}), vec<A>{}, all((A)1)) : all((A)1) - y * y;
}

// H1 or H2 of a path as one thread sees it. The tables are everybody's, each thread has its range of them; every thread
// counts by itself, and all of them the same.
struct Memory {
    const sn_memory *shared;
    int64_t count = 0, updates = 0, seen = 0, skipped = 0;
    sn_memory own{};
    explicit Memory(const sn_memory *memory) : shared(memory) {
        if (!shared) return;
        own = *shared;
        count = *own.count, updates = *own.updates, seen = *own.seen, skipped = *own.skipped;
        own.count = &count, own.updates = &updates, own.seen = &seen, own.skipped = &skipped;
    }
    Memory(const Memory &) = delete;
    const sn_memory *use() const { return shared ? &own : nullptr; }
    void write_back() const {
        if (shared) *shared->count = count, *shared->seen = seen, *shared->skipped = skipped;
    }
};

// What the threads tell each other: whether something on a path was not finite, at an even and at an odd step.
struct News { int wrong[2][3] = {}; };

// A layer as one thread computes it: the hidden units from .. from+wide.
template <class A> struct Scan {
    typedef Direct<Columns<A>, A> Passes;
    const sn_layer &l;
    const sn_member &member;
    News &news;
    int64_t size, from, wide;  // size: of a step
    Memory memory[3];          // H1 forward, H2 backward
    Product<A> product[3];     // W h forward, W^T dh backward
    A *dw, *db;                // (H): of one step

    Scan(const sn_layer &layer, const sn_member &who, News &shared, bool back, A *work)
        : l(layer), member(who), news(shared), size(layer.n * layer.apart),
          memory{Memory(of(0, back)), Memory(of(1, back)), Memory(of(2, back))}, dw(work), db(work + layer.H) {
        from = edge(member.number), wide = edge(member.number + 1) - from;
        for (int i = 0; i < 3 && l.path[i].matrix; i++) {
            const sn_path &p = l.path[i];
            product[i].pack((const A *)p.matrix, !back, l.H, from, wide, (A *)p.packed + from * l.H);
        }
    }
    const sn_memory *of(int i, bool back) const { return back ? l.path[i].h2 : l.path[i].h1; }
    int64_t edge(int k) const {  // whole vectors, as even as they can be
        constexpr int W = lanes<A>::W;
        const int64_t whole = (l.H * k / member.members + W / 2) / W * W;
        return k == member.members || whole > l.H ? l.H : whole;
    }
    // After the last step, when all have taken it.
    void write_back() const {
        member.wait();
        if (member.number == 0)
            for (const Memory &m : memory) m.write_back();
    }

    A *at(void *p, int64_t t) const { return (A *)p + t * size; }
    const A *at(const void *p, int64_t t) const { return (const A *)p + t * size; }
    const A *dense(const void *p, int64_t t) const { return (const A *)p + t * l.n * l.H; }
    const A *before(int64_t t) const { return at((const void *)l.states, t); }
    A *after(int64_t t) const { return at(l.states, t + 1); }
    A *tables(const sn_path &p, int64_t t) const { return (A *)p.tables + t * l.room; }

    // y (n, H) = x W^T forward, x W backward, of this thread's units
    void multiply(int i, const A *x, A *y) const { product[i].template multiply<false>(x, y + from, l.n, l.apart); }
    void add_product(int i, const A *x, A *y) const { product[i].template multiply<true>(x, y + from, l.n, l.apart); }
    // f(i, j, k) over this thread's part of a step, a vector at a time; j is the place in what is dense
    template <class F> SN_MEMBER void each(const F &f) const {
        const bool whole = wide == l.apart;
        for (int64_t r = 0; r < (whole ? 1 : l.n); r++)
            slots<A>(whole ? size : wide, [&, at = r * l.apart + from, dense = r * l.H + from](int64_t i, int k) {
                f(at + i, dense + i, k);
            });
    }
    SN_INLINE vec<A> get(const A *p, int64_t i, int k) { return table(p + i, k); }
    SN_INLINE void put_at(A *p, int64_t i, int k, vec<A> v) { keep(p + i, k, v); }
    // step(first unit, units) over this thread's units; whether all was finite
    template <class F> bool tiles(const F &step) const {
        bool fine = true;
        for (int64_t a = from; a < from + wide; a += TILE) {
            int64_t left = from + wide - a;
            fine &= step(a, left < TILE ? left : TILE);
        }
        return fine;
    }

    // y = norm(W x)
    void normalize(int i, int64_t t, const A *x, A *y) {
        const sn_path &p = l.path[i];
        multiply(i, x, at(p.product, t));
        const sn_memory *h1 = memory[i].use();
        Job<A> J = forward_job<A>(p.plan, h1, at(p.product, t), p.weight, p.bias, y, tables(p, t), tables(p, t) + l.scratch);
        bool fine = tiles([&](int64_t a, int64_t n) {
            Passes e(J, a);
            return forward_step(J, 0, a, n, e);
        });
        if (!fine) __atomic_store_n(&news.wrong[0][i], 1, __ATOMIC_RELAXED);
        if (!h1) return;
        commit(*h1, J.S, from, wide, J.fresh, J.est_mu, J.est_sigma);
        arrived(*h1, 1);
    }
    Job<A> way_back(const sn_path &p, int64_t t, const sn_memory *h2) const {
        return backward_job<A>(p.plan, h2, at((const void *)p.product, t), p.weight, at((const void *)p.dgate, t),
                               tables(p, t), tables(p, t) + l.scratch, at(p.dproduct, t), dw, db);
    }
    bool denormalize(const Job<A> &J) const {
        return tiles([&](int64_t a, int64_t n) {
            Passes e(J, a);
            return backward_step(J, 0, 0, a, n, e);
        });
    }
    // From the gradient at the gate's input to that of its product, if G takes it in: `settle` will know.
    void denormalize(int i, int64_t t) {
        const sn_path &p = l.path[i];
        if (!denormalize(way_back(p, t, memory[i].use())))
            __atomic_store_n(&news.wrong[t & 1][i], 1, __ATOMIC_RELAXED);
        A *sum_w = (A *)p.dweight, *sum_b = (A *)p.dbias;
        for (int64_t u = from; u < from + wide; u++) sum_w[u] += dw[u], sum_b[u] += db[u];
    }
    // Once all have done so: G takes in what arrived, or leaves it out if any of it is not finite. Returns whether
    // that changed the gradients of products, for which all have to wait.
    bool settle(int i, int64_t t) {
        const sn_path &p = l.path[i];
        const sn_memory *h2 = memory[i].use();
        if (!h2) return false;
        Job<A> J = way_back(p, t, h2);
        if (__atomic_load_n(&news.wrong[t & 1][i], __ATOMIC_RELAXED)) {
            J.refused = true;
            denormalize(J);
            ++*h2->skipped;
            return true;
        }
        commit(*h2, J.S, from, wide, J.fresh, J.last, J.last + J.S);
        arrived(*h2, 1);
        return false;
    }
    // Between the first and the last wait of a step: all have read the news of the step before, and none of the step to
    // come has any yet.
    void forget(int64_t t) {
        if (member.number == 0)
            for (int &wrong : news.wrong[(t + 1) & 1]) __atomic_store_n(&wrong, 0, __ATOMIC_RELAXED);
    }

    // h = f(x + norm(W h))
    void rnn_forward() {
        for (int64_t t = 0; t < l.T; t++) {
            A *y = (A *)l.spare, *out = after(t);
            normalize(0, t, before(t), y);
            const A *x = dense(l.path[0].input, t);
            each([&](int64_t i, int64_t j, int k) { put_at(out, i, k, activate<A>(get(x, j, k) + get(y, i, k), l.relu)); });
            member.wait();
        }
        write_back();
    }
    void rnn_backward() {
        const sn_path &p = l.path[0];
        A *dh = (A *)l.dh;
        for (int64_t t = l.T - 1; t >= 0; t--) {
            const A *out = after(t), *dout = dense(l.dout, t);
            A *da = at(p.dgate, t);
            each([&](int64_t i, int64_t j, int k) {
                put_at(da, i, k, (get(dh, i, k) + get(dout, j, k)) * slope_at<A>(get(out, i, k), l.relu));
            });
            denormalize(0, t);
            member.wait();
            if (settle(0, t)) member.wait();
            forget(t);
            multiply(0, at(p.dproduct, t), dh);
            member.wait();
        }
        write_back();
    }

    // r, z = sigmoid(x + norm(W h)); c = f(x + norm(W (r h))); h = z c + (1 - z) h
    void gru_forward() {
        const sn_path &R = l.path[0], &Z = l.path[1], &C = l.path[2];
        for (int64_t t = 0; t < l.T; t++) {
            const A *h = before(t), *xr = dense(R.input, t), *xz = dense(Z.input, t);
            const A *xc = dense(C.input, t);
            A *r = at(R.gate, t), *z = at(Z.gate, t), *c = at(C.gate, t), *rh = at(l.masked, t), *out = after(t);
            A *y = (A *)l.spare, *yz = y + size;
            normalize(0, t, h, y);
            normalize(1, t, h, yz);
            each([&](int64_t i, int64_t j, int k) {
                vec<A> g = sigmoid<A>(get(xr, j, k) + get(y, i, k));
                put_at(r, i, k, g);
                put_at(rh, i, k, g * get(h, i, k));
                put_at(z, i, k, sigmoid<A>(get(xz, j, k) + get(yz, i, k)));
            });
            member.wait();
            normalize(2, t, rh, y);
            each([&](int64_t i, int64_t j, int k) {
                vec<A> fresh = activate<A>(get(xc, j, k) + get(y, i, k), l.relu), old = get(h, i, k);
                put_at(c, i, k, fresh);
                put_at(out, i, k, old + get(z, i, k) * (fresh - old));
            });
            member.wait();
        }
        write_back();
    }
    void gru_backward() {
        const sn_path &R = l.path[0], &Z = l.path[1], &C = l.path[2];
        A *dh = (A *)l.dh, *drh = (A *)l.dmasked;
        for (int64_t t = l.T - 1; t >= 0; t--) {
            const A *h = before(t), *dout = dense(l.dout, t);
            const A *r = at((const void *)R.gate, t), *z = at((const void *)Z.gate, t), *c = at((const void *)C.gate, t);
            A *dr = at(R.dgate, t), *dz = at(Z.dgate, t), *dc = at(C.dgate, t);
            each([&](int64_t i, int64_t j, int k) {
                vec<A> g = get(dh, i, k) + get(dout, j, k), u = get(z, i, k), fresh = get(c, i, k);
                put_at(dc, i, k, g * u * slope_at<A>(fresh, l.relu));
                put_at(dz, i, k, g * (fresh - get(h, i, k)) * u * (all((A)1) - u));
                put_at(dh, i, k, g * (all((A)1) - u));
            });
            denormalize(2, t);
            denormalize(1, t);
            member.wait();
            if (settle(2, t) | settle(1, t)) member.wait();
            forget(t);
            multiply(2, at(C.dproduct, t), drh);
            each([&](int64_t i, int64_t j, int k) {
                vec<A> g = get(drh, i, k), reset = get(r, i, k);
                put_at(dr, i, k, g * get(h, i, k) * reset * (all((A)1) - reset));
                put_at(dh, i, k, get(dh, i, k) + g * reset);
            });
            denormalize(0, t);
            member.wait();
            if (settle(0, t)) member.wait();
            add_product(0, at(R.dproduct, t), dh);
            add_product(1, at(Z.dproduct, t), dh);
        }
        write_back();
    }
};

// Whether everything was finite, of the paths forward.
template <class A, class F> bool scan(const sn_layer &l, bool back, A *work, const F &run) {
    News news;
    together(l.threads, [&](const sn_member &member) {
        Scan<A> one(l, member, news, back, work);
        run(one);
    });
    return !(news.wrong[0][0] | news.wrong[0][1] | news.wrong[0][2]);
}

}  // namespace

// Forward: 0, or 1 where something was not finite, with memories that have seen the steps before. work: (2, H).
#define SCANS(A, name)                                                                                                 \
    SN_EXPORT(int, rnn_forward_##name)(const sn_layer *l) {                                                            \
        return !scan<A>(*l, false, nullptr, [](Scan<A> &one) { one.rnn_forward(); });                                  \
    }                                                                                                                  \
    SN_EXPORT(int, gru_forward_##name)(const sn_layer *l) {                                                            \
        return !scan<A>(*l, false, nullptr, [](Scan<A> &one) { one.gru_forward(); });                                  \
    }                                                                                                                  \
    SN_EXPORT(void, rnn_backward_##name)(const sn_layer *l, A *work) {                                                 \
        scan<A>(*l, true, work, [](Scan<A> &one) { one.rnn_backward(); });                                             \
    }                                                                                                                  \
    SN_EXPORT(void, gru_backward_##name)(const sn_layer *l, A *work) {                                                 \
        scan<A>(*l, true, work, [](Scan<A> &one) { one.gru_backward(); });                                             \
    }

SCANS(float, f32)
SCANS(double, f64)

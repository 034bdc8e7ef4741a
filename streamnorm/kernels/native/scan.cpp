// Recurrent layers over all time steps in one call, forward and backward, with normalization in the recurrence.
//
// What is done in a step: matrix products by torch's own BLAS, handed over as a pointer; the normalization of each product
// by the kernels of norm.cpp, with its memories; and the gates. What does not depend on the step before is done outside: the
// input's products and their normalization before, the gradients of the weights after. All matrices are dense, features last.
#include "norm.h"

namespace {

typedef void (*sn_gemm)(const char *, const char *, const int *, const int *, const int *, const void *, const void *,
                        const int *, const void *, const int *, const void *, void *, const int *);

}  // namespace

// One normalized product W h of the recurrence; mirrored by `Path` in streamnorm/fusedscan.py.
struct sn_path {
    const sn_plan *plan;
    const sn_memory *h1, *h2;
    const void *matrix;                // (H, H), row i makes feature i
    const void *weight, *bias;         // gain and bias of the norm
    const void *input;                 // (T, n, H): what the input contributes, normalized
    void *product, *tables;            // (T, n, H): W h before its norm; (T, room) as `forward` leaves it
    void *gate;                        // (T, n, H): after the non-linearity
    void *dproduct, *dgate;            // (T, n, H): their gradients, the latter before the non-linearity
    void *dweight, *dbias;             // (H)
};

// A layer: mirrored by `Layer` in streamnorm/fusedscan.py.
struct sn_layer {
    int64_t T, n, H, room, scratch;    // room: values in a step's tables, the last of them from `scratch` on to work in
    int32_t relu, threads;
    sn_gemm gemm;
    sn_path path[3];                   // RNN: one; GRU: reset, update, candidate
    const void *h0;                    // (n, H)
    void *out;                         // (T, n, H)
    void *masked;                      // GRU: (T, n, H): reset times h before
    const void *dout;                  // (T, n, H)
    void *dh, *dmasked, *spare;        // (n, H): the gradient that goes back in time; GRU; room for a norm's output
};

#define SN_CALLS(name)                                                                                                 \
    extern "C" int SN_JOIN(forward_##name, SN_ISA)(const sn_plan *, const sn_memory *, const void *, const void *,     \
                                                   const void *, void *, void *, void *, int);                        \
    extern "C" int SN_JOIN(backward_##name, SN_ISA)(const sn_plan *, const sn_memory *, const void *, const void *,    \
                                                    const void *, void *, void *, void *, void *, void *, int);
SN_CALLS(f32)
SN_CALLS(f64)

namespace {

template <class A> struct calls;
template <> struct calls<float> {
    static constexpr auto forward = SN_JOIN(forward_f32, SN_ISA);
    static constexpr auto backward = SN_JOIN(backward_f32, SN_ISA);
};
template <> struct calls<double> {
    static constexpr auto forward = SN_JOIN(forward_f64, SN_ISA);
    static constexpr auto backward = SN_JOIN(backward_f64, SN_ISA);
};

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
    return relu ? choose<A>((mask<A>)(x > vec<A>{}), x, vec<A>{}) : tangent(x);
}
// The derivative from what comes out.
template <class A> SN_INLINE vec<A> slope_at(vec<A> y, bool relu) {
    return relu ? choose<A>((mask<A>)(y > vec<A>{}), all((A)1), vec<A>{}) : all((A)1) - y * y;
}

template <class A> struct Scan {
    const sn_layer &l;
    int64_t size;  // of a step
    explicit Scan(const sn_layer &layer) : l(layer), size(layer.n * layer.H) {}

    A *at(void *p, int64_t t) const { return (A *)p + t * size; }
    const A *at(const void *p, int64_t t) const { return (const A *)p + t * size; }
    const A *before(int64_t t) const { return t ? at((const void *)l.out, t - 1) : (const A *)l.h0; }
    A *tables(const sn_path &p, int64_t t) const { return (A *)p.tables + t * l.room; }

    // y (n, H) = x W^T, or x W
    void multiply(const void *W, bool transposed, const A *x, A *y, A keep) const {
        const A one = 1;
        const int H = (int)l.H, n = (int)l.n;
        l.gemm(transposed ? "T" : "N", "N", &H, &n, &H, &one, W, &H, x, &H, &keep, y, &H);
    }
    // f(i, k) over a step, a vector at a time
    template <class F> SN_INLINE void each(int64_t size, const F &f) {
        constexpr int W = lanes<A>::W;
        int64_t i = 0;
        for (; i + W <= size; i += W) f(i, W);
        if (i < size) f(i, (int)(size - i));
    }
    SN_INLINE vec<A> get(const A *p, int64_t i, int k) { return k == lanes<A>::W ? load(p + i) : load_part(p + i, k); }
    SN_INLINE void put_at(A *p, int64_t i, int k, vec<A> v) {
        if (k == lanes<A>::W) store(p + i, v);
        else store_part(p + i, k, v);
    }

    bool normalize(const sn_path &p, int64_t t, const A *x, A *y) const {
        multiply(p.matrix, true, x, at(p.product, t), 0);
        return !calls<A>::forward(p.plan, p.h1, at(p.product, t), p.weight, p.bias, y, tables(p, t),
                                  tables(p, t) + l.scratch, l.threads);
    }
    // From the gradient at the gate's input to that of its product; G leaves out what is not finite.
    void denormalize(const sn_path &p, int64_t t, A *dw, A *db) const {
        auto call = [&](const sn_memory *h2) {
            return calls<A>::backward(p.plan, h2, at((const void *)p.product, t), p.weight, at((const void *)p.dgate, t),
                                      tables(p, t), tables(p, t) + l.scratch, at(p.dproduct, t), dw, db, l.threads);
        };
        if (call(p.h2) && p.h2) call(nullptr), ++*skipped(p);
        A *sum_w = (A *)p.dweight, *sum_b = (A *)p.dbias;
        for (int64_t i = 0; i < l.H; i++) sum_w[i] += dw[i], sum_b[i] += db[i];
    }
    int64_t *skipped(const sn_path &p) const { return p.h2->skipped; }

    // h = f(x + norm(W h))
    int rnn_forward() const {
        for (int64_t t = 0; t < l.T; t++) {
            const sn_path &p = l.path[0];
            A *y = (A *)l.spare, *out = at(l.out, t);
            if (!normalize(p, t, before(t), y)) return 1;
            const A *x = at(p.input, t);
            each(size, [&](int64_t i, int k) { put_at(out, i, k, activate<A>(get(x, i, k) + get(y, i, k), l.relu)); });
        }
        return 0;
    }
    void rnn_backward(A *dw, A *db) const {
        const sn_path &p = l.path[0];
        A *dh = (A *)l.dh;
        for (int64_t t = l.T - 1; t >= 0; t--) {
            const A *out = at((const void *)l.out, t), *dout = at(l.dout, t);
            A *da = at(p.dgate, t);
            each(size, [&](int64_t i, int k) {
                put_at(da, i, k, (get(dh, i, k) + get(dout, i, k)) * slope_at<A>(get(out, i, k), l.relu));
            });
            denormalize(p, t, dw, db);
            multiply(p.matrix, false, at(p.dproduct, t), dh, 0);
        }
    }

    // r, z = sigmoid(x + norm(W h)); c = f(x + norm(W (r h))); h = z c + (1 - z) h
    int gru_forward() const {
        const sn_path &R = l.path[0], &Z = l.path[1], &C = l.path[2];
        for (int64_t t = 0; t < l.T; t++) {
            const A *h = before(t), *xr = at(R.input, t), *xz = at(Z.input, t), *xc = at(C.input, t);
            A *r = at(R.gate, t), *z = at(Z.gate, t), *c = at(C.gate, t), *rh = at(l.masked, t), *out = at(l.out, t);
            A *y = (A *)l.spare;
            if (!normalize(R, t, h, r) || !normalize(Z, t, h, z)) return 1;
            each(size, [&](int64_t i, int k) {
                vec<A> g = sigmoid<A>(get(xr, i, k) + get(r, i, k));
                put_at(r, i, k, g);
                put_at(rh, i, k, g * get(h, i, k));
                put_at(z, i, k, sigmoid<A>(get(xz, i, k) + get(z, i, k)));
            });
            if (!normalize(C, t, rh, y)) return 1;
            each(size, [&](int64_t i, int k) {
                vec<A> fresh = activate<A>(get(xc, i, k) + get(y, i, k), l.relu), old = get(h, i, k);
                put_at(c, i, k, fresh);
                put_at(out, i, k, old + get(z, i, k) * (fresh - old));
            });
        }
        return 0;
    }
    void gru_backward(A *dw, A *db) const {
        const sn_path &R = l.path[0], &Z = l.path[1], &C = l.path[2];
        A *dh = (A *)l.dh, *drh = (A *)l.dmasked;
        for (int64_t t = l.T - 1; t >= 0; t--) {
            const A *h = before(t), *dout = at(l.dout, t);
            const A *r = at((const void *)R.gate, t), *z = at((const void *)Z.gate, t), *c = at((const void *)C.gate, t);
            A *dr = at(R.dgate, t), *dz = at(Z.dgate, t), *dc = at(C.dgate, t);
            each(size, [&](int64_t i, int k) {
                vec<A> g = get(dh, i, k) + get(dout, i, k), u = get(z, i, k), fresh = get(c, i, k);
                put_at(dc, i, k, g * u * slope_at<A>(fresh, l.relu));
                put_at(dz, i, k, g * (fresh - get(h, i, k)) * u * (all((A)1) - u));
                put_at(dh, i, k, g * (all((A)1) - u));
            });
            denormalize(C, t, dw, db);
            multiply(C.matrix, false, at(C.dproduct, t), drh, 0);
            each(size, [&](int64_t i, int k) {
                vec<A> g = get(drh, i, k), reset = get(r, i, k);
                put_at(dr, i, k, g * get(h, i, k) * reset * (all((A)1) - reset));
                put_at(dh, i, k, get(dh, i, k) + g * reset);
            });
            denormalize(R, t, dw, db);
            denormalize(Z, t, dw, db);
            multiply(R.matrix, false, at(R.dproduct, t), dh, 1);
            multiply(Z.matrix, false, at(Z.dproduct, t), dh, 1);
        }
    }
};

}  // namespace

// Forward: 0, or 1 where something was not finite, with memories that have seen the steps before. work: (2 H).
#define SCANS(A, name)                                                                                                 \
    SN_EXPORT(int, rnn_forward_##name)(const sn_layer *l) { return Scan<A>(*l).rnn_forward(); }                        \
    SN_EXPORT(int, gru_forward_##name)(const sn_layer *l) { return Scan<A>(*l).gru_forward(); }                        \
    SN_EXPORT(void, rnn_backward_##name)(const sn_layer *l, A *work) { Scan<A>(*l).rnn_backward(work, work + l->H); }  \
    SN_EXPORT(void, gru_backward_##name)(const sn_layer *l, A *work) { Scan<A>(*l).gru_backward(work, work + l->H); }

SCANS(float, f32)
SCANS(double, f64)

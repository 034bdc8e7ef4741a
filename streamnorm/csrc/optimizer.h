// One step of SGD, Adam or AdamW: for a parameter of a few values, and for the rows of a weight that online.cpp passes.
#pragma once
#include "online.h"
#include "slots.h"

namespace {

typedef sn_param Param;

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

template <class T> constexpr T largest() { return sizeof(T) == 4 ? (T)__FLT_MAX__ : (T)__DBL_MAX__; }
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

// Whether the optimizer can take gradients of at most this magnitude: the step of SGD has to be finite, Adam's square.
template <class T> bool fits(const Param &p, T most) {
    if (!p.at) return true;
    const sn_rates &r = *p.rates;
    return most <= largest<T>() && most * (r.is(SGD) ? (T)fabs(r.lr) : most) <= largest<T>();
}

template <class T> bool finite(const Param &p, int64_t n) { return !p.at || finite((const T *)p.at, n); }

// A parameter of n values, at once. False: it is not finite any more.
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

}  // namespace

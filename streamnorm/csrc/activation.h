// The nonlinearities of the cells, vectorized, and their derivatives.
#pragma once
#include "vec.h"

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
    return relu ? choose<A>((mask<A>)(x < vec<A>{}), vec<A>{}, x) : tangent(x);  // NaN stays NaN
}
// The gradient before the nonlinearity, from that after it and its output. By selection, as torch does: where a ReLU is
// 0 the gradient is 0, not 0 * infinity.
template <class A> SN_INLINE vec<A> deactivate(vec<A> g, vec<A> y, bool relu) {
    return relu ? choose<A>((mask<A>)(y <= vec<A>{}), vec<A>{}, g) : g * (all((A)1) - y * y);
}

}  // namespace

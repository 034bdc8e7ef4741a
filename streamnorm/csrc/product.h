// The matrix products of a recurrence. Sums are accumulated in registers, a block of rows by some vectors of units at a
// time; a matrix that is read many times is packed in the order in which it is read. The order of every sum is fixed,
// independent of threads and blocks.
//
// A matrix whose columns are the hidden units consists of parts side by side, `x(p)` of `x.count()`.
#pragma once
#include "slots.h"

namespace {

// Some columns of a matrix: rows of `many` values, `apart` from one to the next.
template <class A> struct Part { const A *at; int64_t apart, many; };

// f(first vector, number of vectors) over so many units, `most` vectors at a time and as even as they can be.
template <class A, class F> SN_INLINE void panels(int64_t units, int most, const F &f) {
    const int64_t all = (units + lanes<A>::W - 1) / lanes<A>::W, count = (all + most - 1) / most;
    for (int64_t p = 0; p < count; p++) {
        const int64_t first = all * p / count;
        f(first, all * (p + 1) / count - first);
    }
}

// y = x M^T: few rows, and a matrix that stays for all time steps.
template <class A> struct Product {
    static constexpr int W = lanes<A>::W;
    static constexpr int ROWS = BYTES == 64 ? 8 : 4, WIDE = 3;  // what fits in the registers, with the matrix

    const A *packed;
    int64_t inputs, units;

    // Units `from` .. from + units of a matrix (inputs, inputs), whose rows make units (y = x M^T), or columns do, in
    // the order in which they are read; `to` has room for whole vectors of units.
    static void pack(const A *matrix, bool rows_make_units, int64_t inputs, int64_t from, int64_t units, A *to) {
        panels<A>(units, WIDE, [&](int64_t first, int64_t v) {
            for (int64_t k = 0; k < inputs; k++)
                for (int64_t u = first * W; u < (first + v) * W; u += W, to += W) {
                    const int64_t here = units - u < W ? units - u : W;
                    if (!rows_make_units) store(to, table(matrix + k * inputs + from + u, (int)here));
                    else for (int64_t i = 0; i < W; i++) to[i] = i < here ? matrix[(from + u + i) * inputs + k] : (A)0;
                }
        });
    }

    // y (rows, units), `apart` values from row to row; added to the output, or replacing it.
    template <bool add, class X> void multiply(const X &x, A *y, int64_t rows, int64_t apart) const {
        panels<A>(units, WIDE, [&](int64_t first, int64_t v) {
            const A *part = packed + first * W * inputs;
            A *out = y + first * W;
            const int64_t left = units - first * W;
            const int last = (int)(left >= v * W ? W : left - (v - 1) * W);
            if (v == 3) panel<add, 3>(x, out, rows, apart, part, last);
            else if (v == 2) panel<add, 2>(x, out, rows, apart, part, last);
            else panel<add, 1>(x, out, rows, apart, part, last);
        });
    }

private:
    template <bool add, int V, class X>
    void panel(const X &x, A *y, int64_t rows, int64_t apart, const A *part, int last) const {
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS) block<add, ROWS, V>(x, r, y + r * apart, apart, part, last);
        if (ROWS > 4 && r + 4 <= rows) block<add, 4, V>(x, r, y + r * apart, apart, part, last), r += 4;
        if (r + 2 <= rows) block<add, 2, V>(x, r, y + r * apart, apart, part, last), r += 2;
        if (r < rows) block<add, 1, V>(x, r, y + r * apart, apart, part, last);
    }

    template <bool add, int R, int V, class X>
    void block(const X &x, int64_t from, A *y, int64_t apart, const A *part, int last) const {
        vec<A> sum[R][V] = {};
        for (int64_t p = 0; p < x.count(); p++) {
            const Part<A> in = x(p);
            const A *rows = in.at + from * in.apart;
            for (int64_t k = 0; k < in.many; k++, part += V * W) {
                vec<A> m[V];
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) m[v] = load(part + v * W);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    const vec<A> value = all(rows[r * in.apart + k]);
#pragma GCC unroll 8
                    for (int v = 0; v < V; v++) sum[r][v] += value * m[v];
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                A *to = y + r * apart + v * W;
                const bool whole = v < V - 1 || last == W;
                vec<A> s = sum[r][v];
                if (add) s += whole ? load(to) : load_part(to, last);
                if (whole) store(to, s);
                else store_part(to, last, s);
            }
    }
};

constexpr int64_t DEPTH = 128;  // rows that fit in the caches, with the matrix that they are added to

// M = D^T X: the products of many rows, summed.
template <class A> struct Gram {
    static constexpr int W = lanes<A>::W, UNITS = Product<A>::ROWS, WIDE = Product<A>::WIDE;

    // M (units, inputs) of d (rows, units) and x (rows, inputs), added to M or replacing it. `room` for DEPTH values
    // of every unit, to whole UNITS.
    template <class X>
    static void sum(const Part<A> &d, const X &x, int64_t rows, bool add, A *M, int64_t inputs, A *room) {
        alignas(64) A beside[DEPTH * WIDE * W];
        for (int64_t r = 0; r < rows; r += DEPTH) {
            const int64_t deep = rows - r < DEPTH ? rows - r : DEPTH;
            for (int64_t u = 0; u < d.many; u += UNITS) pack<UNITS>(d, r, deep, u, room + u * DEPTH);
            A *column = M;
            for (int64_t p = 0; p < x.count(); p++) {
                const Part<A> in = x(p);
                panels<A>(in.many, WIDE, [&](int64_t first, int64_t v) {
                    const int64_t left = in.many - first * W;
                    const int last = (int)(left >= v * W ? W : left - (v - 1) * W);
                    if (v == 3) pack<3 * W>(in, r, deep, first * W, beside);
                    else if (v == 2) pack<2 * W>(in, r, deep, first * W, beside);
                    else pack<W>(in, r, deep, first * W, beside);
                    for (int64_t u = 0; u < d.many; u += UNITS) {
                        const int64_t some = d.many - u < UNITS ? d.many - u : UNITS;
                        const bool more = add || r > 0;
                        const A *units = room + u * DEPTH;
                        A *to = column + u * inputs + first * W;
                        if (v == 3) block<3>(units, beside, deep, more, to, inputs, (int)some, last);
                        else if (v == 2) block<2>(units, beside, deep, more, to, inputs, (int)some, last);
                        else block<1>(units, beside, deep, more, to, inputs, (int)some, last);
                    }
                });
                column += in.many;
            }
        }
    }

private:
    // Some columns of some rows, one row after the other, zeros where there are none.
    template <int many>
    static void pack(const Part<A> &x, int64_t first_row, int64_t rows, int64_t from, A *to) {
        const int64_t here = x.many - from < many ? x.many - from : many;
        const A *row = x.at + first_row * x.apart + from;
        for (int64_t r = 0; r < rows; r++, to += many, row += x.apart) {
            if (here == many) memcpy(to, row, sizeof(A) * many);
            else for (int64_t i = 0; i < many; i++) to[i] = i < here ? row[i] : (A)0;
        }
    }

    template <int V>
    static void block(const A *d, const A *x, int64_t deep, bool add, A *to, int64_t apart, int units, int last) {
        vec<A> sum[UNITS][V] = {};
        for (int u = 0; u < units; u++)
            for (int v = 0; v < V; v++) __builtin_prefetch(to + u * apart + v * W, 1);
        for (int64_t k = 0; k < deep; k++, d += UNITS, x += V * W) {
            vec<A> m[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) m[v] = load(x + v * W);
#pragma GCC unroll 8
            for (int u = 0; u < UNITS; u++) {
                const vec<A> value = all(d[u]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) sum[u][v] += value * m[v];
            }
        }
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; u++) {
            if (u >= units) break;
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) {
                A *at = to + u * apart + v * W;
                const bool whole = v < V - 1 || last == W;
                vec<A> s = sum[u][v];
                if (add) s += whole ? load(at) : load_part(at, last);
                if (whole) store(at, s);
                else store_part(at, last, s);
            }
        }
    }
};

}  // namespace

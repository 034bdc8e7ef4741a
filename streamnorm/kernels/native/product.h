// The matrix product of a recurrence: few rows, a matrix that stays for all time steps. It is packed once, in the order
// in which it is read; sums are made in registers, a block of rows by some vectors of units at a time. A unit's sum is
// taken in one order, whatever the threads and blocks are.
#pragma once
#include "vec.h"

namespace {

template <class A> struct Product {
    static constexpr int W = lanes<A>::W;
    static constexpr int ROWS = BYTES == 64 ? 8 : 4, WIDE = 3;  // what the registers hold, with the matrix beside it

    const A *packed = nullptr;
    int64_t inputs = 0, units = 0;

    // Values that a packed matrix takes.
    static int64_t room(int64_t inputs, int64_t units) { return inputs * ((units + W - 1) / W * W); }

    int64_t vectors() const { return (units + W - 1) / W; }
    // f(first vector, number of vectors): as even as they can be
    template <class F> void panels(const F &f) const {
        const int64_t all = vectors(), count = (all + WIDE - 1) / WIDE;
        for (int64_t p = 0; p < count; p++) {
            const int64_t first = all * p / count;
            f(first, all * (p + 1) / count - first);
        }
    }

    // Takes units `from` .. from + many of a matrix (inputs, inputs), whose rows make units (y = x M^T), or columns do.
    void pack(const A *matrix, bool rows_make_units, int64_t size, int64_t from, int64_t many, A *room) {
        packed = room, inputs = size, units = many;
        panels([&](int64_t first, int64_t v) {
            A *to = room + first * W * size;
            for (int64_t k = 0; k < size; k++)
                for (int64_t lane = 0; lane < v * W; lane++) {
                    const int64_t u = first * W + lane, unit = from + u;
                    *to++ = u >= many ? (A)0 : rows_make_units ? matrix[unit * size + k] : matrix[k * size + unit];
                }
        });
    }

    // y (rows, units) of x (rows, inputs), both with `apart` values from row to row; added to what is there, or not.
    template <bool add> void multiply(const A *x, A *y, int64_t rows, int64_t apart) const {
        panels([&](int64_t first, int64_t v) {
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
    template <bool add, int V>
    void panel(const A *x, A *y, int64_t rows, int64_t apart, const A *part, int last) const {
        int64_t r = 0;
        for (; r + ROWS <= rows; r += ROWS) block<add, ROWS, V>(x + r * apart, y + r * apart, apart, part, last);
        if (ROWS > 4 && r + 4 <= rows) block<add, 4, V>(x + r * apart, y + r * apart, apart, part, last), r += 4;
        if (r + 2 <= rows) block<add, 2, V>(x + r * apart, y + r * apart, apart, part, last), r += 2;
        if (r < rows) block<add, 1, V>(x + r * apart, y + r * apart, apart, part, last);
    }

    template <bool add, int R, int V>
    void block(const A *x, A *y, int64_t apart, const A *part, int last) const {
        vec<A> sum[R][V] = {};
        for (int64_t k = 0; k < inputs; k++, part += V * W) {
            vec<A> m[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) m[v] = load(part + v * W);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const vec<A> value = all(x[r * apart + k]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) sum[r][v] += value * m[v];
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

}  // namespace

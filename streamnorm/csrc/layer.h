// A recurrent layer over all time steps, and the layout of its buffers.
//
// The hidden units are split into blocks. A block belongs to one thread; all values of its units are contiguous, for
// all time steps, so that threads do not share cache lines. A buffer holds a number of values for every unit; its parts
// are addressed by the number of values per unit before them.
#pragma once
#include "direct.h"
#include "product.h"

// A norm of W h or W x, or all null.
struct sn_site {
    const sn_plan *plan;
    const sn_memory *h1, *h2;
    const void *weight, *bias;         // its gain and bias, or null
    void *dweight, *dbias;             // (H)
};

// A layer. All tensors are contiguous.
struct sn_layer {
    int64_t T, n, H;
    int32_t paths, relu;               // into the gates; RNN: one; GRU: reset, update, candidate
    int32_t blocks, threads;
    sn_site hidden[3], input[3];       // the latter null: already normalized
    const void *matrix;                // (paths, H, H), row i makes feature i of W h
    const void *x;                     // (T, n, paths, H): W x; backward only if it is normalized here
    const void *h0;                    // (n, H)
    void *out;                         // (T, n, H): h after every step
    const void *dout;
    void *dh0, *dx, *dmatrix;          // the last may be null: not needed
    void *tape, *work;                 // what forward saves for backward; scratch of one call
};

namespace {

constexpr int64_t LINE = 16;           // units: blocks begin at multiples of a cache line

struct Block { int64_t from, wide, apart; };  // its first unit, its units, values from row to row

// The hidden units in blocks, as even as whole cache lines allow.
struct Cut {
    static constexpr int64_t MOST = 64;  // blocks: `BLOCKS` in streamnorm/nn/recurrent/fused.py
    int64_t H, count;
    Block blocks[MOST];
    Cut(int64_t units, int64_t parts) : H(units), count(parts) {
        for (int64_t b = 0; b < count; b++) {
            const int64_t from = edge(b), wide = edge(b + 1) - from;
            blocks[b] = {from, wide, whole(wide)};
        }
    }
    const Block &operator()(int64_t b) const { return blocks[b]; }
    int64_t edge(int64_t b) const {
        const int64_t at = (H * b / count + LINE / 2) / LINE * LINE;
        return b == count || at > H ? H : at;
    }
    static int64_t whole(int64_t units) { return (units + LINE - 1) / LINE * LINE; }
};

// Allocates values per unit, one part after the other.
struct Shelf {
    int64_t all = 0;
    int64_t put(int64_t values) { return (all += values) - values; }
};

// Sites by number: the norms of W h, then those of W x.
constexpr int PATHS = 3, SITES = 2 * PATHS;
SN_INLINE const sn_site &site_of(const sn_layer &l, int s) {
    return s < PATHS ? l.hidden[s] : l.input[s - PATHS];
}
// f(s) over the existing ones
template <class F> SN_INLINE void sites(const sn_layer &l, const F &f) {
    for (int s = 0; s < SITES; s++)
        if (s % PATHS < l.paths && site_of(l, s).plan) f(s);
}

// What forward saves for backward.
struct Tape : Shelf {
    int64_t states;                    // (T + 1, n): h before the first step and after each
    int64_t product[PATHS];            // (T, n): W h before its norm
    int64_t tables[SITES];             // (T, 5), as a norm's `forward` saves them
    int64_t gate[PATHS];               // GRU, (T, n): after the nonlinearity
    explicit Tape(const sn_layer &l) {
        const int64_t steps = l.T * l.n;
        states = put(steps + l.n);
        sites(l, [&](int s) { tables[s] = put(5 * l.T); });
        for (int i = 0; i < l.paths; i++) product[i] = put(steps), gate[i] = put(l.paths > 1 ? steps : 0);
    }
};

// The scratch of a call. Gradients are kept for the latest steps.
struct Room : Shelf {
    int64_t packed[PATHS];             // (H): the matrix in the order in which it is read
    int64_t memory[SITES];             // (3, 2): long, short and estimate of H1 or H2
    int64_t scratch[SITES];            // (4)
    int64_t x;                         // (n): W x before its norm
    int64_t left[SITES];               // forward, (n): the input of the gate
    int64_t masked = 0;                // GRU: r h; forward (n), backward (deep, n)
    int64_t deep = 0;                  // backward: time steps that are added to the gradients of matrices together
    int64_t dentered[SITES];           // (deep, n), those of the input (2, n)
    int64_t dgate[PATHS];              // (2, n)
    int64_t sums[SITES], once = 0;     // (2): gradients of gain and bias, in total and of one step
    int64_t dh = 0, dmasked = 0;       // (n): the gradient of the previous state; GRU
    int64_t rows = 0;                  // (DEPTH): rows of products in the order in which they are read
    Room(const sn_layer &l, bool back) {
        for (int i = 0; i < l.paths; i++) packed[i] = put(l.H);
        sites(l, [&](int s) { memory[s] = put(6), scratch[s] = put(4); });
        deep = back ? l.n < DEPTH / 2 ? DEPTH / l.n : 2 : 1;  // at least 2: a thread may be a step ahead of a reader
        x = put(l.n);
        if (l.paths > 1) masked = put(deep * l.n);
        if (!back) {
            for (int s = 0; s < SITES; s++) left[s] = put(s % PATHS < l.paths ? l.n : 0);
            return;
        }
        sites(l, [&](int s) { dentered[s] = put((s < PATHS ? deep : 2) * l.n), sums[s] = put(2); });
        for (int i = 0; i < l.paths; i++) dgate[i] = put(2 * l.n);
        once = put(2), dh = put(l.n), rows = put(DEPTH);
        if (l.paths > 1) dmasked = put(l.n);
    }
};

// A buffer in blocks.
template <class A> struct Buffer {
    A *start;
    int64_t all;
    const Cut &cut;

    A *at(int64_t place, const Block &b) const { return start + all * b.from + place * b.apart; }

    // A matrix (rows, H) whose columns are in all blocks.
    struct Matrix {
        const Buffer &buffer;
        int64_t place;
        int64_t count() const { return buffer.cut.count; }
        Part<A> operator()(int64_t p) const {
            const Block &b = buffer.cut(p);
            return {buffer.at(place, b), b.apart, b.wide};
        }
        void copy_rows(int64_t first, int64_t end, A *to, int64_t to_apart) const {
            for (int64_t p = 0; p < count(); p++) {
                const Block &b = buffer.cut(p);
                Buffer::copy_rows(buffer.at(place, b) + first * b.apart, b.apart, to + first * to_apart + b.from, to_apart,
                                  end - first, b.wide);
            }
        }
    };
    Matrix matrix(int64_t place) const { return {*this, place}; }

    static void copy_rows(const A *from, int64_t apart, A *to, int64_t to_apart, int64_t rows, int64_t many) {
        for (int64_t r = 0; r < rows; r++, from += apart, to += to_apart) memcpy(to, from, many * sizeof(A));
    }
};

}  // namespace

// One thread's share of a recurrent layer: its blocks of the hidden units (layer.h), with their products (product.h),
// norms (slots.h) and memories. It waits for the others before a product that needs the results of all.
#pragma once
#include "layer.h"

namespace {

// One thread's view of H1 or H2 of a site: every thread has its own, equal counters.
struct Counts { int64_t count = 0, updates = 0, seen = 0, skipped = 0; };

// Shared flags of the threads: whether a value at a site was not finite; backward, in this step and its neighbors;
// forward, in any step (at 0).
struct News {
    int wrong[3][SITES] = {};
    int &at(int64_t t, int s) { return wrong[t % 3][s]; }
};

// A layer as one thread computes it.
template <class A> struct Scan {
    const sn_layer &l;
    const sn_member &member;
    News &news;
    const bool back;
    const Cut cut;
    const Tape tape;
    const Room room;
    const Buffer<A> kept, work;
    Counts counts[SITES];

    Scan(const sn_layer &layer, const sn_member &who, News &shared, bool is_back)
        : l(layer), member(who), news(shared), back(is_back), cut(l.H, l.blocks), tape(l), room(l, back),
          kept{(A *)l.tape, tape.all, cut}, work{(A *)l.work, room.all, cut} {}

    const sn_memory *of(int s) const { return back ? site_of(l, s).h2 : site_of(l, s).h1; }
    const A *dout(int64_t t) const { return (const A *)l.dout + t * l.n * l.H; }
    int64_t share(int64_t many, int next) const { return many * (member.number + next) / member.members; }
    // f(block) over this thread's blocks
    template <class F> SN_MEMBER void blocks(const F &f) const {
        for (int64_t b = share(l.blocks, 0); b < share(l.blocks, 1); b++) f(cut(b));
    }
    template <class F> SN_MEMBER void paths(const F &f) const {
        for (int i = 0; i < l.paths; i++) f(i);
    }
    // f(s) over the norms of a path
    template <class F> SN_MEMBER void norms(int i, const F &f) const {
        f(i);
        if (site_of(l, PATHS + i).plan) f(PATHS + i);
    }
    // f(i, j, k) over a block of a step, a vector of k units at a time; i is its index in the block, j in dense tensors
    template <class F> SN_MEMBER void each(const Block &b, const F &f) const {
        for (int64_t r = 0; r < l.n; r++)
            slots<A>(b.wide, [&](int64_t c, int k) { f(r * b.apart + c, r * l.H + b.from + c, k); });
    }

    // --- memories: the tables of a block are stored with it ---

    sn_memory memory(int s, const Block &b) {
        sn_memory h = *of(s);
        A *tables = work.at(room.memory[s], b);
        h.long_ = tables, h.short_ = tables + 2 * b.apart, h.estimate = tables + 4 * b.apart;
        h.count = &counts[s].count, h.updates = &counts[s].updates;
        h.seen = &counts[s].seen, h.skipped = &counts[s].skipped;
        return h;
    }
    // f(shared table, its copy, bytes) over the tables of a memory in a block, or those that change.
    template <class F> void tables(int s, const Block &b, bool all, const F &f) {
        const sn_memory &from = *of(s), to = memory(s, b);
        void *const theirs[] = {from.long_, from.short_, from.estimate};
        void *const ours[] = {to.long_, to.short_, to.estimate};
        const int constant = from.has_short() ? 0 : 1;
        for (int table = 0; table < 3; table++)
            for (int row = 0; row < 2 && (all || table != constant); row++)
                f((A *)theirs[table] + row * l.H + b.from, (A *)ours[table] + row * b.apart, b.wide * sizeof(A));
    }
    void begin() {
        paths([&](int i) {
            blocks([&](const Block &b) {
                Product<A>::pack((const A *)l.matrix + i * l.H * l.H, !back, l.H, b.from, b.wide, work.at(room.packed[i], b));
            });
        });
        sites(l, [&](int s) {
            const sn_memory *h = of(s);
            if (!h) return;
            counts[s] = {*h->count, *h->updates, *h->seen, *h->skipped};
            blocks([&](const Block &b) {
                tables(s, b, true, [](const A *theirs, A *ours, size_t bytes) { memcpy(ours, theirs, bytes); });
            });
        });
    }
    // When all have done the last step.
    void remember() {
        sites(l, [&](int s) {
            const sn_memory *h = of(s);
            if (!h) return;
            blocks([&](const Block &b) {
                tables(s, b, false, [](A *theirs, const A *ours, size_t bytes) { memcpy(theirs, ours, bytes); });
            });
            if (member.number) return;
            *h->count = counts[s].count, *h->seen = counts[s].seen, *h->skipped = counts[s].skipped;
        });
    }
    void arrived(int s) { counts[s].count += of(s)->counts_samples() ? l.n : 1, counts[s].seen++; }

    // --- one site ---

    template <bool add = false, class X> void multiply(int i, const X &x, A *y, const Block &b) const {
        Product<A>{work.at(room.packed[i], b), l.H, b.wide}.template multiply<add>(x, y, l.n, b.apart);
    }
    // A norm's arguments for a block: rows of all its slots.
    sn_plan plan(int s, const Block &b) const {
        sn_plan p = *site_of(l, s).plan;
        p.k0 = p.k1 = p.r1 = 1, p.r0 = l.n, p.xr0 = p.L = b.apart, p.columns = 1;
        return p;
    }
    static const A *gains(const void *p, const Block &b) { return p ? (const A *)p + b.from : nullptr; }

    int64_t gates() const { return l.paths * l.H; }  // values of a row of x
    void bring_in(int i, int64_t t, A *to, const Block &b) const {
        const A *x = (const A *)l.x + t * l.n * gates() + i * l.H + b.from;
        Buffer<A>::copy_rows(x, gates(), to, b.apart, l.n, b.wide);
    }
    // A norm's input in a block: W h, or W x, which is copied in.
    A *entered(int s, int64_t t, const Block &b) const {
        if (s < PATHS) return kept.at(tape.product[s] + t * l.n, b);
        A *to = work.at(room.x, b);
        bring_in(s - PATHS, t, to, b);
        return to;
    }
    void normalize(int s, int64_t t, const Block &b) {
        const sn_plan p = plan(s, b);
        const sn_memory h1 = memory(s, b);
        Job<A> J = forward_job<A>(&p, &h1, entered(s, t, b), gains(site_of(l, s).weight, b),
                                  gains(site_of(l, s).bias, b), work.at(room.left[s], b),
                                  kept.at(tape.tables[s] + t * 5, b), work.at(room.scratch[s], b));
        J.past = false;  // it is read soon
        Direct<Columns<A>, A> e(J, 0);
        if (!forward_step(J, 0, 0, b.wide, e)) __atomic_store_n(&news.at(0, s), 1, __ATOMIC_RELAXED);
        commit(h1, J.S, 0, b.wide, J.fresh, J.est_mu, J.est_sigma);
    }
    // norm(W h) of a path, or norm(W (r h)).
    template <class X> void from_state(int i, int64_t t, const X &x) {
        blocks([&](const Block &b) {
            multiply(i, x, kept.at(tape.product[i] + t * l.n, b), b);
            normalize(i, t, b);
        });
        arrived(i);
    }
    // norm(W x) of a path, or W x.
    void from_input(int i, int64_t t) {
        const int s = PATHS + i;
        const bool normed = site_of(l, s).plan;
        blocks([&](const Block &b) {
            if (normed) normalize(s, t, b);
            else bring_in(i, t, work.at(room.left[s], b), b);
        });
        if (normed) arrived(s);
    }

    // f(job, memory or null) for the backward pass of a norm, block by block
    template <class F> void way_back(int s, int64_t t, bool enters, const F &f) {
        blocks([&](const Block &b) {
            const sn_plan p = plan(s, b);
            const sn_memory h2 = of(s) ? memory(s, b) : sn_memory{};
            A *once = work.at(room.once, b);
            Job<A> J = backward_job<A>(&p, of(s) ? &h2 : nullptr, enters ? entered(s, t, b) : nullptr,
                                       gains(site_of(l, s).weight, b), work.at(room.dgate[s % PATHS] + slot(t, 2), b),
                                       kept.at(tape.tables[s] + t * 5, b), work.at(room.scratch[s], b),
                                       work.at(room.dentered[s] + slot(t, s < PATHS ? room.deep : 2), b), once,
                                       once + b.apart);
            J.past = false;
            f(J, b, h2);
        });
    }
    int64_t slot(int64_t t, int64_t kept_steps) const { return t % kept_steps * l.n; }
    static bool denormalize(const Job<A> &J, const Block &b) {
        Direct<Columns<A>, A> e(J, 0);
        return backward_step(J, 0, 0, 0, b.wide, e);
    }
    // From the gradient at a gate's input to that of the inputs of its path's norms. G's arrival only counts if all of
    // it is finite, which `settle` checks.
    void denormalize(int i, int64_t t) {
        norms(i, [&](int s) {
            way_back(s, t, true, [&](const Job<A> &J, const Block &b, const sn_memory &) {
                if (!denormalize(J, b)) __atomic_store_n(&news.at(t, s), 1, __ATOMIC_RELAXED);
                A *dweight = work.at(room.sums[s], b), *dbias = dweight + b.apart;
                for (int64_t u = 0; u < b.wide; u++) dweight[u] += J.dweight[u], dbias[u] += J.dbias[u];
            });
        });
    }
    // Once all have done so: G takes in the arrival, or skips it if any of it is not finite. Returns whether that
    // changed gradients, for which all have to wait.
    bool settle(int i, int64_t t) {
        bool any = false;
        norms(i, [&](int s) {
            if (!of(s)) return;
            const bool refused = __atomic_load_n(&news.at(t, s), __ATOMIC_RELAXED);
            way_back(s, t, refused, [&](Job<A> &J, const Block &b, const sn_memory &h2) {
                J.refused = refused;
                if (refused) denormalize(J, b);
                else commit(h2, J.S, 0, b.wide, J.fresh, J.last, J.last + J.S);
            });
            if (refused) counts[s].skipped++;
            else arrived(s);
            any |= refused;
        });
        return any;
    }
    // After a barrier of step t: all have read the flags of step t + 1, whose place step t - 2 reuses.
    void forget(int64_t t) {
        if (member.number == 0)
            for (int s = 0; s < SITES; s++) __atomic_store_n(&news.at(t + 1, s), 0, __ATOMIC_RELAXED);
    }

    // --- other threads' results, inputs and outputs ---

    typedef typename Buffer<A>::Matrix Matrix;
    Matrix states(int64_t t) const { return kept.matrix(tape.states + t * l.n); }
    Matrix masked(int64_t t) const { return work.matrix(room.masked + slot(t, room.deep)); }
    Matrix dproduct(int i, int64_t t) const { return work.matrix(room.dentered[i] + slot(t, room.deep)); }

    // Waits for the others, and prefetches their results.
    template <class... X> void meet(const X &...x) const {
        member.wait();
        (fetch(x), ...);
    }
    SN_MEMBER void fetch(const Matrix &x) const {  // inline: GCC drops calls to a function that only prefetches
        for (int64_t p = 0; p < l.blocks; p++) {
            if (p >= share(l.blocks, 0) && p < share(l.blocks, 1)) continue;
            const Part<A> theirs = x(p);
            for (int64_t i = 0; i < l.n * theirs.apart; i += 64 / (int64_t)sizeof(A)) __builtin_prefetch(theirs.at + i);
        }
    }
    // Copies this thread's share of a step's rows to the tensor of all time steps and units.
    void put_out(int64_t t) const {
        states(t + 1).copy_rows(share(l.n, 0), share(l.n, 1), (A *)l.out + t * l.n * l.H, l.H);
    }
    void put_out_dx(int64_t t) const {
        paths([&](int i) {
            const int64_t place = site_of(l, PATHS + i).plan ? room.dentered[PATHS + i] : room.dgate[i];
            A *to = (A *)l.dx + t * l.n * gates() + i * l.H;
            work.matrix(place + slot(t, 2)).copy_rows(share(l.n, 0), share(l.n, 1), to, gates());
        });
    }
    void begin_forward() {
        begin();
        blocks([&](const Block &b) {
            Buffer<A>::copy_rows((const A *)l.h0 + b.from, l.H, kept.at(tape.states, b), b.apart, l.n, b.wide);
        });
        member.wait();
    }
    // If a value was not finite, memories are unchanged.
    void end_forward() {
        bool wrong = false;
        for (int s = 0; s < SITES; s++) wrong |= __atomic_load_n(&news.at(0, s), __ATOMIC_RELAXED) != 0;
        if (!wrong) remember();
    }
    void begin_backward() {
        begin();
        blocks([&](const Block &b) {
            memset(work.at(room.dh, b), 0, l.n * b.apart * sizeof(A));
            sites(l, [&](int s) { memset(work.at(room.sums[s], b), 0, 2 * b.apart * sizeof(A)); });
        });
    }
    // Adds the time steps from t on, as many as are kept, to the gradient of a path's matrix.
    void take_in(int i, int64_t t, const Matrix &x) {
        if (t % room.deep || !l.dmatrix) return;
        const int64_t steps = l.T - t < room.deep ? l.T - t : room.deep;
        blocks([&](const Block &b) {
            Gram<A>::sum({work.at(room.dentered[i], b), b.apart, b.wide}, x, steps * l.n, t + steps < l.T,
                         (A *)l.dmatrix + (i * l.H + b.from) * l.H, l.H, work.at(room.rows, b));
        });
    }
    void end_backward() {
        remember();
        blocks([&](const Block &b) {
            Buffer<A>::copy_rows(work.at(room.dh, b), b.apart, (A *)l.dh0 + b.from, l.H, l.n, b.wide);
            sites(l, [&](int s) {
                const A *sums = work.at(room.sums[s], b);
                memcpy((A *)site_of(l, s).dweight + b.from, sums, b.wide * sizeof(A));
                memcpy((A *)site_of(l, s).dbias + b.from, sums + b.apart, b.wide * sizeof(A));
            });
        });
    }

    SN_INLINE vec<A> get(const A *p, int64_t i, int k) { return table(p + i, k); }
    SN_INLINE void put_at(A *p, int64_t i, int k, vec<A> v) { keep(p + i, k, v); }

    void rnn_forward();
    void rnn_backward();
    void gru_forward();
    void gru_backward();
};

}  // namespace

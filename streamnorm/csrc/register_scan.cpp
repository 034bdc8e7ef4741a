// The operators of a recurrent layer over all time steps. Each norm has the arguments gain, bias, memory and call:
// those of W h, then those of W x; the rest is empty.
#include "layer.h"
#include "operators.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

namespace {

// A layer, as far as it is defined by its norms.
struct Pass {
    sn_layer l{};
    int32_t dtype = 0;                 // torch's code
    int kind = 0;                      // SN_F32 or SN_F64
    int64_t norms = 0;

    // Whether they and the matrix fit each other. `values`: of (T, n, paths, H) forward, of (T, n, H) backward.
    bool read(const Rest &rest, const View &matrix, sn_value relu, sn_value parts, int64_t values, bool back) {
        const int64_t blocks = (int64_t)parts;
        for (norms = 0; norms < SITES && rest[5 * norms + 4].numel(); norms++) {}
        const bool beside = norms == 2 || norms == 2 * PATHS;  // of W x too
        l.paths = (int32_t)(beside ? norms / 2 : norms);
        if ((l.paths != 1 && l.paths != PATHS) || blocks < 1 || blocks > Cut::MOST) return false;
        for (int64_t i = 0; i < norms; i++)
            if (!norm(rest, i, i < l.paths ? l.hidden[i] : l.input[i - l.paths], back)) return false;
        const int64_t step = l.n * l.H * (back ? 1 : l.paths);
        l.T = step ? values / step : 0, l.relu = relu != 0, l.blocks = (int32_t)blocks;
        l.threads = threads() < l.blocks ? threads() : l.blocks;
        l.matrix = matrix.data();
        return l.T > 0 && values == l.T * step && matrix.holds(dtype, l.paths * l.H * l.H);
    }
    // The size of a buffer with so many values per unit.
    int64_t room(int64_t each) const { return each * Cut::whole(l.H); }

private:
    sn_memory memories[SITES];

    bool norm(const Rest &rest, int64_t i, sn_site &site, bool back) {
        const View weight = rest[5 * i], bias = rest[5 * i + 1], tables = rest[5 * i + 2], counts = rest[5 * i + 3];
        const sn_call *c = call_in(rest[5 * i + 4]);
        sn_memory &h = memories[i];
        if (!c || c->ndim != 2 || c->dtype > SN_F64 || c->slots != c->shape[1]) return false;
        if (!l.H) l.n = c->shape[0], l.H = c->shape[1], kind = c->dtype, dtype = DTYPES[kind];
        if (c->shape[0] != l.n || c->shape[1] != l.H || c->dtype != kind) return false;
        const bool remembers = back ? c->has_g : c->has_f;
        site.plan = &c->plan;
        (back ? site.h2 : site.h1) = remembers ? &h : nullptr;
        return (back || remembers) && ::read(weight, *c, site.weight) && ::read(bias, *c, site.bias) &&
               (!remembers || find(back ? c->g : c->f, c->slots, dtype, tables, counts, h));
    }
};

}  // namespace

// Empty results, with the memories unchanged, also if a value was not finite.
void scan_forward(sn_value *stack, uint64_t arguments, uint64_t) {
    Tensor x(stack[0]), h0(stack[1]), matrix(stack[2]), out, tape, work;
    const Rest rest{stack, 5, arguments};
    Pass pass;
    sn_layer &l = pass.l;
    bool fine = pass.read(rest, matrix, stack[3], stack[4], x.numel(), false);
    const int64_t shape[2] = {l.T * l.n, l.H}, stride[2] = {l.H, 1};
    fine = fine && x.holds(pass.dtype, shape[0] * l.paths * l.H) && h0.holds(pass.dtype, l.n * l.H) &&
           out.make(2, shape, stride, pass.dtype) && tape.make(pass.room(Tape(l).all), pass.dtype) &&
           work.make(pass.room(Room(l, false).all), pass.dtype);
    if (fine) {
        l.x = x.data(), l.h0 = h0.data(), l.out = out.data(), l.tape = tape.data(), l.work = work.data();
        fine = !kernels.scan_forward[pass.kind](&l);
    }
    if (!fine) return none(stack, 2);
    stack[0] = out.give(), stack[1] = tape.give();
}

// x is empty if it was already normalized.
void scan_backward(sn_value *stack, uint64_t arguments, uint64_t) {
    Tensor dout(stack[0]), tape(stack[1]), x(stack[2]), matrix(stack[3]), dh0, dx, dmatrix, dgains, work;
    const bool learns = stack[6];
    const Rest rest{stack, 7, arguments};
    Pass pass;
    sn_layer &l = pass.l;
    bool fine = pass.read(rest, matrix, stack[4], stack[5], dout.numel(), true);
    const int64_t steps = l.T * l.n, gates = l.paths * l.H;
    auto make = [&](Tensor &made, int64_t rows, int64_t wide) {
        const int64_t shape[2] = {rows, wide}, stride[2] = {wide, 1};
        return made.make(2, shape, stride, pass.dtype);
    };
    fine = fine && dout.holds(pass.dtype, steps * l.H) && tape.holds(pass.dtype, pass.room(Tape(l).all)) &&
           (!l.input[0].plan || x.holds(pass.dtype, steps * gates)) && make(dh0, l.n, l.H) && make(dx, steps, gates) &&
           make(dmatrix, learns ? gates : 0, l.H) && make(dgains, 2 * pass.norms, l.H) &&
           work.make(pass.room(Room(l, true).all), pass.dtype);
    if (!fine) return none(stack, 4);
    l.x = x.data(), l.dout = dout.data(), l.tape = tape.data(), l.work = work.data();
    l.dh0 = dh0.data(), l.dx = dx.data(), l.dmatrix = learns ? dmatrix.data() : nullptr;
    char *sums = (char *)dgains.data();
    sites(l, [&](int s) {
        sn_site &site = s < PATHS ? l.hidden[s] : l.input[s - PATHS];
        site.dweight = sums, site.dbias = sums + l.H * bytes_of(pass.dtype), sums += 2 * l.H * bytes_of(pass.dtype);
    });
    kernels.scan_backward[pass.kind](&l);
    stack[0] = dh0.give(), stack[1] = dx.give(), stack[2] = dmatrix.give(), stack[3] = dgains.give();
}

#endif

// The operators of online learning. A net has more tensors than an operator can take: `gather` records some at a time,
// and `online` reads there the parameters and memories of each layer in turn, and the optimizer's state of each
// parameter that is updated. The caller must keep the tensors alive until then.
#include "online.h"
#include "operators.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

namespace {

constexpr int64_t RATES = sizeof(sn_rates) / sizeof(double);

// A recorded tensor.
struct Seen {
    void *at;
    int64_t values;
    int32_t dtype, is_dense;

    void *data() const { return at; }
    bool holds(int32_t type, int64_t many) const { return dtype == type && values == many && is_dense; }
};
constexpr int64_t WORDS = sizeof(Seen) / sizeof(int64_t);

// The recorded tensors of a net, one after the other.
struct Reader {
    const Seen *now, *const end;

    bool has(int64_t many) const { return end - now >= many; }
    bool take(int32_t dtype, int64_t values, void *&at) {
        if (!has(1) || !now->holds(dtype, values)) return false;
        at = now++->data();
        return true;
    }
    bool is_through() const { return now == end || !now->values; }
};

// A net from its parameters, if the tensors fit.
struct Net : sn_net {
    const int32_t dtype;
    Tensor layers_room, scratch_room;

    explicit Net(int32_t of) : sn_net{}, dtype(of) {}

    // `numbers`: of every group of the optimizer, and whether each parameter is fresh.
    bool read(const View &specs, const View &numbers, Reader rest) {
        depth = specs.numel() / (int64_t)sizeof(sn_spec);
        if (!depth || !specs.holds(UINT8, depth * sizeof(sn_spec))) return false;
        if (!layers_room.make(depth * sizeof(sn_online), UINT8)) return false;
        const sn_spec *const spec = (const sn_spec *)specs.data();
        layers = (sn_online *)layers_room.data();
        int64_t room = 0, params = 0;
        for (int64_t k = 0; k < depth; k++) {
            sn_online &l = layers[k];
            l = {}, (sn_spec &)l = spec[k];
            if (k && l.in != layers[k - 1].out) return false;
            bool fine = true;
            each(l, [&](sn_param &p, int, int64_t values) { fine = rest.take(dtype, values, p.at) && fine, params++; });
            if (l.kind == STREAMING) fine = fine && memory(l.f, l.out, rest, l.F) && memory(l.g, l.out, rest, l.G);
            if (!fine || (l.kind == STREAMING && l.F.begins())) return false;
            room += sn_scratch(l);
        }
        const int64_t groups = (numbers.numel() - params) / RATES;
        if (!numbers.holds(DOUBLE, groups * RATES + params) || !scratch_room.make(room, dtype)) return false;
        const double *rates = (const double *)numbers.data(), *fresh = rates + groups * RATES;
        scratch = scratch_room.data();
        bool fine = true;
        for (int64_t k = 0; k < depth; k++)
            each(layers[k], [&](sn_param &p, int group, int64_t values) {
                p.fresh = *fresh++ != 0;
                fine = fine && group < groups;
                if (!fine || !moves) return;
                p.rates = (const sn_rates *)rates + group;
                const bool of_adam = !p.rates->is(SGD);
                if (of_adam || p.rates->momentum != 0) fine = rest.take(dtype, values, p.average);
                if (of_adam) fine = fine && rest.take(dtype, values, p.square) && count(rest, p);
            });
        return fine && rest.is_through();
    }
    // Samples and their results; classes must exist.
    bool read(const View &x, const View &target, const View &loss, const View &output) {
        const int64_t classes = layers[depth - 1].out;
        samples = loss.numel();
        this->x = x.data(), targets = target.data(), losses = loss.data(), outputs = output.data();
        if (!loss.holds(dtype, samples) || !output.holds(dtype, samples * classes)) return false;
        if (!x.holds(dtype, samples * layers[0].in)) return false;
        if (this->loss == SQUARED_ERROR) return target.holds(dtype, samples * classes);
        if (!target.holds(INT64, samples)) return false;
        for (int64_t i = 0; i < samples; i++)
            if (const int64_t label = ((const int64_t *)targets)[i]; label < 0 || label >= classes) return false;
        return true;
    }

private:
    // f(parameter, its group, values) over the existing ones.
    template <class F> static void each(sn_online &l, const F &f) {
        sn_param *const params[] = {&l.weight, &l.bias, &l.gain, &l.shift};
        for (int i = 0; i < 4; i++)
            if (l.group[i] >= 0) f(*params[i], l.group[i], i ? l.out : l.in * l.out);
    }
    bool memory(const sn_stream &s, int64_t slots, Reader &rest, sn_memory &h) const {
        if (!rest.has(2)) return false;
        rest.now += 2;
        return find(s, slots, dtype, rest.now[-2], rest.now[-1], h);
    }
    static bool count(Reader &rest, sn_param &p) {
        p.wide_count = rest.has(1) && rest.now->dtype == DOUBLE;
        return rest.take(p.wide_count ? DOUBLE : FLOAT, 1, p.count);
    }
};

}  // namespace

// Records the tensors in the other arguments, from the place `first` on; false if there is no room for them.
void gather(sn_value *stack, uint64_t arguments, uint64_t) {
    Tensor table(stack[0]);
    const int64_t first = (int64_t)stack[1], places = table.numel() / WORDS;
    const Rest rest{stack, 2, arguments};
    const int64_t many = (int64_t)(rest.to - rest.from);
    const bool fine = table.holds(INT64, places * WORDS) && first >= 0 && first + many <= places;
    Seen *const seen = (Seen *)table.data() + first;
    for (int64_t i = 0; fine && i < many; i++) {
        const View tensor = rest[i];
        seen[i] = {tensor.data(), tensor.numel(), tensor.dtype(), tensor.is_dense()};
    }
    stack[0] = fine;
}

// `why`: REFUSED, with nothing changed, for tensors that do not fit and for a very first sample whose slots are pooled;
// or why the run ended.
void online(sn_value *stack, uint64_t, uint64_t) {
    Tensor specs(stack[0]), numbers(stack[1]), table(stack[2]), x(stack[3]), targets(stack[4]), losses(stack[5]);
    Tensor outputs(stack[6]);
    Net net(x.dtype() == DOUBLE ? DOUBLE : FLOAT);
    net.loss = (int)stack[7], net.moves = stack[8], net.raises = stack[9], net.threads = threads();
    const Seen *const seen = (const Seen *)table.data();
    const int64_t places = table.numel() / WORDS;
    const bool fine = table.holds(INT64, places * WORDS) && net.read(specs, numbers, {seen, seen + places}) &&
                      net.read(x, targets, losses, outputs);
    if (fine) kernels.online[net.dtype == DOUBLE](&net);
    else net.why = REFUSED;
    stack[0] = net.learned, stack[1] = net.skipped, stack[2] = net.latest, stack[3] = net.why;
}

#endif

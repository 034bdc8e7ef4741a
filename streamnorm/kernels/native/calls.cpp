// A layer's training call, forward and backward, and its weight update, as functions that Python calls: what a small
// batch pays for is not the kernels but everything around them. Mirrored by kernels/calls.py, which makes them callable,
// and used by fused.py. A call that has to be done otherwise answers None, before anything has changed.
#include "norm.h"
#include "python.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

namespace {

// What must still be as it was when a shortcut was made.
struct Guard {
    PyObject *where, *key, *expected;
    int32_t kind;
};
enum { IS, ABSENT, EMPTY_ITEM, EMPTY, ANSWERS, OF_TYPE };

struct Guards {
    const Guard *first;
    int64_t count;

    bool hold() const {
        for (const Guard *g = first; g < first + count; ++g)
            if (!holds(*g)) return false;
        return true;
    }
    static bool holds(const Guard &g) {
        if (g.kind == EMPTY) return py.size(g.where) == 0;
        if (g.kind == OF_TYPE) {
            Own type(py.type(g.where));
            return type == g.expected;
        }
        if (g.kind == ANSWERS) {
            Own answer(py.call(g.where, (PyObject *)nullptr));
            if (!answer) py.clear_error();
            return answer.o == g.expected;
        }
        PyObject *item = py.item(g.where, g.key);
        if (g.kind == EMPTY_ITEM) return item && py.size(item) == 0;
        return item == (g.kind == IS ? g.expected : nullptr);
    }
};

constexpr int MEMBERS = 7;

// A memory: its dictionary of buffers, the names of the members in it, and its rule in numbers.
struct Members {
    PyObject *buffers, *names[MEMBERS];
    sn_rule rule;
};

// Where the members of a memory are. They are held as long as this is: another thread may put others in their place.
struct Found {
    sn_memory memory;
    Own held[MEMBERS];

    // False: they are not as the kernels read them.
    bool find(const Members &m, int bits, int64_t slots) {
        void *at[MEMBERS];
        for (int i = 0; i < MEMBERS; ++i) {
            Tensor member;
            PyObject *buffer = py.item(m.buffers, m.names[i]);
            if (!buffer || !member.look(buffer)) return false;
            if (!(i < 3 ? member.holds(FLOAT, bits, 2 * slots) : member.holds(INTEGER, 64, 1))) return false;
            at[i] = member.data();
            held[i].o = another(buffer);
        }
        memory = {at[0], at[1], at[2], (int64_t *)at[3], (int64_t *)at[4], (int64_t *)at[5], (int64_t *)at[6],
                  m.rule};
        return true;
    }
};

// What a weight update means to the memories: something that is not known here, nothing, or the fold of both.
enum { OTHERWISE, NOTHING, BOTH };

// What is known of one kind of input to one layer.
struct Told {
    const sn_plan *plan;
    int (*forward)(const sn_plan *, const sn_memory *, const void *x, const void *gain, const void *shift, void *y,
                   void *tables, void *scratch, int threads);
    int (*backward)(const sn_plan *, const sn_memory *, const void *x, const void *gain, const void *dy, void *tables,
                    void *scratch, void *dx, void *dgain, void *dshift, int threads);
    void (*fold)(const sn_memory *, const sn_memory *, int64_t slots, const double *keep);
    Members h1, h2;
    double keep[4];
    int32_t has_h1, has_h2, folds, code, bits, wide_bits, ndim;
    int64_t shape[AXES], stride[AXES];
    int64_t slots, scratch, values;             // of a call's tables, and where their room to work in begins
    PyObject *self, *room, *room_dtype, *wide;  // Python's object; the size and keywords of the tables; their dtype
    Guards watch;                               // whether somebody records or rewrites torch's operations

    bool is_like(const Tensor &x) const {
        if (!x.is(code, bits) || x.view.ndim != ndim) return false;
        for (int i = 0; i < ndim; ++i)
            if (x.view.shape[i] != shape[i] || (shape[i] != 1 && x.view.stride[i] != stride[i])) return false;
        return true;
    }
};

struct Shortcut {
    const Told *told;
    PyObject *parameters;  // the gain and bias that join in
    Guards guards, memories;
};

// A gain or bias as the kernels read it.
struct Read {
    Own object;
    void *data = nullptr;

    explicit Read(PyObject *parameter) : object(another(parameter)) {}
    // -1: an error; 0: it cannot be read.
    int find(const Told &told) {
        if (object == its.none) return 1;
        Tensor t;
        if (!t.look(object) || t.view.ndim != 1) return 0;
        if (!t.holds(FLOAT, told.wide_bits, told.slots) || !answers(object, its.is_neg, its.no)) {
            Own made(py.call(its.as_read, object.o, told.wide, (PyObject *)nullptr));
            if (!made) return -1;
            PyObject *before = object.give();
            object.o = made.give();
            py.drop(before);
            if (!t.look(object) || !t.holds(FLOAT, told.wide_bits, told.slots)) return 0;
        }
        data = t.data();
        return 1;
    }
};

PyObject *none() { return another(its.none); }

int threads() {
    Own number(py.call(its.threads, (PyObject *)nullptr));
    return number ? (int)py.number(number) : 1;
}

bool grad_enabled() {
    Own answer(py.call(its.grad_enabled, (PyObject *)nullptr));
    return answer != its.no;
}

// y, or None where it has to be done otherwise; null: an error of Python's.
PyObject *forward(const Told &told, PyObject *x, PyObject *weight, PyObject *bias) {
    Tensor input, output, kept;
    Found h1;
    if (!input.look(x) || !told.is_like(input) || (told.has_h1 && !h1.find(told.h1, told.wide_bits, told.slots)))
        return none();
    Read gain(weight), shift(bias);
    if (const int found = gain.find(told); found <= 0) return found ? nullptr : none();
    if (const int found = shift.find(told); found <= 0) return found ? nullptr : none();
    Own y(py.call(its.empty_like, x, (PyObject *)nullptr));
    if (!y) return nullptr;
    Own size(py.pack(2, x, told.room)), tables(size ? py.call_all(its.new_empty, size, told.room_dtype) : nullptr);
    if (!tables) return nullptr;
    if (!output.look(y) || !told.is_like(output) || !kept.look(tables)) return none();
    const int count = threads();
    void *lock = py.release();
    const int failed = told.forward(told.plan, told.has_h1 ? &h1.memory : nullptr, input.data(), gain.data, shift.data,
                                    output.data(), kept.data(), kept.data() + told.scratch, count);
    py.acquire(lock);
    if (failed) return none();
    if (py.set(told.self, its.tables, tables)) return nullptr;
    if (!grad_enabled()) return y.give();
    Own call(py.pack(3, told.self, y.o, tables.o));
    return call ? py.call(its.apply, x, weight, bias, call.o, (PyObject *)nullptr) : nullptr;
}

// Its own share of the way back, or null with an error; None: to be done otherwise.
PyObject *backward(const Told &told, PyObject *ctx, PyObject *grad) {
    if (grad_enabled() || !told.watch.hold()) return none();
    Own saved(py.get(ctx, its.saved_tensors));
    if (!saved) return nullptr;
    Own needs(py.get(ctx, its.needs_input_grad));
    if (!needs) return nullptr;
    PyObject *x = py.at(saved, 0);
    bool needed[3];
    for (int i = 0; i < 3; ++i) needed[i] = py.at(needs, i) == its.yes;
    // What was saved may have been somewhere else meanwhile, and come back in another order (saved_tensors_hooks).
    Tensor input, kept;
    if (!input.look(x) || !told.is_like(input) || !answers(x, its.is_neg, its.no)) return none();
    if (!kept.look(py.at(saved, 2)) || !kept.holds(FLOAT, told.wide_bits, told.values)) return none();
    // G is about the gradient of the input: where nobody wants that, nothing is remembered.
    Found h2;
    const bool remembers = told.has_h2 && needed[0];
    if (remembers && !h2.find(told.h2, told.wide_bits, told.slots)) return none();
    Read gain(py.at(saved, 1));
    if (int found = gain.find(told); found <= 0) return found ? nullptr : none();
    Tensor dy;
    Own given(another(grad));
    if (!dy.look(grad) || !told.is_like(dy) || !answers(grad, its.is_neg, its.no)) {
        Own copy(py.call(its.like, grad, x, (PyObject *)nullptr));
        if (!copy) return nullptr;
        py.drop(given.give());
        given.o = copy.give();
        if (!dy.look(given) || !told.is_like(dy)) return none();
    }
    Own made[3];
    void *data[3] = {};
    for (int i = 0; i < 3; ++i) {
        if (!needed[i]) {
            made[i].o = none();
            continue;
        }
        Tensor t;
        made[i].o = py.call(its.empty_like, i ? gain.object.o : x, (PyObject *)nullptr);
        if (!made[i]) return nullptr;
        if (!t.look(made[i]) || (i == 0 && !told.is_like(t))) return none();
        data[i] = t.data();
    }
    const int count = threads();
    void *lock = py.release();
    const int failed = told.backward(told.plan, remembers ? &h2.memory : nullptr, input.data(), gain.data, dy.data(),
                                     kept.data(), kept.data() + told.scratch, data[0], data[1], data[2], count);
    py.acquire(lock);
    return failed ? none() : py.pack(4, made[0].o, made[1].o, made[2].o, its.none);
}

const Told &told_of(PyObject *self) { return *(const Told *)py.pointer(self); }

}  // namespace

SN_COMMON(void, streamnorm_python)(const Python *functions, const Objects *objects, const Exchange *table) {
    py = *functions;
    its = *objects;
    exchange = table && table->version == 1 ? table : nullptr;
}

// told.forward(x, weight, bias)
SN_COMMON(PyObject *, streamnorm_forward)(PyObject *self, PyObject *const *args, intptr_t) {
    return forward(told_of(self), args[0], args[1], args[2]);
}

// shortcut.call(x)
SN_COMMON(PyObject *, streamnorm_shortcut)(PyObject *self, PyObject *const *args, intptr_t) {
    const Shortcut &s = *(const Shortcut *)py.pointer(self);
    PyObject *x = args[0], *weight = its.none, *bias = its.none;
    if (!s.guards.hold() || !s.told->watch.hold()) return none();
    if (s.parameters) {
        weight = py.item(s.parameters, its.weight);
        bias = py.item(s.parameters, its.bias);
        if (!weight || !bias || weight == its.none || bias == its.none) return none();
    }
    Own type(py.type(x));
    if (type != its.tensor && type != its.parameter) return none();
    if (!answers(x, its.is_neg, its.no) || !answers(x, its.is_inference, its.no)) return none();
    return forward(*s.told, x, weight, bias);
}

// Of the autograd function: forward(ctx, x, weight, bias, (told, y, tables)), and its node's ctx.apply(dy).
SN_COMMON(PyObject *, streamnorm_save)(PyObject *, PyObject *const *args, intptr_t) {
    PyObject *ctx = args[0], *call = args[4];
    Own kept(py.pack(3, args[1], args[2], py.at(call, 2)));
    if (!kept || py.set(ctx, its.to_save, kept) || py.set(ctx, its.told, py.at(call, 0))) return nullptr;
    return another(py.at(call, 1));
}

SN_COMMON(PyObject *, streamnorm_apply)(PyObject *ctx, PyObject *const *args, intptr_t) {
    Own told(py.get(ctx, its.told)), address(told ? py.get(told, its.address) : nullptr);
    if (!address) return nullptr;
    Own made(backward(told_of(address), ctx, args[0]));
    return made != its.none ? made.give() : py.call(its.otherwise, ctx, args[0], (PyObject *)nullptr);
}

// told.fold() and shortcut.fold() -> whether it could
static PyObject *fold(const Told &told) {
    Found h1, h2;
    if (told.folds == NOTHING) return another(its.yes);
    const bool can = told.folds == BOTH && h1.find(told.h1, told.wide_bits, told.slots) &&
                     (!told.has_h2 || h2.find(told.h2, told.wide_bits, told.slots));
    if (can) told.fold(&h1.memory, told.has_h2 ? &h2.memory : nullptr, told.slots, told.keep);
    return another(can ? its.yes : its.no);
}
SN_COMMON(PyObject *, streamnorm_fold)(PyObject *self, PyObject *) { return fold(told_of(self)); }
SN_COMMON(PyObject *, streamnorm_shortcut_fold)(PyObject *self, PyObject *) {
    const Shortcut &s = *(const Shortcut *)py.pointer(self);
    return s.memories.hold() ? fold(*s.told) : another(its.no);
}

#endif

// Python and its tensors, as the calls see them. Nothing of Python is linked or included: its functions are handed over
// as pointers, those of its stable ABI alone, so that one library serves every Python. What a tensor is made of comes
// through torch's DLPack exchange table, or, from a torch that has none, through the tensor's own methods.
#pragma once
#include "isa.h"

struct PyObject;  // nothing of it is ever looked into

namespace {

// In the order of `PYTHON` in kernels/calls.py.
struct Python {
    PyObject *(*item)(PyObject *dict, PyObject *key);  // borrowed
    intptr_t (*size)(PyObject *dict);
    PyObject *(*call)(PyObject *f, ...);               // ends with a null
    PyObject *(*call_all)(PyObject *f, PyObject *args, PyObject *kwargs);
    PyObject *(*get)(PyObject *of, PyObject *name);
    int (*set)(PyObject *of, PyObject *name, PyObject *value);
    PyObject *(*pack)(intptr_t n, ...);
    PyObject *(*at)(PyObject *tuple, intptr_t i);      // borrowed
    intptr_t (*length)(PyObject *tuple);
    PyObject *(*type)(PyObject *of);
    void *(*pointer)(PyObject *number);
    long long (*number)(PyObject *number);
    void (*take)(PyObject *), (*drop)(PyObject *);
    void (*clear_error)(void);
    void *(*release)(void);                            // the interpreter's lock, and take it again
    void (*acquire)(void *);
};

// In the order of `OBJECTS` there; they live as long as the process.
struct Objects {
    PyObject *none, *yes, *no;
    PyObject *tensor, *parameter;                              // types
    PyObject *float32, *float64, *bfloat16, *float16, *int64;  // dtypes
    PyObject *empty_like, *new_empty, *grad_enabled, *threads; // torch's functions
    PyObject *apply, *as_read, *like, *otherwise;              // ours, of fused.py
    PyObject *weight, *bias, *tables, *address, *told;         // names
    PyObject *to_save, *saved_tensors, *needs_input_grad;
    PyObject *is_neg, *is_inference, *is_cpu, *data_ptr, *dtype, *shape, *stride;
};

// DLPack 1: a tensor seen from outside.
struct View {
    void *data;
    int32_t device, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t *shape, *stride;
    uint64_t offset;
};
struct Exchange {
    uint32_t version, minor_version;
    void *older, *allocate, *own, *give;
    int (*look)(PyObject *tensor, View *out);
    void *stream;
};
constexpr int CPU = 1, INTEGER = 0, FLOAT = 2, BFLOAT = 4, AXES = 8;

Python py;
Objects its;
const Exchange *exchange;

// An object of ours to give back at the end of a block.
struct Own {
    PyObject *o;
    explicit Own(PyObject *o = nullptr) : o(o) {}
    ~Own() { if (o) py.drop(o); }
    Own(const Own &) = delete;
    void operator=(const Own &) = delete;
    operator PyObject *() const { return o; }
    PyObject *give() { PyObject *g = o; o = nullptr; return g; }
};
inline PyObject *another(PyObject *o) { py.take(o); return o; }

// What a method without arguments returns.
inline PyObject *result(PyObject *of, PyObject *method) {
    Own bound(py.get(of, method));
    return bound ? py.call(bound, (PyObject *)nullptr) : nullptr;
}
inline bool answers(PyObject *of, PyObject *method, PyObject *expected) {
    Own answer(result(of, method));
    if (!answer) py.clear_error();
    return answer.o == expected;
}

// What a tensor's own methods tell.
struct Asked {
    View view;
    int64_t numbers[2 * AXES];

    bool ask(PyObject *tensor) {
        Own is_cpu(py.get(tensor, its.is_cpu));
        if (is_cpu != its.yes) return false;
        Own dtype(py.get(tensor, its.dtype)), shape(dtype ? py.get(tensor, its.shape) : nullptr);
        Own stride(shape ? result(tensor, its.stride) : nullptr);
        Own data(stride ? result(tensor, its.data_ptr) : nullptr);
        if (!data) return false;
        const struct { PyObject *dtype; uint8_t code, bits; } known[] = {
            {its.float32, FLOAT, 32}, {its.float64, FLOAT, 64}, {its.bfloat16, BFLOAT, 16}, {its.float16, FLOAT, 16},
            {its.int64, INTEGER, 64}};
        view = {py.pointer(data), CPU, 0, (int32_t)py.length(shape), 0, 0, 1, numbers, numbers + AXES, 0};
        for (auto &k : known)
            if (dtype == k.dtype) view.code = k.code, view.bits = k.bits;
        if (!view.bits || view.ndim > AXES) return false;
        for (int i = 0; i < view.ndim; ++i) {
            numbers[i] = py.number(py.at(shape, i));
            numbers[AXES + i] = py.number(py.at(stride, i));
        }
        return true;
    }
};

// A tensor of the CPU, itself and no subclass; false: it is none, or does not tell.
struct Tensor : Asked {
    bool look(PyObject *tensor) {
        Own type(py.type(tensor));
        if (type != its.tensor && type != its.parameter) return false;
        const bool seen = exchange ? !exchange->look(tensor, &view) : ask(tensor);
        if (!seen) py.clear_error();
        return seen && view.device == CPU;
    }
    char *data() const { return (char *)view.data + view.offset; }
    bool is(int code, int bits) const { return view.code == code && view.bits == bits && view.lanes == 1; }

    // Values that lie one after another, so many of them.
    bool holds(int code, int bits, int64_t values) const {
        int64_t count = 1;
        for (int i = view.ndim; i--; count *= view.shape[i])
            if (view.shape[i] != 1 && view.stride[i] != count) return false;
        return is(code, bits) && count == values;
    }
};

}  // namespace

// Shared by the operators: the kernels behind them, and how they read and make tensors. Only the files named register
// include it, which depend on torch. An operator checks dtypes, sizes and strides; by empty results or a code it asks
// for the fallback, with nothing changed: it cannot raise.
#pragma once
#include <string.h>

#include "call.h"
#include "shim.h"

struct sn_layer;
struct sn_net;

// Of the instruction set in use, by dtype; in the order of `REGISTERED` in streamnorm/ops/library.py.
struct sn_kernels {
    typedef int Forward(const sn_plan *, const sn_memory *, const void *x, const void *weight, const void *bias, void *y,
                        void *kept, void *scratch, int threads);
    typedef int Backward(const sn_plan *, const sn_memory *, const void *x, const void *weight, const void *dy, void *kept,
                         void *scratch, void *dx, void *dweight, void *dbias, int threads);
    typedef void Fold(const sn_memory *, const sn_memory *, int64_t slots, const double *keep);
    Forward *forward[4];
    Backward *backward[4];
    Fold *fold[2];
    int (*scan_forward[2])(const sn_layer *);
    void (*scan_backward[2])(const sn_layer *);
    void (*online[2])(sn_net *);
};
extern sn_kernels kernels;
// Torch's numbers for dtypes and the device, known once the operators are registered.
extern int32_t FLOAT, DOUBLE, INT64, UINT8, CPU, DTYPES[4];

void scan_forward(sn_value *stack, uint64_t arguments, uint64_t results);
void scan_backward(sn_value *stack, uint64_t arguments, uint64_t results);
void gather(sn_value *stack, uint64_t arguments, uint64_t results);
void online(sn_value *stack, uint64_t arguments, uint64_t results);

namespace {

inline int64_t bytes_of(int32_t dtype) { return dtype == DOUBLE ? sizeof(double) : sizeof(float); }

// A tensor that is owned elsewhere.
struct View {
    sn_tensor handle = nullptr;

    View() = default;
    explicit View(sn_value value) { memcpy(&handle, &value, sizeof handle); }

    void *data() const {
        void *at = nullptr;
        aoti_torch_get_data_ptr(handle, &at);
        return at;
    }
    int64_t numel() const {
        int64_t n = 0;
        aoti_torch_get_numel(handle, &n);
        return n;
    }
    int32_t dtype() const {  // -1: not on the CPU
        int32_t mine = -1, device = -1;
        return aoti_torch_get_dtype(handle, &mine) || aoti_torch_get_device_type(handle, &device) || device != CPU ? -1 : mine;
    }
    bool look(int64_t &ndim, int64_t *&sizes, int64_t *&strides) const {
        return !aoti_torch_get_dim(handle, &ndim) && !aoti_torch_get_sizes(handle, &sizes) &&
               !aoti_torch_get_strides(handle, &strides);
    }
    bool is_dense() const {  // contiguous in the order of the axes
        int64_t ndim, *sizes, *strides, dense = 1;
        if (!look(ndim, sizes, strides)) return false;
        for (int64_t i = ndim - 1; i >= 0; i--) {
            if (sizes[i] != 1 && strides[i] != dense) return false;
            dense *= sizes[i];
        }
        return true;
    }
    bool holds(int32_t type, int64_t values) const { return dtype() == type && numel() == values && is_dense(); }
    // Whether this is an input of this call, or a gradient like it.
    bool is_like(const sn_call &c) const {
        int64_t ndim, *sizes, *strides;
        if (dtype() != DTYPES[c.dtype] || !look(ndim, sizes, strides) || ndim != c.ndim) return false;
        for (int64_t i = 0; i < ndim; i++)
            if (sizes[i] != c.shape[i] || (sizes[i] != 1 && strides[i] != c.stride[i])) return false;
        return true;
    }
};

// A tensor handle, deleted at the end of its scope.
struct Tensor : View {
    using View::View;
    Tensor(const Tensor &) = delete;
    void operator=(const Tensor &) = delete;
    ~Tensor() { if (handle) aoti_torch_delete_tensor_object(handle); }

    sn_value give() {
        sn_value value = 0;
        memcpy(&value, &handle, sizeof handle);
        handle = nullptr;
        return value;
    }
    bool make(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype) {
        return !aoti_torch_empty_strided(ndim, sizes, strides, dtype, CPU, 0, &handle);
    }
    bool make(int64_t values, int32_t dtype) {
        const int64_t one = 1;
        return make(1, &values, &one, dtype);
    }
    bool make_like(const sn_call &c) { return make(c.ndim, c.shape, c.stride, DTYPES[c.dtype]); }
};

// The tensors from one place of the stack on. They are released at the end, so results must come before them.
struct Rest {
    sn_value *stack;
    const uint64_t from, to;

    ~Rest() { for (uint64_t i = from; i < to; i++) Tensor gone(stack[i]); }
    View operator[](uint64_t i) const { return View(stack[from + i]); }
};

// As many as torch uses.
inline int threads() { return sn_parallel_ ? sn_most_threads_() : 1; }

inline int32_t wide(const sn_call &c) { return c.dtype == SN_F64 ? DOUBLE : FLOAT; }

// A layer's parameters, if the tensor holds them.
inline const sn_call *call_in(const View &bytes) {
    return bytes.holds(UINT8, sizeof(sn_call)) ? (const sn_call *)bytes.data() : nullptr;
}

// H1 or H2 in its two buffers.
template <class V>
bool find(const sn_stream &s, int64_t slots, int32_t dtype, const V &tables, const V &counts, sn_memory &h) {
    if (!tables.holds(dtype, s.at.tables * 2 * slots) || !counts.holds(INT64, s.at.counts)) return false;
    char *table = (char *)tables.data();
    const int64_t bytes = 2 * slots * bytes_of(dtype);
    int64_t *count = (int64_t *)counts.data();
    h = {table + s.at.long_ * bytes, table + s.at.short_ * bytes, table + s.at.estimate * bytes, count + s.at.count,
         count + s.at.updates, count + s.at.seen, count + s.at.skipped, s.rule};
    return true;
}

// A gain or bias, (slots), or nothing.
inline bool read(const View &parameter, const sn_call &c, const void *&at) {
    at = nullptr;
    if (parameter.numel() == 0) return true;
    int64_t ndim = 0;
    if (!parameter.holds(wide(c), c.slots) || aoti_torch_get_dim(parameter.handle, &ndim) || ndim != 1) return false;
    at = parameter.data();
    return true;
}

// Empty results: use the fallback.
inline void none(sn_value *stack, int results) {
    for (int i = 0; i < results; i++) {
        Tensor empty;
        empty.make(0, FLOAT);
        stack[i] = empty.give();
    }
}

}  // namespace

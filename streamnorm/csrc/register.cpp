// The kernels as torch operators: the one file that knows torch. An operator looks at dtypes, sizes and strides, and says
// by empty results, with everything as it was, that a call has to be done otherwise: it cannot raise.
#include "call.h"
#include "shim.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

#include <string.h>

namespace {

typedef int Forward(const sn_plan *, const sn_memory *, const void *x, const void *weight, const void *bias, void *y,
                    void *kept, void *scratch, int threads);
typedef int Backward(const sn_plan *, const sn_memory *, const void *x, const void *weight, const void *dy, void *kept,
                     void *scratch, void *dx, void *dweight, void *dbias, int threads);
typedef void Fold(const sn_memory *, const sn_memory *, int64_t slots, const double *keep);

// Of the instruction set in use, by dtype; mirrored by `register` in kernels/library.py.
struct Kernels {
    Forward *forward[4];
    Backward *backward[4];
    Fold *fold[2];
};
Kernels kernels;
int32_t FLOAT, DOUBLE, INT64, UINT8, CPU, DTYPES[4];

// A tensor for as long as it is looked at.
struct Tensor {
    sn_tensor handle = nullptr;

    Tensor() = default;
    explicit Tensor(sn_value value) { memcpy(&handle, &value, sizeof handle); }
    Tensor(const Tensor &) = delete;
    void operator=(const Tensor &) = delete;
    ~Tensor() { if (handle) aoti_torch_delete_tensor_object(handle); }

    sn_value give() {
        sn_value value = 0;
        memcpy(&value, &handle, sizeof handle);
        handle = nullptr;
        return value;
    }
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
    bool is(int32_t dtype) const {
        int32_t mine = -1, device = -1;
        return !aoti_torch_get_dtype(handle, &mine) && mine == dtype && !aoti_torch_get_device_type(handle, &device) &&
               device == CPU;
    }
    bool look(int64_t &ndim, int64_t *&sizes, int64_t *&strides) const {
        return !aoti_torch_get_dim(handle, &ndim) && !aoti_torch_get_sizes(handle, &sizes) &&
               !aoti_torch_get_strides(handle, &strides);
    }
    // `values` of this dtype, one after another in the order of the axes.
    bool holds(int32_t dtype, int64_t values) const {
        int64_t ndim, *sizes, *strides, dense = 1;
        if (!is(dtype) || numel() != values || !look(ndim, sizes, strides)) return false;
        for (int64_t i = ndim - 1; i >= 0; i--) {
            if (sizes[i] != 1 && strides[i] != dense) return false;
            dense *= sizes[i];
        }
        return true;
    }
    // The input of this call, or a gradient beside it.
    bool is_like(const sn_call &c) const {
        int64_t ndim, *sizes, *strides;
        if (!is(DTYPES[c.dtype]) || !look(ndim, sizes, strides) || ndim != c.ndim) return false;
        for (int64_t i = 0; i < ndim; i++)
            if (sizes[i] != c.shape[i] || (sizes[i] != 1 && strides[i] != c.stride[i])) return false;
        return true;
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

// As many as torch computes with.
int threads() { return sn_parallel_ ? sn_most_threads_() : 1; }

int32_t wide(const sn_call &c) { return c.dtype == SN_F64 ? DOUBLE : FLOAT; }

// What a layer tells, if the tensor holds that.
const sn_call *call_in(const Tensor &bytes) {
    return bytes.holds(UINT8, sizeof(sn_call)) ? (const sn_call *)bytes.data() : nullptr;
}

// H1 or H2 in its two buffers.
bool find(const sn_stream &s, int64_t slots, int32_t dtype, const Tensor &tables, const Tensor &counts, sn_memory &h) {
    if (!tables.holds(dtype, s.at.tables * 2 * slots) || !counts.holds(INT64, s.at.counts)) return false;
    char *table = (char *)tables.data();
    const int64_t bytes = 2 * slots * (dtype == DOUBLE ? sizeof(double) : sizeof(float));
    int64_t *count = (int64_t *)counts.data();
    h = {table + s.at.long_ * bytes, table + s.at.short_ * bytes, table + s.at.estimate * bytes, count + s.at.count,
         count + s.at.updates, count + s.at.seen, count + s.at.skipped, s.rule};
    return true;
}

// A gain or bias, (slots), or nothing.
bool read(const Tensor &parameter, const sn_call &c, const void *&at) {
    at = nullptr;
    if (parameter.numel() == 0) return true;
    int64_t ndim = 0;
    if (!parameter.holds(wide(c), c.slots) || aoti_torch_get_dim(parameter.handle, &ndim) || ndim != 1) return false;
    at = parameter.data();
    return true;
}

// Empty results: to be done otherwise.
void none(sn_value *stack, int results) {
    for (int i = 0; i < results; i++) {
        Tensor empty;
        empty.make(0, FLOAT);
        stack[i] = empty.give();
    }
}

void forward(sn_value *stack, uint64_t, uint64_t) {
    Tensor x(stack[0]), weight(stack[1]), bias(stack[2]), tables(stack[3]), counts(stack[4]), bytes(stack[5]), y, kept;
    const sn_call *c = call_in(bytes);
    const void *gain, *shift;
    sn_memory h;
    const bool fine = c && x.is_like(*c) && read(weight, *c, gain) && read(bias, *c, shift) &&
                      (!c->has_f || find(c->f, c->slots, wide(*c), tables, counts, h)) && y.make_like(*c) &&
                      kept.make(c->kept + c->scratch, wide(*c));
    if (fine) {
        char *room = (char *)kept.data();
        const int64_t bytes_kept = c->kept * (wide(*c) == DOUBLE ? sizeof(double) : sizeof(float));
        if (!kernels.forward[c->dtype](&c->plan, c->has_f ? &h : nullptr, x.data(), gain, shift, y.data(), room,
                                       room + bytes_kept, threads())) {
            stack[0] = y.give(), stack[1] = kept.give();
            return;
        }
    }
    none(stack, 2);
}

// needs: 1, dx; 2, the gradient of the gain; 4, of the bias. G is about the gradient of the input: where nobody wants
// that, nothing is remembered.
void backward(sn_value *stack, uint64_t, uint64_t) {
    Tensor dy(stack[0]), x(stack[1]), weight(stack[2]), kept(stack[3]), tables(stack[4]), counts(stack[5]), bytes(stack[6]);
    const int64_t needs = (int64_t)stack[7];
    Tensor made[3];
    const sn_call *c = call_in(bytes);
    const void *gain;
    sn_memory h;
    const bool remembers = c && c->has_g && needs & 1;
    bool fine = c && dy.is_like(*c) && x.is_like(*c) && kept.holds(wide(*c), c->kept + c->scratch) &&
                read(weight, *c, gain) && (!remembers || find(c->g, c->slots, wide(*c), tables, counts, h)) &&
                (needs & 1 ? made[0].make_like(*c) : made[0].make(0, FLOAT));
    for (int i = 1; fine && i < 3; i++) fine = made[i].make(needs >> i & 1 ? c->slots : 0, wide(*c));
    if (fine) {
        char *room = (char *)kept.data();
        const int64_t bytes_kept = c->kept * (wide(*c) == DOUBLE ? sizeof(double) : sizeof(float));
        void *data[3];
        for (int i = 0; i < 3; i++) data[i] = needs >> i & 1 ? made[i].data() : nullptr;
        fine = !kernels.backward[c->dtype](&c->plan, remembers ? &h : nullptr, x.data(), gain, dy.data(), room,
                                           room + bytes_kept, data[0], data[1], data[2], threads());
    }
    if (fine)
        for (int i = 0; i < 3; i++) stack[i] = made[i].give();
    else none(stack, 3);
}

// The weight update of both memories; whether it could be done.
void fold(sn_value *stack, uint64_t, uint64_t) {
    Tensor tables_f(stack[0]), counts_f(stack[1]), tables_g(stack[2]), counts_g(stack[3]), bytes(stack[4]);
    const sn_call *c = call_in(bytes);
    sn_memory f, g;
    const bool fine = c && (!c->has_f || find(c->f, c->slots, wide(*c), tables_f, counts_f, f)) &&
                      (!c->has_g || find(c->g, c->slots, wide(*c), tables_g, counts_g, g));
    if (fine) {
        const double keep[4] = {c->f.keep[0], c->f.keep[1], c->g.keep[0], c->g.keep[1]};
        kernels.fold[wide(*c) == DOUBLE](c->has_f ? &f : nullptr, c->has_g ? &g : nullptr, c->slots, keep);
    }
    stack[0] = fine;
}

}  // namespace

// Define the operators, once a process. Returns 0, or an error code of torch's.
SN_COMMON(int, streamnorm_register)(const Kernels *given) {
    static sn_torch_library define, cpu, autograd;  // they stay: an operator that is gone would leave a hole
    kernels = *given;
    if (define) return 0;
    FLOAT = aoti_torch_dtype_float32(), DOUBLE = aoti_torch_dtype_float64(), INT64 = aoti_torch_dtype_int64();
    UINT8 = aoti_torch_dtype_uint8(), CPU = aoti_torch_device_type_cpu();
    DTYPES[SN_F32] = FLOAT, DTYPES[SN_F64] = DOUBLE;
    DTYPES[SN_BF16] = aoti_torch_dtype_bfloat16(), DTYPES[SN_F16] = aoti_torch_dtype_float16();
    static const char *const SCHEMAS[] = {
        "forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!) tables, Tensor(b!) counts, Tensor call) "
        "-> (Tensor y, Tensor kept)",
        "backward(Tensor dy, Tensor x, Tensor weight, Tensor kept, Tensor(a!) tables, Tensor(b!) counts, Tensor call, "
        "int needs) -> (Tensor dx, Tensor dweight, Tensor dbias)",
        "fold(Tensor(a!) tables_f, Tensor(b!) counts_f, Tensor(c!) tables_g, Tensor(d!) counts_g, Tensor call) -> bool",
    };
    static const char *const NAMES[] = {"forward", "backward", "fold"};
    static const sn_operator OPERATORS[] = {forward, backward, fold};
    int failed = aoti_torch_library_init_def("streamnorm", __FILE__, __LINE__, &define);
    // They have no gradient of their own, so the key of autograd, which comes first, has the same function.
    failed = failed || aoti_torch_library_init_impl("streamnorm", "CPU", __FILE__, __LINE__, &cpu);
    failed = failed || aoti_torch_library_init_impl("streamnorm", "AutogradCPU", __FILE__, __LINE__, &autograd);
    for (int i = 0; i < 3; i++) {
        failed = failed || aoti_torch_library_def(define, SCHEMAS[i]);
        failed = failed || aoti_torch_library_impl(cpu, NAMES[i], OPERATORS[i]);
        failed = failed || aoti_torch_library_impl(autograd, NAMES[i], OPERATORS[i]);
    }
    return failed;
}

#endif

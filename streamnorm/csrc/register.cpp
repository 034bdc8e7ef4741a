// The kernels as torch operators: those of a layer, and the registration of all of them.
#include "operators.h"

#define SN_IS_base 1
#if SN_JOIN(SN_IS, SN_ISA)

sn_kernels kernels;
int32_t FLOAT, DOUBLE, INT64, UINT8, CPU, DTYPES[4];

namespace {

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
        const int64_t bytes_kept = c->kept * bytes_of(wide(*c));
        if (!kernels.forward[c->dtype](&c->plan, c->has_f ? &h : nullptr, x.data(), gain, shift, y.data(), room,
                                       room + bytes_kept, threads())) {
            stack[0] = y.give(), stack[1] = kept.give();
            return;
        }
    }
    none(stack, 2);
}

// needs: 1, dx; 2, the gradient of the gain; 4, of the bias. G belongs to the gradient of the input: if that is not
// needed, H2 does not change.
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
        const int64_t bytes_kept = c->kept * bytes_of(wide(*c));
        void *data[3];
        for (int i = 0; i < 3; i++) data[i] = needs >> i & 1 ? made[i].data() : nullptr;
        fine = !kernels.backward[c->dtype](&c->plan, remembers ? &h : nullptr, x.data(), gain, dy.data(), room,
                                           room + bytes_kept, data[0], data[1], data[2], threads());
    }
    if (fine)
        for (int i = 0; i < 3; i++) stack[i] = made[i].give();
    else none(stack, 3);
}

// The weight update of both memories; false: use the fallback.
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

// Torch's shim has no tensor lists before torch 2.10, and the dispatcher allows at most 64 arguments.
#define NORM(i)                                                                                                        \
    ", Tensor weight" #i ", Tensor bias" #i ", Tensor(a" #i "!) tables" #i ", Tensor(b" #i "!) counts" #i ", Tensor call" #i
#define NORMS NORM(0) NORM(1) NORM(2) NORM(3) NORM(4) NORM(5)
#define STATE(i) ", Tensor(" #i "!) " #i
#define STATES(i) STATE(i##0) STATE(i##1) STATE(i##2) STATE(i##3) STATE(i##4) STATE(i##5) STATE(i##6) STATE(i##7)

const struct {
    const char *name, *schema;
    sn_operator function;
} OPERATORS[] = {
    {"forward",
     "forward(Tensor x, Tensor weight, Tensor bias, Tensor(a!) tables, Tensor(b!) counts, Tensor call) "
     "-> (Tensor y, Tensor kept)",
     forward},
    {"backward",
     "backward(Tensor dy, Tensor x, Tensor weight, Tensor kept, Tensor(a!) tables, Tensor(b!) counts, Tensor call, "
     "int needs) -> (Tensor dx, Tensor dweight, Tensor dbias)",
     backward},
    {"fold",
     "fold(Tensor(a!) tables_f, Tensor(b!) counts_f, Tensor(c!) tables_g, Tensor(d!) counts_g, Tensor call) -> bool",
     fold},
    {"scan_forward",
     "scan_forward(Tensor x, Tensor h0, Tensor matrix, int relu, int blocks" NORMS ") -> (Tensor out, Tensor tape)",
     scan_forward},
    {"scan_backward",
     "scan_backward(Tensor dout, Tensor tape, Tensor x, Tensor matrix, int relu, int blocks, int learns" NORMS ") "
     "-> (Tensor dh0, Tensor dx, Tensor dmatrix, Tensor dgains)",
     scan_backward},
    {"gather", "gather(Tensor(seen!) seen, int first" STATES(a) STATES(b) STATES(c) ") -> bool", gather},
    {"online",
     "online(Tensor specs, Tensor numbers, Tensor(a!) seen, Tensor x, Tensor targets, Tensor(b!) losses, "
     "Tensor(c!) outputs, int loss, int moves, int raises) -> (int learned, int skipped, int latest, int why)",
     online},
};

}  // namespace

// Define the operators, once per process, for these kernels. Returns 0, or an error code.
SN_COMMON(int, streamnorm_register)(const sn_kernels *given, int pointers) {
    static sn_torch_library define, cpu, autograd;  // kept forever: operators must not be unregistered
    if (pointers * sizeof(void *) != sizeof kernels) return -1;
    kernels = *given;
    if (define) return 0;
    FLOAT = aoti_torch_dtype_float32(), DOUBLE = aoti_torch_dtype_float64(), INT64 = aoti_torch_dtype_int64();
    UINT8 = aoti_torch_dtype_uint8(), CPU = aoti_torch_device_type_cpu();
    DTYPES[SN_F32] = FLOAT, DTYPES[SN_F64] = DOUBLE;
    DTYPES[SN_BF16] = aoti_torch_dtype_bfloat16(), DTYPES[SN_F16] = aoti_torch_dtype_float16();
    int failed = aoti_torch_library_init_def("streamnorm", __FILE__, __LINE__, &define);
    // They have no autograd formula, so the autograd key, which is dispatched first, has the same function.
    failed = failed || aoti_torch_library_init_impl("streamnorm", "CPU", __FILE__, __LINE__, &cpu);
    failed = failed || aoti_torch_library_init_impl("streamnorm", "AutogradCPU", __FILE__, __LINE__, &autograd);
    for (const auto &o : OPERATORS) {
        failed = failed || aoti_torch_library_def(define, o.schema);
        failed = failed || aoti_torch_library_impl(cpu, o.name, o.function);
        failed = failed || aoti_torch_library_impl(autograd, o.name, o.function);
    }
    return failed;
}

#endif

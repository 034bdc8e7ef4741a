// The functions of torch's C shim that the operators need, declared by hand: no torch headers, and one binary for every
// version from 2.7 on. At link time `stub.c` stands in for torch's library.
#pragma once
#include <stdint.h>

typedef struct AtenTensorOpaque *sn_tensor;
typedef struct TorchLibraryOpaque *sn_torch_library;
// A value on the dispatcher's stack: the bits of a number, or a tensor handle, which the reader has to delete.
typedef uint64_t sn_value;
typedef void (*sn_operator)(sn_value *stack, uint64_t arguments, uint64_t results);

// All return 0, or an error code.
extern "C" {
int32_t aoti_torch_library_init_def(const char *space, const char *file, uint32_t line, sn_torch_library *);
int32_t aoti_torch_library_init_impl(const char *space, const char *key, const char *file, uint32_t line,
                                     sn_torch_library *);
int32_t aoti_torch_library_def(sn_torch_library, const char *schema);
int32_t aoti_torch_library_impl(sn_torch_library, const char *name, sn_operator);
int32_t aoti_torch_get_data_ptr(sn_tensor, void **);
int32_t aoti_torch_get_dim(sn_tensor, int64_t *);
int32_t aoti_torch_get_numel(sn_tensor, int64_t *);
int32_t aoti_torch_get_sizes(sn_tensor, int64_t **);
int32_t aoti_torch_get_strides(sn_tensor, int64_t **);
int32_t aoti_torch_get_dtype(sn_tensor, int32_t *);
int32_t aoti_torch_get_device_type(sn_tensor, int32_t *);
int32_t aoti_torch_delete_tensor_object(sn_tensor);
int32_t aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                                 int32_t index, sn_tensor *);
// These return what they are named after.
int32_t aoti_torch_dtype_float32(void), aoti_torch_dtype_float64(void), aoti_torch_dtype_bfloat16(void),
    aoti_torch_dtype_float16(void), aoti_torch_dtype_int64(void), aoti_torch_dtype_uint8(void),
    aoti_torch_device_type_cpu(void);
}

/* torch_stable.h - the part of LibTorch's stable C ABI that we call, for a C11 compiler.
 *
 * Torch ships these functions extern "C", but the headers that declare them only parse as C++, and
 * we build without torch. tests/abi includes torch's headers and this one together, so a compiler
 * proves that every declaration below still agrees with torch's. Floor: torch 2.11.
 */
#ifndef TORCH_STABLE_H
#define TORCH_STABLE_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* the release this file is written against, as torch encodes it */
#define TORCH_STABLE_VERSION ((UINT64_C(2) << 56) | (UINT64_C(11) << 48))

typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct StableListOpaque *StableListHandle;
typedef struct DeviceGuardOpaque *DeviceGuardHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef int32_t AOTITorchError;
typedef uint64_t StableIValue;

/* ---- registration ------------------------------------------------------------------- */
AOTITorchError aoti_torch_library_init_def(const char *ns, const char *file, uint32_t line, TorchLibraryHandle *ret);
AOTITorchError aoti_torch_library_init_impl(const char *ns, const char *key, const char *file, uint32_t line,
                                            TorchLibraryHandle *ret);
AOTITorchError aoti_torch_library_def(TorchLibraryHandle self, const char *schema);
AOTITorchError torch_library_impl(TorchLibraryHandle self, const char *name,
                                  void (*fn)(StableIValue *, uint64_t, uint64_t), uint64_t extension_build_version);

/* ---- tensors ------------------------------------------------------------------------ */
int32_t aoti_torch_device_type_cpu(void);
int32_t aoti_torch_dtype_float32(void);
int32_t aoti_torch_dtype_float64(void);
int32_t aoti_torch_dtype_float16(void);
int32_t aoti_torch_dtype_bfloat16(void);
int32_t aoti_torch_dtype_int64(void);
int32_t aoti_torch_dtype_uint8(void);
int32_t aoti_torch_memory_format_contiguous_format(void);
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t *ret);
AOTITorchError aoti_torch_get_numel(AtenTensorHandle t, int64_t *ret);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t **ret);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t **ret);
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle t, int64_t *ret);
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle t, int64_t *ret);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t *ret);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t *ret);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle t, int32_t *ret);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle t, bool *ret);
AOTITorchError torch_get_const_data_ptr(AtenTensorHandle t, const void **ret);
AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle t, void **ret);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype,
                                        int32_t device_type, int32_t device_index, AtenTensorHandle *ret);

/* ---- lists, dispatcher, threads, errors --------------------------------------------- */
AOTITorchError torch_list_size(StableListHandle l, size_t *ret);
AOTITorchError torch_list_get_item(StableListHandle l, size_t i, StableIValue *ret);
AOTITorchError torch_delete_list(StableListHandle l);
AOTITorchError torch_call_dispatcher(const char *op, const char *overload, StableIValue *stack, uint64_t build_version);
typedef void (*ParallelFunc)(int64_t begin, int64_t end, void *ctx);
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc fn, void *ctx);
AOTITorchError torch_get_num_threads(uint32_t *ret);
/* cond == false throws inside libtorch and unwinds through our frames */
void aoti_torch_check(bool cond, const char *func, const char *file, uint32_t line, const char *msg);

/* ---- CUDA: the guard in libtorch_cpu, the others in libtorch_cuda ------------------- */
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle *ret);
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle g);
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void **ret);
AOTITorchError torch_get_current_cuda_blas_handle(void **ret);

/* ---- newer than the floor: weak, so NULL where torch has them not ---------------------- */
#pragma weak torch_library_def_with_tags
#pragma weak torch_tag_pt2_compliant_tag
#pragma weak torch_exception_get_what_without_backtrace
AOTITorchError torch_library_def_with_tags(TorchLibraryHandle self, const char *schema, const int32_t *tags,
                                           int32_t n);        /* 2.12 */
int32_t torch_tag_pt2_compliant_tag(void);                    /* 2.12 */
const char *torch_exception_get_what_without_backtrace(void); /* 2.13 */

#ifdef __cplusplus
}
#endif
#endif

/* shim.c - tensors, lists and errors, once for every op. See shim.h for the pattern. */
#define _GNU_SOURCE /* syscall */
#include "shim.h"
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#ifndef SUBSPACE_DEVICE_CUDA
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

call begin(const char *op)
{
    return (call){.op = op};
}

bool require(call *c, bool condition, const char *format, ...)
{
    if (condition || c->failed) return !c->failed;
    va_list args;
    const int used = snprintf(c->ctx.message, sizeof c->ctx.message, "%s: ", c->op);
    va_start(args, format);
    vsnprintf(c->ctx.message + used, sizeof c->ctx.message - (size_t)used, format, args);
    va_end(args);
    c->failed = true;
    return false;
}

/* What torch said of its last error. */
static const char *reason(void)
{
    return torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace()
                                                      : "torch refused (see the message it printed)";
}

static bool torch_ok(call *c, AOTITorchError error, const char *what)
{
    if (error == 0) return true;
    return require(c, false, "%s: %s", what, reason());
}

#define TORCH(call_) torch_ok(c, (call_), #call_)

static bool own(call *c, AtenTensorHandle h)
{
    if (c->count == c->capacity) {
        const size_t capacity = c->capacity ? 2 * c->capacity : 16;
        AtenTensorHandle *owned = realloc(c->owned, capacity * sizeof *owned);
        if (!owned) {
            aoti_torch_delete_tensor_object(h);
            return require(c, false, "out of memory");
        }
        c->owned = owned, c->capacity = capacity;
    }
    c->owned[c->count++] = h;
    return true;
}

static void disown(call *c, AtenTensorHandle h)
{
    for (size_t i = 0; i < c->count; i++)
        if (c->owned[i] == h) c->owned[i] = c->owned[--c->count];
}

static StableIValue from_pointer(const void *p)
{
    return (StableIValue)(uintptr_t)p;
}

static bool view(call *c, tensor *t, AtenTensorHandle h)
{
    int64_t *size = NULL;
    t->h = h;
    const bool ok = TORCH(aoti_torch_get_dim(h, &t->dim)) && TORCH(aoti_torch_get_numel(h, &t->numel)) &&
                    TORCH(aoti_torch_get_sizes(h, &size)) && TORCH(aoti_torch_get_dtype(h, &t->dtype)) &&
                    TORCH(aoti_torch_get_device_type(h, &t->device)) &&
                    TORCH(aoti_torch_get_device_index(h, &t->index));
    t->size = size;
    return ok;
}

/* Bytes of an entry; 1, the least, of the dtypes that no op takes. */
static size_t item_size(int32_t dtype)
{
    if (dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_int64()) return 8;
    if (dtype == aoti_torch_dtype_float32()) return 4;
    return dtype == aoti_torch_dtype_float16() || dtype == aoti_torch_dtype_bfloat16() ? 2 : 1;
}

/* Does the storage hold every element? torch hands out the address of one that was given back (FSDP frees what it has
 * gathered by resizing it to nothing), or that was never there (meta), without a word. */
static bool allocated(call *c, AtenTensorHandle h)
{
    tensor t = {0};
    int64_t *stride = NULL, last = 0, bytes = 0;
    if (!view(c, &t, h)) return false;
    if (t.numel == 0) return true;
    if (!TORCH(aoti_torch_get_strides(h, &stride)) || !TORCH(aoti_torch_get_storage_offset(h, &last)) ||
        !TORCH(aoti_torch_get_storage_size(h, &bytes)))
        return false;
    for (int64_t i = 0; i < t.dim; i++) last += (t.size[i] - 1) * stride[i];
    return require(c, last < bytes / (int64_t)item_size(t.dtype),
                   "a tensor of %lld elements has a storage of %lld bytes: its memory is not allocated, or was freed",
                   (long long)t.numel, (long long)bytes);
}

static bool take(call *c, StableIValue v, bool written, tensor *t)
{
    AtenTensorHandle h = (AtenTensorHandle)(uintptr_t)v;
    const void *data = NULL;
    bool dense = false;
    if (!own(c, h) || !allocated(c, h) || !TORCH(aoti_torch_is_contiguous(h, &dense))) return false;
    if (!dense) {
        if (!require(c, !written, "a tensor that is written to must be contiguous")) return false;
        StableIValue stack[2] = {from_pointer(h), (StableIValue)aoti_torch_memory_format_contiguous_format()};
        disown(c, h); /* the dispatcher takes its arguments over */
        if (!TORCH(torch_call_dispatcher("aten::contiguous", "", stack, TORCH_STABLE_VERSION))) return false;
        h = (AtenTensorHandle)(uintptr_t)stack[0];
        if (!own(c, h)) return false;
    }
    if (!view(c, t, h)) return false;
    if (written) return TORCH(torch_get_mutable_data_ptr(h, &t->data));
    if (!TORCH(torch_get_const_data_ptr(h, &data))) return false;
    t->data = (void *)(uintptr_t)data;
    return true;
}

bool tensor_in(call *c, StableIValue v, tensor *t)
{
    return take(c, v, false, t);
}

bool tensor_inout(call *c, StableIValue v, tensor *t)
{
    return take(c, v, true, t);
}

/* Deleting a list does not delete the handles in it: each one is owned by us before anything can fail. */
bool tensors_in(call *c, StableIValue v, bool written, tensor **list, size_t *count)
{
    StableListHandle l = (StableListHandle)(uintptr_t)v;
    size_t got = 0;
    StableIValue *items = NULL;
    bool ok = TORCH(torch_list_size(l, count));
    if (ok && *count) {
        items = malloc(*count * sizeof *items);
        *list = calloc(*count, sizeof **list);
        ok = require(c, items && *list, "out of memory");
        while (ok && got < *count) {
            ok = TORCH(torch_list_get_item(l, got, &items[got]));
            got += ok;
        }
    }
    torch_delete_list(l);
    for (size_t i = 0; i < got; i++)
        if (ok) ok = take(c, items[i], written, &(*list)[i]);
        else aoti_torch_delete_tensor_object((AtenTensorHandle)(uintptr_t)items[i]);
    free(items);
    return ok;
}

bool tensor_empty(call *c, tensor *t, int64_t dim, const int64_t *size, int32_t dtype, const tensor *like)
{
    int64_t stride[8], s = 1;
    AtenTensorHandle h = NULL;
    if (!require(c, dim <= 8, "a result of %lld dimensions: there are 8 at most", (long long)dim)) return false;
    for (int64_t i = dim; i-- > 0;) {
        stride[i] = s;
        s *= size[i] > 0 ? size[i] : 1;
    }
    if (aoti_torch_empty_strided(dim, size, stride, dtype, like->device, like->index,
                                 &h)) /* the type of error is lost */
        return require(c, false, "no memory for %.1f MiB of temporaries or results: %s",
                       (double)s * (double)item_size(dtype) / (1 << 20), reason());
    return own(c, h) && view(c, t, h) && TORCH(torch_get_mutable_data_ptr(h, &t->data));
}

bool workspace(call *c, size_t bytes, const tensor *like)
{
    tensor t;
    const int64_t size = (int64_t)bytes;
    if (bytes == 0) return true;
    if (!tensor_empty(c, &t, 1, &size, aoti_torch_dtype_uint8(), like)) return false;
    c->ctx.workspace = t.data, c->ctx.workspace_bytes = bytes;
    return true;
}

#ifdef SUBSPACE_DEVICE_CUDA
bool on_device_of(call *c, const tensor *t)
{
    c->ctx.threads = 1;
    return TORCH(aoti_torch_create_device_guard(t->index, &c->guard)) &&
           TORCH(aoti_torch_get_current_cuda_stream(t->index, &c->ctx.stream)) &&
           TORCH(torch_get_current_cuda_blas_handle(&c->ctx.blas));
}
#else
static void torch_pool(int64_t count, int64_t grain, void (*fn)(int64_t, int64_t, void *), void *arg)
{
    if (count > 0) torch_parallel_for(0, count, grain, fn, arg); /* fn never throws: nothing to report */
}

/* Runs what signals have asked for, as the main thread alone may, and says whether the op is to end. */
static int (*run_signals)(void);

__attribute__((visibility("default"))) void torch_subspace_cpu_signals(int (*run_them)(void))
{
    run_signals = run_them;
}

static int interrupted(void)
{
    static int64_t asked; /* tenths of a second */
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
    const int64_t now = (int64_t)t.tv_sec * 10 + t.tv_nsec / 100000000;
    if (now == __atomic_load_n(&asked, __ATOMIC_RELAXED) || syscall(SYS_gettid) != getpid()) return 0;
    __atomic_store_n(&asked, now, __ATOMIC_RELAXED);
    return run_signals();
}

bool on_device_of(call *c, const tensor *t)
{
    uint32_t threads = 1;
    (void)t;
    if (!TORCH(torch_get_num_threads(&threads))) return false;
    c->ctx.threads = threads;
    c->ctx.parallel_for = torch_pool;
    c->ctx.interrupted = run_signals ? interrupted : NULL;
    return true;
}
#endif

bool run(call *c, subspace_status status)
{
    if (status != SUBSPACE_OK) c->failed = true; /* the kernel wrote the message */
    return !c->failed;
}

void finish(call *c, StableIValue *stack, int results, tensor *const *out)
{
    for (int i = 0; i < results && !c->failed; i++) {
        disown(c, out[i]->h);
        stack[i] = from_pointer(out[i]->h);
    }
    for (size_t i = 0; i < c->count; i++) aoti_torch_delete_tensor_object(c->owned[i]); /* stream-ordered on CUDA */
    free(c->owned);
    if (c->guard) aoti_torch_delete_device_guard(c->guard);
    if (c->failed) aoti_torch_check(false, c->op, __FILE__, __LINE__, c->ctx.message);
}

int dtype_of(const tensor *t)
{
    if (t->dtype == aoti_torch_dtype_float32()) return SUBSPACE_F32;
    if (t->dtype == aoti_torch_dtype_float64()) return SUBSPACE_F64;
    if (t->dtype == aoti_torch_dtype_float16()) return SUBSPACE_F16;
    if (t->dtype == aoti_torch_dtype_bfloat16()) return SUBSPACE_BF16;
    return -1;
}

int32_t wide_dtype(const tensor *t)
{
    return t->dtype == aoti_torch_dtype_float64() ? t->dtype : aoti_torch_dtype_float32();
}

/* shim.h - what every op's shim needs: tensors in, an args struct out, one place to raise.
 *
 * A shim file is compiled into both libraries: ON(fn) is fn_cpu in one and fn_cuda in the other.
 * The pattern of a kernel function is
 *
 *     OP(logits, "logits(Tensor x, ...) -> ...")
 *     call c = begin("logits");
 *     if (!tensor_in(&c, stack[0], &x)) goto done;      every handle is owned by the call
 *     ...
 *     run(&c, ON(subspace_logits)(&c.ctx, &a));
 * done:
 *     finish(&c, stack, results, tensors);              releases everything, then raises or returns
 */
#ifndef SUBSPACE_SHIM_H
#define SUBSPACE_SHIM_H
#include "check.h"
#include "torch_stable.h"

#ifdef SUBSPACE_DEVICE_CUDA
#define ON(fn) fn##_cuda
#else
#define ON(fn) fn##_cpu
#endif

/* Leave through `done` on a failed step. */
#define DO(step)                                                                                                       \
    do {                                                                                                               \
        if (!(step)) goto done;                                                                                        \
    } while (0)

typedef struct tensor {
    AtenTensorHandle h;
    int64_t dim, numel;
    const int64_t *size;
    int32_t dtype, device, index;
    void *data;
} tensor;

typedef struct call {
    const char *op;
    subspace_ctx ctx;
    bool failed;
    DeviceGuardHandle guard;
    AtenTensorHandle *owned; /* released by finish(), whatever happened */
    size_t count, capacity;
} call;

typedef void kernel(StableIValue *stack, uint64_t args, uint64_t results);

/* An op of torch's: its schema, and the function that takes those arguments off the stack in that order. What stands
 * here is all that says so: the linker gathers the section, register.c registers what is in it. */
typedef struct op {
    const char *schema;
    kernel *fn;
} op;

#define OP(name, schema)                                                                                               \
    static kernel shim_##name;                                                                                         \
    static const op op_##name __attribute__((used, section("subspace_ops"))) = {schema, shim_##name};                  \
    static void shim_##name(StableIValue *stack, __attribute__((unused)) uint64_t args,                                \
                            __attribute__((unused)) uint64_t results)

call begin(const char *op);

/* Take over an argument; it must be dense, on `like`'s device (NULL: any), else it is copied to be dense. */
bool tensor_in(call *c, StableIValue v, tensor *t);
/* The same for an argument that is written to: it must be dense already. */
bool tensor_inout(call *c, StableIValue v, tensor *t);
/* Take over a Tensor[] argument; *list is freed by the caller. Every tensor is dense; `written` forbids copies. */
bool tensors_in(call *c, StableIValue v, bool written, tensor **list, size_t *count);
bool tensor_empty(call *c, tensor *t, int64_t dim, const int64_t *size, int32_t dtype, const tensor *like);
bool workspace(call *c, size_t bytes, const tensor *like);

bool require(call *c, bool condition, const char *format, ...) __attribute__((format(printf, 3, 4)));
bool run(call *c, subspace_status status);
/* Are both on one device? */
static inline bool together(const tensor *a, const tensor *b)
{
    return a->device == b->device && a->index == b->index;
}

/* Device guard, stream and BLAS handle of the tensor's device (nothing to do on the CPU). */
bool on_device_of(call *c, const tensor *t);

/* Release everything but the results, write them to the stack, or raise. */
void finish(call *c, StableIValue *stack, int results, tensor *const *out);

static inline double as_double(StableIValue v)
{
    union {
        StableIValue v;
        double d;
    } u = {v};
    return u.d;
}

static inline int64_t as_int(StableIValue v)
{
    return (int64_t)v;
}

static inline bool as_bool(StableIValue v)
{
    return (v & 1) != 0;
}

/* subspace_dtype of a floating tensor, or -1. */
int dtype_of(const tensor *t);
/* What we compute and keep results in: float64 for float64, else float32. */
int32_t wide_dtype(const tensor *t);

/* x [b, n], weight [c, k, n] or, with start [c + 1], [rows, n]: the common head of logits and cross_entropy. */
bool logits_args(call *c, const tensor *x, const tensor *weight, const tensor *start, subspace_logits_args *a);

#endif

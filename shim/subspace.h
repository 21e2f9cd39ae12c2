/* subspace.h - the one contract between torch and the kernels.
 *
 * Every op is a few C functions per device, all of the same shape:
 *
 *     size_t          subspace_<op>_workspace_<dev>(const subspace_ctx *, const subspace_<op>_args *);
 *     subspace_status subspace_<op>_<dev>          (subspace_ctx *, const subspace_<op>_args *);
 *     subspace_status subspace_<op>_backward_<dev> (subspace_ctx *, const subspace_<op>_args *);
 *
 * <dev> is cpu or cuda. Arrays are dense and row-major; the comment beside each pointer gives its
 * shape and direction. "or NULL" marks what a call may leave out. A kernel never allocates, prints,
 * aborts, synchronises a stream, or keeps a pointer after it returns.
 */
#ifndef SUBSPACE_H
#define SUBSPACE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum subspace_status {
    SUBSPACE_OK = 0,
    SUBSPACE_INVALID_ARGUMENT,    /* a shape, a dtype or a value is wrong */
    SUBSPACE_WORKSPACE_TOO_SMALL, /* fewer bytes than subspace_<op>_workspace_<dev>() */
    SUBSPACE_NUMERICAL,           /* a factorisation broke down */
    SUBSPACE_BLAS,                /* cuBLAS refused */
    SUBSPACE_CUDA                 /* the CUDA runtime refused */
} subspace_status;

/* Half types are stored as such and computed in float32. */
typedef enum subspace_dtype { SUBSPACE_F32, SUBSPACE_F64, SUBSPACE_F16, SUBSPACE_BF16 } subspace_dtype;

/* What one call may use. The caller owns all of it. */
typedef struct subspace_ctx {
    void *workspace; /* on the op's device, 64-byte aligned */
    size_t workspace_bytes;
    int64_t threads; /* how many threads parallel_for uses at most; 1 on CUDA */
    /* fn over [0, count) in disjoint ranges, each of at least `grain`; returns when all are done */
    void (*parallel_for)(int64_t count, int64_t grain, void (*fn)(int64_t begin, int64_t end, void *arg), void *arg);
    void *stream;      /* cudaStream_t;   NULL on the CPU */
    void *blas;        /* cublasHandle_t; NULL on the CPU */
    char message[256]; /* written only when the status is not OK */
} subspace_ctx;

/* Rows of the classes: class i owns the rows start[i] .. start[i+1]-1 of the weight when the dims
 * are ragged; with start == NULL every class has k rows. */

/* ------------------------------------------------------------------ logits
 *     logits[b,c] = gamma || weight_c x_b ||      x_b divided by its length when `normalize`    */
typedef struct subspace_logits_args {
    subspace_dtype dtype;
    int64_t b, c, k, n, rows; /* batch, classes, dims, features, rows = c*k or start[c] */
    const int64_t *start;     /* [c+1]     in, or NULL: uniform */
    double gamma;
    int normalize;
    const void *x;       /* [b, n]    in */
    const void *weight;  /* [rows, n] in */
    void *logits;        /* [b, c]    forward out */
    void *proj;          /* [rows, b] forward out, backward in, float32 for half types; NULL: recomputed */
    const void *dlogits; /* [b, c]    backward in */
    void *dx;            /* [b, n]    backward out, or NULL */
    void *dweight;       /* [rows, n] backward out, or NULL */
} subspace_logits_args;

subspace_status subspace_logits_check(subspace_ctx *, const subspace_logits_args *);
size_t subspace_logits_workspace_cpu(const subspace_ctx *, const subspace_logits_args *);
subspace_status subspace_logits_cpu(subspace_ctx *, const subspace_logits_args *);
subspace_status subspace_logits_backward_cpu(subspace_ctx *, const subspace_logits_args *);
size_t subspace_logits_workspace_cuda(const subspace_ctx *, const subspace_logits_args *);
subspace_status subspace_logits_cuda(subspace_ctx *, const subspace_logits_args *);
subspace_status subspace_logits_backward_cuda(subspace_ctx *, const subspace_logits_args *);

/* ----------------------------------------------------------- cross_entropy
 * Softmax cross-entropy over the logits above without ever storing them. With the (smoothed,
 * class-weighted) target tau[b,c],
 *     loss[b] = sum_c tau[b,c] (lse[b] - logits[b,c]),     lse[b] = log sum_c exp(logits[b,c])   */
typedef struct subspace_cross_entropy_args {
    subspace_logits_args f;   /* the logits; its logits, proj and dlogits are not used */
    const int64_t *label;     /* [b]    in, or NULL: soft targets */
    const void *soft;         /* [b, c] in, of f.dtype, or NULL: labels */
    const void *class_weight; /* [c]    in, float64, or NULL: ones */
    int64_t ignore_index;     /* rows with this label have loss 0 and no gradient */
    double label_smoothing;
    void *loss;        /* [b]    forward out, float32 for half types */
    void *stats;       /* [2, b] forward out, backward in: lse and sum_c tau; float32 for half types */
    const void *dloss; /* [b]    backward in, of the type of loss */
} subspace_cross_entropy_args;

subspace_status subspace_cross_entropy_check(subspace_ctx *, const subspace_cross_entropy_args *);
size_t subspace_cross_entropy_workspace_cpu(const subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status subspace_cross_entropy_cpu(subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status subspace_cross_entropy_backward_cpu(subspace_ctx *, const subspace_cross_entropy_args *);
size_t subspace_cross_entropy_workspace_cuda(const subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status subspace_cross_entropy_cuda(subspace_ctx *, const subspace_cross_entropy_args *);
subspace_status subspace_cross_entropy_backward_cuda(subspace_ctx *, const subspace_cross_entropy_args *);

/* -------------------------------------------------------------------- rsgd
 * One Riemannian SGD step of every frame, in place. With g = +-grad + weight_decay W,
 *     M  <- momentum M + (1 - dampening) g          dir = nesterov ? g + momentum M : M
 *     D   = dir - (dir W') W                        X   = lr^2 D D'
 *     W  <- f(X) W - lr g(X) D                      f, g given by the retraction
 * A class whose numbers are not finite is left as it was and counted in `skipped`.              */
typedef enum subspace_retraction {
    SUBSPACE_GEODESIC,
    SUBSPACE_POLAR,
    SUBSPACE_QR,
    SUBSPACE_CAYLEY
} subspace_retraction;

typedef struct subspace_frames { /* one parameter: c frames in R^n */
    void *weight;                /* [rows, n] in, out */
    const void *grad;            /* [rows, n] in */
    void *buffer;                /* [rows, n] in, out: the momentum M; NULL when momentum is 0 */
    int64_t c, k, n;             /* with ragged dims k is the largest */
} subspace_frames;

typedef struct subspace_rsgd_args {
    subspace_dtype dtype;          /* SUBSPACE_F32 or SUBSPACE_F64 */
    int64_t count;                 /* parameters */
    const subspace_frames *frames; /* [count] in, on the host */
    const int64_t *start;          /* [c+1]   in, or NULL: uniform; then every parameter has these dims */
    const void *lr;                /* [1] or [c] (lr_per_class) float64 in, on the op's device, or NULL: lr_value */
    double lr_value;
    int lr_per_class;
    double momentum, dampening, weight_decay;
    int nesterov, maximize, parallel; /* parallel: M becomes the transported horizontal direction */
    subspace_retraction retraction;
    int64_t *skipped; /* [1] out, on the op's device */
} subspace_rsgd_args;

subspace_status subspace_rsgd_check(subspace_ctx *, const subspace_rsgd_args *);
size_t subspace_rsgd_workspace_cpu(const subspace_ctx *, const subspace_rsgd_args *);
subspace_status subspace_rsgd_cpu(subspace_ctx *, const subspace_rsgd_args *);
size_t subspace_rsgd_workspace_cuda(const subspace_ctx *, const subspace_rsgd_args *);
subspace_status subspace_rsgd_cuda(subspace_ctx *, const subspace_rsgd_args *);

#ifdef __cplusplus
}
#endif
#endif

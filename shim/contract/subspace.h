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
    SUBSPACE_CUDA,                /* the CUDA runtime refused */
    SUBSPACE_INTERRUPTED          /* as the caller wished */
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
    int (*interrupted)(void); /* or NULL; asked between the steps of what can take long: 1 ends it */
    void *stream;             /* cudaStream_t;   NULL on the CPU */
    void *blas;               /* cublasHandle_t; NULL on the CPU */
    char message[256];        /* written only when the status is not OK */
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

/* ----------------------------------------------------------- cross_entropy
 * Softmax cross-entropy over the logits above without ever storing them. With the (smoothed,
 * class-weighted) target tau[b,c],
 *     loss[b] = sum_c tau[b,c] (lse[b] - logits[b,c]),     lse[b] = log sum_c exp(logits[b,c])
 * With `classes` > c the others are elsewhere: c or more is a label among those, smoothing is over all, and lse, tau
 * and the loss are of the c classes here. Given lse and sum_c tau of all, the backward is that of the whole loss. */
typedef struct subspace_cross_entropy_args {
    subspace_logits_args f;   /* the logits; its logits, proj and dlogits are not used */
    const int64_t *label;     /* [b]    in, or NULL: soft targets */
    const void *soft;         /* [b, c] in, of the type of loss, or NULL: labels */
    const void *class_weight; /* [c]    in, float64, or NULL: ones */
    int64_t ignore_index;     /* rows with this label have loss 0 and no gradient */
    int64_t classes;          /* how many there are in all, or 0: c */
    double label_smoothing;
    void *loss;        /* [b]    forward out, float32 for half types */
    void *stats;       /* [2, b] forward out, backward in: lse and sum_c tau; float32 for half types */
    const void *dloss; /* [b]    backward in, of the type of loss */
} subspace_cross_entropy_args;

/* -------------------------------------------------------------------- rsgd
 * One Riemannian SGD step of every frame, in place. With g = +-grad + weight_decay W,
 *     M  <- momentum M + (1 - dampening) g          dir = nesterov ? g + momentum M : M
 *     D   = dir - (dir W') W                        X   = lr^2 D D'
 *     W  <- f(X) W - lr g(X) D                      f, g given by the retraction
 * On the Grassmannian, that is; on the Stiefel manifold, where the rows themselves count and not their span alone,
 * the direction keeps what turns the rows among themselves, skew(dir W') W, and f and g depend on that too; the
 * momentum is kept tangent, M - sym(M W') W.
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
    int stiefel;                      /* the Stiefel manifold; without parallel */
    subspace_retraction retraction;
    int64_t *skipped; /* [1] out, on the op's device */
} subspace_rsgd_args;

/* ------------------------------------------------------------------ tucker
 *     out = base + scale core x_0 factor_0 x_1 ... x_{N-1} factor_{N-1}                          */
enum { SUBSPACE_MODES = 6 };

typedef struct subspace_tucker_args {
    subspace_dtype dtype;      /* of base, out and dout; the rest is float32 for half types */
    int64_t modes;             /* N, 2 to 6 */
    int64_t d[SUBSPACE_MODES]; /* sizes of out */
    int64_t r[SUBSPACE_MODES]; /* sizes of core */
    double scale;
    const void *core;                   /* [r_0, ..., r_{N-1}] in */
    const void *factor[SUBSPACE_MODES]; /* [d_i, r_i] in, or NULL: the identity, d_i = r_i */
    const void *base;                   /* [d_0, ..., d_{N-1}] in, or NULL: zero; may be out itself */
    void *out;                          /* [d_0, ..., d_{N-1}] forward out */
    const void *dout;                   /* [d_0, ..., d_{N-1}] backward in */
    void *dcore;                        /* [r_0, ..., r_{N-1}] backward out, or NULL */
    void *dfactor[SUBSPACE_MODES];      /* [d_i, r_i] backward out, each or NULL */
} subspace_tucker_args;

/* ----------------------------------------------------------- tucker_linear
 *     y[t] += scale u core v drop(x[t])
 * drop zeroes an entry with probability `dropout` and divides the others by 1 - dropout; which ones is a
 * function of the seed and the entry's place alone (dropout.h), so that nothing is kept for the backward.  */
typedef struct subspace_tucker_linear_args {
    subspace_dtype dtype;    /* of x, y, dy and dx; the rest is float32 for half types */
    int64_t t, n, m, rn, rm; /* rows, inputs, outputs, ranks of both */
    double scale, dropout;   /* 0 <= dropout < 1 */
    const int64_t *seed;     /* [1]      in, on the op's device, or NULL when dropout is 0 */
    const void *x;           /* [t, n]   in */
    const void *core;        /* [rm, rn] in */
    const void *u;           /* [m, rm]  in */
    const void *v;           /* [rn, n]  in; turned: [n, rn] */
    int turned;              /* v and dv lie turned over */
    void *y;                 /* [t, m]   forward in, out */
    const void *dy;          /* [t, m]   backward in */
    void *dx;                /* [t, n]   backward in, out: the gradient is added; or NULL */
    void *dcore, *du, *dv;   /* like core, u and v, as they lie; backward out, each or NULL */
} subspace_tucker_linear_args;

/* ------------------------------------------------------------- tucker_conv
 * The pointwise ends of a convolution's adapter, x and z with channels first or last:
 *     project    z[b,:,p]  = f' drop(x[b,:,p])         df = sum_{b,p} drop(x[b,:,p]) w[b,:,p]'
 *     expand     x[b,:,p] += drop(f z[b,:,p])          drop as above, by the entry's place in x          */
typedef struct subspace_tucker_conv_args {
    subspace_dtype dtype; /* of x; the rest is float32 for half types */
    int64_t b, n, p, r;   /* batch, channels, positions, rank */
    int last;             /* channels last: x is [b, p, n], z and w are [b, p, r] */
    double dropout;
    const int64_t *seed; /* [1]       in, on the op's device, or NULL when dropout is 0 */
    void *x;             /* [b, n, p] project: in; expand: in, out */
    const void *f;       /* [n, r]    in */
    void *z;             /* [b, r, p] project: out, or NULL; expand: in */
    const void *w;       /* [b, r, p] project: in, with df */
    void *df;            /* [n, r]    project: out, or NULL */
} subspace_tucker_conv_args;

/* --------------------------------------------------------------- depthwise
 * Gradient of the weight of a depthwise convolution, n = 1, or another grouped one; with fewer than three spatial
 * dimensions the first are 1.
 *     dweight[c m + q, p, k] = sum_{b,o} dy[b, c m + q, o] x[b, c n + p, o stride + k dilation - padding]     */
typedef struct subspace_depthwise_args {
    subspace_dtype dtype; /* of x and dy */
    int64_t b, c, n, m;   /* batch, groups, channels and outputs per group */
    int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
    const void *x;  /* [b, c n, in...]  in */
    const void *dy; /* [b, c m, out...] in */
    void *dweight;  /* [c m, n, kernel...] out, float32 for half types */
} subspace_depthwise_args;

/* ------------------------------------------------------------- coding_rate
 *     rate[v] = sum_g n_g/(2n) logdet(I + d/(n_g eps) Z_g' Z_g)
 * Group g of view v owns the rows order[v, start[v, g]] .. order[v, start[v, g+1] - 1] of z[v], n_g of them;
 * without order and start all n rows are one group. Empty groups add nothing. A factor is its device's own matter, and
 * has entries that are never written where groups are smaller than they might be.                              */
typedef struct subspace_coding_rate_args {
    subspace_dtype dtype; /* SUBSPACE_F32 or SUBSPACE_F64, of everything floating */
    int64_t v, n, d;      /* views, points, features */
    double eps;           /* the papers' eps^2 */
    const int64_t *order; /* [v, n]    in: each row a permutation of 0..n-1, or NULL: one group */
    const int64_t *start; /* [v, n+1]  in: rises from 0 to n, or NULL with order */
    const void *z;        /* [v, n, d] in */
    void *rate;           /* [v]       forward out */
    void *factor;      /* [v, f]    forward out, backward in, f = subspace_coding_rate_factor(a); or NULL: recomputed */
    const void *drate; /* [v]       backward in */
    void *dz;          /* [v, n, d] backward out */
} subspace_coding_rate_args;

int64_t subspace_coding_rate_factor(const subspace_coding_rate_args *); /* entries of a view's factor */

/* -------------------------------------------------------- coding_rate_soft
 *     rate[v] = sum_k t_k/(2n) logdet A_k,   A_k = I + d/(t_k eps) Z' diag(w_k) Z,   t_k = sum_i w_ik
 * A column of weights that is all zero adds nothing and has no gradient.                                      */
typedef struct subspace_coding_rate_soft_args {
    subspace_dtype dtype; /* SUBSPACE_F32 or SUBSPACE_F64, of everything */
    int64_t v, n, d, k;   /* views, points, features, classes */
    double eps;           /* the papers' eps^2 */
    const void *z;        /* [v, n, d] in */
    const void *weights;  /* [v, n, k] in, >= 0 */
    void *rate;           /* [v]       forward out */
    void *inverse;        /* [v, k, d(d+1)/2] forward out, backward in: A_k^-1, upper half by rows; or NULL: not kept */
    void *stats;          /* [v, 2, k] forward out, backward in: 1/2 logdet A_k and tr A_k^-1, or -1 for a view that
                             float32 is too short for, whose inverses are 0; NULL with inverse */
    const void *drate;    /* [v]       backward in */
    void *dz;             /* [v, n, d] backward out, or NULL */
    void *dweights;       /* [v, n, k] backward out, or NULL */
} subspace_coding_rate_soft_args;

/* ---------------------------------------------------------------- sinkhorn
 *     plan_ij = f_i exp(scores_ij / eta) g_j      with row sums `row` and column sums `col`
 * symmetric: scores = scores', row = col, one potential f = g by f <- sqrt(row f / (K f)). The backward is that of
 * the exact plan (implicit differentiation, conjugate gradients); with half_steps > 0 exactly so many row and column
 * normalisations are made in turn, rows first, and the backward takes the last column potential as a constant.
 * A score of -inf is a zero of the plan.                                                                         */
typedef enum subspace_symmetry {
    SUBSPACE_GENERAL,
    SUBSPACE_SYMMETRIC, /* promised: m = n, col is not read, the gradient is that of a symmetric scores */
    SUBSPACE_LOOK       /* the kernel looks, and solves the easier problem if so; the gradient is the general one */
} subspace_symmetry;

typedef struct subspace_sinkhorn_args {
    subspace_dtype dtype; /* SUBSPACE_F32 or SUBSPACE_F64, of everything floating but tol, eta and error */
    int64_t v, m, n;      /* batch, rows, columns */
    double eta, tol;      /* tol: largest |row or column sum / its marginal - 1| to stop at */
    int64_t max_iter;     /* sweeps at most */
    subspace_symmetry symmetric;
    int64_t half_steps;    /* 0: iterate to tol; else odd: rows come last */
    const void *scores;    /* [v, m, n] in */
    const void *row, *col; /* [v, m], [v, n] in, > 0 with the same sum, or NULL: ones (m = n) */
    void *plan;            /* [v, m, n] forward out, backward in */
    double *error;         /* [v] forward out: the largest |sum / marginal - 1| reached */
    int64_t *sweeps;       /* [v] forward out: sweeps made */
    const void *dplan;     /* [v, m, n] backward in */
    void *dscores;         /* [v, m, n] backward out, or NULL */
    void *drow, *dcol;     /* [v, m], [v, n] backward out, each or NULL; along directions that keep both sums equal */
} subspace_sinkhorn_args;

/* ------------------------------------------------------------------ sigreg
 * The characteristic function of n points along each direction less that of a standard normal, at the knots
 * t_j = j step, j = 1 .. knots - 1 (at t = 0 both are 1), as sums over the points:
 *     off[v,0,j-1,l] = root_j sum_i (cos(t_j p_il) - exp(-t_j^2/2))      p = z_v directions
 *     off[v,1,j-1,l] = root_j sum_i  sin(t_j p_il)
 *     root_j^2 = 2 step exp(-t_j^2/2), half of it at the last knot: |off_l|^2 / n is the Epps-Pulley statistic
 *     dz_i = sum_l directions_l sum_j root_j t_j (doff[v,1,j-1,l] cos(t_j p_il) - doff[v,0,j-1,l] sin(t_j p_il))  */
typedef struct subspace_sigreg_args {
    subspace_dtype dtype;   /* of z and dz */
    int64_t v, n, d, s;     /* views, points, features, directions */
    int64_t knots;          /* 2 to SUBSPACE_KNOTS */
    double step;            /* from one knot to the next, > 0 */
    const void *z;          /* [v, n, d] in */
    const void *directions; /* [d, s]    in, float32 for half types */
    double *off;            /* [v, 2, knots - 1, s] forward out */
    const double *doff;     /* [v, 2, knots - 1, s] backward in */
    void *dz;               /* [v, n, d] backward out */
} subspace_sigreg_args;

enum { SUBSPACE_KNOTS = 1 << 12 };

/* ------------------------------------------------------------ gated_cosine
 * Cosines of points under gates, of all pairs, products of vectors entry by entry:
 *     cosine[v,i,j] = <gate_i z1_i, gate_i z2_j> / (|gate_i z1_i| |gate_i z2_j|)
 * each row of z1, z2 and gate first divided by its largest magnitude. A length whose square is up to tiny / eps of the
 * type counts as 0, and has the cosine 0; a row with an entry that is not finite has cosines of NaN.               */
typedef struct subspace_gated_cosine_args {
    subspace_dtype dtype; /* SUBSPACE_F32 or SUBSPACE_F64, of everything */
    int64_t v, b, n, k;   /* views, gates, points, features */
    const void *z1;       /* [v, b, k] in */
    const void *gate;     /* [v, b, k] in */
    const void *z2;       /* [v, n, k] in */
    void *cosine;         /* [v, b, n] forward out, backward in */
    void *inverse;        /* [v, b, n] forward out, backward in: 1 / |gate_i z2_j| of the divided rows, or 0 */
    const void *dcosine;  /* [v, b, n] backward in; NULL: forward */
    void *dz1, *dgate;    /* [v, b, k] backward out, both or NULL */
    void *dz2;            /* [v, n, k] backward out, or NULL */
} subspace_gated_cosine_args;

/* ----------------------------------------------------------- newton_schulz
 *     X_0 = x / max(|x|_F, eps)     X_(k+1) = a_k X_k + b_k (X_k X_k') X_k + c_k (X_k X_k')^2 X_k     y = X_steps
 * A matrix with an entry that is not finite becomes NaN throughout.                                              */
typedef struct subspace_newton_schulz_args {
    subspace_dtype dtype;       /* of x, y, dy and dx */
    int64_t v, m, n, steps;     /* matrices, rows, columns, 1 to SUBSPACE_STEPS steps */
    double eps;                 /* > 0 */
    const double *coefficients; /* [steps, 3] in, on the host: a, b and c of each step */
    const void *x;              /* [v, m, n]  in */
    void *y;                    /* [v, m, n]  forward out */
    const void *dy;             /* [v, m, n]  backward in */
    void *dx;                   /* [v, m, n]  backward out */
} subspace_newton_schulz_args;

enum { SUBSPACE_STEPS = 100 };
/* How many steps, from `from` on, are made on the Gram matrix alone before X takes part again. */
int64_t subspace_newton_schulz_run(const subspace_newton_schulz_args *, int64_t from);

/* ---------------------------------------------------------------- hadamard
 * The Walsh-Hadamard transform of every row, in natural order, by n log2(n) sums and differences of two:
 *     y[v,i] = scale sum_j (-1)^(number of ones in i & j) x[v,j]
 * Always the bits of i from the highest to the lowest, so that every device and every blocking rounds alike.     */
typedef struct subspace_hadamard_args {
    subspace_dtype dtype;
    int64_t v, n;  /* rows; entries of each, a power of two up to SUBSPACE_HADAMARD */
    double scale;  /* rounded to what is computed in; 1 changes nothing */
    const void *x; /* [v, n] in */
    void *y;       /* [v, n] out; may be x itself */
} subspace_hadamard_args;

enum { SUBSPACE_HADAMARD = 1 << 26 };

/* ---------------------------------------------------------------- fastfood
 * A random matrix P [m, d] of which nothing is stored: with L the least power of two that is no less than m and d,
 *     P = (first m rows of) H G Pi H B (first d columns) / sqrt(m sum_i G_i^2)
 * H: [L, L] as above; B, Pi, G: signs, a permutation and normal numbers, functions of the seed and L alone
 * (fastfood.h). A column's length is 1 for m = L, and its expected square is 1 for every other m.
 *     fastfood    out[v] = P theta[v]              fastfood_adjoint    dtheta[v] = P' dout[v]                     */
typedef struct subspace_fastfood_args {
    subspace_dtype dtype;
    int64_t v, d, m; /* rows; entries of theta and of out, 1 to SUBSPACE_HADAMARD each */
    int64_t seed;
    const void *theta; /* [v, d] fastfood in */
    void *out;         /* [v, m] fastfood out */
    const void *dout;  /* [v, m] fastfood_adjoint in */
    void *dtheta;      /* [v, d] fastfood_adjoint out */
} subspace_fastfood_args;

/* ----------------------------------------------------------------- product
 * y[v] <- scale op(a[v]) op(b[v]) + add y[v]: float32 or float64, summed as such. y is none of the others.          */
typedef struct subspace_product_args {
    subspace_dtype dtype;
    int64_t v, m, n, k;
    int transa, transb; /* a is [v, k, m], b [v, n, k] */
    int shared;         /* b is one matrix, for all */
    double scale, add;  /* rounded to dtype; y is not read where add is 0 */
    const void *a;      /* [v, m, k] in */
    const void *b;      /* [v, k, n] in */
    void *y;            /* [v, m, n] in, out */
} subspace_product_args;

/* --------------------------------------------------------------- functions
 * Every function of every op, once: declarations, tables and dispatchers are made from this list.
 * OP(op) stands for what each op has once, FN(fn, op) for a function that takes subspace_<op>_args.   */
/* clang-format off */
#define SUBSPACE_EACH(OP, FN)                                                                                          \
    OP(logits) FN(logits, logits) FN(logits_backward, logits)                                                          \
    OP(cross_entropy) FN(cross_entropy, cross_entropy) FN(cross_entropy_backward, cross_entropy)                       \
    OP(rsgd) FN(rsgd, rsgd)                                                                                            \
    OP(tucker) FN(tucker, tucker) FN(tucker_backward, tucker)                                                          \
    OP(tucker_linear) FN(tucker_linear, tucker_linear) FN(tucker_linear_backward, tucker_linear)                       \
    OP(tucker_conv) FN(tucker_conv_project, tucker_conv) FN(tucker_conv_expand, tucker_conv)                           \
    OP(depthwise) FN(depthwise, depthwise)                                                                             \
    OP(coding_rate) FN(coding_rate, coding_rate) FN(coding_rate_backward, coding_rate)                                 \
    OP(coding_rate_soft) FN(coding_rate_soft, coding_rate_soft) FN(coding_rate_soft_backward, coding_rate_soft)        \
    OP(sinkhorn) FN(sinkhorn, sinkhorn) FN(sinkhorn_backward, sinkhorn)                                                \
    OP(sigreg) FN(sigreg, sigreg) FN(sigreg_backward, sigreg)                                                          \
    OP(gated_cosine) FN(gated_cosine, gated_cosine) FN(gated_cosine_backward, gated_cosine)                            \
    OP(newton_schulz) FN(newton_schulz, newton_schulz) FN(newton_schulz_backward, newton_schulz)                       \
    OP(hadamard) FN(hadamard, hadamard)                                                                                \
    OP(fastfood) FN(fastfood, fastfood) FN(fastfood_adjoint, fastfood)                                                 \
    OP(product) FN(product, product)
/* clang-format on */

#define SUBSPACE_DECLARE_OP(op)                                                                                        \
    subspace_status subspace_##op##_check(subspace_ctx *, const subspace_##op##_args *);                               \
    size_t subspace_##op##_workspace_cpu(const subspace_ctx *, const subspace_##op##_args *);                          \
    size_t subspace_##op##_workspace_cuda(const subspace_ctx *, const subspace_##op##_args *);
#define SUBSPACE_DECLARE_FN(fn, op)                                                                                    \
    subspace_status subspace_##fn##_cpu(subspace_ctx *, const subspace_##op##_args *);                                 \
    subspace_status subspace_##fn##_cuda(subspace_ctx *, const subspace_##op##_args *);
SUBSPACE_EACH(SUBSPACE_DECLARE_OP, SUBSPACE_DECLARE_FN)

#ifdef __cplusplus
}
#endif
#endif

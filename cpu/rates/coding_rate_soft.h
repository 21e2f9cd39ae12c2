/* coding_rate_soft.h - what coding_rate_soft.c, face_split.h and each_class.h have in common: the sizes, when a view
 * needs care, and one call's run.
 */
#ifndef SUBSPACE_CODING_RATE_SOFT_H
#define SUBSPACE_CODING_RATE_SOFT_H
#include "cpu.h"

enum {
    MANY = 32,          /* classes from which on the face-splitting product is faster, unless d > 6 k */
    STRIPE = 1 << 18,   /* entries of a stripe of its F: 1 MiB of float32 */
    STRIPE_WIDTH = 512, /* pairs of a stripe, where that suffices */
    DEEP = 512,         /* rows of Z in one product of the forward */
    BLOCK = 512,        /* rows of Z in a block of the backward */
    PANEL = 128,        /* rows of a Gram matrix that is made alone */
    CHUNK = 1 << 24     /* bytes of factors that are not kept, as long as that is a few of them */
};

/* The fast way serves while the loss of every class, and the mean h_k, stay within these: an inverse in float32 is then
 * good for 1e-5 of the gradients, or for 3e-7 times the loss. That is what autograd through a float32 Cholesky gives,
 * and a loss of d/eps is normal: a class that is hardly more than one point, as all are when MLC begins. */
static const double MOST_LOSS_F32 = 1000, MOST_LOSS_F64 = 1e5, LEAST_RATE_F32 = 0.1, LEAST_MASS_F32 = 1e-20;
static const double OUTLIER = 10; /* a row that much longer than what tr C_k tells of counts as well */
static const double TINY = 1e-8;  /* tr C_k up to which h_k = tr C_k / 2, and h_k - (d - tr A_k^-1)/2 = 0 */
static const double CAREFUL = -1; /* in place of tr A_k^-1: the kept inverses are no use */

typedef struct soft_run {
    const subspace_coding_rate_soft_args *a;
    bool split, careful;
    bool kept;                         /* backward: the inverses are the forward's */
    int64_t n, d, p, slots;            /* p = d(d+1)/2 */
    int64_t chunk;                     /* classes at a time */
    int64_t depth, width;              /* forward: rows and pairs of a stripe */
    int64_t blocks, rows;              /* backward: blocks of rows of Z, rows of the largest */
    double spread;                     /* d/eps max |z_i|^2, a bound of |C_k| */
    double *t, *h, *trace, *loss;      /* [k]; loss: how many digits the products with A_k^-1 lose */
    double *shift;                     /* [k]; shift: what dw_ik has for all i */
    double *wide_z, *wide_w, *wide_dz; /* float64 copies for a careful run, or NULL */
    void *own_inverse, *square;        /* [chunk, p], [chunk, d, d], or NULL */
    char *space;                       /* [slots] of space_bytes */
    size_t space_bytes;

    int64_t v, k0, kc, ldw; /* the view; its classes k0 .. k0 + kc - 1 */
    const void *z, *w;      /* [n, d], [n, kc] with ldw between rows */
    void *inverse;          /* [kc, p], or NULL */
    void *dz, *dw;          /* [n, d], [n, k] of a->dtype, each or NULL */
    double to_dw;
} soft_run;

static void *slot_space(const soft_run *r, int64_t slot)
{
    return r->space + (size_t)slot * r->space_bytes;
}

static inline double get(subspace_dtype dtype, const void *from, int64_t at)
{
    return dtype == SUBSPACE_F64 ? ((const double *)from)[at] : (double)((const float *)from)[at];
}

static inline void put(subspace_dtype dtype, void *to, int64_t at, double value)
{
    if (dtype == SUBSPACE_F64) ((double *)to)[at] = value;
    else ((float *)to)[at] = (float)value;
}

#endif

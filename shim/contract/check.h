/* check.h - how a kernel reports an error: fill ctx->message, return a status. */
#ifndef SUBSPACE_CHECK_H
#define SUBSPACE_CHECK_H
#include <stdio.h>
#include "subspace.h"

/* Return `status` with a message unless `cond` holds. */
#define CHECK(ctx, cond, status, ...)                                                                                  \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            snprintf((ctx)->message, sizeof(ctx)->message, __VA_ARGS__);                                               \
            return (status);                                                                                           \
        }                                                                                                              \
    } while (0)

/* Pass a failed status up unchanged. */
#define TRY(expr)                                                                                                      \
    do {                                                                                                               \
        const subspace_status status_ = (expr);                                                                        \
        if (status_ != SUBSPACE_OK) return status_;                                                                    \
    } while (0)
#endif

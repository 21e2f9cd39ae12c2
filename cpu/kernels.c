/* kernels.c - the table of one instruction-set level; dispatch.c chooses among the tables. */
#include "cpu.h"

#define DECLARE_WORKSPACE(op)                                                                                          \
    size_t LEVEL(subspace_##op##_workspace)(const subspace_ctx *, const subspace_##op##_args *);
#define DECLARE_FUNCTION(fn, op) subspace_status LEVEL(subspace_##fn)(subspace_ctx *, const subspace_##op##_args *);
SUBSPACE_EACH(DECLARE_WORKSPACE, DECLARE_FUNCTION)

#define ENTER_WORKSPACE(op) .op##_workspace = LEVEL(subspace_##op##_workspace),
#define ENTER_FUNCTION(fn, op) .fn = LEVEL(subspace_##fn),
extern const subspace_kernels LEVEL(subspace_kernels);
const subspace_kernels LEVEL(subspace_kernels) = {SUBSPACE_EACH(ENTER_WORKSPACE, ENTER_FUNCTION)};

/* dispatch.h - which instruction set the CPU kernels use. */
#ifndef SUBSPACE_DISPATCH_H
#define SUBSPACE_DISPATCH_H
#include <stdbool.h>

void subspace_cpu_init(void);                 /* once, at load; obeys SUBSPACE_ISA, one of what is available */
const char *subspace_cpu_isa(void);           /* the level in use */
bool subspace_cpu_intel(void);                /* of this vendor */
void subspace_cpu_split(bool may);            /* float32 by three products of bf16, where there is AMX */
const char *subspace_cpu_isa_available(void); /* the levels this machine can run, best last */
#endif

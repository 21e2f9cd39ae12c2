/* dispatch.h - which instruction set the CPU kernels use. */
#ifndef SUBSPACE_DISPATCH_H
#define SUBSPACE_DISPATCH_H

void subspace_cpu_init(void);                 /* once, at load; obeys SUBSPACE_ISA, one of what is available */
const char *subspace_cpu_isa(void);           /* the level in use */
const char *subspace_cpu_isa_available(void); /* the levels this machine can run, best last */
#endif

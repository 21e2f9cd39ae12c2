/* cpu.h - what every hot CPU file includes first.
 *
 * Each hot file is compiled once per instruction-set level (SUBSPACE_LEVEL = baseline, avx2,
 * avx512) and includes itself once per precision, so a function `name` becomes name_f32_avx2 and
 * so on. cpu/kernels.c gathers a level's entry points in a table, cpu/dispatch.c picks the table.
 */
#ifndef SUBSPACE_CPU_H
#define SUBSPACE_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <string.h>
#include <tgmath.h> /* sqrt(), exp(), ... follow the type of their argument */
#include "check.h"
#include "linalg.h"

/* exp and log as glibc has always had them, not those of 2.29: the wheel is for systems older than that too. */
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver exp, exp@GLIBC_2.2.5\n.symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver exp, exp@GLIBC_2.17\n.symver log, log@GLIBC_2.17");
#endif

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define LEVEL(name) PASTE(name, SUBSPACE_LEVEL)

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define CEIL_DIV(a, b) (((a) + (b)-1) / (b))

/* Bytes in a vector register of this level; the kernels are written in GCC's vector types. */
#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX2__)
#define VECTOR 32
#else
#define VECTOR 16
#endif

/* Call fn for the type we compute in: float32 for everything but float64. */
#define DISPATCH(dtype, fn, ...)                                                                                       \
    return (dtype) == SUBSPACE_F64 ? LEVEL(fn##_f64)(__VA_ARGS__) : LEVEL(fn##_f32)(__VA_ARGS__)

/* Carve `count` items off a workspace; with a NULL base it only adds up the size. */
static inline void *carve(char *base, size_t *at, int64_t count, size_t item)
{
    void *here = base ? base + *at : NULL;
    *at += ((size_t)MAX(count, 0) * item + 63) & ~(size_t)63;
    return here;
}

/* Slot s of `slots` gets the range [*begin, *end) of [0, count): always the same one. */
static inline void share(int64_t count, int64_t slot, int64_t slots, int64_t *begin, int64_t *end)
{
    *begin = count * slot / slots;
    *end = count * (slot + 1) / slots;
}

/* Whether the processor multiplies pairs of bf16, and may: the level avx512_bf16 is avx512's code with this. */
bool subspace_cpu_bf16(void);
bool subspace_cpu_amx(void);    /* and whole tiles of them: the level amx_bf16 */
bool subspace_cpu_splits(void); /* and float32 may be multiplied as two parts of bf16 */

/* The functions of one level, see kernels.c. */
#define WORKSPACE_POINTER(op) size_t (*op##_workspace)(const subspace_ctx *, const subspace_##op##_args *);
#define FUNCTION_POINTER(fn, op) subspace_status (*fn)(subspace_ctx *, const subspace_##op##_args *);
typedef struct subspace_kernels {
    SUBSPACE_EACH(WORKSPACE_POINTER, FUNCTION_POINTER)
} subspace_kernels;

#endif

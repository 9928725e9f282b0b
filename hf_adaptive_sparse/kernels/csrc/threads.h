/* Which paths this processor has, and threads: shared by all kernels. */
#ifndef HAS_THREADS_H
#define HAS_THREADS_H

#include <stdint.h>

#if defined(_WIN32)
#define HAS_EXPORT __declspec(dllexport)
#else
#define HAS_EXPORT __attribute__((visibility("default")))
#endif

/* For target attributes: let loops be vectorised with 512 bits. Clang refuses to be told. */
#if defined(__clang__)
#define HAS_WIDE_VECTORS
#else
#define HAS_WIDE_VECTORS ",prefer-vector-width=512"
#endif

enum { HAS_PORTABLE, HAS_AVX2, HAS_AVX512, HAS_NEON, HAS_AMX, HAS_AVX512F };

/* Whether the compiler knows AMX, and the system is one whose permission for it can be asked for. */
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_BUILDS_AMX 1
#else
#define HAS_BUILDS_AMX 0
#endif

/* 1 if this processor runs the variant. */
HAS_EXPORT int has_supports(int variant);

/* Whether the processor multiplies numbers of this type itself; 1 where that is not known. */
HAS_EXPORT int has_multiplies(int dtype);

/* GOMP_parallel of the OpenMP runtime that torch itself uses, so that there is no second pool. */
HAS_EXPORT void has_use_threads_of(void *gomp_parallel);

/* Call function(argument, i) for each i below count, on up to `threads` threads that take the next
 * i whenever they are done with one. Returns the status of a call that did not return 0, else 0. */
int has_run(int (*function)(void *, int64_t), void *argument, int64_t count, int64_t threads);

#endif

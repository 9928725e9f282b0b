/* What all kernels share: exports, the numbers by which Python knows dtypes, statuses and paths
 * (kernels/library.py), and which paths this processor has. */
#ifndef HAS_LIBRARY_H
#define HAS_LIBRARY_H

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

/* Whether the compiler knows AMX, and the system is one whose permission for it can be asked for. */
#if defined(__x86_64__) && defined(__linux__) && (__GNUC__ >= 11 || __clang_major__ >= 12)
#define HAS_BUILDS_AMX 1
#else
#define HAS_BUILDS_AMX 0
#endif

enum { HAS_ABI_VERSION = 8 };
enum { HAS_FLOAT32 = 0, HAS_BFLOAT16 = 1, HAS_FLOAT16 = 2 };
enum { HAS_OK = 0, HAS_BAD_VARIANT = 1, HAS_NO_MEMORY = 2, HAS_BAD_ARGUMENT = 3 };
enum { HAS_PORTABLE, HAS_AVX2, HAS_AVX512, HAS_NEON, HAS_AMX, HAS_AVX512F };

/* Codes per packed row, so that integer sums of products stay below 2^31 (see round_vector). */
enum { HAS_MAX_CODES = 1024 };

/* 1 if this processor runs the variant. */
HAS_EXPORT int has_supports(int variant);

/* Whether the processor multiplies numbers of this type itself; 1 where that is not known. */
HAS_EXPORT int has_multiplies(int dtype);

#endif

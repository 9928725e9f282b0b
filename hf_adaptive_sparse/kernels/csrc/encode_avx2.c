/* x86-64 with AVX2: what the compiler makes of the same code there. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET __attribute__((target("avx2,f16c")))
#define VARIANT(name) name##_avx2

#include "encode_body.h"

#endif

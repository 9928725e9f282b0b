/* x86-64 with AVX-512: what the compiler makes of the same code there. */
#if defined(__x86_64__) || defined(_M_X64)

#define TARGET                                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c,bmi2"        \
                          HAS_WIDE_VECTORS)))
#define VARIANT(name) name##_avx512

#include "encode_body.h"

#endif

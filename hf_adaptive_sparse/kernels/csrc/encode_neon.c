/* AArch64: NEON is what its compilers vectorise for anyway. */
#if defined(__aarch64__)

#define TARGET
#define VARIANT(name) name##_neon

#include "encode_body.h"

#endif

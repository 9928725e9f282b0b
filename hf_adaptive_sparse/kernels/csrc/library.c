/* What the library is, and which paths this processor has. */
#define _GNU_SOURCE
#include "library.h"

#include <pthread.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if HAS_BUILDS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

HAS_EXPORT int has_abi_version(void) { return HAS_ABI_VERSION; }

#if HAS_BUILDS_AMX
static int amx_granted;

/* Linux lends the registers of AMX to a process, all of its threads, once it has asked. */
static void ask_for_amx(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d, wanted = 1u << 22 | 1u << 24 | 1u << 25; /* bfloat16, tiles, int8 */
    amx_granted = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & wanted) == wanted &&
                  syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

static int has_amx(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_for_amx);
    return amx_granted;
}
#endif

#if defined(__x86_64__)
static int f16c_found;

/* Every processor with AVX2 has it, unless a virtual machine hides it. Not all compilers can ask. */
static void ask_for_f16c(void) {
    unsigned a, b, c, d;
    f16c_found = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

/* Asked once: every call of a kernel comes here, and in a virtual machine the question leaves it,
 * which takes as long as a small product. */
static int has_f16c(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_for_f16c);
    return f16c_found;
}
#endif

HAS_EXPORT int has_supports(int variant) {
    switch (variant) {
        case HAS_PORTABLE: return 1;
#if defined(__x86_64__)
        case HAS_AVX2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("popcnt") && has_f16c();
        case HAS_AVX512F:
            return has_supports(HAS_AVX2) && __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2");
        case HAS_AVX512:
            return has_supports(HAS_AVX512F) && __builtin_cpu_supports("avx512vbmi") &&
                   __builtin_cpu_supports("avx512vnni");
#if HAS_BUILDS_AMX
        case HAS_AMX: /* processors that have it have all of this as well */
            return has_supports(HAS_AVX512) && __builtin_cpu_supports("avx512vbmi2") &&
                   __builtin_cpu_supports("avx512bf16") && has_amx();
#endif
#endif
#if defined(__aarch64__)
        case HAS_NEON: return 1;
#endif
        default: return 0;
    }
}

HAS_EXPORT int has_multiplies(int dtype) {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    if (dtype == HAS_BFLOAT16) return __builtin_cpu_supports("avx512bf16");
    if (dtype == HAS_FLOAT16) /* AVX512-FP16, which compilers learnt of late */
        return has_supports(HAS_AVX512F) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
               (d >> 23 & 1);
#endif
    (void)dtype;
    return 1;
}

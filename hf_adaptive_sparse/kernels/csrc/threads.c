/* Choice of path and threads. */
#define _GNU_SOURCE
#include "threads.h"

#include "attention.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if HAS_BUILDS_AMX
#include <sys/syscall.h>
#endif

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
/* Every processor with AVX2 has it, unless a virtual machine hides it. Not all compilers can ask. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
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

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
static parallel_function torch_parallel;
static pid_t process_of_pool;

HAS_EXPORT void has_use_threads_of(void *gomp_parallel) {
    torch_parallel = (parallel_function)gomp_parallel;
    process_of_pool = getpid();
}

typedef struct {
    int (*function)(void *, int64_t);
    void *argument;
    int64_t count;
    atomic_long next;
    atomic_int status;
} work;

static void take_tasks(void *shared) {
    work *w = shared;
    for (;;) {
        int64_t i = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
        if (i >= w->count) return;
        int status = w->function(w->argument, i);
        if (status != 0) atomic_store(&w->status, status);
    }
}

static void *take_tasks_thread(void *shared) {
    take_tasks(shared);
    return NULL;
}

/* Threads that live for one call: slower to start, but right after a fork, where an OpenMP pool of
 * the parent is gone, and where torch has no OpenMP. */
static void run_on_own_threads(work *w, int64_t threads) {
    pthread_t *handles = malloc((size_t)threads * sizeof *handles);
    int64_t started = 0;
    if (handles != NULL)
        while (started < threads - 1 &&
               pthread_create(handles + started, NULL, take_tasks_thread, w) == 0)
            started++;
    take_tasks(w);
    for (int64_t i = 0; i < started; i++) pthread_join(handles[i], NULL);
    free(handles);
}

int has_run(int (*function)(void *, int64_t), void *argument, int64_t count, int64_t threads) {
    work w = {.function = function, .argument = argument, .count = count, .next = 0, .status = 0};
    if (threads > count) threads = count;
    if (threads <= 1)
        take_tasks(&w);
    else if (torch_parallel != NULL && getpid() == process_of_pool)
        torch_parallel(take_tasks, &w, (unsigned)threads, 0);
    else
        run_on_own_threads(&w, threads);
    return atomic_load(&w.status);
}

/* Tasks on threads: those of torch's own pool where there is one. */
#define _POSIX_C_SOURCE 200809L
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

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

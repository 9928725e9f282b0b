/* Threads, shared by all kernels. */
#ifndef HAS_THREADS_H
#define HAS_THREADS_H

#include "library.h"

/* GOMP_parallel of the OpenMP runtime that torch itself uses, so that there is no second pool. */
HAS_EXPORT void has_use_threads_of(void *gomp_parallel);

/* Call function(argument, i) for each i below count, on up to `threads` threads that take the next
 * i whenever they are done with one. Returns the status of a call that did not return 0, else 0. */
int has_run(int (*function)(void *, int64_t), void *argument, int64_t count, int64_t threads);

#endif

/* Fused kernels of the solvers' inner loops, once for float and once for double.

   The bodies are in the header files, where REAL is the type and NAME(f) the name of f for it. Nothing here checks its
   arguments: the Python side does. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

enum { RUNNING, DONE, MAX_ITER, STAGNATED, INDEFINITE, NOT_FINITE };

static int thread_number(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static int team_size(void) {
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

/* Only inside a team that works on one image; every thread of it comes here equally often. */
static void wait_for_team(int team) {
    if (team > 1) {
#pragma omp barrier
    }
}

static double sum(const double *values, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += values[i];
    return total;
}

#define REAL float
#define NAME(f) f##_float32
#define SQRT sqrtf
#include "stencils.h"
#include "updates.h"
#include "total_variation.h"
#include "potentials.h"
#include "filters.h"
#undef REAL
#undef NAME
#undef SQRT
#define REAL double
#define NAME(f) f##_float64
#define SQRT sqrt
#include "stencils.h"
#include "updates.h"
#include "total_variation.h"
#include "potentials.h"
#include "filters.h"

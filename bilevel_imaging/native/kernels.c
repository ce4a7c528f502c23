/* Fused kernels of the solvers' inner loops, once for float and once for double.

   The bodies are in the header files, where REAL is the type and NAME(f) the name of f for it. Nothing here checks its
   arguments: the Python side does. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

enum { RUNNING, DONE, MAX_ITER, STAGNATED, INDEFINITE, NOT_FINITE };
enum { COLD, WARM, CONTINUED }; /* how a Newton run begins */

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

/* Into how many blocks of rows each of `count` images is cut, so that every thread has one. */
static int64_t blocks_of_each(int64_t count, int threads) {
    return count == 0 || count >= threads ? 1 : (threads + count - 1) / count;
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

/* values = factor / sqrt(values). A division and a root of a vector take longer than reading it from memory; an estimate
   and one Newton step give the same to two units of the last place. */
static void inverse_roots_float32(float *restrict values, float factor, int64_t n) {
    int64_t j = 0;
#ifdef __AVX512F__
    const __m512 half = _mm512_set1_ps(0.5f), three_halves = _mm512_set1_ps(1.5f), scale = _mm512_set1_ps(factor);
    for (; j + 16 <= n; j += 16) {
        const __m512 v = _mm512_loadu_ps(values + j), r = _mm512_rsqrt14_ps(v);
        const __m512 step = _mm512_fnmadd_ps(_mm512_mul_ps(half, v), _mm512_mul_ps(r, r), three_halves);
        _mm512_storeu_ps(values + j, _mm512_mul_ps(scale, _mm512_mul_ps(r, step)));
    }
#endif
    for (; j < n; j++) values[j] = factor / sqrtf(values[j]);
}

static void inverse_roots_float64(double *restrict values, double factor, int64_t n) {
    for (int64_t j = 0; j < n; j++) values[j] = factor / sqrt(values[j]);
}

#define REAL float
#define NAME(f) f##_float32
#define SQRT sqrtf
#include "updates.h"
#include "convolutions.h"
#include "stencils.h"
#include "total_variation.h"
#include "newton.h"
#include "potentials.h"
#include "filters.h"
#include "sparse_features.h"
#undef REAL
#undef NAME
#undef SQRT
#define REAL double
#define NAME(f) f##_float64
#define SQRT sqrt
#include "updates.h"
#include "convolutions.h"
#include "stencils.h"
#include "total_variation.h"
#include "newton.h"
#include "potentials.h"
#include "filters.h"
#include "sparse_features.h"

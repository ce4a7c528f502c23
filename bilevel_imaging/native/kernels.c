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

/* The rows of an image that are one block. */
typedef struct {
    int64_t image, from, to;
} Block;

static Block block_of(int64_t block, int64_t blocks_each, int64_t rows) {
    const int64_t part = block % blocks_each;
    const Block found = {block / blocks_each, rows * part / blocks_each, rows * (part + 1) / blocks_each};
    return found;
}

/* Only inside a team that works on one image; every thread of it comes here equally often. */
static void wait_for_team(int team) {
    if (team > 1) {
#pragma omp barrier
    }
}

/* Memory that begins with a whole vector. */
static void *aligned_malloc(size_t bytes) {
    void *memory;
    return posix_memalign(&memory, 64, bytes) == 0 ? memory : NULL;
}

static double sum(const double *values, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; i++) total += values[i];
    return total;
}

/* One machine code wherever it is called from: the same bits for a row, whichever thread computes it and why. */
#ifdef __clang__
#define ONE_CODE __attribute__((noinline))
#else
#define ONE_CODE __attribute__((noinline, noclone))
#endif

/* Two vectors' numbers, numbered one after the other, in another order. */
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (INDICES){__VA_ARGS__})
#endif
typedef int32_t indices_float32 __attribute__((vector_size(64)));
typedef int64_t indices_float64 __attribute__((vector_size(64)));
typedef double vector_float64 __attribute__((vector_size(64)));

#define REAL float
#define NAME(f) f##_float32
#define SQRT sqrtf
#define LEAST 1e-36f
#define INDICES indices_float32
#define MOVED_UP(before, here) \
    ((NAME(Vector))SHUFFLE(before, here, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30))
#define MOVED_DOWN(here) ((NAME(Vector))SHUFFLE(here, here, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15))
#include "vectors.h"
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
#undef LEAST
#undef INDICES
#undef MOVED_UP
#undef MOVED_DOWN
#define REAL double
#define NAME(f) f##_float64
#define SQRT sqrt
#define LEAST 1e-300
#define INDICES indices_float64
#define MOVED_UP(before, here) \
    ((NAME(Vector))SHUFFLE(before, here, 7, 8, 9, 10, 11, 12, 13, 14))
#define MOVED_DOWN(here) ((NAME(Vector))SHUFFLE(here, here, 1, 2, 3, 4, 5, 6, 7, 7))
#include "vectors.h"
#include "updates.h"
#include "convolutions.h"
#include "stencils.h"
#include "total_variation.h"
#include "newton.h"
#include "potentials.h"
#include "filters.h"
#include "sparse_features.h"
#define FROM float
#define TAKING(f) f##_float32
#include "measure.h"
#undef FROM
#undef TAKING
#define FROM double
#define TAKING(f) f##_float64
#include "measure.h"

/* Included by kernels.c for each type. Multinomial logistic models of many sparse examples a_i in one pass over them:
   logits z_i = W a_i of up to CLASSES classes, something done to these, and sum_i z_i a_i^T.

   Examples come in blocks of EXAMPLES, features in groups of GROUPED neighbors. A block keeps, group by group, the
   examples with a number other than 0 in the group, and these GROUPED numbers: a pixel that is not 0 has neighbors. W
   and the sums are [feature][CLASSES], and logits are rows of CLASSES numbers, so that one number of an example is one
   vector operation for all classes. Sums are over PARTIAL sequences of blocks: the result does not depend on the number
   of threads. */
#ifndef CLASSES
#define CLASSES 16
#define GROUPED 2
#define EXAMPLES 256
#define PARTIAL 16
enum { LOGITS, GRADIENT, HESSIAN, MIXED, CROSS_ENTROPY, GRAM };

/* 2^n, a normal number. */
static inline float power_of_two_float32(int32_t n) {
    const union {
        int32_t bits;
        float value;
    } power = {(n + 127) << 23};
    return power.value;
}

static inline double power_of_two_float64(int32_t n) {
    const union {
        int64_t bits;
        double value;
    } power = {(int64_t)(n + 1023) << 52};
    return power.value;
}
#endif
#define PARTS (CLASSES / LANES)

typedef struct {
    int64_t mode, count, classes, groups;
    const REAL *values;     /* GROUPED for every place */
    const uint16_t *places; /* of examples in their block */
    const int64_t *starts;  /* of the places of every group of every block, and their end */
    const int64_t *labels;
    const REAL *weights;
    REAL *rows, *single; /* CLASSES and one number for every example */
} NAME(Pass);

/* e^t for t <= 0 to a few units of the last place; 0 where it is nothing beside 1: products must stay normal numbers. */
static inline REAL NAME(exponential)(REAL t) {
    const int narrow = sizeof(REAL) == 4;
    const REAL lowest = narrow ? (REAL)-60 : (REAL)-600;
    const REAL number = t > lowest ? t : lowest; /* NaN has no place in n, but in the result */
    const int32_t n = (int32_t)(number * (REAL)1.4426950408889634 - (REAL)0.5);
    const REAL r = t - n * (REAL)0.6931471805599453;
    REAL series = 0;
    if (!narrow) {
        series = series * r + (REAL)(1.0 / 6227020800);
        series = series * r + (REAL)(1.0 / 479001600);
        series = series * r + (REAL)(1.0 / 39916800);
        series = series * r + (REAL)(1.0 / 3628800);
        series = series * r + (REAL)(1.0 / 362880);
        series = series * r + (REAL)(1.0 / 40320);
    }
    series = series * r + (REAL)(1.0 / 5040);
    series = series * r + (REAL)(1.0 / 720);
    series = series * r + (REAL)(1.0 / 120);
    series = series * r + (REAL)(1.0 / 24);
    series = series * r + (REAL)(1.0 / 6);
    series = series * r + (REAL)0.5;
    series = series * r + 1;
    series = series * r + 1;
    return t < lowest ? 0 : NAME(power_of_two)(n) * series;
}

/* z += W a of the examples of a block, a row of `z` for each. */
static void NAME(block_logits)(
    const NAME(Pass) *pass, const int64_t *restrict starts, const REAL *restrict w, REAL *restrict z
) {
    const int64_t groups = pass->groups;
    const REAL *restrict values = pass->values;
    const uint16_t *restrict places = pass->places;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t end = starts[group + 1];
        NAME(Vector) rows[GROUPED][PARTS];
        for (int i = 0; i < GROUPED * PARTS; i++)
            rows[i / PARTS][i % PARTS] = ((const NAME(Vector) *)(w + group * GROUPED * CLASSES))[i];
        for (int64_t at = starts[group]; at < end; at++) {
            const REAL *a = values + GROUPED * at;
            NAME(Vector) *to = (NAME(Vector) *)(z + CLASSES * places[at]);
#pragma GCC unroll 8
            for (int i = 0; i < GROUPED * PARTS; i++) to[i % PARTS] += a[i / PARTS] * rows[i / PARTS][i % PARTS];
        }
    }
}

/* sums += sum z a^T over the examples of a block. */
static void NAME(block_adjoint)(
    const NAME(Pass) *pass, const int64_t *restrict starts, const REAL *restrict z, REAL *restrict sums
) {
    const int64_t groups = pass->groups;
    const REAL *restrict values = pass->values;
    const uint16_t *restrict places = pass->places;
    for (int64_t group = 0; group < groups; group++) {
        const int64_t end = starts[group + 1];
        NAME(Vector) even[GROUPED][PARTS] = {{{0}}}, odd[GROUPED][PARTS] = {{{0}}};
        int64_t at = starts[group];
        for (; at + 2 <= end; at += 2) {
            const REAL *a = values + GROUPED * at;
            const NAME(Vector) *first = (const NAME(Vector) *)(z + CLASSES * places[at]);
            const NAME(Vector) *second = (const NAME(Vector) *)(z + CLASSES * places[at + 1]);
#pragma GCC unroll 8
            for (int i = 0; i < GROUPED * PARTS; i++) {
                even[i / PARTS][i % PARTS] += a[i / PARTS] * first[i % PARTS];
                odd[i / PARTS][i % PARTS] += a[GROUPED + i / PARTS] * second[i % PARTS];
            }
        }
        if (at < end) {
            const NAME(Vector) *last = (const NAME(Vector) *)(z + CLASSES * places[at]);
#pragma GCC unroll 8
            for (int i = 0; i < GROUPED * PARTS; i++)
                even[i / PARTS][i % PARTS] += values[GROUPED * at + i / PARTS] * last[i % PARTS];
        }
        NAME(Vector) *to = (NAME(Vector) *)(sums + group * GROUPED * CLASSES);
#pragma GCC unroll 8
        for (int i = 0; i < GROUPED * PARTS; i++) to[i] += even[i / PARTS][i % PARTS] + odd[i / PARTS][i % PARTS];
    }
}

/* <s, t> for all classes. */
static inline REAL NAME(inner_of_classes)(const REAL *restrict s, const REAL *restrict t) {
    REAL total = 0;
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < CLASSES; k++) total += s[k] * t[k];
    return total;
}

/* Softmax of the logits t, 0 where there is no class; returns log sum_k e^t_k if that is wanted. */
static inline REAL NAME(softmax)(REAL *restrict t, int64_t classes, int wants_log) {
    REAL largest = t[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int k = 0; k < CLASSES; k++) {
        t[k] = k < classes ? t[k] : (REAL)-1e30;
        largest = t[k] > largest ? t[k] : largest;
    }
#pragma omp simd reduction(+ : total)
    for (int k = 0; k < CLASSES; k++) {
        t[k] = NAME(exponential)(t[k] - largest);
        total += t[k];
    }
    const REAL scale = 1 / total;
#pragma omp simd
    for (int k = 0; k < CLASSES; k++) t[k] *= scale;
    return wants_log ? largest + (REAL)log(total) : 0;
}

/* What is done to the logits t of example i. */
static inline void NAME(transform)(const NAME(Pass) *pass, REAL *restrict t, int64_t i) {
    REAL *restrict row = pass->rows ? pass->rows + i * CLASSES : NULL;
    switch (pass->mode) {
    case LOGITS:
        memcpy(row, t, CLASSES * sizeof(REAL));
        break;
    case GRADIENT:
        NAME(softmax)(t, pass->classes, 0);
        memcpy(row, t, CLASSES * sizeof(REAL));
        t[pass->labels[i]] -= 1;
        for (int k = 0; k < CLASSES; k++) t[k] *= pass->weights[i];
        break;
    case HESSIAN: {
        const REAL mean = NAME(inner_of_classes)(row, t), weight = pass->weights[i];
#pragma omp simd
        for (int k = 0; k < CLASSES; k++) t[k] = weight * row[k] * (t[k] - mean);
        break;
    }
    case MIXED:
        pass->single[i] = pass->weights[i] * (NAME(inner_of_classes)(row, t) - t[pass->labels[i]]);
        break;
    case CROSS_ENTROPY: {
        const REAL own = t[pass->labels[i]];
        pass->single[i] = NAME(softmax)(t, pass->classes, 1) - own;
        break;
    }
    case GRAM:
        for (int k = 0; k < CLASSES; k++) t[k] *= pass->weights[i];
    }
}

/* The blocks from `first` to `last`: logits with w, and what becomes of these into `sums` where it is given. */
static void NAME(pass_blocks)(const NAME(Pass) *pass, const REAL *w, REAL *sums, int64_t first, int64_t last) {
    REAL *z = aligned_alloc(64, EXAMPLES * CLASSES * sizeof(REAL));
    for (int64_t block = first; block < last; block++) {
        const int64_t from = block * EXAMPLES, left = pass->count - from, *starts = pass->starts + block * pass->groups;
        memset(z, 0, EXAMPLES * CLASSES * sizeof(REAL));
        NAME(block_logits)(pass, starts, w, z);
        for (int64_t i = 0; i < EXAMPLES && i < left; i++) NAME(transform)(pass, z + i * CLASSES, from + i);
        if (sums) NAME(block_adjoint)(pass, starts, z, sums);
    }
    free(z);
}

/* `matrix` and `out` are classes x features; what else a mode needs is in `transform`, NULL where it does not. */
void NAME(sparse_pass)(
    int64_t mode, const REAL *values, const uint16_t *places, const int64_t *starts, const REAL *matrix,
    const int64_t *labels, const REAL *weights, REAL *rows, REAL *single, REAL *out, int64_t count, int64_t features,
    int64_t classes, int threads
) {
    const int64_t groups = (features + GROUPED - 1) / GROUPED, size = groups * GROUPED * CLASSES;
    const int64_t blocks = (count + EXAMPLES - 1) / EXAMPLES, length = (blocks + PARTIAL - 1) / PARTIAL;
    const NAME(Pass) pass = {mode, count, classes, groups, values, places, starts, labels, weights, rows, single};
    REAL *w = aligned_alloc(64, (out ? 1 + PARTIAL : 1) * size * sizeof(REAL)), *sums = w + size;
    memset(w, 0, (out ? 1 + PARTIAL : 1) * size * sizeof(REAL));
    for (int64_t k = 0; k < classes; k++)
        for (int64_t j = 0; j < features; j++) w[j * CLASSES + k] = matrix[k * features + j];
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < PARTIAL; part++) {
            const int64_t first = part * length, last = first + length < blocks ? first + length : blocks;
            NAME(pass_blocks)(&pass, w, out ? sums + part * size : NULL, first, last);
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < (out ? features : 0); j++) {
            REAL total[CLASSES] = {0};
            for (int64_t part = 0; part < PARTIAL; part++)
                for (int k = 0; k < CLASSES; k++) total[k] += sums[part * size + j * CLASSES + k];
            for (int64_t k = 0; k < classes; k++) out[k * features + j] = total[k];
        }
    }
    free(w);
}
#undef PARTS

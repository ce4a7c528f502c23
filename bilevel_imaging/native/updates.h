/* Included by kernels.c for each type. */

/* Numbers from one image of scratch to the next: whole vectors, and not a multiple of a page, or all images would compete
   for the same few lines of the cache. */
static inline int64_t NAME(spread)(int64_t n) { return (n + LANES - 1) / LANES * LANES + 5 * LANES; }

/* r -= alpha z; returns ||r||^2. */
static REAL NAME(reduce)(REAL *restrict r, const REAL *restrict z, REAL alpha, int64_t n) {
    REAL square = 0;
    for (int64_t j = 0; j < n; j++) {
        r[j] -= alpha * z[j];
        square += r[j] * r[j];
    }
    return square;
}

/* q += alpha p, p = r + beta p. */
static void NAME(move_and_turn)(
    REAL *restrict q, REAL *restrict p, const REAL *restrict r, REAL alpha, REAL beta, int64_t n
) {
    for (int64_t j = 0; j < n; j++) {
        const REAL old = p[j];
        q[j] += alpha * old;
        p[j] = r[j] + beta * old;
    }
}

/* Eight numbers in double. */
typedef REAL NAME(Eight) __attribute__((vector_size(8 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
static inline vector_float64 NAME(eight)(const REAL *from) {
    return __builtin_convertvector(*(const NAME(Eight) *)from, vector_float64);
}

/* In double, so that squares of tiny numbers do not underflow; four sums, each of which waits for itself. */
static double NAME(dot)(const REAL *u, const REAL *v, int64_t n) {
    vector_float64 sums[4] = {{0}};
    int64_t j = 0;
    if (u == v)
        for (; j + 32 <= n; j += 32)
            for (int64_t k = 0; k < 4; k++) {
                const vector_float64 some = NAME(eight)(u + j + 8 * k);
                sums[k] += some * some;
            }
    for (; j + 32 <= n; j += 32)
        for (int64_t k = 0; k < 4; k++) sums[k] += NAME(eight)(u + j + 8 * k) * NAME(eight)(v + j + 8 * k);
    double total = 0;
    sums[0] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int64_t k = 0; k < 8; k++) total += sums[0][k];
    for (; j < n; j++) total += (double)u[j] * v[j];
    return total;
}

/* Inner products of `count` samples of `size` numbers. Sums are over blocks of fixed size, so the result does not depend
   on the number of threads. */
#define BLOCK 4096
#define IN_BLOCKS(...)                                                                                                 \
    for (int64_t block = 0; block < count * blocks; block++) {                                                         \
        const int64_t sample = block / blocks, from = sample * size + block % blocks * BLOCK;                          \
        const int64_t n = block % blocks == blocks - 1 ? size - (blocks - 1) * BLOCK : BLOCK;                          \
        __VA_ARGS__                                                                                                    \
    }

void NAME(inner)(const REAL *u, const REAL *v, double *products, int64_t count, int64_t size, int threads) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    double *sums = malloc(count * blocks * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    IN_BLOCKS({
        (void)sample;
        sums[block] = NAME(dot)(u + from, v + from, n);
    })
    for (int64_t i = 0; i < count; i++) products[i] = sum(sums + i * blocks, blocks);
    free(sums);
}

/* Inner products of the `n` images a and the `m` images b of each of `count` samples, n x m numbers for each. */
void NAME(products)(
    const REAL *a, const REAL *b, double *products, int64_t count, int64_t n, int64_t m, int64_t size, int threads
) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK, pairs = n * m;
    double *sums = malloc(count * blocks * pairs * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < count * blocks; block++) {
        const int64_t sample = block / blocks, start = block % blocks * BLOCK;
        const int64_t part = start + BLOCK < size ? BLOCK : size - start;
        double *own = sums + sample * pairs * blocks + block % blocks;
        for (int64_t j = 0; j < n; j++)
            for (int64_t k = 0; k < m; k++) /* products of an image's columns with themselves are symmetric */
                own[(j * m + k) * blocks] =
                    a == b && n == m && k < j
                        ? own[(k * m + j) * blocks]
                        : NAME(dot)(a + (sample * n + j) * size + start, b + (sample * m + k) * size + start, part);
    }
    for (int64_t i = 0; i < count * pairs; i++) products[i] = sum(sums + i * blocks, blocks);
    free(sums);
}

static REAL NAME(most)(const REAL *v, int64_t n) {
    REAL most = 0;
    int64_t bad = 0;
#pragma omp simd reduction(max : most) reduction(+ : bad)
    for (int64_t j = 0; j < n; j++) {
        const REAL value = v[j] < 0 ? -v[j] : v[j];
        most = value > most ? value : most;
        bad += value != value;
    }
    return bad ? NAN : most;
}

/* Largest |v| of `count` samples of `size` numbers; NaN if there is one. */
void NAME(largest)(const REAL *v, REAL *sizes, int64_t count, int64_t size, int threads) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    REAL *found = malloc(count * blocks * sizeof(REAL));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    IN_BLOCKS({
        (void)sample;
        found[block] = NAME(most)(v + from, n);
    })
    for (int64_t i = 0; i < count; i++) {
        REAL most = 0;
        for (int64_t k = i * blocks; k < (i + 1) * blocks; k++) most = found[k] > most || isnan(found[k]) ? found[k] : most;
        sizes[i] = most;
    }
    free(found);
}

/* One conjugate gradient update of `count` samples of `size` numbers, whatever the operator: q += alpha p,
   r -= alpha z, p = r + (||r||^2 / rz) p. `squares` receives ||r||^2. A sample whose alpha is NaN is left alone. */
void NAME(advance)(
    REAL *q, REAL *r, REAL *p, const REAL *z, const double *alphas, const double *rz, double *squares, int64_t count,
    int64_t size, int threads
) {
    const int64_t blocks = (size + BLOCK - 1) / BLOCK;
    double *sums = malloc(count * blocks * sizeof(double));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        IN_BLOCKS({
            if (isnan(alphas[sample])) continue;
            sums[block] = NAME(reduce)(r + from, z + from, (REAL)alphas[sample], n);
        })
#pragma omp for schedule(static)
        IN_BLOCKS({
            if (isnan(alphas[sample])) continue;
            const double square = sum(sums + sample * blocks, blocks);
            if (block % blocks == 0) squares[sample] = square;
            NAME(move_and_turn)(
                q + from, p + from, r + from, (REAL)alphas[sample], (REAL)(square / rz[sample]), n);
        })
    }
    free(sums);
}
#undef IN_BLOCKS
#undef BLOCK

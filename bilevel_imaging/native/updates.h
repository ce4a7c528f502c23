/* Included by kernels.c for each type. */

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
        const REAL *restrict ub = u + from, *restrict vb = v + from;
        double total = 0; /* so that squares of tiny numbers do not underflow */
        for (int64_t j = 0; j < n; j++) total += (double)ub[j] * vb[j];
        sums[block] = total;
    })
    for (int64_t i = 0; i < count; i++) products[i] = sum(sums + i * blocks, blocks);
    free(sums);
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
            REAL *restrict qb = q + from, *restrict rb = r + from;
            const REAL *restrict pb = p + from, *restrict zb = z + from;
            const REAL alpha = (REAL)alphas[sample];
            REAL square = 0;
            for (int64_t j = 0; j < n; j++) {
                qb[j] += alpha * pb[j];
                rb[j] -= alpha * zb[j];
                square += rb[j] * rb[j];
            }
            sums[block] = square;
        })
#pragma omp for schedule(static)
        IN_BLOCKS({
            if (isnan(alphas[sample])) continue;
            const double square = sum(sums + sample * blocks, blocks);
            const REAL beta = (REAL)(square / rz[sample]);
            REAL *restrict pb = p + from;
            const REAL *restrict rb = r + from;
            if (block % blocks == 0) squares[sample] = square;
            for (int64_t j = 0; j < n; j++) pb[j] = rb[j] + beta * pb[j];
        })
    }
    free(sums);
}
#undef IN_BLOCKS
#undef BLOCK

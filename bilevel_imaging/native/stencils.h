/* Included by kernels.c for each type. Images are stored row by row; a sample is `rows` rows of `width` pixels, of which
   every `height` form one plane (channel). D are forward differences inside a plane, 0 at its last row and column.

   A stencil is diag(d) + D^T M D + K with a symmetric 2 x 2 matrix M = [[a, b], [b, c]] at every pixel, b being 0 in the
   last row and column. `d` is one number, or a pixel's own where `diagonal` is not NULL; K is a symmetric circular
   convolution, or none. */

typedef struct {
    const REAL *a, *b, *c, *diagonal;
    REAL constant;
    NAME(Convolution) convolution;
    int64_t rows, height, width;
} NAME(Stencil);

/* Scratch for the products of one thread: `above` and what follows it. */
static REAL *NAME(scratch)(int64_t width, int64_t taps) {
    return malloc((4 * width + 1 + taps) * sizeof(REAL));
}

/* Row `row` of the stencil's product with p, into z; returns <p, z> on it. `above` holds the vertical part of the row
   above and is replaced by that of this row; `right` is scratch of 2 * width + 1 + taps. */
static REAL NAME(row_product)(
    const NAME(Stencil) *s, const REAL *p, int64_t row, REAL *restrict z, REAL *restrict above, REAL *restrict right
) {
    const int64_t w = s->width, at = row * w;
    const REAL *restrict a = s->a + at, *restrict b = s->b + at, *restrict c = s->c + at, *restrict here = p + at;
    REAL *restrict out = z + at;
    const int last = row % s->height == s->height - 1, first = row % s->height == 0;
    right[0] = 0; /* right[j + 1] belongs to pixel j */
    REAL total = 0;
    if (first) memset(above, 0, w * sizeof(REAL));
    if (last) {
        for (int64_t j = 0; j < w - 1; j++) right[j + 1] = a[j] * (here[j + 1] - here[j]);
        right[w] = 0;
        for (int64_t j = 0; j < w; j++) {
            out[j] = right[j] - right[j + 1] + above[j];
            above[j] = 0;
        }
    } else {
        const REAL *restrict below = here + w;
        for (int64_t j = 0; j < w - 1; j++) {
            const REAL dx = here[j + 1] - here[j], dy = below[j] - here[j];
            const REAL across = b[j] * dx + c[j] * dy;
            right[j + 1] = a[j] * dx + b[j] * dy;
            out[j] = above[j] - across;
            above[j] = across;
        }
        const REAL edge = c[w - 1] * (below[w - 1] - here[w - 1]);
        right[w] = 0;
        out[w - 1] = above[w - 1] - edge;
        above[w - 1] = edge;
        for (int64_t j = 0; j < w; j++) out[j] += right[j] - right[j + 1];
    }
    if (s->convolution.filters)
        NAME(row_convolution)(&s->convolution, p, row, s->height, w, out, right + w + 1);
    if (s->diagonal) {
        const REAL *restrict d = s->diagonal + at;
        for (int64_t j = 0; j < w; j++) {
            out[j] += d[j] * here[j];
            total += here[j] * out[j];
        }
    } else {
        const REAL d = s->constant;
        for (int64_t j = 0; j < w; j++) {
            out[j] += d * here[j];
            total += here[j] * out[j];
        }
    }
    return total;
}

/* The vertical part of row `row` alone, into `above`, by the same code: the same bits whoever computes it. `work` is
   scratch of 2 * width + 1. */
static void NAME(vertical)(const NAME(Stencil) *s, const REAL *p, int64_t row, REAL *above, REAL *work) {
    NAME(Stencil) local = *s;
    local.convolution.filters = NULL;
    NAME(row_product)(&local, p, row, work - row * s->width, above, work + s->width);
}

/* That of sample `i`, of those that start at `s`; every sample of a field takes rows * width numbers. */
static NAME(Stencil) NAME(sample)(const NAME(Stencil) *s, int64_t i) {
    NAME(Stencil) one = *s;
    const int64_t at = i * s->rows * s->width;
    if (one.a) one.a += at, one.b += at, one.c += at;
    if (one.diagonal) one.diagonal += at;
    if (one.convolution.filters)
        one.convolution.filters += i * (s->rows / s->height) * s->convolution.terms * 2 * s->convolution.taps;
    return one;
}

/* z = (the stencil) p for `count` samples. */
void NAME(stencil_product)(
    const REAL *p, const REAL *a, const REAL *b, const REAL *c, const REAL *diagonal, REAL constant,
    const REAL *filters, int64_t terms, int64_t taps, REAL *z, int64_t count, int64_t rows, int64_t height, int64_t width,
    int threads
) {
    const NAME(Stencil) first = {a, b, c, diagonal, constant, {filters, terms, taps}, rows, height, width};
    const int64_t blocks_each = blocks_of_each(count, threads);
    const int64_t blocks = count * blocks_each;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t start = (block / blocks_each) * rows * width, part = block % blocks_each;
        const int64_t from = rows * part / blocks_each, to = rows * (part + 1) / blocks_each;
        const NAME(Stencil) s = NAME(sample)(&first, block / blocks_each);
        REAL *work = NAME(scratch)(width, taps);
        if (from < to && from > 0) NAME(vertical)(&s, p + start, from - 1, work, work + width);
        for (int64_t row = from; row < to; row++)
            NAME(row_product)(&s, p + start, row, z + start, work, work + width);
        free(work);
    }
}

/* State of one system's conjugate gradients, read and written. `rz` = ||r||^2; `radau` and `lowest` are those of the
   Gauss-Radau bound of the energy norm (NaN: none). */
typedef struct {
    double residual, target, rz, radau, lowest, energy;
    int64_t status, iterations;
} NAME(Progress);

/* Conjugate gradients on one sample, by a team of threads that share its rows. Sums are formed row by row and then over
   all rows in order, so the result does not depend on the number of threads. `sums` is scratch of 2 * rows. */
static void NAME(solve_one)(
    const NAME(Stencil) *s, REAL *q, REAL *r, REAL *p, REAL *z, double *sums, REAL *work, NAME(Progress) *shared,
    int64_t max_iter, int thread, int team
) {
    const int64_t w = s->width, from = s->rows * thread / team, to = s->rows * (thread + 1) / team;
    double *curvatures = sums, *squares = sums + s->rows;
    NAME(Progress) now = *shared;
    wait_for_team(team); /* everybody has read it */
    REAL beta = 0;
    int pending = 0; /* p = r + beta p is put off until the next product, which passes over p anyway */
    while (now.status == RUNNING && now.iterations < max_iter && now.residual > now.target && isfinite(now.residual)) {
        if (pending && (team > 1 || s->convolution.filters)) { /* other rows are needed than the next one */
            NAME(turn)(p + from * w, r + from * w, beta, (to - from) * w);
            pending = 0;
            wait_for_team(team);
        }
        if (pending && from < to) NAME(turn)(p + from * w, r + from * w, beta, w);
        if (from < to && from > 0) NAME(vertical)(s, p, from - 1, work, work + w);
        for (int64_t row = from; row < to; row++) {
            if (pending && row + 1 < to) NAME(turn)(p + (row + 1) * w, r + (row + 1) * w, beta, w);
            curvatures[row] = NAME(row_product)(s, p, row, z, work, work + w);
        }
        pending = 0;
        wait_for_team(team);
        const double curvature = sum(curvatures, s->rows);
        if (!(curvature > 0 && now.rz > 0)) {
            now.status = isfinite(curvature + now.rz) ? INDEFINITE : NOT_FINITE;
            now.iterations++;
            break;
        }
        const double step = now.rz / curvature;
        const REAL alpha = (REAL)step;
        for (int64_t row = from; row < to; row++)
            squares[row] = NAME(move)(q + row * w, r + row * w, p + row * w, z + row * w, alpha, w);
        wait_for_team(team);
        const double square = sum(squares, s->rows), ratio = square / now.rz;
        beta = (REAL)ratio;
        now.rz = square;
        now.residual = sqrt(square);
        now.iterations++;
        pending = 1;
        const double gap = now.radau - step;
        now.radau = gap > 0 ? gap / (now.lowest * gap + ratio) : NAN;
        now.energy = sqrt(now.radau * square);
        if (isnan(now.energy)) now.energy = INFINITY;
    }
    if (pending) NAME(turn)(p + from * w, r + from * w, beta, (to - from) * w);
    if (now.status == RUNNING) {
        if (!isfinite(now.residual)) now.status = NOT_FINITE;
        else if (now.residual <= now.target) now.status = DONE;
        else now.status = MAX_ITER;
    }
    wait_for_team(team);
    if (thread == 0) *shared = now;
}

/* Conjugate gradients for (the stencil) q = b, all samples; q, r, p and `progress` go on from where they are. */
void NAME(stencil_solve)(
    const REAL *a, const REAL *b, const REAL *c, const REAL *diagonal, REAL constant, const REAL *filters, int64_t terms,
    int64_t taps, REAL *q, REAL *r, REAL *p, void *progress, int64_t count, int64_t rows, int64_t height, int64_t width,
    int64_t max_iter, int threads
) {
    const NAME(Stencil) first = {a, b, c, diagonal, constant, {filters, terms, taps}, rows, height, width};
    NAME(Progress) *all = progress;
    const int64_t size = rows * width;
    if (count >= threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            REAL *z = malloc(size * sizeof(REAL)), *work = NAME(scratch)(width, taps);
            double *sums = malloc(2 * rows * sizeof(double));
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < count; i++) {
                const int64_t at = i * size;
                const NAME(Stencil) s = NAME(sample)(&first, i);
                NAME(solve_one)(&s, q + at, r + at, p + at, z, sums, work, all + i, max_iter, 0, 1);
            }
            free(z);
            free(work);
            free(sums);
        }
        return;
    }
    REAL *z = malloc(size * sizeof(REAL));
    double *sums = malloc(2 * rows * sizeof(double));
#pragma omp parallel num_threads(threads)
    {
        REAL *work = NAME(scratch)(width, taps);
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = i * size;
            const NAME(Stencil) s = NAME(sample)(&first, i);
            NAME(solve_one)(
                &s, q + at, r + at, p + at, z, sums, work, all + i, max_iter, thread_number(), team_size());
        }
        free(work);
    }
    free(z);
    free(sums);
}

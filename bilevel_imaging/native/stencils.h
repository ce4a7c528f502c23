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

/* Stencil of weight D^T (I - (u n^T + n u^T) / 2) D / s at `size` pixels; a, b, c may be any of n0, n1, inverse. */
static void NAME(tv_model)(
    const REAL *n0, const REAL *n1, const REAL *u0, const REAL *u1, const REAL *inverse, REAL weight, REAL *a, REAL *b,
    REAL *c, int64_t size
) {
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
        const REAL scale = weight * inverse[j], x = n0[j], y = n1[j];
        a[j] = scale * (1 - u0[j] * x);
        b[j] = -scale * (REAL)0.5 * (u0[j] * y + u1[j] * x);
        c[j] = scale * (1 - u1[j] * y);
    }
}

/* Scratch for the products of one thread: `above` and what follows it. */
static REAL *NAME(scratch)(int64_t width, int64_t taps) {
    return aligned_malloc((2 * width + taps) * sizeof(REAL));
}

/* Row `row` of the stencil's product with p, into z; returns <p, z> on it. `above` holds the vertical part of the row
   above and is replaced by that of this row; `line` is scratch of width + taps. */
ONE_CODE static REAL NAME(row_product)(
    const NAME(Stencil) *s, const REAL *p, int64_t row, REAL *restrict z, REAL *restrict above, REAL *restrict line
) {
    const int64_t w = s->width, at = row * w;
    const REAL *a = s->a + at, *b = s->b + at, *c = s->c + at, *here = p + at;
    const REAL *below = row % s->height == s->height - 1 ? here : here + w;
    const REAL *d = s->diagonal ? s->diagonal + at : NULL;
    const int convolved = s->convolution.filters != NULL;
    const REAL constant = s->constant;
    REAL *out = z + at;
    if (row % s->height == 0) memset(above, 0, w * sizeof(REAL));
    NAME(Vector) left = {0}, sums = {0};
    int64_t j = 0;
    for (; j + LANES <= w; j += LANES) {
        const NAME(Vector) v = NAME(load)(here + j), dy = NAME(load)(below + j) - v;
        const NAME(Vector) dx = (j + LANES < w ? NAME(load)(here + j + 1) : MOVED_DOWN(v)) - v;
        const NAME(Vector) mixed = NAME(load)(b + j), across = mixed * dx + NAME(load)(c + j) * dy;
        const NAME(Vector) right = NAME(load)(a + j) * dx + mixed * dy;
        NAME(Vector) sum = NAME(load)(above + j) - across + MOVED_UP(left, right) - right;
        NAME(store)(above + j, across);
        left = right;
        if (!convolved) {
            if (d) sum += NAME(load)(d + j) * v;
            else sum += constant * v;
            sums += v * sum;
        }
        NAME(store)(out + j, sum);
    }
    REAL total = 0, before = left[LANES - 1];
    for (int64_t k = 0; k < LANES; k++) total += sums[k];
    for (; j < w; j++) {
        const REAL dx = j < w - 1 ? here[j + 1] - here[j] : 0, dy = below[j] - here[j];
        const REAL across = b[j] * dx + c[j] * dy, right = a[j] * dx + b[j] * dy;
        out[j] = above[j] - across + before - right;
        above[j] = across;
        before = right;
        if (!convolved) {
            out[j] += (d ? d[j] : constant) * here[j];
            total += here[j] * out[j];
        }
    }
    if (!convolved) return total;
    NAME(row_convolution)(&s->convolution, p, row, s->height, w, out, line);
    for (j = 0; j < w; j++) {
        out[j] += (d ? d[j] : constant) * here[j];
        total += here[j] * out[j];
    }
    return total;
}

/* The vertical part of row `row` alone, into `above`, by the same code: the same bits whoever computes it. `work` is
   scratch of width. */
static void NAME(vertical)(const NAME(Stencil) *s, const REAL *p, int64_t row, REAL *above, REAL *work) {
    NAME(Stencil) local = *s;
    local.convolution.filters = NULL;
    NAME(row_product)(&local, p, row, work - row * s->width, above, NULL);
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
        const Block part = block_of(block, blocks_each, rows);
        const int64_t start = part.image * rows * width;
        const NAME(Stencil) s = NAME(sample)(&first, part.image);
        REAL *work = NAME(scratch)(width, taps);
        if (part.from < part.to && part.from > 0)
            NAME(vertical)(&s, p + start, part.from - 1, work, work + width);
        for (int64_t row = part.from; row < part.to; row++)
            NAME(row_product)(&s, p + start, row, z + start, work, work + width);
        free(work);
    }
}

/* State of one system's conjugate gradients, read and written. `rz` = ||r||^2; `radau` and `lowest` are those of the
   Gauss-Radau bound of the energy norm (NaN: none). `drift` is how far the recursed residual was from the true one. */
typedef struct {
    double residual, target, rz, radau, lowest, energy, drift;
    int64_t status, iterations;
} NAME(Progress);

/* r = rhs - (the stencil) q with its norm, and the norm of what that changes; rows and sums as in `solve_one`. */
static void NAME(verify)(
    const NAME(Stencil) *s, const REAL *rhs, const REAL *q, REAL *r, REAL *z, double *sums, REAL *work,
    NAME(Progress) *now, int64_t from, int64_t to, int team
) {
    const int64_t w = s->width;
    double *squares = sums, *changes = sums + s->rows;
    if (from < to && from > 0) NAME(vertical)(s, q, from - 1, work, work + w);
    for (int64_t row = from; row < to; row++) {
        NAME(row_product)(s, q, row, z, work, work + w);
        double square = 0, change = 0;
#pragma omp simd reduction(+ : square, change)
        for (int64_t j = row * w; j < (row + 1) * w; j++) {
            const REAL residual = rhs[j] - z[j], moved = residual - r[j];
            square += (double)residual * residual;
            change += (double)moved * moved;
            r[j] = residual;
        }
        squares[row] = square;
        changes[row] = change;
    }
    wait_for_team(team);
    now->residual = sqrt(sum(squares, s->rows));
    now->drift = sqrt(sum(changes, s->rows));
}

/* Conjugate gradients on one sample, by a team of threads that share its rows, and with `rhs` the residual that they end
   with. Sums are formed row by row and then over all rows in order, so the result does not depend on the number of
   threads. `sums` is scratch of 2 * rows. */
static void NAME(solve_one)(
    const NAME(Stencil) *s, const REAL *rhs, REAL *q, REAL *r, REAL *p, REAL *z, double *sums, REAL *work,
    NAME(Progress) *shared, int64_t max_iter, int thread, int team
) {
    const int64_t w = s->width, from = s->rows * thread / team, to = s->rows * (thread + 1) / team;
    double *curvatures = sums, *squares = sums + s->rows;
    NAME(Progress) now = *shared;
    const int runs = now.status == RUNNING;
    wait_for_team(team); /* everybody has read it */
    REAL alpha = 0, beta = 0;
    int pending = 0; /* q += alpha p and p = r + beta p are put off until the next product, which passes over p anyway */
    while (now.status == RUNNING && now.iterations < max_iter && now.residual > now.target && isfinite(now.residual)) {
        if (pending && (team > 1 || s->convolution.filters)) { /* other rows are needed than the next one */
            NAME(move_and_turn)(q + from * w, p + from * w, r + from * w, alpha, beta, (to - from) * w);
            pending = 0;
            wait_for_team(team);
        }
        if (pending && from < to) NAME(move_and_turn)(q + from * w, p + from * w, r + from * w, alpha, beta, w);
        if (from < to && from > 0) NAME(vertical)(s, p, from - 1, work, work + w);
        for (int64_t row = from; row < to; row++) {
            const int64_t next = (row + 1) * w;
            if (pending && row + 1 < to) NAME(move_and_turn)(q + next, p + next, r + next, alpha, beta, w);
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
        alpha = (REAL)step;
        for (int64_t row = from; row < to; row++) squares[row] = NAME(reduce)(r + row * w, z + row * w, alpha, w);
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
    if (pending) NAME(move_and_turn)(q + from * w, p + from * w, r + from * w, alpha, beta, (to - from) * w);
    if (now.status == RUNNING) {
        if (!isfinite(now.residual)) now.status = NOT_FINITE;
        else if (now.residual <= now.target) now.status = DONE;
        else now.status = MAX_ITER;
    }
    wait_for_team(team);
    if (runs && rhs) NAME(verify)(s, rhs, q, r, z, sums, work, &now, from, to, team);
    if (thread == 0) *shared = now;
}

/* Conjugate gradients for (the stencil) q = rhs, all samples; q, r, p and `progress` go on from where they are, and r
   becomes the true residual where `rhs` is not NULL. With a `weight` that is not NaN, a, b and c are n0, n1 and 1 / s of
   total variation, from which the stencil is made image by image, in the cache. */
void NAME(stencil_solve)(
    const REAL *a, const REAL *b, const REAL *c, REAL weight, const REAL *diagonal, REAL constant, const REAL *filters,
    int64_t terms, int64_t taps, const REAL *rhs, REAL *q, REAL *r, REAL *p, void *progress, int64_t count, int64_t rows,
    int64_t height, int64_t width, int64_t max_iter, int threads
) {
    const NAME(Stencil) first = {a, b, c, diagonal, constant, {filters, terms, taps}, rows, height, width};
    NAME(Progress) *all = progress;
    const int64_t size = rows * width, apart = NAME(spread)(size), lines = NAME(spread)(2 * width + taps);
    const int team = count >= threads ? 1 : threads, outside = team == 1 ? threads : 1;
#pragma omp parallel num_threads(outside) if (outside > 1)
    {
        const int64_t images = apart * (isnan(weight) ? 1 : 4);
        REAL *z = aligned_malloc((images + team * lines) * sizeof(REAL));
        REAL *own[] = {z + apart, z + 2 * apart, z + 3 * apart};
        double *sums = malloc(2 * rows * sizeof(double));
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            if (all[i].status != RUNNING) continue;
            NAME(Stencil) s = NAME(sample)(&first, i);
            const NAME(Stencil) given = s;
            if (!isnan(weight)) s.a = own[0], s.b = own[1], s.c = own[2];
            const int64_t at = i * size;
#pragma omp parallel num_threads(team) if (team > 1)
            {
                const int thread = team > 1 ? thread_number() : 0, present = team > 1 ? team_size() : 1;
                const int64_t from = rows * thread / present * width, to = rows * (thread + 1) / present * width;
                if (!isnan(weight))
                    NAME(tv_model)(
                        given.a + from, given.b + from, given.a + from, given.b + from, given.c + from, weight,
                        own[0] + from, own[1] + from, own[2] + from, to - from);
                wait_for_team(present);
                NAME(solve_one)(
                    &s, rhs ? rhs + at : NULL, q + at, r + at, p + at, z, sums, z + images + thread * lines, all + i,
                    max_iter, thread, present);
            }
        }
        free(z);
        free(sums);
    }
}

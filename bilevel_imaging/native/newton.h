/* Included by kernels.c for each type: Newton's method with truncated conjugate gradients, as in
   lower_solvers/newton_cg.py, which says why, on 1/2 <x, S x> - <b, x> + smoothed total variation with S = diag(d) + K.
   A few passes per step, image by image. */

#define LARGEST_FORCING 0.1
#define OVERSOLVE 0.5
#define SLOPE_FRACTION 0.5
#define RECORD_FRACTION 0.9
#define SUFFICIENT 1e-4
#define ENERGY_UNITS 16
#define MOST_TRIALS 12
#define PATIENCE 3
#define IMAGES 14 /* of scratch */

typedef struct {
    NAME(Stencil) data; /* S; its fields a, b, c are those of the Newton system of the moment */
    const REAL *b;
    REAL weight, smoothing;
} NAME(Energy);

/* x, the gradient there, the unit field n = Dx / s, and 1 / s. */
typedef struct {
    REAL *x, *grad, *n0, *n1, *inverse;
} NAME(Place);

/* Where one image stands. `size` = ||gradient||; `target` is to be reached; `offset` makes the energy that of the data
   term; `best_size` is NaN, and `first_size` 0, at a start. */
typedef struct {
    double size, best_size, first_size, target, offset;
    int64_t status, iterations, idle, gradients, products;
} NAME(Descent);

typedef struct {
    double *squares, *slopes, *values; /* by rows */
    NAME(Progress) system;
} NAME(Shared);

/* Rows of one thread of a team. */
typedef struct {
    int64_t from, to;
    int thread, team;
    REAL *work; /* scratch of the stencil's products, and three rows */
} NAME(Part);

/* Row `row` of x + t d. */
static void NAME(along_row)(REAL *restrict to, const REAL *x, const REAL *d, REAL t, int64_t row, int64_t w) {
    for (int64_t j = row * w; j < (row + 1) * w; j++) to[j] = x[j] + t * d[j];
}

/* Everything at `to->x` = x + t d (x itself without d), with sums of its rows: squares of the gradient, its slopes along
   d, and energies. */
static void NAME(evaluate)(
    const NAME(Energy) *e, const NAME(Place) *to, const REAL *x, const REAL *d, REAL t, const NAME(Part) *part,
    NAME(Shared) *shared
) {
    const NAME(Stencil) *s = &e->data;
    const int64_t w = s->width, h = s->height;
    int64_t made = d ? part->from : part->to; /* rows of the point */
    if (part->team > 1 || s->convolution.filters) { /* other rows are needed than the next one */
        for (; made < part->to; made++) NAME(along_row)(to->x, x, d, t, made, w);
        wait_for_team(part->team);
    }
    REAL *line = part->work, *above = line + 2 * w + s->convolution.taps, *linear = above + w, *lengths = linear + w;
    if (d && made < part->to) NAME(along_row)(to->x, x, d, t, made++, w);
    if (part->from < part->to) NAME(variation_above)(to->x, part->from, e->smoothing, above, line, h, w);
    for (int64_t row = part->from; row < part->to; row++) {
        const int64_t at = row * w;
        if (d && made < part->to) NAME(along_row)(to->x, x, d, t, made++, w);
        const REAL *here = to->x + at, *below = row % h == h - 1 ? here : here + w, *b = e->b + at;
        REAL *out = to->grad + at, *inverse = to->inverse + at;
        if (row % h == 0) memset(above, 0, w * sizeof(REAL));
        NAME(variation_row)(here, below, e->weight, e->smoothing, to->n0 + at, to->n1 + at, inverse, above, out, w);
        const REAL *diagonal = s->diagonal ? s->diagonal + at : NULL; /* gradient of the data term: */
        if (diagonal)
            for (int64_t j = 0; j < w; j++) linear[j] = diagonal[j] * here[j] - b[j];
        else
            for (int64_t j = 0; j < w; j++) linear[j] = s->constant * here[j] - b[j];
        if (s->convolution.filters) NAME(row_convolution)(&s->convolution, to->x, row, h, w, linear, line);
        NAME(inverses)(inverse, lengths, w);
        double value = 0, roots = 0, square = 0, slope = 0; /* so that squares of tiny numbers do not underflow */
        const REAL *along = d ? d + at : out;
#pragma omp simd reduction(+ : value, roots, square, slope)
        for (int64_t j = 0; j < w; j++) {
            value += (double)here[j] * (linear[j] - b[j]);
            roots += (double)lengths[j];
            const REAL total = out[j] + linear[j];
            out[j] = total;
            square += (double)total * total;
            slope += (double)total * along[j];
        }
        shared->values[row] = value / 2 + e->weight * roots;
        shared->squares[row] = square;
        shared->slopes[row] = slope;
    }
    wait_for_team(part->team);
}

/* The step d of Newton's method at `at`, in `q`; returns its slope. The fields of `other` hold the system meanwhile. */
static double NAME(newton_direction)(
    const NAME(Energy) *e, const NAME(Place) *at, const NAME(Place) *other, const REAL *u0, const REAL *u1, REAL *q,
    REAL *z, double tol, int64_t max_inner, NAME(Descent) *now, const NAME(Part) *part, NAME(Shared) *shared
) {
    const int64_t w = e->data.width, from = part->from * w, size = (part->to - part->from) * w;
    const int reach = sizeof(REAL) == 4 ? 120 : 1000, usual = now->size > 1e-6 && now->size < 1e6;
    int exponent = 0;
    if (!usual) frexp(now->size, &exponent); /* units of a power of two: exact, and squares do not underflow */
    exponent = exponent < -reach ? -reach : exponent > reach ? reach : exponent;
    const double unit = ldexp(1, exponent);
    const REAL scale = (REAL)(1 / unit), back = (REAL)unit;
    NAME(tv_model)(
        at->n0 + from, at->n1 + from, u0 + from, u1 + from, at->inverse + from, e->weight, other->n0 + from,
        other->n1 + from, other->inverse + from, size);
    for (int64_t j = from; j < from + size; j++) {
        other->x[j] = other->grad[j] = -at->grad[j] * scale;
        q[j] = 0;
    }
    const double residual = now->size / unit, floor = residual * (sizeof(REAL) == 4 ? 0x1p-26 : 0x1p-55);
    if (part->thread == 0) {
        const NAME(Progress) start = {
            residual, tol / unit > floor ? tol / unit : floor, residual * residual, NAN, NAN, INFINITY, 0, RUNNING, 0};
        shared->system = start;
    }
    wait_for_team(part->team);
    NAME(Stencil) system = e->data;
    system.a = other->n0, system.b = other->n1, system.c = other->inverse;
    NAME(solve_one)(
        &system, NULL, q, other->x, other->grad, z, shared->squares, part->work, &shared->system, max_inner, part->thread,
        part->team);
    for (int64_t row = part->from; row < part->to; row++) {
        if (!usual)
            for (int64_t j = row * w; j < (row + 1) * w; j++) q[j] *= back;
        shared->slopes[row] = NAME(dot)(at->grad + row * w, q + row * w, w);
    }
    wait_for_team(part->team); /* for that thread 0 has told how it ended, too */
    now->products += shared->system.iterations;
    double slope = sum(shared->slopes, e->data.rows);
    if (!(slope < 0) || shared->system.status == NOT_FINITE) { /* a model that rounding made indefinite */
        for (int64_t j = from; j < from + size; j++) q[j] = -at->grad[j];
        slope = -now->size * now->size;
    }
    return slope;
}

/* The first point along q that will do, at `to`, and its step; NaN if there is none. */
static double NAME(line_search)(
    const NAME(Energy) *e, const NAME(Place) *at, const NAME(Place) *to, const REAL *q, double slope, double value,
    double *new_value, NAME(Descent) *now, const NAME(Part) *part, NAME(Shared) *shared
) {
    const int64_t rows = e->data.rows;
    const double steepness = fabs(slope), unit = sizeof(REAL) == 4 ? 0x1p-23 : 0x1p-52;
    double t = 1;
    for (int trial = 0; trial < MOST_TRIALS - 1; trial++) {
        NAME(evaluate)(e, to, at->x, q, (REAL)t, part, shared);
        const double square = sum(shared->squares, rows), along = sum(shared->slopes, rows);
        *new_value = now->offset + sum(shared->values, rows);
        now->gradients++;
        now->size = sqrt(square);
        const int near = along > 0 && along <= SLOPE_FRACTION * steepness;
        if (along <= 0 || (near && now->size <= RECORD_FRACTION * now->best_size)) return t;
        const double enough = near ? 0 : SUFFICIENT * t * steepness + ENERGY_UNITS * unit * fabs(value);
        if (along > 0 && *new_value <= value - enough) return t;
        const double most = 2 * trial < MOST_TRIALS ? 0.7 : 0.1;
        double fraction = slope / (slope - along); /* where the secant of the slope is 0 */
        fraction = fraction > 0.1 ? fraction : 0.1;  /* also where that is NaN */
        t *= fraction < most ? fraction : most;
    }
    return NAN;
}

/* One image: x, the best point and the dual field (two images, written for a run to be continued). `scratch` holds
   IMAGES images. */
static void NAME(descend_one)(
    const NAME(Energy) *e, REAL *x, REAL *best, REAL *dual, const REAL *initial, int begin, REAL *scratch,
    NAME(Descent) *where, NAME(Shared) *shared, int64_t max_iter, int64_t max_inner, const NAME(Part) *part
) {
    const NAME(Stencil) *s = &e->data;
    const int64_t n = s->rows * s->width, from = part->from * s->width, size = (part->to - part->from) * s->width;
    const size_t bytes = size * sizeof(REAL);
    const int64_t m = NAME(spread)(n);
    REAL *k = scratch;
    NAME(Place) at = {k, k + m, k + 2 * m, k + 3 * m, k + 4 * m};
    NAME(Place) other = {k + 5 * m, k + 6 * m, k + 7 * m, k + 8 * m, k + 9 * m};
    REAL *u0 = k + 10 * m, *u1 = k + 11 * m, *q = k + 12 * m, *z = k + 13 * m;
    NAME(Descent) now = *where;
    memcpy(at.x + from, x + from, bytes);
    wait_for_team(part->team);
    NAME(evaluate)(e, &at, at.x, NULL, 0, part, shared);
    now.size = sqrt(sum(shared->squares, s->rows));
    double value = now.offset + sum(shared->values, s->rows), new_value = value;
    now.gradients++;
    int best_here = isnan(now.best_size);
    if (best_here) now.best_size = now.size;
    if (initial && now.size > now.target) { /* forcing terms relative to a cold start */
        wait_for_team(part->team);
        memcpy(other.x + from, initial + from, bytes);
        wait_for_team(part->team);
        NAME(evaluate)(e, &other, other.x, NULL, 0, part, shared);
        const double start = sqrt(sum(shared->squares, s->rows));
        now.first_size = start > now.first_size ? start : now.first_size;
        now.gradients++;
    }
    if (now.size > now.first_size) now.first_size = now.size;
    if (begin == COLD) memset(u0 + from, 0, bytes), memset(u1 + from, 0, bytes);
    else {
        memcpy(u0 + from, begin == WARM ? at.n0 + from : dual + from, bytes);
        memcpy(u1 + from, begin == WARM ? at.n1 + from : dual + n + from, bytes);
    }
    wait_for_team(part->team);
    int moved = 0;
    while (now.status == RUNNING && !(now.size <= now.target) && isfinite(now.size) && now.iterations < max_iter &&
           !(moved && now.idle >= PATIENCE)) {
        const double forcing = sqrt(now.size / now.first_size), before = now.size;
        double tol = (forcing < LARGEST_FORCING ? forcing : LARGEST_FORCING) * now.size;
        tol = tol > OVERSOLVE * now.target ? tol : OVERSOLVE * now.target;
        const double slope =
            NAME(newton_direction)(e, &at, &other, u0, u1, q, z, tol, max_inner, &now, part, shared);
        const double t = NAME(line_search)(e, &at, &other, q, slope, value, &new_value, &now, part, shared);
        moved = 1;
        now.iterations++;
        now.idle = now.size <= RECORD_FRACTION * now.best_size && !isnan(t) ? 0 : now.idle + 1;
        if (isnan(t)) {
            now.status = STAGNATED;
            now.size = before;
            break;
        }
        const int record = now.size < now.best_size;
        if (best_here && !record) memcpy(best + from, at.x + from, bytes);
        best_here = record;
        if (record) now.best_size = now.size;
        const NAME(Place) old = at;
        at = other, other = old;
        value = new_value;
        for (int64_t row = part->from; row < part->to; row++) {
            const int64_t j = row * s->width;
            NAME(dual_row)(
                q + j, row % s->height < s->height - 1 ? q + j + s->width : q + j, (REAL)t, old.n0 + j, old.n1 + j, u0 + j,
                u1 + j, old.inverse + j, u0 + j, u1 + j, s->width);
        }
        wait_for_team(part->team);
    }
    if (best_here) memcpy(best + from, at.x + from, bytes);
    memcpy(x + from, at.x + from, bytes);
    if (now.status == RUNNING && !(now.size <= now.target))
        memcpy(dual + from, u0 + from, bytes), memcpy(dual + n + from, u1 + from, bytes);
    wait_for_team(part->team);
    if (part->thread == 0) *where = now;
}

/* All images that run: x and `best` are `count` images, `dual` is as many pairs; `initial` is read for forcing terms, or
   NULL. */
void NAME(descend)(
    const REAL *b, const REAL *diagonal, REAL constant, const REAL *filters, int64_t terms, int64_t taps, REAL weight,
    REAL smoothing, REAL *x, REAL *best, REAL *dual, const REAL *initial, void *progress, int64_t begin, int64_t count,
    int64_t rows, int64_t height, int64_t width, int64_t max_iter, int64_t max_inner, int threads
) {
    const NAME(Stencil) field = {NULL, NULL, NULL, diagonal, constant, {filters, terms, taps}, rows, height, width};
    const int64_t n = rows * width, lines = NAME(spread)(5 * width + taps);
    const int team = count >= threads ? 1 : threads;
    const int outside = team == 1 ? threads : 1;
    NAME(Descent) *all = progress;
#pragma omp parallel num_threads(outside) if (outside > 1)
    {
        const int64_t images = IMAGES * NAME(spread)(n);
        REAL *scratch = aligned_malloc((images + team * lines) * sizeof(REAL));
        double *sums = malloc(3 * rows * sizeof(double));
        NAME(Shared) shared = {.squares = sums, .slopes = sums + rows, .values = sums + 2 * rows};
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            if (all[i].status != RUNNING) continue;
            const NAME(Energy) e = {NAME(sample)(&field, i), b + i * n, weight, smoothing};
            const REAL *start = initial ? initial + i * n : NULL;
#pragma omp parallel num_threads(team) if (team > 1)
            {
                const int thread = team > 1 ? thread_number() : 0, present = team > 1 ? team_size() : 1;
                const NAME(Part) part = {
                    rows * thread / present, rows * (thread + 1) / present, thread, present,
                    scratch + images + thread * lines};
                NAME(descend_one)(
                    &e, x + i * n, best + i * n, dual + 2 * i * n, start, (int)begin, scratch, all + i, &shared, max_iter, max_inner,
                    &part);
            }
        }
        free(scratch);
        free(sums);
    }
}

#undef LARGEST_FORCING
#undef OVERSOLVE
#undef SLOPE_FRACTION
#undef RECORD_FRACTION
#undef SUFFICIENT
#undef ENERGY_UNITS
#undef MOST_TRIALS
#undef PATIENCE
#undef IMAGES

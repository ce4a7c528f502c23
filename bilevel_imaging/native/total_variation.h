/* Included by kernels.c for each type: smoothed isotropic total variation, channel by channel. */

/* Row of smoothed total variation at x: unit field n = Dx / s and 1 / s where n0 is not NULL, and `weight` D^T n, into
   `out`. `below` is the next row of x, or the same at the end of a plane; `above` holds the vertical part of the row
   above, 0 at the start of a plane, and is replaced by that of this row. */
ONE_CODE static void NAME(variation_row)(
    const REAL *here, const REAL *below, REAL weight, REAL smoothing, REAL *n0, REAL *n1, REAL *inverse,
    REAL *restrict above, REAL *restrict out, int64_t width
) {
    const REAL floor = smoothing * smoothing;
    NAME(Vector) left = {0};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        const NAME(Vector) v = NAME(load)(here + j), dy = NAME(load)(below + j) - v;
        const NAME(Vector) dx = (j + LANES < width ? NAME(load)(here + j + 1) : MOVED_DOWN(v)) - v;
        const NAME(Vector) one = NAME(inverse_root)(dx * dx + (dy * dy + floor)), x = dx * one, y = dy * one;
        if (n0) {
            NAME(store)(n0 + j, x);
            NAME(store)(n1 + j, y);
            NAME(store)(inverse + j, one);
        }
        NAME(store)(out + j, weight * ((NAME(load)(above + j) - y) + (MOVED_UP(left, x) - x)));
        NAME(store)(above + j, y);
        left = x;
    }
    REAL before = left[LANES - 1];
    for (; j < width; j++) {
        const REAL dx = j < width - 1 ? here[j + 1] - here[j] : 0, dy = below[j] - here[j];
        const REAL one = 1 / SQRT(dx * dx + (dy * dy + floor)), x = dx * one, y = dy * one;
        if (n0) n0[j] = x, n1[j] = y, inverse[j] = one;
        out[j] = weight * ((above[j] - y) + (before - x));
        above[j] = y;
        before = x;
    }
}

/* The vertical part of the row before row `row`, into `above`: 0 at the start of a plane. `line` is scratch. */
static void NAME(variation_above)(
    const REAL *x, int64_t row, REAL smoothing, REAL *above, REAL *line, int64_t height, int64_t width
) {
    memset(above, 0, width * sizeof(REAL));
    const REAL *here = x + (row - 1) * width;
    if (row % height > 0) NAME(variation_row)(here, here + width, 1, smoothing, NULL, NULL, NULL, above, line, width);
}

/* Gradient at x, and where `unit` is not NULL the unit field, in two components `apart` numbers from each other, and
   1 / s. */
void NAME(tv_linearize)(
    const REAL *x, REAL weight, REAL smoothing, REAL *unit, int64_t apart, REAL *reciprocal, REAL *grad, int64_t planes,
    int64_t height, int64_t width, int threads
) {
    const int64_t blocks_each = blocks_of_each(planes, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < planes * blocks_each; block++) {
        const Block part = block_of(block, blocks_each, height);
        REAL *above = malloc(2 * width * sizeof(REAL));
        for (int64_t i = part.from; i < part.to; i++) {
            const int64_t row = part.image * height + i, at = row * width;
            const REAL *here = x + at, *below = i < height - 1 ? here + width : here;
            if (i == part.from) NAME(variation_above)(x, row, smoothing, above, above + width, height, width);
            NAME(variation_row)(
                here, below, weight, smoothing, unit ? unit + at : NULL, unit ? unit + apart + at : NULL,
                unit ? reciprocal + at : NULL, above, grad + at, width);
        }
        free(above);
    }
}

/* Row of the Hessian product weight D^T (I - n n^T) D v / s, into `out`; `below` and `above` as for the gradient. */
ONE_CODE static void NAME(curvature_row)(
    const REAL *here, const REAL *below, REAL weight, const REAL *n0, const REAL *n1, const REAL *inverse,
    REAL *restrict above, REAL *restrict out, int64_t width
) {
    NAME(Vector) left = {0};
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        const NAME(Vector) v = NAME(load)(here + j), dy = NAME(load)(below + j) - v;
        const NAME(Vector) dx = (j + LANES < width ? NAME(load)(here + j + 1) : MOVED_DOWN(v)) - v;
        const NAME(Vector) a = NAME(load)(n0 + j), b = NAME(load)(n1 + j), scale = weight * NAME(load)(inverse + j);
        const NAME(Vector) along = a * dx + b * dy, x = (dx - a * along) * scale, y = (dy - b * along) * scale;
        NAME(store)(out + j, (NAME(load)(above + j) - y) + (MOVED_UP(left, x) - x));
        NAME(store)(above + j, y);
        left = x;
    }
    REAL before = left[LANES - 1];
    for (; j < width; j++) {
        const REAL dx = j < width - 1 ? here[j + 1] - here[j] : 0, dy = below[j] - here[j], scale = weight * inverse[j];
        const REAL along = n0[j] * dx + n1[j] * dy, x = (dx - n0[j] * along) * scale, y = (dy - n1[j] * along) * scale;
        out[j] = (above[j] - y) + (before - x);
        above[j] = y;
        before = x;
    }
}

/* Hessian products with `planes`: as fast as those of the stencil, which has to be made first. */
void NAME(tv_product)(
    const REAL *v, REAL weight, const REAL *unit, int64_t apart, const REAL *reciprocal, REAL *out, int64_t planes,
    int64_t height, int64_t width, int threads
) {
    const int64_t blocks_each = blocks_of_each(planes, threads);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < planes * blocks_each; block++) {
        const Block part = block_of(block, blocks_each, height);
        REAL *above = calloc(2 * width, sizeof(REAL)), *line = above + width;
        const int64_t before = part.from > 0 && part.from < part.to; /* the row above for its vertical part */
        for (int64_t i = part.from - before; i < part.to; i++) {
            const int64_t at = (part.image * height + i) * width;
            const REAL *here = v + at, *below = i < height - 1 ? here + width : here;
            NAME(curvature_row)(
                here, below, weight, unit + at, unit + apart + at, reciprocal + at, above, i < part.from ? line : out + at,
                width);
        }
        free(above);
    }
}

/* The dual field v of a row after a step t along d: (1 - t) u + t (n + (Dd - u <n, Dd>) / s), scaled back where longer
   than 1; `below` is the next row of d, or the same at the end of a plane. v may be u. */
static void NAME(dual_row)(
    const REAL *here, const REAL *below, REAL t, const REAL *n0, const REAL *n1, const REAL *u0, const REAL *u1,
    const REAL *inverse, REAL *v0, REAL *v1, int64_t width
) {
    const NAME(Vector) zero = {0}, one_each = zero + 1;
    for (int64_t j = 0; j < width; j += LANES) {
        const int64_t n = width - j;
        const NAME(Vector) v = NAME(load_some)(here + j, n, here[width - 1]), dy = NAME(load_some)(below + j, n, 0) - v;
        const NAME(Vector) dx = (n > LANES ? NAME(load)(here + j + 1) : MOVED_DOWN(v)) - v;
        const NAME(Vector) x = NAME(load_some)(n0 + j, n, 0), y = NAME(load_some)(n1 + j, n, 0);
        const NAME(Vector) one = NAME(load_some)(inverse + j, n, 0);
        const NAME(Vector) a = NAME(load_some)(u0 + j, n, 0), b = NAME(load_some)(u1 + j, n, 0), along = x * dx + y * dy;
        const NAME(Vector) p = a + t * (x + (dx - a * along) * one - a), q = b + t * (y + (dy - b * along) * one - b);
        const NAME(Vector) scale = NAME(inverse_root)(NAME(larger)(p * p + q * q, one_each));
        NAME(store_some)(v0 + j, p * scale, n);
        NAME(store_some)(v1 + j, q * scale, n);
    }
}

/* The stencil for `count` images; components of n and u are `apart_n` and `apart_u` numbers apart, u's samples
   `sample_u`. */
void NAME(tv_field)(
    const REAL *unit, int64_t apart_n, const REAL *dual, int64_t apart_u, int64_t sample_u, const REAL *reciprocal,
    REAL weight, REAL *a, REAL *b, REAL *c, int64_t count, int64_t size, int threads
) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        const int64_t at = i * size;
        const REAL *n0 = unit + at, *u0 = dual + i * sample_u;
        NAME(tv_model)(
            n0, n0 + apart_n, u0, u0 + apart_u, reciprocal + at, weight, a + at, b + at, c + at, size);
    }
}

/* The dual fields of `count` images after steps along d. */
void NAME(tv_advance_dual)(
    const REAL *d, const REAL *steps, const REAL *unit, int64_t apart_n, const REAL *dual, int64_t apart_u,
    int64_t sample_u, const REAL *reciprocal, REAL *out, int64_t count, int64_t rows, int64_t height, int64_t width,
    int threads
) {
    const int64_t size = rows * width;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t i = 0; i < count; i++) {
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = i * size + row * width;
            const REAL *here = d + at, *below = row % height < height - 1 ? here + width : here;
            const REAL *u0 = dual + i * sample_u + row * width;
            REAL *v0 = out + 2 * i * size + row * width;
            NAME(dual_row)(
                here, below, steps[i], unit + at, unit + apart_n + at, u0, u0 + apart_u, reciprocal + at, v0, v0 + size,
                width);
        }
    }
}

/* What the certificates of smoothed total variation need per pixel: see relative_curvature.py for the formulas. */
typedef struct {
    REAL weight, smoothing, floor, radius, row; /* floor = mu / ||D||^2, row = ||D_i|| / sqrt(mu) */
} NAME(Ball);

/* Norm of D^3 phi[k] relative to the Hessian over lengths in [low, high], for parts of k along z and |k x z| at most
   `along` and `across`. */
static inline NAME(Vector) NAME(relative_norm)(
    const NAME(Ball) *s, NAME(Vector) low, NAME(Vector) high, NAME(Vector) along, NAME(Vector) across
) {
    const NAME(Vector) zero = {0}, least = zero + LEAST, nu = zero + s->smoothing;
    const REAL w = s->weight, nu2 = s->smoothing * s->smoothing, stiff = w * nu2;
    const NAME(Vector) low2 = low * low + nu2, peak = NAME(smaller)(NAME(larger)(nu, low), high);
    const NAME(Vector) slope = peak * NAME(inverse)(peak * peak + nu2) * along, soft = s->floor * NAME(root)(low2);
    const NAME(Vector) low_stiff = stiff + soft * low2, low_weight = w + soft;
    const NAME(Vector) first = (3 * stiff) * slope * NAME(inverse)(low_stiff);
    const NAME(Vector) second = w * slope * NAME(inverse)(low_weight);
    const NAME(Vector) mixed = w * across * NAME(inverse_root)(low_stiff * (low2 * low_weight));
    const NAME(Vector) half = (REAL)0.5 * (first - second), square = half * half + mixed * mixed;
    /* never below the root, also where the square underflows */
    const NAME(Vector) enough = NAME(larger)(square, least) * NAME(inverse_root)(NAME(larger)(square, least));
    const NAME(Vector) parts = NAME(magnitude)(half) + mixed;
    return (REAL)0.5 * (first + second) + NAME(smaller)(enough, parts);
}

/* Largest of the values in `best`; infinite where one was not finite. */
static double NAME(largest_of)(NAME(Vector) best, INDICES sound) {
    REAL most = 0;
    for (int64_t k = 0; k < LANES; k++) most = !sound[k] ? INFINITY : best[k] > most ? best[k] : most;
    return most;
}

/* Largest relative change of the Hessian of sample i over the ball ||e||_H <= radius: per radius along every e of the
   ball, and where there is a q along q, with <q, D^T phi'' D q>. A value that is not finite makes it infinite. Lengths are
   in units of one that makes powers of the smoothing harmless; `reciprocal` alone comes as it is. */
void NAME(tv_relative)(
    const REAL *unit, int64_t apart, const REAL *reciprocal, REAL one_length, const REAL *q, REAL weight, REAL smoothing,
    const double *radii, const double *convexities, double squared_norm, double row_norm, double *curvatures,
    double *largest, double *energies, int64_t count, int64_t rows, int64_t height, int64_t width, int threads
) {
    double *sums = malloc(count * rows * sizeof(double)); /* added up in order, whoever computed them */
    for (int64_t i = 0; i < count; i++) largest[i] = curvatures[i] = 0;
    const int64_t blocks_each = count >= threads ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < count * blocks_each; block++) {
        const Block part = block_of(block, blocks_each, rows);
        const int64_t i = part.image;
        const NAME(Ball) s = {
            weight, smoothing, (REAL)(convexities[i] / squared_norm), (REAL)radii[i],
            (REAL)(row_norm / sqrt(convexities[i]))};
        const REAL nu2 = smoothing * smoothing;
        const NAME(Vector) zero = {0}, least = zero + LEAST, one_each = zero + 1, furthest = zero + s.row;
        NAME(Vector) best = zero, sharpest = zero;
        INDICES sound = ~(INDICES){0}, curved_sound = sound;
        for (int64_t row = part.from; row < part.to; row++) {
            const int64_t at = (i * rows + row) * width, down = row % height < height - 1 ? width : 0;
            NAME(Vector) energy = zero;
            for (int64_t j = 0; j < width; j += LANES) {
                const int64_t here = at + j, n = width - j;
                const NAME(Vector) n0 = NAME(load_some)(unit + here, n, 0), n1 = NAME(load_some)(unit + apart + here, n, 0);
                const NAME(Vector) one = one_length * NAME(load_some)(reciprocal + here, n, 1);
                const NAME(Vector) squared = n0 * n0 + n1 * n1, size = NAME(root)(squared); /* |n| */
                const NAME(Vector) length = size * NAME(inverse)(one);
                const NAME(Vector) curved = weight * nu2 * one * (one * one) + s.floor, flat = weight * one + s.floor;
                const NAME(Vector) reach = NAME(smaller)(NAME(inverse_root)(NAME(larger)(curved, least)), furthest);
                const NAME(Vector) far = s.radius * reach;
                const NAME(Vector) low = NAME(larger)(length - far, zero), high = length + far;
                /* per radius, whose powers may underflow */
                const NAME(Vector) aside = NAME(smaller)(NAME(inverse_root)(NAME(larger)(flat, least)), furthest);
                NAME(Vector) curvature = NAME(relative_norm)(&s, low, high, reach, aside * length), value = zero;
                if (q) {
                    const REAL end = q[at + width - 1];
                    const NAME(Vector) v = NAME(load_some)(q + here, n, end);
                    const NAME(Vector) dx = (n > LANES ? NAME(load)(q + here + 1) : MOVED_DOWN(v)) - v;
                    const NAME(Vector) dy = NAME(load_some)(q + here + down, n, end) - v;
                    const NAME(Vector) square = dx * dx + dy * dy, onto = n0 * dx + n1 * dy, whole = NAME(root)(square);
                    /* parts of Dq along z and across it; all of it where z is so short that rounding hides where it points */
                    const NAME(Vector) known = NAME(larger)(squared, least), scale = NAME(inverse_root)(known);
                    const NAME(Vector) all = whole * (LEAST * NAME(inverse)(known));
                    const NAME(Vector) cross = n0 * dy - n1 * dx, rest = NAME(magnitude)(cross) * scale + all;
                    const NAME(Vector) turn = NAME(smaller)(far * NAME(inverse)(NAME(larger)(length, least)), one_each);
                    const NAME(Vector) along = NAME(magnitude)(onto) * scale + rest * turn + all;
                    value = NAME(relative_norm)(&s, low, high, NAME(smaller)(along, whole), rest * length + whole * far);
                    /* |Dq|^2 - <n, Dq>^2 without cancellation: 1 - |n|^2 = nu^2 / s^2 */
                    energy += (cross * cross + square * (nu2 * one * one)) * one;
                }
                if (n < LANES) {
                    REAL values[2][LANES];
                    NAME(store)(values[0], value), NAME(store)(values[1], curvature);
                    value = NAME(load_some)(values[0], n, 0), curvature = NAME(load_some)(values[1], n, 0);
                }
                best = NAME(larger)(value, best), sharpest = NAME(larger)(curvature, sharpest);
                sound &= (INDICES)((value >= zero) & (value < zero + INFINITY));
                curved_sound &= (INDICES)((curvature >= zero) & (curvature < zero + INFINITY));
            }
            sums[i * rows + row] = NAME(total)(energy);
        }
        const double found = NAME(largest_of)(best, sound), curved = NAME(largest_of)(sharpest, curved_sound);
#pragma omp critical
        {
            if (found > largest[i]) largest[i] = found;
            if (curved > curvatures[i]) curvatures[i] = curved;
        }
    }
    for (int64_t i = 0; i < count; i++) energies[i] = sum(sums + i * rows, rows);
    free(sums);
}

/* Row `row` of the two fields of slopes, that of the weight and that of the smoothing, along q, and the weights of the
   bounds of third and fourth derivatives on the Euclidean ball; see TotalVariationLinearization.directional. */
static void NAME(slopes)(
    const REAL *q, const REAL *unit, int64_t apart, const REAL *reciprocal, REAL smoothing, REAL reach, int64_t row,
    int64_t height, int64_t width, REAL *restrict p0, REAL *restrict p1, REAL *restrict s0, REAL *restrict s1,
    REAL *restrict third, REAL *restrict fourth
) {
    const int64_t at = row * width, down = row % height < height - 1 ? width : 0;
    const REAL *restrict n0 = unit + at, *restrict n1 = unit + apart + at, *restrict inverse = reciprocal + at;
    const REAL *restrict here = q + at, *restrict below = here + down;
    const REAL nu2 = smoothing * smoothing, half = smoothing / 2, most = (REAL)1.933 / nu2;
    const REAL two = (REAL)1.1547005383792517; /* 2 / sqrt(3) */
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        const REAL dx = j < width - 1 ? here[j + 1] - here[j] : 0, dy = below[j] - here[j];
        const REAL one = inverse[j], onto = n0[j] * dx + n1[j] * dy, cube = -nu2 * one * one * one;
        p0[j] = (dx - n0[j] * onto) * one;
        p1[j] = (dy - n1[j] * onto) * one;
        s0[j] = (dx - 3 * n0[j] * onto) * cube;
        s1[j] = (dy - 3 * n1[j] * onto) * cube;
        const REAL whole = SQRT(dx * dx + dy * dy), length = SQRT(n0[j] * n0[j] + n1[j] * n1[j]) / one;
        const REAL low = length > reach ? length - reach : 0, high = length + reach;
        REAL t = half > low ? half : low;
        t = t < high ? t : high;
        const REAL s2 = t * t + nu2, root = SQRT(s2);
        third[j] = whole * (t * t > nu2 / 2 ? two / s2 : 3 * nu2 * t / (s2 * s2 * root));
        const REAL low2 = low * low + nu2, exact = 6 * nu2 / (low2 * low2);
        fourth[j] = whole * (low >= half && exact < most ? exact : most);
    }
}

/* Largest entry of (degrees + adjacency) v of the grid with edge weights g, the same for a pixel's edges to its right and
   below, divided by v where that is given (else v = 1); the products are stored where `out` is not NULL. */
static REAL NAME(signless)(
    const REAL *g, const REAL *v, REAL *out, int64_t rows, int64_t height, int64_t width, REAL *restrict line
) {
    REAL best = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * width, last = row % height == height - 1, first = row % height == 0;
        const REAL *restrict here = g + at, *restrict above = here - width;
        for (int64_t j = 0; j < width; j++) line[j] = 0;
        if (v) {
            const REAL *restrict u = v + at, *restrict up = u - width, *restrict low = u + width;
            for (int64_t j = 0; j < width - 1; j++) line[j] += here[j] * (u[j] + u[j + 1]);
            for (int64_t j = 1; j < width; j++) line[j] += here[j - 1] * (u[j - 1] + u[j]);
            if (!last)
                for (int64_t j = 0; j < width; j++) line[j] += here[j] * (u[j] + low[j]);
            if (!first)
                for (int64_t j = 0; j < width; j++) line[j] += above[j] * (up[j] + u[j]);
        } else {
            for (int64_t j = 0; j < width - 1; j++) line[j] += 2 * here[j];
            for (int64_t j = 1; j < width; j++) line[j] += 2 * here[j - 1];
            if (!last)
                for (int64_t j = 0; j < width; j++) line[j] += 2 * here[j];
            if (!first)
                for (int64_t j = 0; j < width; j++) line[j] += 2 * above[j];
        }
        if (out) memcpy(out + at, line, width * sizeof(REAL));
        if (v)
            for (int64_t j = 0; j < width; j++) line[j] /= v[at + j];
#pragma omp simd reduction(max : best)
        for (int64_t j = 0; j < width; j++) best = line[j] > best ? line[j] : best;
    }
    return best;
}

/* Euclidean bounds along q, divided by the weight: largest eigenvalue of the change of the Hessian per length of e, the
   norms of the slopes of both columns of J, and the bound of the smoothing column's second derivative. */
void NAME(tv_directional)(
    const REAL *q, const REAL *unit, int64_t apart, const REAL *reciprocal, REAL smoothing, const double *radii,
    double row_norm, double *hessian, double *weight_slope, double *smoothing_slope, double *fourth_bound,
    int64_t count, int64_t rows, int64_t height, int64_t width, int threads
) {
    const int64_t size = rows * width;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) {
        REAL *third = malloc((3 * size + 7 * width) * sizeof(REAL)), *fourth = third + size, *v = fourth + size;
        REAL *p0 = v + size, *s0 = p0 + width, *line = s0 + width;
        REAL *p1[2] = {line + width, line + 2 * width}, *s1[2] = {line + 3 * width, line + 4 * width};
        const REAL reach = (REAL)(row_norm * radii[i]);
        const int64_t start = i * size;
        double p_square = 0, s_square = 0;
        for (int64_t row = 0; row < rows; row++) {
            REAL *restrict p = p1[row & 1], *restrict s = s1[row & 1], *p_above = p1[1 - (row & 1)];
            REAL *s_above = s1[1 - (row & 1)];
            if (row % height == 0) memset(p_above, 0, width * sizeof(REAL)), memset(s_above, 0, width * sizeof(REAL));
            NAME(slopes)(
                q + start, unit + start, apart, reciprocal + start, smoothing, reach, row, height, width, p0, p, s0, s,
                third + row * width, fourth + row * width);
            REAL p_row = 0, s_row = 0;
            for (int64_t j = 1; j < width; j++) {
                const REAL dp = p0[j - 1] - p0[j] + p_above[j] - p[j], ds = s0[j - 1] - s0[j] + s_above[j] - s[j];
                p_row += dp * dp;
                s_row += ds * ds;
            }
            const REAL dp = p_above[0] - p0[0] - p[0], ds = s_above[0] - s0[0] - s[0];
            p_square += p_row + dp * dp;
            s_square += s_row + ds * ds;
        }
        weight_slope[i] = sqrt(p_square);
        smoothing_slope[i] = sqrt(s_square);
        const int known = radii[i] >= 0 && isfinite(p_square + s_square); /* comparisons with NaN are false */
        fourth_bound[i] = known ? NAME(signless)(fourth, NULL, NULL, rows, height, width, line) : INFINITY;
        const REAL degree = NAME(signless)(third, NULL, v, rows, height, width, line);
        const REAL scale = degree > 0 ? 1 / degree : 0;
        for (int64_t j = 0; j < size; j++) v[j] = v[j] * scale + (REAL)1e-3;
        const REAL bound = NAME(signless)(third, v, NULL, rows, height, width, line);
        hessian[i] = !known ? INFINITY : bound < degree ? bound : degree;
        free(third);
    }
}

/* The column of J of the logarithm of the smoothing, weight D^T (-nu^2 n / s^2), sample i at `column + i * apart_samples`,
   and sum |z|^2 s / nu^2 and sum |z|^2 nu^2 / s^3 over all pixels, z = n s. */
void NAME(tv_smoothing_column)(
    const REAL *unit, int64_t apart, const REAL *reciprocal, REAL weight, REAL smoothing, REAL *column,
    int64_t apart_samples, double *weight_energy, double *smoothing_energy, int64_t count, int64_t rows, int64_t height,
    int64_t width, int threads
) {
    const REAL nu2 = smoothing * smoothing;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) {
        REAL *work = malloc(3 * width * sizeof(REAL)), *right = work + 2 * width;
        double first = 0, second = 0;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = (i * rows + row) * width;
            const REAL *restrict n0 = unit + at, *restrict n1 = unit + apart + at, *restrict inverse = reciprocal + at;
            REAL *restrict down = work + (row & 1) * width, *restrict above = work + (1 - (row & 1)) * width;
            REAL *restrict out = column + i * apart_samples + row * width;
            if (row % height == 0) memset(above, 0, width * sizeof(REAL));
            REAL first_row = 0, second_row = 0;
#pragma omp simd reduction(+ : first_row, second_row)
            for (int64_t j = 0; j < width; j++) {
                const REAL one = inverse[j], square = n0[j] * n0[j] + n1[j] * n1[j], factor = -weight * nu2 * one * one;
                right[j] = factor * n0[j];
                down[j] = factor * n1[j];
                first_row += square / (one * one * one);
                second_row += square * one;
            }
            first += first_row;
            second += second_row;
            out[0] = above[0] - right[0] - down[0];
            for (int64_t j = 1; j < width; j++) out[j] = right[j - 1] - right[j] + above[j] - down[j];
        }
        weight_energy[i] = first / nu2;
        smoothing_energy[i] = second * nu2;
        free(work);
    }
}

/* Squares of bounds of ||J_j||_{H^-1}, j the weight and the smoothing, for H >= mu I + D^T W D: the field f of J_j = D^T f
   is split into theta f, measured by W^-1, and the rest, whose D^T is measured by 1 / mu. theta makes pixel by pixel
   theta^2 <f, W^-1 f> + (1 - theta)^2 2 |f|^2 / mu smallest, and is the same for both. */
void NAME(tv_split)(
    const REAL *unit, int64_t apart, const REAL *reciprocal, REAL weight, REAL smoothing, const double *convexities,
    double *weight_square, double *smoothing_square, int64_t count, int64_t rows, int64_t height, int64_t width,
    int threads
) {
    const REAL nu2 = smoothing * smoothing;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && count > 1)
    for (int64_t i = 0; i < count; i++) {
        REAL *work = malloc(6 * width * sizeof(REAL)), *right_w = work, *right_s = work + width;
        const REAL twice = (REAL)(2 / convexities[i]);
        double inside_w = 0, inside_s = 0, rest_w = 0, rest_s = 0;
        for (int64_t row = 0; row < rows; row++) {
            const int64_t at = (i * rows + row) * width;
            const REAL *restrict n0 = unit + at, *restrict n1 = unit + apart + at, *restrict inverse = reciprocal + at;
            REAL *restrict down_w = work + (2 + (row & 1)) * width, *restrict above_w = work + (3 - (row & 1)) * width;
            REAL *restrict down_s = down_w + 2 * width, *restrict above_s = above_w + 2 * width;
            if (row % height == 0) memset(above_w, 0, width * sizeof(REAL)), memset(above_s, 0, width * sizeof(REAL));
            REAL energy_w = 0, energy_s = 0, square_w = 0, square_s = 0;
#pragma omp simd reduction(+ : energy_w, energy_s)
            for (int64_t j = 0; j < width; j++) {
                const REAL one = inverse[j], length = n0[j] * n0[j] + n1[j] * n1[j], stiff = weight * nu2 * one * one * one;
                const REAL ratio = twice * stiff, rest = 1 / (1 + ratio), theta = ratio * rest;
                energy_w += theta * theta * length * weight * weight / stiff;
                energy_s += theta * theta * length * weight * nu2 * one;
                const REAL f = weight * rest, h = f * nu2 * one * one;
                right_w[j] = f * n0[j], down_w[j] = f * n1[j];
                right_s[j] = h * n0[j], down_s[j] = h * n1[j];
            }
#pragma omp simd reduction(+ : square_w, square_s)
            for (int64_t j = 1; j < width; j++) {
                const REAL w = right_w[j - 1] - right_w[j] + above_w[j] - down_w[j];
                const REAL s = right_s[j - 1] - right_s[j] + above_s[j] - down_s[j];
                square_w += w * w, square_s += s * s;
            }
            const REAL w = above_w[0] - right_w[0] - down_w[0], s = above_s[0] - right_s[0] - down_s[0];
            inside_w += energy_w, inside_s += energy_s;
            rest_w += square_w + w * w, rest_s += square_s + s * s;
        }
        weight_square[i] = inside_w + rest_w / convexities[i];
        smoothing_square[i] = inside_s + rest_s / convexities[i];
        free(work);
    }
}

/* square / (square + floor), also where that overflows. */
static inline REAL NAME(fraction)(REAL square, REAL floor) {
    const REAL whole = square + floor;
    return whole < INFINITY ? square / whole : 1;
}

/* Sums of |n|^2 over the pixels of each image. */
void NAME(tv_unit_squares)(
    const REAL *x, REAL smoothing, double *squares, int64_t count, int64_t rows, int64_t height, int64_t width, int threads
) {
    const int64_t blocks_each = blocks_of_each(count, threads), blocks = count * blocks_each;
    const REAL floor = smoothing * smoothing;
    double *sums = malloc(count * rows * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const Block part = block_of(block, blocks_each, rows);
        for (int64_t row = part.from; row < part.to; row++) {
            const int64_t at = part.image * rows + row;
            const REAL *here = x + at * width;
            const REAL *below = row % height < height - 1 ? here + width : here;
            REAL total = 0;
            for (int64_t j = 0; j < width - 1; j++) {
                const REAL dx = here[j + 1] - here[j], dy = below[j] - here[j];
                total += NAME(fraction)(dx * dx + dy * dy, floor);
            }
            const REAL dy = below[width - 1] - here[width - 1];
            sums[at] = total + NAME(fraction)(dy * dy, floor);
        }
    }
    for (int64_t i = 0; i < count; i++) squares[i] = sum(sums + i * rows, rows);
    free(sums);
}

/* Included by kernels.c for each type. Potentials of filter responses `z`, `count` rows of `filters` numbers: psi' and
   psi'' of one potential per column. */

/* psi_k on piece p of |t| is a cubic with coefficients tables[order][k][p]; pieces begin at reach (p / knots)^2, and the
   last one goes on for ever. */
typedef struct {
    const REAL *tables;
    REAL reciprocal_reach;
    int64_t knots, filters;
} NAME(Spline);

/* Number of the piece of |t| = `size`; the last one for NaN. */
static inline int NAME(piece)(const NAME(Spline) *s, REAL size) {
    const int n = (int)s->knots;
    const REAL place = n * SQRT(size * s->reciprocal_reach);
    return place < n ? (int)place : n;
}

static inline void NAME(spline_at)(const NAME(Spline) *s, REAL t, int64_t k, REAL *slope, REAL *curvature) {
    const int stride = (int)(s->filters * (s->knots + 1)), n = (int)s->knots;
    const REAL size = t < 0 ? -t : t;
    const int piece = NAME(piece)(s, size) + (int)k * (n + 1);
    const REAL linear = s->tables[stride + piece], square = s->tables[2 * stride + piece];
    const REAL bend = 3 * s->tables[3 * stride + piece] * size, chord = 2 * square + bend;
    const REAL rise = linear + size * chord, curved = chord + bend;
    *slope = t > 0 ? rise : t < 0 ? -rise : 0 * t;
    *curvature = curved < 0 ? 0 : curved;
}

/* weight_k sqrt(t^2 + nu_k^2) */
typedef struct {
    const REAL *weight, *nu;
} NAME(Absolute);

static inline void NAME(absolute_at)(const NAME(Absolute) *s, REAL t, int64_t k, REAL *slope, REAL *curvature) {
    const REAL nu2 = s->nu[k] * s->nu[k], one = 1 / SQRT(t * t + nu2), scaled = s->weight[k] * one;
    *slope = scaled * t;
    *curvature = scaled * nu2 * one * one;
}

/* c = (psi' / t) (1 - u (psi' - t psi'') / psi'^2), kept between psi'' and twice the larger of psi' / t and psi''. */
static inline REAL NAME(primal_dual_at)(REAL t, REAL u, REAL slope, REAL curvature) {
    const REAL one = 1 / t, chord = slope * one;
    const REAL c = (slope - u) * one + u * curvature / slope, most = 2 * (chord > curvature ? chord : curvature);
    const REAL raised = c > curvature ? c : curvature, kept = raised < most ? raised : most;
    /* at t = 0 everything is psi''; a difference that is not 0 means NaN or inf */
    return kept - kept == 0 && chord - chord == 0 && c - c == 0 ? kept : curvature;
}

/* For every response i, that of filter k. */
#define EACH_RESPONSE(...)                                                                                             \
    for (int64_t row = 0; row < count; row++)                                                                          \
        _Pragma("omp simd") for (int64_t k = 0; k < filters; k++) {                                                    \
            const int64_t i = row * filters + k;                                                                       \
            REAL first, second;                                                                                        \
            __VA_ARGS__                                                                                                \
        }

void NAME(spline_derivatives)(
    const REAL *restrict z, const REAL *tables, REAL reciprocal_reach, int64_t knots, REAL *restrict slope,
    REAL *restrict curvature, int64_t count, int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(spline_at)(&s, z[i], k, &first, &second);
        slope[i] = first;
        if (curvature) curvature[i] = second;
    })
}

void NAME(absolute_derivatives)(
    const REAL *restrict z, const REAL *weight, const REAL *nu, REAL *restrict slope, REAL *restrict curvature,
    int64_t count, int64_t filters, int threads
) {
    const NAME(Absolute) s = {weight, nu};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(absolute_at)(&s, z[i], k, &first, &second);
        slope[i] = first;
        if (curvature) curvature[i] = second;
    })
}
void NAME(spline_primal_dual)(
    const REAL *restrict z, const REAL *restrict u, const REAL *tables, REAL reciprocal_reach, int64_t knots,
    REAL *restrict c, REAL *restrict slope, int64_t count, int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(spline_at)(&s, z[i], k, &first, &second);
        slope[i] = first;
        c[i] = NAME(primal_dual_at)(z[i], u[i], first, second);
    })
}

void NAME(absolute_primal_dual)(
    const REAL *restrict z, const REAL *restrict u, const REAL *weight, const REAL *nu, REAL *restrict c,
    REAL *restrict slope, int64_t count, int64_t filters, int threads
) {
    const NAME(Absolute) s = {weight, nu};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(absolute_at)(&s, z[i], k, &first, &second);
        slope[i] = first;
        c[i] = NAME(primal_dual_at)(z[i], u[i], first, second);
    })
}

/* sup |psi'''| and inf psi'' over [t - reach, t + reach]. */
static inline void NAME(spline_change_at)(
    const NAME(Spline) *s, REAL length, const REAL *limits, REAL t, REAL reach, int64_t k, REAL *third, REAL *lowest
) {
    const int stride = (int)(s->filters * (s->knots + 1)), n = (int)s->knots, own = (int)k * (n + 1);
    const REAL size = t < 0 ? -t : t, low = size > reach ? size - reach : 0, high = size + reach;
    const int first = NAME(piece)(s, low), last = NAME(piece)(s, high);
    const REAL *square = s->tables + 2 * stride + own, *cubic = s->tables + 3 * stride + own;
    const REAL d0 = 6 * cubic[first], d1 = 6 * cubic[last], c1 = 2 * square[last];
    const REAL start = 2 * square[first] + d0 * low, end = c1 + d1 * high, part = (REAL)last / n;
    const REAL knot = c1 + d1 * length * part * part; /* where the last piece begins */
    const REAL a0 = d0 < 0 ? -d0 : d0, a1 = d1 < 0 ? -d1 : d1;
    REAL least = start < end ? start : end;
    least = last > first && knot < least ? knot : least;
    const int far = last > first + 1;
    const REAL most = far ? limits[k] : a0 > a1 ? a0 : a1;
    *third = high < INFINITY ? most : INFINITY; /* so that NaN shows */
    *lowest = far || least < 0 ? 0 : least;
}

static inline void NAME(absolute_change_at)(
    const NAME(Absolute) *s, REAL peak, REAL t, REAL reach, int64_t k, REAL *third, REAL *lowest
) {
    const REAL nu = s->nu[k], nu2 = nu * nu, size = t < 0 ? -t : t, low = size > reach ? size - reach : 0;
    const REAL high = size + reach;
    REAL at = peak * nu > low ? peak * nu : low;
    at = at < high ? at : high;
    const REAL one = 1 / SQRT(at * at + nu2), two = 1 / SQRT(high * high + nu2), one2 = one * one;
    const REAL most = s->weight[k] * 3 * nu2 * at * one2 * one2 * one;
    *third = high < INFINITY ? most : INFINITY;
    *lowest = s->weight[k] * nu2 * two * two * two;
}

void NAME(spline_change)(
    const REAL *restrict z, const REAL *restrict reach, const REAL *tables, REAL reciprocal_reach, int64_t knots,
    const REAL *limits, REAL *restrict third, REAL *restrict lowest, int64_t count, int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
    const REAL length = 1 / reciprocal_reach;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(spline_change_at)(&s, length, limits, z[i], reach[i], k, &first, &second);
        third[i] = first;
        lowest[i] = second;
    })
}

void NAME(absolute_change)(
    const REAL *restrict z, const REAL *restrict reach, const REAL *weight, const REAL *nu, const REAL *peak,
    REAL *restrict third, REAL *restrict lowest, int64_t count, int64_t filters, int threads
) {
    const NAME(Absolute) s = {weight, nu};
    const REAL at = *peak;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    EACH_RESPONSE({
        NAME(absolute_change_at)(&s, at, z[i], reach[i], k, &first, &second);
        third[i] = first;
        lowest[i] = second;
    })
}

/* sums[order - 1][k][piece] += order |t|^(order - 1) sign(t) g for order 1, 2, 3: the derivative of sum psi'(t) g in the
   coefficients of the splines. */
void NAME(spline_sums)(
    const REAL *z, const REAL *g, REAL reciprocal_reach, int64_t knots, double *sums, int64_t count, int64_t filters
) {
    const NAME(Spline) s = {NULL, reciprocal_reach, knots, filters};
    const int64_t stride = filters * (knots + 1);
    for (int64_t row = 0; row < count; row++)
        for (int64_t k = 0; k < filters; k++) {
            const REAL t = z[row * filters + k], size = t < 0 ? -t : t;
            double *at = sums + k * (knots + 1) + NAME(piece)(&s, size);
            const double odd = t > 0 ? g[row * filters + k] : t < 0 ? -g[row * filters + k] : 0 * t, length = size;
            at[0] += odd;
            at[stride] += 2 * odd * length;
            at[2 * stride] += 3 * odd * length * length;
        }
}

/* Sums of psi over `size` rows of responses for each of `count` samples. */
void NAME(spline_total)(
    const REAL *z, const REAL *tables, REAL reciprocal_reach, int64_t knots, double *totals, int64_t count, int64_t size,
    int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
    const int stride = (int)(filters * (knots + 1)), n = (int)knots;
    double *sums = malloc(count * size * sizeof(double)); /* added up in order, whoever computed them */
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < count * size; row++) {
        REAL total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < filters; k++) {
            const REAL t = z[row * filters + k], length = t < 0 ? -t : t;
            const int piece = NAME(piece)(&s, length) + (int)k * (n + 1);
            const REAL high = tables[2 * stride + piece] + length * tables[3 * stride + piece];
            total += tables[piece] + length * (tables[stride + piece] + length * high);
        }
        sums[row] = total;
    }
    for (int64_t i = 0; i < count; i++) totals[i] = sum(sums + i * size, size);
    free(sums);
}

void NAME(absolute_total)(
    const REAL *z, const REAL *weight, const REAL *nu, double *totals, int64_t count, int64_t size, int64_t filters,
    int threads
) {
    double *sums = malloc(count * size * sizeof(double));
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < count * size; row++) {
        REAL total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t k = 0; k < filters; k++) {
            const REAL square = z[row * filters + k] * z[row * filters + k];
            /* sqrt(t^2 + nu^2) - nu without a difference */
            total += weight[k] * square / (SQRT(square + nu[k] * nu[k]) + nu[k]);
        }
        sums[row] = total;
    }
    for (int64_t i = 0; i < count; i++) totals[i] = sum(sums + i * size, size);
    free(sums);
}
#undef EACH_RESPONSE

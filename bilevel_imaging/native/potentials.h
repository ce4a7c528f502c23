/* Included by kernels.c for each type. Potentials of filter responses `z`, `count` rows of `filters` numbers: psi' and
   psi'' of one potential per column. */

/* psi_k on piece p of |t| is a cubic with coefficients tables[order][k][p]; pieces begin at reach (p / knots)^2, and the
   last one goes on for ever. */
typedef struct {
    const REAL *tables;
    REAL reciprocal_reach;
    int64_t knots, filters;
} NAME(Spline);

static inline void NAME(spline_at)(const NAME(Spline) *s, REAL t, int64_t k, REAL *slope, REAL *curvature) {
    const int stride = (int)(s->filters * (s->knots + 1)), n = (int)s->knots;
    const REAL size = t < 0 ? -t : t, place = n * SQRT(size * s->reciprocal_reach);
    const int piece = (place < n ? (int)place : n) + (int)k * (n + 1); /* NaN: the last one */
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

#define OVER_RESPONSES(at)                                                                                             \
    for (int64_t row = 0; row < count; row++)                                                                          \
        _Pragma("omp simd") for (int64_t k = 0; k < filters; k++) {                                                    \
            const int64_t i = row * filters + k;                                                                       \
            REAL first, second;                                                                                        \
            at(&s, z[i], k, &first, &second);                                                                          \
            slope[i] = first;                                                                                          \
            if (curvature) curvature[i] = second;                                                                      \
        }

void NAME(spline_derivatives)(
    const REAL *restrict z, const REAL *tables, REAL reciprocal_reach, int64_t knots, REAL *restrict slope,
    REAL *restrict curvature, int64_t count, int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    OVER_RESPONSES(NAME(spline_at))
}

void NAME(absolute_derivatives)(
    const REAL *restrict z, const REAL *weight, const REAL *nu, REAL *restrict slope, REAL *restrict curvature,
    int64_t count, int64_t filters, int threads
) {
    const NAME(Absolute) s = {weight, nu};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    OVER_RESPONSES(NAME(absolute_at))
}
#undef OVER_RESPONSES

#define OVER_RESPONSES(at)                                                                                             \
    for (int64_t row = 0; row < count; row++)                                                                          \
        _Pragma("omp simd") for (int64_t k = 0; k < filters; k++) {                                                    \
            const int64_t i = row * filters + k;                                                                       \
            REAL first, second;                                                                                        \
            at(&s, z[i], k, &first, &second);                                                                          \
            slope[i] = first;                                                                                          \
            c[i] = NAME(primal_dual_at)(z[i], u[i], first, second);                                                    \
        }

void NAME(spline_primal_dual)(
    const REAL *restrict z, const REAL *restrict u, const REAL *tables, REAL reciprocal_reach, int64_t knots,
    REAL *restrict c, REAL *restrict slope, int64_t count, int64_t filters, int threads
) {
    const NAME(Spline) s = {tables, reciprocal_reach, knots, filters};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    OVER_RESPONSES(NAME(spline_at))
}

void NAME(absolute_primal_dual)(
    const REAL *restrict z, const REAL *restrict u, const REAL *weight, const REAL *nu, REAL *restrict c,
    REAL *restrict slope, int64_t count, int64_t filters, int threads
) {
    const NAME(Absolute) s = {weight, nu};
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    OVER_RESPONSES(NAME(absolute_at))
}
#undef OVER_RESPONSES

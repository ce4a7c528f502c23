/* Included by kernels.c for each type. The compiler's own vectors of 64 bytes, whatever the processor makes of them. */

#define LANES ((int64_t)(64 / sizeof(REAL)))
typedef REAL NAME(Vector) __attribute__((vector_size(64), aligned(sizeof(REAL)), may_alias));

static inline NAME(Vector) NAME(load)(const REAL *from) { return *(const NAME(Vector) *)from; }

static inline void NAME(store)(REAL *to, NAME(Vector) v) { *(NAME(Vector) *)to = v; }

/* The first `n` numbers, and `rest` behind them. */
static inline NAME(Vector) NAME(load_some)(const REAL *from, int64_t n, REAL rest) {
    if (n >= LANES) return NAME(load)(from);
    REAL values[LANES];
    for (int64_t k = 0; k < LANES; k++) values[k] = k < n ? from[k] : rest;
    return NAME(load)(values);
}

static inline void NAME(store_some)(REAL *to, NAME(Vector) v, int64_t n) {
    if (n >= LANES) NAME(store)(to, v);
    else
        for (int64_t k = 0; k < n; k++) to[k] = v[k];
}

/* The same operation on every number, for compilers that have no vectors of this length to do it with. */
#define EACH(v, w, ...)                                                                                                \
    REAL a[LANES], b[LANES];                                                                                           \
    memcpy(a, &v, sizeof a);                                                                                           \
    memcpy(b, &w, sizeof b);                                                                                           \
    _Pragma("omp simd") for (int64_t k = 0; k < LANES; k++) a[k] = __VA_ARGS__;                                        \
    return NAME(load)(a);

/* v > w ? v : w, which is w where either is NaN. */
static inline NAME(Vector) NAME(larger)(NAME(Vector) v, NAME(Vector) w) {
#ifdef __AVX512F__
    if (sizeof(REAL) == 4) return (NAME(Vector))_mm512_max_ps((__m512)v, (__m512)w);
    return (NAME(Vector))_mm512_max_pd((__m512d)v, (__m512d)w);
#else
    EACH(v, w, a[k] > b[k] ? a[k] : b[k])
#endif
}

/* v < w ? v : w, which is w where either is NaN. */
static inline NAME(Vector) NAME(smaller)(NAME(Vector) v, NAME(Vector) w) {
#ifdef __AVX512F__
    if (sizeof(REAL) == 4) return (NAME(Vector))_mm512_min_ps((__m512)v, (__m512)w);
    return (NAME(Vector))_mm512_min_pd((__m512d)v, (__m512d)w);
#else
    EACH(v, w, a[k] < b[k] ? a[k] : b[k])
#endif
}

static inline NAME(Vector) NAME(magnitude)(NAME(Vector) v) { return NAME(larger)(v, -v); }

/* 1 / v and 1 / sqrt(v) to two units of the last place; NaN where v or the result is 0 or infinite. A division and a root
   of a vector take longer than reading it from memory: estimates and Newton steps do not. */
static inline NAME(Vector) NAME(inverse)(NAME(Vector) v) {
#ifdef __AVX512F__
    NAME(Vector) r;
    if (sizeof(REAL) == 4) r = (NAME(Vector))_mm512_rcp14_ps((__m512)v);
    else {
        r = (NAME(Vector))_mm512_rcp14_pd((__m512d)v);
        r *= 2 - v * r;
    }
    return r * (2 - v * r);
#else
    return 1 / v;
#endif
}

static void NAME(inverses)(const REAL *from, REAL *to, int64_t n) {
    for (int64_t j = 0; j < n; j += LANES)
        NAME(store_some)(to + j, NAME(inverse)(NAME(load_some)(from + j, n - j, 1)), n - j);
}

static inline NAME(Vector) NAME(inverse_root)(NAME(Vector) v) {
#ifdef __AVX512F__
    NAME(Vector) r;
    if (sizeof(REAL) == 4) r = (NAME(Vector))_mm512_rsqrt14_ps((__m512)v);
    else {
        r = (NAME(Vector))_mm512_rsqrt14_pd((__m512d)v);
        r *= (REAL)1.5 - (REAL)0.5 * v * (r * r);
    }
    return r * ((REAL)1.5 - (REAL)0.5 * v * (r * r));
#else
    EACH(v, v, 1 / SQRT(a[k]))
#endif
}
#undef EACH

/* sqrt(v) for v >= 0, 0 where v is below what `inverse_root` can take. */
static inline NAME(Vector) NAME(root)(NAME(Vector) v) {
    const NAME(Vector) least = {0};
    return v * NAME(inverse_root)(NAME(larger)(v, least + LEAST));
}

static inline REAL NAME(total)(NAME(Vector) v) {
    REAL total = 0;
    for (int64_t k = 0; k < LANES; k++) total += v[k];
    return total;
}

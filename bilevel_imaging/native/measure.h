/* Included by kernels.c for images of each type FROM, after the kernels for double: in one pass over an image, in double
   and without storing another one, what a certificate asks of a lower-level point x and an adjoint q of
   d / 2 ||x||^2 - <b, x> + weight sum sqrt(|Dx|^2 + smoothing^2), for a gradient f of the loss. */

/* G is the gradient, R = f - H q, and the columns of J are those of the logarithms of the weight and the smoothing. */
typedef struct {
    double x, q, gradient, residual; /* squares of norms, of G and R */
    double columns[2], gram[3]; /* <J_k, q>; <J_0, J_0>, <J_0, J_1>, <J_1, J_1> */
    double value; /* <q, G> */
} TAKING(Measured);

/* `n` numbers in double, the last one again behind them. */
static void TAKING(widen)(const FROM *from, double *to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
    to[n] = to[n - 1];
}

static void TAKING(measure_one)(
    const FROM *x, const FROM *q, const FROM *b, const FROM *f, double d, double weight, double smoothing,
    TAKING(Measured) *out, double *work, int64_t rows, int64_t height, int64_t w
) {
    const double nu2 = smoothing * smoothing;
    const int64_t line = spread_float64(w + 1);
    double *xh = work, *xb = xh + line, *qh = xb + line, *qb = qh + line, *one = qb + line;
    /* fields of which D^T is wanted, horizontal parts behind one 0, vertical ones of this row and the one above */
    double *across[3], *down[3], *above[3];
    for (int k = 0; k < 3; k++) {
        across[k] = one + (1 + 3 * k) * line;
        down[k] = across[k] + line, above[k] = down[k] + line;
        across[k][0] = 0;
    }
    TAKING(Measured) sums = {0};
    TAKING(widen)(x, xb, w);
    TAKING(widen)(q, qb, w);
    for (int64_t row = 0; row < rows; row++) {
        double *swap = xh;
        xh = xb, xb = swap;
        swap = qh, qh = qb, qb = swap;
        if (row + 1 < rows) TAKING(widen)(x + (row + 1) * w, xb, w), TAKING(widen)(q + (row + 1) * w, qb, w);
        const int last = row % height == height - 1;
        const double *xn = last ? xh : xb, *qn = last ? qh : qb;
        if (row % height == 0)
            for (int k = 0; k < 3; k++) memset(above[k], 0, w * sizeof(double));
        for (int64_t j = 0; j < w; j++) {
            const double dx = xh[j + 1] - xh[j], dy = xn[j] - xh[j];
            one[j] = dx * dx + (dy * dy + nu2);
        }
        for (int64_t j = 0; j < w; j += 8)
            store_some_float64(one + j, inverse_root_float64(load_some_float64(one + j, w - j, 1)), w - j);
        double *restrict n0 = across[0] + 1, *restrict h0 = across[1] + 1, *restrict s0 = across[2] + 1;
        double *restrict n1 = down[0], *restrict h1 = down[1], *restrict s1 = down[2];
#pragma omp simd
        for (int64_t j = 0; j < w; j++) {
            const double scale = weight * one[j], qx = qh[j + 1] - qh[j], qy = qn[j] - qh[j];
            const double a = (xh[j + 1] - xh[j]) * one[j], c = (xn[j] - xh[j]) * one[j], along = a * qx + c * qy;
            const double change = -weight * nu2 * one[j] * one[j];
            n0[j] = weight * a, n1[j] = weight * c;
            h0[j] = scale * (qx - a * along), h1[j] = scale * (qy - c * along);
            s0[j] = change * a, s1[j] = change * c;
        }
        const FROM *here = b + row * w, *rhs = f + row * w;
        const double *n = across[0], *h = across[1], *s = across[2];
        double xx = 0, qq = 0, gg = 0, rr = 0, j0q = 0, j1q = 0, j00 = 0, j01 = 0, j11 = 0, gq = 0;
#pragma omp simd reduction(+ : xx, qq, gg, rr, j0q, j1q, j00, j01, j11, gq)
        for (int64_t j = 0; j < w; j++) {
            const double first = (above[0][j] - n1[j]) + (n[j] - n[j + 1]);
            const double second = (above[2][j] - s1[j]) + (s[j] - s[j + 1]);
            const double product = (above[1][j] - h1[j]) + (h[j] - h[j + 1]) + d * qh[j];
            const double gradient = first + d * xh[j] - here[j], residual = rhs[j] - product;
            xx += xh[j] * xh[j], qq += qh[j] * qh[j], gg += gradient * gradient, rr += residual * residual;
            j0q += first * qh[j], j1q += second * qh[j], gq += gradient * qh[j];
            j00 += first * first, j01 += first * second, j11 += second * second;
        }
        sums.x += xx, sums.q += qq, sums.gradient += gg, sums.residual += rr, sums.value += gq;
        sums.columns[0] += j0q, sums.columns[1] += j1q, sums.gram[0] += j00, sums.gram[1] += j01, sums.gram[2] += j11;
        for (int k = 0; k < 3; k++) swap = above[k], above[k] = down[k], down[k] = swap;
    }
    *out = sums;
}

void TAKING(tv_measure)(
    const FROM *x, const FROM *q, const FROM *b, const FROM *f, double d, double weight, double smoothing, void *measured,
    int64_t count, int64_t rows, int64_t height, int64_t width, int threads
) {
    TAKING(Measured) *all = measured;
    const int64_t size = rows * width;
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        double *work = aligned_malloc(14 * spread_float64(width + 1) * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = i * size;
            TAKING(measure_one)(x + at, q + at, b + at, f + at, d, weight, smoothing, all + i, work, rows, height, width);
        }
        free(work);
    }
}

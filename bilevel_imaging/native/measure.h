/* Included by kernels.c for images of each type FROM, after the kernels for double: in one pass over an image, in double
   and without storing another one, what a certificate asks of a lower-level point x and an adjoint q of
   d / 2 ||x||^2 - <b, x> + weight sum sqrt(|Dx|^2 + smoothing^2), for a gradient f of the loss. */

/* `n` numbers in double, the last one again behind them, up to one more than whole vectors. */
static void TAKING(widen)(const FROM *from, double *to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
    for (int64_t j = n; j <= (n + 7) / 8 * 8; j++) to[j] = to[n - 1];
}

/* The numbers, G being the gradient, R = f - H q and J_0, J_1 the columns of J for the logarithms of the weight and the
   smoothing: ||x||^2, ||q||^2, ||G||^2, ||R||^2, <J_0, q>, <J_1, q>, <J_0, J_0>, <J_0, J_1>, <J_1, J_1>, <q, G>. */
#define NUMBERS 10
static void TAKING(measure_one)(
    const FROM *x, const FROM *q, const FROM *b, const FROM *f, double d, double weight, double smoothing,
    double *out, double *work, int64_t rows, int64_t height, int64_t w
) {
    const double nu2 = smoothing * smoothing;
    const int64_t line = spread_float64(w + 1);
    double *xh = work, *xb = xh + line, *qh = xb + line, *qb = qh + line;
    double *above[3] = {qb + line, qb + 2 * line, qb + 3 * line}; /* vertical parts of the row above, for three D^T */
    vector_float64 sums[NUMBERS] = {{0}};
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
            for (int k = 0; k < 3; k++) memset(above[k], 0, (w + 7) / 8 * 8 * sizeof(double));
        const FROM *here = b + row * w, *rhs = f + row * w;
        vector_float64 left[3] = {{0}};
        for (int64_t j = 0; j < w; j += 8) {
            vector_float64 v = load_float64(xh + j), u = load_float64(qh + j);
            const vector_float64 dx = load_float64(xh + j + 1) - v, dy = load_float64(xn + j) - v;
            const vector_float64 qx = load_float64(qh + j + 1) - u, qy = load_float64(qn + j) - u;
            const vector_float64 one = inverse_root_float64(dx * dx + (dy * dy + nu2)), scale = weight * one;
            const vector_float64 a = dx * one, c = dy * one, along = a * qx + c * qy, change = -nu2 * one * scale;
            const vector_float64 across[3] = {weight * a, change * a, scale * (qx - a * along)};
            const vector_float64 down[3] = {weight * c, change * c, scale * (qy - c * along)};
            vector_float64 parts[3];
            for (int k = 0; k < 3; k++) {
                parts[k] = (load_float64(above[k] + j) - down[k]) + (MOVED_UP(left[k], across[k]) - across[k]);
                store_float64(above[k] + j, down[k]);
                left[k] = across[k];
            }
            vector_float64 first = parts[0], second = parts[1], gradient = first + d * v, residual = -parts[2] - d * u;
            if (j + 8 <= w) {
                gradient -= TAKING(eight)(here + j);
                residual += TAKING(eight)(rhs + j);
            } else
                for (int64_t k = 0; k < 8; k++) {
                    const int inside = j + k < w;
                    gradient[k] = inside ? gradient[k] - here[j + k] : 0;
                    residual[k] = inside ? residual[k] + rhs[j + k] : 0;
                    if (!inside) first[k] = second[k] = v[k] = u[k] = 0;
                }
            sums[0] += v * v, sums[1] += u * u, sums[2] += gradient * gradient, sums[3] += residual * residual;
            sums[4] += first * u, sums[5] += second * u, sums[6] += first * first, sums[7] += first * second;
            sums[8] += second * second, sums[9] += gradient * u;
        }
    }
    for (int k = 0; k < NUMBERS; k++) out[k] = total_float64(sums[k]);
}

void TAKING(tv_measure)(
    const FROM *x, const FROM *q, const FROM *b, const FROM *f, double d, double weight, double smoothing, double *measured,
    int64_t count, int64_t rows, int64_t height, int64_t width, int threads
) {
    const int64_t size = rows * width;
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        double *work = aligned_malloc(7 * spread_float64(width + 1) * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = i * size;
            TAKING(measure_one)(
                x + at, q + at, b + at, f + at, d, weight, smoothing, measured + NUMBERS * i, work, rows, height, width);
        }
        free(work);
    }
}
#undef NUMBERS

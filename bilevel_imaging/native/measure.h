/* Included by kernels.c for images of each type FROM, after the kernels for double: in one pass over an image, in double
   and without storing another one, what a certificate asks of a lower-level point x and an adjoint q of
   d / 2 ||x||^2 - <b, x> + weight sum sqrt(|Dx|^2 + smoothing^2), for a gradient f of the loss. */

/* `n` numbers in double, the last one again behind them, up to one more than whole vectors. */
static void TAKING(widen)(const FROM *from, double *to, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
    for (int64_t j = n; j <= (n + 7) / 8 * 8; j++) to[j] = to[n - 1];
}

/* The numbers, G being the gradient, R = f - H q and J_0, J_1 the columns of J for the logarithms of the weight and the
   smoothing: ||x||^2, ||q||^2, ||G||^2, ||R||^2, <J_0, q>, <J_1, q>, <J_0, J_0>, <J_0, J_1>, <J_1, J_1>, <q, G>.

   And those of the certificate in the norm of H, where `local` is set: <q, H q>, ||R - r||^2 for a residual r, ||x - b||^2,
   weight sum |z|^2 s / nu^2 and weight sum |z|^2 nu^2 / s^3 with z = Dx; and with W = weight D^2 phi, for each J_j = D^T g,
   g along z and split into theta g and (1 - theta) g, theta = 2 W / (mu + 2 W): <theta g, W^{-1} theta g> and
   ||D^T (1 - theta) g||^2; ||f||^2; max |x|. */
#define NUMBERS 10
#define LOCAL_NUMBERS 21
__attribute__((always_inline)) static inline void TAKING(measure_one)(
    const int local, const int difference, const FROM *x, const FROM *q, const FROM *b, const FROM *f, const FROM *r,
    double d, double weight, double smoothing, double mu, double *out, double *work, int64_t rows, int64_t height,
    int64_t w
) {
    const double nu2 = smoothing * smoothing;
    const int64_t line = spread_float64(w + 1);
    double *xh = work, *xb = xh + line, *qh = xb + line, *qb = qh + line;
    const int fields = local ? 5 : 3;
    double *above[5]; /* vertical parts of the row above, for so many D^T */
    for (int k = 0; k < 5; k++) above[k] = qb + (k + 1) * line;
    vector_float64 sums[LOCAL_NUMBERS - 1] = {{0}}, most = {0};
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
            for (int k = 0; k < fields; k++) memset(above[k], 0, (w + 7) / 8 * 8 * sizeof(double));
        const FROM *here = b + row * w, *rhs = f + row * w, *own = r ? r + row * w : NULL;
        vector_float64 left[5] = {{0}};
        for (int64_t j = 0; j < w; j += 8) {
            vector_float64 v = load_float64(xh + j), u = load_float64(qh + j);
            const vector_float64 dx = load_float64(xh + j + 1) - v, dy = load_float64(xn + j) - v;
            const vector_float64 qx = load_float64(qh + j + 1) - u, qy = load_float64(qn + j) - u;
            const vector_float64 one = inverse_root_float64(dx * dx + (dy * dy + nu2)), scale = weight * one;
            const vector_float64 a = dx * one, c = dy * one, along = a * qx + c * qy, change = -nu2 * one * scale;
            vector_float64 across[5] = {weight * a, change * a, scale * (qx - a * along)};
            vector_float64 down[5] = {weight * c, change * c, scale * (qy - c * along)};
            vector_float64 parts[5], energies[4];
            if (local) {
                const vector_float64 ratio = nu2 * one * one, stiff = scale * ratio, rest = mu / (mu + 2 * stiff);
                across[3] = rest * across[0], down[3] = rest * down[0];
                across[4] = ratio * across[3], down[4] = ratio * down[3];
                /* |g|^2 / W of J_0 is weight |z|^2 s / nu^2, of J_1 ratio^2 times that */
                const vector_float64 length = a * a + c * c, inside = (1 - rest) * (1 - rest);
                energies[0] = weight * length / (one * ratio), energies[1] = ratio * ratio * energies[0];
                energies[2] = inside * energies[0], energies[3] = inside * energies[1];
            }
            for (int k = 0; k < fields; k++) {
                parts[k] = (load_float64(above[k] + j) - down[k]) + (MOVED_UP(left[k], across[k]) - across[k]);
                store_float64(above[k] + j, down[k]);
                left[k] = across[k];
            }
            vector_float64 first = parts[0], second = parts[1], gradient = first + d * v, product = parts[2] + d * u;
            const int64_t inside = w - j;
            vector_float64 data = {0}, slope = {0}, recursed = {0};
            if (inside >= 8) {
                data = TAKING(eight)(here + j), slope = TAKING(eight)(rhs + j);
                if (local && own) recursed = TAKING(eight)(own + j);
            } else
                for (int64_t k = 0; k < inside; k++) {
                    data[k] = here[j + k], slope[k] = rhs[j + k];
                    if (local && own) recursed[k] = own[j + k];
                }
            if (difference) slope = v - slope;
            vector_float64 misfit = v - data, residual = slope - product, drift = residual - recursed;
            vector_float64 third = parts[3], fourth = parts[4];
            gradient -= data;
            for (int64_t k = inside; k < 8; k++) {
                first[k] = second[k] = v[k] = u[k] = gradient[k] = residual[k] = 0;
                if (!local) continue;
                third[k] = fourth[k] = slope[k] = misfit[k] = drift[k] = 0;
                for (int m = 0; m < 4; m++) energies[m][k] = 0;
            }
            sums[0] += v * v, sums[1] += u * u, sums[2] += gradient * gradient, sums[3] += residual * residual;
            sums[4] += first * u, sums[5] += second * u, sums[6] += first * first, sums[7] += first * second;
            sums[8] += second * second, sums[9] += gradient * u;
            if (local) {
                sums[10] += product * u, sums[11] += drift * drift, sums[12] += misfit * misfit;
                sums[13] += energies[0], sums[14] += energies[1], sums[15] += energies[2], sums[16] += energies[3];
                sums[17] += third * third, sums[18] += fourth * fourth, sums[19] += slope * slope;
                most = larger_float64(magnitude_float64(v), most);
            }
        }
    }
    for (int k = 0; k < (local ? LOCAL_NUMBERS - 1 : NUMBERS); k++) out[k] = total_float64(sums[k]);
    if (!local) return;
    out[LOCAL_NUMBERS - 1] = 0;
    for (int k = 0; k < 8; k++)
        if (most[k] > out[LOCAL_NUMBERS - 1]) out[LOCAL_NUMBERS - 1] = most[k];
}

/* `measured` receives LOCAL_NUMBERS of every image where `local` is set, else NUMBERS; `r` may be NULL. With `difference`
   set, what comes as f is x - f. */
void TAKING(tv_measure)(
    const FROM *x, const FROM *q, const FROM *b, const FROM *f, const FROM *r, double d, double weight, double smoothing,
    double mu, double *measured, int64_t local, int64_t difference, int64_t count, int64_t rows, int64_t height,
    int64_t width, int threads
) {
    const int64_t size = rows * width;
#pragma omp parallel num_threads(threads) if (threads > 1 && count > 1)
    {
        double *work = aligned_malloc(9 * spread_float64(width + 1) * sizeof(double));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count; i++) {
            const FROM *own = r ? r + i * size : NULL;
            const int64_t at = i * size;
            if (local)
                TAKING(measure_one)(
                    1, difference != 0, x + at, q + at, b + at, f + at, own, d, weight, smoothing, mu,
                    measured + LOCAL_NUMBERS * i, work, rows, height, width);
            else
                TAKING(measure_one)(
                    0, 0, x + at, q + at, b + at, f + at, NULL, d, weight, smoothing, mu, measured + NUMBERS * i, work, rows,
                    height, width);
        }
        free(work);
    }
}
#undef NUMBERS
#undef LOCAL_NUMBERS

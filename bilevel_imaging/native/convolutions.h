/* Included by kernels.c for each type. Circular convolutions of the planes of an image with sums of products of a column
   and a row: sum over terms of c_t r_t^T. `filters` holds for every plane and term `taps` numbers of c_t and as many of
   r_t, whose middle ones belong to offset 0; taps are odd, at most MOST_TAPS, and no more than a side of a plane has pixels. */

#ifndef MOST_TAPS
#define MOST_TAPS 80
#endif

typedef struct {
    const REAL *filters; /* of the first plane; NULL: no convolution */
    int64_t terms, taps;
} NAME(Convolution);

/* out += the sum of t[k] times source k, `width` numbers each. */
static void NAME(blend)(
    REAL *restrict out, const REAL *const *sources, const REAL *restrict t, int64_t taps, int64_t width
) {
    int64_t j = 0;
    for (; j + 4 * LANES <= width; j += 4 * LANES) {
        NAME(Vector) sums[4];
        for (int i = 0; i < 4; i++) sums[i] = *(const NAME(Vector) *)(out + j + i * LANES);
        for (int64_t k = 0; k < taps; k++)
            for (int i = 0; i < 4; i++) sums[i] += t[k] * *(const NAME(Vector) *)(sources[k] + j + i * LANES);
        for (int i = 0; i < 4; i++) *(NAME(Vector) *)(out + j + i * LANES) = sums[i];
    }
    for (; j < width; j++) {
        REAL total = out[j];
        for (int64_t k = 0; k < taps; k++) total += t[k] * sources[k][j];
        out[j] = total;
    }
}

/* Adds row `row` of the convolution of p to `out`; `line` is scratch of width + taps. */
static void NAME(row_convolution)(
    const NAME(Convolution) *s, const REAL *p, int64_t row, int64_t height, int64_t width, REAL *restrict out, REAL *line
) {
    const int64_t plane = row / height, reach = s->taps / 2;
    const REAL *above[MOST_TAPS], *shifted[MOST_TAPS];
    const REAL *filter = s->filters + plane * s->terms * 2 * s->taps;
    REAL *middle = line + reach;
    int64_t source = row % height - reach; /* wrapped around without a division for every tap */
    if (source < 0) source += height;
    for (int64_t k = 0; k < s->taps; k++) {
        above[k] = p + (plane * height + source) * width;
        if (++source == height) source = 0;
        shifted[k] = line + k;
    }
    for (int64_t term = 0; term < s->terms; term++, filter += 2 * s->taps) {
        memset(middle, 0, width * sizeof(REAL));
        NAME(blend)(middle, above, filter, s->taps, width);
        memcpy(line, middle + width - reach, reach * sizeof(REAL));
        memcpy(middle + width, middle, reach * sizeof(REAL));
        NAME(blend)(out, shifted, filter + s->taps, s->taps, width);
    }
}

/* z = the convolution of p for `count` samples of `rows` rows. */
void NAME(convolution_product)(
    const REAL *p, const REAL *filters, REAL *z, int64_t terms, int64_t taps, int64_t count, int64_t rows, int64_t height,
    int64_t width, int threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        REAL *line = malloc((width + taps) * sizeof(REAL));
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count * rows; row++) {
            const int64_t sample = row / rows, start = sample * rows * width;
            const NAME(Convolution) s = {filters + sample * (rows / height) * terms * 2 * taps, terms, taps};
            memset(z + row * width, 0, width * sizeof(REAL));
            NAME(row_convolution)(&s, p + start, row % rows, height, width, z + row * width, line);
        }
        free(line);
    }
}

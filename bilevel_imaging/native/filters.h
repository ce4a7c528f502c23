/* Included by kernels.c for each type. Small filters on images: W x = (w_k * x)_k as correlations, and W^T.

   Everything is done row by row on planes, one per filter, of which a row of the responses fits into a core's own cache.
   The compiler's vectors are used directly: 64 bytes, whatever the processor makes of them. Filters come in groups of
   GROUP in W (weights [group][tap][GROUP], 0 where there is no filter) and rows of filters in groups of ROWS in W^T
   (weights [group][filter][column][ROWS]). */
#ifndef GROUP
#define GROUP 12
#define ROWS 7
#define STRIP 32
#endif

typedef struct {
    const REAL *forward, *backward;
    int64_t filters, size; /* K, s */
} NAME(Bank);

/* Room for `n` numbers in whole pairs of vectors. */
static int64_t NAME(padded)(int64_t n) { return (n + 2 * LANES - 1) / (2 * LANES) * (2 * LANES); }

/* One row of responses from the s rows of `image` (stride `wide`) below it: to z + k * stride for every filter k, over
   the padded width; times `field` (stride `padded`) where it is given. */
static void NAME(forward_row)(
    const NAME(Bank) *bank, const REAL *image, int64_t wide, int64_t padded, const REAL *field, REAL *z, int64_t stride
) {
    const int64_t s = bank->size;
    for (int64_t first = 0; first < bank->filters; first += GROUP) {
        const REAL *weights = bank->forward + first * s * s;
        const int64_t used = bank->filters - first < GROUP ? bank->filters - first : GROUP;
        for (int64_t x = 0; x < padded; x += 2 * LANES) {
            NAME(Vector) left[GROUP] = {0}, right[GROUP] = {0};
            for (int64_t dy = 0; dy < s; dy++)
                for (int64_t dx = 0; dx < s; dx++) {
                    const REAL *at = image + dy * wide + x + dx, *w = weights + (dy * s + dx) * GROUP;
                    const NAME(Vector) a = *(const NAME(Vector) *)at, b = *(const NAME(Vector) *)(at + LANES);
#pragma GCC unroll 16
                    for (int i = 0; i < GROUP; i++) {
                        left[i] += a * w[i];
                        right[i] += b * w[i];
                    }
                }
#pragma GCC unroll 16
            for (int i = 0; i < GROUP; i++) {
                if (i >= used) break;
                REAL *to = z + (first + i) * stride + x;
                if (field) {
                    const REAL *c = field + (first + i) * padded + x;
                    left[i] *= *(const NAME(Vector) *)c;
                    right[i] *= *(const NAME(Vector) *)(c + LANES);
                }
                *(NAME(Vector) *)to = left[i];
                *(NAME(Vector) *)(to + LANES) = right[i];
            }
        }
    }
}

/* Adds W^T of one row of responses z (see forward_row; 0 in s - 1 numbers before and behind) to the s rows of `image`. */
static void NAME(backward_row)(
    const NAME(Bank) *bank, const REAL *z, int64_t stride, REAL *image, int64_t wide, int64_t columns
) {
    const int64_t s = bank->size, filters = bank->filters;
    for (int64_t first = 0; first < s; first += ROWS) {
        const REAL *weights = bank->backward + first * filters * s;
        const int64_t used = s - first < ROWS ? s - first : ROWS;
        for (int64_t x = 0; x < columns; x += 2 * LANES) {
            NAME(Vector) left[ROWS] = {0}, right[ROWS] = {0};
            for (int64_t k = 0; k < filters; k++)
                for (int64_t dx = 0; dx < s; dx++) {
                    const REAL *at = z + k * stride + x - dx, *w = weights + (k * s + dx) * ROWS;
                    const NAME(Vector) a = *(const NAME(Vector) *)at, b = *(const NAME(Vector) *)(at + LANES);
#pragma GCC unroll 16
                    for (int i = 0; i < ROWS; i++) {
                        left[i] += a * w[i];
                        right[i] += b * w[i];
                    }
                }
#pragma GCC unroll 16
            for (int i = 0; i < ROWS; i++) {
                if (i >= used) break;
                REAL *to = image + (first + i) * wide + x;
                *(NAME(Vector) *)to += left[i];
                *(NAME(Vector) *)(to + LANES) += right[i];
            }
        }
    }
}

/* Rows of K numbers per pixel to K planes of a row, and back. */
static void NAME(to_planes)(const REAL *restrict pixels, REAL *restrict planes, int64_t width, int64_t k, int64_t stride) {
    for (int64_t x = 0; x < width; x += 16)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = x; j < width && j < x + 16; j++) planes[i * stride + j] = pixels[j * k + i];
}

static void NAME(to_pixels)(const REAL *restrict planes, REAL *restrict pixels, int64_t width, int64_t k, int64_t stride) {
    for (int64_t x = 0; x < width; x += 16)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = x; j < width && j < x + 16; j++) pixels[j * k + i] = planes[i * stride + j];
}

/* `rows` rows of responses or fields, K numbers per pixel, as K planes of each row, padded by 0. */
void NAME(bank_planes)(const REAL *pixels, REAL *planes, int64_t rows, int64_t width, int64_t filters, int threads) {
    const int64_t padded = NAME(padded)(width);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        REAL *to = planes + row * filters * padded;
        for (int64_t i = 0; i < filters; i++)
            for (int64_t j = width; j < padded; j++) to[i * padded + j] = 0;
        NAME(to_planes)(pixels + row * width * filters, to, width, filters, padded);
    }
}

/* W x into `pixels` (K numbers per pixel), with `count` images x of (height + s - 1) x (width + s - 1). */
void NAME(bank_forward)(
    const REAL *x, const REAL *forward, REAL *pixels, int64_t count, int64_t height, int64_t width, int64_t filters,
    int64_t size, int threads
) {
    const NAME(Bank) bank = {forward, NULL, filters, size};
    const int64_t padded = NAME(padded)(width), wide = padded + size + 2 * LANES, columns = width + size - 1;
    const int64_t strips = (height + STRIP - 1) / STRIP;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t task = 0; task < count * strips; task++) {
        const int64_t image = task / strips, top = task % strips * STRIP;
        const int64_t rows = height - top < STRIP ? height - top : STRIP;
        REAL *strip = calloc((STRIP + size) * wide + filters * padded, sizeof(REAL)), *z = strip + (STRIP + size) * wide;
        for (int64_t row = 0; row < rows + size - 1; row++)
            memcpy(strip + row * wide, x + (image * (height + size - 1) + top + row) * columns, columns * sizeof(REAL));
        for (int64_t row = 0; row < rows; row++) {
            NAME(forward_row)(&bank, strip + row * wide, wide, padded, NULL, z, padded);
            NAME(to_pixels)(z, pixels + (image * height + top + row) * width * filters, width, filters, padded);
        }
        free(strip);
    }
}

/* out = W^T z for responses `pixels`, or W^T (field W x) where `field` (see bank_planes) and x are given instead. */
void NAME(bank_backward)(
    const REAL *pixels, const REAL *x, const REAL *field, const REAL *forward, const REAL *backward, REAL *out,
    int64_t count, int64_t height, int64_t width, int64_t filters, int64_t size, int threads
) {
    const NAME(Bank) bank = {forward, backward, filters, size};
    const int64_t padded = NAME(padded)(width), columns = width + size - 1, tall = height + size - 1;
    const int64_t wide = NAME(padded)(columns) + size + 2 * LANES, stride = wide + size;
    const int64_t strips = (height + STRIP - 1) / STRIP, strip_size = (STRIP + size - 1) * wide;
    REAL *sums = calloc(count * strips * strip_size, sizeof(REAL));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        REAL *strip = calloc((STRIP + size) * wide + filters * stride, sizeof(REAL));
        REAL *z = strip + (STRIP + size) * wide + size - 1; /* zeros before and behind every row of a plane */
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * strips; task++) {
            const int64_t image = task / strips, top = task % strips * STRIP;
            const int64_t rows = height - top < STRIP ? height - top : STRIP;
            if (x)
                for (int64_t row = 0; row < rows + size - 1; row++)
                    memcpy(strip + row * wide, x + (image * tall + top + row) * columns, columns * sizeof(REAL));
            for (int64_t row = 0; row < rows; row++) {
                const int64_t at = image * height + top + row;
                if (x)
                    NAME(forward_row)(
                        &bank, strip + row * wide, wide, padded, field + at * filters * padded, z, stride);
                else
                    NAME(to_planes)(pixels + at * width * filters, z, width, filters, stride);
                NAME(backward_row)(&bank, z, stride, sums + task * strip_size + row * wide, wide, columns);
            }
        }
        free(strip);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < count * tall; row++) {
            const int64_t image = row / tall, y = row % tall;
            REAL *to = out + row * columns;
            memset(to, 0, columns * sizeof(REAL));
            for (int64_t part = y / STRIP; part >= 0 && y - part * STRIP < STRIP + size - 1; part--) {
                if (part >= strips) continue;
                const REAL *from = sums + (image * strips + part) * strip_size + (y - part * STRIP) * wide;
                for (int64_t j = 0; j < columns; j++) to[j] += from[j];
            }
        }
    }
    free(sums);
}

/* Included by kernels.c for each type. Multinomial logistic models of many sparse examples a_i in one pass over them:
   logits z_i = W a_i of up to CLASSES classes, something done to these, and sum_i z_i a_i^T.

   The numbers of a vector belong to as many examples. A tile holds GROUPED neighboring features of VECTORS vectors of
   examples, which are a block; tiles of zeros are left out, and the Python side puts similar examples into one block so
   that there are many. Every vector that is loaded or broadcast then serves VECTORS or GROUPED products for each class,
   and all sums stay in registers: processors load about half as many vectors as they can multiply. CHUNK blocks at a
   time, so that their tiles and logits are still near when the sums are made.

   Features that are k / 255 are kept as bytes k, a quarter of the memory. W and the sums are [pair][GROUPED][room],
   logits [room][VECTORS * LANES] for every block, with room for as many classes as the code is made for. Sums are over
   PARTIAL sequences of chunks: the result does not depend on the number of threads. */
#ifndef CLASSES
#define CLASSES 16
#define GROUPED 2
#define VECTORS 2
#define CHUNK 16
#define PARTIAL 16
#define AHEAD 24 /* tiles that are fetched before they are needed */
enum { LOGITS, GRADIENT, HESSIAN, MIXED, CROSS_ENTROPY, GRAM };
#endif
#define BLOCK (VECTORS * LANES)

typedef struct {
    int64_t mode, count, classes, blocks, pairs;
    const REAL *values;          /* GROUPED * BLOCK for every tile, or NULL */
    const uint8_t *bytes;        /* the same times 255, or NULL */
    const uint16_t *tile_pairs;  /* of features, of every tile */
    const int64_t *block_starts; /* of the tiles of every block, and their end */
    const int32_t *tiles;        /* of every pair of features of every chunk, */
    const uint8_t *tile_blocks;  /* their block in the chunk, */
    const int64_t *pair_starts;  /* and where these begin and end */
    const int64_t *order;        /* the example that a number of a block belongs to, */
    const int64_t *labels;       /* and its label */
    const REAL *weights;
    REAL *rows, *single; /* room * BLOCK for every block, and one number for every example */
} NAME(Pass);

/* e^t for t <= 0 to a few units of the last place; 0 where it is nothing beside 1: products must stay normal numbers. */
static inline NAME(Vector) NAME(exponential)(NAME(Vector) t) {
    const int narrow = sizeof(REAL) == 4;
    const NAME(Vector) lowest = (narrow ? (REAL)-60 : (REAL)-600) - (NAME(Vector)){0};
    const INDICES small = t < lowest;
    const NAME(Vector) number = (NAME(Vector))(((INDICES)t & ~small) | ((INDICES)lowest & small));
    const INDICES n = __builtin_convertvector(number * (REAL)1.4426950408889634 - (REAL)0.5, INDICES);
    const NAME(Vector) r = number - __builtin_convertvector(n, NAME(Vector)) * (REAL)0.6931471805599453;
    NAME(Vector) series = {0};
    if (!narrow) {
        series = series * r + (REAL)(1.0 / 6227020800);
        series = series * r + (REAL)(1.0 / 479001600);
        series = series * r + (REAL)(1.0 / 39916800);
        series = series * r + (REAL)(1.0 / 3628800);
        series = series * r + (REAL)(1.0 / 362880);
        series = series * r + (REAL)(1.0 / 40320);
    }
    series = series * r + (REAL)(1.0 / 5040);
    series = series * r + (REAL)(1.0 / 720);
    series = series * r + (REAL)(1.0 / 120);
    series = series * r + (REAL)(1.0 / 24);
    series = series * r + (REAL)(1.0 / 6);
    series = series * r + (REAL)0.5;
    series = series * r + 1;
    series = series * r + 1;
    const INDICES power = narrow ? (n + 127) << 23 : (n + 1023) << (sizeof(REAL) == 4 ? 0 : 52);
    return (NAME(Vector))((INDICES)(series * (NAME(Vector))power) & ~small);
}

/* A vector of a tile. A byte divided by 255, correctly rounded (Markstein): its product with 1 / 255 and one correction. */
static inline NAME(Vector) NAME(features)(const NAME(Pass) *pass, int64_t vector, int coded) {
    if (!coded) return NAME(load)(pass->values + vector * LANES);
    const uint8_t *bytes = pass->bytes + vector * LANES;
#ifdef __AVX512F__
    if (sizeof(REAL) == 4) {
        const __m512 k = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)bytes)));
        const __m512 inverse = _mm512_set1_ps(1 / 255.f), quotient = _mm512_mul_ps(k, inverse);
        const __m512 rest = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(255), k);
        return (NAME(Vector))_mm512_fmadd_ps(rest, inverse, quotient);
    }
#endif
    NAME(Vector) numbers;
    for (int lane = 0; lane < LANES; lane++) numbers[lane] = bytes[lane] / (REAL)255;
    return numbers;
}

/* sum + a b in one instruction: compilers that may reassociate first add products to each other, half as much again. */
static inline NAME(Vector) NAME(plus_product)(NAME(Vector) sum, NAME(Vector) a, NAME(Vector) b) {
#ifdef __AVX512F__
    if (sizeof(REAL) == 4) return (NAME(Vector))_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
    return (NAME(Vector))_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)sum);
#else
    return sum + a * b;
#endif
}

/* z = W a of the examples of a block. */
static inline __attribute__((always_inline)) void NAME(block_logits)(
    const NAME(Pass) *pass, int64_t block, const REAL *restrict w, REAL *restrict z, const int room, const int coded
) {
    NAME(Vector) sums[CLASSES][VECTORS];
#pragma GCC unroll 32
    for (int k = 0; k < room * VECTORS; k++) sums[k / VECTORS][k % VECTORS] = (NAME(Vector)){0};
    for (int64_t tile = pass->block_starts[block]; tile < pass->block_starts[block + 1]; tile++) {
        const REAL *row = w + pass->tile_pairs[tile] * GROUPED * room;
        if (coded) __builtin_prefetch(pass->bytes + (tile + AHEAD) * GROUPED * BLOCK);
#pragma GCC unroll 2
        for (int feature = 0; feature < GROUPED; feature++) {
            const NAME(Vector) first = NAME(features)(pass, (tile * GROUPED + feature) * VECTORS, coded);
            const NAME(Vector) second = NAME(features)(pass, (tile * GROUPED + feature) * VECTORS + 1, coded);
#pragma GCC unroll 16
            for (int k = 0; k < room; k++) {
                const NAME(Vector) same = row[feature * room + k] - (NAME(Vector)){0};
                sums[k][0] = NAME(plus_product)(sums[k][0], same, first);
                sums[k][1] = NAME(plus_product)(sums[k][1], same, second);
            }
        }
    }
#pragma GCC unroll 32
    for (int k = 0; k < room * VECTORS; k++) NAME(store)(z + k * LANES, sums[k / VECTORS][k % VECTORS]);
}

/* out += sum z a^T over the examples of a chunk. */
static inline __attribute__((always_inline)) void NAME(chunk_adjoint)(
    const NAME(Pass) *pass, int64_t chunk, const REAL *restrict z, REAL *restrict out, const int room, const int coded
) {
    const int64_t *starts = pass->pair_starts + chunk * pass->pairs;
    for (int64_t pair = 0; pair < pass->pairs; pair++) {
        if (starts[pair] == starts[pair + 1]) continue;
        NAME(Vector) sums[GROUPED][CLASSES];
#pragma GCC unroll 32
        for (int k = 0; k < GROUPED * room; k++) sums[k / room][k % room] = (NAME(Vector)){0};
        for (int64_t at = starts[pair]; at < starts[pair + 1]; at++) {
            const int64_t tile = (int64_t)pass->tiles[at] * GROUPED * VECTORS;
            const REAL *logits = z + pass->tile_blocks[at] * room * BLOCK;
#pragma GCC unroll 2
            for (int part = 0; part < VECTORS; part++) {
                const NAME(Vector) first = NAME(features)(pass, tile + part, coded);
                const NAME(Vector) second = NAME(features)(pass, tile + VECTORS + part, coded);
#pragma GCC unroll 16
                for (int k = 0; k < room; k++) {
                    const NAME(Vector) same = NAME(load)(logits + k * BLOCK + part * LANES);
                    sums[0][k] = NAME(plus_product)(sums[0][k], same, first);
                    sums[1][k] = NAME(plus_product)(sums[1][k], same, second);
                }
            }
        }
        REAL lanes[GROUPED * CLASSES][LANES];
#pragma GCC unroll 32
        for (int k = 0; k < GROUPED * room; k++) NAME(store)(lanes[k], sums[k / room][k % room]);
        for (int k = 0; k < GROUPED * room; k++) {
            REAL total = 0;
#pragma omp simd reduction(+ : total)
            for (int lane = 0; lane < LANES; lane++) total += lanes[k][lane];
            out[pair * GROUPED * room + k] += total;
        }
    }
}

/* Softmax of the logits t over the classes there are, 0 for others; logs of sum_k e^t_k where they are wanted. */
static inline void NAME(softmax)(REAL *restrict t, int64_t classes, int room, REAL *restrict logs) {
    REAL largest[BLOCK], total[BLOCK];
    memcpy(largest, t, sizeof(largest));
    memset(total, 0, sizeof(total));
    for (int64_t k = 1; k < classes; k++) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) largest[i] = t[k * BLOCK + i] > largest[i] ? t[k * BLOCK + i] : largest[i];
    }
    for (int64_t k = 0; k < classes; k++) {
        for (int i = 0; i < BLOCK; i += LANES) {
            REAL *at = t + k * BLOCK + i;
            NAME(store)(at, NAME(exponential)(NAME(load)(at) - NAME(load)(largest + i)));
            NAME(store)(total + i, NAME(load)(total + i) + NAME(load)(at));
        }
    }
    for (int i = 0; logs && i < BLOCK; i++) logs[i] = largest[i] + (REAL)log(total[i]);
    for (int i = 0; i < BLOCK; i++) total[i] = 1 / total[i];
    for (int64_t k = 0; k < classes; k++) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) t[k * BLOCK + i] *= total[i];
    }
    memset(t + classes * BLOCK, 0, (room - classes) * BLOCK * sizeof(REAL));
}

/* <s, t> over the classes, for every example of a block. */
static inline void NAME(inner_of_classes)(const REAL *s, const REAL *t, int64_t classes, REAL *restrict inner) {
    memset(inner, 0, BLOCK * sizeof(REAL));
    for (int64_t k = 0; k < classes; k++) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) inner[i] += s[k * BLOCK + i] * t[k * BLOCK + i];
    }
}

/* t times the weights of the examples. */
static inline void NAME(weigh)(REAL *restrict t, const REAL *restrict weights, int room) {
    for (int k = 0; k < room; k++) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++) t[k * BLOCK + i] *= weights[i];
    }
}

/* What is done to the logits t of a block. */
static inline void NAME(transform)(const NAME(Pass) *pass, REAL *restrict t, int64_t block, int room) {
    const int64_t *order = pass->order + block * BLOCK, *labels = pass->labels + block * BLOCK;
    const int64_t left = pass->count - block * BLOCK, size = left < BLOCK ? left : BLOCK, classes = pass->classes;
    REAL *rows = pass->rows ? pass->rows + block * room * BLOCK : NULL, weights[BLOCK] = {0}, other[BLOCK];
    for (int64_t i = 0; pass->weights && i < size; i++) weights[i] = pass->weights[order[i]];
    switch (pass->mode) {
    case LOGITS:
        memcpy(rows, t, room * BLOCK * sizeof(REAL));
        break;
    case GRADIENT:
        NAME(softmax)(t, classes, room, NULL);
        memcpy(rows, t, room * BLOCK * sizeof(REAL));
        for (int64_t i = 0; i < size; i++) t[labels[i] * BLOCK + i] -= 1;
        NAME(weigh)(t, weights, room);
        break;
    case HESSIAN:
        NAME(inner_of_classes)(rows, t, classes, other);
        for (int k = 0; k < room; k++) {
#pragma omp simd
            for (int i = 0; i < BLOCK; i++)
                t[k * BLOCK + i] = weights[i] * rows[k * BLOCK + i] * (t[k * BLOCK + i] - other[i]);
        }
        break;
    case MIXED:
        NAME(inner_of_classes)(rows, t, classes, other);
        for (int64_t i = 0; i < size; i++)
            pass->single[order[i]] = weights[i] * (other[i] - t[labels[i] * BLOCK + i]);
        break;
    case CROSS_ENTROPY: {
        REAL own[BLOCK];
        for (int64_t i = 0; i < size; i++) own[i] = t[labels[i] * BLOCK + i];
        NAME(softmax)(t, classes, room, other);
        for (int64_t i = 0; i < size; i++) pass->single[order[i]] = other[i] - own[i];
        break;
    }
    case GRAM:
        NAME(weigh)(t, weights, room);
    }
}

/* The chunks from `first` to `last`: logits with w, and what becomes of these into `sums` where it is given. */
static inline __attribute__((always_inline)) void NAME(pass_chunks)(
    const NAME(Pass) *pass, const REAL *w, REAL *sums, int64_t first, int64_t last, const int room, const int coded
) {
    REAL *z = aligned_alloc(64, CHUNK * room * BLOCK * sizeof(REAL));
    for (int64_t chunk = first; chunk < last; chunk++) {
        for (int64_t block = chunk * CHUNK; block < (chunk + 1) * CHUNK && block < pass->blocks; block++) {
            REAL *t = z + (block - chunk * CHUNK) * room * BLOCK;
            NAME(block_logits)(pass, block, w, t, room, coded);
            NAME(transform)(pass, t, block, room);
        }
        if (sums) NAME(chunk_adjoint)(pass, chunk, z, sums, room, coded);
    }
    free(z);
}

/* The code for each room that there is, and each kind of features. */
static void NAME(pass_some)(
    const NAME(Pass) *pass, const REAL *w, REAL *sums, int64_t first, int64_t last, int room
) {
    const int coded = sizeof(REAL) == 4 && pass->bytes != NULL;
#define WITH_ROOM(n) \
    if (room == n) { \
        if (coded) \
            NAME(pass_chunks)(pass, w, sums, first, last, n, 1); \
        else \
            NAME(pass_chunks)(pass, w, sums, first, last, n, 0); \
    }
    WITH_ROOM(1)
    WITH_ROOM(4)
    WITH_ROOM(10)
    WITH_ROOM(CLASSES)
#undef WITH_ROOM
}

/* `matrix` and `out` are classes x features; what else a mode needs is in `transform`, NULL where it does not. */
void NAME(sparse_pass)(
    int64_t mode, const REAL *values, const uint8_t *bytes, const uint16_t *tile_pairs, const int64_t *block_starts,
    const int32_t *tiles, const uint8_t *tile_blocks, const int64_t *pair_starts, const int64_t *order,
    const int64_t *labels, const REAL *matrix, const REAL *weights, REAL *rows, REAL *single, REAL *out, int64_t count,
    int64_t features, int64_t classes, int64_t room, int threads
) {
    const int64_t pairs = (features + GROUPED - 1) / GROUPED, size = (pairs * GROUPED * room + 15) / 16 * 16;
    const int64_t blocks = (count + BLOCK - 1) / BLOCK, chunks = (blocks + CHUNK - 1) / CHUNK;
    const int64_t length = (chunks + PARTIAL - 1) / PARTIAL;
    const NAME(Pass) pass = {mode,  count,       classes,     blocks, pairs,  values,  bytes, tile_pairs, block_starts,
                             tiles, tile_blocks, pair_starts, order,  labels, weights, rows,  single};
    REAL *w = aligned_alloc(64, (out ? 1 + PARTIAL : 1) * size * sizeof(REAL)), *sums = w + size;
    memset(w, 0, (out ? 1 + PARTIAL : 1) * size * sizeof(REAL));
    for (int64_t k = 0; k < classes; k++)
        for (int64_t j = 0; j < features; j++) w[j * room + k] = matrix[k * features + j];
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(static, 1)
        for (int64_t part = 0; part < PARTIAL; part++) {
            const int64_t first = part * length, last = first + length < chunks ? first + length : chunks;
            NAME(pass_some)(&pass, w, out ? sums + part * size : NULL, first, last, room);
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < (out ? features : 0); j++) {
            REAL total[CLASSES] = {0};
            for (int64_t part = 0; part < PARTIAL; part++)
                for (int k = 0; k < room; k++) total[k] += sums[part * size + j * room + k];
            for (int64_t k = 0; k < classes; k++) out[k * features + j] = total[k];
        }
    }
    free(w);
}
#undef BLOCK

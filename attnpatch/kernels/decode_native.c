/* Attention of single queries, used by decode_native.py: a step of generation, where a kernel for blocks of queries spends most
   of its time on what it prepares.

   Rows that follow each other may share their keys: `rows_per_key_row` of them do, as the beams of a sentence share its
   source. By torch's threads where it runs on GNU OpenMP. NaN stays NaN. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

/* [rows, H, n, D] with its strides in elements; features are next to each other. */
struct tensor { const void *data; long row, head, position; };
/* [rows of keys, S], bytes; no data: all keys are visible. A stride is 0 where it is broadcast. */
struct mask { const unsigned char *data; long row, position; };

enum kernel { SOFTMAX, EXPRESSIVE, POLYNOMIAL, ELU };

struct call {
    struct tensor query, key, value;
    struct mask mask;
    void *output;     /* [rows, H, value_dim], contiguous, in the query's dtype */
    float *workspace; /* `space` for each thread: H (n_keys + head_dim + value_dim + 3) */
    long threads, space, n_rows, n_heads, n_keys, head_dim, value_dim, rows_per_key_row, kernel, degree;
    float scale;
};

static inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0; /* not a number */
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float same(float x) { return x; }

static inline float power(float x, long n) {
    float result = 1.0f;
    for (; n; n >>= 1, x *= x)
        if (n & 1) result *= x;
    return result;
}

/* What a visible key with score z weighs, up to a factor of its row; `highest` score, `largest` of absolute ones. */
static inline float weigh(long kernel, long degree, float z, float highest, float largest) {
    switch (kernel) {
    case SOFTMAX: return expf(z - highest);
    case EXPRESSIVE: return 1.0f / (1.0f + 1.0f / (z * z)); /* from 0 to where z^2 overflows */
    case POLYNOMIAL: return power(z / largest, degree);
    default: {
        const float peak = highest > 0.0f ? highest : 0.0f, shift = highest < 0.0f ? highest : 0.0f;
        return (z > 0.0f ? z + 1.0f : expf(z - shift)) / (peak + 1.0f);
    }
    }
}

/* Rows whose scores or weights are smaller than this, where they vanish or are scaled up first, are left to the caller. */
#define LEAST 1e-15f

#define AT(type, x, r, h, j) ((const type *)(x).data + (r) * (x).row + (h) * (x).head + (j) * (x).position)

/* For one dtype: the weighted sums of the values of row r, into `output`. All heads of a key at once, which mostly lie
   side by side. 0 if the row is for the caller. */
#define ATTEND(NAME, TYPE, LOAD, STORE) \
    static int NAME##_row(const struct call *c, long r, float *restrict space) { \
        const long key_row = r / c->rows_per_key_row, heads = c->n_heads, dim = c->head_dim, width = c->value_dim; \
        float *restrict weights = space, *restrict query = weights + heads * c->n_keys; \
        float *restrict sum = query + heads * dim, *restrict highest = sum + heads * width; \
        float *restrict largest = highest + heads, *restrict total = largest + heads; \
        for (long h = 0; h < heads; h++) { \
            const TYPE *given = AT(TYPE, c->query, r, h, 0); \
            for (long d = 0; d < dim; d++) query[h * dim + d] = LOAD(given[d]) * c->scale; \
            highest[h] = -INFINITY; \
            largest[h] = total[h] = 0.0f; \
        } \
        memset(sum, 0, heads * width * sizeof(float)); \
        const unsigned char *mask = c->mask.data ? c->mask.data + key_row * c->mask.row : 0; \
        long seen = 0; \
        for (long j = 0; j < c->n_keys; j++) { \
            if (mask && !mask[j * c->mask.position]) continue; \
            seen++; \
            for (long h = 0; h < heads; h++) { \
                const TYPE *restrict key = AT(TYPE, c->key, key_row, h, j); \
                const float *restrict q = query + h * dim; \
                float score = 0.0f; \
                for (long d = 0; d < dim; d++) score += q[d] * LOAD(key[d]); \
                weights[j * heads + h] = score; \
                if (!(score <= highest[h])) highest[h] = score; \
                if (!(fabsf(score) <= largest[h])) largest[h] = fabsf(score); \
            } \
        } \
        for (long j = 0; j < c->n_keys; j++) { \
            if (mask && !mask[j * c->mask.position]) continue; \
            for (long h = 0; h < heads; h++) { \
                const TYPE *restrict value = AT(TYPE, c->value, key_row, h, j); \
                float *restrict s = sum + h * width; \
                const float weight = weigh(c->kernel, c->degree, weights[j * heads + h], highest[h], largest[h]); \
                total[h] += weight; \
                for (long d = 0; d < width; d++) s[d] += weight * LOAD(value[d]); \
            } \
        } \
        int done = 1; \
        TYPE *output = (TYPE *)c->output + r * heads * width; \
        for (long h = 0; h < heads; h++) { \
            /* A row that sees no key is 0. */ \
            const float factor = seen ? 1.0f / total[h] : 0.0f; \
            for (long d = 0; d < width; d++) output[h * width + d] = STORE(sum[h * width + d] * factor); \
            done &= !seen || c->kernel == SOFTMAX || \
                    (largest[h] >= LEAST && total[h] >= LEAST && total[h] < INFINITY); \
        } \
        return done; \
    } \
    /* Whether all rows are done. */ \
    int NAME##_attend(const struct call *c) { \
        int done = 1; \
        _Pragma("omp parallel for num_threads(c->threads) if(c->threads > 1) reduction(&:done)") \
        for (long r = 0; r < c->n_rows; r++) \
            done &= NAME##_row(c, r, c->workspace + c->space * omp_get_thread_num()); \
        return done; \
    }

ATTEND(float32, float, same, same)
ATTEND(bfloat16, uint16_t, from_bfloat16, to_bfloat16)

/* Score kernels in C, used by score_native.py: the elementwise passes over one block of scores, each in a single pass where
   torch needs four to seven, and whole attention, block by block, with the matrix products of a BLAS.

   By torch's threads where it runs on GNU OpenMP. Compiled with -ffast-math: sums are reassociated, a division is a
   reciprocal and a Newton step. Nothing here tests for NaN. Where z * z overflows the result is NaN or too large a
   sum, by which the caller finds such rows. */

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

typedef void gemm_function(
    const char *, const char *, const int *, const int *, const int *, const float *, const float *, const int *,
    const float *, const int *, const float *, float *, const int *);

/* [B, H, rows, columns] with its strides in elements; columns are next to each other. */
struct tensor { float *data; long batch, head, row; };
/* The same for the mask, of which a stride is 0 where it is broadcast; no data: all is visible. */
struct mask { const unsigned char *data; long batch, head, row; };

struct call {
    gemm_function *gemm;
    struct tensor query, key, value, output, grad, dquery, dkey, dvalue;
    struct mask keep;
    float *sums;      /* [B, H, T], contiguous */
    float *workspace; /* for each of `threads` what `space` says */
    long threads, n_batch, n_heads, n_queries, n_keys, head_dim, value_dim, block_queries, block_keys, causal;
    float scale, slope;
};

#define AT(x, b, h, i) ((x).data + (b) * (x).batch + (h) * (x).head + (i) * (x).row)

static inline long min(long a, long b) { return a < b ? a : b; }

/* out = alpha op(a) op(b) + beta out, row by row: out [m, n], op(a) [m, k], op(b) [k, n]. */
static void product(
    const struct call *c, int a_transposed, int b_transposed, long m, long n, long k, float alpha, const float *a,
    long a_row, const float *b, long b_row, float beta, float *out, long out_row) {
    const int rows = m, columns = n, inner = k, lda = a_row, ldb = b_row, ldo = out_row;
    c->gemm(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &columns, &rows, &inner, &alpha, b, &ldb, a, &lda,
            &beta, out, &ldo);
}

/* The keys [*first, *end) outside which none is visible to the queries [start, stop); returns the mask that is still
   to be looked at, or none. */
static const unsigned char *visible(
    const struct call *c, long b, long h, long start, long stop, long *first, long *end) {
    *first = 0;
    *end = c->causal ? min(c->n_keys, stop) : c->n_keys;
    if (!c->keep.data) return 0;
    const unsigned char *keep = AT(c->keep, b, h, start);
    const long rows = c->keep.row ? stop - start : 1;
    long seen = 0, lowest = *end, highest = 0;
    for (long i = 0; i < rows; i++) {
        const unsigned char *row = keep + i * c->keep.row;
        long low = 0, high = *end, count = 0;
        while (low < high && !row[low]) low++;
        while (high > low && !row[high - 1]) high--;
        for (long j = low; j < high; j++) count += row[j];
        seen += count;
        if (low < high) { lowest = min(lowest, low); highest = highest > high ? highest : high; }
    }
    *first = min(lowest, highest);
    *end = highest;
    return seen == rows * (*end - *first) ? 0 : keep;
}

/* Zeroes the scores of the keys from `first` on that are not visible; f of them is 0. */
static inline void hide(
    const struct call *c, const unsigned char *keep, float *z, long rows, long columns, long start, long first) {
    if (c->causal && first + columns - 1 > start)
        for (long i = 0; i < rows; i++) {
            const long seen = start + i - first + 1;
            for (long j = seen < 0 ? 0 : seen; j < columns; j++) z[i * columns + j] = 0.0f;
        }
    if (keep)
        for (long i = 0; i < rows; i++) {
            const unsigned char *row = keep + i * c->keep.row + first;
            for (long j = 0; j < columns; j++) z[i * columns + j] = row[j] ? z[i * columns + j] : 0.0f;
        }
}

static inline int none_visible(const struct call *c, const unsigned char *keep, long rows, long columns, long first) {
    unsigned char any = 0;
    for (long i = 0; keep && i < (c->keep.row ? rows : 1); i++)
        for (long j = 0; j < columns; j++) any |= keep[i * c->keep.row + first + j];
    return keep && !any;
}

/* For one kernel: f(x), and a body that takes x = z[j] and sets z[j] = f(x), inner[j] = d f'(x) without its constant
   factor, where d = inner[j] - delta. */
#define KERNEL(NAME, F, BACKWARD) \
    static inline float NAME##_row(float *restrict z, long columns) { \
        float sum = 0.0f; \
        for (long j = 0; j < columns; j++) { \
            const float x = z[j]; \
            const float f = F; \
            z[j] = f; \
            sum += f; \
        } \
        return sum; \
    } \
    static inline void NAME##_slopes(float *restrict z, float *restrict inner, float delta, long columns) { \
        for (long j = 0; j < columns; j++) { \
            const float x = z[j], d = inner[j] - delta; \
            BACKWARD \
        } \
    } \
    \
    void NAME##_forward(float *z, float *sums, long rows, long columns) { \
        _Pragma("omp parallel for if(rows * columns > 16384)") \
        for (long i = 0; i < rows; i++) sums[i] = NAME##_row(z + i * columns, columns); \
    } \
    void NAME##_backward(float *z, float *inner, long size) { \
        _Pragma("omp parallel for if(size > 16384)") \
        for (long j = 0; j < size; j += 4096) NAME##_slopes(z + j, inner + j, 0.0f, min(4096, size - j)); \
    } \
    \
    /* output and sums; a row without a visible key is 0 / 0. */ \
    void NAME##_attend(const struct call *c) { \
        const long blocks = (c->n_queries + c->block_queries - 1) / c->block_queries; \
        const long space = c->block_queries * c->block_keys; \
        _Pragma("omp parallel for schedule(dynamic) num_threads(c->threads)") \
        for (long item = 0; item < c->n_batch * c->n_heads * blocks; item++) { \
            const long b = item / blocks / c->n_heads, h = item / blocks % c->n_heads; \
            const long start = item % blocks * c->block_queries, stop = min(start + c->block_queries, c->n_queries); \
            const long rows = stop - start; \
            float *z = c->workspace + omp_get_thread_num() * space; \
            float *total = c->sums + (b * c->n_heads + h) * c->n_queries + start; \
            float *output = AT(c->output, b, h, start); \
            long first, end; \
            const unsigned char *keep = visible(c, b, h, start, stop, &first, &end); \
            float beta = 0.0f; \
            for (long i = 0; i < rows; i++) total[i] = 0.0f; \
            for (long at = first, columns; at < end; at += columns) { \
                columns = min(c->block_keys, end - at); \
                if (none_visible(c, keep, rows, columns, at)) continue; \
                product(c, 0, 1, rows, columns, c->head_dim, c->scale, AT(c->query, b, h, start), c->query.row, \
                        AT(c->key, b, h, at), c->key.row, 0.0f, z, columns); \
                hide(c, keep, z, rows, columns, start, at); \
                for (long i = 0; i < rows; i++) total[i] += NAME##_row(z + i * columns, columns); \
                product(c, 0, 0, rows, c->value_dim, columns, 1.0f, z, columns, AT(c->value, b, h, at), \
                        c->value.row, beta, output, c->output.row); \
                beta = 1.0f; \
            } \
            for (long i = 0; i < rows; i++) \
                for (long j = 0; j < c->value_dim; j++) { \
                    float *o = output + i * c->output.row + j; \
                    *o = beta == 0.0f ? 0.0f : *o / total[i]; \
                } \
        } \
    } \
    \
    /* dquery, dkey and dvalue; rows with sums <= 0 add nothing. */ \
    void NAME##_attend_backward(const struct call *c) { \
        const long block = c->block_queries * c->block_keys; \
        const long space = 2 * block + c->block_queries * (c->head_dim + c->value_dim + 1); \
        _Pragma("omp parallel for schedule(dynamic) num_threads(c->threads)") \
        for (long item = 0; item < c->n_batch * c->n_heads; item++) { \
            const long b = item / c->n_heads, h = item % c->n_heads; \
            float *z = c->workspace + omp_get_thread_num() * space; \
            float *inner = z + block, *given = inner + block, *delta = given + c->block_queries * c->value_dim; \
            float *kept = delta + c->block_queries; \
            for (long j = 0; j < c->n_keys; j++) { \
                for (long d = 0; d < c->head_dim; d++) AT(c->dkey, b, h, j)[d] = 0.0f; \
                for (long d = 0; d < c->value_dim; d++) AT(c->dvalue, b, h, j)[d] = 0.0f; \
            } \
            for (long start = 0; start < c->n_queries; start += c->block_queries) { \
                const long stop = min(start + c->block_queries, c->n_queries), rows = stop - start; \
                const float *query = AT(c->query, b, h, start); \
                long query_row = c->query.row, lost = 0; \
                const float *total = c->sums + item * c->n_queries + start; \
                float *dquery = AT(c->dquery, b, h, start); \
                for (long i = 0; i < rows; i++) { \
                    const float *grad = AT(c->grad, b, h, start + i), *output = AT(c->output, b, h, start + i); \
                    const float inverse = 1.0f / total[i]; \
                    float sum = 0.0f; \
                    for (long d = 0; d < c->value_dim; d++) { \
                        given[i * c->value_dim + d] = total[i] > 0.0f ? grad[d] * inverse : 0.0f; \
                        sum += given[i * c->value_dim + d] * output[d]; \
                    } \
                    delta[i] = total[i] > 0.0f ? sum : 0.0f; \
                    lost += !(total[i] > 0.0f); \
                    for (long d = 0; d < c->head_dim; d++) dquery[i * c->dquery.row + d] = 0.0f; \
                } \
                if (lost) { \
                    /* Whatever such a query holds, 0 times it must be 0. */ \
                    for (long i = 0; i < rows; i++) \
                        for (long d = 0; d < c->head_dim; d++) \
                            kept[i * c->head_dim + d] = total[i] > 0.0f ? query[i * query_row + d] : 0.0f; \
                    query = kept; \
                    query_row = c->head_dim; \
                } \
                long first, end; \
                const unsigned char *keep = visible(c, b, h, start, stop, &first, &end); \
                for (long at = first, columns; at < end; at += columns) { \
                    columns = min(c->block_keys, end - at); \
                    if (none_visible(c, keep, rows, columns, at)) continue; \
                    const float *key = AT(c->key, b, h, at); \
                    product(c, 0, 1, rows, columns, c->head_dim, c->scale, query, query_row, key, c->key.row, \
                            0.0f, z, columns); \
                    product(c, 0, 1, rows, columns, c->value_dim, 1.0f, given, c->value_dim, \
                            AT(c->value, b, h, at), c->value.row, 0.0f, inner, columns); \
                    hide(c, keep, z, rows, columns, start, at); \
                    for (long i = 0; i < rows; i++) \
                        NAME##_slopes(z + i * columns, inner + i * columns, delta[i], columns); \
                    product(c, 1, 0, columns, c->value_dim, rows, 1.0f, z, columns, given, c->value_dim, 1.0f, \
                            AT(c->dvalue, b, h, at), c->dvalue.row); \
                    product(c, 1, 0, columns, c->head_dim, rows, c->slope, inner, columns, query, query_row, \
                            1.0f, AT(c->dkey, b, h, at), c->dkey.row); \
                    product(c, 0, 0, rows, c->head_dim, columns, c->slope, inner, columns, key, c->key.row, 1.0f, \
                            dquery, c->dquery.row); \
                } \
            } \
        } \
    }

KERNEL(expressive, x * x / (1.0f + x * x),
    const float inverse = 1.0f / (1.0f + x * x);
    const float half = x * inverse;
    z[j] = x * half;
    inner[j] = d * half * inverse;
)

KERNEL(polynomial, x * x,
    z[j] = x * x;
    inner[j] = d * x;
)

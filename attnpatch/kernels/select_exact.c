/* The search of select_exact.py for one row after the other, in float32, each with the inverse of its own basis; built by
   compiled.py. Threads share the rows. Not compiled with -ffast-math: a NaN must fail the last check. */

#include <float.h>
#include <math.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define CANDIDATES 8
#define SMALLEST_PIVOT 1e-3f

/* Sums of products are kept in registers, TILE vectors of LANES at a time. */
#define LANES 16
#define TILE 8
typedef float lanes __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float))));

/* G groups of T rows (queries), S keys, S' slots for them (a multiple of CANDIDATES; steepness 0 where there is no key),
   M = D + 1. */
struct search {
    const float *columns;        /* [G, S', M] coordinates of the keys in the shared basis */
    const float *rows;           /* [G, M, S'] the same */
    const float *steepness;      /* [G, S'] -1 / length of a key's column */
    const float *coordinates;    /* [G, T, M] of the targets */
    const double *points;        /* [G, S, M] */
    const double *target;        /* [G, T, M] */
    const double *inverse;       /* [G, M, M] of the shared basis */
    const double *spread;        /* [G, S] */
    const double *weights;       /* [G, T, S] */
    const long *basis;           /* [G, M] */
    const unsigned char *wanted; /* [G, T] */
    double *sparse;              /* [G, T, S], zero */
    unsigned char *solved;       /* [G, T], zero */
    double *workspace;           /* for each of `threads` what vertex_space says, in doubles */
    long threads, n_group, n_query, n_key, n_slot, size, heaviest, few;
};

/* What one thread has for its row. Vectors of M are filled up with zeros to `wide`. */
struct row {
    long wide;
    double *exact, *rest, *shared; /* [wide] */
    float *inverse;              /* [M, wide] of the row's basis, from coordinates in the shared one */
    float *x, *column, *candidates, *price, *slopes, *heavy; /* [wide] x 2, [CANDIDATES, wide], [S'] x 3 */
    long *basis;                 /* [wide] */
};

static long widened(long size) { return (size + LANES - 1) / LANES * LANES; }

long vertex_space(long size, long n_slot) {
    const long wide = widened(size);
    return 4 * wide + (size * wide + (2 + CANDIDATES) * wide + 3 * n_slot + 1) / 2;
}

static struct row spread_out(double *space, long size, long n_slot) {
    struct row r = {.wide = widened(size)};
    r.exact = space;
    r.rest = r.exact + r.wide;
    r.shared = r.rest + r.wide;
    r.basis = (long *)(r.shared + r.wide);
    r.inverse = (float *)(r.basis + r.wide);
    r.x = r.inverse + size * r.wide;
    r.column = r.x + r.wide;
    r.candidates = r.column + r.wide;
    r.price = r.candidates + CANDIDATES * r.wide;
    r.slopes = r.price + n_slot;
    r.heavy = r.slopes + n_slot;
    return r;
}

/* out [CANDIDATES, wide]: the columns of `count` keys in the row's basis. */
static void in_basis(const struct row *r, long size, const float *columns, const long *keys, long count, float *out) {
    const float *column[CANDIDATES];
    for (long c = 0; c < CANDIDATES; c++) column[c] = columns + keys[c < count ? c : 0] * size;
    for (long j = 0; j < r->wide; j += LANES) {
        lanes sum[CANDIDATES] = {0};
        for (long i = 0; i < size; i++) {
            const lanes inverse = *(const lanes *)(r->inverse + i * r->wide + j);
            for (long c = 0; c < CANDIDATES; c++) sum[c] += column[c][i] * inverse;
        }
        for (long c = 0; c < CANDIDATES; c++) *(lanes *)(out + c * r->wide + j) = sum[c];
    }
}

/* r->slopes: the row of the current tableau for a place, every key, times its price. */
static void slopes_of(const struct row *r, long size, long n_slot, const float *rows, long place) {
    long first = 0;
    for (; first + TILE * LANES <= n_slot; first += TILE * LANES) {
        lanes sum[TILE] = {0};
        for (long i = 0; i < size; i++) {
            const float factor = r->inverse[i * r->wide + place], *row = rows + i * n_slot + first;
            for (long t = 0; t < TILE; t++) sum[t] += factor * *(const lanes *)(row + t * LANES);
        }
        for (long t = 0; t < TILE; t++) {
            const long at = first + t * LANES;
            *(lanes *)(r->slopes + at) = sum[t] * *(const lanes *)(r->price + at);
        }
    }
    memset(r->slopes + first, 0, (n_slot - first) * sizeof(float));
    for (long i = 0; i < size && first < n_slot; i++) {
        const float factor = r->inverse[i * r->wide + place], *row = rows + i * n_slot;
        for (long j = first; j < n_slot; j++) r->slopes[j] += factor * row[j];
    }
    for (long j = first; j < n_slot; j++) r->slopes[j] *= r->price[j];
}

/* The key with this column takes the place of another: the coordinates and the inverse follow. */
static void exchange(struct row *r, long size, long place, long key, const float *column) {
    const float reciprocal = 1.0f / column[place], reach = r->x[place] * reciprocal;
    for (long j = 0; j < r->wide; j++) r->x[j] -= reach * column[j];
    r->x[place] = reach;
    for (long i = 0; i < size; i++) {
        float *inverse = r->inverse + i * r->wide;
        const float factor = inverse[place] * reciprocal;
        for (long j = 0; j < r->wide; j++) inverse[j] -= factor * column[j];
        inverse[place] = factor;
    }
    r->basis[place] = key;
}

/* The value of which `count` of the n numbers are no smaller; reorders them. */
static float largest(float *numbers, long n, long count) {
    long low = 0, high = n - 1, wanted = count - 1;
    while (low < high) {
        const float pivot = numbers[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (numbers[i] > pivot) i++;
            while (numbers[j] < pivot) j--;
            if (i <= j) {
                const float other = numbers[i];
                numbers[i++] = numbers[j];
                numbers[j--] = other;
            }
        }
        if (wanted <= j) high = j;
        else if (wanted >= i) low = i;
        else break;
    }
    return numbers[wanted];
}

/* The heaviest keys go into the basis, each in the place of the key whose removal leaves it best conditioned. */
static void take_heaviest(const struct search *s, struct row *r, const float *columns, const double *weights) {
    for (long j = 0; j < s->n_key; j++) r->slopes[j] = (float)weights[j];
    for (long i = 0; i < s->size; i++) r->slopes[r->basis[i]] = 0.0f;
    memcpy(r->heavy, r->slopes, s->n_key * sizeof(float));
    const float least = largest(r->heavy, s->n_key, s->heaviest);
    if (!(least > 0.0f)) return;
    for (long next = 0; next < s->n_key;) {
        long keys[CANDIDATES], count = 0;
        for (; next < s->n_key && count < CANDIDATES; next++)
            if (r->slopes[next] >= least) keys[count++] = next;
        if (!count) return;
        in_basis(r, s->size, columns, keys, count, r->candidates);
        for (long c = 0; c < count; c++) {
            const float *column = r->candidates + c * r->wide;
            long place = -1;
            float most = 0.1f;
            for (long i = 0; i < s->size; i++) {
                if ((float)weights[r->basis[i]] >= least) continue; /* heavy ones stay */
                const float size = fabsf(column[i]);
                if (size > most) { most = size; place = i; }
            }
            if (place < 0) continue;
            exchange(r, s->size, place, keys[c], column);
            for (long later = c + 1; later < count; later++) {
                float *other = r->candidates + later * r->wide;
                const float factor = other[place] / column[place];
                for (long j = 0; j < r->wide; j++) other[j] -= factor * column[j];
                other[place] = factor;
            }
        }
    }
}

/* One exchange: the key at `leaving`, whose coordinate is below zero, for the one of CANDIDATES keys that leaves least
   below zero. Returns 0 if there is none. */
static int step(const struct search *s, struct row *r, const float *columns, const float *rows, long leaving) {
    const long size = s->size, wide = r->wide, part = s->n_slot / CANDIDATES;
    slopes_of(r, size, s->n_slot, rows, leaving);
    long keys[CANDIDATES], count = 0;
    for (long c = 0; c < CANDIDATES; c++) {
        const float *slopes = r->slopes + c * part;
        float steepest = SMALLEST_PIVOT;
        _Pragma("omp simd reduction(max : steepest)")
        for (long j = 0; j < part; j++) steepest = slopes[j] > steepest ? slopes[j] : steepest;
        if (!(steepest > SMALLEST_PIVOT)) continue;
        long key = 0;
        while (slopes[key] != steepest) key++;
        keys[count++] = c * part + key;
    }
    if (!count) return 0;
    in_basis(r, size, columns, keys, count, r->candidates);
    long best = -1;
    float least = -INFINITY;
    for (long c = 0; c < count; c++) {
        const float *column = r->candidates + c * wide, reach = r->x[leaving] / column[leaving];
        float below = 0.0f;
        _Pragma("omp simd reduction(+ : below)")
        for (long j = 0; j < wide; j++) {
            const float x = r->x[j] - reach * column[j];
            below += x < 0.0f ? x : 0.0f;
        }
        if (below > least) { least = below; best = c; }
    }
    if (best < 0) return 0;
    exchange(r, size, leaving, keys[best], r->candidates + best * wide);
    return 1;
}

/* rest = what the coordinates r->exact miss of the target. */
static void missing(const struct row *r, long size, const double *target, const double *points) {
    for (long d = 0; d < size; d++) r->rest[d] = target[d];
    for (long i = 0; i < size; i++) {
        const double factor = r->exact[i], *point = points + r->basis[i] * size;
        for (long d = 0; d < size; d++) r->rest[d] -= factor * point[d];
    }
}

/* Refines the coordinates in float64; writes the row and returns 1 if they are right. The search goes on from r->x. */
static int finish(
    const struct search *s, struct row *r, const double *target, const double *points, const double *inverse,
    const double *spread, const double *weights, double *sparse) {
    const long size = s->size;
    for (long i = 0; i < size; i++) r->exact[i] = r->x[i];
    for (int times = 0; times < 3; times++) {
        missing(r, size, target, points);
        /* First into the shared basis, then into the row's. */
        memset(r->shared, 0, size * sizeof(double));
        for (long d = 0; d < size; d++)
            for (long j = 0; j < size; j++) r->shared[j] += r->rest[d] * inverse[d * size + j];
        memset(r->column, 0, r->wide * sizeof(float));
        for (long j = 0; j < size; j++) {
            const float factor = (float)r->shared[j], *row = r->inverse + j * r->wide;
            for (long i = 0; i < r->wide; i++) r->column[i] += factor * row[i];
        }
        for (long i = 0; i < size; i++) r->exact[i] += r->column[i];
    }
    double sum = 0.0;
    for (long i = 0; i < size; i++) {
        r->x[i] = (float)r->exact[i];
        r->exact[i] = fmax(r->exact[i], 0.0);
        sum += r->exact[i];
    }
    for (long i = 0; i < size; i++) r->exact[i] /= sum;
    missing(r, size, target, points);
    double error = 0.0, farthest = 0.0;
    for (long i = 0; i < size; i++) {
        error += r->rest[i] * r->rest[i];
        if (r->exact[i] == 0.0) continue;
        if (!(weights[r->basis[i]] > 0.0)) return 0;
        farthest = fmax(farthest, spread[r->basis[i]]);
    }
    if (!(sqrt(error) <= 4 * size * DBL_EPSILON * farthest)) return 0;
    for (long i = 0; i < size; i++) sparse[r->basis[i]] = r->exact[i];
    return 1;
}

static int solve(const struct search *s, struct row *r, long group, long query) {
    const long size = s->size, item = group * s->n_query + query;
    const float *columns = s->columns + group * s->n_slot * size, *rows = s->rows + group * s->n_slot * size;
    const float *steepness = s->steepness + group * s->n_slot;
    const double *weights = s->weights + item * s->n_key;
    memset(r->inverse, 0, size * r->wide * sizeof(float));
    memset(r->x, 0, r->wide * sizeof(float));
    for (long i = 0; i < size; i++) {
        r->inverse[i * r->wide + i] = 1.0f;
        r->x[i] = s->coordinates[item * size + i];
        r->basis[i] = s->basis[group * size + i];
    }
    double square = 0.0;
    for (long j = 0; j < s->n_slot; j++) {
        const double weight = j < s->n_key ? weights[j] : 0.0;
        r->price[j] = weight > 0.0 ? steepness[j] : 0.0f;
        square += weight * weight;
    }
    if (s->heaviest > 0 && square * s->few >= 1.0) take_heaviest(s, r, columns, weights);
    for (long steps = 0; steps < 4 * size + 1; steps++) {
        long leaving = 0;
        for (long i = 1; i < size; i++) leaving = r->x[i] < r->x[leaving] ? i : leaving;
        if (!(r->x[leaving] < 0.0f)) {
            if (finish(s, r, s->target + item * size, s->points + group * s->n_key * size,
                       s->inverse + group * size * size, s->spread + group * s->n_key, weights,
                       s->sparse + item * s->n_key))
                return 1;
            for (long i = 0; i < size; i++) leaving = r->x[i] < r->x[leaving] ? i : leaving;
            if (!(r->x[leaving] < 0.0f)) return 0;
        }
        if (!step(s, r, columns, rows, leaving)) return 0;
    }
    return 0;
}

/* Rows of `wanted`, into sparse and solved. */
void vertex_search(const struct search *s) {
    const long space = vertex_space(s->size, s->n_slot);
    _Pragma("omp parallel for schedule(dynamic, 4) num_threads(s->threads)")
    for (long item = 0; item < s->n_group * s->n_query; item++) {
        if (!s->wanted[item]) continue;
        struct row r = spread_out(s->workspace + omp_get_thread_num() * space, s->size, s->n_slot);
        s->solved[item] = solve(s, &r, item / s->n_query, item % s->n_query);
    }
}

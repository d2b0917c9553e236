/* f and f' over one block of scores, each in a single pass where torch needs four to seven; built by native.py.

   By torch's threads where it runs on GNU OpenMP. Compiled with -ffast-math: sums are reassociated, a division is a
   reciprocal and a Newton step. Nothing here tests for NaN. Where z * z overflows the result is NaN or too large a sum, by which the caller finds such rows. */

#define FORWARD(NAME, F) \
    void NAME(float *restrict z, float *restrict sums, long rows, long cols) { \
        _Pragma("omp parallel for if(rows * cols > 16384)") \
        for (long i = 0; i < rows; i++) { \
            float *restrict row = z + i * cols; \
            float sum = 0.0f; \
            for (long j = 0; j < cols; j++) { \
                const float x = row[j]; \
                const float f = F; \
                row[j] = f; \
                sum += f; \
            } \
            sums[i] = sum; \
        } \
    }

/* z -> f(z), and inner -> inner * f'(z) without its constant factor. */
#define BACKWARD(NAME, BODY) \
    void NAME(float *restrict z, float *restrict inner, long size) { \
        _Pragma("omp parallel for simd if(parallel: size > 16384)") \
        for (long j = 0; j < size; j++) { \
            const float x = z[j]; \
            BODY \
        } \
    }

FORWARD(expressive_forward, x * x / (1.0f + x * x))
BACKWARD(expressive_backward,
    const float inverse = 1.0f / (1.0f + x * x);
    const float half = x * inverse;
    z[j] = x * half;
    inner[j] *= half * inverse;
)

FORWARD(polynomial_forward, x * x)
BACKWARD(polynomial_backward,
    z[j] = x * x;
    inner[j] *= x;
)

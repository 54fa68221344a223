/* Vectors of sixteen numbers: bf16 in memory, fp32 in registers. Needs AVX-512 with its bf16 dot products. */
#ifndef ASCENT_VECTOR_H
#define ASCENT_VECTOR_H

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__AVX512BF16__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "this processor has no bf16 dot products"
#endif

#define LANES 16
#define STRIP 6 /* rows of a product at a time: their sums, the columns and a factor fit 32 registers */
#define INLINE static inline __attribute__((always_inline))

/* Call with the number of rows as a constant, STRIP where there are more. */
#define BY_ROWS(rows, call)                                                                                            \
    switch (rows) {                                                                                                    \
    case 1: call(1); break;                                                                                            \
    case 2: call(2); break;                                                                                            \
    case 3: call(3); break;                                                                                            \
    case 4: call(4); break;                                                                                            \
    case 5: call(5); break;                                                                                            \
    default: call(6);                                                                                                  \
    }

typedef uint16_t bf16;

static inline float widened(bf16 x)
{
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

static inline __m512 load(const bf16 *at)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(bf16 *at, __m512 x)
{
    _mm256_storeu_si256((__m256i *)at, (__m256i)_mm512_cvtneps_pbh(x));
}

/* As it will be read again: rounded to bf16. */
static inline __m512 rounded(__m512 x)
{
    __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* e^x = 2^n 2^f with |f| <= 1/2 and the Taylor series of 2^f up to f^6: relative error 2e-7. NaN stays NaN. */
static inline __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x); /* below it the result is zero, and -inf has no fraction */
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
    __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(power, whole);
    __m512 series = _mm512_set1_ps(1.54035304e-4f);
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(1.33335581e-3f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(9.61812911e-3f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(5.55041087e-2f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(2.40226507e-1f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(6.93147181e-1f));
    series = _mm512_fmadd_ps(series, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(series, whole);
}

/* 1 / (1 + e^-x) */
static inline __m512 logistic(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

/* Working memory of the calling thread; it grows and stays, since fresh memory costs a page fault every 4 KB. */
static inline void *workspace(size_t bytes)
{
    static __thread void *kept;
    static __thread size_t size;
    if (bytes > size) {
        free(kept);
        size = (bytes + 4095) / 4096 * 4096;
        kept = aligned_alloc(4096, size);
    }
    return kept;
}

#endif

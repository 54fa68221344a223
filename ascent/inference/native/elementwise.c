/* What lies between matrix products, each in one pass over memory. The derivatives are stated in ../kernels.py. */
#include "vector.h"

/* sum = x + added; y = sum / rms(sum) * weight; scale [T] = 1 / rms. `added` may be NULL, and then sum is x itself. */
void add_norm_forward(const bf16 *x, const bf16 *added, const bf16 *weight, bf16 *sum, bf16 *y, float *scale,
                      long tokens, long width, float eps, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *row = x + t * width;
        __m512 squares = _mm512_setzero_ps();
        for (long d = 0; d < width; d += LANES) {
            __m512 value = load(row + d);
            if (added) {
                value = rounded(_mm512_add_ps(value, load(added + t * width + d)));
                store(sum + t * width + d, value);
            }
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        if (added)
            row = sum + t * width;
        float r = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps);
        __m512 factor = _mm512_set1_ps(r);
        for (long d = 0; d < width; d += LANES) {
            __m512 straight = rounded(_mm512_mul_ps(load(row + d), factor));
            store(y + t * width + d, _mm512_mul_ps(straight, load(weight + d)));
        }
        scale[t] = r;
    }
}

/* out = r (g w - x^ mean(g w x^)) + passed, where x^ = sum r; `passed` is the gradient of the sum itself, or NULL. */
void add_norm_backward(const bf16 *grad, const bf16 *passed, const bf16 *sum, const bf16 *weight, const float *scale,
                       bf16 *out, long tokens, long width, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        long row = t * width;
        __m512 r = _mm512_set1_ps(scale[t]), along = _mm512_setzero_ps();
        for (long d = 0; d < width; d += LANES) {
            __m512 straight = _mm512_mul_ps(load(sum + row + d), r);
            along = _mm512_fmadd_ps(_mm512_mul_ps(load(grad + row + d), load(weight + d)), straight, along);
        }
        __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / (float)width);
        for (long d = 0; d < width; d += LANES) {
            __m512 straight = _mm512_mul_ps(load(sum + row + d), r);
            __m512 scaled = _mm512_mul_ps(load(grad + row + d), load(weight + d));
            __m512 found = _mm512_mul_ps(_mm512_fnmadd_ps(straight, mean, scaled), r);
            if (passed)
                found = _mm512_add_ps(found, load(passed + row + d));
            store(out + row + d, found);
        }
    }
}

/* y = silu(a) b for rows [a, b] of 2 width numbers. */
void swiglu_forward(const bf16 *both, bf16 *y, long tokens, long width, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *gate = both + 2 * t * width, *up = gate + width;
        for (long d = 0; d < width; d += LANES) {
            __m512 a = load(gate + d);
            __m512 silu = rounded(_mm512_mul_ps(a, logistic(a)));
            store(y + t * width + d, _mm512_mul_ps(silu, load(up + d)));
        }
    }
}

/* da = g b s (1 + a (1 - s)), db = g a s, with s = logistic(a). */
void swiglu_backward(const bf16 *both, const bf16 *grad, bf16 *out, long tokens, long width, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        const bf16 *gate = both + 2 * t * width, *up = gate + width;
        bf16 *to_gate = out + 2 * t * width, *to_up = to_gate + width;
        for (long d = 0; d < width; d += LANES) {
            __m512 a = load(gate + d), g = load(grad + t * width + d), s = logistic(a);
            __m512 silu = _mm512_mul_ps(a, s);
            __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
            store(to_up + d, _mm512_mul_ps(g, silu));
            store(to_gate + d, _mm512_mul_ps(_mm512_mul_ps(g, load(up + d)), slope));
        }
    }
}

/* Turn the first `turned` of `heads` heads of each token by its angles, or back, and copy the others. */
void rotate(const bf16 *x, const bf16 *cosine, const bf16 *sine, bf16 *out, long tokens, long heads, long turned,
            long size, int back, int threads)
{
    long half = size / 2;
    __m512 sign = _mm512_set1_ps(back ? -1.0f : 1.0f);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        for (long head = 0; head < turned; head++) {
            const bf16 *from = x + (t * heads + head) * size;
            bf16 *to = out + (t * heads + head) * size;
            for (long d = 0; d < half; d += LANES) {
                __m512 c = load(cosine + t * half + d), s = _mm512_mul_ps(load(sine + t * half + d), sign);
                __m512 first = load(from + d), second = load(from + half + d);
                store(to + d, _mm512_fnmadd_ps(second, s, _mm512_mul_ps(first, c)));
                store(to + half + d, _mm512_fmadd_ps(first, s, _mm512_mul_ps(second, c)));
            }
        }
        size_t rest = (size_t)((heads - turned) * size) * sizeof(bf16);
        memcpy(out + (t * heads + turned) * size, x + (t * heads + turned) * size, rest);
    }
}

/* Per row of logits [rows, vocab]: log-probability of its target, whose own logit is given in fp32, and the entropy of
 * softmax(logits / temperature), where `entropy` is not NULL. With `slope`, p - onehot(target) replaces the logits. */
void target_logp(bf16 *logits, const int64_t *targets, const float *exact, float *logp, float *entropy, long rows,
                 long vocab, float temperature, int slope, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        bf16 *z = logits + row * vocab;
        z[targets[row]] = 0xff80; /* minus infinity: the exact logit counts in its place */
        __m512 highest = _mm512_set1_ps(exact[row]);
        for (long v = 0; v < vocab; v += LANES)
            highest = _mm512_max_ps(highest, load(z + v));
        float inverse = 1.0f / temperature, top = _mm512_reduce_max_ps(highest);
        __m512 times = _mm512_set1_ps(inverse), less = _mm512_set1_ps(top * inverse);
        __m512 mass = _mm512_setzero_ps(), moment = _mm512_setzero_ps();
        for (long v = 0; v < vocab; v += LANES) {
            __m512 u = _mm512_fmsub_ps(load(z + v), times, less), e = exponential(u);
            mass = _mm512_add_ps(mass, e);
            if (entropy)
                moment = _mm512_fmadd_ps(e, _mm512_max_ps(_mm512_set1_ps(-104.0f), u), moment);
        }
        float own = (exact[row] - top) * inverse, of_own = expf(own);
        float total = _mm512_reduce_add_ps(mass) + of_own;
        logp[row] = own - logf(total);
        if (entropy)
            entropy[row] = logf(total) - (_mm512_reduce_add_ps(moment) + of_own * own) / total;
        if (!slope)
            continue;
        __m512 share = _mm512_set1_ps(1.0f / total);
        for (long v = 0; v < vocab; v += LANES)
            store(z + v, _mm512_mul_ps(exponential(_mm512_fmsub_ps(load(z + v), times, less)), share));
        float missing = of_own / total - 1.0f;
        z[targets[row]] = (bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(missing)), 0);
    }
}

#define BLOCK 256 /* probabilities summed at a time: the cumulative mass is searched among blocks, then within one */

/* Per row of logits [rows, vocab]: the token at `uniform` of the cumulative softmax(logits / temperature), or where
 * `uniform` is NULL the first of the highest; its logit / temperature, and the logarithm of the normaliser. */
void pick_tokens(const bf16 *logits, const float *uniform, int64_t *tokens, float *chosen, float *lse, long rows,
                 long vocab, float temperature, int threads)
{
    const long blocks = (vocab + BLOCK - 1) / BLOCK;
    const float inverse = 1.0f / temperature;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *z = logits + row * vocab;
        float *sums = workspace((size_t)blocks * sizeof(float)), masses[BLOCK];
        __m512 highest = _mm512_set1_ps(-INFINITY), times = _mm512_set1_ps(inverse);
        for (long v = 0; v < vocab; v += LANES)
            highest = _mm512_max_ps(highest, load(z + v));
        float top = _mm512_reduce_max_ps(highest);
        __m512 less = _mm512_set1_ps(top * inverse);
        double total = 0, below = 0;
        for (long b = 0; b < blocks; b++) {
            __m512 mass = _mm512_setzero_ps();
            for (long v = b * BLOCK; v < vocab && v < (b + 1) * BLOCK; v += LANES)
                mass = _mm512_add_ps(mass, exponential(_mm512_fmsub_ps(load(z + v), times, less)));
            sums[b] = _mm512_reduce_add_ps(mass);
            total += sums[b];
        }
        lse[row] = top * inverse + (float)log(total);
        int64_t found = 0;
        if (!uniform) {
            while (found < vocab - 1 && widened(z[found]) != top)
                found++;
        } else {
            double wanted = uniform[row] * total;
            long b = 0;
            while (b < blocks - 1 && below + sums[b] <= wanted)
                below += sums[b++];
            for (long v = b * BLOCK; v < vocab && v < (b + 1) * BLOCK; v += LANES)
                _mm512_storeu_ps(masses + v - b * BLOCK, exponential(_mm512_fmsub_ps(load(z + v), times, less)));
            found = b * BLOCK;
            for (long v = b * BLOCK; v < vocab && v < (b + 1) * BLOCK; v++) {
                float mass = masses[v - b * BLOCK];
                found = mass > 0 ? v : found; /* where rounding leads past the end, the last token that has mass */
                below += mass;
                if (mass > 0 && below > wanted)
                    break;
            }
        }
        tokens[row] = found;
        chosen[row] = widened(z[found]) * inverse;
    }
}

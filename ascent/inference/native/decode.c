/* Attention of one new token a row over a tree of caches: what is shared by all rows, by a group of them, and a row's own.
 *
 * Keys lie with their places last, [size][places], values as [places][size]. Both products take two numbers at a time:
 * rows of keys in pairs along the head, values in pairs of places.
 */
#include "vector.h"

#define WIDE 32 /* places of a vector of bf16 */

/* One level: keys [slots][kv_heads][size][places], values [slots][kv_heads][places][size], and which places of a slot
 * hold something a row sees, [slots][places]; all do where `seen` is null. */
typedef struct {
    bf16 *keys, *values;
    const uint8_t *seen;
    int64_t places;
} level;

typedef struct {
    level levels[3];         /* own, group, common */
    const int64_t *group_of; /* slot of each row's group */
    int64_t rows, heads, kv_heads, size, column;
} tree;

/* Interleave the lower halves of two vectors, and the upper ones. */
#define PAIRS(n) (int16_t)(n), (int16_t)((n) + WIDE)
#define EIGHT(n) PAIRS(n), PAIRS(n + 1), PAIRS(n + 2), PAIRS(n + 3), PAIRS(n + 4), PAIRS(n + 5), PAIRS(n + 6), PAIRS(n + 7)
static const int16_t LOW[WIDE] = {EIGHT(0), EIGHT(8)}, HIGH[WIDE] = {EIGHT(16), EIGHT(24)};

INLINE __mmask32 first(long count)
{
    return count >= WIDE ? 0xffffffffu : count <= 0 ? 0 : (__mmask32)((1u << count) - 1);
}

/* scores[query][from .. from + WIDE) = query · key of each place; q is [queries][size / 2] pairs. */
INLINE void score(int queries, const uint32_t *q, const bf16 *keys, long places, long from, float *scores, long across,
                  long size)
{
    const __m512i low = _mm512_loadu_si512(LOW), high = _mm512_loadu_si512(HIGH);
    const __mmask32 there = first(places - from);
    __m512 sum[STRIP][2];
    for (int i = 0; i < queries; i++)
        sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (long k = 0; k < size / 2; k++) {
        __m512i a = _mm512_maskz_loadu_epi16(there, keys + 2 * k * places + from);
        __m512i b = _mm512_maskz_loadu_epi16(there, keys + (2 * k + 1) * places + from);
        __m512bh left = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
        __m512bh right = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
        for (int i = 0; i < queries; i++) {
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)q[i * size / 2 + k]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, right);
        }
    }
    for (int i = 0; i < queries; i++) {
        _mm512_storeu_ps(scores + i * across + from, sum[i][0]);
        _mm512_storeu_ps(scores + i * across + from + LANES, sum[i][1]);
    }
}

/* sums[query][0 .. WIDE) += weight of each place · its value; p is [queries][places, rounded up to pairs]. */
INLINE void weigh(int queries, const bf16 *p, long across, const bf16 *values, long places, float *sums, long size)
{
    const __m512i low = _mm512_loadu_si512(LOW), high = _mm512_loadu_si512(HIGH);
    __m512 sum[STRIP][2];
    for (int i = 0; i < queries; i++)
        sum[i][0] = _mm512_loadu_ps(sums + i * size), sum[i][1] = _mm512_loadu_ps(sums + i * size + LANES);
    for (long s = 0; s < places; s += 2) {
        const bf16 *value = values + s * size, *next = s + 1 < places ? value + size : value; /* its weight is zero */
        __m512i a = _mm512_loadu_si512(value), b = _mm512_loadu_si512(next);
        __m512bh left = (__m512bh)_mm512_permutex2var_epi16(a, low, b);
        __m512bh right = (__m512bh)_mm512_permutex2var_epi16(a, high, b);
        for (int i = 0; i < queries; i++) {
            uint32_t pair;
            memcpy(&pair, p + i * across + s, sizeof(pair));
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)pair);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], factor, left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], factor, right);
        }
    }
    for (int i = 0; i < queries; i++)
        _mm512_storeu_ps(sums + i * size, sum[i][0]), _mm512_storeu_ps(sums + i * size + LANES, sum[i][1]);
}

/* Scale the scores of `places` places, hide what is not seen, and return the highest. */
static float hide(float *scores, const uint8_t *seen, long places, long room, float scale)
{
    __m512 highest = _mm512_set1_ps(-INFINITY);
    for (long s = 0; s < room; s += LANES) {
        __mmask16 shown = (__mmask16)first(places - s);
        if (seen)
            shown &= _mm512_cmpneq_epi32_mask(
                _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(shown, seen + s)), _mm512_setzero_si512());
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(scale));
        x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), shown, x);
        _mm512_storeu_ps(scores + s, x);
        highest = _mm512_max_ps(highest, x);
    }
    return _mm512_reduce_max_ps(highest);
}

/* Softmax of a query's scores over all levels, as weights in bf16. */
static void soften(const tree *t, float *scores, const uint8_t *const *seen, const long *begin, bf16 *p)
{
    const float scale = 1.0f / sqrtf((float)t->size);
    float top = -INFINITY;
    for (int j = 0; j < 3; j++) {
        float high = hide(scores + begin[j], seen[j], t->levels[j].places, begin[j + 1] - begin[j], scale);
        top = high > top ? high : top;
    }
    __m512 mass = _mm512_setzero_ps();
    for (long s = 0; s < begin[3]; s += LANES) {
        __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + s), _mm512_set1_ps(top)));
        mass = _mm512_add_ps(mass, e);
        _mm512_storeu_ps(scores + s, e);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(mass));
    for (long s = 0; s < begin[3]; s += LANES)
        store(p + s, _mm512_mul_ps(_mm512_loadu_ps(scores + s), share));
}

/* All queries of a row that share one key/value head. */
static void attend(const tree *t, const bf16 *qkv, bf16 *out, long row, long head)
{
    const long size = t->size, group = t->heads / t->kv_heads, across = (t->heads + 2 * t->kv_heads) * size;
    const bf16 *mine = qkv + row * across;
    long begin[4] = {0};
    const bf16 *keys[3], *values[3];
    const uint8_t *seen[3];
    for (int j = 0; j < 3; j++) {
        const level *l = t->levels + j;
        const long slot = j == 0 ? row : j == 1 && l->places ? t->group_of[row] : 0;
        const long at = (slot * t->kv_heads + head) * size * l->places;
        keys[j] = l->keys + at, values[j] = l->values + at, seen[j] = l->seen ? l->seen + slot * l->places : NULL;
        begin[j + 1] = begin[j] + (l->places + WIDE - 1) / WIDE * WIDE;
    }
    const long total = begin[3];
    float *scores = workspace((size_t)group * (size_t)(total * 6 + size * 4)), *sums = scores + group * total;
    bf16 *p = (bf16 *)(sums + group * size);
    bf16 *key = (bf16 *)keys[0] + t->column, *value = (bf16 *)values[0] + t->column * size;
    for (long d = 0; d < size; d++)
        key[d * t->levels[0].places] = mine[(t->heads + head) * size + d];
    memcpy(value, mine + (t->heads + t->kv_heads + head) * size, (size_t)size * sizeof(bf16));
    const uint32_t *q = (const uint32_t *)(mine + head * group * size);
    for (int j = 0; j < 3; j++)
        for (long from = 0; from < t->levels[j].places; from += WIDE)
            for (long i = 0; i < group; i += STRIP) {
                float *into = scores + i * total + begin[j];
#define SCORE(n) score(n, q + i * size / 2, keys[j], t->levels[j].places, from, into, total, size)
                BY_ROWS(group - i, SCORE)
            }
    for (long i = 0; i < group; i++)
        soften(t, scores + i * total, seen, begin, p + i * total);
    memset(sums, 0, (size_t)(group * size) * sizeof(float));
    for (int j = 0; j < 3; j++)
        for (long d = 0; d < size; d += WIDE)
            for (long i = 0; i < group; i += STRIP) {
                const bf16 *weights = p + i * total + begin[j];
#define WEIGH(n) weigh(n, weights, total, values[j] + d, t->levels[j].places, sums + i * size + d, size)
                BY_ROWS(group - i, WEIGH)
            }
    for (long i = 0; i < group * size; i += LANES)
        store(out + (row * t->heads + head * group) * size + i, _mm512_loadu_ps(sums + i));
}

/* Put the new keys and values of qkv [rows, heads + 2 kv_heads, size] at `column` of the rows' own level, then attend:
 * out [rows, heads, size]. The head's size is a multiple of WIDE. */
void decode_attention(const tree *t, const bf16 *qkv, bf16 *out, int threads)
{
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long item = 0; item < t->rows * t->kv_heads; item++)
        attend(t, qkv, out, item / t->kv_heads, item % t->kv_heads);
}

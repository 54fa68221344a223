/* What a step over rows of different lengths and adapters needs beside matrix products: attention over a paged cache
 * (Kwon et al. 2023, arXiv 2309.06180) and low-rank products by segments of rows (Chen et al. 2023, arXiv 2310.18547).
 *
 * A page holds LANES tokens of one key/value head: keys as [size / 2][LANES] pairs along the head, values as
 * [LANES / 2][size] pairs of tokens, so that both products read whole vectors in the order in which they lie.
 */
#include "vector.h"

#define PAGES 4 /* pages that scores are held for at a time */
#define COLUMNS (PAGES * LANES)
#define ROWS 48 /* (token, head) rows of a work item */

/* c[row][page * LANES + token] = q[row] · key of the token; q is [rows][size / 2] pairs. */
INLINE void score(int rows, const uint32_t *q, const uint32_t *const *pages, float *c, long size)
{
    __m512 sum[STRIP][PAGES];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < PAGES; j++)
            sum[i][j] = _mm512_setzero_ps();
    for (long k = 0; k < size / 2; k++) {
        __m512bh column[PAGES];
        for (int j = 0; j < PAGES; j++)
            column[j] = (__m512bh)_mm512_loadu_si512(pages[j] + k * LANES);
        for (int i = 0; i < rows; i++) {
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)q[i * size / 2 + k]);
            for (int j = 0; j < PAGES; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, column[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < PAGES; j++)
            _mm512_storeu_ps(c + i * COLUMNS + j * LANES, sum[i][j]);
}

/* c[row][0 .. 64) += weights p[row] · values of the first `pages`; p is [rows][COLUMNS / 2] pairs of tokens. */
INLINE void weigh(int rows, const uint32_t *p, const uint32_t *const *values, long pages, float *c, long size)
{
    __m512 sum[STRIP][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            sum[i][j] = _mm512_loadu_ps(c + i * size + j * LANES);
    for (long page = 0; page < pages; page++)
        for (long k = 0; k < LANES / 2; k++) {
            __m512bh column[4];
            for (int j = 0; j < 4; j++)
                column[j] = (__m512bh)_mm512_loadu_si512(values[page] + k * size + j * LANES);
            for (int i = 0; i < rows; i++) {
                __m512bh factor = (__m512bh)_mm512_set1_epi32((int)p[i * COLUMNS / 2 + page * LANES / 2 + k]);
                for (int j = 0; j < 4; j++)
                    sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, column[j]);
            }
        }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            _mm512_storeu_ps(c + i * size + j * LANES, sum[i][j]);
}

/* Softmax over the tokens seen so far, one block further (Milakov and Gimelshein 2018, arXiv 1805.02867). */
static void soften(const float *scores, uint32_t *p, float *sum, float *top, float *mass, long visible, long size,
                   float scale)
{
    __m512 s[PAGES], highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int j = 0; j < PAGES; j++) {
        long left = visible - j * LANES;
        __mmask16 seen = left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + j * LANES), _mm512_set1_ps(scale));
        s[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, x);
        highest = _mm512_max_ps(highest, s[j]);
    }
    float before = *top, now = _mm512_reduce_max_ps(highest);
    now = now > before ? now : before;
    for (int j = 0; j < PAGES; j++) {
        __m512 e = exponential(_mm512_sub_ps(s[j], _mm512_set1_ps(now)));
        total = _mm512_add_ps(total, e);
        store((bf16 *)p + j * LANES, e);
    }
    float keep = now == before ? 1.0f : expf(before - now);
    *mass = *mass * keep + _mm512_reduce_add_ps(total);
    *top = now;
    if (keep != 1.0f)
        for (long d = 0; d < size; d += LANES)
            _mm512_storeu_ps(sum + d, _mm512_mul_ps(_mm512_loadu_ps(sum + d), _mm512_set1_ps(keep)));
}

/* Tokens [first, first + count) of a row stand at positions from `position` on; its pages are listed from `table` on. */
typedef struct {
    int64_t table, position, first, count;
} stretch;

typedef struct {
    const stretch *stretches;
    const int64_t *tables, *places; /* pages; page * LANES + slot of each token */
    uint32_t *keys, *values;        /* [pages][kv_heads][size / 2][LANES], [pages][kv_heads][LANES / 2][size] */
    long count, tokens, heads, kv_heads, size;
} paged;

static void attend(const paged *l, const bf16 *qkv, bf16 *out, const stretch *s, long head)
{
    const long size = l->size, group = l->heads / l->kv_heads, across = (l->heads + 2 * l->kv_heads) * size;
    const long rows = s->count * group, page = size / 2 * LANES, keys = s->position + s->count;
    uint32_t *q = workspace((size_t)rows * (size_t)(6 * size + 6 * COLUMNS + 8));
    uint32_t *p = q + rows * size / 2;
    float *scores = (float *)(p + rows * COLUMNS / 2), *sum = scores + rows * COLUMNS;
    float *top = sum + rows * size, *mass = top + rows, scale = 1.0f / sqrtf((float)size);
    for (long t = 0; t < s->count; t++)
        memcpy(q + t * group * size / 2, qkv + (s->first + t) * across + head * group * size,
               (size_t)(group * size) * sizeof(bf16));
    memset(sum, 0, (size_t)(rows * size) * sizeof(float));
    for (long r = 0; r < rows; r++)
        top[r] = -INFINITY, mass[r] = 0;
    for (long from = 0; from < keys; from += COLUMNS) {
        const uint32_t *key[PAGES], *value[PAGES];
        long pages = (keys - from + LANES - 1) / LANES;
        pages = pages < PAGES ? pages : PAGES;
        for (long j = 0; j < PAGES; j++) { /* the last page stands for those that are not there: nothing there is seen */
            long at = l->tables[s->table + from / LANES + (j < pages ? j : pages - 1)] * l->kv_heads + head;
            key[j] = l->keys + at * page, value[j] = l->values + at * page;
        }
        for (long r = 0; r < rows; r += STRIP) {
#define SCORE(n) score(n, q + r * size / 2, key, scores + r * COLUMNS, size)
            BY_ROWS(rows - r, SCORE)
        }
        for (long r = 0; r < rows; r++)
            soften(scores + r * COLUMNS, p + r * COLUMNS / 2, sum + r * size, top + r, mass + r,
                   s->position + r / group + 1 - from, size, scale);
        for (long d = 0; d < size; d += 4 * LANES) {
            const uint32_t *panel[PAGES];
            for (long j = 0; j < PAGES; j++)
                panel[j] = value[j] + d;
            for (long r = 0; r < rows; r += STRIP) {
#define WEIGH(n) weigh(n, p + r * COLUMNS / 2, panel, pages, sum + r * size + d, size)
                BY_ROWS(rows - r, WEIGH)
            }
        }
    }
    for (long r = 0; r < rows; r++) {
        bf16 *into = out + ((s->first + r / group) * l->heads + head * group + r % group) * size;
        for (long d = 0; d < size; d += LANES)
            store(into + d, _mm512_mul_ps(_mm512_loadu_ps(sum + r * size + d), _mm512_set1_ps(1.0f / mass[r])));
    }
}

/* Put keys and values of qkv [tokens, heads + 2 kv_heads, size] into their places, then attend: out [tokens, heads,
 * size]. No stretch has more than ROWS / group tokens, or one. */
void paged_attention(const paged *l, const bf16 *qkv, bf16 *out, int threads)
{
    const long size = l->size, across = (l->heads + 2 * l->kv_heads) * size;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < l->tokens; t++) {
            long page = l->places[t] / LANES, slot = l->places[t] % LANES;
            for (long head = 0; head < l->kv_heads; head++) {
                const bf16 *key = qkv + t * across + (l->heads + head) * size, *value = key + l->kv_heads * size;
                long at = (page * l->kv_heads + head) * (size / 2 * LANES);
                bf16 *into = (bf16 *)(l->values + at + slot / 2 * size) + slot % 2;
                for (long k = 0; k < size / 2; k++)
                    memcpy(l->keys + at + k * LANES + slot, key + 2 * k, sizeof(uint32_t));
                for (long d = 0; d < size; d++)
                    into[2 * d] = value[d];
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (long item = 0; item < l->count * l->kv_heads; item++)
            attend(l, qkv, out, l->stretches + item / l->kv_heads, item % l->kv_heads);
    }
}

/* One adapter's matrices for tokens [from, to), at most STRIP: down [parts * rank, in] and up [out, rank], each as
 * [rows / LANES][columns / 2][LANES] pairs along the columns. Output rows before ends[0] take the first `rank` inner
 * numbers, those before ends[1] the next, and so on. */
typedef struct {
    int64_t down, up, rank, from, to;
} strip;

/* c[row][0 .. LANES) (+)= a[row] · b for `pairs` pairs; b is [pairs][LANES]. */
INLINE void times(int rows, long pairs, const uint32_t *a, long stride, const uint32_t *b, bf16 *c, long across, int add)
{
    __m512 sum[STRIP];
    for (int i = 0; i < rows; i++)
        sum[i] = add ? load(c + i * across) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh column = (__m512bh)_mm512_loadu_si512(b + k * LANES);
        for (int i = 0; i < rows; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32((int)a[i * stride + k]), column);
    }
    for (int i = 0; i < rows; i++)
        store(c + i * across, sum[i]);
}

/* y [tokens, out] += up · (down · x [tokens, in]), strip by strip; `inner` [tokens, most] is memory to work in. */
void adapt(const bf16 *x, bf16 *y, const strip *strips, bf16 *inner, const int64_t *ends, long count, long in, long out,
           long parts, long most, int threads)
{
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (long s = 0; s < count; s++)
            for (long w = 0; w < most; w += LANES) {
                const strip *g = strips + s;
                if (w >= parts * g->rank)
                    continue;
                const uint32_t *down = (const uint32_t *)g->down + w * in / 2;
                const uint32_t *own = (const uint32_t *)(x + g->from * in);
#define DOWN(n) times(n, in / 2, own, in / 2, down, inner + g->from * most + w, most, 0)
                BY_ROWS(g->to - g->from, DOWN)
            }
#pragma omp for collapse(2) schedule(static)
        for (long s = 0; s < count; s++)
            for (long o = 0; o < out; o += LANES) {
                const strip *g = strips + s;
                if (!g->rank)
                    continue;
                long part = 0;
                while (o >= ends[part])
                    part++;
                const uint32_t *up = (const uint32_t *)g->up + o * g->rank / 2;
                const uint32_t *own = (const uint32_t *)(inner + g->from * most + part * g->rank);
#define UP(n) times(n, g->rank / 2, own, most / 2, up, y + g->from * out + o, out, 1)
                BY_ROWS(g->to - g->from, UP)
            }
    }
}

#define BLOCK 256 /* masses summed at a time: the cumulative mass is searched among blocks, then within one */

/* bf16 numbers in their order, as integers: 0 for the lowest, and back. */
static inline uint32_t rank_of(bf16 x)
{
    return x & 0x8000 ? 0xffffu - x : x | 0x8000u;
}

static inline float ranked(uint32_t rank)
{
    return widened((bf16)(rank & 0x8000 ? rank & 0x7fff : 0xffffu - rank));
}

/* Mass of the tokens whose logit is `least` or more. */
static double mass_from(const bf16 *z, const float *masses, long vocab, float least)
{
    __m512 sum = _mm512_setzero_ps(), bound = _mm512_set1_ps(least);
    for (long v = 0; v < vocab; v += LANES) {
        __mmask16 kept = _mm512_cmp_ps_mask(load(z + v), bound, _CMP_GE_OQ);
        sum = _mm512_mask_add_ps(sum, kept, sum, _mm512_loadu_ps(masses + v));
    }
    return _mm512_reduce_add_ps(sum);
}

/* For each of `rows` of logits [.., vocab] with its (temperature, top_p, uniform): the token at `uniform` of the
 * cumulative softmax(logits / temperature), cut down to the fewest likeliest tokens whose mass reaches top_p and those
 * as likely as the last of them. */
void draw_tokens(const bf16 *logits, const int64_t *rows, const float *settings, int64_t *tokens, long count, long vocab,
                 int threads)
{
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long row = 0; row < count; row++) {
        const bf16 *z = logits + rows[row] * vocab;
        const float inverse = 1.0f / settings[3 * row], top_p = settings[3 * row + 1];
        float *masses = workspace((size_t)vocab * sizeof(float));
        __m512 highest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), times = _mm512_set1_ps(inverse);
        for (long v = 0; v < vocab; v += LANES)
            highest = _mm512_max_ps(highest, load(z + v));
        float top = _mm512_reduce_max_ps(highest), least = -INFINITY;
        for (long v = 0; v < vocab; v += LANES) {
            __m512 mass = exponential(_mm512_mul_ps(_mm512_sub_ps(load(z + v), _mm512_set1_ps(top)), times));
            _mm512_storeu_ps(masses + v, mass);
            sum = _mm512_add_ps(sum, mass);
        }
        if (top_p < 1) {
            double wanted = top_p * (double)_mm512_reduce_add_ps(sum);
            uint32_t low = 0, high = rank_of((bf16)_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set1_ps(top)), 0));
            while (low < high) { /* the highest bound from which the mass suffices */
                uint32_t middle = (low + high + 1) / 2;
                if (mass_from(z, masses, vocab, ranked(middle)) >= wanted)
                    low = middle;
                else
                    high = middle - 1;
            }
            least = ranked(low);
        }
        double total = 0, below = 0;
        for (int again = 0; again < 2; again++) { /* the mass of all, then the way to the token */
            double wanted = settings[3 * row + 2] * total;
            for (long from = 0; from < vocab; from += BLOCK) {
                long size = from + BLOCK < vocab ? BLOCK : vocab - from;
                double mass = mass_from(z + from, masses + from, size, least);
                if (!again)
                    total += mass;
                else if (below + mass <= wanted)
                    below += mass;
                else {
                    for (long v = from; v < from + size; v++)
                        if (masses[v] > 0 && widened(z[v]) >= least) {
                            tokens[row] = v; /* where rounding leads past the end, the last token that has mass */
                            below += masses[v];
                            if (below > wanted)
                                break;
                        }
                    break;
                }
            }
        }
    }
}

/* Attention over a prefix tree, forward and backward (the method of FlashAttention-2, arXiv 2307.08691).
 *
 * A task is a stretch of one segment's tokens: its keys are the nodes of the path above, then the segment's own. A work
 * item is a task for one key/value head with its G query heads. Keys go by in blocks of COLUMNS, queries in blocks of
 * about ROWS (token, head) rows; scores live in one block. All products are of bf16 pairs summed in fp32.
 *
 * Work items are dealt out to `parts` beforehand, and each part adds key gradients into its own buffer, so that sums
 * come in the same order however many threads run.
 */
#include "vector.h"

#define COLUMNS 64 /* of a product's right side: four vectors */
#define ROWS 48
#define PAIRS (COLUMNS / 2)

typedef struct {
    long start, from, to;  /* first node of the segment; its first token of this task, and one past the last */
    long stretch, stretches; /* of the path above */
} task;

typedef struct {
    const int64_t *tasks, *stretches, *items, *bounds; /* [.., 5], [.., 2], [items], [parts + 1] */
    long parts, nodes, tokens; /* nodes have queries; tokens up to which the rest is padding */
    long heads, kv_heads, size;
    int64_t threads;
} layout;

INLINE void strip(int rows, long pairs, const uint32_t *a, long by_row,
                                                        long by_pair, const uint32_t *b, float *c, long stride, int add)
{
    __m512 sum[STRIP][4];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            sum[i][j] = add ? _mm512_loadu_ps(c + i * stride + j * LANES) : _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512bh column[4];
        for (int j = 0; j < 4; j++)
            column[j] = (__m512bh)_mm512_loadu_si512(b + k * COLUMNS + j * LANES);
        for (int i = 0; i < rows; i++) {
            __m512bh factor = (__m512bh)_mm512_set1_epi32((int)a[i * by_row + k * by_pair]);
            for (int j = 0; j < 4; j++)
                sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor, column[j]);
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 4; j++)
            _mm512_storeu_ps(c + i * stride + j * LANES, sum[i][j]);
}

/* c [rows, COLUMNS] (+)= a · b over pairs of bf16: a[i * by_row + k * by_pair], b[k][COLUMNS]. */
static void multiply(long rows, long pairs, const uint32_t *a, long by_row, long by_pair, const uint32_t *b, float *c,
                     long stride, int add)
{
    for (long i = 0; i < rows; i += STRIP, a += STRIP * by_row, c += STRIP * stride) {
        #define ONE_STRIP(n) strip(n, pairs, a, by_row, by_pair, b, c, stride, add)
        BY_ROWS(rows - i, ONE_STRIP)
    }
}

static inline __m512i paired(__m256i low, __m256i high)
{
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* Rows two by two: out[panel][row / 2][COLUMNS] pairs the numbers of rows 2k and 2k + 1; a missing row is zero. */
static void pair_rows(const bf16 *const *rows, long count, long room, long size, uint32_t *out)
{
    __m256i none = _mm256_setzero_si256();
    for (long k = 0; k < room / 2; k++)
        for (long d = 0; d < size; d += LANES) {
            const bf16 *first = 2 * k < count ? rows[2 * k] : NULL, *second = 2 * k + 1 < count ? rows[2 * k + 1] : NULL;
            __m256i low = first ? _mm256_loadu_si256((const __m256i *)(first + d)) : none;
            __m256i high = second ? _mm256_loadu_si256((const __m256i *)(second + d)) : none;
            _mm512_storeu_si512(out + (d / COLUMNS * (room / 2) + k) * COLUMNS + d % COLUMNS, paired(low, high));
        }
}

/* Rows as columns: out[pair of numbers][COLUMNS] for up to COLUMNS rows. */
static void pair_numbers(const bf16 *const *rows, long count, long size, uint32_t *out)
{
    memset(out, 0, (size_t)(size / 2 * COLUMNS) * sizeof *out);
    for (long n = 0; n < count; n++)
        for (long k = 0; k < size / 2; k++)
            memcpy(out + k * COLUMNS + n, rows[n] + 2 * k, sizeof *out);
}

static inline __mmask16 seen(long visible, int vector)
{
    long left = visible - vector * LANES;
    return left >= LANES ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
}

/* What a work item needs of its keys, in working memory. */
typedef struct {
    task what;
    long head, above, keys, blocks, group;
    const bf16 **key_rows, **value_rows; /* [keys] */
    int64_t *key_nodes;                  /* [keys] */
} item;

static char *carve(char **at, size_t bytes)
{
    char *found = *at;
    *at += (bytes + 63) / 64 * 64;
    return found;
}

static long keys_of(const layout *l, const int64_t *t)
{
    long keys = t[2];
    for (long s = t[3]; s < t[3] + t[4]; s++)
        keys += l->stretches[2 * s + 1] - l->stretches[2 * s];
    return keys;
}

static item open_item(const layout *l, const bf16 *qkv, int64_t which, char **memory)
{
    const int64_t *t = l->tasks + which / l->kv_heads * 5;
    item it = {.what = {t[0], t[1], t[2], t[3], t[4]}, .head = which % l->kv_heads, .group = l->heads / l->kv_heads};
    it.keys = keys_of(l, t);
    it.above = it.keys - it.what.to;
    it.blocks = (it.keys + COLUMNS - 1) / COLUMNS;
    it.key_rows = (const bf16 **)carve(memory, (size_t)it.keys * sizeof(bf16 *));
    it.value_rows = (const bf16 **)carve(memory, (size_t)it.keys * sizeof(bf16 *));
    it.key_nodes = (int64_t *)carve(memory, (size_t)it.keys * sizeof(int64_t));
    long at = 0, across = (l->heads + 2 * l->kv_heads) * l->size;
    for (long s = t[3]; s < t[3] + t[4]; s++)
        for (long node = l->stretches[2 * s]; node < l->stretches[2 * s + 1]; node++)
            it.key_nodes[at++] = node;
    for (long own = 0; own < it.what.to; own++)
        it.key_nodes[at++] = it.what.start + own;
    for (long n = 0; n < it.keys; n++) {
        it.key_rows[n] = qkv + it.key_nodes[n] * across + (l->heads + it.head) * l->size;
        it.value_rows[n] = it.key_rows[n] + l->kv_heads * l->size;
    }
    return it;
}

static long longest(const layout *l, long part)
{
    long most = 0;
    for (long i = l->bounds[part]; i < l->bounds[part + 1]; i++) {
        long keys = keys_of(l, l->tasks + l->items[i] / l->kv_heads * 5);
        most = keys > most ? keys : most;
    }
    return (most + COLUMNS - 1) / COLUMNS * COLUMNS;
}

static inline long block_tokens(long group)
{
    return group >= ROWS ? 1 : ROWS / group;
}

static void attend(const layout *l, const bf16 *qkv, bf16 *out, float *lse, int64_t which, char *memory)
{
    item it = open_item(l, qkv, which, &memory);
    const long size = l->size, panels = size / COLUMNS, across = (l->heads + 2 * l->kv_heads) * size;
    const long rows = block_tokens(it.group) * it.group;
    const float scale = 1.0f / sqrtf((float)size);
    uint32_t *keys = (uint32_t *)carve(&memory, (size_t)(it.blocks * size / 2 * COLUMNS) * 4);
    uint32_t *values = (uint32_t *)carve(&memory, (size_t)(it.blocks * panels * PAIRS * COLUMNS) * 4);
    uint32_t *q = (uint32_t *)carve(&memory, (size_t)(rows * size / 2) * 4);
    uint32_t *p = (uint32_t *)carve(&memory, (size_t)(rows * PAIRS) * 4);
    float *scores = (float *)carve(&memory, (size_t)(rows * COLUMNS) * 4);
    float *sum = (float *)carve(&memory, (size_t)(rows * size) * 4);
    float *top = (float *)carve(&memory, (size_t)rows * 4), *mass = (float *)carve(&memory, (size_t)rows * 4);
    for (long b = 0; b < it.blocks; b++) {
        long left = it.keys - b * COLUMNS, count = left < COLUMNS ? left : COLUMNS;
        pair_numbers(it.key_rows + b * COLUMNS, count, size, keys + b * size / 2 * COLUMNS);
        pair_rows(it.value_rows + b * COLUMNS, count, COLUMNS, size, values + b * panels * PAIRS * COLUMNS);
    }
    for (long from = it.what.from; from < it.what.to; from += rows / it.group) {
        long to = from + rows / it.group < it.what.to ? from + rows / it.group : it.what.to;
        long count = (to - from) * it.group, first = it.head * it.group;
        for (long i = from; i < to; i++)
            memcpy(q + (i - from) * it.group * size / 2, qkv + (it.what.start + i) * across + first * size,
                   (size_t)(it.group * size) * sizeof(bf16));
        memset(sum, 0, (size_t)(count * size) * sizeof(float));
        for (long r = 0; r < count; r++) {
            top[r] = -INFINITY;
            mass[r] = 0;
        }
        for (long b = 0; b * COLUMNS < it.above + to; b++) {
            multiply(count, size / 2, q, size / 2, 1, keys + b * size / 2 * COLUMNS, scores, COLUMNS, 0);
            for (long r = 0; r < count; r++) {
                long visible = it.above + from + r / it.group + 1 - b * COLUMNS;
                __m512 s[4], highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
                for (int j = 0; j < 4; j++) {
                    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + r * COLUMNS + j * LANES), _mm512_set1_ps(scale));
                    s[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen(visible, j), x);
                    highest = _mm512_max_ps(highest, s[j]);
                }
                float before = top[r], now = _mm512_reduce_max_ps(highest);
                now = now > before ? now : before;
                for (int j = 0; j < 4; j++) {
                    __m512 e = exponential(_mm512_sub_ps(s[j], _mm512_set1_ps(now)));
                    total = _mm512_add_ps(total, e);
                    store((bf16 *)(p + r * PAIRS) + j * LANES, e);
                }
                float keep = now == before ? 1.0f : expf(before - now);
                mass[r] = mass[r] * keep + _mm512_reduce_add_ps(total);
                top[r] = now;
                if (keep != 1.0f)
                    for (long d = 0; d < size; d += LANES)
                        _mm512_storeu_ps(sum + r * size + d,
                                         _mm512_mul_ps(_mm512_loadu_ps(sum + r * size + d), _mm512_set1_ps(keep)));
            }
            for (long panel = 0; panel < panels; panel++)
                multiply(count, PAIRS, p, PAIRS, 1, values + (b * panels + panel) * PAIRS * COLUMNS,
                         sum + panel * COLUMNS, size, 1);
        }
        for (long r = 0; r < count; r++) {
            long row = (it.what.start + from + r / it.group) * l->heads + first + r % it.group;
            __m512 share = _mm512_set1_ps(1.0f / mass[r]);
            for (long d = 0; d < size; d += LANES)
                store(out + row * size + d, _mm512_mul_ps(_mm512_loadu_ps(sum + r * size + d), share));
            lse[row] = top[r] + logf(mass[r]);
        }
    }
}

/* out [tokens, heads, size] and the logarithm of each softmax's normaliser, lse [tokens, heads]. */
void attention_forward(const layout *l, const bf16 *qkv, bf16 *out, float *lse)
{
    memset(out + l->nodes * l->heads * l->size, 0, (size_t)((l->tokens - l->nodes) * l->heads * l->size) * sizeof(bf16));
#pragma omp parallel for num_threads(l->threads) schedule(static, 1)
    for (long part = 0; part < l->parts; part++) {
        long keys = longest(l, part), rows = block_tokens(l->heads / l->kv_heads) * (l->heads / l->kv_heads);
        char *memory = workspace((size_t)(keys * (24 + 4 * l->size) + rows * (6 * l->size + 6 * COLUMNS + 8) + 1024));
        for (long i = l->bounds[part]; i < l->bounds[part + 1]; i++)
            attend(l, qkv, out, lse, l->items[i], memory);
    }
}

static void differentiate(const layout *l, const bf16 *qkv, const bf16 *out, const float *lse, const bf16 *grad,
                          bf16 *grad_qkv, float *key_grads, int64_t which, char *memory)
{
    item it = open_item(l, qkv, which, &memory);
    const long size = l->size, panels = size / COLUMNS, across = (l->heads + 2 * l->kv_heads) * size;
    const long rows = (block_tokens(it.group) * it.group + 1) / 2 * 2, packed = size / 2 * COLUMNS;
    const float scale = 1.0f / sqrtf((float)size);
    uint32_t *keys = (uint32_t *)carve(&memory, (size_t)(it.blocks * packed) * 4);
    uint32_t *values = (uint32_t *)carve(&memory, (size_t)(it.blocks * packed) * 4);
    uint32_t *key_pairs = (uint32_t *)carve(&memory, (size_t)(it.blocks * packed) * 4);
    float *to_keys = (float *)carve(&memory, (size_t)(it.blocks * COLUMNS * size) * 4);
    float *to_values = (float *)carve(&memory, (size_t)(it.blocks * COLUMNS * size) * 4);
    const bf16 **q_rows = (const bf16 **)carve(&memory, (size_t)rows * sizeof(bf16 *));
    const bf16 **grad_rows = (const bf16 **)carve(&memory, (size_t)rows * sizeof(bf16 *));
    uint32_t *q = (uint32_t *)carve(&memory, (size_t)(rows * size / 2) * 4);
    uint32_t *g = (uint32_t *)carve(&memory, (size_t)(rows * size / 2) * 4);
    uint32_t *q_pairs = (uint32_t *)carve(&memory, (size_t)(rows * size / 2) * 4);
    uint32_t *g_pairs = (uint32_t *)carve(&memory, (size_t)(rows * size / 2) * 4);
    uint32_t *p_pairs = (uint32_t *)carve(&memory, (size_t)(rows / 2 * COLUMNS) * 4);
    uint32_t *s_pairs = (uint32_t *)carve(&memory, (size_t)(rows / 2 * COLUMNS) * 4);
    uint32_t *s_rows = (uint32_t *)carve(&memory, (size_t)(rows * PAIRS) * 4);
    float *scores = (float *)carve(&memory, (size_t)(rows * COLUMNS) * 4);
    float *slopes = (float *)carve(&memory, (size_t)(rows * COLUMNS) * 4);
    float *to_q = (float *)carve(&memory, (size_t)(rows * size) * 4);
    float *delta = (float *)carve(&memory, (size_t)rows * 4), *top = (float *)carve(&memory, (size_t)rows * 4);
    memset(to_keys, 0, (size_t)(it.blocks * COLUMNS * size) * 4);
    memset(to_values, 0, (size_t)(it.blocks * COLUMNS * size) * 4);
    for (long b = 0; b < it.blocks; b++) {
        long left = it.keys - b * COLUMNS, count = left < COLUMNS ? left : COLUMNS;
        pair_numbers(it.key_rows + b * COLUMNS, count, size, keys + b * packed);
        pair_numbers(it.value_rows + b * COLUMNS, count, size, values + b * packed);
        pair_rows(it.key_rows + b * COLUMNS, count, COLUMNS, size, key_pairs + b * packed);
    }
    for (long from = it.what.from; from < it.what.to; from += block_tokens(it.group)) {
        long to = from + block_tokens(it.group) < it.what.to ? from + block_tokens(it.group) : it.what.to;
        long count = (to - from) * it.group, first = it.head * it.group;
        for (long r = 0; r < count; r++) {
            long node = it.what.start + from + r / it.group, row = node * l->heads + first + r % it.group;
            q_rows[r] = qkv + node * across + (first + r % it.group) * size;
            grad_rows[r] = grad + row * size;
            memcpy(q + r * size / 2, q_rows[r], (size_t)size * sizeof(bf16));
            memcpy(g + r * size / 2, grad_rows[r], (size_t)size * sizeof(bf16));
            __m512 along = _mm512_setzero_ps();
            for (long d = 0; d < size; d += LANES)
                along = _mm512_fmadd_ps(load(out + row * size + d), load(grad_rows[r] + d), along);
            delta[r] = _mm512_reduce_add_ps(along);
            top[r] = lse[row];
        }
        pair_rows(q_rows, count, rows, size, q_pairs);
        pair_rows(grad_rows, count, rows, size, g_pairs);
        memset(to_q, 0, (size_t)(count * size) * sizeof(float));
        for (long b = 0; b * COLUMNS < it.above + to; b++) {
            multiply(count, size / 2, q, size / 2, 1, keys + b * packed, scores, COLUMNS, 0);
            multiply(count, size / 2, g, size / 2, 1, values + b * packed, slopes, COLUMNS, 0);
            for (long r = 0; r < count; r++) {
                long visible = it.above + from + r / it.group + 1 - b * COLUMNS;
                for (int j = 0; j < 4; j++) {
                    long at = r * COLUMNS + j * LANES;
                    __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores + at), _mm512_set1_ps(scale), _mm512_set1_ps(top[r]));
                    __m512 p = _mm512_maskz_mov_ps(seen(visible, j), exponential(x));
                    __m512 away = _mm512_sub_ps(_mm512_loadu_ps(slopes + at), _mm512_set1_ps(delta[r]));
                    __m512 s = _mm512_mul_ps(_mm512_mul_ps(p, away), _mm512_set1_ps(scale));
                    __m256i low_p = (__m256i)_mm512_cvtneps_pbh(p), low_s = (__m256i)_mm512_cvtneps_pbh(s);
                    _mm256_storeu_si256((__m256i *)(s_rows + r * PAIRS) + j, low_s);
                    uint32_t *into_p = p_pairs + r / 2 * COLUMNS + j * LANES, *into_s = s_pairs + r / 2 * COLUMNS + j * LANES;
                    __m512i wide_p = _mm512_cvtepu16_epi32(low_p), wide_s = _mm512_cvtepu16_epi32(low_s);
                    if (r % 2) {
                        wide_p = _mm512_or_si512(_mm512_slli_epi32(wide_p, 16), _mm512_loadu_si512(into_p));
                        wide_s = _mm512_or_si512(_mm512_slli_epi32(wide_s, 16), _mm512_loadu_si512(into_s));
                    }
                    _mm512_storeu_si512(into_p, wide_p);
                    _mm512_storeu_si512(into_s, wide_s);
                }
            }
            long left = it.keys - b * COLUMNS, wide = left < COLUMNS ? left : COLUMNS, pairs = (count + 1) / 2;
            for (long panel = 0; panel < panels; panel++) {
                long at = b * COLUMNS * size + panel * COLUMNS;
                multiply(count, PAIRS, s_rows, PAIRS, 1, key_pairs + b * packed + panel * PAIRS * COLUMNS,
                         to_q + panel * COLUMNS, size, 1);
                multiply(wide, pairs, s_pairs, 1, COLUMNS, q_pairs + panel * rows / 2 * COLUMNS, to_keys + at, size, 1);
                multiply(wide, pairs, p_pairs, 1, COLUMNS, g_pairs + panel * rows / 2 * COLUMNS, to_values + at, size, 1);
            }
        }
        for (long r = 0; r < count; r++) {
            bf16 *into = grad_qkv + (q_rows[r] - qkv);
            for (long d = 0; d < size; d += LANES)
                store(into + d, _mm512_loadu_ps(to_q + r * size + d));
        }
    }
    for (long n = 0; n < it.keys; n++) {
        float *into_key = key_grads + (it.key_nodes[n] * 2 * l->kv_heads + it.head) * size;
        float *into_value = into_key + l->kv_heads * size;
        for (long d = 0; d < size; d += LANES) {
            _mm512_storeu_ps(into_key + d, _mm512_add_ps(_mm512_loadu_ps(into_key + d), _mm512_loadu_ps(to_keys + n * size + d)));
            _mm512_storeu_ps(into_value + d,
                             _mm512_add_ps(_mm512_loadu_ps(into_value + d), _mm512_loadu_ps(to_values + n * size + d)));
        }
    }
}

/* grad_qkv [tokens, heads + 2 kv_heads, size]; `key_grads` [parts, nodes, 2 kv_heads, size] is memory to work in. */
void attention_backward(const layout *l, const bf16 *qkv, const bf16 *out, const float *lse, const bf16 *grad,
                        bf16 *grad_qkv, float *key_grads)
{
    long across = (l->heads + 2 * l->kv_heads) * l->size, of_keys = 2 * l->kv_heads * l->size;
#pragma omp parallel num_threads(l->threads)
    {
#pragma omp for schedule(static, 1)
        for (long part = 0; part < l->parts; part++) {
            long keys = longest(l, part), rows = block_tokens(l->heads / l->kv_heads) * (l->heads / l->kv_heads) + 1;
            size_t bytes = (size_t)(keys * (24 + 14 * l->size) + rows * (24 + 12 * l->size + 16 * COLUMNS) + 4096);
            char *memory = workspace(bytes);
            float *own = key_grads + part * l->nodes * of_keys;
            memset(own, 0, (size_t)(l->nodes * of_keys) * sizeof(float));
            for (long i = l->bounds[part]; i < l->bounds[part + 1]; i++)
                differentiate(l, qkv, out, lse, grad, grad_qkv, own, l->items[i], memory);
        }
#pragma omp for schedule(static)
        for (long t = 0; t < l->tokens; t++) {
            bf16 *row = grad_qkv + t * across;
            if (t >= l->nodes) {
                memset(row, 0, (size_t)across * sizeof(bf16));
                continue;
            }
            for (long d = 0; d < of_keys; d += LANES) {
                __m512 sum = _mm512_loadu_ps(key_grads + t * of_keys + d);
                for (long part = 1; part < l->parts; part++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(key_grads + (part * l->nodes + t) * of_keys + d));
                store(row + l->heads * l->size + d, sum);
            }
        }
    }
}

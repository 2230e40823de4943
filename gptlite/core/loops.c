/* Loops for CPUs where torch has no fast one: keyed masks, GELU, a causal softmax that drops, and
 * products of a few rows.
 *
 * loops.py builds this with the machine's C compiler if there is one, and defines LONGEST, the most
 * keys in a row of attention weights. Each loop has its judge in Python: masks.plain bit for bit,
 * F.gelu, model.attention_weights and F.linear to rounding. Sums are made in 16 running parts,
 * added up in one order, whatever the width of the registers.
 */
#ifndef TYPE /* the first reading; the file includes itself once for each type of values */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define REGISTER 64 /* bytes */
#elif defined(__AVX__)
#define REGISTER 32
#else
#define REGISTER 16 /* SSE2, NEON */
#endif
#if REGISTER == 64 /* rows and columns of a tile of sums that fits the registers */
#define COLUMNS 8
#elif REGISTER == 32 || defined(__aarch64__)
#define COLUMNS 2
#else
#define COLUMNS 1
#endif
#define ROWS 3
#define PAIR (COLUMNS > 1 ? 2 : 1)

#define WIDE 16 /* values, or words of draws, that are worked on together */
#define LANES (REGISTER / 4)
#define PARTS (WIDE / LANES)
#define GAMMA 0x9E3779B9u
#define CHUNK 512 /* values whose draws are made at a time */
#define SMALL 16384 /* values that do not repay a second thread */
#define EACH(start, end) for (int64_t i = (start); i < (end); i++)
#define PART for (int p = 0; p < PARTS; p++)
#define OMP(what) _Pragma(#what)
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

typedef float float32;
typedef uint16_t bfloat16;
typedef float vector __attribute__((vector_size(REGISTER)));
typedef uint32_t words __attribute__((vector_size(REGISTER)));
typedef int32_t signs __attribute__((vector_size(REGISTER)));
typedef uint16_t halves __attribute__((vector_size(REGISTER / 2)));

int has_threads(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

int register_bytes(void) { return REGISTER; }

/* The keys of a tensor (B, H, T, W): row (b, h, t) has mix(keys[b, t] + salts[h]). Word i of it is
 * scramble(low half + i * GAMMA, high half), two draws of 16 bits: of each 32 values, the words'
 * low halves decide the first 16, their high halves the others. */
typedef struct {
    const int64_t *keys, *salts;
    int64_t stride_b, stride_t, B, H, T, W;
    int32_t threshold; /* in the upper 16 bits */
    float scale;
} rows;

#define EACH_ROW(r)                                                                               \
    OMP(omp parallel for collapse(3) schedule(static) if ((r)->B * (r)->H * (r)->T * (r)->W > SMALL)) \
    for (int64_t b = 0; b < (r)->B; b++)                                                          \
        for (int64_t h = 0; h < (r)->H; h++)                                                      \
            for (int64_t t = 0; t < (r)->T; t++)

static inline uint64_t key_of(const rows *r, int64_t b, int64_t h, int64_t t) {
    uint64_t x = (uint64_t)r->keys[b * r->stride_b + t * r->stride_t] + (uint64_t)r->salts[h];
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* What each of n values from the first on is multiplied by, n rounded up to 2 * WIDE. */
static inline void draw(const rows *r, uint64_t key, int64_t first, float *restrict kept, int64_t n) {
    uint32_t low = (uint32_t)key + (uint32_t)(first / 2) * GAMMA, count[LANES];
    words at, high = (words){0} + (uint32_t)(key >> 32);
    EACH(0, LANES) count[i] = low + (uint32_t)i * GAMMA;
    memcpy(&at, count, sizeof at);
    signs threshold = (signs){0} + r->threshold, scale = (signs)((vector){0} + r->scale);
    for (int64_t start = 0; start < n; start += 2 * WIDE)
        UNROLL PART {
            words x = at;
            x = (x ^ (x >> 16)) * 0x21F0AAADu + high;
            x = (x ^ (x >> 15)) * 0xD35A2D97u;
            x = x ^ (x >> 15);
            signs lower = ((signs)(x << 16) >= threshold) & scale;
            signs upper = ((signs)x >= threshold) & scale;
            memcpy(kept + start + p * LANES, &lower, sizeof lower);
            memcpy(kept + start + WIDE + p * LANES, &upper, sizeof upper);
            at += LANES * GAMMA;
        }
}

static inline float from_float32(float value) { return value; }
static inline float to_float32(float value) { return value; }

static inline float from_bfloat16(uint16_t bits) {
    union { uint32_t bits; float value; } u = {(uint32_t)bits << 16};
    return u.value;
}

/* To nearest, ties to even, as torch rounds. Rounding up must not turn a NaN into a number; one
 * that was made of bfloat16 has no low bits that could be rounded up. */
static inline uint16_t to_bfloat16(float value) {
    union { float value; uint32_t bits; } u = {value};
    return (uint16_t)((u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16);
}

static inline uint16_t checked(float value) { return value == value ? to_bfloat16(value) : 0x7FC0; }

static inline vector load_float32(const float *x) {
    vector v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline vector load_bfloat16(const uint16_t *x) {
    halves bits;
    memcpy(&bits, x, sizeof bits);
    return (vector)(__builtin_convertvector(bits, words) << 16);
}

static inline void store_float32(float *x, vector v) { memcpy(x, &v, sizeof v); }

static inline void store_bfloat16(uint16_t *x, vector v) {
    words bits = (words)v;
    halves rounded = __builtin_convertvector((bits + 0x7FFF + (bits >> 16 & 1)) >> 16, halves);
    memcpy(x, &rounded, sizeof rounded);
}

/* Of 16 running sums: those 8 apart first, then 4, 2 and 1. */
static inline float total(const vector *sums) {
    float v[WIDE];
    memcpy(v, sums, sizeof v);
    EACH(0, 8) v[i] += v[i + 8];
    EACH(0, 4) v[i] += v[i + 4];
    return (v[0] + v[2]) + (v[1] + v[3]);
}

static inline float dot(const float *restrict a, const float *restrict b, int64_t n) {
    vector sums[PARTS] = {0};
    int64_t whole = n / WIDE * WIDE;
    float last[2][WIDE] = {{0}};
    EACH(whole, n) last[0][i - whole] = a[i], last[1][i - whole] = b[i];
    for (int64_t k = 0; k < whole; k += WIDE)
        UNROLL PART sums[p] += load_float32(a + k + p * LANES) * load_float32(b + k + p * LANES);
    UNROLL PART sums[p] += load_float32(last[0] + p * LANES) * load_float32(last[1] + p * LANES);
    return total(sums);
}

static inline vector choose(signs which, vector a, vector b) {
    return (vector)(((signs)a & which) | ((signs)b & ~which));
}

/* e to the x to about 2 units in the last place (Cephes' expf), for x from -87 to 87. */
static inline vector exponential(vector x) {
    const vector least = (vector){0} - 87.0f, most = (vector){0} + 87.0f;
    x = choose(x < least, least, choose(x > most, most, x));
    vector shifted = x * 1.44269504f + 12582912.0f; /* adding 1.5 * 2^23 rounds */
    vector n = shifted - 12582912.0f;
    vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    vector power = (vector)(((words)shifted << 23) + (127u << 23));
    return (p * r * r + r + 1.0f) * power;
}

/* Softmax of factor * e over the first `seen`; zeros from there to n, a multiple of WIDE. */
static inline void softmax(float *restrict e, int64_t seen, int64_t n, float factor) {
    EACH(seen, n) e[i] = -INFINITY;
    vector tops = (vector){0} - INFINITY, sums[PARTS] = {0};
    for (int64_t k = 0; k < n; k += LANES) {
        vector v = load_float32(e + k);
        tops = choose(v > tops, v, tops);
    }
    float top[LANES];
    memcpy(top, &tops, sizeof top);
    UNROLL for (int half = LANES / 2; half; half /= 2)
        EACH(0, half) top[i] = top[i] > top[i + half] ? top[i] : top[i + half];
    for (int64_t k = 0; k < n; k += WIDE)
        UNROLL PART {
            vector share = exponential((load_float32(e + k + p * LANES) - top[0]) * factor);
            store_float32(e + k + p * LANES, share);
            sums[p] += share;
        }
    float share = 1.0f / total(sums);
    EACH(0, n) e[i] *= share;
    EACH(seen, n) e[i] = 0;
}

/* One new token in each row: queries (B, H, D) read keys and values (B, G, ., D), of which stride_b
 * and stride_g are the steps from b to b and g to g. Row b sees those up to at[b]. */
void read_one(const float *q, const float *keys, const float *values, const int64_t *at, float *z,
              int64_t stride_b, int64_t stride_g, int64_t B, int64_t H, int64_t G, int64_t D) {
    OMP(omp parallel for collapse(2) schedule(static) if (B * H * (at[0] + 1) * D > SMALL))
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            float weights[LONGEST];
            int64_t start = b * stride_b + h * G / H * stride_g, S = at[b] + 1;
            const float *query = q + (b * H + h) * D;
            float *out = z + (b * H + h) * D, factor = 1.0f / sqrtf((float)D);
            for (int64_t s = 0; s < S; s++) weights[s] = dot(query, keys + start + s * D, D);
            softmax(weights, S, (S + WIDE - 1) / WIDE * WIDE, factor);
            EACH(0, D) out[i] = 0;
            for (int64_t s = 0; s < S; s++) {
                const float *value = values + start + s * D;
                EACH(0, D) out[i] += weights[s] * value[i];
            }
        }
}

#define DROP(FROM, TO, WRITE)                                                                     \
    void drop_##FROM##_to_##TO(const rows *r, const FROM *restrict x, TO *restrict y) {           \
        EACH_ROW(r) {                                                                             \
            int64_t W = r->W, row = ((b * r->H + h) * r->T + t) * W;                              \
            uint64_t key = key_of(r, b, h, t);                                                    \
            for (int64_t at = 0; at < W; at += CHUNK) {                                           \
                float kept[CHUNK];                                                                \
                int64_t n = W - at < CHUNK ? W - at : CHUNK;                                      \
                draw(r, key, at, kept, n);                                                        \
                EACH(0, n) y[row + at + i] = WRITE(from_##FROM(x[row + at + i]) * kept[i]);       \
            }                                                                                     \
        }                                                                                         \
    }

DROP(float32, float32, to_float32)
DROP(float32, bfloat16, checked)
DROP(bfloat16, float32, to_float32)
DROP(bfloat16, bfloat16, to_bfloat16)

#define JOIN(a, b) a##_##b
#define NAMED(name, type) JOIN(name, type)
#define OF(name) NAMED(name, TYPE)

#define TYPE float32
#include "loops.c"
#undef TYPE
#define TYPE bfloat16
#include "loops.c"
#undef TYPE
#include "block.c"
#define TYPE float32
#include "block.c"
#undef TYPE
#define TYPE bfloat16
#include "block.c"

#else

/* x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), and its slope for the way back. */
static inline void OF(gelu_some)(const TYPE *x, TYPE *y, TYPE *slope) {
    vector v = OF(load)(x), square = 0.044715f * v * v, twice = 1.5957691f * v;
    vector share = 1.0f / (1.0f + exponential(-twice * (1.0f + square)));
    OF(store)(y, v * share);
    OF(store)(slope, share + twice * share * (1.0f - share) * (1.0f + 3.0f * square));
}

void OF(gelu)(const TYPE *restrict x, TYPE *restrict y, TYPE *restrict slope, int64_t n) {
    int64_t whole = n / LANES * LANES;
    size_t rest = (size_t)(n - whole) * sizeof(TYPE);
    OMP(omp parallel for schedule(static) if (n > SMALL))
    for (int64_t at = 0; at < whole; at += LANES) OF(gelu_some)(x + at, y + at, slope + at);
    TYPE last[3][LANES] = {{0}};
    memcpy(last[0], x + whole, rest);
    OF(gelu_some)(last[0], last[1], last[2]);
    memcpy(y + whole, last[1], rest);
    memcpy(slope + whole, last[2], rest);
}

static inline void OF(softmax_row)(const rows *r, uint64_t key, int64_t seen, float factor,
                                   TYPE *restrict row, TYPE *restrict dropped) {
    float weights[LONGEST], kept[LONGEST];
    int64_t n = (seen + WIDE - 1) / WIDE * WIDE, inside = n < r->W ? n : r->W;
    EACH(0, seen) weights[i] = OF(from)(row[i]);
    softmax(weights, seen, n, factor);
    EACH(0, inside) row[i] = OF(to)(weights[i]);
    EACH(inside, r->W) row[i] = 0;
    if (!dropped) return;
    draw(r, key, 0, kept, n);
    EACH(0, inside) dropped[i] = OF(to)(OF(from)(row[i]) * kept[i]);
    EACH(inside, r->W) dropped[i] = 0;
}

/* Scores (B, H, T, W) become weights in place, and `dropped` what dropout leaves of them, unless
 * it is NULL. Row t sees the first W - T + t + 1 of W keys. */
void OF(softmax)(const rows *r, float factor, TYPE *scores, TYPE *dropped) {
    EACH_ROW(r) {
        int64_t at = ((b * r->H + h) * r->T + t) * r->W;
        OF(softmax_row)(r, dropped ? key_of(r, b, h, t) : 0, r->W - r->T + t + 1, factor,
                        scores + at, dropped ? dropped + at : 0);
    }
}

static inline void OF(softmax_row_back)(const rows *r, uint64_t key, int64_t seen, float factor,
                                        const TYPE *restrict weights, TYPE *restrict row,
                                        TYPE *restrict dropped) {
    float w[LONGEST], g[LONGEST], kept[LONGEST];
    EACH(0, seen) w[i] = OF(from)(weights[i]);
    EACH(0, seen) g[i] = OF(from)(row[i]);
    if (dropped) {
        draw(r, key, 0, kept, seen);
        EACH(0, seen) dropped[i] = OF(to)(w[i] * kept[i]);
        EACH(seen, r->W) dropped[i] = 0;
        EACH(0, seen) g[i] *= kept[i];
    }
    float mean = dot(g, w, seen);
    EACH(0, seen) row[i] = OF(to)(w[i] * (g[i] - mean) * factor);
    EACH(seen, r->W) row[i] = 0;
}

/* Gradients of dropped weights become those of scores in place; `dropped` is made once more. */
void OF(softmax_back)(const rows *r, float factor, const TYPE *weights, TYPE *gradient,
                      TYPE *dropped) {
    EACH_ROW(r) {
        int64_t at = ((b * r->H + h) * r->T + t) * r->W;
        OF(softmax_row_back)(r, dropped ? key_of(r, b, h, t) : 0, r->W - r->T + t + 1, factor,
                             weights + at, gradient + at, dropped ? dropped + at : 0);
    }
}

/* Add R rows of WIDE weights, `step` apart, times C rows of x to running sums. */
static inline __attribute__((always_inline)) void OF(add)(int R, int C, vector (*restrict sums)[COLUMNS][PARTS],
                                                          const TYPE *restrict weight,
                                                          const float *restrict x, int64_t step) {
    UNROLL PART {
        vector w[ROWS];
        UNROLL for (int r = 0; r < R; r++) w[r] = OF(load)(weight + r * step + p * LANES);
        UNROLL for (int c = 0; c < C; c++) {
            vector v = load_float32(x + c * step + p * LANES);
            UNROLL for (int r = 0; r < R; r++) sums[r][c][p] += w[r] * v;
        }
    }
}

/* R rows of the weight (R, K) times C rows of x (C, K): sums that fit the vector registers. */
static inline __attribute__((always_inline)) void OF(tile)(int R, int C, const TYPE *restrict weight,
                                                           const float *restrict x,
                                                           const float *restrict bias,
                                                           float *restrict y, int64_t K, int64_t N) {
    vector sums[ROWS][COLUMNS][PARTS] = {0};
    int64_t whole = K / WIDE * WIDE;
    for (int64_t k = 0; k < whole; k += WIDE) {
        if (R > 1) /* the processor knows no such order of rows */
            UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(weight + (r + R) * K + k);
        OF(add)(R, C, sums, weight + k, x + k, K);
    }
    if (whole < K) {
        TYPE w[ROWS][WIDE] = {{0}};
        float v[COLUMNS][WIDE] = {{0}};
        for (int r = 0; r < R; r++) EACH(whole, K) w[r][i - whole] = weight[r * K + i];
        for (int c = 0; c < C; c++) EACH(whole, K) v[c][i - whole] = x[c * K + i];
        OF(add)(R, C, sums, w[0], v[0], WIDE);
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) y[c * N + r] = total(sums[r][c]) + (bias ? bias[r] : 0.0f);
}

/* y (B, N) = x (B, K) weight (N, K) + bias (N), or NULL. One row of x goes at the pace of memory,
 * in float32 at that of one stream; several share what is read. A row of y does not depend on the others. */
void OF(linear)(const TYPE *weight, const float *x, const float *bias, float *y, int64_t B,
                int64_t K, int64_t N) {
    OMP(omp parallel for schedule(static) if (N * K > SMALL))
    for (int64_t block = 0; block < (N + ROWS - 1) / ROWS; block++) {
        int64_t n = ROWS * block, end = n + ROWS < N ? n + ROWS : N, b = 0;
#define TILE(R, C) OF(tile)(R, C, weight + n * K, x + b * K, bias ? bias + n : 0, y + b * N + n, K, N)
        if (end == n + ROWS && B > 1)
            for (; b + COLUMNS <= B; b += COLUMNS) TILE(ROWS, COLUMNS);
        if (end == n + ROWS && B == 1 && sizeof(TYPE) < 4) { /* sums that need not wait for each other */
            TILE(ROWS, 1);
            continue;
        }
        for (int64_t first = b; n < end; n++) {
            for (b = first; b + PAIR <= B; b += PAIR) TILE(1, PAIR);
            for (; b < B; b++) TILE(1, 1);
        }
#undef TILE
    }
}
#endif

/* Loops for CPUs where torch has no fast one: keyed masks, GELU, and a causal softmax that drops.
 *
 * loops.py builds this with the machine's C compiler if there is one, and defines LONGEST, the most
 * keys in a row of attention weights. Each loop has its judge in
 * Python: masks.plain bit for bit, F.gelu and model.attention_weights to rounding.
 */
#ifndef TYPE /* the first reading; the file includes itself once for each type of values */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define GAMMA 0x9E3779B97F4A7C15u
#define WIDE 16 /* values of a vector */
#define LANES 64 /* values worked on together: a few vectors, 16 words of draws */
#define SMALL 16384 /* values that do not repay a second thread */
#define EACH(start, end) for (int64_t i = (start); i < (end); i++)
#define OMP(what) _Pragma(#what)
#define UNROLL _Pragma("GCC unroll 8")

typedef float float32;
typedef uint16_t bfloat16;

/* The keys of a tensor (B, H, T, W): row (b, h, t) has keys[b, t] + salts[h]; word i of it is
 * mix(key + i * GAMMA), four draws of 16 bits, the lowest first. */
typedef struct {
    const int64_t *keys, *salts;
    int64_t stride_b, stride_t, B, H, T, W;
    int32_t threshold;
    float scale;
} rows;

#define EACH_ROW(r)                                                                               \
    OMP(omp parallel for collapse(3) schedule(static) if ((r)->B * (r)->H * (r)->T * (r)->W > SMALL)) \
    for (int64_t b = 0; b < (r)->B; b++)                                                          \
        for (int64_t h = 0; h < (r)->H; h++)                                                      \
            for (int64_t t = 0; t < (r)->T; t++)

static inline uint64_t key_of(const rows *r, int64_t b, int64_t h, int64_t t) {
    return (uint64_t)r->keys[b * r->stride_b + t * r->stride_t] + (uint64_t)r->salts[h];
}

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* What each of n values from the key's word on is multiplied by; n is rounded up to LANES. */
static inline void draw(const rows *r, uint64_t key, float *restrict kept, int64_t n) {
    union { uint64_t words[LANES / 4]; int16_t draws[LANES]; } random;
    int32_t threshold = r->threshold; /* read once: `kept` might lie over *r, for all C knows */
    float scale = r->scale;
    for (int64_t start = 0; start < n; start += LANES, key += LANES / 4 * GAMMA) {
        EACH(0, LANES / 4) random.words[i] = mix(key + (uint64_t)i * GAMMA);
        EACH(0, LANES) kept[start + i] = random.draws[i] >= threshold ? scale : 0.0f;
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

/* e to the x to about 2 units in the last place (Cephes' expf), for x from -87 to 87. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* adding 1.5 * 2^23 rounds */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) * (1 << 23)};
    return (p * r * r + r + 1.0f) * power.value;
}

/* Softmax of factor * e over the first `seen`; zeros from there to n, a multiple of WIDE. */
static inline void softmax(float *restrict e, int64_t seen, int64_t n, float factor) {
    float top = -INFINITY, sum = 0;
    EACH(seen, n) e[i] = -INFINITY;
    OMP(omp simd reduction(max : top))
    EACH(0, n) top = e[i] > top ? e[i] : top;
    OMP(omp simd reduction(+ : sum))
    EACH(0, n) {
        e[i] = exponential((e[i] - top) * factor);
        sum += e[i];
    }
    float share = 1.0f / sum;
    EACH(0, n) e[i] *= share;
    EACH(seen, n) e[i] = 0;
}

/* Vectors of one shape on every machine, so that sums are made in the same order. */
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef uint16_t wide_bits __attribute__((vector_size(2 * WIDE)));
typedef uint32_t wide_words __attribute__((vector_size(4 * WIDE)));

static inline wide load_float32(const float *x) {
    wide v;
    memcpy(&v, x, sizeof v);
    return v;
}

static inline wide load_bfloat16(const uint16_t *x) {
    wide_bits bits;
    memcpy(&bits, x, sizeof bits);
    return (wide)(__builtin_convertvector(bits, wide_words) << 16);
}

static inline float total(wide v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    union { wide v; eight half[2]; } a = {v};
    union { eight v; four half[2]; } b = {a.half[0] + a.half[1]};
    four c = b.half[0] + b.half[1];
    return (c[0] + c[2]) + (c[1] + c[3]);
}

/* One new token: queries (B, H, D) read keys and values (B, G, S, D), of which
 * stride_b and stride_g are the steps from b to b and g to g; `visible` (B, S), or NULL: all. */
void read_one(const float *q, const float *keys, const float *values, const uint8_t *visible,
              float *z, int64_t stride_b, int64_t stride_g, int64_t B, int64_t H, int64_t G,
              int64_t S, int64_t D) {
    OMP(omp parallel for collapse(2) schedule(static) if (B * H * S * D > SMALL))
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++) {
            float weights[LONGEST];
            int64_t start = b * stride_b + h * G / H * stride_g;
            const float *query = q + (b * H + h) * D;
            float *out = z + (b * H + h) * D, factor = 1.0f / sqrtf((float)D);
            for (int64_t s = 0; s < S; s++) {
                const float *key = keys + start + s * D;
                float sum = 0;
                OMP(omp simd reduction(+ : sum))
                EACH(0, D) sum += query[i] * key[i];
                weights[s] = !visible || visible[b * S + s] ? sum : -INFINITY;
            }
            softmax(weights, S, (S + WIDE - 1) / WIDE * WIDE, factor);
            EACH(0, D) out[i] = 0;
            for (int64_t s = 0; s < S; s++) {
                if (weights[s] < 1e-37f) continue; /* hidden */
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
            for (int64_t at = 0; at < W; at += 4 * LANES, key += LANES * GAMMA) {                 \
                float kept[4 * LANES];                                                            \
                int64_t n = W - at < 4 * LANES ? W - at : 4 * LANES;                              \
                draw(r, key, kept, n);                                                            \
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

#else

/* x * sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), and its slope for the way back. */
void OF(gelu)(const TYPE *restrict x, TYPE *restrict y, TYPE *restrict slope, int64_t n) {
    OMP(omp parallel for simd schedule(static) if (parallel : n > SMALL))
    EACH(0, n) {
        float v = OF(from)(x[i]), square = 0.044715f * v * v, twice = 1.5957691f * v;
        float share = 1.0f / (1.0f + exponential(-twice * (1.0f + square)));
        y[i] = OF(to)(v * share);
        slope[i] = OF(to)(share + twice * share * (1.0f - share) * (1.0f + 3.0f * square));
    }
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
    draw(r, key, kept, n);
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
    float w[LONGEST], g[LONGEST], kept[LONGEST], dot = 0;
    EACH(0, seen) w[i] = OF(from)(weights[i]);
    EACH(0, seen) g[i] = OF(from)(row[i]);
    if (dropped) {
        draw(r, key, kept, seen);
        EACH(0, seen) dropped[i] = OF(to)(w[i] * kept[i]);
        EACH(seen, r->W) dropped[i] = 0;
        EACH(0, seen) g[i] *= kept[i];
    }
    OMP(omp simd reduction(+ : dot))
    EACH(0, seen) dot += g[i] * w[i];
    EACH(0, seen) row[i] = OF(to)(w[i] * (g[i] - dot) * factor);
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

/* R rows of the weight (R, K) times C rows of x (C, K): sums that fit the vector registers. */
static inline __attribute__((always_inline)) void OF(tile)(int R, int C, const TYPE *restrict weight,
                                                           const float *restrict x,
                                                           const float *restrict bias,
                                                           float *restrict y, int64_t K, int64_t N) {
    wide sums[3][8] = {0};
    int64_t whole = K / WIDE * WIDE;
    for (int64_t k = 0; k < whole; k += WIDE) {
        wide w[3];
        UNROLL for (int r = 0; r < R; r++) {
            w[r] = OF(load)(weight + r * K + k);
            if (R > 1) __builtin_prefetch(weight + (r + R) * K + k); /* it knows no such order */
        }
        UNROLL for (int c = 0; c < C; c++) {
            wide v = load_float32(x + c * K + k);
            UNROLL for (int r = 0; r < R; r++) sums[r][c] += w[r] * v;
        }
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) {
            float sum = total(sums[r][c]) + (bias ? bias[r] : 0.0f);
            EACH(whole, K) sum += OF(from)(weight[r * K + i]) * x[c * K + i];
            y[c * N + r] = sum;
        }
}

/* y (B, N) = x (B, K) weight (N, K) + bias (N), or NULL. One row of x goes at the pace of memory,
 * which is read in order; 8 share what is read. A row of y does not depend on the others. */
void OF(linear)(const TYPE *weight, const float *x, const float *bias, float *y, int64_t B,
                int64_t K, int64_t N) {
    OMP(omp parallel for schedule(static) if (N * K > SMALL))
    for (int64_t block = 0; block < (N + 2) / 3; block++) {
        int64_t n = 3 * block, end = n + 3 < N ? n + 3 : N, b = 0;
#define TILE(R, C) OF(tile)(R, C, weight + n * K, x + b * K, bias ? bias + n : 0, y + b * N + n, K, N)
        if (end == n + 3)
            for (; b + 8 <= B; b += 8) TILE(3, 8);
        for (int64_t first = b; n < end; n++) {
            for (b = first; b + 2 <= B; b += 2) TILE(1, 2);
            if (b < B) TILE(1, 1);
        }
#undef TILE
    }
}
#endif

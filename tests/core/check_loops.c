/* Runs every loop of loops.c on the same numbers, whatever machine it is built for, and writes what
 * comes out: name (32 bytes), bytes of a value (int64), number of values (int64), values. */
#include <stdio.h>
#include <stdlib.h>
#include LOOPS

static uint64_t state;

static uint32_t next(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static void *numbers(int64_t n, int half, float most) { /* multiples of most / 128, or bfloat16's */
    float *x = malloc((size_t)n * 4);
    uint16_t *h = malloc((size_t)n * 2);
    EACH(0, n) {
        x[i] = ((int32_t)(next() % 256) - 128) * most / 128;
        h[i] = to_bfloat16(x[i]);
    }
    return half ? (void *)h : (void *)x;
}

static void put(const char *name, const void *values, int64_t bytes, int64_t n) {
    char padded[32] = {0};
    strncpy(padded, name, 31);
    fwrite(padded, 1, 32, stdout);
    fwrite(&bytes, 8, 1, stdout);
    fwrite(&n, 8, 1, stdout);
    fwrite(values, (size_t)bytes, (size_t)n, stdout);
}

#define B 3
#define H 2
#define T 37
#define ALL (B * H * T)

static rows layout(int64_t W) {
    static int64_t keys[B * T], salts[H];
    EACH(0, B * T) keys[i] = (int64_t)((uint64_t)next() << 33 ^ next());
    EACH(0, H) salts[i] = (int64_t)((uint64_t)next() << 33 ^ next());
    return (rows){keys, salts, T, 1, B, H, T, W, (6554 - 32768) * 65536, 1.1111f};
}

#define TRY(name, half, TYPE)                                                                    \
    static void try_##name(int64_t W) {                                                          \
        rows r = layout(W);                                                                      \
        int64_t n = ALL * W;                                                                     \
        TYPE *x = numbers(n, half, 4), *y = malloc((size_t)n * 4), *z = malloc((size_t)n * 4);   \
        drop_##name##_to_float32(&r, x, (float *)y);                                             \
        put("drop_" #name "_to_float32", y, 4, n);                                               \
        drop_##name##_to_bfloat16(&r, x, (uint16_t *)y);                                         \
        put("drop_" #name "_to_bfloat16", y, 2, n);                                              \
        gelu_##name(x, y, z, n);                                                                 \
        put("gelu_" #name, y, sizeof(TYPE), n);                                                  \
        put("gelu_" #name "_slope", z, sizeof(TYPE), n);                                         \
        if (W >= T) {                                                                            \
            TYPE *weights = numbers(n, half, 4), *back = numbers(n, half, 1);                    \
            softmax_##name(&r, 0.3f, weights, y);                                                \
            put("softmax_" #name, weights, sizeof(TYPE), n);                                     \
            put("softmax_" #name "_dropped", y, sizeof(TYPE), n);                                \
            softmax_back_##name(&r, 0.3f, weights, back, y);                                     \
            put("softmax_back_" #name, back, sizeof(TYPE), n);                                   \
        }                                                                                        \
        for (int64_t b = 1; b < 10; b += 3) {                                                    \
            TYPE *weight = numbers(ALL * W, half, 1);                                            \
            float *in = numbers(b * W, 0, 1), *out = malloc((size_t)b * ALL * 4);                \
            float *bias = b == 1 ? 0 : numbers(ALL, 0, 1);                                       \
            linear_##name(weight, in, bias, out, b, W, ALL);                                     \
            put("linear_" #name, out, 4, b *ALL);                                                \
        }                                                                                        \
    }

TRY(float32, 0, float)
TRY(bfloat16, 1, uint16_t)

#define TRY_BLOCK(name, half)                                                                    \
    static void try_block_##name(int64_t C, int64_t norm, int64_t mlp) {                         \
        int64_t heads = 4, groups = 2, width = C / 4, L = 9;                                     \
        int64_t F = 3 * C + 1, most = (int64_t)B * L * C, at[B];                                 \
        EACH(0, B) at[i] = i % L;                                                                \
        block own = {numbers(2 * C * C, half, 1), numbers(C * C, half, 1),                       \
                     numbers(2 * F * C, half, 1), numbers(F * C, half, 1),                       \
                     numbers(2 * C, 0, 1), 0, numbers(2 * F, 0, 1), 0,                           \
                     numbers(C, 0, 1), numbers(C, 0, 1), numbers(C, 0, 1), 0,                    \
                     numbers(width, 0, 1), numbers(width, 0, 1),                                 \
                     numbers(most, 0, 1), numbers(most, 0, 1)};                                  \
        scene s = {B, C, heads, groups, width, F, L, norm, mlp, 1e-5f, at, 0, 0, 0};             \
        s.cosine = numbers(B * C, 0, 1);                                                         \
        s.sine = numbers(B * C, 0, 1);                                                           \
        s.scratch = numbers(B * (9 * C + 3 * F), 0, 0);                                          \
        float *x = numbers(B * C, 0, 2);                                                         \
        block_##name(&own, &s, x);                                                               \
        put("block_" #name, x, 4, B *C);                                                         \
    }

TRY_BLOCK(float32, 0)
TRY_BLOCK(bfloat16, 1)

int main(void) {
    int64_t widths[] = {1, 5, 37, 64, 131, 600}, D = 33;
    for (int at = 0; at < 6; at++) {
        state = (uint64_t)at;
        try_float32(widths[at]);
        try_bfloat16(widths[at]);
    }
    float *q = numbers(B * H * D, 0, 2), *keys = numbers(B * T * D, 0, 2), *z = malloc(B * H * (size_t)D * 4);
    int64_t at[B];
    EACH(0, B) at[i] = T - 1 - i % T;
    read_one(q, keys, keys, at, z, T * D, T * D, B, H, 1, D);
    put("read_one", z, 4, B * H * D);
    for (int64_t kind = 0; kind < 3; kind++) {
        try_block_float32(40, kind % 2, kind);
        try_block_bfloat16(64, 1 - kind % 2, kind);
    }
    return 0;
}

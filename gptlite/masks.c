/* The inner loop of masks.py for CPUs: y = x * (kept ? scale : 0) over x (B, H, T, W).
 *
 * Row (b, h, t) has the 64-bit key keys[b, t] + salts[h]; word i of it is mix(key + i * GAMMA), four
 * draws of 16 bits, the lowest first. masks.py builds this with the machine's C compiler if there is
 * one, and holds the formula that says what must come out, bit for bit.
 */
#include <stdint.h>

#define GAMMA 0x9E3779B97F4A7C15u
#define WORDS 64 /* of a block: it stays in the first cache, and is long enough for vectors */

static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static inline float float32(float value) { return value; }

static inline float from_bfloat16(uint16_t bits) {
    union { uint32_t bits; float value; } u = {(uint32_t)bits << 16};
    return u.value;
}

static inline uint16_t rounded(float value) { /* to nearest, ties to even, as torch rounds */
    union { float value; uint32_t bits; } u = {value};
    return (uint16_t)((u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16);
}

static inline uint16_t to_bfloat16(float value) { /* rounding up must not turn NaN into a number */
    return value == value ? rounded(value) : 0x7FC0;
}

#define BLOCK(NAME, FROM, READ, TO, WRITE)                                                        \
    static inline void NAME##_block(const FROM *restrict x, TO *restrict y, uint64_t key,         \
                                    int32_t threshold, float scale, int64_t n) {                  \
        union { uint64_t words[WORDS]; int16_t draws[4 * WORDS]; } random;                        \
        for (int64_t i = 0; i < (n + 3) / 4; i++)                                                 \
            random.words[i] = mix(key + (uint64_t)i * GAMMA);                                     \
        for (int64_t i = 0; i < n; i++)                                                           \
            y[i] = WRITE(READ(x[i]) * (random.draws[i] >= threshold ? scale : 0.0f));             \
    }

#define DROP(NAME, FROM, READ, TO, WRITE)                                                         \
    BLOCK(NAME, FROM, READ, TO, WRITE)                                                            \
    void NAME(const FROM *restrict x, TO *restrict y, const int64_t *restrict keys,               \
              int64_t stride_b, int64_t stride_t, const int64_t *restrict salts, int64_t B,       \
              int64_t H, int64_t T, int64_t W, int32_t threshold, float scale) {                  \
        _Pragma("omp parallel for collapse(3) schedule(static) if (B * H * T * W > 16384)")       \
        for (int64_t b = 0; b < B; b++)                                                           \
            for (int64_t h = 0; h < H; h++)                                                       \
                for (int64_t t = 0; t < T; t++) {                                                 \
                    uint64_t key = (uint64_t)keys[b * stride_b + t * stride_t] +                  \
                                   (uint64_t)salts[h];                                            \
                    int64_t row = ((b * H + h) * T + t) * W;                                      \
                    for (int64_t start = 0; start < W; start += 4 * WORDS) {                      \
                        NAME##_block(x + row + start, y + row + start, key, threshold, scale,     \
                                     W - start < 4 * WORDS ? W - start : 4 * WORDS);              \
                        key += WORDS * GAMMA;                                                     \
                    }                                                                             \
                }                                                                                 \
    }

DROP(float32_to_float32, float, float32, float, float32)
DROP(float32_to_bfloat16, float, float32, uint16_t, to_bfloat16)
DROP(bfloat16_to_float32, uint16_t, from_bfloat16, float, float32)
/* A NaN that was bfloat16 before has no low bits that could be rounded up. */
DROP(bfloat16_to_bfloat16, uint16_t, from_bfloat16, uint16_t, rounded)

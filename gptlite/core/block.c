/* One new token of each row through a whole block, included by loops.c: in a small model calling torch
 * takes longer than computing. A row does not depend on the others. Its judge is model.Block. */
#ifndef TYPE

enum { LAYERNORM, RMSNORM };
enum { GELU, RELU2, SWIGLU };

/* Weights and cache of a block. Biases, and the norms of queries and keys, may be NULL. */
typedef struct {
    const void *qkv, *output, *up, *down;
    const float *qkv_bias, *output_bias, *up_bias, *down_bias;
    const float *norm_1, *norm_1_bias, *norm_2, *norm_2_bias, *q_norm, *k_norm;
    float *keys, *values; /* (B, G, L, D) */
} block;

/* Sizes as in model.py: F features between the matrices of the MLP, L tokens that a row of the cache
 * can hold, of which the new one of row b is number at[b]; cos and sin (B, D/2) or NULL; `scratch`
 * holds B * (2 C + (H + 2 G) D + 2 H D + 3 F) values. */
typedef struct {
    int64_t B, C, H, G, D, F, L, norm, mlp;
    float epsilon;
    const int64_t *at;
    const float *cosine, *sine;
    float *scratch;
} scene;

/* y = x normalised over n; with RMSNORM the mean stays. */
static void normalise(int64_t kind, const float *x, float *y, const float *weight, const float *bias,
                      int64_t n, float epsilon) {
    float ones[WIDE], mean = 0;
    EACH(0, WIDE) ones[i] = 1;
    if (kind == LAYERNORM) {
        for (int64_t k = 0; k < n; k += WIDE) mean += dot(x + k, ones, n - k < WIDE ? n - k : WIDE);
        mean /= (float)n;
    }
    EACH(0, n) y[i] = x[i] - mean;
    float share = 1.0f / sqrtf(dot(y, y, n) / (float)n + epsilon);
    EACH(0, n) y[i] = y[i] * share * weight[i] + (bias ? bias[i] : 0.0f);
}

/* Turn the pairs (i, i + D/2) of one head. */
static void rotate(float *x, const float *cosine, const float *sine, int64_t D) {
    EACH(0, D / 2) {
        float a = x[i], b = x[i + D / 2];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + D / 2] = b * cosine[i] + a * sine[i];
    }
}

static vector activated(int64_t kind, vector v, vector value) {
    if (kind == SWIGLU) return v / (1.0f + exponential(-v)) * value;
    if (kind == RELU2) return choose(v > 0.0f, v * v, (vector){0});
    float y[LANES], slope[LANES];
    gelu_some_float32((const float *)&v, y, slope);
    return load_float32(y);
}

/* h (B, F), or with gates (B, 2F), to (B, F). */
static void activate(const scene *s, const float *h, float *y) {
    int64_t gates = s->mlp == SWIGLU ? 2 : 1;
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t k = 0; k < s->F; k += LANES) {
            size_t bytes = 4 * (size_t)(s->F - k < LANES ? s->F - k : LANES);
            const float *from = h + b * gates * s->F + k;
            vector v = {0}, value = {0};
            memcpy(&v, from, bytes);
            if (gates == 2) memcpy(&value, from + s->F, bytes);
            v = activated(s->mlp, v, value);
            memcpy(y + b * s->F + k, &v, bytes);
        }
}

/* Normalise and turn what came out of qkv (B, (H + 2G) D); queries go to q, the rest to the cache. */
static void place_heads(const block *own, const scene *s, float *qkv, float *q) {
    int64_t H = s->H, G = s->G, D = s->D;
    for (int64_t b = 0; b < s->B; b++)
        for (int64_t h = 0; h < H + 2 * G; h++) {
            float *x = qkv + (b * (H + 2 * G) + h) * D;
            const float *weight = h < H ? own->q_norm : own->k_norm;
            if (h < H + G && weight) normalise(RMSNORM, x, x, weight, 0, D, s->epsilon);
            if (h < H + G && s->cosine) rotate(x, s->cosine + b * D / 2, s->sine + b * D / 2, D);
            float *target = q + (b * H + h) * D;
            if (h >= H) target = (h < H + G ? own->keys : own->values) + ((b * G + (h - H) % G) * s->L + s->at[b]) * D;
            memcpy(target, x, (size_t)D * 4);
        }
}

#else

/* x (B, C) is what the block reads, and then what it puts out. */
void OF(block)(const block *own, const scene *s, float *x) {
    int64_t B = s->B, C = s->C, H = s->H, G = s->G, D = s->D, F = s->F, gates = s->mlp == SWIGLU ? 2 : 1;
    float *h = s->scratch, *out = h + B * C, *qkv = out + B * C, *q = qkv + B * (H + 2 * G) * D;
    float *z = q + B * H * D, *up = z + B * H * D, *active = up + B * 2 * F;
    for (int64_t b = 0; b < B; b++)
        normalise(s->norm, x + b * C, h + b * C, own->norm_1, own->norm_1_bias, C, s->epsilon);
    OF(linear)(own->qkv, h, own->qkv_bias, qkv, B, C, (H + 2 * G) * D);
    place_heads(own, s, qkv, q);
    read_one(q, own->keys, own->values, s->at, z, G * s->L * D, s->L * D, B, H, G, D);
    OF(linear)(own->output, z, own->output_bias, out, B, H * D, C);
    EACH(0, B * C) x[i] += out[i];
    for (int64_t b = 0; b < B; b++)
        normalise(s->norm, x + b * C, h + b * C, own->norm_2, own->norm_2_bias, C, s->epsilon);
    OF(linear)(own->up, h, own->up_bias, up, B, C, gates * F);
    activate(s, up, active);
    OF(linear)(own->down, active, own->down_bias, out, B, F, C);
    EACH(0, B * C) x[i] += out[i];
}
#endif

/* microgpt in C: one document, one position, one channel at a time.

       cc -O2 -o microgpt microgpt.c -lm
       ./microgpt NAME.in.safetensors NAME.out.safetensors

   Reads a model and batches, trains on them, and writes all that it computed on the way: taps,
   their derivatives, gradients, Adam's moments, parameters. The files are those of
   crosscheck/GUIDE.md.

   Same as scalar/model.py: the functions, their order, their equations, the names in between.
   Different: every f_forward has its f_backward directly beneath, the forward pass read upside
   down. dy stands for the derivative of the loss with respect to y; derivatives are added to what
   is there.

   B = documents, T = positions, C = n_embd, H = n_head, D = C / H channels a head, F = 4 C,
   V = vocabulary, L = layers. At the end of a line: [its shape]. A row r = b T + t is one
   position. */

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef REAL
#define REAL double /* -DREAL=float computes, and writes, in single precision */
#endif
typedef REAL real;
#define GELU 0.79788456080286535588 /* sqrt(2 / pi) */

/* ---- files of tensors: safetensors, on a machine that is little-endian ---- */

typedef struct {
    char name[64];
    int dims;
    long shape[4];
    long size;
    real *data;    /* token ids as well: they are small whole numbers */
    double number; /* the first of them, not rounded to real */
} Tensor;

typedef struct {
    Tensor *list;
    int count;
} Tensors;

static void fail(const char *format, ...) {
    va_list words;
    va_start(words, format);
    vfprintf(stderr, format, words);
    va_end(words);
    fputc('\n', stderr);
    exit(1);
}

/* A number of arguments and their array, for functions that take a shape. */
#define SHAPE(...) (int)(sizeof((long[]){__VA_ARGS__}) / sizeof(long)), (long[]){__VA_ARGS__}

/* A new tensor of zeros, named by its prefix and name. */
static real *add_tensor(Tensors *all, const char *prefix, const char *name, int dims, long *shape) {
    all->list = realloc(all->list, (all->count + 1) * sizeof(Tensor));
    if (!all->list) fail("no memory left");
    Tensor *x = &all->list[all->count++];
    snprintf(x->name, sizeof x->name, "%s%s", prefix, name);
    x->dims = dims;
    x->size = 1;
    for (int i = 0; i < dims; i++) x->size *= x->shape[i] = shape[i];
    x->data = calloc(x->size, sizeof(real));
    if (!x->data) fail("no memory left");
    return x->data;
}

/* The tensor of a name that is the prefix, a number in the place of %d, and the rest. */
static Tensor *find_tensor(Tensors *all, const char *format, ...) {
    char name[64];
    va_list words;
    va_start(words, format);
    vsnprintf(name, sizeof name, format, words);
    va_end(words);
    for (int i = 0; i < all->count; i++)
        if (!strcmp(all->list[i].name, name)) return &all->list[i];
    fail("the file lacks %s", name);
    return NULL;
}

static double number(Tensors *all, const char *format, int step) {
    return find_tensor(all, format, step)->number;
}

/* All tensors of a file whose header has the one form that crosscheck/TRACES.md promises:
   {"name":{"dtype":"F64","shape":[2,3],"data_offsets":[0,48]},...}, without metadata. */
static Tensors read_tensors(const char *path) {
    Tensors all = {0};
    uint64_t length;
    FILE *file = fopen(path, "rb");
    if (!file || fread(&length, 8, 1, file) != 1) fail("%s cannot be read", path);
    char *header = calloc(length + 1, 1);
    if (!header || fread(header, 1, length, file) != length) fail("%s is cut short", path);
    for (char *at = strchr(header, '"'); at; at = strchr(at, '"')) {
        char name[64], dtype[4];
        long shape[4], begin;
        int dims = 0, used = 0;
        if (sscanf(at, "\"%63[^\"]\":{\"dtype\":\"%3[^\"]\",\"shape\":[%n", name, dtype, &used) != 2
            || !used)
            fail("%s: no header as it should be: %.40s", path, at);
        at += used;
        while (*at != ']') {
            shape[dims++] = strtol(at, &at, 10);
            if (*at == ',' && dims < 4) at++;
            else if (*at != ']') fail("%s: %s has no shape as it should be", path, name);
        }
        if (sscanf(at, "],\"data_offsets\":[%ld,%*d]}%n", &begin, &used) != 1)
            fail("%s: %s has no offsets", path, name);
        at += used;
        real *data = add_tensor(&all, "", name, dims, shape);
        fseek(file, 8 + (long)length + begin, SEEK_SET);
        for (long i = 0; i < all.list[all.count - 1].size; i++) {
            union { double f64; int64_t i64; } x;
            if (fread(&x, 8, 1, file) != 1) fail("%s is cut short", path);
            double number = strcmp(dtype, "I64") ? x.f64 : x.i64;
            if (i == 0) all.list[all.count - 1].number = number;
            data[i] = number;
        }
    }
    free(header);
    fclose(file);
    return all;
}

/* Writes all tensors, one behind the other. */
static void write_tensors(const char *path, Tensors *all) {
    char *header = malloc(200 * all->count + 16), *at = header;
    long offset = 0;
    for (int i = 0; i < all->count; i++) {
        Tensor *x = &all->list[i];
        at += sprintf(at, "%c\"%s\":{\"dtype\":\"F%d\",\"shape\":[", i ? ',' : '{', x->name,
                      (int)(8 * sizeof(real)));
        for (int d = 0; d < x->dims; d++) at += sprintf(at, d ? ",%ld" : "%ld", x->shape[d]);
        long end = offset + x->size * (long)sizeof(real);
        at += sprintf(at, "],\"data_offsets\":[%ld,%ld]}", offset, end);
        offset = end;
    }
    *at++ = '}';
    while ((at - header) % 8) *at++ = ' ';
    uint64_t length = at - header;
    FILE *file = fopen(path, "wb");
    if (!file) fail("%s cannot be written", path);
    fwrite(&length, 8, 1, file);
    fwrite(header, 1, length, file);
    for (int i = 0; i < all->count; i++)
        fwrite(all->list[i].data, sizeof(real), all->list[i].size, file);
    if (ferror(file) | fclose(file)) fail("%s cannot be written", path);
    free(header);
}

/* ---- what the model is made of ---- */

typedef struct {
    int n_layer, n_embd, n_head, head_dim, block_size, vocab_size;
    int norm_embedding, tie_lm_head, activation;
    double norm_eps, beta1, beta2, adam_eps, weight_decay, grad_clip;
} Config;

typedef struct {
    real *attn_wq, *attn_wk, *attn_wv, *attn_wo; /* [C][C] */
    real *mlp_fc1, *mlp_fc2;                     /* [F][C], [C][F] */
} Layer;

typedef struct {
    real *wte, *wpe, *lm_head; /* [V][C], [block_size][C], [V][C] */
    Layer *layers;             /* [L] */
    int first, count;          /* where they stand among all tensors */
} Params;

typedef struct {
    real *attn_norm, *q, *k, *v, *attn_out, *attn_res; /* [B][T][C] */
    real *attn_logits, *attn_weights;                  /* [B][H][T][T] */
    real *mlp_norm, *mlp_pre, *mlp_act, *mlp_res;      /* [B][T][C], but [F] for pre and act */
} LayerTap;

typedef struct {
    real *emb, *emb_norm; /* [B][T][C] */
    LayerTap *layers;     /* [L] */
    real *logits;         /* [B][T][V] */
    real *loss_t, *loss;  /* [B][T], [] */
} Tap;

/* Tensors of the shapes of all parameters, zero at first. */
static Params add_params(Tensors *all, const char *prefix, Config c) {
    long C = c.n_embd, F = 4 * C, V = c.vocab_size;
    char of_layer[64];
    Params p = {.first = all->count, .layers = calloc(c.n_layer, sizeof(Layer))};
    p.wte = add_tensor(all, prefix, "wte", SHAPE(V, C));
    p.wpe = add_tensor(all, prefix, "wpe", SHAPE(c.block_size, C));
    p.lm_head = c.tie_lm_head ? p.wte : add_tensor(all, prefix, "lm_head", SHAPE(V, C));
    for (int i = 0; i < c.n_layer; i++) {
        Layer *w = &p.layers[i];
        snprintf(of_layer, sizeof of_layer, "%slayer%d.", prefix, i);
        w->attn_wq = add_tensor(all, of_layer, "attn_wq", SHAPE(C, C));
        w->attn_wk = add_tensor(all, of_layer, "attn_wk", SHAPE(C, C));
        w->attn_wv = add_tensor(all, of_layer, "attn_wv", SHAPE(C, C));
        w->attn_wo = add_tensor(all, of_layer, "attn_wo", SHAPE(C, C));
        w->mlp_fc1 = add_tensor(all, of_layer, "mlp_fc1", SHAPE(F, C));
        w->mlp_fc2 = add_tensor(all, of_layer, "mlp_fc2", SHAPE(C, F));
    }
    p.count = all->count - p.first;
    return p;
}

/* Tensors for all that is computed in between, or for its derivatives, zero at first. */
static Tap add_taps(Tensors *all, const char *prefix, Config c, long B, long T) {
    long C = c.n_embd, H = c.n_head, F = 4 * C;
    char of_layer[64];
    Tap tap = {.layers = calloc(c.n_layer, sizeof(LayerTap))};
    tap.emb = add_tensor(all, prefix, "emb", SHAPE(B, T, C));
    tap.emb_norm = tap.emb;
    if (c.norm_embedding) tap.emb_norm = add_tensor(all, prefix, "emb_norm", SHAPE(B, T, C));
    for (int i = 0; i < c.n_layer; i++) {
        LayerTap *x = &tap.layers[i];
        snprintf(of_layer, sizeof of_layer, "%slayer%d.", prefix, i);
        x->attn_norm = add_tensor(all, of_layer, "attn_norm", SHAPE(B, T, C));
        x->q = add_tensor(all, of_layer, "q", SHAPE(B, T, C));
        x->k = add_tensor(all, of_layer, "k", SHAPE(B, T, C));
        x->v = add_tensor(all, of_layer, "v", SHAPE(B, T, C));
        x->attn_logits = add_tensor(all, of_layer, "attn_logits", SHAPE(B, H, T, T));
        x->attn_weights = add_tensor(all, of_layer, "attn_weights", SHAPE(B, H, T, T));
        x->attn_out = add_tensor(all, of_layer, "attn_out", SHAPE(B, T, C));
        x->attn_res = add_tensor(all, of_layer, "attn_res", SHAPE(B, T, C));
        x->mlp_norm = add_tensor(all, of_layer, "mlp_norm", SHAPE(B, T, C));
        x->mlp_pre = add_tensor(all, of_layer, "mlp_pre", SHAPE(B, T, F));
        x->mlp_act = add_tensor(all, of_layer, "mlp_act", SHAPE(B, T, F));
        x->mlp_res = add_tensor(all, of_layer, "mlp_res", SHAPE(B, T, C));
    }
    tap.logits = add_tensor(all, prefix, "logits", SHAPE(B, T, c.vocab_size));
    tap.loss_t = add_tensor(all, prefix, "loss_t", SHAPE(B, T));
    tap.loss = add_tensor(all, prefix, "loss", 0, NULL);
    return tap;
}

/* ---- the model: each backward pass under its forward pass ---- */

/* y = w . x */
static void linear_forward(real *y, const real *x, const real *w, int n_out, int n_in) {
    for (int o = 0; o < n_out; o++) {
        y[o] = 0;
        for (int i = 0; i < n_in; i++) y[o] += w[o * n_in + i] * x[i]; /* [n_out] */
    }
}

/* dx += w^T . dy, dw += dy . x^T */
static void linear_backward(real *dx, real *dw, const real *dy, const real *x, const real *w,
                            int n_out, int n_in) {
    for (int o = 0; o < n_out; o++)
        for (int i = 0; i < n_in; i++) {
            dx[i] += dy[o] * w[o * n_in + i];  /* [n_in] */
            dw[o * n_in + i] += dy[o] * x[i];  /* [n_out][n_in] */
        }
}

/* y = exp(x - max(x)) / sum(exp(x - max(x))) */
static void softmax_forward(real *y, const real *x, int n) {
    real largest = x[0], exps_sum = 0;
    for (int i = 1; i < n; i++) largest = x[i] > largest ? x[i] : largest;
    for (int i = 0; i < n; i++) exps_sum += y[i] = exp(x[i] - largest);
    for (int i = 0; i < n; i++) y[i] /= exps_sum; /* [n] */
}

/* dx += y * (dy - sum(dy * y)) */
static void softmax_backward(real *dx, const real *dy, const real *y, int n) {
    real sum = 0;
    for (int i = 0; i < n; i++) sum += dy[i] * y[i];
    for (int i = 0; i < n; i++) dx[i] += y[i] * (dy[i] - sum); /* [n] */
}

/* y = x * (mean(x * x) + eps) ** -0.5 */
static void rmsnorm_forward(real *y, const real *x, int n, double eps) {
    real ms = 0;
    for (int i = 0; i < n; i++) ms += x[i] * x[i] / n;
    real scale = 1 / sqrt(ms + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale; /* [n] */
}

/* dx += scale * (dy - y * mean(dy * y)) */
static void rmsnorm_backward(real *dx, const real *dy, const real *y, const real *x, int n,
                             double eps) {
    real ms = 0, mean = 0;
    for (int i = 0; i < n; i++) ms += x[i] * x[i] / n;
    real scale = 1 / sqrt(ms + eps);
    for (int i = 0; i < n; i++) mean += dy[i] * y[i] / n;
    for (int i = 0; i < n; i++) dx[i] += scale * (dy[i] - y[i] * mean); /* [n] */
}

/* y = relu(x), relu(x) ** 2, or gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) */
static void activation_forward(real *y, const real *x, int n, int activation) {
    for (int i = 0; i < n; i++) {
        real relu = x[i] > 0 ? x[i] : 0;
        real gate = tanh(GELU * (x[i] + 0.044715 * x[i] * x[i] * x[i]));
        real values[] = {relu, relu * relu, 0.5 * x[i] * (1 + gate)};
        y[i] = values[activation]; /* [n] */
    }
}

/* dx += dy * [x > 0], dy * 2 relu(x), or dy times the slope of gelu */
static void activation_backward(real *dx, const real *dy, const real *x, int n, int activation) {
    for (int i = 0; i < n; i++) {
        real gate = tanh(GELU * (x[i] + 0.044715 * x[i] * x[i] * x[i]));
        real dgate = (1 - gate * gate) * GELU * (1 + 3 * 0.044715 * x[i] * x[i]);
        real slopes[] = {x[i] > 0, x[i] > 0 ? 2 * x[i] : 0, 0.5 * (1 + gate) + 0.5 * x[i] * dgate};
        dx[i] += dy[i] * slopes[activation]; /* [n] */
    }
}

/* attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x) */
static void attention_forward(const real *x, Layer w, long b, long t, long T, Config c,
                              LayerTap tap) {
    int C = c.n_embd, H = c.n_head, D = c.head_dim;
    long r = b * T + t;
    /* queries, keys and values */
    rmsnorm_forward(tap.attn_norm + r * C, x, C, c.norm_eps);                /* [C] */
    linear_forward(tap.q + r * C, tap.attn_norm + r * C, w.attn_wq, C, C);   /* [C] */
    linear_forward(tap.k + r * C, tap.attn_norm + r * C, w.attn_wk, C, C);   /* [C] */
    linear_forward(tap.v + r * C, tap.attn_norm + r * C, w.attn_wv, C, C);   /* [C] */
    for (int h = 0; h < H; h++) {
        real *attn_logits = tap.attn_logits + ((b * H + h) * T + t) * T;
        real *attn_weights = tap.attn_weights + ((b * H + h) * T + t) * T;
        /* how much each head looks at each position up to this one */
        for (int u = 0; u <= t; u++) {
            const real *q = tap.q + r * C + h * D, *k = tap.k + (b * T + u) * C + h * D; /* [D] */
            real score = 0;
            for (int d = 0; d < D; d++) score += q[d] * k[d];
            attn_logits[u] = score / sqrt(D); /* [t+1] */
        }
        softmax_forward(attn_weights, attn_logits, t + 1); /* [t+1] */
        /* what it sees there, heads side by side */
        real *attn_out = tap.attn_out + r * C + h * D; /* [D] */
        for (int u = 0; u <= t; u++) {
            const real *v = tap.v + (b * T + u) * C + h * D; /* [D] */
            for (int d = 0; d < D; d++) attn_out[d] += attn_weights[u] * v[d];
        }
    }
    /* residual */
    real *attn_res = tap.attn_res + r * C;
    linear_forward(attn_res, tap.attn_out + r * C, w.attn_wo, C, C);
    for (int i = 0; i < C; i++) attn_res[i] += x[i]; /* [C] */
}

/* dx += rmsnorm_backward(w^T . (dq, dk, dv)) + dattn_res

   Positions go from the last to the first, so that dk and dv of this one are complete: every later
   position has added to them. */
static void attention_backward(real *dx, const real *x, Layer w, Layer dw, long b, long t, long T,
                               Config c, LayerTap tap, LayerTap dtap) {
    int C = c.n_embd, H = c.n_head, D = c.head_dim;
    long r = b * T + t;
    /* residual */
    /* forward: attn_res = attn_wo . attn_out + x */
    const real *dattn_res = dtap.attn_res + r * C;
    for (int i = 0; i < C; i++) dx[i] += dattn_res[i]; /* [C] */
    linear_backward(dtap.attn_out + r * C, dw.attn_wo, dattn_res, tap.attn_out + r * C, w.attn_wo,
                    C, C); /* [C], [C][C] */
    for (int h = 0; h < H; h++) {
        const real *attn_weights = tap.attn_weights + ((b * H + h) * T + t) * T;
        real *dattn_weights = dtap.attn_weights + ((b * H + h) * T + t) * T;
        real *dattn_logits = dtap.attn_logits + ((b * H + h) * T + t) * T;
        /* what it sees there, heads side by side */
        /* forward: attn_out = attn_weights . v */
        const real *dattn_out = dtap.attn_out + r * C + h * D; /* [D] */
        for (int u = 0; u <= t; u++) {
            const real *v = tap.v + (b * T + u) * C + h * D; /* [D] */
            real *dv = dtap.v + (b * T + u) * C + h * D;     /* [D] */
            for (int d = 0; d < D; d++) {
                dattn_weights[u] += dattn_out[d] * v[d]; /* [t+1] */
                dv[d] += dattn_out[d] * attn_weights[u];
            }
        }
        /* how much each head looks at each position up to this one */
        softmax_backward(dattn_logits, dattn_weights, attn_weights, t + 1); /* [t+1] */
        /* forward: attn_logits = q . k / sqrt(D) */
        for (int u = 0; u <= t; u++) {
            const real *q = tap.q + r * C + h * D, *k = tap.k + (b * T + u) * C + h * D; /* [D] */
            real *dq = dtap.q + r * C + h * D, *dk = dtap.k + (b * T + u) * C + h * D;   /* [D] */
            real dscore = dattn_logits[u] / sqrt(D);
            for (int d = 0; d < D; d++) {
                dq[d] += dscore * k[d];
                dk[d] += dscore * q[d];
            }
        }
    }
    /* queries, keys and values */
    /* forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm */
    const real *attn_norm = tap.attn_norm + r * C;
    real *dattn_norm = dtap.attn_norm + r * C; /* [C] */
    linear_backward(dattn_norm, dw.attn_wq, dtap.q + r * C, attn_norm, w.attn_wq, C, C);
    linear_backward(dattn_norm, dw.attn_wk, dtap.k + r * C, attn_norm, w.attn_wk, C, C);
    linear_backward(dattn_norm, dw.attn_wv, dtap.v + r * C, attn_norm, w.attn_wv, C, C);
    rmsnorm_backward(dx, dattn_norm, attn_norm, x, C, c.norm_eps); /* [C] */
}

/* mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x */
static void mlp_forward(const real *x, Layer w, long r, Config c, LayerTap tap) {
    int C = c.n_embd, F = 4 * C;
    rmsnorm_forward(tap.mlp_norm + r * C, x, C, c.norm_eps);                          /* [C] */
    linear_forward(tap.mlp_pre + r * F, tap.mlp_norm + r * C, w.mlp_fc1, F, C);       /* [F] */
    activation_forward(tap.mlp_act + r * F, tap.mlp_pre + r * F, F, c.activation);    /* [F] */
    /* residual */
    real *mlp_res = tap.mlp_res + r * C;
    linear_forward(mlp_res, tap.mlp_act + r * F, w.mlp_fc2, C, F);
    for (int i = 0; i < C; i++) mlp_res[i] += x[i]; /* [C] */
}

/* dx += rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res */
static void mlp_backward(real *dx, const real *x, Layer w, Layer dw, long r, Config c,
                         LayerTap tap, LayerTap dtap) {
    int C = c.n_embd, F = 4 * C;
    /* residual */
    /* forward: mlp_res = mlp_fc2 . mlp_act + x */
    const real *dmlp_res = dtap.mlp_res + r * C;
    for (int i = 0; i < C; i++) dx[i] += dmlp_res[i]; /* [C] */
    linear_backward(dtap.mlp_act + r * F, dw.mlp_fc2, dmlp_res, tap.mlp_act + r * F, w.mlp_fc2,
                    C, F); /* [F], [C][F] */
    activation_backward(dtap.mlp_pre + r * F, dtap.mlp_act + r * F, tap.mlp_pre + r * F, F,
                        c.activation); /* [F] */
    linear_backward(dtap.mlp_norm + r * C, dw.mlp_fc1, dtap.mlp_pre + r * F,
                    tap.mlp_norm + r * C, w.mlp_fc1, F, C); /* [C], [F][C] */
    rmsnorm_backward(dx, dtap.mlp_norm + r * C, tap.mlp_norm + r * C, x, C, c.norm_eps); /* [C] */
}

/* logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position])) */
static void gpt_forward(int token, long b, long t, long T, Params p, Config c, Tap tap) {
    int C = c.n_embd, V = c.vocab_size;
    long r = b * T + t;
    real *emb = tap.emb + r * C;
    for (int i = 0; i < C; i++) emb[i] = p.wte[token * C + i] + p.wpe[t * C + i]; /* [C] */
    if (c.norm_embedding) rmsnorm_forward(tap.emb_norm + r * C, emb, C, c.norm_eps); /* [C] */
    const real *res = tap.emb_norm + r * C;
    for (int i = 0; i < c.n_layer; i++) {
        attention_forward(res, p.layers[i], b, t, T, c, tap.layers[i]);
        mlp_forward(tap.layers[i].attn_res + r * C, p.layers[i], r, c, tap.layers[i]);
        res = tap.layers[i].mlp_res + r * C; /* [C] */
    }
    linear_forward(tap.logits + r * V, res, p.lm_head, V, C); /* [V] */
}

/* dwte[token] += demb, dwpe[position] += demb */
static void gpt_backward(int token, long b, long t, long T, Params p, Params dp, Config c,
                         Tap tap, Tap dtap) {
    int C = c.n_embd, V = c.vocab_size;
    long r = b * T + t;
    /* forward: logits = lm_head . res */
    LayerTap last = tap.layers[c.n_layer - 1], dlast = dtap.layers[c.n_layer - 1];
    linear_backward(dlast.mlp_res + r * C, dp.lm_head, dtap.logits + r * V, last.mlp_res + r * C,
                    p.lm_head, V, C); /* [C], [V][C] */
    for (int i = c.n_layer - 1; i >= 0; i--) {
        LayerTap x = tap.layers[i], dx = dtap.layers[i];
        const real *res = i ? tap.layers[i - 1].mlp_res : tap.emb_norm;
        real *dres = i ? dtap.layers[i - 1].mlp_res : dtap.emb_norm;
        mlp_backward(dx.attn_res + r * C, x.attn_res + r * C, p.layers[i], dp.layers[i], r, c, x,
                     dx);
        attention_backward(dres + r * C, res + r * C, p.layers[i], dp.layers[i], b, t, T, c, x, dx);
    }
    real *demb = dtap.emb + r * C;
    if (c.norm_embedding)
        rmsnorm_backward(demb, dtap.emb_norm + r * C, tap.emb_norm + r * C, tap.emb + r * C, C,
                         c.norm_eps); /* [C] */
    /* forward: emb = wte[token] + wpe[position] */
    for (int i = 0; i < C; i++) {
        dp.wte[token * C + i] += demb[i];
        dp.wpe[t * C + i] += demb[i];
    }
}

/* loss_t = -log(softmax(logits)[target]), as log(sum(exp(x))) - x[target] with x <= 0 */
static real cross_entropy_forward(const real *logits, int target, int V) {
    real largest = logits[0], exps_sum = 0;
    for (int v = 1; v < V; v++) largest = logits[v] > largest ? logits[v] : largest;
    for (int v = 0; v < V; v++) exps_sum += exp(logits[v] - largest);
    return log(exps_sum) - (logits[target] - largest);
}

/* dlogits = dloss_t * (softmax(logits) - [target]) */
static void cross_entropy_backward(real *dlogits, real dloss_t, const real *logits, int target,
                                   int V) {
    softmax_forward(dlogits, logits, V);
    dlogits[target] -= 1;
    for (int v = 0; v < V; v++) dlogits[v] *= dloss_t; /* [V] */
}

/* How many positions a document has: one less than tokens, -1 being none. */
static int positions(const real *tokens, long T) {
    int n = 0;
    while (n < T && tokens[n + 1] >= 0) n++;
    return n;
}

/* loss = mean over documents of the mean over positions of loss_t */
static void loss_forward(const real *tokens, long B, long T, Params p, Config c, Tap tap) {
    for (long b = 0; b < B; b++) {
        const real *doc = tokens + b * (T + 1);
        int n = positions(doc, T);
        for (long t = 0; t < n; t++) {
            long r = b * T + t;
            gpt_forward(doc[t], b, t, T, p, c, tap);
            tap.loss_t[r] =
                cross_entropy_forward(tap.logits + r * c.vocab_size, doc[t + 1], c.vocab_size);
            *tap.loss += tap.loss_t[r] / n / B;
        }
    }
}

/* dloss = 1, dloss_t = 1 / (n B) */
static void loss_backward(const real *tokens, long B, long T, Params p, Params dp, Config c,
                          Tap tap, Tap dtap) {
    int V = c.vocab_size;
    *dtap.loss = 1;
    for (long b = B - 1; b >= 0; b--) {
        const real *doc = tokens + b * (T + 1);
        int n = positions(doc, T);
        for (long t = n - 1; t >= 0; t--) {
            long r = b * T + t;
            dtap.loss_t[r] = 1.0 / n / B;
            cross_entropy_backward(dtap.logits + r * V, dtap.loss_t[r], tap.logits + r * V,
                                   doc[t + 1], V); /* [V] */
            gpt_backward(doc[t], b, t, T, p, dp, c, tap, dtap);
        }
    }
}

/* ---- Adam ---- */

/* factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters */
static double clip(Tensors *all, Params grads, double longest) {
    double squares = 0;
    for (int k = 0; k < grads.count; k++) {
        Tensor g = all->list[grads.first + k];
        for (long i = 0; i < g.size; i++) squares += (double)g.data[i] * g.data[i];
    }
    return longest > 0 && sqrt(squares) > longest ? longest / sqrt(squares) : 1;
}

/* p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), steps counted from 1 */
static void adam(Tensors *all, Params params, Params grads, Params ms, Params vs, int step,
                 double lr_t, Config c) {
    double correction1 = 1 - pow(c.beta1, step), correction2 = 1 - pow(c.beta2, step);
    double factor = clip(all, grads, c.grad_clip);
    for (int k = 0; k < params.count; k++) {
        Tensor p = all->list[params.first + k], g = all->list[grads.first + k];
        Tensor m = all->list[ms.first + k], v = all->list[vs.first + k];
        for (long i = 0; i < p.size; i++) {
            double grad = factor * g.data[i];
            m.data[i] = c.beta1 * m.data[i] + (1 - c.beta1) * grad;
            v.data[i] = c.beta2 * v.data[i] + (1 - c.beta2) * grad * grad;
            double m_hat = m.data[i] / correction1, v_hat = v.data[i] / correction2;
            p.data[i] -= lr_t * (m_hat / (sqrt(v_hat) + c.adam_eps) + c.weight_decay * p.data[i]);
        }
    }
}

/* ---- some steps of training ---- */

/* New parameters, or moments, that begin as those of the step before, or as the file has them. */
static Params carried(Tensors *out, Tensors *in, int step, int first, const char *name,
                      const char *entry, Config c) {
    char prefix[64];
    snprintf(prefix, sizeof prefix, "step%d/%s/", step, name);
    Params params = add_params(out, prefix, c);
    for (int k = 0; k < params.count; k++) {
        Tensor x = out->list[params.first + k];
        const char *own = x.name + strlen(prefix);
        Tensor *before = step == first ? find_tensor(in, "step%d/%s/%s", step, entry, own)
                                       : find_tensor(out, "step%d/%s/%s", step - 1, name, own);
        if (before->size != x.size) fail("%s is not of the size that the configuration says", own);
        memcpy(x.data, before->data, x.size * sizeof(real));
    }
    return params;
}

int main(int count, char **words) {
    if (count != 3) fail("usage: microgpt NAME.in.safetensors NAME.out.safetensors");
    Tensors in = read_tensors(words[1]), out = {0};
    Config c = {
        .n_layer = number(&in, "config/n_layer", 0),
        .n_embd = number(&in, "config/n_embd", 0),
        .n_head = number(&in, "config/n_head", 0),
        .block_size = number(&in, "config/block_size", 0),
        .vocab_size = number(&in, "config/vocab_size", 0),
        .norm_embedding = number(&in, "config/norm_embedding", 0),
        .tie_lm_head = number(&in, "config/tie_lm_head", 0),
        .activation = number(&in, "config/activation", 0),
        .norm_eps = number(&in, "config/norm_eps", 0),
        .beta1 = number(&in, "config/beta1", 0),
        .beta2 = number(&in, "config/beta2", 0),
        .adam_eps = number(&in, "config/adam_eps", 0),
        .weight_decay = number(&in, "config/weight_decay", 0),
        .grad_clip = number(&in, "config/grad_clip", 0),
    };
    c.head_dim = c.n_embd / c.n_head;
    int first = number(&in, "config/first_step", 0), steps = number(&in, "config/steps", 0);
    for (int step = first; step < first + steps; step++) {
        char prefix[64];
        Tensor tokens = *find_tensor(&in, "step%d/batch/tokens", step);
        long B = tokens.shape[0], T = tokens.shape[1] - 1;
        Params p = carried(&out, &in, step, first, "params", "entry", c);
        Params m = carried(&out, &in, step, first, "adam_m", "entry_m", c);
        Params v = carried(&out, &in, step, first, "adam_v", "entry_v", c);
        snprintf(prefix, sizeof prefix, "step%d/forward/", step);
        Tap tap = add_taps(&out, prefix, c, B, T);
        snprintf(prefix, sizeof prefix, "step%d/backward/d", step);
        Tap dtap = add_taps(&out, prefix, c, B, T);
        snprintf(prefix, sizeof prefix, "step%d/gradient/d", step);
        Params dp = add_params(&out, prefix, c);
        loss_forward(tokens.data, B, T, p, c, tap);
        loss_backward(tokens.data, B, T, p, dp, c, tap, dtap);
        adam(&out, p, dp, m, v, step, number(&in, "step%d/learning_rate", step), c);
        printf("step %d: loss %.6f\n", step, (double)*tap.loss);
    }
    write_tensors(words[2], &out);
    return 0;
}

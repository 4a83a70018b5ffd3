// microgpt in JavaScript: one document, one position, one channel at a time. For Node, no packages.
//
//     node microgpt.mjs NAME.in.safetensors NAME.out.safetensors
//
// Reads a model and batches, trains on them, and writes all that it computed on the way: taps,
// their derivatives, gradients, Adam's moments, parameters. The files are those of
// crosscheck/GUIDE.md.
//
// Same as scalar/model.py: the functions, their order, their equations, the names in between.
// Different: every fForward has its fBackward directly beneath, the forward pass read upside down.
// dy stands for the derivative of the loss with respect to y; derivatives are added to what is
// there.
//
// B = documents, T = positions, C = n_embd, H = n_head, D = C / H channels a head, F = 4 C,
// V = vocabulary, L = layers. At the end of a line: [its shape]. A row r = b T + t is one position.

import { readFileSync, writeFileSync } from "node:fs";

const GELU = Math.sqrt(2 / Math.PI);

// ---- files of tensors: safetensors ----

class Tensor {
  constructor(shape, data = new Float64Array(shape.reduce((a, b) => a * b, 1))) {
    this.shape = shape;
    this.data = data;
  }

  // n numbers from the i-th lot of n on, as a view
  row(i, n) {
    return this.data.subarray(i * n, (i + 1) * n);
  }
}

function readTensors(path) {
  const file = readFileSync(path);
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, start));
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const tensor = new Tensor(shape);
    for (let i = 0; i < (end - begin) / 8; i++) {
      const at = start + begin + 8 * i;
      tensor.data[i] = dtype === "I64" ? Number(file.readBigInt64LE(at)) : file.readDoubleLE(at);
    }
    tensors[name] = tensor;
  }
  return tensors;
}

function writeTensors(path, tensors) {
  const header = {};
  let end = 0;
  for (const [name, { shape, data }] of Object.entries(tensors)) {
    header[name] = { dtype: "F64", shape, data_offsets: [end, (end += 8 * data.length)] };
  }
  const text = JSON.stringify(header);
  const padded = text.padEnd(8 * Math.ceil(text.length / 8));
  const file = Buffer.alloc(8 + padded.length + end);
  file.writeBigUInt64LE(BigInt(padded.length), 0);
  let at = 8 + file.write(padded, 8);
  for (const { data } of Object.values(tensors)) {
    for (const x of data) at = file.writeDoubleLE(x, at);
  }
  writeFileSync(path, file);
}

// ---- what the model is made of ----

// The shapes of all parameters, by name.
function paramShapes(config) {
  const { n_layer: L, n_embd: C, vocab_size: V } = config;
  const shapes = { wte: [V, C], wpe: [config.block_size, C] };
  if (!config.tie_lm_head) shapes.lm_head = [V, C];
  for (let i = 0; i < L; i++) {
    for (const name of ["attn_wq", "attn_wk", "attn_wv", "attn_wo"]) {
      shapes[`layer${i}.${name}`] = [C, C];
    }
    shapes[`layer${i}.mlp_fc1`] = [4 * C, C];
    shapes[`layer${i}.mlp_fc2`] = [C, 4 * C];
  }
  return shapes;
}

// The shapes of all that is computed in between, by name.
function tapShapes(config, B, T) {
  const { n_layer: L, n_embd: C, n_head: H, vocab_size: V } = config;
  const shapes = { emb: [B, T, C] };
  if (config.norm_embedding) shapes.emb_norm = [B, T, C];
  for (let i = 0; i < L; i++) {
    const narrow = ["attn_norm", "q", "k", "v", "attn_out", "attn_res", "mlp_norm", "mlp_res"];
    for (const name of narrow) shapes[`layer${i}.${name}`] = [B, T, C];
    for (const name of ["attn_logits", "attn_weights"]) shapes[`layer${i}.${name}`] = [B, H, T, T];
    for (const name of ["mlp_pre", "mlp_act"]) shapes[`layer${i}.${name}`] = [B, T, 4 * C];
  }
  return { ...shapes, logits: [B, T, V], loss_t: [B, T], loss: [] };
}

// Tensors of zeros: tree.wte, tree.layers[0].attn_wq. Each is added to `all` under its full name.
function grow(all, prefix, shapes, config) {
  const tree = { layers: Array.from({ length: config.n_layer }, () => ({})) };
  for (const [name, shape] of Object.entries(shapes)) {
    const [, layer, last] = name.match(/^layer(\d+)\.(.+)$/) ?? [];
    const tensor = (all[prefix + name] = new Tensor(shape));
    if (layer === undefined) tree[name] = tensor;
    else tree.layers[layer][last] = tensor;
  }
  return tree;
}

// ---- the model: each backward pass under its forward pass ----

// y = w . x
function linearForward(y, x, w) {
  for (let o = 0; o < y.length; o++) {
    y[o] = 0;
    for (let i = 0; i < x.length; i++) y[o] += w.data[o * x.length + i] * x[i]; // [n_out]
  }
}

// dx += w^T . dy, dw += dy . x^T
function linearBackward(dx, dw, dy, x, w) {
  for (let o = 0; o < dy.length; o++) {
    for (let i = 0; i < x.length; i++) {
      dx[i] += dy[o] * w.data[o * x.length + i]; // [n_in]
      dw.data[o * x.length + i] += dy[o] * x[i]; // [n_out][n_in]
    }
  }
}

// y = exp(x - max(x)) / sum(exp(x - max(x)))
function softmaxForward(y, x) {
  const largest = x.reduce((a, b) => Math.max(a, b));
  let expsSum = 0;
  for (let i = 0; i < x.length; i++) expsSum += y[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < x.length; i++) y[i] /= expsSum; // [n]
}

// dx += y * (dy - sum(dy * y))
function softmaxBackward(dx, dy, y) {
  const sum = dot(dy, y);
  for (let i = 0; i < y.length; i++) dx[i] += y[i] * (dy[i] - sum); // [n]
}

// y = x * (mean(x * x) + eps) ** -0.5
function rmsnormForward(y, x, eps) {
  const scale = (dot(x, x) / x.length + eps) ** -0.5;
  for (let i = 0; i < x.length; i++) y[i] = x[i] * scale; // [n]
}

// dx += scale * (dy - y * mean(dy * y))
function rmsnormBackward(dx, dy, y, x, eps) {
  const scale = (dot(x, x) / x.length + eps) ** -0.5;
  const mean = dot(dy, y) / x.length;
  for (let i = 0; i < x.length; i++) dx[i] += scale * (dy[i] - y[i] * mean); // [n]
}

// y = relu(x), relu(x) ** 2, or gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
function activationForward(y, x, activation) {
  for (let i = 0; i < x.length; i++) {
    const relu = Math.max(x[i], 0);
    const gate = Math.tanh(GELU * (x[i] + 0.044715 * x[i] ** 3));
    y[i] = [relu, relu ** 2, 0.5 * x[i] * (1 + gate)][activation]; // [n]
  }
}

// dx += dy * [x > 0], dy * 2 relu(x), or dy times the slope of gelu
function activationBackward(dx, dy, x, activation) {
  for (let i = 0; i < x.length; i++) {
    const gate = Math.tanh(GELU * (x[i] + 0.044715 * x[i] ** 3));
    const dgate = (1 - gate ** 2) * GELU * (1 + 3 * 0.044715 * x[i] ** 2);
    const slope = [Number(x[i] > 0), 2 * Math.max(x[i], 0), 0.5 * (1 + gate) + 0.5 * x[i] * dgate];
    dx[i] += dy[i] * slope[activation]; // [n]
  }
}

// attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)
function attentionForward(x, w, b, t, T, config, tap) {
  const { n_embd: C, n_head: H } = config;
  const D = C / H;
  const r = b * T + t;
  // queries, keys and values
  const attn_norm = tap.attn_norm.row(r, C);
  rmsnormForward(attn_norm, x, config.norm_eps); // [C]
  linearForward(tap.q.row(r, C), attn_norm, w.attn_wq); // [C]
  linearForward(tap.k.row(r, C), attn_norm, w.attn_wk); // [C]
  linearForward(tap.v.row(r, C), attn_norm, w.attn_wv); // [C]
  const attn_out = tap.attn_out.row(r, C);
  for (let h = 0; h < H; h++) {
    const q = tap.q.row(r * H + h, D); // [D]
    const attn_logits = tap.attn_logits.row((b * H + h) * T + t, T).subarray(0, t + 1);
    const attn_weights = tap.attn_weights.row((b * H + h) * T + t, T).subarray(0, t + 1);
    // how much each head looks at each position up to this one
    for (let u = 0; u <= t; u++) {
      const k = tap.k.row((b * T + u) * H + h, D); // [D]
      attn_logits[u] = dot(q, k) / Math.sqrt(D); // [t+1]
    }
    softmaxForward(attn_weights, attn_logits); // [t+1]
    // what it sees there, heads side by side
    for (let u = 0; u <= t; u++) {
      const v = tap.v.row((b * T + u) * H + h, D); // [D]
      for (let d = 0; d < D; d++) attn_out[h * D + d] += attn_weights[u] * v[d]; // [C]
    }
  }
  // residual
  const attn_res = tap.attn_res.row(r, C);
  linearForward(attn_res, attn_out, w.attn_wo);
  add(attn_res, x); // [C]
}

// dx += rmsnorm_backward(w^T . (dq, dk, dv)) + dattn_res
//
// Positions go from the last to the first, so that dk and dv of this one are complete: every later
// position has added to them.
function attentionBackward(dx, x, w, dw, b, t, T, config, tap, dtap) {
  const { n_embd: C, n_head: H } = config;
  const D = C / H;
  const r = b * T + t;
  // residual
  // forward: attn_res = attn_wo . attn_out + x
  const dattn_res = dtap.attn_res.row(r, C);
  const dattn_out = dtap.attn_out.row(r, C);
  add(dx, dattn_res); // [C]
  linearBackward(dattn_out, dw.attn_wo, dattn_res, tap.attn_out.row(r, C), w.attn_wo); // [C]
  for (let h = 0; h < H; h++) {
    const attn_weights = tap.attn_weights.row((b * H + h) * T + t, T).subarray(0, t + 1);
    const dattn_weights = dtap.attn_weights.row((b * H + h) * T + t, T).subarray(0, t + 1);
    const dattn_logits = dtap.attn_logits.row((b * H + h) * T + t, T).subarray(0, t + 1);
    // what it sees there, heads side by side
    // forward: attn_out = attn_weights . v
    for (let u = 0; u <= t; u++) {
      const v = tap.v.row((b * T + u) * H + h, D); // [D]
      const dv = dtap.v.row((b * T + u) * H + h, D); // [D]
      for (let d = 0; d < D; d++) {
        dattn_weights[u] += dattn_out[h * D + d] * v[d]; // [t+1]
        dv[d] += dattn_out[h * D + d] * attn_weights[u];
      }
    }
    // how much each head looks at each position up to this one
    softmaxBackward(dattn_logits, dattn_weights, attn_weights); // [t+1]
    // forward: attn_logits = q . k / sqrt(D)
    const q = tap.q.row(r * H + h, D); // [D]
    const dq = dtap.q.row(r * H + h, D); // [D]
    for (let u = 0; u <= t; u++) {
      const k = tap.k.row((b * T + u) * H + h, D); // [D]
      const dk = dtap.k.row((b * T + u) * H + h, D); // [D]
      const dscore = dattn_logits[u] / Math.sqrt(D);
      for (let d = 0; d < D; d++) {
        dq[d] += dscore * k[d];
        dk[d] += dscore * q[d];
      }
    }
  }
  // queries, keys and values
  // forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm
  const attn_norm = tap.attn_norm.row(r, C);
  const dattn_norm = dtap.attn_norm.row(r, C);
  linearBackward(dattn_norm, dw.attn_wq, dtap.q.row(r, C), attn_norm, w.attn_wq); // [C], [C][C]
  linearBackward(dattn_norm, dw.attn_wk, dtap.k.row(r, C), attn_norm, w.attn_wk); // [C], [C][C]
  linearBackward(dattn_norm, dw.attn_wv, dtap.v.row(r, C), attn_norm, w.attn_wv); // [C], [C][C]
  rmsnormBackward(dx, dattn_norm, attn_norm, x, config.norm_eps); // [C]
}

// mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x
function mlpForward(x, w, r, config, tap) {
  const C = config.n_embd;
  const F = 4 * C;
  const mlp_norm = tap.mlp_norm.row(r, C);
  const mlp_pre = tap.mlp_pre.row(r, F);
  const mlp_act = tap.mlp_act.row(r, F);
  rmsnormForward(mlp_norm, x, config.norm_eps); // [C]
  linearForward(mlp_pre, mlp_norm, w.mlp_fc1); // [F]
  activationForward(mlp_act, mlp_pre, config.activation); // [F]
  // residual
  const mlp_res = tap.mlp_res.row(r, C);
  linearForward(mlp_res, mlp_act, w.mlp_fc2);
  add(mlp_res, x); // [C]
}

// dx += rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res
function mlpBackward(dx, x, w, dw, r, config, tap, dtap) {
  const C = config.n_embd;
  const F = 4 * C;
  // residual
  // forward: mlp_res = mlp_fc2 . mlp_act + x
  const dmlp_res = dtap.mlp_res.row(r, C);
  const dmlp_act = dtap.mlp_act.row(r, F);
  add(dx, dmlp_res); // [C]
  linearBackward(dmlp_act, dw.mlp_fc2, dmlp_res, tap.mlp_act.row(r, F), w.mlp_fc2); // [F], [C][F]
  // forward: mlp_act = activation(mlp_pre)
  const dmlp_pre = dtap.mlp_pre.row(r, F);
  activationBackward(dmlp_pre, dmlp_act, tap.mlp_pre.row(r, F), config.activation); // [F]
  // forward: mlp_pre = mlp_fc1 . mlp_norm
  const mlp_norm = tap.mlp_norm.row(r, C);
  const dmlp_norm = dtap.mlp_norm.row(r, C);
  linearBackward(dmlp_norm, dw.mlp_fc1, dmlp_pre, mlp_norm, w.mlp_fc1); // [C], [F][C]
  rmsnormBackward(dx, dmlp_norm, mlp_norm, x, config.norm_eps); // [C]
}

// logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))
function gptForward(token, b, t, T, params, config, tap) {
  const { n_embd: C, vocab_size: V } = config;
  const r = b * T + t;
  const emb = tap.emb.row(r, C);
  add(emb, params.wte.row(token, C));
  add(emb, params.wpe.row(t, C)); // [C]
  let res = emb;
  if (config.norm_embedding) {
    res = tap.emb_norm.row(r, C);
    rmsnormForward(res, emb, config.norm_eps); // [C]
  }
  for (let i = 0; i < config.n_layer; i++) {
    attentionForward(res, params.layers[i], b, t, T, config, tap.layers[i]);
    mlpForward(tap.layers[i].attn_res.row(r, C), params.layers[i], r, config, tap.layers[i]);
    res = tap.layers[i].mlp_res.row(r, C); // [C]
  }
  linearForward(tap.logits.row(r, V), res, params.lm_head ?? params.wte); // [V]
}

// dwte[token] += demb, dwpe[position] += demb
function gptBackward(token, b, t, T, params, dparams, config, tap, dtap) {
  const { n_layer: L, n_embd: C, vocab_size: V } = config;
  const r = b * T + t;
  // forward: logits = lm_head . res
  const res = tap.layers[L - 1].mlp_res.row(r, C);
  const dres = dtap.layers[L - 1].mlp_res.row(r, C);
  const dlm_head = dparams.lm_head ?? dparams.wte;
  linearBackward(dres, dlm_head, dtap.logits.row(r, V), res, params.lm_head ?? params.wte); // [C]
  for (let i = L - 1; i >= 0; i--) {
    const [w, dw, tap_i, dtap_i] = [params, dparams, tap, dtap].map((tree) => tree.layers[i]);
    const [x, dx] = [tap, dtap].map(
      (tree) => (i > 0 ? tree.layers[i - 1].mlp_res : tree.emb_norm ?? tree.emb).row(r, C),
    );
    const dattn_res = dtap_i.attn_res.row(r, C);
    mlpBackward(dattn_res, tap_i.attn_res.row(r, C), w, dw, r, config, tap_i, dtap_i); // [C]
    attentionBackward(dx, x, w, dw, b, t, T, config, tap_i, dtap_i); // [C]
  }
  const demb = dtap.emb.row(r, C);
  if (config.norm_embedding) {
    const [emb, emb_norm] = [tap.emb.row(r, C), tap.emb_norm.row(r, C)];
    rmsnormBackward(demb, dtap.emb_norm.row(r, C), emb_norm, emb, config.norm_eps); // [C]
  }
  // forward: emb = wte[token] + wpe[position]
  add(dparams.wte.row(token, C), demb);
  add(dparams.wpe.row(t, C), demb);
}

// loss_t = -log(softmax(logits)[target]), as log(sum(exp(x))) - x[target] with x <= 0
function crossEntropyForward(logits, target) {
  const largest = logits.reduce((a, b) => Math.max(a, b));
  let expsSum = 0;
  for (const logit of logits) expsSum += Math.exp(logit - largest);
  return Math.log(expsSum) - (logits[target] - largest);
}

// dlogits = dloss_t * (softmax(logits) - [target])
function crossEntropyBackward(dlogits, dloss_t, logits, target) {
  softmaxForward(dlogits, logits);
  dlogits[target] -= 1;
  for (let v = 0; v < logits.length; v++) dlogits[v] *= dloss_t; // [V]
}

// loss = mean over documents of the mean over positions of loss_t
function lossForward(docs, T, params, config, tap) {
  docs.forEach((tokens, b) => {
    const n = tokens.length - 1;
    for (let t = 0; t < n; t++) {
      const r = b * T + t;
      gptForward(tokens[t], b, t, T, params, config, tap);
      tap.loss_t.data[r] = crossEntropyForward(tap.logits.row(r, config.vocab_size), tokens[t + 1]);
      tap.loss.data[0] += tap.loss_t.data[r] / n / docs.length;
    }
  });
}

// dloss = 1, dloss_t = 1 / (n B)
function lossBackward(docs, T, params, dparams, config, tap, dtap) {
  const V = config.vocab_size;
  dtap.loss.data[0] = 1;
  docs.forEach((tokens, b) => {
    const n = tokens.length - 1;
    for (let t = n - 1; t >= 0; t--) {
      const r = b * T + t;
      const dloss_t = (dtap.loss_t.data[r] = 1 / n / docs.length);
      crossEntropyBackward(dtap.logits.row(r, V), dloss_t, tap.logits.row(r, V), tokens[t + 1]);
      gptBackward(tokens[t], b, t, T, params, dparams, config, tap, dtap);
    }
  });
}

// s = x_0 y_0 + x_1 y_1 + .. + x_n-1 y_n-1
function dot(x, y) {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i] * y[i];
  return sum;
}

// y += x
function add(y, x) {
  for (let i = 0; i < x.length; i++) y[i] += x[i];
}

// ---- Adam ----

// factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters
function clip(grads, longest) {
  const squares = grads.reduce((sum, { data }) => sum + dot(data, data), 0);
  return longest > 0 && Math.sqrt(squares) > longest ? longest / Math.sqrt(squares) : 1;
}

// p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), steps counted from 1
function adam(params, grads, ms, vs, step, lr_t, config) {
  const { beta1, beta2, adam_eps, weight_decay, grad_clip } = config;
  const [correction1, correction2] = [1 - beta1 ** step, 1 - beta2 ** step];
  const factor = clip(grads, grad_clip);
  params.forEach(({ data: p }, k) => {
    const [g, m, v] = [grads[k].data, ms[k].data, vs[k].data];
    for (let i = 0; i < p.length; i++) {
      const grad = factor * g[i];
      m[i] = beta1 * m[i] + (1 - beta1) * grad;
      v[i] = beta2 * v[i] + (1 - beta2) * grad ** 2;
      const [m_hat, v_hat] = [m[i] / correction1, v[i] / correction2];
      p[i] -= lr_t * (m_hat / (Math.sqrt(v_hat) + adam_eps) + weight_decay * p[i]);
    }
  });
}

// ---- some steps of training ----

// Parameters, or moments, that begin as those of the step before, or as the file has them.
function carried(all, given, step, name, entry, config) {
  const shapes = paramShapes(config);
  const tree = grow(all, `step${step}/${name}/`, shapes, config);
  for (const own of Object.keys(shapes)) {
    const before = all[`step${step - 1}/${name}/${own}`] ?? given[`step${step}/${entry}/${own}`];
    all[`step${step}/${name}/${own}`].data.set(before.data);
  }
  return tree;
}

function main(input, output) {
  const given = readTensors(input);
  const all = {};
  const config = {};
  for (const [name, { data }] of Object.entries(given)) {
    if (name.startsWith("config/")) config[name.slice("config/".length)] = data[0];
  }
  const shapes = paramShapes(config);
  for (let step = config.first_step; step < config.first_step + config.steps; step++) {
    const tokens = given[`step${step}/batch/tokens`];
    const [B, T] = [tokens.shape[0], tokens.shape[1] - 1];
    const docs = Array.from({ length: B }, (_, b) => tokens.row(b, T + 1).filter((id) => id >= 0));
    const params = carried(all, given, step, "params", "entry", config);
    carried(all, given, step, "adam_m", "entry_m", config);
    carried(all, given, step, "adam_v", "entry_v", config);
    const tap = grow(all, `step${step}/forward/`, tapShapes(config, B, T), config);
    const dtap = grow(all, `step${step}/backward/d`, tapShapes(config, B, T), config);
    const dparams = grow(all, `step${step}/gradient/d`, shapes, config);
    lossForward(docs, T, params, config, tap);
    lossBackward(docs, T, params, dparams, config, tap, dtap);
    const [p, g, m, v] = ["params/", "gradient/d", "adam_m/", "adam_v/"].map((phase) =>
      Object.keys(shapes).map((name) => all[`step${step}/${phase}${name}`]),
    );
    adam(p, g, m, v, step, given[`step${step}/learning_rate`].data[0], config);
    console.log(`step ${step}: loss ${tap.loss.data[0].toFixed(6)}`);
  }
  writeTensors(output, all);
}

if (process.argv.length !== 4) {
  console.error("usage: node microgpt.mjs NAME.in.safetensors NAME.out.safetensors");
  process.exit(1);
}
main(process.argv[2], process.argv[3]);

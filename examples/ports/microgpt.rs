//! microgpt in Rust: one document, one position, one channel at a time. No crates.
//!
//!     rustc --edition 2021 -O microgpt.rs
//!     ./microgpt NAME.in.safetensors NAME.out.safetensors
//!
//! Reads a model and batches, trains on them, and writes all that it computed on the way: taps,
//! their derivatives, gradients, Adam's moments, parameters. The files are those of
//! crosscheck/GUIDE.md.
//!
//! Same as scalar/model.py: the functions, their order, their equations, the names in between.
//! Different: every f_forward has its f_backward directly beneath, the forward pass read upside
//! down. dy stands for the derivative of the loss with respect to y.
//!
//! B = documents, T = positions, C = n_embd, H = n_head, D = C / H channels a head, F = 4 C,
//! V = vocabulary, L = layers. At the end of a line: [its shape]. A row r = b T + t is one
//! position.

#![allow(non_snake_case)]

use std::collections::BTreeMap;
use std::{env, fs, process};

const GELU: f64 = 0.797_884_560_802_865_4; // sqrt(2 / pi)

// ---- files of tensors: safetensors ----

#[derive(Clone)]
struct Tensor {
    shape: Vec<usize>,
    data: Vec<f64>, // token ids as well
}

type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    fn zeros(shape: &[usize]) -> Tensor {
        Tensor { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }

    /// The length of the last axis.
    fn width(&self) -> usize {
        *self.shape.last().unwrap()
    }

    /// The numbers along the last axis, all others counted as one.
    fn row(&self, r: usize) -> &[f64] {
        &self.data[r * self.width()..(r + 1) * self.width()]
    }

    fn row_mut(&mut self, r: usize) -> &mut [f64] {
        let n = self.width();
        &mut self.data[r * n..(r + 1) * n]
    }
}

/// All tensors of a file whose header has the one form that crosscheck/TRACES.md promises:
/// {"name":{"dtype":"F64","shape":[2,3],"data_offsets":[0,48]},..}, without metadata.
fn read_tensors(path: &str) -> Result<Tensors, String> {
    let file = fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let eight = |at: usize| -> Result<[u8; 8], String> {
        let bytes = file.get(at..at + 8).ok_or(format!("{path} is cut short"))?;
        Ok(bytes.try_into().unwrap())
    };
    let numbers = |text: &str| -> Vec<usize> {
        text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).collect()
    };
    let start = 8 + u64::from_le_bytes(eight(0)?) as usize;
    let header = file.get(8..start).ok_or(format!("{path} is cut short"))?;
    let header = std::str::from_utf8(header).map_err(|error| format!("{path}: {error}"))?;
    let mut tensors = Tensors::new();
    for entry in header.trim_end().split("},") {
        // {" name ":{" dtype ":" F64 "," shape ":[2,3]," data_offsets ":[0,48]
        let words: Vec<&str> = entry.split('"').collect();
        let [_, name, _, _, _, dtype, _, _, shape, _, offsets] = words[..] else {
            return Err(format!("{path}: no header as it should be: {entry}"));
        };
        let mut tensor = Tensor::zeros(&numbers(shape));
        for (i, x) in tensor.data.iter_mut().enumerate() {
            let bytes = eight(start + numbers(offsets)[0] + 8 * i)?;
            *x = match dtype {
                "I64" => i64::from_le_bytes(bytes) as f64,
                _ => f64::from_le_bytes(bytes),
            };
        }
        tensors.insert(name.to_string(), tensor);
    }
    Ok(tensors)
}

/// Writes all tensors, one behind the other.
fn write_tensors(path: &str, tensors: &Tensors) -> Result<(), String> {
    let mut data: Vec<u8> = Vec::new();
    let mut entries: Vec<String> = Vec::new();
    for (name, Tensor { shape, data: numbers }) in tensors {
        let begin = data.len();
        data.extend(numbers.iter().flat_map(|x| x.to_le_bytes()));
        let offsets = [begin, data.len()];
        entries.push(format!(
            r#""{name}":{{"dtype":"F64","shape":{shape:?},"data_offsets":{offsets:?}}}"#
        ));
    }
    let mut header = format!("{{{}}}", entries.join(","));
    while header.len() % 8 != 0 {
        header.push(' ');
    }
    let length = (header.len() as u64).to_le_bytes();
    let file = [&length[..], header.as_bytes(), &data].concat();
    fs::write(path, file).map_err(|error| format!("{path}: {error}"))
}

fn find<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a Tensor, String> {
    tensors.get(name).ok_or(format!("the file lacks {name}"))
}

// ---- what the model is made of ----

#[derive(Clone, Copy)]
struct Config {
    n_layer: usize,
    n_embd: usize,
    n_head: usize,
    block_size: usize,
    vocab_size: usize,
    norm_embedding: bool,
    tie_lm_head: bool,
    activation: usize,
    norm_eps: f64,
    beta1: f64,
    beta2: f64,
    adam_eps: f64,
    weight_decay: f64,
    grad_clip: f64,
}

struct Layer {
    attn_wq: Tensor, // [C][C]
    attn_wk: Tensor, // [C][C]
    attn_wv: Tensor, // [C][C]
    attn_wo: Tensor, // [C][C]
    mlp_fc1: Tensor, // [F][C]
    mlp_fc2: Tensor, // [C][F]
}

struct Params {
    wte: Tensor,             // [V][C]
    wpe: Tensor,             // [block_size][C]
    lm_head: Option<Tensor>, // [V][C], none if it is tied to wte
    layers: Vec<Layer>,      // [L]
}

struct LayerTap {
    attn_norm: Tensor,    // [B][T][C]
    q: Tensor,            // [B][T][C]
    k: Tensor,            // [B][T][C]
    v: Tensor,            // [B][T][C]
    attn_logits: Tensor,  // [B][H][T][T]
    attn_weights: Tensor, // [B][H][T][T]
    attn_out: Tensor,     // [B][T][C]
    attn_res: Tensor,     // [B][T][C]
    mlp_norm: Tensor,     // [B][T][C]
    mlp_pre: Tensor,      // [B][T][F]
    mlp_act: Tensor,      // [B][T][F]
    mlp_res: Tensor,      // [B][T][C]
}

struct Tap {
    emb: Tensor,              // [B][T][C]
    emb_norm: Option<Tensor>, // [B][T][C]
    layers: Vec<LayerTap>,    // [L]
    logits: Tensor,           // [B][T][V]
    loss_t: Tensor,           // [B][T]
    loss: Tensor,             // []
}

impl Params {
    /// Parameters, or gradients or moments of them, of zeros.
    fn zeros(c: &Config) -> Params {
        let (C, F, V) = (c.n_embd, 4 * c.n_embd, c.vocab_size);
        let layer = |_| Layer {
            attn_wq: Tensor::zeros(&[C, C]),
            attn_wk: Tensor::zeros(&[C, C]),
            attn_wv: Tensor::zeros(&[C, C]),
            attn_wo: Tensor::zeros(&[C, C]),
            mlp_fc1: Tensor::zeros(&[F, C]),
            mlp_fc2: Tensor::zeros(&[C, F]),
        };
        Params {
            wte: Tensor::zeros(&[V, C]),
            wpe: Tensor::zeros(&[c.block_size, C]),
            lm_head: if c.tie_lm_head { None } else { Some(Tensor::zeros(&[V, C])) },
            layers: (0..c.n_layer).map(layer).collect(),
        }
    }

    /// All of them by their full names, always in the same order.
    fn named(&mut self) -> Vec<(String, &mut Tensor)> {
        let mut all = vec![("wte".to_string(), &mut self.wte), ("wpe".to_string(), &mut self.wpe)];
        all.extend(self.lm_head.iter_mut().map(|x| ("lm_head".to_string(), x)));
        for (i, w) in self.layers.iter_mut().enumerate() {
            let of_layer = [
                ("attn_wq", &mut w.attn_wq),
                ("attn_wk", &mut w.attn_wk),
                ("attn_wv", &mut w.attn_wv),
                ("attn_wo", &mut w.attn_wo),
                ("mlp_fc1", &mut w.mlp_fc1),
                ("mlp_fc2", &mut w.mlp_fc2),
            ];
            all.extend(of_layer.map(|(name, x)| (format!("layer{i}.{name}"), x)));
        }
        all
    }
}

impl Tap {
    /// What is computed in between, or its derivatives, of zeros.
    fn zeros(c: &Config, B: usize, T: usize) -> Tap {
        let (C, H, F, V) = (c.n_embd, c.n_head, 4 * c.n_embd, c.vocab_size);
        let layer = |_| LayerTap {
            attn_norm: Tensor::zeros(&[B, T, C]),
            q: Tensor::zeros(&[B, T, C]),
            k: Tensor::zeros(&[B, T, C]),
            v: Tensor::zeros(&[B, T, C]),
            attn_logits: Tensor::zeros(&[B, H, T, T]),
            attn_weights: Tensor::zeros(&[B, H, T, T]),
            attn_out: Tensor::zeros(&[B, T, C]),
            attn_res: Tensor::zeros(&[B, T, C]),
            mlp_norm: Tensor::zeros(&[B, T, C]),
            mlp_pre: Tensor::zeros(&[B, T, F]),
            mlp_act: Tensor::zeros(&[B, T, F]),
            mlp_res: Tensor::zeros(&[B, T, C]),
        };
        Tap {
            emb: Tensor::zeros(&[B, T, C]),
            emb_norm: if c.norm_embedding { Some(Tensor::zeros(&[B, T, C])) } else { None },
            layers: (0..c.n_layer).map(layer).collect(),
            logits: Tensor::zeros(&[B, T, V]),
            loss_t: Tensor::zeros(&[B, T]),
            loss: Tensor::zeros(&[]),
        }
    }

    /// All of them by their full names.
    fn named(self) -> Vec<(String, Tensor)> {
        let mut all = vec![
            ("emb".to_string(), self.emb),
            ("logits".to_string(), self.logits),
            ("loss_t".to_string(), self.loss_t),
            ("loss".to_string(), self.loss),
        ];
        all.extend(self.emb_norm.map(|x| ("emb_norm".to_string(), x)));
        for (i, x) in self.layers.into_iter().enumerate() {
            let of_layer = [
                ("attn_norm", x.attn_norm),
                ("q", x.q),
                ("k", x.k),
                ("v", x.v),
                ("attn_logits", x.attn_logits),
                ("attn_weights", x.attn_weights),
                ("attn_out", x.attn_out),
                ("attn_res", x.attn_res),
                ("mlp_norm", x.mlp_norm),
                ("mlp_pre", x.mlp_pre),
                ("mlp_act", x.mlp_act),
                ("mlp_res", x.mlp_res),
            ];
            all.extend(of_layer.map(|(name, x)| (format!("layer{i}.{name}"), x)));
        }
        all
    }
}

// ---- the model: each backward pass under its forward pass ----

/// y = w . x
fn linear_forward(x: &[f64], w: &Tensor) -> Vec<f64> {
    (0..w.shape[0]).map(|o| dot(w.row(o), x)).collect() // [n_in], [n_out][n_in] -> [n_out]
}

/// dx = w^T . dy, dw += dy . x^T
fn linear_backward(dy: &[f64], x: &[f64], w: &Tensor, dw: &mut Tensor) -> Vec<f64> {
    let mut dx = vec![0.0; x.len()];
    for (o, dy_o) in dy.iter().enumerate() {
        add(&mut dx, *dy_o, w.row(o)); // [n_in]
        add(dw.row_mut(o), *dy_o, x); // [n_out][n_in]
    }
    dx
}

/// y = exp(x - max(x)) / sum(exp(x - max(x)))
fn softmax_forward(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = x.iter().map(|x_i| (x_i - largest).exp()).collect();
    let exps_sum: f64 = exps.iter().sum();
    exps.iter().map(|e_i| e_i / exps_sum).collect() // [n] -> [n]
}

/// dx = y * (dy - sum(dy * y))
fn softmax_backward(dy: &[f64], y: &[f64]) -> Vec<f64> {
    let sum = dot(dy, y);
    dy.iter().zip(y).map(|(dy_i, y_i)| y_i * (dy_i - sum)).collect() // [n], [n] -> [n]
}

/// y = x * (mean(x * x) + eps) ** -0.5
fn rmsnorm_forward(x: &[f64], eps: f64) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + eps).powf(-0.5);
    x.iter().map(|x_i| x_i * scale).collect() // [n] -> [n]
}

/// dx = scale * (dy - y * mean(dy * y))
fn rmsnorm_backward(dy: &[f64], y: &[f64], x: &[f64], eps: f64) -> Vec<f64> {
    let scale = (dot(x, x) / x.len() as f64 + eps).powf(-0.5);
    let mean = dot(dy, y) / x.len() as f64;
    dy.iter().zip(y).map(|(dy_i, y_i)| scale * (dy_i - y_i * mean)).collect() // [n]
}

/// y = relu(x), relu(x) ** 2, or gelu: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
fn activation_forward(x: &[f64], activation: usize) -> Vec<f64> {
    let value = |x_i: f64| match activation {
        0 => x_i.max(0.0),
        1 => x_i.max(0.0).powi(2),
        _ => 0.5 * x_i * (1.0 + (GELU * (x_i + 0.044715 * x_i.powi(3))).tanh()),
    };
    x.iter().map(|x_i| value(*x_i)).collect() // [n] -> [n]
}

/// dx = dy * [x > 0], dy * 2 relu(x), or dy times the slope of gelu
fn activation_backward(dy: &[f64], x: &[f64], activation: usize) -> Vec<f64> {
    let gelu_slope = |x_i: f64| {
        let gate = (GELU * (x_i + 0.044715 * x_i.powi(3))).tanh();
        let dgate = (1.0 - gate * gate) * GELU * (1.0 + 3.0 * 0.044715 * x_i * x_i);
        0.5 * (1.0 + gate) + 0.5 * x_i * dgate
    };
    let slope = |x_i: f64| match activation {
        0 => f64::from(u8::from(x_i > 0.0)),
        1 => 2.0 * x_i.max(0.0),
        _ => gelu_slope(x_i),
    };
    dy.iter().zip(x).map(|(dy_i, x_i)| dy_i * slope(*x_i)).collect() // [n], [n] -> [n]
}

/// attn_res = attn_wo . (softmax(q . k / sqrt(D)) . v) + x, where q, k, v = w . rmsnorm(x)
fn attention_forward(
    x: &[f64], w: &Layer, b: usize, t: usize, T: usize, c: &Config, tap: &mut LayerTap,
) -> Vec<f64> {
    let (H, D, r) = (c.n_head, c.n_embd / c.n_head, b * T + t);
    // queries, keys and values
    let attn_norm = rmsnorm_forward(x, c.norm_eps); // [C]
    let q = linear_forward(&attn_norm, &w.attn_wq); // [C]
    tap.k.row_mut(r).copy_from_slice(&linear_forward(&attn_norm, &w.attn_wk)); // [C]
    tap.v.row_mut(r).copy_from_slice(&linear_forward(&attn_norm, &w.attn_wv)); // [C]
    let mut attn_out = vec![0.0; H * D];
    for h in 0..H {
        let head = h * D..(h + 1) * D;
        // how much each head looks at each position up to this one
        let looked_at = b * T..=b * T + t;
        let attn_logits: Vec<f64> = looked_at
            .clone()
            .map(|u| dot(&q[head.clone()], &tap.k.row(u)[head.clone()]) / (D as f64).sqrt())
            .collect(); // [t+1]
        let attn_weights = softmax_forward(&attn_logits); // [t+1]
        // what it sees there, heads side by side
        for (u, weight) in looked_at.zip(&attn_weights) {
            add(&mut attn_out[head.clone()], *weight, &tap.v.row(u)[head.clone()]); // [C]
        }
        let row = (b * H + h) * T + t;
        tap.attn_logits.row_mut(row)[..=t].copy_from_slice(&attn_logits);
        tap.attn_weights.row_mut(row)[..=t].copy_from_slice(&attn_weights);
    }
    // residual
    let mut attn_res = linear_forward(&attn_out, &w.attn_wo);
    add(&mut attn_res, 1.0, x); // [C]
    tap.attn_norm.row_mut(r).copy_from_slice(&attn_norm);
    tap.q.row_mut(r).copy_from_slice(&q);
    tap.attn_out.row_mut(r).copy_from_slice(&attn_out);
    tap.attn_res.row_mut(r).copy_from_slice(&attn_res);
    attn_res
}

/// dx = rmsnorm_backward(w^T . (dq, dk, dv)) + dattn_res
///
/// Positions go from the last to the first, so that dk and dv of this one are complete: every later
/// position has added to them.
fn attention_backward(
    dattn_res: &[f64], x: &[f64], w: &Layer, dw: &mut Layer, b: usize, t: usize, T: usize,
    c: &Config, tap: &LayerTap, dtap: &mut LayerTap,
) -> Vec<f64> {
    let (H, D, r) = (c.n_head, c.n_embd / c.n_head, b * T + t);
    // residual
    // forward: attn_res = attn_wo . attn_out + x
    let dattn_out = linear_backward(dattn_res, tap.attn_out.row(r), &w.attn_wo, &mut dw.attn_wo);
    for h in 0..H {
        let (head, row) = (h * D..(h + 1) * D, (b * H + h) * T + t);
        let attn_weights = &tap.attn_weights.row(row)[..=t]; // [t+1]
        let looked_at = b * T..=b * T + t;
        // what it sees there, heads side by side
        // forward: attn_out = attn_weights . v
        let dout = &dattn_out[head.clone()]; // [D]
        let dattn_weights: Vec<f64> =
            looked_at.clone().map(|u| dot(dout, &tap.v.row(u)[head.clone()])).collect(); // [t+1]
        for (u, weight) in looked_at.clone().zip(attn_weights) {
            add(&mut dtap.v.row_mut(u)[head.clone()], *weight, dout); // [D]
        }
        // how much each head looks at each position up to this one
        // forward: attn_weights = softmax(attn_logits)
        let dattn_logits = softmax_backward(&dattn_weights, attn_weights); // [t+1]
        // forward: attn_logits = q . k / sqrt(D)
        for (u, dlogit) in looked_at.zip(&dattn_logits) {
            let dscore = dlogit / (D as f64).sqrt();
            add(&mut dtap.q.row_mut(r)[head.clone()], dscore, &tap.k.row(u)[head.clone()]);
            add(&mut dtap.k.row_mut(u)[head.clone()], dscore, &tap.q.row(r)[head.clone()]);
        }
        dtap.attn_weights.row_mut(row)[..=t].copy_from_slice(&dattn_weights);
        dtap.attn_logits.row_mut(row)[..=t].copy_from_slice(&dattn_logits);
    }
    // queries, keys and values
    // forward: q, k, v = attn_wq, attn_wk, attn_wv . attn_norm
    let attn_norm = tap.attn_norm.row(r);
    let mut dattn_norm = linear_backward(dtap.q.row(r), attn_norm, &w.attn_wq, &mut dw.attn_wq);
    let dnorm_k = linear_backward(dtap.k.row(r), attn_norm, &w.attn_wk, &mut dw.attn_wk); // [C]
    let dnorm_v = linear_backward(dtap.v.row(r), attn_norm, &w.attn_wv, &mut dw.attn_wv); // [C]
    add(&mut dattn_norm, 1.0, &dnorm_k);
    add(&mut dattn_norm, 1.0, &dnorm_v); // [C]
    // forward: attn_norm = rmsnorm(x), and x goes on to the residual
    let mut dx = rmsnorm_backward(&dattn_norm, attn_norm, x, c.norm_eps);
    add(&mut dx, 1.0, dattn_res); // [C]
    dtap.attn_res.row_mut(r).copy_from_slice(dattn_res);
    dtap.attn_out.row_mut(r).copy_from_slice(&dattn_out);
    dtap.attn_norm.row_mut(r).copy_from_slice(&dattn_norm);
    dx
}

/// mlp_res = mlp_fc2 . activation(mlp_fc1 . rmsnorm(x)) + x
fn mlp_forward(x: &[f64], w: &Layer, r: usize, c: &Config, tap: &mut LayerTap) -> Vec<f64> {
    let mlp_norm = rmsnorm_forward(x, c.norm_eps); // [C]
    let mlp_pre = linear_forward(&mlp_norm, &w.mlp_fc1); // [F]
    let mlp_act = activation_forward(&mlp_pre, c.activation); // [F]
    // residual
    let mut mlp_res = linear_forward(&mlp_act, &w.mlp_fc2);
    add(&mut mlp_res, 1.0, x); // [C]
    tap.mlp_norm.row_mut(r).copy_from_slice(&mlp_norm);
    tap.mlp_pre.row_mut(r).copy_from_slice(&mlp_pre);
    tap.mlp_act.row_mut(r).copy_from_slice(&mlp_act);
    tap.mlp_res.row_mut(r).copy_from_slice(&mlp_res);
    mlp_res
}

/// dx = rmsnorm_backward(mlp_fc1^T . activation_backward(mlp_fc2^T . dmlp_res)) + dmlp_res
fn mlp_backward(
    dmlp_res: &[f64], w: &Layer, dw: &mut Layer, r: usize, c: &Config, tap: &LayerTap,
    dtap: &mut LayerTap,
) -> Vec<f64> {
    // residual
    // forward: mlp_res = mlp_fc2 . mlp_act + x
    let mlp_act = tap.mlp_act.row(r);
    let dmlp_act = linear_backward(dmlp_res, mlp_act, &w.mlp_fc2, &mut dw.mlp_fc2); // [F]
    // forward: mlp_act = activation(mlp_pre)
    let dmlp_pre = activation_backward(&dmlp_act, tap.mlp_pre.row(r), c.activation); // [F]
    // forward: mlp_pre = mlp_fc1 . mlp_norm
    let mlp_norm = tap.mlp_norm.row(r);
    let dmlp_norm = linear_backward(&dmlp_pre, mlp_norm, &w.mlp_fc1, &mut dw.mlp_fc1); // [C]
    // forward: mlp_norm = rmsnorm(x), and x goes on to the residual
    let mut dx = rmsnorm_backward(&dmlp_norm, mlp_norm, tap.attn_res.row(r), c.norm_eps);
    add(&mut dx, 1.0, dmlp_res); // [C]
    dtap.mlp_res.row_mut(r).copy_from_slice(dmlp_res);
    dtap.mlp_act.row_mut(r).copy_from_slice(&dmlp_act);
    dtap.mlp_pre.row_mut(r).copy_from_slice(&dmlp_pre);
    dtap.mlp_norm.row_mut(r).copy_from_slice(&dmlp_norm);
    dx
}

/// logits = lm_head . blocks(rmsnorm(wte[token] + wpe[position]))
fn gpt_forward(
    token: usize, b: usize, t: usize, T: usize, params: &Params, c: &Config, tap: &mut Tap,
) {
    let r = b * T + t;
    let mut res = params.wte.row(token).to_vec();
    add(&mut res, 1.0, params.wpe.row(t));
    tap.emb.row_mut(r).copy_from_slice(&res); // [C]
    if let Some(emb_norm) = &mut tap.emb_norm {
        res = rmsnorm_forward(&res, c.norm_eps);
        emb_norm.row_mut(r).copy_from_slice(&res); // [C]
    }
    for (w, tap_i) in params.layers.iter().zip(&mut tap.layers) {
        res = attention_forward(&res, w, b, t, T, c, tap_i); // [C]
        res = mlp_forward(&res, w, r, c, tap_i); // [C]
    }
    let lm_head = params.lm_head.as_ref().unwrap_or(&params.wte);
    tap.logits.row_mut(r).copy_from_slice(&linear_forward(&res, lm_head)); // [V]
}

/// dwte[token] += demb, dwpe[position] += demb
fn gpt_backward(
    token: usize, b: usize, t: usize, T: usize, params: &Params, dparams: &mut Params, c: &Config,
    tap: &Tap, dtap: &mut Tap,
) {
    let r = b * T + t;
    // forward: logits = lm_head . res
    let res = tap.layers[c.n_layer - 1].mlp_res.row(r);
    let lm_head = params.lm_head.as_ref().unwrap_or(&params.wte);
    let dlm_head = dparams.lm_head.as_mut().unwrap_or(&mut dparams.wte);
    let mut dres = linear_backward(dtap.logits.row(r), res, lm_head, dlm_head); // [C]
    for i in (0..c.n_layer).rev() {
        let (w, dw) = (&params.layers[i], &mut dparams.layers[i]);
        let (tap_i, dtap_i) = (&tap.layers[i], &mut dtap.layers[i]);
        let x = match i {
            0 => tap.emb_norm.as_ref().unwrap_or(&tap.emb),
            _ => &tap.layers[i - 1].mlp_res,
        };
        dres = mlp_backward(&dres, w, dw, r, c, tap_i, dtap_i); // [C]
        dres = attention_backward(&dres, x.row(r), w, dw, b, t, T, c, tap_i, dtap_i); // [C]
    }
    if let (Some(emb_norm), Some(demb_norm)) = (&tap.emb_norm, &mut dtap.emb_norm) {
        demb_norm.row_mut(r).copy_from_slice(&dres);
        dres = rmsnorm_backward(&dres, emb_norm.row(r), tap.emb.row(r), c.norm_eps); // [C]
    }
    dtap.emb.row_mut(r).copy_from_slice(&dres);
    // forward: emb = wte[token] + wpe[position]
    add(dparams.wte.row_mut(token), 1.0, &dres);
    add(dparams.wpe.row_mut(t), 1.0, &dres);
}

/// loss_t = -log(softmax(logits)[target]), as log(sum(exp(x))) - x[target] with x <= 0
fn cross_entropy_forward(logits: &[f64], target: usize) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps_sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
    exps_sum.ln() - (logits[target] - largest)
}

/// dlogits = dloss_t * (softmax(logits) - [target])
fn cross_entropy_backward(dloss_t: f64, logits: &[f64], target: usize) -> Vec<f64> {
    let mut dlogits = softmax_forward(logits);
    dlogits[target] -= 1.0;
    dlogits.iter().map(|dlogit| dloss_t * dlogit).collect() // [V]
}

/// loss = mean over documents of the mean over positions of loss_t
fn loss_forward(docs: &[Vec<usize>], T: usize, params: &Params, c: &Config, tap: &mut Tap) {
    for (b, tokens) in docs.iter().enumerate() {
        let n = tokens.len() - 1;
        for t in 0..n {
            let r = b * T + t;
            gpt_forward(tokens[t], b, t, T, params, c, tap);
            let loss_t = cross_entropy_forward(tap.logits.row(r), tokens[t + 1]);
            tap.loss_t.data[r] = loss_t;
            tap.loss.data[0] += loss_t / (n * docs.len()) as f64;
        }
    }
}

/// dloss = 1, dloss_t = 1 / (n B)
fn loss_backward(
    docs: &[Vec<usize>], T: usize, params: &Params, dparams: &mut Params, c: &Config, tap: &Tap,
    dtap: &mut Tap,
) {
    dtap.loss.data[0] = 1.0;
    for (b, tokens) in docs.iter().enumerate() {
        let n = tokens.len() - 1;
        for t in (0..n).rev() {
            let r = b * T + t;
            let dloss_t = 1.0 / (n * docs.len()) as f64;
            let dlogits = cross_entropy_backward(dloss_t, tap.logits.row(r), tokens[t + 1]);
            dtap.loss_t.data[r] = dloss_t;
            dtap.logits.row_mut(r).copy_from_slice(&dlogits); // [V]
            gpt_backward(tokens[t], b, t, T, params, dparams, c, tap, dtap);
        }
    }
}

/// s = x_0 y_0 + x_1 y_1 + .. + x_n-1 y_n-1
fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x_i, y_i)| x_i * y_i).sum()
}

/// y += factor x
fn add(y: &mut [f64], factor: f64, x: &[f64]) {
    for (y_i, x_i) in y.iter_mut().zip(x) {
        *y_i += factor * x_i;
    }
}

// ---- Adam ----

/// factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters
fn clip(grads: &mut Params, longest: f64) -> f64 {
    let squares: f64 = grads.named().iter().map(|(_, g)| dot(&g.data, &g.data)).sum();
    if longest > 0.0 && squares.sqrt() > longest { longest / squares.sqrt() } else { 1.0 }
}

/// p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), steps counted from 1
fn adam(
    params: &mut Params, grads: &mut Params, ms: &mut Params, vs: &mut Params, step: i32,
    lr_t: f64, c: &Config,
) {
    let (correction1, correction2) = (1.0 - c.beta1.powi(step), 1.0 - c.beta2.powi(step));
    let factor = clip(grads, c.grad_clip);
    let (grads, mut ms, mut vs) = (grads.named(), ms.named(), vs.named());
    for (k, (_, p)) in params.named().into_iter().enumerate() {
        let (g, m, v) = (&grads[k].1.data, &mut ms[k].1.data, &mut vs[k].1.data);
        for i in 0..g.len() {
            let grad = factor * g[i];
            m[i] = c.beta1 * m[i] + (1.0 - c.beta1) * grad;
            v[i] = c.beta2 * v[i] + (1.0 - c.beta2) * grad * grad;
            let (m_hat, v_hat) = (m[i] / correction1, v[i] / correction2);
            let moved = m_hat / (v_hat.sqrt() + c.adam_eps) + c.weight_decay * p.data[i];
            p.data[i] -= lr_t * moved;
        }
    }
}

// ---- some steps of training ----

fn config(given: &Tensors) -> Result<Config, String> {
    let number = |name: &str| Ok::<_, String>(find(given, &format!("config/{name}"))?.data[0]);
    let count = |name: &str| Ok::<_, String>(number(name)? as usize);
    Ok(Config {
        n_layer: count("n_layer")?,
        n_embd: count("n_embd")?,
        n_head: count("n_head")?,
        block_size: count("block_size")?,
        vocab_size: count("vocab_size")?,
        norm_embedding: number("norm_embedding")? == 1.0,
        tie_lm_head: number("tie_lm_head")? == 1.0,
        activation: count("activation")?,
        norm_eps: number("norm_eps")?,
        beta1: number("beta1")?,
        beta2: number("beta2")?,
        adam_eps: number("adam_eps")?,
        weight_decay: number("weight_decay")?,
        grad_clip: number("grad_clip")?,
    })
}

fn train(input: &str, output: &str) -> Result<(), String> {
    let given = read_tensors(input)?;
    let c = config(&given)?;
    let first = find(&given, "config/first_step")?.data[0] as i32;
    let steps = find(&given, "config/steps")?.data[0] as i32;
    let (mut params, mut m, mut v) = (Params::zeros(&c), Params::zeros(&c), Params::zeros(&c));
    let entries = [(&mut params, "entry"), (&mut m, "entry_m"), (&mut v, "entry_v")];
    for (tensors, phase) in entries {
        for (name, tensor) in tensors.named() {
            *tensor = find(&given, &format!("step{first}/{phase}/{name}"))?.clone();
        }
    }
    let mut all = Tensors::new();
    for step in first..first + steps {
        let tokens = find(&given, &format!("step{step}/batch/tokens"))?;
        let (B, T) = (tokens.shape[0], tokens.shape[1] - 1);
        let ids = |b| tokens.row(b).iter().filter(|id| **id >= 0.0).map(|id| *id as usize);
        let docs: Vec<Vec<usize>> = (0..B).map(|b| ids(b).collect()).collect();
        let (mut tap, mut dtap) = (Tap::zeros(&c, B, T), Tap::zeros(&c, B, T));
        let mut dparams = Params::zeros(&c);
        loss_forward(&docs, T, &params, &c, &mut tap);
        loss_backward(&docs, T, &params, &mut dparams, &c, &tap, &mut dtap);
        let lr_t = find(&given, &format!("step{step}/learning_rate"))?.data[0];
        adam(&mut params, &mut dparams, &mut m, &mut v, step, lr_t, &c);
        println!("step {step}: loss {:.6}", tap.loss.data[0]);
        for (tensors, phase) in [(tap, "forward/"), (dtap, "backward/d")] {
            for (name, tensor) in tensors.named() {
                all.insert(format!("step{step}/{phase}{name}"), tensor);
            }
        }
        let by_parameter = [
            (&mut dparams, "gradient/d"),
            (&mut m, "adam_m/"),
            (&mut v, "adam_v/"),
            (&mut params, "params/"),
        ];
        for (tensors, phase) in by_parameter {
            for (name, tensor) in tensors.named() {
                all.insert(format!("step{step}/{phase}{name}"), tensor.clone());
            }
        }
    }
    write_tensors(output, &all)
}

fn main() {
    let words: Vec<String> = env::args().collect();
    let [_, input, output] = &words[..] else {
        eprintln!("usage: microgpt NAME.in.safetensors NAME.out.safetensors");
        process::exit(1);
    };
    if let Err(message) = train(input, output) {
        eprintln!("{message}");
        process::exit(1);
    }
}

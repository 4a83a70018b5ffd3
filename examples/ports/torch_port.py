"""microgpt in PyTorch: autograd in the place of every backward pass, AdamW of every update.

    python torch_port.py NAME.in.safetensors NAME.out.safetensors

It shares no line with scalar/ or vectorized/, so that its agreement with them is a witness. The
files are those of crosscheck/GUIDE.md. B = documents, T = positions, C = n_embd, H = n_head,
D = C / H, F = 4 C, V = vocabulary. At the end of a line: (its shape).
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, log_softmax

Tensors = dict[str, Tensor]


def rmsnorm(x: Tensor, eps: float) -> Tensor:
    """y = x * (mean(x * x) + eps) ** -0.5"""
    return x * ((x * x).mean(-1, keepdim=True) + eps) ** -0.5  # (.., n) -> (.., n)


def activation(x: Tensor, which: float) -> Tensor:
    """y = relu(x), relu(x) ** 2, or gelu in its tanh form"""
    if which == 2:
        return gelu(x, approximate="tanh")  # (.., n) -> (.., n)
    return x.relu() ** 2 if which == 1 else x.relu()  # (.., n) -> (.., n)


def forward(tokens: Tensor, params: Tensors, config: dict[str, float]) -> Tensors:
    """Everything from emb to loss under its name, the gradient of each kept by autograd.

    tokens    (B, T + 1), -1 where a document has ended
    """
    H, eps = int(config["n_head"]), config["norm_eps"]
    B, T = tokens.shape[0], tokens.shape[1] - 1
    inputs, targets, there = tokens[:, :-1].clamp(min=0), tokens[:, 1:], tokens[:, 1:] >= 0
    later = torch.ones(T, T, dtype=torch.bool).triu(1)  # (T, U), what a position may not look at
    taps: Tensors = {}

    def tap(name: str, x: Tensor) -> Tensor:
        x.retain_grad()
        taps[name] = x
        return x

    def heads(x: Tensor) -> Tensor:
        return x.reshape(B, T, H, -1).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    x = tap("emb", params["wte"][inputs] + params["wpe"][:T])  # (B, T, C)
    if config["norm_embedding"]:
        x = tap("emb_norm", rmsnorm(x, eps))  # (B, T, C)
    for i in range(int(config["n_layer"])):
        own = f"layer{i}."
        # queries, keys and values
        attn_norm = tap(own + "attn_norm", rmsnorm(x, eps))  # (B, T, C)
        q = tap(own + "q", attn_norm @ params[own + "attn_wq"].T)  # (B, T, C)
        k = tap(own + "k", attn_norm @ params[own + "attn_wk"].T)  # (B, T, C)
        v = tap(own + "v", attn_norm @ params[own + "attn_wv"].T)  # (B, T, C)
        # how much each head looks at each position up to this one
        scores = heads(q) @ heads(k).mT / heads(q).shape[-1] ** 0.5  # (B, H, T, U)
        attn_logits = tap(own + "attn_logits", scores.masked_fill(later, 0.0))  # (B, H, T, U)
        masked = attn_logits.masked_fill(later, -torch.inf)  # (B, H, T, U)
        attn_weights = tap(own + "attn_weights", masked.softmax(-1))  # (B, H, T, U)
        # what it sees there, heads side by side
        seen = (attn_weights @ heads(v)).transpose(1, 2)  # (B, T, H, D)
        attn_out = tap(own + "attn_out", seen.reshape(B, T, -1))  # (B, T, C)
        # residual
        attn_res = tap(own + "attn_res", attn_out @ params[own + "attn_wo"].T + x)  # (B, T, C)
        mlp_norm = tap(own + "mlp_norm", rmsnorm(attn_res, eps))  # (B, T, C)
        mlp_pre = tap(own + "mlp_pre", mlp_norm @ params[own + "mlp_fc1"].T)  # (B, T, F)
        mlp_act = tap(own + "mlp_act", activation(mlp_pre, config["activation"]))  # (B, T, F)
        # residual
        x = tap(own + "mlp_res", mlp_act @ params[own + "mlp_fc2"].T + attn_res)  # (B, T, C)
    lm_head = params["wte"] if config["tie_lm_head"] else params["lm_head"]
    logits = tap("logits", x @ lm_head.T)  # (B, T, V)
    chosen = log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]  # (B, T)
    loss_t = tap("loss_t", torch.where(there, -chosen, 0.0))  # (B, T)
    doc_losses = loss_t.sum(-1) / there.sum(-1)  # (B,)
    tap("loss", doc_losses.mean())  # ()
    return taps


def clip(params: Tensors, longest: float) -> None:
    """grad = grad * min(1, longest / length). PyTorch's own clipping adds 1e-6 to the length."""
    length = sum((p.grad * p.grad).sum() for p in params.values()) ** 0.5
    if length > longest > 0:
        for p in params.values():
            p.grad *= longest / length


def main(given: str, out: str) -> None:
    tensors = load_file(given)
    config = {
        name.removeprefix("config/"): x.item()
        for name, x in tensors.items()
        if name.startswith("config/")
    }
    first = int(config["first_step"])
    entry = f"step{first}/entry/"
    names = [name.removeprefix(entry) for name in tensors if name.startswith(entry)]
    params = {name: tensors[entry + name].requires_grad_() for name in names}
    optimizer = torch.optim.AdamW(
        params.values(),
        betas=(config["beta1"], config["beta2"]),
        eps=config["adam_eps"],
        weight_decay=config["weight_decay"],
    )
    for name, p in params.items():
        m, v = (tensors[f"step{first}/{phase}/{name}"] for phase in ("entry_m", "entry_v"))
        optimizer.state[p] = {"step": torch.tensor(first - 1.0), "exp_avg": m, "exp_avg_sq": v}
    written: Tensors = {}
    for step in range(first, first + int(config["steps"])):

        def write(phase: str, some: Tensors, step: int = step) -> None:
            for name, x in some.items():
                written[f"step{step}/{phase}{name}"] = x.detach().clone().contiguous()

        optimizer.zero_grad()
        taps = forward(tensors[f"step{step}/batch/tokens"], params, config)
        taps["loss"].backward()
        write("forward/", taps)
        write("backward/d", {name: tap.grad for name, tap in taps.items()})
        write("gradient/d", {name: p.grad for name, p in params.items()})
        clip(params, config["grad_clip"])
        optimizer.param_groups[0]["lr"] = tensors[f"step{step}/learning_rate"].item()
        optimizer.step()
        write("adam_m/", {name: optimizer.state[p]["exp_avg"] for name, p in params.items()})
        write("adam_v/", {name: optimizer.state[p]["exp_avg_sq"] for name, p in params.items()})
        write("params/", params)
        print(f"step {step}: loss {taps['loss'].item():.6f}")
    save_file(written, out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python torch_port.py NAME.in.safetensors NAME.out.safetensors")
    torch.set_num_threads(1)
    main(*sys.argv[1:])

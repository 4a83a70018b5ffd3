"""Adam in plain numbers: one parameter at a time."""

from __future__ import annotations

from microgpt.config import Config
from scalar.value import Value


def clip(params: list[Value], longest: float) -> float:
    """factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters"""
    squares = 0.0
    for p in params:
        squares += p.grad * p.grad
    return min(1.0, longest / (squares**0.5)) if squares > 0 else 1.0


def adam(
    params: list[Value], m: list[float], v: list[float], step: int, lr_t: float, config: Config
) -> None:
    """p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), in place

    m, v    running means of the gradient and of its square, one number per parameter
    step    how many updates came before this one
    lr_t    this step's learning rate

    The gradient of a parameter p is p.grad. Sources: Kingma and Ba, "Adam: a method for stochastic
    optimization" (2015), algorithm 1; for the weight decay, times the learning rate here,
    Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
    """
    beta1, beta2 = config.beta1, config.beta2
    correction1 = 1 - beta1 ** (step + 1)
    correction2 = 1 - beta2 ** (step + 1)
    factor = clip(params, config.grad_clip) if config.grad_clip else 1.0
    for i, p in enumerate(params):
        grad = factor * p.grad
        m[i] = beta1 * m[i] + (1 - beta1) * grad
        v[i] = beta2 * v[i] + (1 - beta2) * grad**2
        m_hat = m[i] / correction1
        v_hat = v[i] / correction2
        p.data *= 1 - lr_t * config.weight_decay
        p.data -= lr_t * m_hat / (v_hat**0.5 + config.adam_eps)

"""Adam in arrays: all parameters at once.

Same as scalar:         the rule, line for line.
Different from scalar:  one parameter after another -> one array that holds them all.
"""

from __future__ import annotations

from microgpt.config import Config
from vectorized.model import Array


def clip(grads: Array, longest: float) -> float:
    """factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters"""
    squares = float(grads @ grads)
    return min(1.0, longest / (squares**0.5)) if squares > 0 else 1.0


def adam(
    params: Array, grads: Array, m: Array, v: Array, step: int, lr_t: float, config: Config
) -> None:
    """p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), in place

    m, v    running means of the gradient and of its square: (P,), as params and grads
    step    how many updates came before this one
    lr_t    this step's learning rate

    The gradients come clipped: see Backend.update. Sources: Kingma and Ba, "Adam: a method for
    stochastic optimization" (2015), algorithm 1; for the weight decay, times the learning rate
    here, Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2.
    """
    beta1, beta2 = config.beta1, config.beta2
    correction1 = 1 - beta1 ** (step + 1)
    correction2 = 1 - beta2 ** (step + 1)
    m[:] = beta1 * m + (1 - beta1) * grads  # (P,)
    v[:] = beta2 * v + (1 - beta2) * grads**2  # (P,)
    m_hat = m / correction1  # (P,)
    v_hat = v / correction2  # (P,)
    if config.weight_decay:
        params *= 1 - lr_t * config.weight_decay
    params -= lr_t * m_hat / (v_hat**0.5 + config.adam_eps)

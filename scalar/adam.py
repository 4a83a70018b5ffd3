"""Adam in plain numbers: one parameter at a time."""

from __future__ import annotations

from microgpt.config import Config
from scalar.value import Value


def adam(
    params: list[Value], m: list[float], v: list[float], step: int, lr_t: float, config: Config
) -> None:
    """p = p - lr_t * m_hat / (sqrt(v_hat) + eps), from the gradients in params, in place

    m, v    running means of the gradient and of its square, one number per parameter
    step    how many updates came before this one
    lr_t    this step's learning rate

    Source: Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1.
    """
    beta1, beta2 = config.beta1, config.beta2
    correction1 = 1 - beta1 ** (step + 1)
    correction2 = 1 - beta2 ** (step + 1)
    for i, p in enumerate(params):
        m[i] = beta1 * m[i] + (1 - beta1) * p.grad
        v[i] = beta2 * v[i] + (1 - beta2) * p.grad**2
        m_hat = m[i] / correction1
        v_hat = v[i] / correction2
        p.data -= lr_t * m_hat / (v_hat**0.5 + config.adam_eps)

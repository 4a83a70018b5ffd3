"""Adam in arrays: all parameters at once, in the one buffer that holds them.

Same as scalar:         the rule.
Different from scalar:  one parameter after another -> one buffer; the bias corrections are applied
                        to the learning rate and to eps.
"""

from __future__ import annotations

import numpy as np

from microgpt.config import Config
from vectorized.arrays import Array, numbers


def clip(grads: Array, longest: float) -> float:
    """factor = min(1, longest / sqrt(sum(g * g))), over the gradients of all parameters"""
    squares = float(grads.dot(grads))
    return min(1.0, longest / (squares**0.5)) if squares > 0 else 1.0


def adam(
    params: Array,
    grads: Array,
    m: Array,
    v: Array,
    step: int,
    lr_t: float,
    config: Config,
    scratch: Array,
) -> None:
    """p = p - lr_t * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), in place

    m, v       running means of the gradient and of its square, (P,) as params and grads
    step       how many updates came before this one
    lr_t       this step's learning rate
    scratch    (P,), for what is computed in between

    The corrections m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t), t = step + 1, are
    applied to the two numbers lr_t and eps, which spares two passes over the parameters:
    lr_t m_hat / (sqrt(v_hat) + eps) = lr_t c / (1 - beta1^t) m / (sqrt(v) + c eps), where
    c = sqrt(1 - beta2^t).

    Sources: Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1 and
    the remark on efficiency beneath it; for the weight decay, Loshchilov and Hutter, "Decoupled
    weight decay regularization" (2019), algorithm 2.
    """
    beta1, beta2 = config.beta1, config.beta2
    correction1 = 1 - beta1 ** (step + 1)
    c = (1 - beta2 ** (step + 1)) ** 0.5
    if config.grad_clip:
        grads = clip(grads, config.grad_clip) * grads
    kept1, new1, kept2, new2 = numbers(m.dtype, beta1, 1 - beta1, beta2, 1 - beta2)
    m *= kept1
    m += np.multiply(new1, grads, out=scratch)
    squares = np.multiply(grads, grads, out=scratch)
    squares *= new2
    v *= kept2
    v += squares
    denominator = np.sqrt(v, out=scratch)
    denominator += c * config.adam_eps
    change = np.divide(m, denominator, out=scratch)
    change *= lr_t * c / correction1
    if config.weight_decay:
        params *= 1 - lr_t * config.weight_decay
    params -= change

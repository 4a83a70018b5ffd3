"""A number that keeps its operands and local derivatives, so that it can be differentiated.

operation   value            local derivatives
a + b       a + b            1, 1
a * b       a b              b, a
a ** n      a^n              n a^(n-1)                n is a plain number
log(a)      ln a             1 / a
exp(a)      e^a              e^a
relu(a)     max(0, a)        1 where a > 0, else 0
tanh(a)     tanh a           1 - tanh(a)^2
total(x)    x_0 + x_1 + ..   1, 1, ..
dot(x, y)   x_0 y_0 + ..     y_0, y_1, .., x_0, x_1, ..

Everything else (-a, a - b, a / b) is written with these operations, and needs no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add, mul


class Value:
    """A number, its operands (children), and its derivative with respect to each operand."""

    __slots__ = ("_children", "_local_grads", "data", "grad")

    def __init__(
        self,
        data: float,
        children: tuple[Value, ...] = (),
        local_grads: tuple[float, ...] | None = (),
    ) -> None:
        self.data = data  # found in the forward pass
        self.grad = 0.0  # d(loss) / d(self), found by backward()
        self._children = children
        self._local_grads = local_grads  # d(self) / d(child), one per child

    def __repr__(self) -> str:
        return f"Value(data={self.data!r}, grad={self.grad!r})"

    def __add__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return Value(self.data + other.data, (self, other), (1.0, 1.0))
        return Value(self.data + other, (self,), (1.0,))

    def __mul__(self, other: Value | float) -> Value:
        if isinstance(other, Value):
            return Value(self.data * other.data, (self, other), (other.data, self.data))
        return Value(self.data * other, (self,), (other,))

    def __pow__(self, exponent: float) -> Value:
        return Value(self.data**exponent, (self,), (exponent * self.data ** (exponent - 1),))

    def log(self) -> Value:
        if self.data <= 0:
            raise FloatingPointError(
                f"the logarithm of {self.data!r}: a probability has shrunk to nothing"
            )
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def exp(self) -> Value:
        exp = math.exp(self.data)
        return Value(exp, (self,), (exp,))

    def relu(self) -> Value:
        return Value(max(0.0, self.data), (self,), (float(self.data > 0),))

    def tanh(self) -> Value:
        tanh = math.tanh(self.data)
        return Value(tanh, (self,), (1 - tanh * tanh,))

    def __neg__(self) -> Value:
        return self * -1

    def __sub__(self, other: Value | float) -> Value:
        return self + (-other)

    def __truediv__(self, other: Value | float) -> Value:
        return self * other**-1

    def __radd__(self, other: float) -> Value:
        return self + other

    def __rmul__(self, other: float) -> Value:
        return self * other

    def __rsub__(self, other: float) -> Value:
        return (-self) + other

    def __rtruediv__(self, other: float) -> Value:
        return self**-1 * other

    def backward(self) -> None:
        """v.grad += d(self) / d(v) for every v that self depends on: the chain rule, self first.

        A leaf (a value without operands, such as a parameter) adds to the gradient it holds, so
        that several graphs can share a leaf. A graph runs backward once.

        Raises RuntimeError if backward() has already run through a part of the graph.
        """
        order = self._topological_order()
        self.grad = 1.0
        for value in reversed(order):
            for child, local_grad in zip(value._children, value._local_grads or ()):
                child.grad += local_grad * value.grad
            value._local_grads = None  # a second run is refused

    def _topological_order(self) -> list[Value]:
        """Every value with children that self depends on, each after all of its children.

        The depth-first post-order, operands from left to right. An explicit stack replaces
        recursion, which Python limits to a depth of about a thousand calls.
        """
        order: list[Value] = []
        seen: set[Value] = set()
        stack: list[Value | None] = [self]
        while stack:
            value = stack.pop()
            if value is None:  # a mark: the value under it comes after its children
                order.append(stack.pop())  # type: ignore[arg-type]
            elif value not in seen:
                if value._local_grads is None:
                    raise RuntimeError(TWICE)
                seen.add(value)
                if value._children:
                    stack += (value, None)
                    if not seen.issuperset(value._children):  # quicker than to ask each
                        stack += reversed(value._children)
        return order


TWICE = (
    "backward() has already run through a part of this graph. Run again, it would add to the "
    "gradients that the first run left inside the graph, and count them twice: with a = 3 x, "
    "backward() of 5 a and then of 7 a gives dx = 51, where the derivative is 36. "
    "Add the losses up and call backward() once, or build the graph again."
)


def total(x: Sequence[Value]) -> Value:
    """s = x_0 + x_1 + .. + x_n-1, left to right, as one value."""
    return Value(reduce(add, [x_i.data for x_i in x]), tuple(x), (1.0,) * len(x))


def mean(x: Sequence[Value]) -> Value:
    """s = 1/n * (x_0 + x_1 + .. + x_n-1)"""
    return (1 / len(x)) * total(x)


def dot(x: Sequence[Value], y: Sequence[Value]) -> Value:
    """s = x_0 y_0 + x_1 y_1 + .. + x_n-1 y_n-1, left to right, as one value.

    The digits are those of the sum of products written out. The built-in sum() has other digits:
    from Python 3.12 on, sum() of floats makes up for rounding errors.
    """
    x_data = [x_i.data for x_i in x]
    y_data = [y_i.data for y_i in y]
    return Value(reduce(add, map(mul, x_data, y_data)), (*x, *y), (*y_data, *x_data))

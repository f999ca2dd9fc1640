"""What a backward pass does when it has added to the gradient of a parameter.

Python's garbage collector does not look into the hooks of tensors. A hook that holds its own parameter, even by way of the optimizer,
is never freed; so hooks here hold neither.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

from torch import Tensor, nn


def accumulate_in(gradient: Tensor, parameter: nn.Parameter) -> None:
    """Let backward passes add to ``gradient``: directly if the type allows, else by a hook.

    Args:
        gradient: in the parameter's shape.
    """
    if parameter.dtype == gradient.dtype:
        parameter.grad = gradient
        return

    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient.add_(parameter.grad)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(move)


def call_when_accumulated(method: Callable[[Tensor], None], parameter: nn.Parameter) -> None:
    """Call a method with the parameter after each backward pass that adds to its gradient, as long as the method's object lives."""
    reference = WeakMethod(method)

    def call(parameter: Tensor) -> None:
        if (alive := reference()) is not None:
            alive(parameter)

    parameter.register_post_accumulate_grad_hook(call)

"""Build the derivative of a declared op (`fastlm.operator`) from its backward's parameter names.

    outputs="y h? rstd"     the results. A question mark: the result is empty where it is not
                            computed, and its gradient is None there.
    backward=               a declared op, or a function that calls one. Its parameters, by name:
        dy or d_y           the gradient of the result y;
        need_x              whether the input x needs a gradient;
        x, rstd             an input, a result, or a value of `saves`; saved in the forward.
    gradients=              the inputs whose gradients it returns, in this order; a tuple of names
                            where several inputs have the same gradient.
    saves={"h": function}   a value to save under this name. The function gets inputs, results and
                            need_<input> by name, in the forward.
    zeros_like={"dy": "h"}  a missing gradient of y is zeros like the saved tensor h.
    non_differentiable=     the results without a derivative.

A missing gradient without an entry in `zeros_like` is None where the parameter's annotation allows
None, and otherwise zeros. Where only one result has a gradient and it is missing, the backward does
not run and all gradients are None.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """Return a function that returns these elements of a sequence as a tuple."""
    if len(positions) == 1:
        (position,) = positions
        return lambda values: (values[position],)
    return operator.itemgetter(*positions) if positions else lambda values: ()


def _last(names: Sequence[str], name: str) -> int:
    """Return the last position: a value of `saves` replaces the input or result of its name."""
    return len(names) - 1 - names[::-1].index(name)


class Derivative:
    """The setup and backward that autograd calls.

    Args:
        inputs: the definition's parameters.
        optional: those that may be None.
        outputs, ...: see the module.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        optional: Iterable[str],
        outputs: str,
        backward: Callable,
        gradients: Sequence[str | tuple[str, ...]],
        saves: Mapping[str, Callable],
        zeros_like: Mapping[str, str],
        non_differentiable: Sequence[str],
    ):
        results = outputs.replace("?", "").split()
        needs = [f"need_{name}" for name in inputs]
        parameters = inspect.signature(backward).parameters
        annotations = {name: str(p.annotation) for name, p in parameters.items()}

        values = [*inputs, *results, *saves]  # of the forward
        saved = [p for p in parameters if p in values]
        tensors = [p for p in saved if "Tensor" in annotations[p]]
        numbers = [p for p in saved if p not in tensors]
        gradient_names = {d + r: i for i, r in enumerate(results) for d in ("d", "d_")}
        incoming = {
            p: gradient_names[p] for p in parameters if p in gradient_names and p not in saved
        }
        available = [*results, *tensors, *numbers, *needs]  # to the backward; first the gradients
        positions = {name: i for i, name in enumerate(available) if i >= len(results)} | incoming
        if unknown := [p for p in parameters if p not in positions]:
            expected = ", ".join([*gradient_names, *values, *needs])
            raise TypeError(f"{backward.__name__}: expected one of {expected}, got {unknown[0]}")
        self.call = backward
        self.single = len(results) == 1
        self.tensors = _getter([_last(values, p) for p in tensors])
        self.numbers = _getter([_last(values, p) for p in numbers])
        self.order = _getter([positions[p] for p in parameters])
        self.takes_needs = any(p in needs for p in parameters)
        with_needs = [*inputs, *results, *needs]
        self.saves = [
            (f, _getter([with_needs.index(p) for p in inspect.signature(f).parameters]))
            for f in saves.values()
        ]

        empty = [i for i, name in enumerate(outputs.split()) if name.endswith("?")]
        self.empty = [i for i in incoming.values() if i in empty]
        self.zeros_like = [(gradient_names[d], positions[t]) for d, t in zeros_like.items()]
        required = [
            i for p, i in incoming.items() if "None" not in annotations[p] and p not in zeros_like
        ]
        self.materializes = len(required) > 1
        self.required = required[0] if len(required) == len(incoming) == 1 else None
        if len(required) == 1 < len(incoming):
            raise TypeError(
                f"{backward.__name__}: expected an entry of `zeros_like` for the gradient of"
                f" {results[required[0]]}, because another may come without it, got none"
            )
        self.non_differentiable = [results.index(r) for r in non_differentiable]

        index = {}  # of each input's gradient among those returned; 0 is None
        for i, names in enumerate(gradients):
            index |= dict.fromkeys((names,) if isinstance(names, str) else names, i + 1)
        self.gradient_index = [index.get(name, 0) for name in inputs]
        self.none = (None,) * (1 + len(gradients))
        # the gradient of an argument that is None must be None
        self.masked = [
            i for i, n in enumerate(inputs) if n in index and (self.takes_needs or n in optional)
        ]

    def functions(
        self, sizes: Sequence[int] | None = None, pack: Callable[[tuple], tuple] | None = None
    ) -> tuple[Callable, Callable]:
        """Return setup_context and backward of a `torch.autograd.Function`.

        The function is applied to the inputs. With `sizes`, it is applied to that number of
        arguments for each input, and `pack` makes the inputs of them.
        """
        sizes = [1] * len(self.gradient_index) if sizes is None else sizes
        per_argument = _getter([i for i, n in zip(self.gradient_index, sizes) for _ in range(n)])
        call, single, saves, materializes = self.call, self.single, self.saves, self.materializes
        tensors, numbers, order = self.tensors, self.numbers, self.order
        non_differentiable, required = self.non_differentiable, self.required
        none, masked, takes_needs = self.none, self.masked, self.takes_needs
        empty, zeros_like = self.empty, self.zeros_like

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            if pack is not None:
                inputs = pack(inputs)
            values = (*inputs, output) if single else (*inputs, *output)
            if saves:
                with_needs = values + ctx.needs_input_grad
                values += tuple([f(*arguments(with_needs)) for f, arguments in saves])
            ctx.save_for_backward(*tensors(values))
            ctx.numbers = numbers(values)
            if not materializes:
                ctx.set_materialize_grads(False)
            if non_differentiable:
                ctx.mark_non_differentiable(*[output[i] for i in non_differentiable])

        def backward(ctx: Any, *grads: Any) -> Any:
            if required is not None and grads[required] is None:
                return per_argument(none)
            values = (*grads, *ctx.saved_tensors, *ctx.numbers)
            if takes_needs:
                values += ctx.needs_input_grad
            if empty or zeros_like:
                values = fill_missing(values)
            results = call(*order(values))
            input_grads = per_argument(
                (None, *results) if type(results) is tuple else (None, results)
            )
            if not masked:
                return input_grads
            needs_grad, input_grads = ctx.needs_input_grad, [*input_grads]
            for i in masked:
                if not needs_grad[i]:
                    input_grads[i] = None
            return tuple(input_grads)

        def fill_missing(values: tuple) -> tuple:
            filled = [*values]
            for i in empty:
                if values[i] is not None and values[i].shape == (0,):
                    filled[i] = None
            for i, like in zeros_like:
                if values[i] is None:
                    filled[i] = torch.zeros_like(values[like])
            return tuple(filled)

        return setup, backward

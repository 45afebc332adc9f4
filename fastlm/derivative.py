"""The derivative of a declared op (`fastlm.operator`), from the names of its backward's parameters.

    outputs="y h? rstd"     the results; with a question mark, one that is empty where it is not
                            computed. Its gradient is None there.
    backward=               a declared op, or a function that calls one. Its parameters, by name:
        dy or d_y           the gradient of the result y;
        need_x              whether the input x needs a gradient;
        x, rstd             an input or a result, kept from the forward, or what `keeps` says.
    gradients=              the inputs whose gradients it returns, in this order; a tuple of names
                            where several inputs have the same.
    keeps={"h": function}   what is kept under this name: the function gets inputs, results and
                            need_<input> by name, in the forward.
    zeros={"dy": "h"}       a gradient of y that is missing is zeros like the kept tensor h.
    constants=              results that are not differentiable.

A missing gradient without an entry in `zeros` is None where the parameter's annotation allows that.
Otherwise it is zeros; where only one result has a gradient and that is missing, none leaves.
"""

import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple]:
    """The function that returns these elements of a sequence as a tuple."""
    if len(positions) == 1:
        (only,) = positions
        return lambda values: (values[only],)
    return operator.itemgetter(*positions) if positions else lambda values: ()


def _last(names: Sequence[str], name: str) -> int:
    """The last position: a value of `keeps` takes the place of the input or result of its name."""
    return len(names) - 1 - names[::-1].index(name)


class Derivative:
    """What autograd calls. `inputs` are the definition's parameters, `optional` those that may be
    None; for the other arguments see above.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        optional: Iterable[str],
        outputs: str,
        backward: Callable,
        gradients: Sequence[str | tuple[str, ...]],
        keeps: Mapping[str, Callable],
        zeros: Mapping[str, str],
        constants: Sequence[str],
    ):
        results = outputs.replace("?", "").split()
        needs = [f"need_{name}" for name in inputs]
        parameters = inspect.signature(backward).parameters
        kinds = {name: str(p.annotation) for name, p in parameters.items()}

        values = [*inputs, *results, *keeps]  # of the forward
        kept = [p for p in parameters if p in values]
        tensors = [p for p in kept if "Tensor" in kinds[p]]
        numbers = [p for p in kept if p not in tensors]
        of_result = {d + r: i for i, r in enumerate(results) for d in ("d", "d_")}
        incoming = {p: of_result[p] for p in parameters if p in of_result and p not in kept}
        available = [*results, *tensors, *numbers, *needs]  # to the backward; first the gradients
        at = {name: i for i, name in enumerate(available) if i >= len(results)} | incoming
        if unknown := [p for p in parameters if p not in at]:
            known = ", ".join([*of_result, *values, *needs])
            raise TypeError(f"{backward.__name__}: expected one of {known}, got {unknown[0]}")
        self.call = backward
        self.single = len(results) == 1
        self.tensors = _getter([_last(values, p) for p in tensors])
        self.numbers = _getter([_last(values, p) for p in numbers])
        self.order = _getter([at[p] for p in parameters])
        self.takes_needs = any(p in needs for p in parameters)
        with_needs = [*inputs, *results, *needs]
        self.keeps = [
            (f, _getter([with_needs.index(p) for p in inspect.signature(f).parameters]))
            for f in keeps.values()
        ]

        empty = [i for i, name in enumerate(outputs.split()) if name.endswith("?")]
        self.empty = [i for i in incoming.values() if i in empty]
        self.zeros = [(of_result[d], at[t]) for d, t in zeros.items()]
        required = [i for p, i in incoming.items() if "None" not in kinds[p] and p not in zeros]
        self.materializes = len(required) > 1
        self.required = required[0] if len(required) == len(incoming) == 1 else None
        if len(required) == 1 < len(incoming):
            raise TypeError(
                f"{backward.__name__}: expected an entry of `zeros` for the gradient of"
                f" {results[required[0]]}, as another may come alone, got none"
            )
        self.constants = [results.index(c) for c in constants]

        place = {}  # of each input's gradient; 0 is None
        for i, names in enumerate(gradients):
            place |= dict.fromkeys((names,) if isinstance(names, str) else names, i + 1)
        self.place_of = [place.get(name, 0) for name in inputs]
        self.none = (None,) * (1 + len(gradients))
        # the gradient of an argument that is None must be None
        self.masked = [
            i for i, n in enumerate(inputs) if n in place and (self.takes_needs or n in optional)
        ]

    def functions(
        self, sizes: Sequence[int] | None = None, pack: Callable[[tuple], tuple] | None = None
    ) -> tuple[Callable, Callable]:
        """setup_context and backward of a `torch.autograd.Function`. It is applied to the inputs,
        or to `sizes` arguments for each of them, of which `pack` makes the inputs."""
        sizes = [1] * len(self.place_of) if sizes is None else sizes
        places = _getter([p for p, size in zip(self.place_of, sizes) for _ in range(size)])
        call, single, keeps, materializes = self.call, self.single, self.keeps, self.materializes
        tensors, numbers, constants, order = self.tensors, self.numbers, self.constants, self.order
        required, none, masked = self.required, self.none, self.masked
        takes_needs, empty, zeros = self.takes_needs, self.empty, self.zeros

        def setup(ctx: Any, inputs: tuple, output: Any) -> None:
            if pack is not None:
                inputs = pack(inputs)
            values = (*inputs, output) if single else (*inputs, *output)
            if keeps:
                with_needs = values + ctx.needs_input_grad
                values += tuple([f(*arguments(with_needs)) for f, arguments in keeps])
            ctx.save_for_backward(*tensors(values))
            ctx.numbers = numbers(values)
            if not materializes:
                ctx.set_materialize_grads(False)
            if constants:
                ctx.mark_non_differentiable(*[output[i] for i in constants])

        def backward(ctx: Any, *grads: Any) -> Any:
            if required is not None and grads[required] is None:
                return places(none)
            values = (*grads, *ctx.saved_tensors, *ctx.numbers)
            if takes_needs:
                values += ctx.needs_input_grad
            if empty or zeros:
                values = filled(values)
            results = call(*order(values))
            placed = places((None, *results) if type(results) is tuple else (None, results))
            if not masked:
                return placed
            needed, placed = ctx.needs_input_grad, [*placed]
            for i in masked:
                if not needed[i]:
                    placed[i] = None
            return tuple(placed)

        def filled(values: tuple) -> tuple:
            changed = [*values]
            for i in empty:
                if values[i] is not None and values[i].shape == (0,):
                    changed[i] = None
            for i, like in zeros:
                if values[i] is None:
                    changed[i] = torch.zeros_like(values[like])
            return tuple(changed)

        return setup, backward

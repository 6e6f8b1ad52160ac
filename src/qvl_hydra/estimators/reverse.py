"""One segment of the reverse walk: computed again, with every probe's gradient taken through it.

What is read from the gradients on the way is a `Reading`: the effect of errors (`first_order`) or the curvature at the
weights (`gauss_newton`). Neither needs a loop over operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qvl_hydra.blockwise.attention import attention_for_backward
from qvl_hydra.blockwise.walker import Context, Walker
from qvl_hydra.families.stages import Segment, State
from qvl_hydra.operators.kinds import apply_operator, input_gradient, outputs
from qvl_hydra.operators.targets import Target
from qvl_hydra.quantization.apply import Forward, replaced_forwards, unread_output

MakeProbes = Callable[[State], Sequence[State]]
SamplesOf = Callable[[int], Sequence[slice]]  # from tokens in all, one behind the other, to those of each sample


@runtime_checkable
class Tap(Protocol):
    """What is read at one operator."""

    def take(self, g: Float[Tensor, "token out"], to_input: Float[Tensor, "token in"]) -> None:
        """Read a probe's gradient at the operator's output and input."""


@runtime_checkable
class Reading(Protocol):
    """What is read from the gradients of a segment."""

    def tap(self, path: str, module: nn.Module, x: Tensor, samples_of: SamplesOf) -> Sequence[Any]:
        """Taps of an operator on its input, (token, *in)."""

    @property
    def joined(self) -> Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]] | None:
        """Makes an operator's taps from those of some tokens and of others behind; None: all are read at once."""

    def collect(
        self,
        targets: Sequence[Target],
        taps: Mapping[str, Sequence[Any]],
        samples_of: SamplesOf,
        kinds: Sequence[Tensor | int] | None = None,
    ) -> list[list[Float[Tensor, "target probe part"]]]:
        """Values by scheme, and within a scheme by sample."""


class _Tapped(torch.autograd.Function):
    """An operator's forward in float whose backward also hands the gradients to its taps.

    Where nobody reads its output, that is zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, taps: Sequence[Tap], read: bool) -> Tensor:
        ctx.module, ctx.taps, ctx.shape = module, taps, x.shape
        return apply_operator(module, x, module.weight) if read else unread_output(module, x)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        flat = g.reshape(-1, outputs(ctx.module))
        to_input = input_gradient(ctx.module, flat)
        for tap in ctx.taps:
            tap.take(flat, to_input)
        return to_input.view(ctx.shape), None, None, None


@dataclass(frozen=True)
class ReverseSegment:
    """One segment's work in the reverse walk.

    Attributes:
        targets: those with operators in the segment.
        unread: a linear operator whose output only goes into the segment's, which nobody reads a second time.
    """

    walker: Walker
    segment: Segment
    targets: Sequence[Target]
    reading: Reading
    unread: str | None = None

    @property
    def paths(self) -> list[str]:
        """Operators that are read, in data order."""
        every = (op.path for target in self.targets for op in target.operators)
        return [path for path in dict.fromkeys(every) if self.segment.holds(path)]


@dataclass(frozen=True)
class Part:
    """Tokens that walk back together.

    Attributes:
        state: the segment's input: one row, or one a sample.
        gradients: at the segment's output, one a probe; of the last segment a function that makes them from it.
    """

    state: State
    gradients: Sequence[State] | MakeProbes


def step_back(
    work: ReverseSegment,
    context: Context,
    parts: Iterable[Part],
    samples_of: SamplesOf,
    kinds: Sequence[Tensor | int] | None = None,
) -> tuple[list[list[Float[Tensor, "target probe part"]]], list[State]]:
    """Compute a segment again and take every probe's gradient through it.

    Args:
        parts: of the samples together, one; of the head, which works on each token by itself, some of their tokens one
            behind the other, where the reading can join them.
        samples_of: where each sample's tokens are among those of all parts.
        kinds: of each sample the kind of every token, or the one of all; see `positions`.

    Returns:
        Values by scheme and sample; and the gradients at the segment's input.
    """
    joined = work.reading.joined
    taps: dict[str, Sequence[Tap]] = {}
    back: list[list[State]] = []
    for part in parts:
        own, gradients = _through(work, context, part, samples_of)
        taps = {path: joined(taps[path], own[path]) for path in own} if joined and taps else own
        back.append(gradients)
    whole = back[0] if len(back) == 1 else [torch.cat(of_parts, 1) for of_parts in zip(*back, strict=True)]
    return work.reading.collect(work.targets, taps, samples_of, kinds), whole


def _through(
    work: ReverseSegment, context: Context, part: Part, samples_of: SamplesOf
) -> tuple[dict[str, Sequence[Tap]], list[State]]:
    """Taps of one part, which hold what they read, and the gradients at its input."""
    taps: dict[str, Sequence[Tap]] = {}

    def forward_of(path: str) -> Forward:
        def forward(module: nn.Module, x: Tensor) -> Tensor:
            with torch.no_grad():
                tokens = x.detach().flatten(0, 1) if x.dim() == 3 else x.detach()
                taps[path] = work.reading.tap(path, module, tokens, samples_of)
            result: Tensor = _Tapped.apply(x, module, taps[path], path != work.unread)
            return result

        return forward

    with torch.enable_grad(), replaced_forwards(work.walker.module, {path: forward_of(path) for path in work.paths}):
        start = part.state.detach().requires_grad_()
        with attention_for_backward(start):
            end = work.segment.run(start, context)
        gradients = part.gradients(end.detach()) if callable(part.gradients) else part.gradients
        back = [
            torch.autograd.grad(end, start, gradient.to(end.dtype), retain_graph=index + 1 < len(gradients))[0]
            for index, gradient in enumerate(gradients)
        ]
    return taps, back

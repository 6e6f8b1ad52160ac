"""Activation ranges from a graph itself: what goes into and comes out of its operators on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnx import helper

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.onnx.scoring.graph import WeightedNode
from qvl_hydra.onnx.scoring.scorable import Scorable
from qvl_hydra.onnx.scoring.session import Device, open_session
from qvl_hydra.quantization.formats.record import QuantParams
from qvl_hydra.quantization.observers import RangeObserver
from qvl_hydra.quantization.scheme import Scheme

Params = tuple[QuantParams | None, QuantParams | None]


class NodeObserver:
    """Observers of one product's input and output, as far as the scheme has static ranges there."""

    def __init__(self, scheme: Scheme) -> None:
        forms = (scheme.input, scheme.output)
        self.sides = [None if form is None or form.dynamic else RangeObserver(form, scheme) for form in forms]

    def params(self) -> Params:
        """Raises ValueError when nothing, or something not finite, was seen."""
        inputs, output = (None if side is None else side.params() for side in self.sides)
        return inputs, output


@dataclass(frozen=True)
class _Tap:
    """Outputs of the tapped graph that one activation is seen through."""

    names: tuple[str, ...]
    observers: tuple[RangeObserver, ...]


def observe(
    scorable: Scorable,
    observers: Mapping[str, Sequence[NodeObserver]],
    samples: Iterable[Sample],
    device: Device,
    step: Callable[[], None],
) -> None:
    """Run samples through a graph and let observers see the activations of its operators.

    For ranges of smallest and largest value these two are taken inside the graph; a histogram sees every value.

    Args:
        observers: by node name, one for each scheme; nodes that the graph does not hold are passed over.
        samples: that the graph takes.
        step: called after each sample.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(scorable.graph.proto)
    taps = _add_taps(proto, scorable, observers)
    if not taps:
        return
    session = open_session(proto.SerializeToString(), device, str(scorable.graph.folder))
    wanted = [name for tap in taps for name in tap.names]
    for sample in samples:
        values = dict(zip(wanted, session.run(wanted, scorable.feeds(sample)), strict=True))
        for tap in taps:
            seen = torch.cat([torch.from_numpy(values[name]).reshape(-1) for name in tap.names])
            for observer in tap.observers:
                observer.observe(seen)
        step()


def _add_taps(
    proto: onnx.ModelProto, scorable: Scorable, observers: Mapping[str, Sequence[NodeObserver]]
) -> list[_Tap]:
    """Make the operators' activations outputs of the graph; one activation that several operators share, once."""
    watched: dict[str, list[RangeObserver]] = {}
    for node in (node for nodes in scorable.nodes.values() for node in nodes):
        for observer in observers.get(node.name, ()):
            for name, side in zip(_activations(node), observer.sides, strict=True):
                if side is not None:
                    watched.setdefault(name, []).append(side)
    present = {item.name for item in proto.graph.output}
    taps = []
    for name, sides in watched.items():
        if all(side.histogram is None for side in sides):
            names = tuple(f"{name}/{kind}" for kind in ("ReduceMin", "ReduceMax"))
            for output, kind in zip(names, ("ReduceMin", "ReduceMax"), strict=True):
                proto.graph.node.append(helper.make_node(kind, [name], [output], name=output, keepdims=0))
        else:
            names = (name,)
        for output in names:
            if output not in present:
                proto.graph.output.append(helper.make_empty_tensor_value_info(output))
        taps.append(_Tap(names, tuple(sides)))
    return taps


def _activations(node: WeightedNode) -> tuple[Any, Any]:
    return node.input, node.output

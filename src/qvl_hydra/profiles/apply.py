"""Puts a profile on a model by QDQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

from qvl_hydra.blockwise.ranges import SchemeRanges, walk
from qvl_hydra.blockwise.walker import Walker
from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ProfileError
from qvl_hydra.models.load import LoadedModel
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.quantization.apply import make_quantizer, shared_largest
from qvl_hydra.quantization.formats.table import not_offered
from qvl_hydra.quantization.qdq import OperatorQuantizer
from qvl_hydra.quantization.scheme import Scheme


class Quantizers(Mapping[str, OperatorQuantizer]):
    """Quantizers of operators in every scheme that they can have, made when asked for and not kept.

    The rounded weights of a whole model take as much memory as the model; whoever needs them all at once makes a `dict`
    of these. By path, or by `path#scheme` where there are several schemes; see `quantizer_key`.

    Args:
        model: resident, or streamed: then an operator's weights are read where they are not in memory.
        samples: calibration samples that static activation ranges come from.

    Raises:
        ProfileError: an operator's range cannot be observed.
    """

    def __init__(
        self,
        model: LoadedModel,
        operators: Sequence[Operator],
        samples: Sequence[Sample],
        component: str,
        schemes: Sequence[Scheme],
    ) -> None:
        self._model = model
        self._groups: dict[str, list[Operator]] = {}
        self._ranges = observed_ranges(model, operators, samples, component, schemes)
        self._wanted: dict[str, tuple[Operator, Scheme]] = {}
        for scheme in schemes:
            for op in operators:
                if not_offered([op], scheme) is None:
                    self._wanted[f"{op.path}#{scheme.name}" if len(schemes) > 1 else op.path] = (op, scheme)
        for op in operators:
            self._groups.setdefault(op.group, []).append(op)

    def __getitem__(self, key: str) -> OperatorQuantizer:
        op, scheme = self._wanted[key]
        module = self._model.module
        together = self._groups[op.group]
        away = [o.path for o in together if module.get_submodule(o.path).get_parameter("weight").is_meta]
        with self._model.weights(away) if away else nullcontext():
            largest = shared_largest(module, together, scheme).get(op.group)
            return make_quantizer(module, op.path, scheme, self._ranges[scheme.name], largest)

    def __contains__(self, key: object) -> bool:
        return key in self._wanted  # a mapping's own would round the weight to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


def observed_ranges(
    model: LoadedModel,
    operators: Sequence[Operator],
    samples: Sequence[Sample],
    component: str,
    schemes: Sequence[Scheme],
) -> SchemeRanges:
    """Static ranges of every operator in every scheme that has some, by one walk.

    Raises:
        ProfileError: an operator was never reached, or saw a value that is not finite.
    """
    static = [scheme for scheme in schemes if scheme.needs_ranges]
    if not static:
        return {scheme.name: {} for scheme in schemes}
    walker = Walker(model, component)
    contexts = walker.contexts([sample for sample in samples if walker.usable(sample)])
    ranges, _ = walk(walker, contexts, walker.starts(contexts), operators, schemes, lambda: None)
    unseen = [op.path for op in operators if op.path not in ranges.params[static[0].name]]
    failed = ranges.failed | {path: "it was not reached" for path in unseen if path not in ranges.failed}
    if failed:
        path, reason = next(iter(failed.items()))
        raise ProfileError(
            f"activation ranges cannot be calibrated ({path}: {reason}); exclude the operator with operators.exclude, "
            "or give calibration samples that reach it"
        )
    return ranges.params


def quantizer_key(profile: Profile, op: Operator, quantizers: Mapping[str, OperatorQuantizer]) -> str:
    """Where the quantizer of an operator in its scheme is found: `path#scheme`, or the path where there is one only."""
    named = f"{op.path}#{profile.scheme_of(op).name}"
    return named if named in quantizers else op.path

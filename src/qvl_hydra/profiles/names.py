"""How each consumer names an operator; a profile holds Hugging Face module paths (transformers 5).

Every mapping goes by prefix, tower first (`families/table.py`): a vision MLP and a language MLP share their last parts
(`mlp.gate_proj`), so that no name may ever be made from last parts alone.

Source: the model classes of transformers (modules, and the names their `save_pretrained` writes, which are those of the
checkpoints on the hub), and `hf_to_vllm_mapper` and `packed_modules_mapping` of vLLM's models of the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qvl_hydra.families.table import FAMILIES
from qvl_hydra.operators.discover import Operator


def rename(op: Operator, consumer: str, path: str = "") -> str:
    """An operator's name, or that of another path of its model, in the convention of a consumer.

    A consumer without one goes by Hugging Face module paths.
    """
    return FAMILIES[op.family].renamed(path or op.path, consumer)


def modules_of_experts(op: Operator, experts: Iterable[int]) -> list[str]:
    """Paths that readers of checkpoints give the modules of some experts of a mixture, in the order of its rows."""
    parent, _, product = op.path.rpartition(".")
    return [f"{parent}.{expert}.{part}" for expert in experts for part in EXPERT_PARTS[product]]


def router_of(op: Operator) -> str:
    """Path of what chooses among experts: a linear module to vLLM, that nobody quantizes."""
    return op.path.rpartition(".experts.")[0] + ".gate"


EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def listed(op: Operator, consumer: str) -> str:
    """An operator as an entry of compressed-tensors' lists: its name, or a pattern for all its experts.

    vLLM renames names of lists, and no patterns: one has to match in every convention.
    """
    if op.experts == 1:
        return rename(op, consumer)
    parent, _, product = op.path.removeprefix(f"{FAMILIES[op.family].language}.").rpartition(".")
    return rf"re:.*\.{re.escape(parent)}\.\d+\.({'|'.join(EXPERT_PARTS[product])})$"


def neural_compressor_pattern(path: str) -> str:
    """A regular expression that Neural Compressor matches in full against its operator names.

    Its names depend on where tracing began (`language_model.layers...` or `model.language_model.layers...`) and end in
    `.module` where a sub-module was traced alone; the tower is always part of them.
    """
    return rf"(.*\.)?{re.escape(path.removeprefix('model.'))}(\.module)?"

"""Operators found and selected: counts of the real models, order of the data, shapes, globs, blocks, the cap."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from torch import nn

from qvl_hydra.calibration.sample import Sample
from qvl_hydra.errors import ModelError, OperatorError
from qvl_hydra.families import qwen2_vl
from qvl_hydra.models.forward import reference_output
from qvl_hydra.models.load import LoadedModel, describe_model
from qvl_hydra.operators.discover import Operator, find_operators, select_operators
from qvl_hydra.settings import ModelSettings, OperatorSettings
from tests.conftest import load_tiny


def real_shape(name: str) -> nn.Module:
    """A published model's module tree, without weights."""
    settings = ModelSettings(name, f"Qwen/{name}", name.rsplit("_", 1)[0], weights="random")  # type: ignore[arg-type]
    return describe_model(settings).skeleton


# Blocks of the language tower (seven linears each, and a head), blocks of the vision tower and linears of each.
SHAPES = {"qwen2_5_vl_3b": (36, 32, 5), "qwen2_5_vl_7b": (28, 32, 5), "qwen2_vl_2b": (28, 32, 4)}


@pytest.mark.parametrize("name", SHAPES)
def test_counts_of_the_published_models(name: str) -> None:
    layers, blocks, per_block = SHAPES[name]
    model = real_shape(name)
    counts = {component: len(find_operators(model, component)) for component in ("lm", "vision", "full")}
    assert counts["lm"] == 7 * layers + 1
    assert counts["vision"] == per_block * blocks + 3  # two of the merger, the patch embedding
    assert counts["full"] == counts["lm"] + counts["vision"]
    if name == "qwen2_5_vl_3b":
        assert counts == {"lm": 253, "vision": 163, "full": 416}
    if name == "qwen2_vl_2b":
        assert counts == {"lm": 197, "vision": 131, "full": 328}


def test_shapes_follow_from_the_config() -> None:
    model = real_shape("qwen2_5_vl_3b")
    text, vision = model.config.text_config, model.config.vision_config
    found = {op.path: op for op in find_operators(model, "full")}
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads

    def shape(path: str) -> tuple[int, int, int]:
        op = found[path]
        return op.in_features, op.out_features, op.n_params

    layer = "model.language_model.layers.7"
    assert shape(f"{layer}.self_attn.k_proj") == (text.hidden_size, kv, text.hidden_size * kv + kv)
    assert shape(f"{layer}.mlp.down_proj") == (
        text.intermediate_size, text.hidden_size, text.intermediate_size * text.hidden_size,
    )  # fmt: skip
    assert shape("lm_head") == (text.hidden_size, text.vocab_size, text.hidden_size * text.vocab_size)
    patch = 3 * vision.temporal_patch_size * vision.patch_size**2
    assert shape("model.visual.patch_embed.proj") == (patch, vision.hidden_size, patch * vision.hidden_size)
    assert found["model.visual.patch_embed.proj"].kind == "Conv3d"
    qkv = (vision.hidden_size, 3 * vision.hidden_size, 3 * vision.hidden_size * (vision.hidden_size + 1))
    assert shape("model.visual.blocks.31.attn.qkv") == qkv


@pytest.mark.parametrize("name", ["tiny_qwen2_5_vl", "tiny_qwen2_vl"])
def test_the_order_is_the_one_in_which_data_meets_them(name: str, tiny_samples: tuple[Sample, ...]) -> None:
    model = load_tiny(name)
    operators = find_operators(model.module, "full")
    called: list[str] = []
    hooks = [
        model.module.get_submodule(op.path).register_forward_hook(lambda *_, path=op.path: called.append(path))
        for op in operators
    ]
    with torch.no_grad():
        reference_output(model.module, next(s for s in tiny_samples if s.pixel_values is not None), "full")
    for hook in hooks:
        hook.remove()
    assert called == [op.path for op in operators]


def test_roles_blocks_and_groups(tiny_model: LoadedModel) -> None:
    operators = find_operators(tiny_model.module, "full")
    outside = {op.role: op.path for op in operators if op.block is None}
    assert outside == {
        "patch_embed": "model.visual.patch_embed.proj",
        "merger.0": "model.visual.merger.mlp.0",
        "merger.2": "model.visual.merger.mlp.2",
        "lm_head": "lm_head",
    }
    for block in range(tiny_model.config.text_config.num_hidden_layers):
        path = f"model.language_model.layers.{block}"
        own = [op for op in operators if op.path.startswith(f"{path}.")]
        assert all(op.block == block and op.component == "lm" for op in own)
        assert {op.role: op.group for op in own} == {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), f"{path}.self_attn.qkv_proj"),
            "o_proj": f"{path}.self_attn.o_proj",
            **dict.fromkeys(("gate_proj", "up_proj"), f"{path}.mlp.gate_up_proj"),
            "down_proj": f"{path}.mlp.down_proj",
        }
    vision = [op for op in operators if op.component == "vision" and op.block == 3]
    assert [op.role for op in vision] == ["qkv", "proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def operators(tiny_model: LoadedModel) -> list[Operator]:
    return find_operators(tiny_model.module, "full")


def paths(chosen: list[Operator]) -> list[str]:
    return [op.path for op in chosen]


def test_no_filter_keeps_all(operators: list[Operator]) -> None:
    assert select_operators(operators, OperatorSettings(), 0) == operators


def test_globs(operators: list[Operator]) -> None:
    settings = OperatorSettings(include=["*.mlp.*", "lm_head"], exclude=["*visual*", "*.gate_proj"])
    expected = [
        op
        for op in operators
        if (".mlp." in op.path or op.path == "lm_head")
        and not ("visual" in op.path or op.path.endswith("gate_proj"))
    ]
    assert select_operators(operators, settings, 0) == expected
    assert expected[-1].path == "lm_head"


def test_blocks_are_those_of_every_tower(operators: list[Operator]) -> None:
    chosen = select_operators(operators, OperatorSettings(blocks="1-2,3"), 0)
    assert Counter((op.component, op.block) for op in chosen) == {
        **{("vision", block): 5 for block in (1, 2, 3)},
        **{("lm", block): 7 for block in (1, 2, 3)},
    }


def test_the_cap_spreads_evenly_from_first_to_last(operators: list[Operator]) -> None:
    for cap in (2, 3, 10, len(operators) - 1):
        chosen = select_operators(operators, OperatorSettings(max_ops=cap), 0)
        places = [operators.index(op) for op in chosen]
        assert len(set(places)) == cap
        assert (places[0], places[-1]) == (0, len(operators) - 1)
        steps = [after - before for before, after in itertools.pairwise(places)]
        assert max(steps) - min(steps) <= 1
    assert len(select_operators(operators, OperatorSettings(max_ops=1), 0)) == 1
    assert select_operators(operators, OperatorSettings(max_ops=10_000), 0) == operators


def test_the_cap_takes_the_first(operators: list[Operator]) -> None:
    assert select_operators(operators, OperatorSettings(max_ops=5, select="first"), 0) == operators[:5]


def test_the_cap_draws_by_seed(operators: list[Operator]) -> None:
    settings = OperatorSettings(max_ops=8, select="random")
    drawn = [paths(select_operators(operators, settings, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn:
        assert len(set(chosen)) == 8
        assert chosen == sorted(chosen, key=paths(operators).index)  # data order


@pytest.mark.parametrize("select", ["even", "first", "random"])
def test_the_cap_counts_fused_groups_as_one(operators: list[Operator], select: str) -> None:
    settings = OperatorSettings(max_ops=6, select=select, fuse=True)  # type: ignore[arg-type]
    chosen = select_operators(operators, settings, 0)
    groups = {op.group for op in chosen}
    assert len(groups) == 6
    assert chosen == [op for op in operators if op.group in groups]  # a group is whole


def test_everything_that_names_nothing_is_told_at_once(operators: list[Operator]) -> None:
    settings = OperatorSettings(include=["*.mlp.*", "*.mpl.*"], exclude=["nothing"], blocks="2,50-51")
    with pytest.raises(OperatorError) as caught:
        select_operators(operators, settings, 0)
    for part in ("'*.mpl.*' matches no operator", "'nothing' matches no", "no block [50, 51]", "blocks are 0-"):
        assert part in str(caught.value)
    assert "'*.mlp.*'" not in str(caught.value)


def test_a_glob_that_is_a_part_of_paths_is_told_what_it_lacks(operators: list[Operator]) -> None:
    with pytest.raises(OperatorError, match=r"'mlp' matches no operator; '\*mlp\*' matches \d+, such as model\."):
        select_operators(operators, OperatorSettings(exclude=["mlp"]), 0)


def test_filters_that_leave_nothing(operators: list[Operator]) -> None:
    with pytest.raises(OperatorError, match="leave no operator"):
        select_operators(operators, OperatorSettings(include=["lm_head"], exclude=["lm_*"]), 0)


@pytest.mark.parametrize("change", ["none", "two"])
def test_an_operator_that_does_not_lie_in_one_stage_is_named(
    change: str, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In none it would score zero in silence."""
    whole = qwen2_vl.stages(tiny_model.module)
    language = whole.language[1:] if change == "none" else (*whole.language, whole.language[0])
    monkeypatch.setattr(qwen2_vl, "stages", lambda module: dataclasses.replace(whole, language=language))
    with pytest.raises(ModelError, match=r"model.language_model.layers.0.self_attn.q_proj lies in .* exactly one"):
        find_operators(tiny_model.module, "lm")

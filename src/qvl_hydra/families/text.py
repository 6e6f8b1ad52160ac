"""Stages of models for text alone: a language tower and its head."""

from __future__ import annotations

from typing import Any

from qvl_hydra.families.stages import Segment, Stages, decoder_block, head
from qvl_hydra.families.table import family_of


def stages(module: Any) -> Stages:
    """Stages of a model for text; see `Stages`."""
    return Stages((), (), language_segments(module))


def language_segments(module: Any) -> tuple[Segment, ...]:
    """Every decoder block, and the head."""
    language = family_of(module.config).language
    layers = module.get_submodule(f"{language}.layers")
    blocks = (decoder_block(module, f"{language}.layers.{index}") for index in range(len(layers)))
    return (*blocks, head(module, language))

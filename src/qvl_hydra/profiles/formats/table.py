"""The table of formats, and the writing of a profile in some of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvl_hydra.errors import ProfileError
from qvl_hydra.operators.discover import Operator
from qvl_hydra.profiles.formats import (
    auto_round,
    compressed_tensors,
    llm_compressor,
    modelopt,
    neural_compressor,
    tensorrt_llm,
)
from qvl_hydra.profiles.formats.rendered import Format, misaligned
from qvl_hydra.profiles.profile import Profile
from qvl_hydra.runs.files import write_atomically, write_json

FORMATS = {
    "neural_compressor": Format("Neural Compressor", "neural-compressor 3.7.1", neural_compressor.render),
    "compressed_tensors": Format("transformers, vLLM", "compressed-tensors 0.20.0", compressed_tensors.render),
    "llm_compressor": Format("llm-compressor", "llmcompressor 0.14.0", llm_compressor.render),
    "modelopt": Format("NVIDIA ModelOpt", "nvidia-modelopt 0.47.0", modelopt.render),
    "auto_round": Format("auto-round", "auto-round 0.16.1", auto_round.render),
    "tensorrt_llm": Format("TensorRT-LLM", None, tensorrt_llm.render),
}


FLOATS = ("compressed_tensors", "llm_compressor")  # those that can say more than integers


def _require_integers(profile: Profile, name: str) -> None:
    scheme = profile.scheme
    if profile.others and name != "compressed_tensors":
        raise ProfileError(
            f"{name} is written for one scheme, and this profile has {', '.join(profile.schemes)}; "
            "take profile.formats=[compressed_tensors]"
        )
    numbers = {part.number for part in (scheme.weight, scheme.input) if part is not None} - {"int"}
    if numbers and name not in FLOATS:
        raise ProfileError(
            f"{name} is written for integers only, and quant={scheme.name} has {', '.join(sorted(numbers))}; "
            f"take profile.formats=[{','.join(FLOATS)}]"
        )


def write_formats(
    profile: Profile, operators: Sequence[Operator], names: Sequence[str], folder: Path
) -> list[dict[str, Any]]:
    """Write a profile in several formats, each in its own folder, and `exports.json` about all of them.

    Args:
        operators: every operator of the model, decided on or not.
        names: keys of `FORMATS`; none asks for all of them, and then one that cannot express the profile is reported
            instead of written.

    Returns:
        The content of `exports.json`: one record a format with its files, notes, or the error.

    Raises:
        ProfileError: a format that was asked for by name cannot express the profile.
    """
    records: list[dict[str, Any]] = []
    for name in names or FORMATS:
        form = FORMATS[name]
        record: dict[str, Any] = {"format": name, "consumer": form.consumer, "loaded_with": form.loaded}
        try:
            _require_integers(profile, name)
            rendered = form.render(profile, operators)
        except ProfileError as error:
            if names:
                raise
            records.append(record | {"error": str(error)})
            continue
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for file, text in rendered.files.items():
            write_atomically(target / file, text.encode())
        files = [f"{name}/{file}" for file in rendered.files]
        records.append(record | {"files": files, "notes": list(rendered.notes)})
    content = {"formats": records, "misaligned": misaligned(profile)}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "exports.json", content)
    return records

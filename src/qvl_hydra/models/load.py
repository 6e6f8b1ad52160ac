"""Loads the models of the table of families: pretrained from a folder, the hub or the package, or random of a shape.

`describe_model` needs no weights and comes first: it finds the config, builds the module tree on the meta device, and
so lets operators be selected and memory be checked before anything large is read. One file because describing and
loading take the same steps up to the weights, and must refuse the same folders in the same words.
"""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from qvl_hydra.errors import ModelError
from qvl_hydra.families.record import Family
from qvl_hydra.families.table import FAMILIES
from qvl_hydra.models.memory import GIB, free_memory_bytes, keep_freed_memory
from qvl_hydra.models.stream import Checkpoint, Drawn, parameters_on_meta, weights_of
from qvl_hydra.settings import ModelSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUNDLED = "bundled:"
_LOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by this process, and still in memory
LARGEST_CONFIG = 1 << 24  # bytes
LARGEST = {
    "num_hidden_layers": 1000, "depth": 1000, "hidden_size": 1 << 17, "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24, "num_attention_heads": 1 << 12, "num_heads": 1 << 12, "patch_size": 1 << 10,
    "num_position_embeddings": 1 << 20, "head_dim": 1 << 13, "spatial_merge_size": 64,
}  # fmt: skip


@dataclass(frozen=True)
class ModelDescription:
    """A model before its weights: where it is, its config, and its module tree on the meta device.

    Attributes:
        folder: local folder with `config.json`; for a hub id the downloaded snapshot's, once it is needed.
        source: what the settings named.
        skeleton: the model on the meta device, for shapes and names only.
    """

    source: str
    folder: Path
    family: Family
    config: PretrainedConfig
    skeleton: nn.Module
    settings: ModelSettings

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in the dtype asked for, tied ones once."""
        size = DTYPES[self.settings.dtype].itemsize
        return sum(parameter.numel() for parameter in self.skeleton.parameters()) * size


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to measure, in eval mode and without gradients.

    Attributes:
        module: the Hugging Face module; with `streamed` placement its blocks are on the meta device between uses.
        sha: hash over the config and the weight files (when weights are random: config, seed and the kind of device).
    """

    module: nn.Module
    description: ModelDescription
    device: torch.device
    sha: str
    checkpoint: Checkpoint | Drawn | None = None  # where a streamed model's weights are

    @property
    def config(self) -> PretrainedConfig:
        return self.description.config

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.description.settings.dtype]

    def weights(
        self, roots: Sequence[str], dtype: torch.dtype | None = None, kept: Container[str] = ()
    ) -> AbstractContextManager[None]:
        """Have the weights below these module paths in memory, in this dtype, for a while.

        Costs nothing for a resident model in its own dtype.

        Args:
            kept: names of parameters that keep the model's own dtype.
        """
        wanted = dtype or self.dtype
        if self.checkpoint is None and wanted == self.dtype:
            return nullcontext()
        return weights_of(self.module, roots, self.checkpoint, self.device, self.dtype, wanted, kept)

    @property
    def family(self) -> Family:
        return self.description.family

    @property
    def streamed(self) -> bool:
        return self.checkpoint is not None


def describe_model(settings: ModelSettings) -> ModelDescription:
    """Find the model and its shape, without reading weights.

    Raises:
        ModelError: the folder is missing or incomplete, the hub cannot be reached, or the family is another one.
    """
    folder = model_folder(settings)
    config = _config(folder, settings)
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"model.path={settings.path} holds a {config.model_type!r} model, and there is no such family; "
            f"there are {', '.join(FAMILIES)}; docs/extending.md says what one more takes"
        )
    family = FAMILIES[config.model_type]
    if settings.family not in (None, family.name):
        raise ModelError(
            f"model.path={settings.path} holds a {config.model_type!r} model, but model.family={settings.family}; "
            f"set model.family={config.model_type}, or null for whatever the folder holds"
        )
    _override(config, settings)
    _require_sane(config, settings)
    try:
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            skeleton: Any = family.load_class()(config)
            _require_positions(skeleton, family)
        if config.tie_word_embeddings:
            skeleton.tie_weights()
        skeleton = family.adapted(skeleton)
    except Exception as error:  # of a config that anybody may have written
        raise ModelError(
            f"model.path={settings.path}: {folder / 'config.json'} describes no model that can be built "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    return ModelDescription(settings.path, folder, family, config, skeleton.eval(), settings)


def _config(folder: Path, settings: ModelSettings) -> PretrainedConfig:
    """The config of a folder; whatever reading it raises is told as a fault of the file."""
    place = folder / "config.json"
    try:
        if place.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {place.stat().st_size} bytes")
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"model.path={settings.path}: {place} is no model config ({type(error).__name__}: {first_line(error)})"
        ) from error
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else type(quantized).__name__
        raise ModelError(
            f"model.path={settings.path} is quantized already ({method}); scores are measured on the original weights"
        )
    return config


def _require_sane(config: PretrainedConfig, settings: ModelSettings) -> None:
    """Refuse sizes that no model has, before modules are made of them."""
    parts = [config, *(getattr(config, name, None) for name in ("text_config", "vision_config"))]
    for part in filter(None, parts):
        for name, most in LARGEST.items():
            value = getattr(part, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= most:
                raise ModelError(
                    f"model.path={settings.path}: config.json says {name}={value}; 1 to {most} is built"
                )


def _require_positions(skeleton: Any, family: Family) -> None:
    """Raise what transformers raises where positions are turned by sections that do not fit the heads.

    They are read nowhere before a forward pass.
    """
    axes = (3, 1, 1) if family.position_class else (1, 1)
    skeleton.get_submodule(family.language).rotary_emb(torch.zeros(1, 1, 1), torch.zeros(axes))


def first_line(error: Exception) -> str:
    """What an error of a library says, at the length of a message."""
    return " ".join(str(error).split())[:300]


def model_folder(settings: ModelSettings) -> Path:
    """The local folder of the model; a hub id is downloaded (weights only where they will be read).

    Raises:
        ModelError: no such folder, or the hub has no answer.
    """
    if settings.path.startswith(BUNDLED):
        name = settings.path.removeprefix(BUNDLED)
        folder = Path(str(resources.files("qvl_hydra"))) / "assets" / name
        if not (folder / "config.json").is_file():
            names = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
            raise ModelError(f"model.path={settings.path}: the package bundles {', '.join(names)}")
        return folder
    folder = Path(settings.path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.path={settings.path}: the folder has no config.json; give a checkpoint's folder")
        return folder
    if is_local(settings.path):
        raise ModelError(
            f"model.path={settings.path}: no such folder; give a checkpoint's folder or a hub id (owner/name)"
        )
    if settings.weights == "random":
        shape = Path(str(resources.files("qvl_hydra"))) / "assets" / "configs" / settings.name
        if (shape / "config.json").is_file():
            return shape
    return _download(settings)


def is_local(path: str) -> bool:
    """Whether a path means a place on this machine: a bundled name, a folder, or what no hub id (owner/name) is."""
    looks_local = path.startswith((BUNDLED, "/", ".", "~")) or path.count("/") != 1
    return looks_local or Path(path).expanduser().is_dir()


def _download(settings: ModelSettings) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    if settings.weights == "pretrained":
        patterns.append("*.safetensors")
    try:
        return Path(snapshot_download(settings.path, revision=settings.revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises a dozen unrelated kinds
        raise ModelError(
            f"model.path={settings.path}: neither a local folder nor a hub model that can be reached "
            f"({type(error).__name__}); download it and give its folder, or set model.weights=random to time its shape"
        ) from error


def _override(config: PretrainedConfig, settings: ModelSettings) -> None:
    for key, value in settings.overrides.items():
        part, _, name = key.rpartition(".")
        text = config.get_text_config()
        target: Any = getattr(config, part, None) if part else text if text is config else None
        if target is None or not hasattr(target, name):
            raise ModelError(
                f"model.overrides has {key!r}; expected text_config.<key> or vision_config.<key> of the model's config"
            )
        setattr(target, name, value)
        if target is text and name == "num_hidden_layers" and getattr(text, "layer_types", None) is not None:
            text.layer_types = (text.layer_types * value)[:value]


def require_memory(description: ModelDescription, extra_bytes: int, purpose: str) -> None:
    """Refuse a model that does not fit, before it is loaded.

    Args:
        extra_bytes: memory the work needs beside the weights.
        purpose: what the memory is for, for the message.

    Raises:
        ModelError: with what it would need, what there is, and what to do.
    """
    limit = description.settings.memory_limit_gib
    free = free_memory_bytes() if limit is None else int(limit * GIB)
    need = description.weight_bytes + extra_bytes
    if need > free:
        own = description.settings
        what = f"{description.weight_bytes / GIB:.1f} GiB of it weights"
        smaller = "" if own.dtype == "bfloat16" else "model.dtype=bfloat16, "
        remedy = f"backend=torch with model.placement=streamed, {smaller}fewer operators "
        remedy += "(operators.max_ops, operators.blocks) or a smaller model"
        if own.placement == "streamed":
            what = "its largest block, rounded"
            remedy = f"{smaller}a smaller model or, of a profile, fewer profile.choices"
        raise ModelError(
            f"{own.name} in {own.dtype} needs {need / GIB:.1f} GiB for {purpose} ({what}), and {free / GIB:.1f} GiB "
            f"are free; take {remedy}"
        )


def free_models() -> None:
    """Let go of models that nobody uses any more: the figures of a sweep hold them in circles of references."""
    if _LOADED:
        gc.collect()


def load_model(description: ModelDescription, device: torch.device, seed: int) -> LoadedModel:
    """Read or draw the weights and place the model.

    Raises:
        ModelError: the checkpoint is incomplete or its shapes do not fit the config.
    """
    settings = description.settings
    streamed = settings.placement == "streamed"
    if settings.weights == "random":
        checkpoint, module = None, _random_model(description, device, seed)
    else:
        checkpoint = Checkpoint(description.folder, description.family)
        checkpoint.require(description.skeleton)
        module = _streamed_model(description, device) if streamed else _pretrained_model(description).to(device)
    module.requires_grad_(False).eval()
    _LOADED.add(module)
    if device.type == "cpu" and not streamed:  # which saves memory, not time
        keep_freed_memory()
    sha = model_sha(description, device, seed)
    return LoadedModel(module, description, device, sha, checkpoint if streamed else None)


def outline_model(description: ModelDescription, device: torch.device, seed: int) -> LoadedModel:
    """The model with its weights read one part at a time, whatever its placement; random ones are made when needed.

    Enough to see what it is and to time its parts, without the memory that measuring takes.

    Raises:
        ModelError: see `load_model`.
    """
    checkpoint: Checkpoint | Drawn = Drawn()
    if description.settings.weights != "random":
        checkpoint = Checkpoint(description.folder, description.family)
        checkpoint.require(description.skeleton)
    module = _streamed_model(description, device).requires_grad_(False).eval()
    return LoadedModel(module, description, device, model_sha(description, device, seed), checkpoint)


def _pretrained_model(description: ModelDescription) -> nn.Module:
    try:
        model: nn.Module = description.family.load_class().from_pretrained(
            description.folder,
            dtype=DTYPES[description.settings.dtype],
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:
        raise ModelError(f"{description.folder}: the weights cannot be read: {first_line(error)}") from error
    return description.family.adapted(model)


def _streamed_model(description: ModelDescription, device: torch.device) -> nn.Module:
    with parameters_on_meta():
        model: nn.Module = description.family.adapted(description.family.load_class()(description.config))
    for owner in model.modules():
        for name, buffer in owner._buffers.items():
            owner._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def _random_model(description: ModelDescription, device: torch.device, seed: int) -> nn.Module:
    """The model's shape with weights drawn as transformers initialises them, on `device`."""
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(DTYPES[description.settings.dtype])
        with torch.device(device):
            model: nn.Module = description.family.adapted(description.family.load_class()(description.config))
    finally:
        torch.set_default_dtype(default)
        torch.random.set_rng_state(generator_state)
    return model


def model_sha(description: ModelDescription, device: torch.device, seed: int) -> str:
    """Hash that names the model: config and weight files, or for random weights config, seed and what drew them."""
    digest = hashlib.sha256()
    config = {key: value for key, value in description.config.to_dict().items() if key not in _UNHASHED}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    if description.settings.weights == "random":
        digest.update(f"random:{seed}:{device.type}".encode())
    else:
        for path in sorted(description.folder.glob("*.safetensors")):
            for part in _identifying(path):
                digest.update(part)
    return digest.hexdigest()[:16]


def _identifying(path: Path) -> Iterator[bytes]:
    """A weight file's name, size and content; of a file above 1 GiB only its header and 4096 places spread over it."""
    size = path.stat().st_size
    yield f"{path.name}:{size}".encode()
    with path.open("rb") as stream:
        if size <= GIB:
            yield hashlib.file_digest(stream, "sha256").digest()
            return
        yield stream.read(8 + int.from_bytes(stream.read(8), "little"))
        for index in range(4096):
            stream.seek(size * index // 4096)
            yield stream.read(4096)


_UNHASHED = frozenset({"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures"})

"""From prompt, answer and images to the tensors that a model takes.

The chat template is the checkpoint's own, image tokens are expanded from the patch grid, and positions on three axes
come from the model class's own `get_rope_index`; models for text alone count them up. The image processor is the one
built on PIL: the processor class that bundles all of this needs torchvision for its video part, whose build has to
match torch's.
"""

from __future__ import annotations

import copy
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import cached_file

from qvl_hydra.calibration.record import Turn
from qvl_hydra.calibration.sample import IGNORED, Sample
from qvl_hydra.errors import CalibrationError
from qvl_hydra.families.table import FAMILIES, family_of

TEMPLATE_S = 5.0  # for a chat template to make one turn


class EncodingError(ValueError):
    """One sample cannot be encoded; the message says why."""


@dataclass(frozen=True)
class Processor:
    """What turns text and images into model inputs, all of it from one checkpoint.

    Attributes:
        image_processor: None for text alone.
        rope_shell: the model class without layers or weights, for its `get_rope_index`; None for text alone.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessorPil | None
    config: PretrainedConfig
    rope_shell: nn.Module | None

    @property
    def token_side(self) -> int | None:
        """Pixels a side that one image token sees."""
        processor = self.image_processor
        return None if processor is None else int(processor.patch_size * processor.merge_size)


def load_processor(path: str | Path, revision: str | None = None) -> Processor:
    """Read tokenizer, chat template and image processor of a checkpoint; its weights are not touched.

    Args:
        path: checkpoint folder or hub id.
        revision: hub revision; None is the default branch.

    Raises:
        CalibrationError: a file is missing, there is no chat template, or the family is another one.
    """
    origin = str(path)
    try:
        config = AutoConfig.from_pretrained(origin, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(origin, revision=revision, trust_remote_code=False)
        sees = config.model_type in FAMILIES and family_of(config).visual is not None
        image_processor = (
            Qwen2VLImageProcessorPil.from_pretrained(origin, revision=revision or "main") if sees else None
        )
    except Exception as error:  # of files that anybody may have written, libraries raise whatever they like
        raise CalibrationError(
            f"{origin}: config, tokenizer or image processor cannot be read ({error}); the folder needs config.json, "
            "tokenizer.json with tokenizer_config.json, and preprocessor_config.json"
        ) from error
    if image_processor is not None:
        for name in ("patch_size", "merge_size"):
            value = getattr(image_processor, name)
            if not isinstance(value, int) or not 1 <= value <= 1024:
                raise CalibrationError(f"{origin}: preprocessor_config.json says {name}={value!r}; expected 1 to 1024")
    if config.model_type not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise CalibrationError(f"{origin}: model_type is {config.model_type!r}; allowed: {allowed}")
    if sees:
        tokenizer.chat_template = tokenizer.chat_template or _processor_template(origin, revision)
    return Processor(tokenizer, image_processor, config, rope_shell(config))


def _processor_template(origin: str, revision: str | None) -> str:
    """The template of `chat_template.json`, where older checkpoints keep it for the processor."""
    found = cached_file(
        origin,
        "chat_template.json",
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        raise CalibrationError(f"{origin}: no chat template; put chat_template.jinja or chat_template.json beside it")
    template: str = json.loads(Path(found).read_text())["chat_template"]
    return template


def rope_shell(config: PretrainedConfig) -> nn.Module | None:
    """The model class of a config's family without layers, on the meta device: it costs neither memory nor time."""
    family = family_of(config)
    if family.position_class is None:
        return None
    bare = copy.deepcopy(config)
    bare.text_config.num_hidden_layers, bare.text_config.layer_types = 0, []
    bare.vision_config.depth, bare.vision_config.deepstack_visual_indexes = 0, []
    with torch.device("meta"):
        shell: nn.Module = family.load_class(family.position_class)(bare)
    return shell


def with_pixel_limits(processor: Processor, min_pixels: int | None, max_pixels: int | None) -> Processor:
    """The same processor with other limits on the area that images are resized to; None keeps the checkpoint's.

    Raises:
        CalibrationError: the lower limit is above the upper one.
    """
    if processor.image_processor is None:
        return processor
    size = processor.image_processor.size
    low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if low > high:
        raise CalibrationError(
            f"calibration.min_pixels={low} is above calibration.max_pixels={high} "
            "(a limit not given is the image processor's own); give both so that min_pixels <= max_pixels"
        )
    changed = copy.deepcopy(processor.image_processor)
    changed.size = {"shortest_edge": low, "longest_edge": high}
    return replace(processor, image_processor=changed)


def encode(
    processor: Processor, name: str, prompt: str | tuple[Turn, ...], answer: str | None, images: list[Image.Image]
) -> Sample:
    """Encode what is asked and the answer: the images, then the prompt, or the turns with the images in them.

    Args:
        name: becomes the sample's id.
        prompt: what the user asks, or all turns before the answer.
        answer: what the assistant says; the only text that is labelled, with its end of turn. Without one the sample
            ends where it would begin.
        images: in RGB; none for a text-only sample.

    Raises:
        EncodingError: the text holds an image token of its own, an image's sides differ more than 200-fold, or the
            chat template does not take the turns.
    """
    if images and processor.image_processor is None:
        raise EncodingError("the model reads text alone, and the sample has an image")
    turns = (Turn("user", (*[None] * len(images), prompt)),) if isinstance(prompt, str) else prompt
    try:
        question, reply = render(processor, turns, answer)
    except CalibrationError as error:
        if isinstance(prompt, str):
            raise
        raise EncodingError(str(error)) from error  # of these turns; others may be taken
    tokenizer, config = processor.tokenizer, processor.config
    bare = tokenizer.chat_template is None  # a template writes the token that begins a text itself
    asked = tokenizer.encode(question, add_special_tokens=bare)
    answered = tokenizer.encode(reply, add_special_tokens=False)
    image_token = getattr(config, "image_token_id", None)
    there = asked.count(image_token) if image_token is not None else 0
    if there < len(images):
        raise EncodingError(f"the chat template gives {there} image tokens for {len(images)} images")
    if there > len(images) or (image_token is not None and image_token in answered):
        raise EncodingError("the text holds an image token of its own")
    pixels, grid = None, None
    if images:
        assert processor.image_processor is not None
        try:
            patches = processor.image_processor(images=images, return_tensors="pt")
        except (ValueError, ArithmeticError, RuntimeError) as error:
            raise EncodingError(str(error)) from error
        pixels, grid = patches["pixel_values"].float(), patches["image_grid_thw"]
        asked = expand_image_tokens(asked, grid, config)
    ids = torch.tensor(asked + answered)
    labels = torch.cat([torch.full((len(asked),), IGNORED), ids[len(asked) :]])
    return Sample(name, ids, position_ids(processor, ids, grid), labels, pixels, grid)


def encode_text(processor: Processor, name: str, text: str, most: int | None) -> Sample:
    """Encode a text that is nobody's turn, such as a document: no chat template, every token labelled.

    Args:
        most: tokens that are kept; what lies behind them is cut off. None keeps all.

    Raises:
        EncodingError: the text holds an image token, or less than two tokens.
    """
    ids = torch.tensor(processor.tokenizer.encode(text)[:most], dtype=torch.int64)
    if len(ids) < 2:
        raise EncodingError("a text of less than two tokens")
    if getattr(processor.config, "image_token_id", None) in ids.tolist():
        raise EncodingError("the text holds an image token of its own")
    return Sample(name, ids, position_ids(processor, ids, None), ids.clone(), None, None)


def render(processor: Processor, turns: tuple[Turn, ...], answer: str | None) -> tuple[str, str]:
    """A chat as text through the chat template: what the model is given, and what it should say.

    The two are tokenized apart, as in generation, where the answer's tokens follow a finished prompt.

    Raises:
        CalibrationError: the template fails, takes too long, or does not end in the answer.
    """
    if processor.tokenizer.chat_template is None:  # a base model for text
        return "".join(f"{_text(turn)}\n" for turn in turns), answer or ""
    asking = [{"role": turn.role, "content": _content(processor, turn)} for turn in turns]
    answering = {"role": "assistant", "content": _content(processor, Turn("assistant", (answer or "",)))}
    template = processor.tokenizer.apply_chat_template
    try:
        with _at_most(TEMPLATE_S):
            question = str(template(asking, tokenize=False, add_generation_prompt=True))
            whole = question if answer is None else str(template([*asking, answering], tokenize=False))
    except TimeoutError as error:
        raise CalibrationError(f"the chat template needs more than {TEMPLATE_S} s for one turn") from error
    except Exception as error:  # a template can raise whatever it likes
        raise CalibrationError(
            f"the chat template cannot be used ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    if not whole.startswith(question):
        raise CalibrationError(
            "the chat template does not put the answer after the generation prompt; "
            "the checkpoint needs its family's own template"
        )
    return question, whole[len(question) :].rstrip()  # the line break after the end of turn is nobody's answer


def _text(turn: Turn) -> str:
    return "\n".join(piece for piece in turn.content if piece is not None)


def _content(processor: Processor, turn: Turn) -> Any:
    """A turn's content as templates take it: parts, or one text where the model reads text alone."""
    if processor.image_processor is None:
        return _text(turn)
    return [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in turn.content]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """End what takes longer by a TimeoutError; outside the main thread, which has no signals, nothing is ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(signum: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    others = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *others)  # whoever set it before waits a moment longer


def expand_image_tokens(ids: list[int], grid: Int64[Tensor, "image 3"], config: PretrainedConfig) -> list[int]:
    """Repeat each image token as often as its image has merged patches."""
    counts = iter((grid.prod(-1) // config.vision_config.spatial_merge_size**2).tolist())
    expanded: list[int] = []
    for token in ids:
        expanded.extend([token] * next(counts) if token == config.image_token_id else [token])
    return expanded


def position_ids(
    processor: Processor, ids: Int64[Tensor, "token"], grid: Int64[Tensor, "image 3"] | None
) -> Int64[Tensor, "axis token"]:
    """M-RoPE positions from the model's own function; on one axis for text alone."""
    if processor.rope_shell is None:
        return torch.arange(len(ids))[None]
    kinds = (ids == processor.config.image_token_id).int()
    get_rope_index: Any = processor.rope_shell.get_rope_index
    positions, _ = get_rope_index(ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid)
    return positions[:, 0]

"""Training batches made at once: scenes of one grid, patches and tokens exactly as the calibration room encodes them.

Encoding one sample at a time through the chat template costs more than a training step of so small a model; here the
parts that all samples of a grid share (image tokens, M-RoPE positions) are computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bundled_models.architecture import IMAGE_MEAN, IMAGE_STD, MERGE, patch_size
from qvl_hydra.calibration.scenes import GRIDS, MAX_OBJECTS, QUESTION_SHARES, Split, enlarged, scene_stream

TEMPORAL = 2
# Small images are cheaper and teach the same shapes; the large grid needs its share for its own positions.
GRID_SHARES = (0.3, 0.25, 0.2, 0.25)


def patches_of(pixels: UInt8[np.ndarray, "image height width 3"], family: str) -> Float[Tensor, "patch value"]:
    """Normalised patches in the order of Qwen2-VL's image processor, for a stack of images of one size."""
    images, height, width, _ = pixels.shape
    patch = patch_size(family)
    mean, std = (np.array(values[family], dtype=np.float32) for values in (IMAGE_MEAN, IMAGE_STD))
    values = ((pixels.astype(np.float32) / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    rows, columns = height // patch, width // patch
    values = values.reshape(images, 3, rows // MERGE, MERGE, patch, columns // MERGE, MERGE, patch)
    values = values.transpose(0, 2, 5, 3, 6, 1, 4, 7)
    values = np.repeat(values[:, :, :, :, :, :, None], TEMPORAL, axis=6)
    return torch.from_numpy(values.reshape(images * rows * columns, 3 * TEMPORAL * patch * patch))


class BatchMaker:
    """Batches of one split, each drawn from its own number; a batch holds scenes of one grid."""

    def __init__(self, family: str, tokenizer: PreTrainedTokenizerFast, seed: int, split: Split = "train") -> None:
        self.family = family
        self.tokenizer = tokenizer
        self.seed = seed
        self.split = split
        self.image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def batch(
        self,
        number: int,
        batch_size: int,
        max_objects: int = MAX_OBJECTS,
        shares: Mapping[str, float] = QUESTION_SHARES,
        by_shape: bool = False,
    ) -> dict[str, Tensor]:
        """Batch `number`: input_ids, labels, position_ids, pixel_values, image_grid_thw (right padded)."""
        rng = np.random.default_rng([self.seed, number])
        grid = GRIDS[int(rng.choice(len(GRIDS), p=GRID_SHARES))]
        stream = scene_stream(self.split, int(rng.integers(2**31)), max_objects, grid, shares, by_shape)
        items = list(itertools.islice(stream, batch_size))
        tokens = self._tokens(grid, items)
        tokens["pixel_values"] = patches_of(
            np.stack([enlarged(pixels, patch_size(self.family) * MERGE) for pixels, _, _ in items]), self.family
        )
        tokens["image_grid_thw"] = torch.tensor([[1, grid[0] * MERGE, grid[1] * MERGE]] * batch_size)
        return tokens

    def _tokens(self, grid: tuple[int, int], items: list) -> dict[str, Tensor]:
        prefix = self.tokenizer.encode("<|im_start|>user\n<|vision_start|>")
        image = [self.image_id] * (grid[0] * grid[1])
        questions = [f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n" for _, prompt, _ in items]
        asked = self.tokenizer(questions)["input_ids"]
        answered = self.tokenizer([f"{answer}<|im_end|>" for _, _, answer in items])["input_ids"]
        length = max(len(a) + len(b) for a, b in zip(asked, answered, strict=True)) + len(prefix) + len(image)
        ids = torch.full((len(items), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(items), length), -100)
        for row, (question, answer) in enumerate(zip(asked, answered, strict=True)):
            full = torch.tensor([*prefix, *image, *question, *answer])
            ids[row, : len(full)] = full
            labels[row, len(full) - len(answer) : len(full)] = torch.tensor(answer)
        positions = self._positions(grid, len(prefix), length)
        return {"input_ids": ids, "labels": labels, "position_ids": positions.expand(3, len(items), length)}

    def _positions(self, grid: tuple[int, int], before: int, length: int) -> Tensor:
        rows, columns = grid
        start = torch.arange(before).expand(3, before)
        image = (
            torch.stack(
                [
                    torch.zeros(rows * columns, dtype=torch.long),
                    torch.arange(rows).repeat_interleave(columns),
                    torch.arange(columns).repeat(rows),
                ]
            )
            + before
        )
        after = before + max(rows, columns) + torch.arange(length - before - rows * columns)
        return torch.cat([start, image, after.expand(3, len(after))], dim=1)[:, None]

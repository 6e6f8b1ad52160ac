"""The rendered scenes: deterministic, disjoint splits, and answers that follow from the pixels."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from qvl_hydra.calibration.scenes import CELL, COLORS, MARGIN, NUMBERS, SHAPES, scene_examples, scene_stream, shape_mask


def _content(example) -> bytes:
    return hashlib.sha256(np.asarray(example.image).tobytes() + example.prompt.encode()).digest()


def _objects_seen(pixels: np.ndarray) -> list[tuple[str, str]]:
    """Reads colour and shape of every cell back from the pixels, in reading order, by looking instead of knowing."""
    found = []
    for top in range(0, pixels.shape[0], CELL):
        for left in range(0, pixels.shape[1], CELL):
            cell = pixels[top : top + CELL, left : left + CELL]
            for color, value in COLORS.items():
                covered = (cell == value).all(-1)
                if covered.any():
                    found.append((color, _shape_of(covered)))
    return found


def _shape_of(covered: np.ndarray) -> str:
    side = CELL - 2 * MARGIN
    for shape in SHAPES:
        mask = shape_mask(shape)
        for down in range(CELL - side + 1):
            for right in range(CELL - side + 1):
                placed = np.zeros_like(covered)
                placed[down : down + side, right : right + side] = mask
                if (placed == covered).all():
                    return shape
    raise AssertionError("no shape fits the pixels")


def test_same_seed_gives_same_bytes_and_sizes_are_nested() -> None:
    small, large = scene_examples("calibration", 8, 3), scene_examples("calibration", 20, 3)
    assert [(e.id, e.prompt, e.answer, e.image.tobytes()) for e in small] == [
        (e.id, e.prompt, e.answer, e.image.tobytes()) for e in large[:8]
    ]
    assert [e.id for e in scene_examples("calibration", 8, 4)] != [e.id for e in small]


def test_bytes_do_not_depend_on_the_machine() -> None:
    """Written down once: the bundled models were trained on what these bytes stand for."""
    digest = hashlib.sha256(b"".join(_content(example) for example in scene_examples("evaluation", 32, 0)))
    assert digest.hexdigest()[:16] == "abede33a0a5b382d"


def test_splits_share_neither_image_nor_question() -> None:
    contents = {
        split: {_content(e) for seed in (0, 1) for e in scene_examples(split, 300, seed)}
        for split in ("train", "calibration", "evaluation")
    }
    assert len(contents["calibration"]) >= 128
    assert len(contents["evaluation"]) >= 256
    for one, other in (("train", "calibration"), ("train", "evaluation"), ("calibration", "evaluation")):
        assert not contents[one] & contents[other]
        images_one = {e.image.tobytes() for e in scene_examples(one, 300, 0)}
        assert not images_one & {e.image.tobytes() for e in scene_examples(other, 300, 0)}


def test_several_image_sizes_occur() -> None:
    assert {e.image.size for e in scene_examples("calibration", 64, 0)} == {
        (112, 56),
        (112, 84),
        (112, 112),
        (168, 112),
    }


@pytest.mark.parametrize("by_shape", [False, True])
@pytest.mark.parametrize("split", ["train", "calibration", "evaluation"])
def test_answers_follow_from_the_pixels(split: str, by_shape: bool) -> None:
    """Both the task's questions and those that only training asks, on scenes of up to four objects."""
    shares = {"caption": 0.2, "color": 0.16, "shape": 0.16, "count": 0.16, "end": 0.16, "after": 0.16}
    kinds = set()
    for pixels, prompt, answer in itertools.islice(scene_stream(split, 7, 4, None, shares, by_shape), 100):
        seen, words = _objects_seen(pixels), prompt.rstrip("?.").split()
        kinds.add(" ".join(words[:2]))
        named = [f"{color} {shape}" for color, shape in seen]
        if words[0] == "describe":
            expected = ", ".join(named)
        elif words[:2] == ["what", "color"]:
            (expected,) = [color for color, shape in seen if shape == words[-1]]
        elif words[:2] == ["what", "shape"]:
            (expected,) = [shape for color, shape in seen if color == words[-1]]
        elif words[:2] == ["what", "comes"]:
            at = named.index(" ".join(words[-2:]))
            assert named.count(named[at]) == 1
            expected = [*named, "nothing"][at + 1]
        elif words[:2] == ["what", "is"]:
            expected = named[0] if words[3] == "first" else named[-1]
        else:
            asked = words[2] if len(words) == 4 else None
            expected = NUMBERS[sum(asked is None or asked in pair for pair in seen)]
        assert answer == expected, prompt
    usual = {"describe the", "what shape", "what comes", "what is", "how many"}
    assert kinds == (usual | {"what color"} if by_shape else usual)

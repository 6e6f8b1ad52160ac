"""Padding into batches, and the hash that names a calibration set."""

from __future__ import annotations

import dataclasses

import torch

from qvl_hydra.calibration.sample import Sample, collate, samples_sha


def _sample(name: str, length: int, patches: int) -> Sample:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 50, (length,), generator=generator)
    return Sample(
        id=name,
        input_ids=ids,
        position_ids=torch.arange(length).expand(3, length) + torch.tensor([[0], [1], [2]]),
        labels=torch.where(torch.arange(length) < 2, -100, ids),
        pixel_values=torch.randn(patches, 6, generator=generator) if patches else None,
        image_grid_thw=torch.tensor([[1, 2, patches // 2]]) if patches else None,
    )


def test_collate_pads_on_the_right() -> None:
    samples = [_sample("a", 5, 4), _sample("b", 3, 0), _sample("c", 7, 8)]
    batch = collate(samples)
    assert batch["input_ids"].shape == (3, 7)
    assert batch["position_ids"].shape == (3, 3, 7)
    for row, sample in enumerate(samples):
        length = len(sample.input_ids)
        assert batch["input_ids"][row, :length].equal(sample.input_ids)
        assert batch["labels"][row, :length].equal(sample.labels)
        assert batch["position_ids"][:, row, :length].equal(sample.position_ids)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (7 - length)
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == 0).all()
        assert (batch["position_ids"][:, row, length:] == 0).all()
    assert batch["pixel_values"].shape == (12, 6)
    assert batch["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]


def test_collate_of_text_only_has_no_image_keys() -> None:
    assert set(collate([_sample("b", 3, 0)])) == {"input_ids", "attention_mask", "position_ids", "labels"}


def test_sha_sees_every_tensor_and_the_order() -> None:
    one, other = _sample("a", 5, 4), _sample("b", 6, 4)
    base = samples_sha([one, other])
    assert samples_sha([_sample("renamed", 5, 4), other]) == base
    assert samples_sha([other, one]) != base
    for name, tensor in one.tensors.items():
        assert samples_sha([dataclasses.replace(one, **{name: tensor + 1}), other]) != base, name

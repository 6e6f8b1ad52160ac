"""Training of one bundled model on one thread: AdamW, scenes from one object to several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from bundled_models.batches import BatchMaker
from qvl_hydra.calibration.scenes import MAX_OBJECTS

# What training asks for: captions most at first, since they name every object, then everything.
CAPTION_SHARES = {"caption": 0.45, "color": 0.12, "shape": 0.12, "count": 0.11, "end": 0.1, "after": 0.1}
MIXED_SHARES = {"caption": 0.3, "color": 0.18, "shape": 0.18, "count": 0.14, "end": 0.06, "after": 0.14}


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on."""

    steps: int
    seed: int
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup: int = 100  # steps
    decay_from: float = 0.55  # share of the steps after which the learning rate falls linearly to a hundredth
    weight_decay: float = 0.02
    curriculum: tuple[tuple[int, int], ...] = ((250, 1), (700, 2), (1500, 4))  # (before this step, at most so many)
    captions_until: int = 2000  # step
    save_every: int = 500

    def objects_at(self, step: int) -> int:
        return next((count for before, count in self.curriculum if step < before), MAX_OBJECTS)

    def shares_at(self, step: int) -> Mapping[str, float]:
        return CAPTION_SHARES if step < self.captions_until else MIXED_SHARES

    def learning_rate_at(self, step: int) -> float:
        decay_from = self.decay_from * self.steps
        fall = max(0.0, (step - decay_from) / (self.steps - decay_from))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * (1 - 0.99 * fall)


@contextmanager
def batched_vision_attention(model: nn.Module, images: int) -> Iterator[None]:
    """Attend within each image by one masked call; the stock code loops over windows in Python, one call each.

    The result is the same because a window never crosses an image and all images of a batch have one size.
    """
    attentions = [block.attn for block in model.model.visual.blocks]
    for attention in attentions:
        attention.forward = _batched_forward(attention, images)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _batched_forward(attention: nn.Module, images: int) -> Callable[..., Tensor]:
    def forward(
        hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> Tensor:
        length = hidden_states.shape[0]
        per_image = length // images
        qkv = attention.qkv(hidden_states).view(length, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        window = torch.bucketize(torch.arange(per_image), cu_seqlens[1:].to(torch.long), right=True)
        mask = None if int(window[-1]) == 0 else window[:, None] == window[None, :]
        query, key, value = (
            part.view(images, per_image, attention.num_heads, -1).transpose(1, 2) for part in (query, key, value)
        )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
        return attention.proj(out.transpose(1, 2).reshape(length, -1))

    return forward


def optimizer_of(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def train(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Train in place, from the state saved in `folder` if there is one.

    Every `save_every` steps the weights and the optimizer's state are saved and the held-out figure is reported; a
    training that was cut off and goes on takes the same batches as one that was not.
    """
    maker, optimizer = BatchMaker(model.config.model_type, tokenizer, recipe.seed), optimizer_of(model, recipe)
    state, first = folder / "training_state.pt", 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    started, losses, right = time.perf_counter(), [], 0
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(step)
        objects, shares = recipe.objects_at(step), recipe.shares_at(step)
        batch = maker.batch(step, recipe.batch_size, objects, shares, by_shape=True)
        loss, hits = _step(model, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        right += hits
        done = step + 1
        if done % 100 == 0:
            share = right / (recipe.batch_size * len(losses))
            seconds = time.perf_counter() - started
            report(f"step {done}: loss {sum(losses) / len(losses):.4f}, right {share:.3f}, {seconds:.0f} s")
            losses, right = [], 0
        if done % recipe.save_every == 0 or done == recipe.steps:
            report(f"step {done}: held-out exact match {teacher_forced_match(model, tokenizer):.4f}")
            model.save_pretrained(folder)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, state)
    model.eval()


@torch.no_grad()
def teacher_forced_match(model: nn.Module, tokenizer: PreTrainedTokenizerFast, batches: int = 8) -> float:
    """Share of held-out answers whose every token is the most likely one: what greedy decoding would get right."""
    maker, right = BatchMaker(model.config.model_type, tokenizer, seed=1, split="evaluation"), 0
    for number in range(batches):
        right += int(_forward(model, maker.batch(number, 32))[1].sum())
    return right / (32 * batches)


def _step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, int]:
    loss, right = _forward(model, batch)
    loss.backward()
    return float(loss.detach()), int(right.sum())


def _forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss over the answer tokens, and which samples are right in every answer token."""
    labels = batch["labels"][:, 1:]
    answered = labels != -100
    with batched_vision_attention(model, len(labels)):
        hidden = model.model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)[0]
    logits = model.lm_head(hidden[:, :-1][answered])  # the head runs on answer tokens only: most tokens carry no label
    wrong = torch.zeros(labels.shape, dtype=torch.bool)
    wrong[answered] = logits.argmax(-1) != labels[answered]
    return F.cross_entropy(logits, labels[answered]), ~wrong.any(1)

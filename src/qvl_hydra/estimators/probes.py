"""Random probes over the output, whose backward passes sketch every operator's effect at once.

A probe `r` has the metric's matrix as its covariance, so that `E <r, d>^2` is the metric of an output change `d`: the
identity for the squared error (Hutchinson 1990), and for KL the Fisher information `diag(p) - p p'` of each token's
distribution, which gives twice the divergence to second order (Martens 2014, New insights and perspectives on the
natural gradient method).

Every probe is `B s` with random signs `s` and `B B'` that covariance. Signs estimate `||B' d||^2` without noise where
`B' d` has one coordinate, and with most noise where it is spread over many. So `B` is turned to where changes lie: for
the squared error along the leading singular directions of the last weight (a trained head has one far above the
others), for KL along the Fisher information's own eigenvectors among the likely tokens. The probes of a sample are
arranged by a Hadamard matrix, so that together they also cancel products between neighbouring tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from scipy.linalg import hadamard
from torch import Tensor
from torch.nn import functional

from qvl_hydra.estimators.metrics import squared_norms
from qvl_hydra.models.memory import row_parts

LEADING = 32  # directions of the last weight, and likely tokens, that probes are turned to
STEPS = 8  # of subspace iteration


def seeded(*names: object) -> torch.Generator:
    """A generator that depends on the names alone, so that any part of the work can be done again by itself.

    It draws on the CPU, so that every device gets the same.
    """
    digest = hashlib.sha256(repr(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_signs(
    count: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "value"]:
    """As many random signs, drawn as bits and unpacked where they are needed."""
    limits = torch.iinfo(torch.int64)
    words = torch.randint(limits.min, limits.max, (-(-count // 64),), generator=generator)
    packed = words.view(torch.uint8).to(device)
    place = torch.arange(8, dtype=torch.uint8, device=device)
    unpacked = torch.empty(len(packed), 8, dtype=dtype, device=device)
    for rows in row_parts(unpacked):
        unpacked[rows] = (packed[rows, None] >> place) & 1
    return unpacked.flatten()[:count].mul_(2).sub_(1)


class Signs:
    """Random signs of one of a sample's probes.

    Probes come in blocks of a power of two: those of a block share their random signs, times a row of a Hadamard
    matrix each, whose columns go round the coordinates. Every probe on its own is as random as without.

    Args:
        names: what the signs depend on besides the probe.
        probe, probes: which one, of how many.
    """

    def __init__(self, device: torch.device, *names: object, probe: int = 0, probes: int = 1) -> None:
        block = probes & -probes
        self.generator = seeded(*names, probe // block)
        self.row = torch.tensor(hadamard(block)[probe % block], dtype=torch.float32, device=device)

    def draw(self, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, "token width"]:
        """The next signs."""
        signs = random_signs(tokens * width, self.generator, self.row.device, dtype).view(tokens, width)
        if len(self.row) == 1:
            return signs
        around = self.row.to(dtype).repeat((tokens + width) // len(self.row) + 1)
        return signs.mul_(around.unfold(0, width, 1)[:tokens])


@torch.no_grad()
def leading_directions(weight: Float[Tensor, "out *rest"]) -> Float[Tensor, "out direction"]:
    """Leading left singular vectors of a weight by subspace iteration, orthonormal in float32."""
    flat = weight.detach().flatten(1)
    count = min(LEADING, *flat.shape)

    def applied(right: Tensor) -> Tensor:
        return (flat @ right.to(flat.dtype)).float().nan_to_num()  # what is not finite fails scores, not this

    found = torch.randn(flat.shape[1], count, generator=torch.Generator().manual_seed(0)).to(flat.device)
    for _ in range(STEPS):
        found = torch.linalg.qr((flat.T @ applied(found).to(flat.dtype)).float().nan_to_num()).Q
    return _signed(torch.linalg.svd(applied(found), full_matrices=False).U)


def _signed(vectors: Float[Tensor, "*token value direction"]) -> Float[Tensor, "*token value direction"]:
    """The same with each largest component positive: else threads and devices would decide, and probes with them."""
    return vectors * vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True)).sign()


def sign_probes(
    output: Float[Tensor, "token value"], directions: Float[Tensor, "value direction"], signs: Iterable[Signs]
) -> Iterator[Float[Tensor, "token value"]]:
    """Probes for the squared error, of the output's dtype: signs along the directions, and the axes beside them."""
    (tokens, width), directions = output.shape, directions.to(output.dtype)
    for drawn in signs:
        along_axes = drawn.draw(tokens, width, output.dtype)
        along = drawn.draw(tokens, directions.shape[1], output.dtype)
        yield along_axes.addmm_(along - along_axes @ directions, directions.T)


def fisher_probes(
    logits: Float[Tensor, "token vocab"], signs: Iterable[Signs]
) -> Iterator[Float[Tensor, "token vocab"]]:
    """Probes for KL: `B s` with `B = (diag(sqrt p) - p sqrt p') Q`, float32.

    `Q` turns the signs of each token's most likely successors to the eigenvectors of `B' B` among them.
    """
    p = torch.empty(logits.shape, device=logits.device)
    for tokens in row_parts(p):
        p[tokens] = logits[tokens].float().softmax(-1)
    top, places = p.topk(min(LEADING, p.shape[-1]), dim=-1)
    vectors = _eigenvectors(top.sqrt_(), squared_norms(p))
    for drawn in signs:
        turned = torch.einsum("tij,tj->ti", vectors, drawn.draw(*top.shape).flip(1))
        probe = drawn.draw(*p.shape).scatter_(1, places, turned)
        for tokens in row_parts(p):
            mixed = probe[tokens].mul_(p[tokens].sqrt())
            mixed.addcmul_(p[tokens], mixed.sum(-1, keepdim=True), value=-1)
        yield probe


def _eigenvectors(
    root: Float[Tensor, "token likely"], sum_of_squares: Float[Tensor, "token"]
) -> Float[Tensor, "token likely likely"]:
    """Eigenvectors of `(I - u u') diag(p) (I - u u')` with `u = sqrt p`, among the likely tokens; ascending."""
    u = root.double()
    cubed = u**3
    outer = u[:, :, None] * u[:, None, :]
    gram = torch.diag_embed(u.square()) - cubed[:, :, None] * u[:, None, :] - u[:, :, None] * cubed[:, None, :]
    gram += sum_of_squares.double()[:, None, None] * outer
    return _signed(torch.linalg.eigh(gram.nan_to_num()).eigenvectors).to(root.dtype)


def loss_gradient(logits: Float[Tensor, "token vocab"], labels: Int64[Tensor, "token"]) -> Float[Tensor, "token vocab"]:
    """Gradient of the summed loss of the answer tokens; `labels` are those of the next token, -100 where none."""
    chosen = (labels >= 0).float()[:, None]
    onehot = functional.one_hot(labels.clamp(min=0), logits.shape[-1]).float()
    return (logits.float().softmax(-1) - onehot) * chosen

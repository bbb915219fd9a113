"""One step of the textbook's VTP: its losses over whole matrices of scores, its backward, its updates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.textbook import Textbook
from vtp_core.clock import StepClock
from vtp_core.engine import Engine
from vtp_core.forwards import Inputs
from vtp_core.optim import rate_at
from vtp_core.teacher import momentum_at

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(view: Tensor) -> Tensor:
    """uint8 (R, K, 3, H, W) to ImageNet-normalised (K R, 3, H, W), crop after crop."""
    x = view.transpose(0, 1).flatten(0, 1).float() / 255
    return (x - x.new_tensor(MEAN).view(3, 1, 1)) / x.new_tensor(DEVIATION).view(3, 1, 1)


def sinkhorn(scores: Tensor, temperature: float) -> Tensor:
    """Targets (B, K) by three iterations over the whole matrix (DINOv2)."""
    q = torch.exp((scores - scores.max()) / temperature).t()
    prototypes, samples = q.shape
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / prototypes
        q = q / q.sum(dim=0, keepdim=True) / samples
    return (q * samples).t()


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Of each row, (B,)."""
    return -(targets * F.log_softmax(scores / 0.1, dim=-1)).sum(-1)


class Step:
    """The textbook on an engine's stack: ``vtp-tiny``'s objectives, weights, rows and masks."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.steps_done = engine, 0
        self.book: Any = Textbook(engine.model)
        self.optim = engine.train_keys.optim
        trained: list[tuple[str, Tensor]] = [
            (n, p) for n, p in self.book.named_parameters() if p.requires_grad
        ]
        spared = [
            p for n, p in trained if p.ndim < 2 or n.endswith(("token", "positional_embedding", "weight_g"))
        ]
        known = {id(p) for p in spared}
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in trained if id(p) not in known]},
            {"params": spared, "weight_decay": 0.0},
        ]
        keys: dict[str, Any] = {"lr": self.optim.lr, "betas": self.optim.betas, "eps": self.optim.eps}
        self.adamw = torch.optim.AdamW(groups, weight_decay=self.optim.weight_decay, **keys)

    def __call__(self, inputs: Inputs) -> float:
        """Three sets of forwards, one sum, one backward, one update."""
        keys, model = self.engine.train_keys, self.engine.model
        losses = {**self.clip(inputs), **self.understanding(inputs), **self.reconstruction(inputs)}
        loss = torch.stack([value * float(model.settings[n].weight) for n, value in losses.items()]).sum()  # type: ignore[arg-type]
        loss.backward()
        parameters = [p for p in self.book.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(parameters, keys.max_grad_norm or math.inf)
        for group in self.adamw.param_groups:
            group["lr"] = rate_at(self.steps_done, keys.steps, self.optim)
        self.adamw.step()
        self.adamw.zero_grad()
        self.follow(momentum_at(self.steps_done / keys.steps, keys.teacher.momentum))
        self.steps_done += 1
        return float(loss.detach())

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """EMA, one parameter after another."""
        self.book.logit_scale.clamp_(max=math.log(100))
        for copy, module in zip(
            self.book.teacher, (self.book.trunk, self.book.dino_head, self.book.ibot_head), strict=True
        ):
            for slow, fast in zip(copy.parameters(), module.parameters(), strict=True):
                slow.mul_(momentum).add_(fast, alpha=1 - momentum)

    def clip(self, inputs: Inputs) -> dict[str, Tensor]:
        """Image and text towers over the whole batch, and the matrix of all pairs."""
        image = F.normalize(self.book.project(self.book.trunk(normalised(inputs.views["image"]))[0]), dim=-1)
        text = F.normalize(self.book.text(inputs.views["tokens"]), dim=-1)
        scores = self.book.logit_scale.exp() * image @ text.t()  # (B, B)
        own = torch.arange(len(scores))
        return {"clip": (F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)) / 2}

    def understanding(self, inputs: Inputs) -> dict[str, Tensor]:
        """DINO, iBOT and KoLeo on the student's and the teacher's passes over the crops."""
        views, book, model = inputs.views, self.book, self.engine.model
        keys = self.engine.train_keys
        clock = StepClock(keys.seed, self.steps_done, keys.steps)
        rows, count = views["global"].shape[:2]
        mask = self.engine.layout.masks(inputs, clock)["block"].flatten(0, 1)  # (K, R, N) -> (K R, N)
        crops, small = normalised(views["global"]), normalised(views["local"])
        cls, patches = book.trunk(crops, mask)
        local = book.trunk(small)[0]
        centering: Any = model.objectives["dino"].centering
        with torch.no_grad():
            trunk, dino_head, ibot_head = book.teacher
            seen, behind = trunk(crops)
            temperature = centering.temperature_at(clock.share)
            targets = sinkhorn(dino_head(seen), temperature).unflatten(0, (count, rows))
            hidden = sinkhorn(ibot_head(behind[mask]), temperature)
        scores = book.dino_head(torch.cat([cls, local])).unflatten(0, (-1, rows))  # (K + n, R, prototypes)
        pairs = [(t, s) for t in range(count) for s in range(len(scores)) if s != t]
        dino = torch.stack([cross_entropy(scores[s], targets[t]).mean() for t, s in pairs]).mean()
        share = (1 / mask.sum(-1).clamp(min=1))[:, None].expand_as(mask)[mask]
        ibot = (cross_entropy(book.ibot_head(patches[mask]), hidden) * share).sum() / len(mask)
        spread = torch.stack([self.koleo(crop) for crop in cls.unflatten(0, (count, rows))]).sum()
        return {"dino": dino, "ibot": ibot, "koleo": spread}

    def koleo(self, x: Tensor) -> Tensor:
        """Entropy of one crop's features by nearest neighbours."""
        x = F.normalize(x, dim=-1)
        with torch.no_grad():
            neighbour = (x @ x.t()).fill_diagonal_(-1).argmax(1)
        return -(F.pairwise_distance(x, x[neighbour], eps=1e-8) + 1e-8).log().mean()

    def reconstruction(self, inputs: Inputs) -> dict[str, Tensor]:
        """The reconstruction's own trunk pass, L1 and LPIPS."""
        x = normalised(inputs.views["image"][: self.engine.layout.rows["reconstruction"]])
        y = self.book.decoder(self.book.bottleneck(self.book.trunk(x)[1])["latent"])
        shown = [
            2 * (v * v.new_tensor(DEVIATION).view(3, 1, 1) + v.new_tensor(MEAN).view(3, 1, 1)) - 1
            for v in (y, x)
        ]
        return {"reconstruction": (y - x).abs().mean() + self.book.lpips(*shown).mean()}

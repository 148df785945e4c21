"""Train the bundled small model (`sam_poll/data/demo`) on drawn scenes, and measure it.

    python -m tools.train_demo --minutes 75 --start sam_poll/data/demo/demo.pt --out demo.pt
    python -m tools.train_demo --minutes 75 --out demo.pt --resume        # goes on where it stopped
    python -m tools.train_demo --measure 200 --start demo.pt              # figures only

Each step draws a few pictures, asks for several objects in each, and takes the mean loss over all
four masks of the decoder: rewarding only the best one would let each mask settle on its own object
and ignore the prompt. Two more heads, thrown away at the end, are asked for the same object earlier
in the network, which shortens the way for the gradient. What is kept is a moving average of the
weights, whenever it measures better than before on scenes never trained on, through the rules of
inference: one point → the best of three masks by predicted IoU; anything else → one mask (which the
decoder itself exchanges for a better one where it is unstable, as in sam2's own build).

Limitations: the best of many measurements on the same 100 scenes is a little
flattered, so figures to publish come from `--measure`, which draws others. Seeds below 10⁹ are the
training's, those above are for measuring."""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_poll.core.protocols import Engine
from sam_poll.core.types import Picture, Prompt, RgbArray
from sam_poll.engines import sam2, stretched
from sam_poll.imaging.masks import mask_of, paste
from tools import scenes

DEMO = Path(__file__).parents[1] / "sam_poll" / "data" / "demo"
SIDE, LOW = 256, 64  # the network's picture and mask sides
CHECKED, MEASURED = 1_000_000_000, 2_000_000_000  # first seeds: chosen by, and published
SIZES = ((256, 256), (320, 240), (240, 320), (384, 216), (512, 384))
PICTURES, OBJECTS = 6, 6  # a step: more pictures teach more than more questions about few
_MEAN, _STD = (
    torch.tensor(values).view(3, 1, 1) for values in (stretched.MEAN, stretched.DEVIATION)
)


# ── the network ──


def build(config: Path = DEMO / "demo.yaml", weights: Path | None = None) -> nn.Module:
    """The network of `config` on the CPU in float32, with `weights` (`{"model": state_dict}`) or
    fresh ones.
    """
    model: nn.Module = sam2.build(sam2.read_config(config), str(config))
    if weights is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True)["model"]
        model.load_state_dict({name: value.float() for name, value in state.items()})
    return model


def used_in_pictures(model: Any) -> list[nn.Parameter]:
    """The parameters that a still picture reaches; the rest of SAM2 remembers earlier frames of a
    video.
    """
    parts = (model.image_encoder, model.sam_prompt_encoder, model.sam_mask_decoder)
    return [
        *(p for part in parts for p in part.parameters() if p.requires_grad),
        model.no_mem_embed,
    ]


def encode(model: Any, pictures: Tensor) -> list[Tensor]:
    """uint8 B×256×256×3 → features B×C×s×s for s in 64, 32, 16; the last is the embedding."""
    normal = (pictures.permute(0, 3, 1, 2).float() / 255 - _MEAN) / _STD
    _, features, _, sizes = model._prepare_backbone_features(model.forward_image(normal))
    features[-1] = features[-1] + model.no_mem_embed
    return [f.permute(1, 2, 0).unflatten(2, size) for f, size in zip(features, sizes, strict=True)]


def ask(model: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Prompts of one kind, in network pixels → sparse N×(points+1)×C and dense N×C×16×16 prompt
    embeddings.
    """
    rows, marks = [], []
    for prompt in prompts:
        corners = (
            []
            if prompt.box is None
            else [(prompt.box.x0, prompt.box.y0), (prompt.box.x1, prompt.box.y1)]
        )
        rows.append(corners + [(p.x, p.y) for p in prompt.points])
        marks.append([2, 3][: len(corners)] + [p.label for p in prompt.points])
    points = (torch.tensor(rows, dtype=torch.float32), torch.tensor(marks, dtype=torch.int32))
    embeddings: tuple[Tensor, Tensor] = model.sam_prompt_encoder(
        points=points, boxes=None, masks=None
    )
    return embeddings


# ── data ──


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """`pictures` uint8 B×256×256×3; `prompts` B·`OBJECTS` = N of one kind, in network pixels;
    `truth` float32 N×1×64×64, how much of each pixel the object covers."""

    pictures: Tensor
    prompts: list[Prompt]
    truth: Tensor


def squeezed(pixels: RgbArray) -> RgbArray:
    """The picture as the network sees it: 256×256 whatever its sides."""
    if pixels.shape[:2] == (SIDE, SIDE):
        return pixels
    return np.asarray(cv2.resize(pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def draw_batch(rng: np.random.Generator, hardest: float) -> Batch:
    """New pictures with prompts of one kind, in the network's coordinates."""
    kind = str(rng.choice([*scenes.PROMPTS], p=[0.34, 0.3, 0.16, 0.2]))
    pictures: list[Tensor] = []
    prompts: list[Prompt] = []
    truth: list[Tensor] = []
    while len(pictures) < PICTURES:
        size = (
            SIZES[0] if rng.random() < 0.5 else SIZES[rng.integers(1, 4)]
        )  # the largest only takes longer to draw
        count = (
            (1, 1) if rng.random() < 0.1 else (2, 4)
        )  # a lone shape is soon learned; telling several apart is not
        scene = scenes.draw(int(rng.integers(CHECKED)), size, rng.uniform(0, hardest), count)
        picture = squeezed(scene.pixels)
        if rng.random() < 0.3:
            # Red and blue change places twice; the coder's blemishes are what matters.
            coded = cv2.imencode(
                ".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 98))]
            )[1]
            picture = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
        pictures.append(torch.from_numpy(picture))
        masks = [squeezed(mask.astype(np.uint8) * 255) > 127 for mask in scene.masks]
        for n in range(OBJECTS):
            mask = masks[n % len(masks)]
            prompts.append(scenes.prompt_for(mask, kind, rng))
            cover = cv2.resize(mask.astype(np.float32), (LOW, LOW), interpolation=cv2.INTER_AREA)
            truth.append(torch.from_numpy(cover))
    return Batch(torch.stack(pictures), prompts, torch.stack(truth)[:, None])


# ── loss ──


class Helpers(nn.Module):
    """Two heads that exist only in training, on what hooks see inside the decoder."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.coarse, self.fine = (
            nn.Linear(decoder.transformer_dim, 1),
            nn.Conv2d(decoder.transformer_dim // 8, 1, 1),
        )
        self._seen: dict[str, Tensor] = {}
        decoder.transformer.register_forward_hook(
            lambda _, __, out: self._seen.update(tokens=out[1])
        )
        decoder.output_upscaling[-1].register_forward_hook(
            lambda _, __, out: self._seen.update(upscaled=out)
        )

    def loss(self, truth: Tensor) -> Tensor:
        tokens = self.coarse(self._seen["tokens"])  # N×(16·16)×1
        side = math.isqrt(tokens.shape[1])
        coarse = mask_loss(
            tokens.view(-1, 1, side, side), F.interpolate(truth, (side, side), mode="area")
        )
        return coarse.mean() + mask_loss(self.fine(self._seen["upscaled"]), truth).mean()


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Cross entropy and Dice, N×M, of logits N×M×h×w against truth N×1×h×w (a pixel's coverage,
    0…1).
    """
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(
        logits, truth.expand_as(logits), reduction="none"
    ).mean((2, 3))
    overlap, both = (chance * truth).sum((2, 3)), chance.sum((2, 3)) + truth.sum((2, 3))
    return 5 * entropy + 1 - (2 * overlap + 1) / (both + 1)


def step_loss(model: Any, helpers: Helpers, batch: Batch) -> tuple[Tensor, float]:
    """The loss of a batch, and the mean IoU of the single mask, for the log."""
    features = [f.repeat_interleave(OBJECTS, 0) for f in encode(model, batch.pictures)]
    sparse, dense = ask(model, batch.prompts)
    masks, predicted, _, present = model.sam_mask_decoder.predict_masks(
        image_embeddings=features[2],
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        repeat_image=False,
        high_res_features=features[:2],
    )
    with torch.no_grad():
        ours, real = masks > 0, batch.truth > 0.5
        true = (ours & real).sum((2, 3)) / ((ours | real).sum((2, 3)) + 1e-6)
    loss = (
        2.5 * mask_loss(masks, batch.truth).mean()
        + F.mse_loss(predicted, true)
        + 2 * helpers.loss(batch.truth)
    )
    loss = loss + 0.05 * F.binary_cross_entropy_with_logits(present, torch.ones_like(present))
    return loss, true[:, 0].mean().item()


# ── measuring ──


def engine_of(model: nn.Module) -> Engine:
    """A copy of the network as the package runs it."""
    return sam2.Sam2Engine(copy.deepcopy(model))


def measure(engine: Engine, seeds: Iterable[int]) -> dict[str, list[float]]:
    """IoU of every shape of every scene, by kind of prompt, at full size; scenes take turns in
    `SIZES`.
    """
    found: dict[str, list[float]] = {kind: [] for kind in scenes.PROMPTS}
    for seed in seeds:
        scene, rng = scenes.draw(seed, SIZES[seed % len(SIZES)]), np.random.default_rng(seed)
        asked = [
            (kind, mask, scenes.prompt_for(mask, kind, rng))
            for mask in scene.masks
            for kind in found
        ]
        picture = Picture(scene.pixels, scene.size, digest=str(seed))
        (embedding,) = engine.encode([engine.prepare(picture)])
        answers = engine.decode(embedding, [prompt for _, _, prompt in asked])
        for (kind, mask, _), logits in zip(asked, answers, strict=True):
            found[kind].append(scenes.iou(paste(mask_of(logits, kind), scene.size), mask))
    return found


def figures(found: dict[str, list[float]]) -> str:
    return "  ".join(
        f"{kind} {np.mean(v):.4f} ({np.mean(np.array(v) < 0.75):.1%} below 0.75)"
        for kind, v in found.items()
    )


# ── the loop ──


@dataclass(slots=True)
class Progress:
    """Where the training stands; kept beside the weights so that it can be taken up again."""

    step: int = 0
    seconds: float = 0.0
    best: float = -1.0

    def done(self, args: argparse.Namespace) -> float:
        """How much of the steps or the minutes, whichever ends first, is over: 0…1."""
        return min(1.0, max(self.step / args.steps, self.seconds / (60 * args.minutes)))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    run = Run.begin(args)
    rng = np.random.default_rng([args.seed, run.progress.step])
    log = np.zeros(2)
    begun = time.monotonic()
    before = run.progress.seconds
    while (done := run.progress.done(args)) < 1:
        # Fresh weights must first learn to follow the prompt, on scenes where that is easy.
        hardest = args.hardest if args.start else args.hardest * min(1.0, run.progress.step / 4000)
        log += run.step(draw_batch(rng, hardest), rate(args.lr, run.progress.step, done))
        run.progress.seconds = before + time.monotonic() - begun
        if run.progress.step % 100 == 0:
            loss, iou = log / 100
            print(
                f"step {run.progress.step}  {run.progress.seconds:.0f} s  loss {loss:.3f}  IoU "
                f"{iou:.3f}",
                flush=True,
            )
            log[:] = 0
        if run.progress.step % args.check_every == 0 or run.progress.done(args) >= 1:
            run.keep_the_better(args)
            run.save(args.out)


def rate(highest: float, step: int, done: float) -> float:
    """The learning rate: up in 200 steps, then down along a cosine to a hundredth."""
    return highest * min(1, (step + 1) / 200) * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)


@dataclass(slots=True, eq=False)
class Run:
    """A training under way; all of it is saved, so that it can be taken up again."""

    model: Any
    averaged: nn.Module
    helpers: Helpers
    optimizer: torch.optim.Optimizer
    progress: Progress

    @classmethod
    def begin(cls, args: argparse.Namespace) -> Run:
        model: Any = build(args.config, args.start)
        averaged = build(args.config)
        averaged.load_state_dict(model.state_dict())
        helpers = Helpers(model.sam_mask_decoder)
        parameters = [*used_in_pictures(model), *helpers.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
        run = cls(model, averaged, helpers, optimizer, Progress())
        if args.resume:
            run.load(args.out)
        elif args.start:
            run.progress.best = check(averaged, 0, args.check_scenes)
        return run

    def step(self, batch: Batch, rate: float) -> tuple[float, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        loss, iou = step_loss(self.model, self.helpers, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(used_in_pictures(self.model), 5.0)
        self.optimizer.step()
        self.progress.step += 1
        average(
            self.averaged,
            self.model,
            keep=min(0.998, self.progress.step / (self.progress.step + 9)),
        )
        return loss.item(), iou

    def keep_the_better(self, args: argparse.Namespace) -> None:
        score = check(self.averaged, self.progress.step, args.check_scenes)
        if score > self.progress.best:
            self.progress.best = score
            save_weights(self.averaged, args.out)

    def save(self, out: Path) -> None:
        states: dict[str, Any] = {name: part.state_dict() for name, part in self._parts().items()}
        states["progress"] = [self.progress.step, self.progress.seconds, self.progress.best]
        _save(states, state_path(out))

    def load(self, out: Path) -> None:
        states = torch.load(state_path(out), weights_only=True)
        for name, part in self._parts().items():
            part.load_state_dict(states[name])
        self.progress = Progress(*states["progress"])

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "averaged": self.averaged,
            "helpers": self.helpers,
            "optimizer": self.optimizer,
        }


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, keep: float) -> None:
    for old, new in zip(averaged.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)


def check(model: nn.Module, step: int, count: int) -> float:
    """Mean over the kinds of prompt of the mean IoU on the scenes that choose the weights."""
    found = measure(engine_of(model), range(CHECKED, CHECKED + count))
    score = float(np.mean([np.mean(values) for values in found.values()]))
    print(f"check at step {step}: {score:.4f}  {figures(found)}", flush=True)
    return score


def save_weights(model: nn.Module, path: Path) -> None:
    """In half precision: it costs nothing that can be measured, and half the bytes."""
    half = {
        name: value.half() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    _save({"model": half}, path)


def state_path(out: Path) -> Path:
    return out.with_suffix(".state")


def _save(content: dict[str, Any], path: Path) -> None:
    """Whole or not at all: training may be stopped at any moment."""
    temporary = path.with_name(path.name + ".part")
    torch.save(content, temporary)
    temporary.replace(path)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_demo", description="Train the bundled small model."
    )
    parser.add_argument(
        "--steps", type=int, default=50_000, help="at most so many (default: %(default)s)"
    )
    parser.add_argument(
        "--minutes", type=float, default=75, help="at most so long (default: %(default)s)"
    )
    parser.add_argument(
        "--lr", type=float, default=5e-4, help="highest learning rate (default: %(default)s)"
    )
    parser.add_argument("--start", type=Path, help="weights to start from (default: fresh ones)")
    parser.add_argument(
        "--config", type=Path, default=DEMO / "demo.yaml", help="the network (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo.pt"), help="the best weights (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state beside --out")
    parser.add_argument(
        "--hardest",
        type=float,
        default=0.5,
        help="top difficulty of the scenes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument(
        "--check-every", type=int, default=500, metavar="STEPS", help="default: %(default)s"
    )
    parser.add_argument(
        "--check-scenes", type=int, default=100, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--measure", type=int, metavar="N", help="only measure --start on N unseen scenes"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    if args.measure:
        engine = engine_of(build(args.config, args.start))
        print(figures(measure(engine, range(MEASURED, MEASURED + args.measure))))
    else:
        train(args)


if __name__ == "__main__":
    main()

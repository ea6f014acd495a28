"""One training step of a 784-400-20 VAE on binary images: analytic KL, one draw, Adam, new minibatches each epoch.

All sides have the same networks with the same starting weights, an encoder that standardises pixels, the same batch
size, float32, and see every row once an epoch. The hand-written loops are what one writes in PyTorch alone, with fused
Adam; Pythae's trainer is as it comes, its own data loader and records included, with fused Adam too.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from harness import Agreement, Contest, Job, Outcome, Side, Ticks, main, mean_of_last

LATENT_DIM, LEARNING_RATE, WARM_STEPS = 20, 1e-3, 20
TARGETS = {"torch": {128: 1.0, 1024: 1.2}, "pythae": {128: 2.0, 1024: 2.0}}
AGREEMENT = Agreement(
    "means of the last quarter of the losses per datum; order of the rows and draws differ between the sides, by one "
    "per cent of the loss at the most while it still falls",
    relative=1e-2,
    z=5.0,
)


class Work(NamedTuple):
    """What there is to do."""

    rows: int
    columns: int
    hidden: int
    batch: int
    steps: int
    device: str
    engine: str


def contests(size: str, device: str) -> list[Contest]:
    """Return each peer at each batch size; the largest one belongs on an accelerator."""
    if size == "tiny":
        works = [Work(96, 12, 8, 32, 40, device, "captured")]
    else:
        batches = (128, 1024) if device == "cpu" else (128, 1024, 8192)
        steps = {"small": (150, 30, 30), "full": (600, 150, 150)}[size]
        works = [
            Work(max(2048, 2 * batch), 784, 400, batch, count, device, "compiled")
            for batch, count in zip(batches, steps, strict=False)
        ]
    peers = ("torch", "torch-compile", "pythae") if size != "tiny" else ("torch", "pythae")
    return [_contest(peer, work) for work in works for peer in peers]


def _contest(peer: str, work: Work) -> Contest:
    def sides() -> tuple[Side, Side]:
        with _quiet():
            start = starting_point(work)
            return ours(start), PEERS[peer](start)

    names = {
        "torch": "eager torch by hand, fused Adam",
        "torch-compile": "torch.compile by hand, fused Adam",
        "pythae": "Pythae's trainer",
    }
    return Contest(
        name=f"{peer}-{work.batch}",
        peer=names[peer],
        packages=("pythae",) if peer == "pythae" else ("torch",),
        sizes={**work._asdict(), "latent_dim": LATENT_DIM, "precision": "float32"},
        target=TARGETS.get(peer, {}).get(work.batch),
        sides=sides,
        agreement=AGREEMENT,
        unit="training step",
    )


class Start(NamedTuple):
    """Images, and a maker of the entry and guide whose weights all sides start with."""

    work: Work
    x: Any
    make: Callable[[], tuple[Any, Any]]


def starting_point(work: Work) -> Start:
    """Draw binary images of a hidden structure from a fixed seed, and build the entry and its guide for them."""
    import torch

    from elbozoo.guides import build_guide
    from elbozoo.guides.base import GuideOptions
    from elbozoo.models import get_entry
    from elbozoo.models.contract.isolation import isolated

    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(8, work.columns, generator=generator)
    x = torch.bernoulli((torch.randn(work.rows, 8, generator=generator) @ pattern).sigmoid(), generator=generator)
    kind = {"latent_dim": min(LATENT_DIM, work.columns), "hidden": work.hidden, "activation": "relu"}

    def make() -> tuple[Any, Any]:
        entry = get_entry("vae").from_data(x, **kind)
        with isolated(0):
            guide = build_guide("amortized", entry, x, GuideOptions(hidden=work.hidden))
        return entry.to(work.device), guide.to(work.device)

    return Start(work, x.to(work.device), make)


def ours(start: Start) -> Side:
    """Return our side: :func:`run_svi` on the entry ``vae``."""
    from elbozoo.inference.objectives import OBJECTIVES
    from elbozoo.inference.svi import TrainingOptions, run_svi
    from elbozoo.models import Batch
    from elbozoo.models.contract.isolation import isolated

    work = start.work
    options = TrainingOptions(
        steps=work.steps + WARM_STEPS,
        batch_size=work.batch,
        particles=1,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        tolerance=1e-12,
        engine=work.engine,
    )

    def side() -> Outcome:
        entry, guide = start.make()
        clock = _Clock(work.device)
        with isolated(2):
            result = run_svi(
                entry,
                guide,
                OBJECTIVES["elbo-analytic"],
                Batch.full(start.x),
                options,
                progress=False,
                observers=[clock.tick],
            )
        rows = result.trajectory.rows
        inside = sum(row[1] for row in rows[WARM_STEPS:]) / (len(rows) - WARM_STEPS)
        notes = {
            "engine": clock.engine,
            "seconds_inside_steps": inside,
            "steps": len(rows),
            "seconds_of_first_step": rows[0][1],
        }
        reached = mean_of_last([-row[2] / work.rows for row in rows])
        return Outcome(clock.seconds_per_step(WARM_STEPS), *reached, notes)

    return side


class _Clock(Ticks):
    """A clock that waits for an accelerator to be done with the first steps and with the last one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.is_cuda = device.startswith("cuda")

    def tick(self, state: Any = None) -> bool:
        """Note the time."""
        if self.is_cuda and len(self.times) < WARM_STEPS:
            self.wait()
        return super().tick(state)

    def seconds_per_step(self, after: int) -> float:
        """Wall-clock seconds per step, the work that is still under way included."""
        if self.is_cuda:
            self.wait()
            super().tick()
            self.times[-2:] = self.times[-1:]
        return super().seconds_per_step(after)

    def wait(self) -> None:
        """Wait for the accelerator."""
        import torch

        torch.cuda.synchronize()


# ---- written by hand -------------------------------------------------------------------------------------------------


def network(start: Start) -> Any:
    """Return the same encoder and decoder, with the same weights, as a module that gives the loss per datum."""
    import torch
    from torch import nn
    from torch.nn import functional

    entry, guide = start.make()
    source = guide.sources["z"]

    class HandWritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", source.mean)
            self.register_buffer("scale", source.scale)
            self.encoder, self.decoder = source.network, entry.decoder

        def encode(self, x: Any) -> tuple[Any, Any]:
            mean, log_scale = self.encoder((x - self.mean) / self.scale).chunk(2, -1)
            return mean, log_scale

        def forward(self, x: Any) -> Any:
            mean, log_scale = self.encode(x)
            z = mean + log_scale.exp() * torch.randn_like(mean)
            divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1).sum() - log_scale.sum()
            logits = self.decoder(z)
            return (functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") + divergence) / len(x)

    return HandWritten()


def by_hand(start: Start, *, compiled: bool = False) -> Side:
    """Return the loop that one writes in PyTorch alone; ``compiled`` compiles the loss."""
    import torch

    work = start.work

    def minibatches() -> Iterator[Any]:
        while True:
            order = torch.randperm(work.rows)
            for part in order[: work.rows // work.batch * work.batch].split(work.batch):
                yield start.x[part.to(start.x.device)]

    module = network(start)
    loss_of = torch.compile(module) if compiled else module
    first = copy.deepcopy(module.state_dict())

    def side() -> Outcome:
        torch.manual_seed(1)
        module.load_state_dict(first)
        optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
        clock, losses = _Clock(work.device), []
        for _, x in zip(range(work.steps + WARM_STEPS), minibatches(), strict=False):
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            clock.tick()
        return Outcome(clock.seconds_per_step(WARM_STEPS), *mean_of_last(losses))

    return side


# ---- Pythae ----------------------------------------------------------------------------------------------------------


def by_pythae(start: Start) -> Side:
    """Return the side of Pythae's trainer, with the same networks; it takes the mean loss of each batch."""
    import torch
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    work = start.work
    per_epoch = work.rows // work.batch
    epochs = -(-(work.steps + WARM_STEPS) // per_epoch)
    clock_class, model_of = _pythae_clock(), _pythae_model

    def side() -> Outcome:
        torch.manual_seed(1)
        clock = clock_class(work.device)
        with tempfile.TemporaryDirectory() as folder, _quiet():
            config = BaseTrainerConfig(
                output_dir=folder,
                num_epochs=epochs,
                per_device_train_batch_size=work.batch,
                learning_rate=LEARNING_RATE,
                optimizer_cls="Adam",
                optimizer_params={"fused": True},
                no_cuda=work.device == "cpu",
            )
            data = BaseDataset(start.x.cpu(), torch.ones(work.rows))
            BaseTrainer(model_of(start, clock), data, training_config=config, callbacks=[clock]).train()
        return Outcome(clock.ticks.seconds_per_step(WARM_STEPS), *mean_of_last(clock.losses))

    return side


def _pythae_clock() -> Any:
    from pythae.trainers.training_callbacks import TrainingCallback

    class Clock(TrainingCallback):
        def __init__(self, device: str) -> None:
            self.ticks: Ticks = _Clock(device)
            self.losses: list[float] = []

        def on_train_step_end(self, training_config: Any, **kwargs: Any) -> None:
            self.ticks.tick()

    return Clock


def _pythae_model(start: Start, clock: Any) -> Any:
    """Return Pythae's VAE on our networks, which tells the clock its losses."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    whole = network(start)
    latent_dim = min(LATENT_DIM, start.work.columns)

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Any) -> Any:
            mean, log_scale = self.whole.encode(x)
            return ModelOutput(embedding=mean, log_covariance=2 * log_scale)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.network = whole.decoder

        def forward(self, z: Any) -> Any:
            return ModelOutput(reconstruction=self.network(z).sigmoid())

    class Told(VAE):
        def forward(self, inputs: Any, **kwargs: Any) -> Any:
            output = super().forward(inputs, **kwargs)
            clock.losses.append(float(output.loss.detach()))
            return output

    config = VAEConfig(input_dim=(start.work.columns,), latent_dim=latent_dim, reconstruction_loss="bce")
    return Told(config, Encoder(), Decoder())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Pythae says on its way off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


PEERS: dict[str, Callable[[Start], Side]] = {
    "torch": by_hand,
    "torch-compile": lambda start: by_hand(start, compiled=True),
    "pythae": by_pythae,
}
JOB = Job("vae-step", "Training step of a 784-400-20 VAE", contests)

if __name__ == "__main__":
    sys.exit(main(JOB))

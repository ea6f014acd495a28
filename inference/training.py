"""Options of stochastic variational inference."""

from __future__ import annotations

from typing import Literal

from elbozoo.inference.objectives import ObjectiveOptions
from elbozoo.models.contract.options import Field

WINDOW = 100  # steps whose objectives are taken together
PLATEAUS = 4  # times that the objective is flat before the fit ends
DECAY = 0.3  # of the step size at each


class TrainingOptions(ObjectiveOptions):
    """Options of stochastic variational inference."""

    steps: int = Field(10_000, ge=1, description="most gradient steps")
    batch_size: int | None = Field(None, ge=1, description="rows in a minibatch; none chooses by the data's size")
    learning_rate: float = Field(0.01, gt=0, description="Adam's step size at the start")
    schedule: Literal["plateau", "cosine", "constant"] = Field("plateau", description="how the step size falls")
    clip_norm: float | None = Field(
        None, gt=0, description="largest norm of the gradient per datum; none does not clip"
    )
    tolerance: float = Field(1e-4, gt=0, description="gain per 100 steps, nats per datum, that counts as a plateau")
    patience: int | None = Field(
        None,
        ge=1,
        description="evaluations on validation rows without a gain after which the fit ends and goes back to the best "
        "one; none waits for no such thing",
    )
    validate_every: int | None = Field(
        None,
        ge=1,
        description="steps from one evaluation on validation rows to the next; none takes 100 with patience, and "
        "evaluates none without",
    )
    device: str = Field(
        "cpu", description="where the fit runs: cpu, cuda, cuda:N, mps, or auto; it is judged on the CPU all the same"
    )
    engine: Literal["auto", "eager", "captured", "compiled"] = Field(
        "auto",
        description="what runs a step: Pyro as it is, the step captured once as a graph, or that graph compiled to "
        "machine code; auto takes the one that ends first by the size of the step and the number of steps",
    )
    processes: int = Field(
        1,
        ge=1,
        description="processes that share each step's rows, by Lightning Fabric; batch_size is each one's",
    )

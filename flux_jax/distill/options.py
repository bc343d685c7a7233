"""What a distillation does, as one frozen dataclass; every field is a flag of `python -m flux_jax.distill`.

In: nothing, or words of a command line. Out: `Options`, checked. Pure Python: a wrong flag is answered before JAX is
imported. Two runs with equal options, teacher and prompts give the same student.
"""

import dataclasses
from typing import Any, Literal

from flux_jax.errors import UserError
from flux_jax.training.options import check, option

PHASES = ("blockwise", "end_to_end")


@dataclasses.dataclass(frozen=True)
class Options:
    """See each field's own text. Learning rates of shadows are in codes a step: 1 is the way from code 0 to code 1."""

    phases: str = option("blockwise,end_to_end", "phases to run, in order: blockwise, end_to_end, or both; or none")
    seed: int = option(0, "of the prompts' order, the noise, and the batches", least=0, most=2**32 - 1)

    trajectories: int = option(3072, "training trajectories; prompts are taken round after round", least=1)
    held_out: int = option(64, "trajectories of held-out prompts, on which losses are measured", least=1)
    steps: int = option(0, "denoising steps of a trajectory (0: the teacher's default)", least=0)
    guidance: float = option(-1.0, "guidance of the trajectories (negative: the teacher's default)")
    height: int = option(0, "pixels of the trajectories (0: the teacher's default)", least=0)
    width: int = option(0, "pixels of the trajectories (0: the teacher's default)", least=0)
    points: Literal["trajectory", "noise"] = option(
        "trajectory", "train at the teacher's own x_t, or at random noise (known to fail: for the ablation)"
    )

    method: Literal["least-squares", "absmean"] = option("least-squares", "of the first rounding")
    weighted: bool = option(True, "weigh the first rounding of blockwise by the inputs' second moment")
    scales: Literal["channel", "tensor"] = option("channel", "one scale per output channel, or per matrix")
    modulation: bool = option(True, "make the modulation linears ternary, too")
    activations: Literal["bf16", "int8"] = option("bf16", "int8: activations are rounded in training as at run time")
    shadow_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of shadow weights; bfloat16 is updated with stochastic rounding"
    )
    train_rest: bool = option(True, "train what stays floating, too: biases, norms; end to end also the embedders")

    optimizer: Literal["adam", "muon"] = option("adam", "of the shadow weights; everything else has Adam")
    block_steps: int = option(300, "steps for each block of phase blockwise", least=1)
    block_points: int = option(8192, "points whose hidden states phase blockwise keeps", least=1)
    block_batch: int = option(64, "points of a step", least=1)
    block_learning_rate: float = option(1e-2, "of shadow weights", least=0)
    learning_steps: int = option(10000, "steps of phase end_to_end", least=1)
    settle_steps: int = option(
        3000,
        "further steps of phase end_to_end, in which codes are frozen and all floats learn; 0: none",
        least=0,
    )
    own_trajectories: int = option(
        1024,
        "on-policy rollouts: trajectories that the student samples itself, anew at each quarter of phase end_to_end and"
        " before codes freeze: half of a batch's points are then theirs, with the teacher's velocity; 0: none",
        least=0,
    )
    batch: int = option(32, "points of a step of phase end_to_end", least=1)
    accumulate: int = option(1, "parts that a batch is worked on in, for want of memory", least=1)
    learning_rate: float = option(4e-3, "of shadow weights", least=0)
    settle_rate: float = option(5e-3, "in place of it while codes are frozen, for the two shares that follow", least=0)
    scale_rate: float = option(
        0.3, "learning rate of scales, as a share of the shadows' and of the scale itself", least=0
    )
    rest_rate: float = option(0.1, "learning rate of what stays floating, as a share of the shadows'", least=0)
    warmup: float = option(0.02, "first share of a phase's steps, over which learning rates rise", least=0, most=1)
    decay: float = option(1.0, "last share of a phase's steps, over which they fall to zero", least=0, most=1)
    decay_power: float = option(
        2.0, "they fall as this power of what is left of it; 1: in a line (a small rate flips few codes)", least=0
    )
    ema: float = option(0.995, "decay of the running mean of the weights, which is what is kept", least=0, most=1)
    timesteps: Literal["uniform", "step", "error"] = option(
        "uniform",
        "draw a trajectory's points alike, by the length of their Euler step, or by the rounded student's error",
    )
    rematerialise: bool = option(False, "recompute blocks in the backward pass: less memory, a third more time")

    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "of activations; auto: bfloat16 on a GPU")
    products: Literal["float32", "bfloat16"] = option(
        "bfloat16", "of the operands of the student's products, where activations are float32"
    )
    save_every: int = option(500, "steps between checkpoints", least=1)
    log_every: int = option(50, "steps between lines of metrics", least=1)
    max_skipped: int = option(20, "steps whose loss is not finite, before the run stops", least=0)

    @property
    def phase_list(self) -> tuple[str, ...]:
        return tuple(p for p in self.phases.split(",") if p and p != "none")

    @property
    def end_to_end_steps(self) -> int:
        """All steps of phase end_to_end, those with frozen codes among them."""
        return self.learning_steps + self.settle_steps

    def __post_init__(self):
        check(self)
        if unknown := [phase for phase in self.phase_list if phase not in PHASES]:
            raise UserError(f"Unknown phase {unknown[0]!r}: phases are {' and '.join(PHASES)}.")
        if list(self.phase_list) != [phase for phase in PHASES if phase in self.phase_list]:
            raise UserError(f'phases="{self.phases}" must name each phase once and in order: {",".join(PHASES)}.')
        if self.batch % self.accumulate:
            raise UserError(f'batch="{self.batch}" cannot be split into accumulate="{self.accumulate}" equal parts.')

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


QUICK: dict[str, Any] = {  # what --quick sets where no flag says otherwise: FLUX-nano in minutes on two cores
    "trajectories": 256,
    "held_out": 16,
    "block_steps": 40,
    "block_points": 1024,
    "block_batch": 32,
    "learning_steps": 260,
    "settle_steps": 60,
    "own_trajectories": 0,
    "batch": 32,
    "learning_rate": 6e-3,
    "decay": 0.5,  # so few steps need a high rate for longer
    "decay_power": 1.0,
    "ema": 0.97,
    "save_every": 150,
    "log_every": 20,
}

LARGE: dict[str, Any] = {  # what --large sets where no flag says otherwise: FLUX.1-dev in half a day of an H100's time
    "trajectories": 1024,
    "held_out": 16,
    "block_steps": 1000,
    "block_points": 1024,
    "block_batch": 16,
    "learning_steps": 1600,
    "settle_steps": 400,
    "own_trajectories": 128,
    "batch": 16,
    "rematerialise": True,
}

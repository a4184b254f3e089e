"""All that the next step depends on: taken from a running training, and put back into another."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .errors import InputError
from .meter import Meter
from .runtime import float_buffers

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    from .agreement import Agreement


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs done, validated
    epoch_step: int = 0  # optimizer steps done of the epoch under way
    step: int = 0  # optimizer steps done
    images: int = 0
    seconds: float = 0.0  # spent training, evaluation and saving not counted
    best_accuracy: float = -1.0  # on the validation set, percent
    best_epoch: int = 0
    skipped_steps: int = 0  # their gradient was not finite
    skipped_in_row: int = 0  # the last ones


@dataclass
class TrainingState:
    """The parts of a training that change from step to step.

    Weights, their average, optimizer, schedule and scaler are the same on all ranks. Random numbers, running
    statistics and the figures since the last log line are each rank's own: all of them are saved, so that the same
    number of ranks goes on bit for bit; another number shares them out.
    """

    accelerator: "Accelerator"
    agreement: "Agreement"
    seed: int
    model: nn.Module
    ema: AveragedModel | None
    optimizer: "AcceleratedOptimizer"
    scheduler: "AcceleratedScheduler"
    meter: Meter
    progress: Progress
    _random: "dict[str, Any] | None" = None  # to be put back when the epoch under way goes on

    def take(self) -> dict[str, Any] | None:
        """The state on the main process, None on the others; every rank must call it."""
        ranks = self.agreement.gather(self._of_this_rank())
        if ranks is None:
            return None
        scaler = self.accelerator.scaler
        state = {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "ema_updates": None if self.ema is None else self.ema.n_averaged,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ranks": ranks,
        }
        if len(ranks) > 1:
            # Whoever loads the weights alone gets the statistics of all ranks, as after a whole epoch.
            for part in ("model", "ema"):
                if state[part] is not None:
                    state[part] = {**state[part], **_means(ranks, f"{part}_buffers")}
        return state

    def put_back(self, state: dict[str, Any], name: str) -> None:
        """Take up a state that `take` returned, of any number of ranks.

        Raises:
            InputError: it is not of such a training; `name` says which it is.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
                self.ema.n_averaged.copy_(state["ema_updates"])
            if self.accelerator.scaler is not None and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self._put_back_rank(state["ranks"])
            # In place: the trainer holds it too.
            vars(self.progress).update(asdict(Progress(**state["progress"])))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{name} does not fit this run: {' '.join(str(error).split())[:300]}") from error

    def seed_epoch(self) -> None:
        """Random numbers (dropout and the like) for what is left of the epoch under way.

        They depend on (seed, epoch, rank), so a run draws the same whether or not it was resumed; in the middle of
        an epoch the generators go on where they were. Python's and NumPy's are drawn from by nothing in a training.
        """
        progress, rank = self.progress, self.accelerator.process_index
        if progress.epoch_step == 0:
            _seed_all(self.seed, progress.epoch, rank)
        elif self._random is None:
            _seed_all(self.seed, progress.epoch, rank, progress.epoch_step)
        else:
            torch.set_rng_state(self._random["cpu"])
            if self._random["cuda"] is not None and self.accelerator.device.type == "cuda":
                torch.cuda.set_rng_state(self._random["cuda"], self.accelerator.device)
        self._random = None

    def _of_this_rank(self) -> dict[str, Any]:
        device = self.accelerator.device
        several = self.accelerator.num_processes > 1
        averaged = self.ema.module if self.ema is not None and several else None
        return {
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
                "device": device.type,
            },
            "meter": self.meter.state(),
            # One rank's are in its weights already.
            "model_buffers": _copied(float_buffers(self.model)) if several else {},
            "ema_buffers": {} if averaged is None else _copied(float_buffers(averaged)),
        }

    def _put_back_rank(self, ranks: list[dict[str, Any]]) -> None:
        size, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.meter.put_back([one["meter"] for one in ranks])
        if len(ranks) != size:
            self._random = None  # that many generators are not there; new ones are seeded
            return  # the weights hold the ranks' mean statistics
        own = ranks[rank]
        self._random = own["random"] if own["random"]["device"] == self.accelerator.device.type else None
        for module, part in ((self.model, "model_buffers"), (self.ema and self.ema.module, "ema_buffers")):
            if module is not None:
                buffers = float_buffers(module)
                for name, value in own[part].items():
                    buffers[name].copy_(value)


def _seed_all(*parts: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1)[0]))


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _means(ranks: list[dict[str, Any]], part: str) -> dict[str, Tensor]:
    """Mean over ranks of each buffer, in float64 on the way."""
    return {
        name: torch.stack([one[part][name].double() for one in ranks]).mean(0).to(value.dtype)
        for name, value in ranks[0][part].items()
    }

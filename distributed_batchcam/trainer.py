"""The training loop: one process or many, one run directory."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor
from tqdm import tqdm

from .agreement import Agreement
from .bad_steps import BadSteps
from .checkpoint import load_checkpoint
from .checkpoint_writer import CheckpointSchedule, CheckpointWriter, keep_trying
from .config import RunConfig
from .cuda_graph import GraphedPass
from .data import Batch, Data, ImageSet, Loader, dataset_prototypes
from .debug import DebugMonitor
from .errors import InputError, OneRankError
from .evaluation import Evaluation, evaluate
from .explainer import Explainer
from .heartbeat import Heartbeat, lost_before_training
from .malloc import keep_freed_memory, use_huge_pages
from .measures import BASIC, Measure, default_masks, map_measures
from .meter import Meter
from .models import CAMModel, count_gflops, count_parameters, create_model
from .objectives import CAMLossOptions, LossParts, Objective
from .optim import make_ema, make_optimizer, make_scheduler
from .results import Results, model_metadata, write_identity, write_pictures
from .run_data import facts_of, load_run_data, run_masks, run_prototypes
from .run_directory import RunDirectory
from .runtime import (
    EMULATED_BF16,
    SHARED_STORE,
    average_buffers,
    decided_by_main,
    describe,
    emulates_bf16,
    restarts_may_not_meet,
    start_accelerator,
)
from .signals import DeferredSignals, Stopped, pass_on
from .tracking import MetricsFile, SafeTracker
from .training_state import Progress, TrainingState

if TYPE_CHECKING:
    from accelerate import Accelerator

EVALUATION_BATCH = 512
STOP_SECONDS = 20
"""Tries to write the checkpoint of a run that a signal stops: launchers kill after 30."""
FINISH_SECONDS = 300
"""Tries to write what a finished run leaves, or half of --timeout, since the other ranks wait."""


def train(config: RunConfig, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """Train one model and leave a run directory; under a launcher, call it in every process.

    Args:
        config: what to train.
        on_epoch: called on the main process after each epoch, once its checkpoint is saved, with the line of
            metrics.jsonl about the validation set. What it raises ends the run, which can be resumed.

    SIGTERM and SIGINT that reach the main thread of any process meanwhile stop the run after a whole step, with a
    checkpoint, and are then passed on to the handlers that were there before.

    Returns:
        What summary.json holds.

    Raises:
        InputError: anything about the request that cannot be right; nothing is left behind then.
    """
    with lost_before_training():
        return _train(config, on_epoch)


def _train(config: RunConfig, on_epoch: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    use_huge_pages()
    accelerator = start_accelerator(config)
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # and after the run too: glibc has no way back to its own adaptive defaults
    if accelerator.is_main_process:
        print(f"batchcam: {describe(accelerator)}", flush=True)
        if restarts_may_not_meet():
            _warn(SHARED_STORE)
        if config.precision == "bf16" and emulates_bf16(accelerator.device):
            _warn(EMULATED_BF16)
    run_dir = decided_by_main(accelerator, lambda: RunDirectory.choose(config))
    if config.debug:
        torch.use_deterministic_algorithms(True)
        torch.autograd.set_detect_anomaly(True)
    try:
        return _run(config, accelerator, run_dir, on_epoch)
    except torch.OutOfMemoryError as error:
        raise OneRankError(_out_of_memory(config, accelerator)) from error
    except Stopped as stopped:
        pass_on(stopped)
    finally:
        torch.autograd.set_detect_anomaly(False)
        torch.use_deterministic_algorithms(False)


def _run(
    config: RunConfig,
    accelerator: "Accelerator",
    run_dir: RunDirectory,
    on_epoch: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    trainer: Trainer | None = None
    try:
        with Heartbeat(accelerator, config.timeout) as heartbeat:
            data = load_run_data(config, accelerator)
            trainer = Trainer(config, accelerator, heartbeat, data, run_dir)
            trainer.open_run()
            return trainer.fit(on_epoch)
    finally:
        if trainer is not None:
            trainer.close()


class Trainer:
    """One run: model, data, objective, and where they stand."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: "Accelerator",
        heartbeat: Heartbeat,
        data: Data,
        run_dir: RunDirectory,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.heartbeat = heartbeat
        self.data = data
        self.run_dir = run_dir
        self.prototypes = run_prototypes(config, data)
        device = accelerator.device

        # The same weights on every rank and for every world size.
        torch.manual_seed(config.seed)
        model = create_model(
            config.model,
            data.num_classes,
            data.channels,
            data.image_size,
            pretrained=config.pretrained,
            target_layer=config.target_layer,
        )
        self.parameters = count_parameters(model)
        self.gflops = count_gflops(model, data.channels, data.image_size)
        if config.sync_batchnorm:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if config.channels_last:
            model = model.to(memory_format=torch.channels_last)
        model = model.to(device)
        self.ema = make_ema(config, model)
        if config.compile:
            # The backbone on its own, and the maps below: the head between them is differentiated twice.
            model.compile_backbone()
        self.model = model  # the bare one, for evaluation and saving

        self.loader = self._loader(data.train, config.batch_size // config.accumulate, shuffle=True)
        self.steps_per_epoch = len(data.train) // config.batch_size
        optimizer = make_optimizer(config, model)
        scheduler = make_scheduler(config, optimizer, self.steps_per_epoch * config.epochs)
        self.objective = Objective(
            config.objective,
            self.prototypes["train"],
            weight=config.weight,
            class_weight=config.class_weight,
            label_smoothing=config.label_smoothing,
            options=CAMLossOptions(
                config.cam_class,
                config.reduction,
                config.resize,
                config.ssim_exponents,
                config.margin,
                config.support,
                config.departure,
                partial(dataset_prototypes, data.train, data.num_classes, normalize=False, workers=config.workers),
            ),
        ).to(device)
        if self.objective.differentiates_images:
            _allow_double_backward(config, model)
        self.masks = run_masks(config, data) if self.objective.needs_masks else None
        if config.compile:
            self.objective.compile_maps()
        with warnings.catch_warnings():
            # Newer torch renames the option that `start_accelerator` sets; Accelerate does not know the new name yet.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            self.ddp, self.optimizer, self.scheduler = accelerator.prepare(model, optimizer, scheduler)
        self.debug = DebugMonitor(model) if config.debug else None
        self.forward_backward: Callable[..., tuple[LossParts, Tensor]] = self._forward_backward
        if config.cuda_graph:
            _allow_cuda_graph(config, accelerator)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self.forward_backward = GraphedPass(self._forward_backward, trained)

        self.progress = Progress()
        self.meter = Meter(accelerator)
        self.agreement = Agreement(accelerator, timedelta(seconds=config.timeout))
        self.state = TrainingState(
            accelerator,
            self.agreement,
            config.seed,
            model,
            self.ema,
            self.optimizer,
            self.scheduler,
            self.meter,
            self.progress,
        )
        self.bad_steps = BadSteps(
            accelerator, self.agreement, self.optimizer, model, config.max_bad_steps, run_dir.path
        )
        self.signals = DeferredSignals()
        self.schedule = CheckpointSchedule(config.checkpoint_interval)
        self.writer = CheckpointWriter(run_dir, config.keep_checkpoints, _warn)
        self.metrics: MetricsFile | None = None
        self.tracker: SafeTracker | None = None

    # Run directory -----------------------------------------------------------------------------------

    def open_run(self) -> None:
        """Create the run directory, or take up the newest intact checkpoint of an existing one."""
        decided_by_main(self.accelerator, self.run_dir.claim)
        metrics = self._resume() if self.run_dir.resumed else []
        decided_by_main(self.accelerator, lambda: self._begin_files(metrics))

    def _resume(self) -> list[str]:
        """Take up the newest checkpoint that is intact, if any; returns the lines of metrics that were logged then."""
        config, data = self._resolved_config(), facts_of(self.data)
        chosen = decided_by_main(self.accelerator, lambda: self.run_dir.newest_intact_checkpoint(config, data))
        if chosen is None:
            return []
        state = load_checkpoint(chosen)
        self.state.put_back(state, f"checkpoint {chosen}")
        metrics: list[str] = state["metrics"]
        return metrics

    def _begin_files(self, metrics: list[str]) -> None:
        path, config = self.run_dir.path, self._resolved_config()
        try:
            write_identity(self.run_dir, config, self.prototypes)
            for loss in self.objective.losses:
                write_pictures(path, loss.pictures)
            self.metrics = MetricsFile(path / "metrics.jsonl", metrics)
        except OSError as error:
            raise InputError(f"--out {path} cannot be written: {error.strerror or error}") from error
        self.tracker = SafeTracker(config, path, self.progress.step if self.run_dir.resumed else None)
        print(self._headline(), flush=True)
        for loss in self.objective.losses:
            if loss.note:
                files = "".join(f"; {path / name}.png shows where" for name in loss.pictures)
                print(f"batchcam: {loss.note}{files}", flush=True)

    def close(self) -> None:
        """End what runs beside the training, and let others into the run directory."""
        self.writer.close()
        if self.metrics is not None:
            self.metrics.close()
        if self.tracker is not None:
            self.tracker.close()
        self.run_dir.release()

    def _headline(self) -> str:
        config, data = self.config, self.data
        weight = "" if config.objective == "baseline" else f" at weight {config.weight:g}"
        validation = "the test set" if data.valid is data.test else f"{len(data.valid):,}"
        return (
            f"batchcam: {config.model} ({self.parameters:,} parameters, {self.gflops:.4f} GFLOPs) with "
            f"{config.objective}{weight} on {data.name}: {len(data.train):,} images of {data.channels}×"
            f"{data.image_size}×{data.image_size} to train, {validation} to validate, {len(data.test):,} to test\n"
            f"batchcam: run directory {self.run_dir.path}"
        )

    def _resolved_config(self) -> RunConfig:
        """The configuration with the defaults that depend on other choices filled in."""
        found = {
            "data_root": self.data.data_root,
            "image_size": self.data.image_size,
            "warmup": self.config.warmup_share,
        }
        return self.config.model_copy(update=found)

    # Training ----------------------------------------------------------------------------------------

    def fit(self, on_epoch: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Train to the last epoch, evaluate, and write what a finished run leaves; `on_epoch` as for `train`."""
        with self.signals, self._progress_bar() as bar:
            while self.progress.epoch < self.config.epochs:
                self.train_epoch(bar)
                figures = self.validate_epoch()
                self.end_epoch(figures, on_epoch)
        summary = self.finish()
        if self.debug is not None:
            summary["debug_passed"] = self.debug.verdict()
        return summary

    def train_epoch(self, bar: "tqdm[Any]") -> None:
        """One pass over the training set, or what is left of it, in whole global batches."""
        self.state.seed_epoch()
        self.ddp.train()
        self.meter.start()
        for piece, batch in self._pieces():
            self.meter.add(self.train_step(batch), batch)
            bar.update(batch.batch_size)
            if piece % self.config.accumulate == 0:
                self.end_step(bar)
        self.progress.epoch += 1
        self.progress.epoch_step = 0
        average_buffers(self.model, self.accelerator)
        if self.ema is not None:
            average_buffers(self.ema.module, self.accelerator)

    def _pieces(self) -> Iterator[tuple[int, Batch]]:
        """The pieces of global batches that are left of the epoch, numbered from 1; the order differs by epoch."""
        done = self.progress.epoch_step * self.config.accumulate
        numbers = range(done + 1, self.steps_per_epoch * self.config.accumulate + 1)
        return zip(numbers, self.loader.epoch(self.progress.epoch, done), strict=False)

    def train_step(self, batch: Batch) -> tuple[LossParts, Tensor]:
        """Forward, loss, backward and, at the end of a global batch, the optimizer's step."""
        self.bad_steps.before_forward(batch)
        masks = () if self.masks is None else (self.masks(batch),)
        with self.accelerator.accumulate(self.ddp):
            parts, right = self.forward_backward(batch.images, batch.targets, *masks)
            if self.accelerator.sync_gradients:
                self.bad_steps.before_step(self._clip_gradient())
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            if self.ema is not None and self.accelerator.sync_gradients:
                self.ema.update_parameters(self.model)
        return parts, right

    def _forward_backward(
        self, pixels: Tensor, targets: Tensor, masks: Tensor | None = None
    ) -> tuple[LossParts, Tensor]:
        """From this rank's share of a piece of a global batch to gradients; loss parts, and how many were right."""
        pixels = pixels.detach().requires_grad_(self.objective.differentiates_images)
        images = self.data.normalize(pixels)
        if self.config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        output = self.ddp(images)
        parts = self.objective(
            output.logits,
            output.features,
            targets,
            pixels,
            alpha=output.alpha,
            batch_size=self.loader.batch_size,
            masks=masks,
        )
        self.accelerator.backward(parts.total)
        if self.debug is not None:
            self.debug.after_backward(images, output, parts)
        right = (output.logits.detach().argmax(1) == targets).sum()
        return LossParts(*(part.detach() for part in parts)), right

    def _clip_gradient(self) -> Tensor:
        """Clip the gradient where that is asked for; returns its norm before, on the device."""
        if self.config.clip_norm is not None:
            return self.accelerator.clip_grad_norm_(self.ddp.parameters(), self.config.clip_norm)
        gradients = [parameter.grad for parameter in self.ddp.parameters() if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def end_step(self, bar: "tqdm[Any]") -> None:
        """Count the step; log, save and stop where that is due."""
        progress = self.progress
        progress.step += 1
        progress.epoch_step += 1
        self.heartbeat.step = progress.step
        last = progress.epoch_step == self.steps_per_epoch
        if progress.step % self.config.log_every == 0 or last:
            self.log_train(bar)
        due = self.schedule.after_step(progress) and not last  # the end of the epoch is saved after its validation
        now = last or (due and not self.schedule.by_clock)
        signal, due = self.agreement.after_step(self.signals.received, due, now=now)
        if signal or due:
            self.save_checkpoint()
        if signal:
            self.stop(signal)

    def end_epoch(self, figures: dict[str, Any], on_epoch: Callable[[dict[str, Any]], None] | None) -> None:
        """Save where that is due, tell `on_epoch`, and stop if asked to."""
        progress = self.progress
        due = self.schedule.after_epoch(progress) or progress.epoch in (progress.best_epoch, self.config.epochs)
        signal, due = self.agreement.after_step(self.signals.received, due, now=True)
        if signal or due:
            self.save_checkpoint()
        if on_epoch is not None and self.accelerator.is_main_process:
            self.writer.wait()
            on_epoch(figures)
        if signal:
            self.stop(signal)

    def stop(self, signal: int) -> NoReturn:
        """Leave once the checkpoint is on disk. No rank goes before: its launcher would end the others."""
        if not self.writer.insist(STOP_SECONDS):
            _warn(f"step {self.progress.step} is lost, as its checkpoint could not be written")
        self.accelerator.wait_for_everyone()
        raise Stopped(signal)

    def log_train(self, bar: "tqdm[Any]") -> None:
        """One line of metrics, averaged since the last; the only place of the loop that waits for the device."""
        self.bad_steps.check(self.progress)
        figures = self.meter.read()
        self.progress.images += figures.pop("images")
        self.progress.seconds += figures.pop("seconds")
        if not math.isfinite(figures["loss"]):
            raise FloatingPointError(
                f"the loss is not finite around step {self.progress.step}: lower --lr or --weight, or set --clip-norm"
            )
        skipped = self.progress.skipped_steps
        self._log({"split": "train", "lr": self.scheduler.get_last_lr()[0], **figures, "skipped_steps": skipped})
        bar.set_description(f"epoch {self.progress.epoch + 1}/{self.config.epochs}")
        shown = {"loss": "loss", "ce": "loss_class", "cam": "loss_cam"}
        bar.set_postfix({label: f"{figures[name]:.4f}" for label, name in shown.items()})

    def validate_epoch(self) -> dict[str, Any]:
        """Evaluate on the validation set and remember the best epoch; returns what is logged of it."""
        result = self.evaluate("valid")
        figures = result.figures()
        if figures["loss"] is None:
            raise FloatingPointError("the validation loss is not finite: lower --lr or --weight, or set --clip-norm")
        if result.accuracy > self.progress.best_accuracy:
            self.progress.best_accuracy, self.progress.best_epoch = result.accuracy, self.progress.epoch
        line = self._log({"split": "valid", **figures})
        if self.tracker is not None:
            prototypes, step = self.prototypes["valid"], self.progress.step
            self.tracker.show_class_maps(prototypes, result.class_maps, self.data.classes, step)
        if self.accelerator.is_main_process:
            rate = self.progress.images / max(self.progress.seconds, 1e-9)
            tqdm.write(
                f"epoch {self.progress.epoch}/{self.config.epochs}: validation accuracy {figures['accuracy']:.2f} %, "
                f"loss {figures['loss']:.4f}, CAM L1 {figures['cam_l1']:.4f}, CAM SSIM {figures['cam_ssim']:.3f}, "
                f"class CAM SSIM {figures['class_cam_ssim']:.3f} ({rate:,.0f} images/s)"
            )
        return line

    def evaluate(self, split: str, measures: Sequence[Measure] = BASIC) -> Evaluation:
        """Evaluate the weights that count (the moving average, where there is one) on `valid` or `test`."""
        loader = self._loader(getattr(self.data, split), EVALUATION_BATCH)
        prototypes = self.prototypes["valid"].to(self.accelerator.device)
        return evaluate(self._explainer(), loader, prototypes, measures)

    def _explainer(self) -> Explainer:
        return Explainer(self._weights_that_count(), self.data.normalize, self.accelerator.autocast)

    def finish(self) -> dict[str, Any]:
        """Final figures and files."""
        masks = default_masks(self.config.dataset, self.data.test)
        test = self.evaluate("test", map_measures(len(self.data.test), self.data.num_classes, masks))
        model = self._weights_that_count()
        best: Evaluation | None = test
        if self.progress.best_epoch != self.progress.epoch:
            last = {key: value.cpu().clone() for key, value in model.state_dict().items()}
            best = self._evaluate_best(model)
            model.load_state_dict(last)
        config, explainer = self._resolved_config(), self._explainer()
        results = Results(config, self.data, self.prototypes, explainer, self.accelerator, test, best)
        summary = results.summary(self.progress, self.parameters, self.gflops)
        if self.accelerator.is_main_process:
            assert self.metrics is not None
            assert self.tracker is not None
            keep_trying(
                partial(results.write, self.run_dir, summary, self.metrics),
                f"the results in {self.run_dir.path}",
                min(FINISH_SECONDS, config.timeout / 2),
                _warn,
            )
            named = {f"test/{name}": value for name, value in test.figures().items()}
            self.tracker.log(named, self.progress.step)
            self.tracker.finish(summary, self.run_dir.path)
        self.accelerator.wait_for_everyone()
        return summary

    def _evaluate_best(self, model: CAMModel) -> Evaluation | None:
        """Load the weights of the best epoch and evaluate them; None where its checkpoint is lost, which is said."""

        def load() -> dict[str, Any] | None:
            self.writer.wait()
            try:
                return load_checkpoint(self.run_dir.checkpoint(self.progress.best_epoch))
            except InputError as error:
                _warn(f"{error}: the test accuracy of the best epoch is not known")
                return None

        state = load() if self.accelerator.is_main_process else None
        if not decided_by_main(self.accelerator, lambda: state is not None):
            return None
        state = state or load_checkpoint(self.run_dir.checkpoint(self.progress.best_epoch))
        model.load_state_dict(state["ema" if self.ema is not None else "model"])
        return self.evaluate("test")

    # Checkpoints -------------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Save everything that the next step depends on; keep the newest few and the best."""
        progress = self.progress
        self.bad_steps.check(progress)
        state = self.state.take()
        if state is not None:
            assert self.metrics is not None
            within_epoch = progress.step if progress.epoch_step else None
            self.writer.save(
                self.run_dir.checkpoint(progress.epoch, within_epoch).name,
                {
                    "config": self._resolved_config().model_dump(mode="json"),
                    "metadata": model_metadata(self.config, self.data),
                    "data": facts_of(self.data),
                    "metrics": self.metrics.lines,
                    **state,
                },
                progress.best_epoch,
            )
        self.schedule.saved()
        self.meter.start()

    # Small things ------------------------------------------------------------------------------------

    def _loader(self, images: ImageSet, batch_size: int, *, shuffle: bool = False) -> Loader:
        accelerator = self.accelerator
        return Loader(
            images,
            batch_size,
            accelerator.device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            shuffle=shuffle,
            drop_last=shuffle,
            seed=self.config.seed,
            workers=self.config.workers,
        )

    def _weights_that_count(self) -> CAMModel:
        return self.model if self.ema is None else cast(CAMModel, self.ema.module)

    def _log(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """Log metrics on the main process; returns the line of metrics.jsonl."""
        epoch = self.progress.epoch + (metrics["split"] == "train")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"step": self.progress.step, "epoch": epoch, **metrics, "time": now}
        if self.metrics is not None and self.tracker is not None:
            self.metrics.log(line)
            named = {f"{metrics['split']}/{key}": value for key, value in metrics.items() if key != "split"}
            self.tracker.log({"epoch": epoch, **named}, self.progress.step)
        return line

    def _progress_bar(self) -> "tqdm[Any]":
        return tqdm(
            total=self.steps_per_epoch * self.config.batch_size * self.config.epochs,
            initial=self.progress.step * self.config.batch_size,
            unit=" images",
            unit_scale=True,
            # None: quiet where there is no terminal.
            disable=None if self.accelerator.is_main_process else True,
            dynamic_ncols=True,
        )


def _out_of_memory(config: RunConfig, accelerator: "Accelerator") -> str:
    pieces = 2 * config.accumulate
    return (
        f"out of memory on {accelerator.device} with --batch-size {config.batch_size} in {config.accumulate} pieces on "
        f"{accelerator.num_processes} processes: lower --batch-size, cut it with --accumulate {pieces}, use more "
        "processes, or try --precision bf16 or a smaller --image-size"
    )


def _warn(line: str) -> None:
    tqdm.write(f"batchcam: {line}", file=sys.stderr)


def _allow_double_backward(config: RunConfig, model: CAMModel) -> None:
    """Require a network that can be differentiated twice from the images on."""
    for name in ("compile", "sync_batchnorm"):
        if getattr(config, name):
            flag = name.replace("_", "-")
            raise InputError(f"--objective {config.objective} differentiates the network twice: leave --{flag} out")
    model.allow_double_backward()


def _allow_cuda_graph(config: RunConfig, accelerator: "Accelerator") -> None:
    """Require a step that is the same operations every time, gradients and all, on one GPU."""
    if config.accumulate > 1:
        raise InputError("--cuda-graph computes every gradient anew: leave --accumulate out")
    if config.debug:
        raise InputError("--debug looks at every operation, a CUDA graph shows none: leave --cuda-graph out")
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1:
        here = f"{accelerator.num_processes} on {accelerator.device.type}"
        raise InputError(f"--cuda-graph needs one process with a GPU, here: {here}; leave it out")

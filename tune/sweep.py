"""`python -m tune.sweep`, `batchcam sweep`, or this file by its path: Ray Tune over a space of training runs."""

import argparse
import logging
import os
import random
import secrets
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

if not __package__:  # run by its path, as `ray submit` does
    sys.path[0] = str(Path(__file__).parents[1])
    __package__ = "tune"

from distributed_batchcam.errors import InputError

from .cluster import WAIT_SECONDS, Resources, connected, require_room, resources_per_trial
from .record import SweepRecord, leaderboard_text
from .space import Draw, Options, Space, Trial, parse_value, read_space
from .storage import Storage
from .trial import ACCURACY, EPOCH, Settings

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher

DONE, SOME_FAILED = 0, 1
_PATHS = ("data_root", "prototypes", "pretrained", "masks")


@dataclass(frozen=True)
class Plan:
    """How the trials of a sweep are chosen; a sweep that is resumed keeps it."""

    searcher: Literal["grid", "random", "optuna"] = "grid"
    samples: int = 1
    seed: int = 0
    scheduler: Literal["none", "asha"] = "none"
    grace_epochs: int = 2
    reduction_factor: int = 2


@dataclass(frozen=True)
class Sweep:
    """What a sweep does, and where; see `batchcam sweep --help`."""

    space: Space
    plan: Plan
    storage: Storage
    record: SweepRecord
    run_options: Options
    address: str | None = None
    workers: int = 1
    cpus: float = 1.0
    gpus: float | None = None
    max_concurrent: int | None = None
    max_failures: int = 3
    wait: float = WAIT_SECONDS

    def trials(self) -> list[Trial]:
        """All trials that can be told beforehand: none with optuna, which finds each by the results before."""
        return [] if self.plan.searcher == "optuna" else self.space.trials(self.plan.samples, self.plan.seed)

    def run(self) -> int:
        """Run what is left of the sweep; returns the exit status: 0, or 1 where trials failed."""
        with connected(self.address) as is_cluster:
            wanted = resources_per_trial(self.workers, self.cpus, self.gpus, is_cluster=is_cluster)
            require_room(wanted, self.wait if is_cluster else 0)
            record = self.record
            for trial in self.trials():
                record.add(trial)
            for entry in record.trials.values():
                record.take_summary(entry, self.storage)
            record.save(self.storage)
            print(f"batchcam: sweep in {self.storage}: {self._extent()}; each trial has {wanted}", flush=True)
            try:
                self._fit(wanted)
            except BaseException:
                print(f"batchcam: the sweep goes on with: batchcam sweep --storage {self.storage} --resume", flush=True)
                raise
        print(self._closing_lines(), flush=True)
        return SOME_FAILED if record.count("failed") else DONE

    def _extent(self) -> str:
        count = self.plan.samples if self.plan.searcher == "optuna" else len(self.record.trials)
        done = self.record.count("finished")
        return f"{count:,} trial{'' if count == 1 else 's'}" + (f", {done:,} of them finished before" if done else "")

    def _fit(self, wanted: Resources) -> None:
        import ray.tune as ray_tune

        from .progress import Progress
        from .trial import run_trial

        record, plan = self.record, self.plan
        stopped = {entry.id: entry.epoch for entry in record.trials.values() if entry.state == "stopped"}
        settings = Settings(self.space, str(self.storage), record.id, self.run_options, stopped)
        left, searcher = self._left()
        samples = plan.samples - record.count("finished") - record.count("stopped") if searcher else 1
        if samples < 1 or (searcher is None and not left):
            return
        trials = self.trials()
        epochs = sum(trial.config().epochs for trial in trials) or plan.samples * self.space.trial({}).config().epochs
        progress = Progress(record, settings, self.storage, len(trials) or plan.samples, epochs)
        _quiet()
        with tempfile.TemporaryDirectory(prefix="batchcam-tune-") as folder:
            tuner = ray_tune.Tuner(
                ray_tune.with_resources(
                    ray_tune.with_parameters(run_trial, settings=settings),
                    ray_tune.PlacementGroupFactory([wanted.bundle] * wanted.workers, strategy="PACK"),
                ),
                param_space=None if searcher else {"axes": ray_tune.grid_search([trial.axes for trial in left])},
                tune_config=ray_tune.TuneConfig(
                    metric=ACCURACY,
                    mode="max",
                    search_alg=searcher,
                    scheduler=self._scheduler(),
                    num_samples=samples,
                    max_concurrent_trials=self.max_concurrent,
                    # Ranks of a trial need processes of their own, which have not chosen their GPUs yet.
                    reuse_actors=wanted.workers == 1,
                ),
                run_config=ray_tune.RunConfig(
                    # What Tune keeps of its own is not needed again: run directories and sweep.json say it all.
                    storage_path=folder,
                    failure_config=ray_tune.FailureConfig(max_failures=self.max_failures),
                    callbacks=[progress],
                    verbose=0,
                ),
            )
            try:
                tuner.fit()
            except SystemError as error:
                # What a signal raises while Ray's compiled code waits comes out wrapped up.
                raise error.__cause__ or error from None
            finally:
                progress.close()

    def _left(self) -> tuple[list[Trial], "Searcher | None"]:
        """The trials for Tune to go through, or a searcher that finds them."""
        if self.plan.searcher == "optuna":
            return [], self._optuna()
        trials = self.trials()
        done = {entry.id for entry in self.record.trials.values() if entry.state in ("finished", "stopped")}
        left = [trial for trial in trials if trial.id not in done]
        if self.plan.scheduler == "none" or not left:
            return left, None
        # Each trial is compared with those before it: neighbours on the grid would make a poor sample.
        random.Random(self.plan.seed).shuffle(trials)  # noqa: S311 (no secret)
        # What was done before is reported first, without doing it again, so that the scheduler knows it.
        return sorted(trials, key=lambda trial: trial.id not in done), None

    def _scheduler(self) -> "TrialScheduler | None":
        if self.plan.scheduler == "none":
            return None
        from ray.tune.schedulers import ASHAScheduler

        trials = self.trials() or [self.space.trial({})]
        epochs = max(trial.config().epochs for trial in trials)
        return ASHAScheduler(
            time_attr=EPOCH,
            max_t=epochs,
            grace_period=min(self.plan.grace_epochs, epochs),
            reduction_factor=self.plan.reduction_factor,
        )

    def _optuna(self) -> "Searcher":
        try:
            import optuna
            from ray.tune.search.optuna import OptunaSearch
        except ImportError:
            raise InputError("--searcher optuna needs Optuna: pip install 'distributed-batchcam[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        draws = self.space.all_drawn().sample
        entries = self.record.trials.values()
        known = [entry for entry in entries if entry.state in ("finished", "stopped")]
        searcher = OptunaSearch(
            space={f"axes/{name}": _optuna_distribution(draw) for name, draw in draws.items()},
            metric=ACCURACY,
            mode="max",
            seed=self.plan.seed + len(known),
            # Trials that were begun are taken up first.
            points_to_evaluate=[_optuna_point(entry.axes) for entry in entries if entry not in known] or None,
        )
        for entry in known:
            if entry.valid_accuracy is not None:
                searcher.add_evaluated_point(_optuna_point(entry.axes), entry.valid_accuracy)
        return searcher

    def _closing_lines(self) -> str:
        record = self.record
        counts = [f"{count} {state}" for state in ("finished", "stopped", "failed") if (count := record.count(state))]
        lines = [leaderboard_text(record), f"batchcam: {', '.join(counts)}; everything is in {self.storage}"]
        if any(entry.summary.get("validated_on") == "test" for entry in record.trials.values()):
            lines.insert(1, "(validated on the test set, as the space has it: the best is chosen by test images)")
        lines += [
            f"batchcam: {entry.name} failed: {entry.reason}"
            for entry in record.trials.values()
            if entry.state == "failed"
        ]
        return "\n".join(lines)


def _optuna_distribution(draw: Draw) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if draw.choice is not None:
        return CategoricalDistribution(cast(list[Any], draw.choice))
    low, high = draw.uniform or draw.loguniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=draw.loguniform is not None)


def _optuna_point(axes: Options) -> dict[str, Any]:
    return {f"axes/{name}": value for name, value in axes.items()}


def _quiet() -> None:
    """Tune tells nothing of its own: `Progress` does, and Ctrl-C is ours."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


# Command line --------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `batchcam sweep`."""
    what = parser.add_argument_group("what to try")
    what.add_argument("--space", metavar="NAME|FILE", help="smoke, paper, paper_112, lambda, or a YAML file of yours")
    what.add_argument("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="hold options fast in all trials")
    what.add_argument(
        "--searcher", choices=["grid", "random", "optuna"], help="default: grid; random if the space draws"
    )
    what.add_argument(
        "--samples", type=_at_least(1), metavar="N", help="random: draws per point of the grid; optuna: trials"
    )
    what.add_argument("--seed", type=int, metavar="N", help="of the draws (default: 0)")
    what.add_argument("--scheduler", choices=["none", "asha"], help="asha stops weak trials early (default: none)")
    what.add_argument("--grace-epochs", type=_at_least(1), metavar="N", help="asha: epochs that every trial gets (2)")
    what.add_argument("--reduction-factor", type=_at_least(2), metavar="N", help="asha: one in N trials goes on (2)")
    what.add_argument("--dry-run", action="store_true", help="print the trials and what they ask for, and stop")
    where = parser.add_argument_group("where")
    where.add_argument("--storage", metavar="DIR|URI", help="a folder that all nodes share, or s3://…, gs://…")
    where.add_argument("--resume", action="store_true", help="go on with the sweep in --storage")
    where.add_argument("--address", help="Ray cluster to join: auto, or HOST:PORT (default: Ray on this machine)")
    where.add_argument(
        "--workers-per-trial", type=_at_least(1), default=1, metavar="N", help="processes of a trial (1)"
    )
    where.add_argument(
        "--gpus-per-worker", type=_amount, metavar="F", help="1, several, or a share such as 0.25 (default: 1 if any)"
    )
    where.add_argument("--cpus-per-worker", type=_amount, default=1.0, metavar="C", help="CPUs, and threads (1)")
    where.add_argument("--max-concurrent", type=_at_least(1), metavar="N", help="trials at a time (default: what fits)")
    where.add_argument("--max-failures", type=_at_least(0), default=3, metavar="N", help="new attempts of a trial (3)")
    where.add_argument(
        "--wait", type=_amount, default=WAIT_SECONDS, metavar="SECONDS", help="for a cluster to have room (45)"
    )
    runs = parser.add_argument_group("for every run")
    runs.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets on every node")
    runs.add_argument("--tracker", choices=["none", "wandb", "tensorboard"], help="wandb: one group, a run per trial")
    estimate = parser.add_argument_group("for --dry-run")
    estimate.add_argument(
        "--tflops",
        type=_amount,
        default=10.0,
        metavar="N",
        help="10¹² operations a GPU does in a second, to estimate (10)",
    )


def sweep(options: argparse.Namespace) -> int:
    """Run, resume or only print the sweep that the command line describes; returns the exit status."""
    if options.resume:
        return _resumed(options).run()
    if options.space is None:
        raise InputError("name what to try with --space, or --resume a sweep with its --storage")
    space = read_space(options.space).with_fixed(parse_assignments(options.set)).with_texts(_PATHS, _absolute)
    plan = _plan(options, space)
    if options.dry_run:
        from .dry_run import describe

        is_search = plan.searcher == "optuna"
        trials = (space.all_drawn() if is_search else space).trials(plan.samples, plan.seed)
        print(describe(trials, ", drawn at random where optuna will choose" if is_search else "", options.tflops))
        return DONE
    name = Path(options.space).stem
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    storage = Storage.at(options.storage or f"runs/sweep-{name}-{stamp}-{os.getpid()}")
    if SweepRecord.load(storage) is not None:
        raise InputError(f"--storage {storage} holds a sweep: go on with it by --resume, or name another place")
    if not storage.is_empty():
        raise InputError(f"--storage {storage} is not empty and holds no sweep: name another place")
    record = SweepRecord(f"{name}-{stamp}-{secrets.token_hex(3)}", space, asdict(plan))
    return _sweep(options, record, storage).run()


def _resumed(options: argparse.Namespace) -> Sweep:
    if options.storage is None:
        raise InputError("--resume needs --storage: the sweep to go on with")
    storage = Storage.at(options.storage)
    record = SweepRecord.load(storage)
    if record is None:
        raise InputError(f"--storage {storage} holds no sweep to resume")
    if options.space is not None or options.set:
        space = read_space(options.space) if options.space else record.space
        if space.with_fixed(parse_assignments(options.set)).with_texts(_PATHS, _absolute) != record.space:
            raise InputError(f"the sweep in {storage} is of another space: leave --space and --set out, or start anew")
    for name, value in record.plan.items():
        if getattr(options, name) not in (None, value):
            raise InputError(f"--{name.replace('_', '-')} was {value} when the sweep in {storage} began: leave it out")
    return _sweep(options, record, storage)


def _sweep(options: argparse.Namespace, record: SweepRecord, storage: Storage) -> Sweep:
    return Sweep(
        space=record.space,
        plan=Plan(**record.plan),
        storage=storage,
        record=record,
        run_options=_run_options(options),
        address=options.address,
        workers=options.workers_per_trial,
        cpus=options.cpus_per_worker,
        gpus=options.gpus_per_worker,
        max_concurrent=options.max_concurrent,
        max_failures=options.max_failures,
        wait=options.wait,
    )


def _plan(options: argparse.Namespace, space: Space) -> Plan:
    given = {name: value for name in Plan.__dataclass_fields__ if (value := getattr(options, name)) is not None}
    plan = Plan(**{"searcher": "random" if space.sample else "grid", **given})
    if plan.searcher == "grid" and space.sample:
        raise InputError(f"--searcher grid cannot draw {', '.join(space.sample)}: use random or optuna, with --samples")
    if plan.searcher == "optuna":
        if "seed" in space.axes:
            raise InputError("--searcher optuna would search for a lucky seed: --set seed=0")
        lists = [n for n, values in space.grid.items() if any(isinstance(value, list) for value in values)]
        if lists:
            raise InputError(
                f"--searcher optuna cannot choose between lists, as in {lists[0]}: --set it, or use random"
            )
        space.check()
    elif plan.searcher == "random" and not space.sample:
        raise InputError("--searcher random needs a space with axes to draw from (sample)")
    if plan.samples > 1 and plan.searcher == "grid":
        raise InputError("--samples is for random and optuna: a grid has each of its points once")
    space.trials(plan.samples, plan.seed)
    return plan


def _run_options(options: argparse.Namespace) -> Options:
    """Options of every run that are not part of what a trial is."""
    found: Options = {}
    root = options.data_root or os.environ.get("BATCHCAM_DATA")
    if root is None and options.address is None:
        root = "data"  # on this machine as for any run; nodes of a cluster may have their data elsewhere
    if root is not None:
        found["data_root"] = _absolute(root)
    if options.tracker is not None:
        found["tracker"] = options.tracker
    return found


def _absolute(path: str | Path) -> str:
    """Ray's processes have working folders of their own."""
    return str(Path(path).expanduser().absolute())


def parse_assignments(texts: Sequence[str]) -> Options:
    """OPTION=VALUE texts as options.

    Raises:
        InputError: a text of another form.
    """
    found: Options = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"--set takes OPTION=VALUE, got {text!r}")
        found[name.lstrip("-").replace("-", "_")] = parse_value(value)
    return found


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {value}")
        return value

    number.__name__ = "whole number"  # what argparse calls it
    return number


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return value


if __name__ == "__main__":
    from distributed_batchcam.cli import run

    sys.exit(run(["sweep", *sys.argv[1:]]))

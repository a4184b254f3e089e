"""What a sweep shows and records while it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.tune import Callback
from tqdm import tqdm

from .record import SweepRecord, TrialRecord
from .storage import Storage
from .trial import ACCURACY, EPOCH, FAILURE, Settings

if TYPE_CHECKING:
    from ray.tune.experiment import Trial as RayTrial


class Progress(Callback):
    """Follows Tune's trials: keeps sweep.json up to date, and tells the terminal."""

    def __init__(self, record: SweepRecord, settings: Settings, storage: Storage, trials: int, epochs: int) -> None:
        """`trials` and `epochs` are how many the whole sweep has."""
        self._record = record
        self._settings = settings
        self._storage = storage
        self._trials = trials
        done = sum(trial.epoch for trial in record.trials.values())
        # None: quiet where there is no terminal.
        self._bar: tqdm[Any] = tqdm(total=epochs, initial=done, unit=" epochs", disable=None, dynamic_ncols=True)

    def close(self) -> None:
        """Take the bar away; trials that were under way wait for a later session."""
        self._bar.close()
        for trial in self._record.trials.values():
            if trial.state == "running":
                trial.state = "waiting"
        self._record.save(self._storage)

    def on_trial_start(self, iteration: int, trials: list["RayTrial"], trial: "RayTrial", **info: Any) -> None:
        mine = self._of(trial)
        mine.state, mine.reason, mine.summary, mine.attempts = "running", "", {}, mine.attempts + 1
        self._changed()

    def on_trial_result(
        self, iteration: int, trials: list["RayTrial"], trial: "RayTrial", result: dict[str, Any], **info: Any
    ) -> None:
        mine = self._of(trial)
        if FAILURE in result:
            mine.state, mine.reason = "failed", result[FAILURE]
            return
        # A trial that is tried again reports its earlier epochs once more.
        self._bar.update(max(0, result[EPOCH] - mine.epoch))
        mine.epoch, mine.valid_accuracy = max(mine.epoch, result[EPOCH]), result[ACCURACY]

    def on_trial_recover(self, iteration: int, trials: list["RayTrial"], trial: "RayTrial", **info: Any) -> None:
        self._say(f"{self._of(trial).name}: {_reason(trial)}; it goes on from its last checkpoint")

    def on_trial_complete(self, iteration: int, trials: list["RayTrial"], trial: "RayTrial", **info: Any) -> None:
        mine = self._of(trial)
        if mine.state == "failed":
            self._say(f"{mine.name}: failed: {mine.reason}")
        else:
            self._record.take_summary(mine, self._storage)
            if mine.state != "finished":
                mine.state = "stopped"
            self._say(f"{mine.name}: {mine.state} after epoch {mine.epoch}, {_accuracies(mine)}")
        self._changed()

    def on_trial_error(self, iteration: int, trials: list["RayTrial"], trial: "RayTrial", **info: Any) -> None:
        mine = self._of(trial)
        mine.state, mine.reason = "failed", f"{_reason(trial)} ({mine.attempts} attempts)"
        self._say(f"{mine.name}: failed: {mine.reason}")
        self._changed()

    def _of(self, trial: "RayTrial") -> TrialRecord:
        return self._record.add(self._settings.trial(trial.config))

    def _changed(self) -> None:
        counts = {state: self._record.count(state) for state in ("finished", "stopped", "failed", "running")}
        self._bar.set_description(f"{counts['finished'] + counts['stopped'] + counts['failed']}/{self._trials} trials")
        self._bar.set_postfix({state: count for state, count in counts.items() if count})
        self._record.save(self._storage)

    def _say(self, line: str) -> None:
        tqdm.write(f"batchcam: {line}")


def _accuracies(trial: TrialRecord) -> str:
    if not trial.summary:
        return f"validation accuracy {trial.valid_accuracy:.2f} %"
    test = trial.summary["best_test_accuracy"]  # None where the best checkpoint was lost
    return f"best validation accuracy {trial.summary['best_valid_accuracy']:.2f} %" + (
        "" if test is None else f", test accuracy {test:.2f} %"
    )


def _reason(trial: "RayTrial") -> str:
    """The last line of what Tune noted of an error."""
    lines = Path(trial.error_file).read_text(encoding="utf-8").split("\n") if trial.error_file else []
    return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "its process died")

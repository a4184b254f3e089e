"""Every region of a checkpoint flipped or cut off: never loaded, always named, the one before used."""

import contextlib
import io
import shutil
from pathlib import Path

from distributed_batchcam.checkpoint import STATE, SUMS, TENSORS
from distributed_batchcam.config import make_config
from distributed_batchcam.run_directory import RunDirectory

from .kills import undisturbed
from .runs import Figures


def each_region(folder: Path, positions: int) -> Figures:
    """Two checkpoints, the newer one damaged at `positions` places of each of its files, in two ways each."""
    figures = Figures("a bit flipped, or the rest cut off, anywhere in a checkpoint")
    run = folder / "damaged"
    shutil.copytree(undisturbed(folder)[0], run)
    config = make_config({}, run / "config.yaml")
    directory = RunDirectory(run, resumed=True)
    older, newer = sorted(directory.checkpoints.glob("epoch_*"))[-2:]
    for name in (TENSORS, STATE, SUMS):
        whole = (newer / name).read_bytes()
        for position in sorted({len(whole) * number // positions for number in range(positions)} | {len(whole) - 1}):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << position % 8
            for how, content in (("flipped", bytes(flipped)), ("cut off", whole[:position])):
                (newer / name).write_bytes(content)
                said = io.StringIO()
                with contextlib.redirect_stdout(said):
                    chosen = directory.newest_intact_checkpoint(config, {})
                right = chosen == older and f"{newer}" in said.getvalue()
                figures.count(None if right else f"{name} {how} at {position}: took {chosen}, said {said.getvalue()}")
                shutil.move(newer.with_name(f"refused_{newer.name}"), newer)
        (newer / name).write_bytes(whole)
    return figures

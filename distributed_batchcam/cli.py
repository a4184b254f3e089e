"""The command line. Options of `train` come from `config.RunConfig`; heavy imports wait for their command."""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic.fields import FieldInfo

from .config import REGISTRIES, RunConfig, make_config
from .errors import InputError, OneRankError, RunFault, unknown_name

if TYPE_CHECKING:
    from .explanations import Explanations

_LINES = 20  # about explained images

_SECONDS_TO_SAY_IT = 3

_DONE, _FAULT, _BAD_INPUT, _INTERRUPTED, _TERMINATED = 0, 1, 2, 130, 143


class _Terminated(BaseException):
    """SIGTERM arrived."""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit status: 0 done, 2 bad input, 130 SIGINT, 143 SIGTERM, 1 fault."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        return _run(list(arguments))
    except InputError as error:
        if not _say(f"batchcam: error: {error}", on_every_process=isinstance(error, OneRankError)):
            # Launchers end all processes as soon as one has left: the one that says the line goes first. They do so by
            # SIGTERM, and that is no other error than the one that was said.
            with suppress(_Terminated):
                time.sleep(_SECONDS_TO_SAY_IT)
        return _BAD_INPUT
    except RunFault as error:
        # By whoever is left: it may be the first of them that was lost.
        _say(f"batchcam: stopped: {error}", on_every_process=True)
        return _FAULT
    except FloatingPointError as error:
        _say(f"batchcam: stopped: {error}")
        return _FAULT
    except KeyboardInterrupt:
        _say(f"batchcam: interrupted{_going_on(arguments)}")
        return _INTERRUPTED
    except _Terminated:
        _say(f"batchcam: stopped by SIGTERM{_going_on(arguments)}")
        return _TERMINATED
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _going_on(arguments: Sequence[str]) -> str:
    is_training = arguments[:1] == ["train"]
    return "; train goes on from its last checkpoint with --resume auto" if is_training else ""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _run(arguments: list[str]) -> int:
    # The sub-command is read first: only its own parser is built, and only its own imports are paid for.
    overview = _Parser(
        prog="batchcam",
        description="Train image classifiers that are right for the right reasons.",
        epilog="batchcam COMMAND --help explains a command",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    from . import __version__

    overview.add_argument("--version", action="version", version=f"batchcam {__version__}")
    listing = overview.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        listing.add_parser(name, help=(command.__doc__ or "").splitlines()[0], add_help=False)
    if not arguments or arguments[0].startswith("-"):
        overview.parse_args(arguments)
        overview.print_help()
        return _DONE
    if arguments[0] not in COMMANDS:
        raise unknown_name("command", arguments[0], COMMANDS)
    return COMMANDS[arguments[0]](arguments[1:])


# Commands ------------------------------------------------------------------------------------------------


def _train(arguments: list[str]) -> int:
    """train a model, on one process or under a launcher"""
    parser = _command_parser("train", "Train a model and leave a run directory.")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="options from a file; flags go before it")
    for name, field in RunConfig.model_fields.items():
        _add_option(parser, name, field)
    options = vars(_parse(parser, arguments))
    file = options.pop("config", None)
    config = make_config(options, file)

    from .trainer import train

    summary = train(config)
    if _is_main_process():
        print(_summary_lines(summary), flush=True)
    return _FAULT if summary.get("debug_passed") is False else _DONE


def _evaluate(arguments: list[str]) -> int:
    """accuracy, calibration and explanation quality of a run or checkpoint"""
    parser = _command_parser("evaluate", "Evaluate the model of a run directory, or one of its checkpoints.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR|CHECKPOINT")
    _add_data_options(parser)
    parser.add_argument(
        "--masks",
        metavar="foreground|none|FOLDER",
        help="what relevance is measured against: bright pixels, nothing, or your own masks, an image per class or "
        "per image (default: foreground where the background is black)",
    )
    parser.add_argument(
        "--threshold", type=_share, metavar="N", help="grey value above which a pixel is foreground (default: 0.1)"
    )
    parser.add_argument(
        "--subset",
        type=_positive,
        metavar="N",
        help="images, all classes alike, for the costly figures: deletion, insertion, sensitivity (default: 500)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files (default: the run directory)")
    options = {name: value for name, value in vars(_parse(parser, arguments)).items() if value is not None}

    from .evaluate_run import EvaluationOptions, evaluate_run

    figures = evaluate_run(options.pop("run"), EvaluationOptions(**options))
    if _is_main_process():
        print(json.dumps(figures, indent=2))
    return _DONE


def _explain(arguments: list[str]) -> int:
    """what a model sees: in images, or in each class as a whole"""
    parser = _command_parser(
        "explain",
        "Explain single images, files or those of a data set. Without either: class-level maps of a whole image set.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR|CHECKPOINT")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files of any format and size")
    _add_data_options(parser)
    parser.add_argument(
        "--index", nargs="+", type=_position, metavar="N", help="images of the data set: 7, or a slice 0:100"
    )
    parser.add_argument("--target", metavar="CLASS", help="class of the image files, if known")
    parser.add_argument("--layer", metavar="NAME", help="explain this layer instead of the run's own")
    parser.add_argument("--sheet", action="store_true", help="small pictures on sheets instead of one per image")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the files (default: within the run's)")
    options = _parse(parser, arguments)
    of_data = {name: getattr(options, name) for name in ("split", "dataset", "data_root") if getattr(options, name)}
    if options.images and (options.index or of_data):
        raise InputError(
            "IMAGE is a file, --split, --index, --dataset and --data-root name images of a data set: choose"
        )
    if options.target and not options.images:
        raise InputError("--target is for image files: images of a data set come with their class")
    if options.sheet and not (options.images or options.index):
        raise InputError("--sheet is for single images: name files, or --index")

    from .checkpoint import load_run
    from .explain_run import explain, explain_classes
    from .explanation_files import free_folder, require_new, save_class_explanations, save_explanations

    if options.out:
        require_new(options.out)
    run = load_run(options.run, options.layer)
    folder = options.out or free_folder(run.path)
    device = options.device or "auto"
    if options.images or options.index:
        chosen = {"images": options.images} if options.images else {"indices": options.index, **of_data}
        explanations = explain(run, **chosen, target=options.target, device=device)
        written = save_explanations(explanations, folder, sheet=options.sheet)
        print(_explanation_lines(explanations))
    else:
        evaluation = explain_classes(run, **of_data, device=device)
        title = f"{run.path.absolute().name}: {evaluation.accuracy:.2f} % right"
        written = [save_class_explanations(evaluation, run.classes, folder, title)]
    print(f"batchcam: {written[0] if len(written) == 1 else f'{len(written):,} pictures in {folder}'}")
    return _DONE


def _prototypes(arguments: list[str]) -> int:
    """average images of the classes as files: to look at, to draw on, for --prototypes"""
    parser = _command_parser("prototypes", "Write a data set's class prototypes as images, for train --prototypes.")
    parser.add_argument("--dataset", required=True, help="data set to average")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets")
    parser.add_argument(
        "--image-size", type=_positive, metavar="N", help="side in pixels (default: the data set's own)"
    )
    parser.add_argument(
        "--per-class", type=_positive, metavar="N", help="average N training images of each class (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="that draws these images (default: 0)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder: one PNG per class")
    options = _parse(parser, arguments)

    from .data import dataset_prototypes, load_data, random_selection, save_prototype_images
    from .explanation_files import NewFolder, require_new

    require_new(options.out)
    data = load_data(options.dataset, data_root=options.data_root, image_size=options.image_size, valid_size=0)
    images = data.train
    if options.per_class is not None:
        images = images.subset(random_selection(images.targets, options.per_class, data.classes, options.seed))
    prototypes = dataset_prototypes(images, data.num_classes, classes=data.classes)
    with NewFolder(options.out) as folder:
        save_prototype_images(folder, prototypes, data.classes)
    print(f"batchcam: {len(prototypes)} prototypes of {len(images):,} images in {options.out}")
    return _DONE


def _report(arguments: list[str]) -> int:
    """one HTML file about a run, or a table and plots of several"""
    parser = _command_parser("report", "Make a self-contained HTML file from run directories alone.")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_DIR", help="run directories, or folders that hold some at any depth"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE.html",
        help="default: report.html in the run directory, of several in the current folder; an older report is replaced",
    )
    options = _parse(parser, arguments)

    from .report.html import write_report

    print(f"batchcam: report in {write_report(options.runs, options.output)}")
    return _DONE


def _sweep(arguments: list[str]) -> int:
    """train many models with Ray Tune: a space of options, here or over a cluster"""
    from tune.sweep import add_arguments, sweep

    parser = _command_parser("sweep", "Run a space of training options with Ray Tune, or go on with a sweep.")
    add_arguments(parser)
    return sweep(_parse(parser, arguments))


def _doctor(arguments: list[str]) -> int:
    """what this machine has and what is missing"""
    parser = _command_parser("doctor", "Check devices, backends, versions, data and logins.")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets")
    options = _parse(parser, arguments)

    from .doctor import examine

    for check in examine(options.data_root):
        print(check.line())
    return _DONE


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "evaluate": _evaluate,
    "explain": _explain,
    "prototypes": _prototypes,
    "report": _report,
    "sweep": _sweep,
    "doctor": _doctor,
}


# Parsing -------------------------------------------------------------------------------------------------


def _command_parser(name: str, description: str) -> _Parser:
    return _Parser(prog=f"batchcam {name}", description=description, allow_abbrev=False)


def _parse(parser: _Parser, arguments: list[str]) -> argparse.Namespace:
    options, rest = parser.parse_known_args(arguments)
    if rest:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        if rest[0].startswith("-"):
            raise unknown_name("option", rest[0].split("=")[0], flags, f"see {parser.prog} --help")
        raise InputError(f"{rest[0]!r} belongs to no option (see {parser.prog} --help)")
    return options


def _add_data_options(parser: _Parser) -> None:
    """Which images a trained model is to look at, and where."""
    parser.add_argument("--split", choices=["test", "valid", "train"], help="image set (default: test)")
    parser.add_argument("--dataset", metavar="NAME", help="another data set with the same classes")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="folder of the data sets")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: auto")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _position(text: str) -> int | slice:
    """`7`, or a slice `START:STOP` or `START:STOP:STEP`, as Python has them."""
    if ":" not in text:
        return int(text)
    return slice(*(int(part) if part else None for part in text.split(":", 2)))


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to below 1, got {text}")
    return value


def _add_option(parser: _Parser, name: str, field: FieldInfo) -> None:
    """One flag for one field of the configuration; values stay text, the configuration checks them."""
    flag = f"--{name.replace('_', '-')}"
    types = _alternatives(field.annotation)
    literals = [value for kind in types if get_origin(kind) is Literal for value in get_args(kind)]
    text = " ".join((field.description or "").split()).replace("%", "%%")
    if literals:
        text += f" ({', '.join(literals)})"
    elif name in REGISTRIES and {"-h", "--help"} & set(sys.argv):
        text += f" ({', '.join(REGISTRIES[name]())})"
    if field.default not in (None, False, ()):
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        text += f" [{default}]"
    common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if types == [bool]:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
    elif bool in types:
        parser.add_argument(flag, nargs="?", const=True, metavar="FILE", **common)
    elif get_origin(types[0]) is tuple and Ellipsis in get_args(types[0]):
        parser.add_argument(flag, nargs="+", metavar=_metavar([get_args(types[0])[0]]), **common)
    elif get_origin(types[0]) is tuple:
        parser.add_argument(flag, nargs=len(get_args(types[0])), metavar=("α", "β", "γ"), **common)
    else:
        parser.add_argument(flag, metavar=_metavar(types), **common)


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union without None; a single type as a list of one."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else [annotation]
    if get_origin(annotation) is not None and str(get_origin(annotation)) == "typing.Union":
        members = get_args(annotation)
    return [member for member in members if member is not NoneType]


def _metavar(types: list[Any]) -> str:
    if any(get_origin(kind) is Literal for kind in types):
        return "NAME"
    kind = get_args(types[0])[0] if get_origin(types[0]) is Annotated else types[0]
    return {Path: "PATH", str: "NAME"}.get(kind, "N")


# Output --------------------------------------------------------------------------------------------------


def _summary_lines(summary: dict[str, Any]) -> str:
    accuracy = summary["best_test_accuracy"]
    best = f"best epoch {summary['best_epoch']}: {'unknown' if accuracy is None else f'{accuracy:.2f} %'}"
    return (
        f"batchcam: test accuracy {summary['test_accuracy']:.2f} % ({best}), CAM L1 {summary['cam_l1']:.4f}, "
        f"CAM SSIM {summary['cam_ssim']:.3f}, class CAM SSIM {summary['class_cam_ssim']:.3f}; "
        f"{summary['images_per_second']:,.0f} images/s, {summary['train_seconds']:.1f} s of training"
    )


def _explanation_lines(explanations: "Explanations") -> str:
    """A line for each of the first images."""
    classes, lines = explanations.classes, []
    for index, name in enumerate(explanations.names[:_LINES]):
        line = f"{name}: {classes[explanations.predicted[index]]}, {100 * explanations.confidence[index]:.1f} %"
        if explanations.targets is not None and explanations.targets[index] != explanations.predicted[index]:
            line += f", target {classes[explanations.targets[index]]}"
        if explanations.constant[index]:
            line += "; its map is constant"
        else:
            nearest = int(explanations.l1[index].argmin())
            line += f"; looks most like {classes[nearest]} (L1 {explanations.l1[index, nearest]:.3f})"
        lines.append(" ".join(line.split()))
    if len(explanations) > _LINES:
        lines.append(f"… and {len(explanations) - _LINES:,} more")
    return "\n".join(lines)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(line: str, *, on_every_process: bool = False) -> bool:
    # Otherwise once per machine.
    if on_every_process or os.environ.get("LOCAL_RANK", "0") == "0":
        print(line.replace("\n", " "), file=sys.stderr, flush=True)
        return True
    return False

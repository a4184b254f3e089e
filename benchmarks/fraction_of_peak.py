"""Achieved FLOP/s of training steps ÷ that of a large matrix product on the same device, in the same run.

FLOPs are those of the convolutions and matrix products of a plain training step, forwards and backwards, as torch's
flop counter finds them; the loss on the maps adds time and is granted no FLOPs. Products, networks and objectives take
turns round by round. Channels-last, and bfloat16 or float32 as asked; on a GPU the backbone may be compiled.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from distributed_batchcam.errors import InputError

from .step_time import PLAIN, Setting, training_steps
from .timing import Bar, Table, argument_parser, choose_device, interleaved, positive, report, steady

MODELS = ("resnet18", "convnextv2_tiny")
OBJECTIVE = "bcpl_l1"
BAR_SIZE, LIMIT = 112, 35.0
PRODUCT = "matrix product"


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser(
        "fraction_of_peak", "FLOP/s of training ÷ FLOP/s of a large matrix product on the same device.", rounds=20
    )
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, help="all")
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"], help="%(default)s")
    parser.add_argument("--compile", action="store_true", help="compile the networks")
    parser.add_argument("--batch-size", type=positive, default=256, help="%(default)s")
    parser.add_argument("--image-size", type=positive, default=BAR_SIZE, help="%(default)s")
    parser.add_argument("--matrix", type=positive, default=8192, help="side of the square matrices (%(default)s)")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    setting = Setting(options.precision, options.compile, channels_last=True)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32

    tables, fractions, bars = [], {}, []
    with steady(options.threads):
        for name in options.models:
            try:
                steps = training_steps(
                    name, [OBJECTIVE], options.batch_size, device, setting, image_size=options.image_size
                )
                eager = Setting(options.precision, compiled=False, channels_last=True)
                counted = training_steps(name, [], options.batch_size, device, eager, image_size=options.image_size)
            except InputError as error:
                parser.error(str(error))
            with FlopCounterMode(display=False) as counter:
                counted[PLAIN]()
            del counted
            factors = torch.rand(2, options.matrix, options.matrix, device=device, dtype=dtype)
            seconds = interleaved(
                {PRODUCT: partial(torch.matmul, *factors), **steps},
                rounds=options.rounds,
                warmup=options.warmup,
                device=device,
            )
            what = f"{name}, batch {options.batch_size}, {options.image_size}×{options.image_size}, {setting.text}"
            tables.append(Table.of(f"training step and matrix product, {what}, {device.type}", seconds))
            of_product = 2 * options.matrix**3 / tables[-1].row(PRODUCT).seconds.median
            for variant in (PLAIN, OBJECTIVE):
                achieved = counter.get_total_flops() / tables[-1].row(variant).seconds.median
                fractions[f"{name}, {variant}"] = 100 * achieved / of_product
                print(
                    f"{what}, {variant}: {achieved / 1e12:.3f} TFLOP/s, "
                    f"{100 * achieved / of_product:.1f} % of a matrix product's {of_product / 1e12:.3f}"
                )
            as_the_bar_says = device.type == "cuda" and (options.precision, options.image_size) == ("bf16", BAR_SIZE)
            bars.append(
                Bar(
                    f"FLOP/s of training with {OBJECTIVE} in % of a matrix product's, {name}, bf16, {BAR_SIZE}, cuda,",
                    "at least",
                    LIMIT,
                    fractions[f"{name}, {OBJECTIVE}"] if as_the_bar_says else None,
                    unit=" %",
                )
            )
    report("fraction_of_peak", options, device, tables, bars, further={"percent_of_matrix_product": fractions})


if __name__ == "__main__":
    main()

"""Peak memory of training with BCPL ÷ that of the plain network with cross-entropy.

Each variant is built and does two steps (the first makes the optimizer's state) in every round. On a GPU the peak is
`torch.cuda.max_memory_allocated`. On the CPU it is the most that torch's allocator had handed out at a time, by the
profiler's own events; scratch memory within oneDNN and MKL is not seen there.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from distributed_batchcam.errors import InputError

from .step_time import PLAIN, training_steps
from .timing import Bar, Spread, argument_parser, choose_device, positive, report

BAR_MODEL, BAR_OBJECTIVE, BAR_BATCH, BAR_SIZE, LIMIT = "resnet18", "bcpl_l1", 256, 112, 1.10
STEPS = 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argument_parser("memory", "Peak memory of BCPL ÷ that of the plain step.", rounds=2, warmup=0)
    parser.add_argument("--model", default=BAR_MODEL, help="%(default)s")
    parser.add_argument("--objective", default=BAR_OBJECTIVE, metavar="NAME", help="%(default)s")
    parser.add_argument("--batch-size", type=positive, default=BAR_BATCH, help="%(default)s")
    parser.add_argument("--image-size", type=positive, default=BAR_SIZE, help="%(default)s")
    options = parser.parse_args(arguments)
    device = choose_device(parser, options.device)
    torch.set_num_threads(options.threads)

    def steps(variant: str) -> None:
        made = training_steps(
            options.model, [options.objective], options.batch_size, device, image_size=options.image_size
        )
        for _ in range(STEPS):
            made[variant]()

    measure = _peak_on_gpu if device.type == "cuda" else _peak_on_cpu
    variants = (PLAIN, options.objective)
    peaks: dict[str, list[int]] = {variant: [] for variant in variants}
    try:
        for _ in range(options.rounds):
            for variant in variants:
                gc.collect()
                peaks[variant].append(measure(lambda variant=variant: steps(variant)))  # type: ignore[misc]
    except InputError as error:
        parser.error(str(error))
    ratios = [mine / plain for plain, mine in zip(peaks[PLAIN], peaks[options.objective], strict=True)]
    what = f"{options.model}, batch {options.batch_size}, {options.image_size}×{options.image_size}, {device.type}"
    print(f"peak memory of a training step, {what} (n = {options.rounds})")
    for variant, values in peaks.items():
        print(f"  {variant:12}  {Spread.of(values).median / 2**20:>9.1f} MiB")
    print(f"  {options.objective} ÷ {PLAIN}: {Spread.of(ratios).median:.3f}\n")
    as_the_bar_says = (options.model, options.objective, options.batch_size, options.image_size) == (
        *(BAR_MODEL, BAR_OBJECTIVE),
        *(BAR_BATCH, BAR_SIZE),
    )
    bar = Bar(
        f"peak memory, {BAR_OBJECTIVE} ÷ {PLAIN}, {BAR_MODEL}, {BAR_SIZE}×{BAR_SIZE}, batch {BAR_BATCH}, cuda,",
        "at most",
        LIMIT,
        Spread.of(ratios).median if as_the_bar_says and device.type == "cuda" else None,
    )
    figures = {variant: Spread.of(values)._asdict() for variant, values in peaks.items()}
    further = {"settings": what, "peak_bytes": figures, "ratio": Spread.of(ratios)._asdict()}
    report("memory", options, device, [], [bar], further=further)


def _peak_on_gpu(work: Callable[[], None]) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(work: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type() == torch._C._autograd.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()

"""The command line: parses, calls, prints. Results go to standard output, progress and messages to standard error."""

import argparse
import contextlib
import gc
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sd35flash_jax.command import run_command, run_program
from sd35flash_jax.config import COMPONENTS, PRESETS

if TYPE_CHECKING:
    from sd35flash_jax.evaluate.scoring import Scorer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed with one sentence, 2 usage, 130 interrupted."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options), "sd35flash-jax")


def program() -> NoReturn:
    """What is installed as `sd35flash-jax`."""
    run_program(main)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sd35flash-jax", description="Stable Diffusion 3.5-Flash, four-step text-to-image, in pure JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make an image from a prompt", formatter_class=_Defaults)
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt")
    text = "checkpoint directory, as made by convert; the bundled model unless given"
    generate.add_argument("--checkpoint", type=Path, help=text)
    generate.add_argument("--output", type=Path, default=Path("image.png"), help="PNG file to write")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, default=4)
    generate.add_argument("--sigmas", type=float, nargs="+", help="falling noise levels in (0, 1], in place of --steps")
    generate.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; none up to 1")
    generate.add_argument("--negative", default="", metavar="PROMPT", help="prompt to guide away from")
    generate.add_argument("--height", type=int, help="pixels, a multiple of 16; the model's own size unless given")
    generate.add_argument("--width", type=int, help="as --height")
    generate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    generate.add_argument("--text-encoders", nargs="+", help="load these alone, of clip_l, clip_g and t5")
    generate.add_argument("--max-t5-tokens", type=int, help="tokens that T5 reads; the checkpoint's own number")
    _add_lora_options(generate)

    convert = commands.add_parser(
        "convert",
        help="turn a diffusers folder or safetensors file into a checkpoint directory",
        formatter_class=_Defaults,
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=Path, help="diffusers folder or file of Stable Diffusion 3 or 3.5")
    convert.add_argument("destination", type=Path, help="checkpoint directory to make")
    convert.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the stored weights; as in the source")
    for name in COMPONENTS:
        text = "file or folder to take this component from, in place of the source"
        convert.add_argument(f"--{name.replace('_', '-')}", type=Path, metavar="PATH", help=text)
    convert.add_argument("--tokenizers", type=Path, metavar="FOLDER", help="in place of the source's; files have none")
    _add_lora_options(convert)

    export = commands.add_parser(
        "export", help="turn a checkpoint directory into a diffusers folder or file", formatter_class=_Defaults
    )
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", type=Path, help="checkpoint directory, as made by convert")
    export.add_argument("destination", type=Path, help="folder or file to make")
    export.add_argument("--layout", choices=("diffusers", "single-file"), default="diffusers")
    export.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the weights; as stored")

    info = commands.add_parser("info", help="say what a checkpoint or an unconverted source holds")
    info.set_defaults(run=_info)
    info.add_argument("path", type=Path, help="checkpoint directory, diffusers folder or safetensors file")
    info.add_argument("--tensors", action="store_true", help="list every tensor")
    info.add_argument("--json", action="store_true", help="print all of it as JSON")

    parity = commands.add_parser(
        "parity", help="compare a checkpoint with the PyTorch reference, in float32", formatter_class=_Defaults
    )
    parity.set_defaults(run=_parity)
    parity.add_argument("source", type=Path, help="the diffusers folder that was converted")
    parity.add_argument("checkpoint", type=Path)
    parity.add_argument("--output", type=Path, default=Path("parity"), help="folder for parity.json and parity.png")
    parity.add_argument("--prompt", action="append", help="repeat for more; two of its own unless given")
    parity.add_argument("--steps", type=int, default=4)
    parity.add_argument("--guidance", type=float, default=1.0)
    parity.add_argument("--height", type=int, default=256)
    parity.add_argument("--width", type=int, default=256)
    parity.add_argument("--seed", type=int, default=0)

    benchmark = commands.add_parser(
        "benchmark", help="measure speed and memory with random weights", formatter_class=_Defaults
    )
    benchmark.set_defaults(run=_benchmark)
    benchmark.add_argument("--preset", choices=PRESETS, default="sd3.5-medium")
    benchmark.add_argument("--sizes", type=int, nargs="+", default=[1024], metavar="PIXELS")
    benchmark.add_argument("--batches", type=int, nargs="+", default=[1], metavar="IMAGES")
    benchmark.add_argument("--items", nargs="+", metavar="ITEM", help="measure these alone; a wrong one lists them")
    benchmark.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    benchmark.add_argument("--steps", type=int, default=4)
    benchmark.add_argument("--repeats", type=int, default=20, help="timed runs of each item at most")
    benchmark.add_argument("--seconds", type=float, default=5.0, help="after which no further run of an item starts")
    benchmark.add_argument("--against", nargs="+", default=[], metavar="PEER", help="measure these too, for ratios")
    benchmark.add_argument("--timeout", type=float, default=1800.0, help="seconds for each side in all")
    benchmark.add_argument("--output", type=Path, default=Path("benchmark"), help="folder for JSON, table and plot")

    distill = commands.add_parser("distill", help="distil a many-step teacher into a few-step student")
    distill.set_defaults(run=_distill)
    distill.add_argument("config", type=Path, help="TOML file, as docs/distillation.md describes it")
    text = "set one of its values, such as matching.updates=100; repeat for more"
    distill.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=text)
    text = "be one of several processes, which find each other as jax.distributed.initialize() finds them"
    distill.add_argument("--distributed", action="store_true", help=text)

    evaluate = commands.add_parser(
        "evaluate", help="mark a checkpoint's pictures of prompts that training never saw", formatter_class=_Defaults
    )
    evaluate.set_defaults(run=_evaluate)
    text = "checkpoint directory, as made by convert; the bundled model unless given"
    evaluate.add_argument("checkpoint", type=Path, nargs="?", help=text)
    evaluate.add_argument("--steps", type=int, default=4)
    evaluate.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; none up to 1")
    text = "one more row, such as teacher=checkpoints/teacher:50:4; the bundled model if CHECKPOINT is empty"
    row = "NAME=CHECKPOINT:STEPS:GUIDANCE"
    evaluate.add_argument("--compare", type=_compared, action="append", metavar=row, help=text)
    evaluate.add_argument("--seeds", type=int, default=3, help="pictures of each prompt")
    evaluate.add_argument("--prompts", type=int, help="of each category, for a quick run; all unless given")
    evaluate.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="prompts in place of the suite's, one a line"
    )
    text = "world: the detector of flash-mini's world; clip: the CLIP score; fid: the Frechet inception distance"
    evaluate.add_argument("--scorer", choices=("world", "clip", "fid"), default="world", help=text)
    text = "for --scorer clip: a CLIP model, as transformers stores it"
    evaluate.add_argument("--clip", type=Path, metavar="FOLDER", help=text)
    text = "for --scorer fid: torch-fidelity's weights of Inception"
    evaluate.add_argument("--inception", type=Path, metavar="FILE", help=text)
    text = "for --scorer fid: the images to compare with"
    evaluate.add_argument("--reference", type=Path, metavar="FOLDER", help=text)
    evaluate.add_argument("--batch", type=int, default=32, help="pictures at a time")
    evaluate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    text = "folder for JSON, table and pictures; it must not hold anything"
    evaluate.add_argument("--output", type=Path, default=Path("evaluation"), help=text)
    return parser


def _compared(text: str) -> tuple[str, Path | None, int, float]:
    try:
        name, how = text.split("=", 1)
        checkpoint, steps, guidance = how.rsplit(":", 2)
        if not name:
            raise ValueError
        return name, Path(checkpoint).expanduser() if checkpoint else None, int(steps), float(guidance)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=CHECKPOINT:STEPS:GUIDANCE") from None


def _add_lora_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lora", type=Path, action="append", metavar="FILE", help="LoRA to merge; repeat for more")
    parser.add_argument("--lora-scale", type=float, action="append", metavar="SCALE", help="one for each --lora, or 1")


def _loras(options: argparse.Namespace) -> list[tuple[Path, float]]:
    files = options.lora or []
    scales = options.lora_scale or [1.0] * len(files)
    if len(scales) != len(files):
        raise ValueError(f"{len(scales)} --lora-scale do not fit {len(files)} --lora; give one for each")
    return list(zip(files, scales))


class _Defaults(argparse.HelpFormatter):
    """Shows each option's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help or ''} (default: {action.default})".strip()


@contextlib.contextmanager
def _for_one_image() -> Iterator[None]:
    """Settings of Python's for a process that starts, makes an image and ends. Nothing is searched for reference
    cycles, which would take a sixth of its time, and a thread that works keeps Python's lock for less long, lest those
    that read weights wait for the one that traces programs."""
    interval, searches = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(0.0005)
    gc.disable()
    try:
        yield
    finally:
        if searches:
            gc.enable()
        sys.setswitchinterval(interval)


@_for_one_image()
def _generate(options: argparse.Namespace) -> None:
    from sd35flash_jax import compilation

    compilation.start_devices()  # They start while the rest is imported.

    from sd35flash_jax.checkpoint import bundled_checkpoint, read_config
    from sd35flash_jax.pipeline import FlashPipeline, check_request

    output: Path = options.output.expanduser()
    loras = _loras(options)
    # What can be refused is refused before the weights are loaded.
    checkpoint: Path = options.checkpoint or bundled_checkpoint()
    config = read_config(checkpoint)
    request = (options.steps, options.sigmas, options.guidance, options.height, options.width, options.seed)
    check_request(config, 1, *request)
    if loras:
        from conversion.lora import open_loras

        open_loras(loras, config)
    if output.suffix.lower() != ".png" or output.is_dir():
        raise ValueError(f"{output} does not name a PNG file; end it in .png")
    if not os.access(output.absolute().parent, os.W_OK):
        raise FileNotFoundError(f"the folder of {output} does not exist or cannot be written; make it first")
    if options.negative and options.guidance <= 1:
        warnings.warn("--negative has no effect without --guidance above 1", stacklevel=1)
    pipe = FlashPipeline.from_pretrained(
        checkpoint,
        dtype=options.dtype,
        text_encoders=options.text_encoders,
        max_t5_tokens=options.max_t5_tokens,
        progress=True,
        compile_for=(1, options.height, options.width),
    )
    for path, scale in loras:
        pipe.load_lora(path, scale)
    result = pipe(
        options.prompt,
        negative_prompt=options.negative,
        steps=options.steps,
        guidance=options.guidance,
        height=options.height,
        width=options.width,
        seed=options.seed,
        sigmas=options.sigmas,
        progress=True,
    )
    _write_png(result.images[0], result.metadata[0] | {"checkpoint": checkpoint.absolute().name}, output)
    print("  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.timings.items()), file=sys.stderr)
    print(output)


def _write_png(image, metadata: dict[str, str], output: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        # The lowest level that compresses: the others take up to three times as long for a seventh of the size.
        image.save(partial, format="PNG", pnginfo=info, compress_level=1)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _convert(options: argparse.Namespace) -> None:
    from conversion import convert

    given = {name: path for name in COMPONENTS if (path := getattr(options, name))}
    convert(
        options.source,
        options.destination,
        options.dtype,
        progress=True,
        components=given,
        tokenizers=options.tokenizers,
        loras=_loras(options),
    )
    print(options.destination)


def _export(options: argparse.Namespace) -> None:
    from conversion import export

    export(options.checkpoint, options.destination, options.layout, options.dtype, progress=True)
    print(options.destination)


def _info(options: argparse.Namespace) -> None:
    from conversion.info import describe, format_description

    description = describe(options.path, progress=True)
    print(json.dumps(description, indent=1) if options.json else format_description(description, options.tensors))


def _parity(options: argparse.Namespace) -> None:
    from conversion.parity import PROMPTS, format_table, parity

    rows = parity(
        options.source,
        options.checkpoint,
        options.output,
        options.prompt or PROMPTS,
        options.steps,
        options.guidance,
        options.height,
        options.width,
        options.seed,
        progress=True,
    )
    print(format_table(rows))
    failed = [row.item for row in rows if not row.passed]
    if failed:
        raise ValueError(f"beyond tolerance: {', '.join(failed)}")


def _benchmark(options: argparse.Namespace) -> None:
    from benchmarks.cases import make_request
    from benchmarks.plot import write_plot
    from benchmarks.report import format_report
    from benchmarks.run import benchmark

    request = make_request(
        PRESETS[options.preset],
        options.sizes,
        options.batches,
        options.items,
        options.dtype,
        options.steps,
        options.repeats,
        options.seconds,
    )
    output: Path = options.output.expanduser()
    report = benchmark(
        request, options.against, output, options.timeout, lambda line: print(line, file=sys.stderr, flush=True)
    )
    table = format_report(report)
    (output / "benchmark.md").write_text(table + "\n", encoding="utf-8")
    print(table)
    try:
        write_plot(report, output / "benchmark.png")
    except ImportError:
        warnings.warn("no plot was drawn: for matplotlib, pip install 'sd35flash-jax[benchmark]'", stacklevel=1)


def _distill(options: argparse.Namespace) -> None:
    from sd35flash_jax.distill.config import read_distill_config
    from sd35flash_jax.distill.trainer import distill

    if options.distributed:
        _join_processes()
    print(distill(read_distill_config(options.config, options.set), progress=True))


def _evaluate(options: argparse.Namespace) -> None:
    from sd35flash_jax.evaluate.run import Sampler, check_evaluation, evaluate
    from sd35flash_jax.evaluate.suite import MOST_PROMPTS, Prompt, suite
    from sd35flash_jax.text import read_prompts

    _check_scorer_options(options)
    if options.prompt_file and options.scorer == "world":
        raise ValueError("the world's scorer knows its own prompts alone; give --prompt-file with another --scorer")
    if options.prompt_file and options.prompts is not None:
        raise ValueError("--prompts counts the suite's prompts, and --prompt-file stands in its place; leave one out")
    if options.prompt_file:
        prompts = [Prompt("given", text) for text in read_prompts(options.prompt_file)]
    else:
        prompts = suite(MOST_PROMPTS if options.prompts is None else options.prompts)
    named = options.checkpoint.absolute().name if options.checkpoint else "bundled model"
    first = Sampler(f"{named}, {options.steps} steps", options.checkpoint, options.steps, options.guidance)
    samplers = [first, *(Sampler(*parts) for parts in options.compare or [])]
    output: Path = options.output.expanduser()
    check_evaluation(samplers, prompts, options.seeds, output, options.batch, options.dtype)
    scorer = _scorer(options, len(prompts) * options.seeds)
    try:
        print(evaluate(samplers, prompts, options.seeds, output, scorer, options.batch, options.dtype, progress=True))
    except (MemoryError, RuntimeError) as error:
        # The names that JAX and PyTorch have for it.
        exhausted = ("RESOURCE_EXHAUSTED", "DefaultCPUAllocator")
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in exhausted):
            raise
        raise ValueError(
            f"out of memory with --batch {options.batch}: choose a smaller one, or --dtype bfloat16"
        ) from error


def _check_scorer_options(options: argparse.Namespace) -> None:
    """Each scorer's options go with it, and with no other."""
    of_scorers = {
        "clip": {"--clip FOLDER": options.clip},
        "fid": {"--inception FILE": options.inception, "--reference FOLDER": options.reference},
    }
    for scorer, own in of_scorers.items():
        given = [option for option, value in own.items() if value is not None]
        if scorer == options.scorer and len(given) < len(own):
            raise ValueError(f"--scorer {scorer} needs {' and '.join(own)}")
        if scorer != options.scorer and given:
            raise ValueError(f"{' and '.join(given)} would not be used; leave that out, or choose --scorer {scorer}")


def _scorer(options: argparse.Namespace, pictures: int) -> "Scorer | None":
    if options.scorer == "clip":
        from sd35flash_jax.evaluate.clip import ClipScorer

        return ClipScorer(options.clip.expanduser())
    if options.scorer == "fid":
        from sd35flash_jax.evaluate.fid import FidScorer

        return FidScorer(options.inception.expanduser(), options.reference.expanduser(), pictures)
    return None


def _join_processes() -> None:
    import jax

    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"JAX finds no other processes ({error}); start them with srun or mpirun, or leave --distributed out"
        ) from None


if __name__ == "__main__":
    program()

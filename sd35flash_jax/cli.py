"""The command line: parses, calls, prints. Results go to standard output, progress and messages to standard error."""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed with one sentence, 2 wrong usage."""
    options = _parser().parse_args(arguments)
    _show_warnings_plainly()
    try:
        options.run(options)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        return _fail(str(error) or "out of memory: choose a smaller size, or dtype bfloat16")
    except Exception as error:
        # XLA reports an exhausted device as an error of its own kind.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _fail("the device is out of memory: choose a smaller size, or dtype bfloat16")


def _fail(message: str) -> int:
    print(f"sd35flash-jax: {message}", file=sys.stderr)
    return EXIT_FAILED


def _show_warnings_plainly() -> None:
    warnings.showwarning = lambda message, *_, **__: print(f"sd35flash-jax: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sd35flash-jax", description="Stable Diffusion 3.5-Flash, four-step text-to-image, in pure JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="make an image from a prompt", formatter_class=_Defaults)
    generate.set_defaults(run=_generate)
    generate.add_argument("prompt")
    generate.add_argument("--checkpoint", type=Path, help="checkpoint directory, as made by convert")
    generate.add_argument("--output", type=Path, default=Path("image.png"), help="PNG file to write")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--steps", type=int, default=4)
    generate.add_argument("--sigmas", type=float, nargs="+", help="falling noise levels in (0, 1], in place of --steps")
    generate.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; none up to 1")
    generate.add_argument("--negative", default="", metavar="PROMPT", help="prompt to guide away from")
    generate.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 16")
    generate.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 16")
    generate.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    generate.add_argument("--text-encoders", nargs="+", help="load these alone, of clip_l, clip_g and t5")
    generate.add_argument("--max-t5-tokens", type=int, default=256)

    convert = commands.add_parser(
        "convert", help="turn a diffusers folder into a checkpoint directory", formatter_class=_Defaults
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", type=Path, help="diffusers folder of Stable Diffusion 3 or 3.5")
    convert.add_argument("destination", type=Path, help="checkpoint directory to make")
    convert.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the stored weights; as in the source")
    return parser


class _Defaults(argparse.HelpFormatter):
    """Shows each option's default, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "", argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help or ''} (default: {action.default})".strip()


def _generate(options: argparse.Namespace) -> None:
    from sd35flash_jax.checkpoint import read_config
    from sd35flash_jax.pipeline import FlashPipeline, check_size
    from sd35flash_jax.schedule import choose_sigmas

    output: Path = options.output
    # What can be refused is refused before the weights are loaded.
    if options.checkpoint:
        config = read_config(options.checkpoint)
        check_size(config, options.height, options.width)
        choose_sigmas(config.schedule, options.steps, options.sigmas)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {output} does not exist; make it first")
    pipe = FlashPipeline.from_pretrained(
        options.checkpoint,
        dtype=options.dtype,
        text_encoders=options.text_encoders,
        max_t5_tokens=options.max_t5_tokens,
        progress=True,
    )
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
    _write_png(result.images[0], result.metadata[0] | {"checkpoint": options.checkpoint.absolute().name}, output)
    print("  ".join(f"{stage} {seconds:.2f} s" for stage, seconds in result.timings.items()), file=sys.stderr)
    print(output)


def _write_png(image, metadata: dict[str, str], output: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, value)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _convert(options: argparse.Namespace) -> None:
    from conversion import convert

    convert(options.source, options.destination, options.dtype, progress=True)
    print(options.destination)


if __name__ == "__main__":
    sys.exit(main())

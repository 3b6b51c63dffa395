# SPDX-License-Identifier: Apache-2.0
"""The command: reads the words, calls the package, and turns what a person can mend into one message.

Nothing heavy is imported before a command runs, so that `kinfold --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from kinfold.cli_evaluate import DATA_HELP, evaluate_app
from kinfold.errors import UserError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""what the system says where a disk is full or a place is closed: a person can mend it"""

app = typer.Typer(
    name="kinfold",
    help="Image representations without labels: pretrain a backbone on your images, evaluate it, take it away.",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SETTINGS_HELP = (
    "key=value, any setting of the recipe or the run by its dotted name: epochs=100 batch_size=128 "
    "method.temperature=0.2 views.augment.*.size=96 workers=8 device=cuda."
)


def _version(asked: bool) -> None:
    if asked:
        from kinfold import __version__

        typer.echo(f"kinfold {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error came from.")] = False,
    version: Annotated[
        Optional[bool],  # noqa: UP045 - typer reads this form on every Python
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    """Hold the options of every command; `main` reads --traceback itself, wherever it stands."""


@app.command()
def pretrain(
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    settings: Annotated[Optional[list[str]], typer.Argument(help=SETTINGS_HELP)] = None,  # noqa: UP045
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--recipe", "-r", help="A name from `kinfold recipes`, or a YAML file. Default: own-images."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="The run folder. The same command on the same folder resumes."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and the result.")] = False,
) -> None:
    """Learn a backbone from images without labels.

    Stop it whenever you like: SIGTERM and Ctrl-C write a checkpoint first (exit code 143 or 130), and the same command
    goes on bit for bit. On several devices: torchrun --nproc-per-node 8 -m kinfold pretrain ...
    """
    from kinfold.pretrain import pretrain as learn
    from kinfold.recipe import load

    name = recipe or ("digits" if data == "digits" else "own-images")
    folder = out or default_folder(name, data)
    asked, run = load(name, settings or [], run={"data": data, "out": str(folder)})
    done = learn(asked, run, quiet=quiet)
    from kinfold import distributed

    if distributed.is_main():
        tell(done)
    distributed.stop()
    if done.signal is not None:
        raise typer.Exit(128 + done.signal)


def default_folder(recipe: str, data: str) -> Path:
    """The run folder where none is named: runs/RECIPE-DATA."""
    # os.path: Path's own questions raise for a name that is too long.
    stem = Path(recipe).with_suffix("").as_posix() if os.path.isfile(recipe) else recipe
    last = [part for part in stem.replace("\\", "/").split("/") if part not in ("", ".", "..")][-2:]
    name = Path(data.rstrip("/")).resolve().name if os.path.exists(data) else data.split(":")[-1].replace("/", "-")
    return Path("runs") / "-".join([*last, name.split(".")[0] or "data"])


def tell(done: Any) -> None:
    """Say what a pretraining left behind and what to do with it."""
    if done.signal is not None:
        typer.echo(f"Stopped at step {done.step} of {done.steps}. The same command goes on from there.")
    else:
        typer.echo(f"Done: {done.steps} steps. This start took {done.seconds:.0f} s.")
    if done.bad:
        names = list(done.bad)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        typer.echo(
            f"Could not be read, and replaced by others: {len(names)} of the images: {', '.join(names[:3])}{more}. "
            f"All are in {done.folder / 'summary.json'}."
        )
    rows = [
        ("backbone", done.folder / "backbone.safetensors"),
        ("metrics", done.folder / "metrics.jsonl"),
        ("summary", done.folder / "summary.json"),
    ]
    for what, path in rows:
        typer.echo(f"  {what:10} {path}")


app.add_typer(evaluate_app, name="evaluate")


@app.command()
def embed(
    backbone: Annotated[str, typer.Argument(help="A run folder, a .safetensors file, timm:NAME or torchvision:NAME.")],
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The Parquet file to write.")] = Path("embeddings.parquet"),
    split: Annotated[
        str, typer.Option(help="Which split of the data, where it has splits; all of them if not given.")
    ] = "all",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    workers: Annotated[Optional[int], typer.Option(help="Processes that decode images.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option(help="Embed this many images only.")] = None,  # noqa: UP045
    size: Annotated[Optional[int], typer.Option(help="Side of the images in pixels.")] = None,  # noqa: UP045
) -> None:
    """Write a Parquet file with the path, embedding and label of every image."""
    from kinfold.embeddings import embed as write

    written = write(backbone, data, out, split=split, device=device, workers=workers, limit=limit, size=size)
    typer.echo(f"{written.images} embeddings of {written.dimension} numbers are in {written.path}")
    if written.bad:
        names = list(written.bad)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        typer.echo(f"{len(names)} could not be read and were left out: {', '.join(names[:3])}{more}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or its backbone.safetensors.")],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write; a card is put beside it.")],
    names: Annotated[str, typer.Option(help="Whose names the weights get: kinfold, timm or torchvision.")] = "timm",
) -> None:
    """Write the backbone so that timm or torchvision load it by their own names."""
    from kinfold.export import export_file

    path = export_file(run, out, names=names)
    typer.echo(f"written to {path}, with its card {path.with_suffix('.md')}")


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help=DATA_HELP)],
    out: Annotated[Path, typer.Argument(help="A new folder for the shards.")],
    split: Annotated[str, typer.Option(help="Which split, where there are splits; all makes one of them.")] = "train",
    short_side: Annotated[int, typer.Option(help="Pixels that the short side has at most; nothing grows.")] = 512,
    quality: Annotated[int, typer.Option(help="Quality of the JPEG that is written, 1 to 95.")] = 90,
    png: Annotated[bool, typer.Option("--png", help="Write PNG, which loses nothing, in place of JPEG.")] = False,
    format: Annotated[str, typer.Option(help="parquet, or webdataset (tar files).")] = "parquet",
    shard_mb: Annotated[int, typer.Option(help="MB of images in a file.")] = 256,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Processes that work on images. Default: one a core, up to 16."),
    ] = None,
) -> None:
    """Repack images once, smaller and in a few large files, so that every later run reads them faster.

    It pays for photos of several megapixels, which take longer to decode than a step of training, for slow and network
    disks, and for many small files. It does not pay for images that are about as large as the views are cut from.
    JPEG files that are small enough and upright keep their bytes. The same command goes on after it was stopped; once
    more with --split adds another split to the same folder.
    """
    from kinfold.console import bar
    from kinfold.data.pack import Packing
    from kinfold.data.pack import pack as write
    from kinfold.data.sources import open_source

    how = Packing(split=split, short_side=short_side, quality=quality, png=png, format=format, shard_mb=shard_mb)
    how.check()
    if workers is not None and workers < 0:
        raise UserError(f"--workers is {workers}; it has to be at least 0.")
    images = open_source(source, split=split)
    try:
        with bar("packing", len(images)) as advance:
            packed = write(images, out, how, workers=workers, progress=advance)
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from there.")
        raise typer.Exit(130) from None
    before, after = packed.bytes_before / 1e6, packed.bytes_after / 1e6
    typer.echo(
        f"{packed.images:,} images are in {out}, {len(packed.shards)} file{'' if len(packed.shards) == 1 else 's'}: "
        f"{before:,.1f} MB before, {after:,.1f} MB now. {packed.untouched:,} kept their bytes."
    )
    if packed.left_out:
        names = list(packed.left_out)
        more = f" and {len(names) - 3} more, all in {out / 'pack.json'}" if len(names) > 3 else ""
        typer.echo(f"{len(names)} could not be read and were left out: {', '.join(names[:3])}{more}")
    typer.echo(f"Next: kinfold pretrain {out}")


recipes_app = typer.Typer(
    help="List the recipes, show one complete, or print the JSON schema.", invoke_without_command=True
)
app.add_typer(recipes_app, name="recipes")


@recipes_app.callback()
def _recipes(context: typer.Context) -> None:
    """List the recipes with the first line of their headers."""
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list() -> None:
    """List the recipes with the first line of their headers."""
    folder = Path(__file__).parent / "recipes"
    found = sorted(folder.rglob("*.yaml"), key=lambda p: (p.relative_to(folder).parts[0] == "evaluate", p))
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in found]
    width = max(len(name) for name in names)
    for name, path in zip(names, found):
        with path.open(encoding="utf-8") as file:
            typer.echo(f"{name:{width}}  {file.readline().lstrip('# ').strip()}")


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="A name from `kinfold recipes`, or a YAML file.")],
    complete: Annotated[
        bool,
        typer.Option("--complete", help="Every default and preset written out, instead of the file as it is."),
    ] = False,
    settings: Annotated[Optional[list[str]], typer.Argument(help=SETTINGS_HELP)] = None,  # noqa: UP045
) -> None:
    """Print a recipe: the file, or with --complete or key=value every setting written out."""
    from kinfold.reading import read_text, to_yaml
    from kinfold.recipe import find_recipe, load

    words = name.split("/")
    if (complete or settings) and words[0] == "evaluate" and len(words) == 3:
        from kinfold.evaluate import load_protocol

        typer.echo(to_yaml(load_protocol(words[1], words[2], settings or [])), nl=False)
    elif complete or settings:
        recipe, _ = load(name, settings or [], run={"data": "-", "out": "-"})
        typer.echo(to_yaml(recipe), nl=False)
    else:
        typer.echo(read_text(find_recipe(name)), nl=False)


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    import json

    from kinfold.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the demo's files go.")] = Path("runs/demo"),
) -> None:
    """Learn from 1,437 real handwritten digits, then evaluate, embed and look: a short run on two cores."""
    from kinfold.demo import demo as show

    show(out)


def main() -> None:
    """Run the command; a person's mistake becomes one message and exit code 2."""
    arguments = [word for word in sys.argv[1:] if word != "--traceback"]  # it may stand anywhere
    wanted = len(arguments) < len(sys.argv) - 1
    try:
        app(args=arguments)
    except UserError as error:
        if wanted:
            raise
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(str(error), err=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for a device that is full, and none for the machine.
        words = ("out of memory", "allocate memory")
        full = isinstance(error, MemoryError) or any(word in str(error) for word in words)
        if wanted or not full:
            raise
        typer.secho("error: ", fg="red", err=True, nl=False)
        reason = str(error).splitlines()[0] if str(error) else "the machine has no more"
        typer.echo(f"The memory is not enough ({reason}). Take smaller images or a smaller batch.", err=True)
        sys.exit(2)
    except OSError as error:
        if wanted or error.errno not in REFUSALS:
            raise
        typer.secho("error: ", fg="red", err=True, nl=False)
        typer.echo(f"{error.filename or 'a file'}: {error.strerror}. Make room, or give another place.", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

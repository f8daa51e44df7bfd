"""`parbake pack`: a trained model and an example in, a proven bundle out."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

import click

from parbake.cli.example import read_example
from parbake.cli.inspect import batch_words, describe, parity_words
from parbake.cli.options import (
    FILE,
    Command,
    json_option,
    pickle_option,
    progress_option,
    registry_options,
    state_settings,
)
from parbake.cli.output import emit_json, say, stages
from parbake.errors import NotFound, PackRefused, SettingsError
from parbake.settings import REGISTERED

_NEEDED: Final = ("name", "example", "purpose", "owner", "out")
_NEEDED_OF_REGISTERED: Final = ("purpose", "owner")


class Pair(click.ParamType[tuple[str, str]]):
    """``COLUMN=VALUE``."""

    name = "pair"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """The two sides."""
        if isinstance(value, tuple):
            return value
        left, separator, right = str(value).rpartition("=")
        if not separator or not left or not right:
            self.fail(f"{value!r} is not COLUMN=VALUE", param, ctx)
        return left, right


class Decimals(click.ParamType[tuple[str, int]]):
    """``COLUMN=DECIMALS``."""

    name = "decimals"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        """The column and its number of decimals."""
        if isinstance(value, tuple):
            return value
        left, right = Pair().convert(value, param, ctx)
        try:
            return left, int(right)
        except ValueError:
            self.fail(f"{value!r}: {right!r} is not a number of decimals", param, ctx)


@click.command(cls=Command, short_help="Pack a trained model into a bundle, proven equal to its source.")
@click.argument("model", metavar="MODEL")
@click.option("--name", metavar="NAME", help="Name of the model.")
@click.option(
    "--example",
    type=FILE,
    metavar="FILE",
    help="Rows as the model takes them: .npz by input name, .parquet or .csv by column.",
)
@click.option("--purpose", metavar="TEXT", help="What the predictions are for.")
@click.option("--owner", metavar="TEXT", help="Who answers for the model.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where to write the bundle.")
@click.option(
    "--key",
    multiple=True,
    metavar="COLUMN",
    help="Column of the entity key; without it the row is the key.  [repeatable]",
)
@click.option(
    "--unit",
    "units",
    multiple=True,
    type=Pair(),
    metavar="COLUMN=UNIT",
    help="Unit of an input or output.  [repeatable]",
)
@click.option("--rtol", type=click.FloatRange(min=0), metavar="X", help="Allowed relative difference.")
@click.option("--atol", type=click.FloatRange(min=0), metavar="X", help="Allowed absolute difference.")
@click.option(
    "--round",
    "rounding",
    multiple=True,
    type=Decimals(),
    metavar="COLUMN=DECIMALS",
    help="Round an input before the key and before the model.  [repeatable]",
)
@click.option("--default", metavar="JSON", help="Answer of static mode for an unknown key, by output name.")
@click.option(
    "--deadline-ms",
    type=click.FloatRange(min=0, min_open=True),
    metavar="MS",
    help="Time within which callers need the answer, where a deployment sets no other.",
)
@click.option(
    "--freshness-s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="Age at which a baked prediction is no longer used.",
)
@click.option(
    "--training-data",
    default="",
    metavar="TEXT",
    help="What the model was trained on: a path, a query, a snapshot.",
)
@click.option("--run", default="", metavar="TEXT", help="Which run trained it: an id, a commit, a link.")
@click.option(
    "--pre", metavar="MODULE:FUNCTION", help="Python function in front of the model; its source is copied."
)
@click.option(
    "--post", metavar="MODULE:FUNCTION", help="Python function behind the model; its source is copied."
)
@click.option(
    "--batch",
    type=click.Choice(["any", "one", "none"]),
    help="Rows that the first axis of a tensor holds; none: it is no row.  [default: as the model says]",
)
@click.option("--allow-nan", is_flag=True, help="Accept NaN and infinities in inputs.")
@pickle_option
@click.option("--replace", is_flag=True, help="Overwrite a bundle that is there.")
@progress_option
@registry_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    example: Path | None,
    key: tuple[str, ...],
    units: tuple[tuple[str, str], ...],
    rounding: tuple[tuple[str, int], ...],
    rtol: float | None,
    atol: float | None,
    default: str | None,
    allow_nan: bool,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    registry: str | None,
    bundle_store: str | None,
    state_dir: str | None,
    **values: Any,
) -> None:
    """Pack a trained model into a bundle, proven equal to its source.

    MODEL is a file (.onnx; LightGBM's .txt; XGBoost's .json or .ubj; TorchScript's .pt; with --allow-pickle
    also .joblib, .pkl, and PyTorch's .pt2 and pickled modules), or MODULE:FUNCTION of a Python function that
    takes the inputs by name as arrays (first axis: the row), or a version that MLflow's own flavours have logged
    (models:/NAME@champion, models:/NAME@3), of which name and example are known. Source and bundle are compared
    on the example and at the model's own thresholds; a bundle that answers differently is not written.
    """
    registered = model.startswith(REGISTERED)
    _check_given(ctx, {**values, "example": example}, _NEEDED_OF_REGISTERED if registered else _NEEDED)
    if ":" not in model and not Path(model).exists():
        raise NotFound(f"no model at {model}", hint="MODEL is a file, or MODULE:FUNCTION")

    from parbake.app.pack import pack
    from parbake.contract.bundle import read_bundle

    source: Any = model
    rows = read_example(example) if example is not None else None
    with stages("packing", wanted=show_progress) as stage, tempfile.TemporaryDirectory() as temporary:
        if registered:
            from parbake.app.registry import logged_model
            from parbake.release.registry import parse_reference

            stage(f"fetching {model}")
            places = {"registry": registry, "bundle_store": bundle_store, "state_dir": state_dir}
            logged = logged_model(
                state_settings(config, places), model, Path(temporary), allow_pickle=values["allow_pickle"]
            )
            source = logged.model
            rows = logged.example if rows is None else rows
            values["name"] = values["name"] or parse_reference(model).name
            values["out"] = values["out"] or Path(f"{values['name']}.bundle")
            if rows is None:
                raise PackRefused(f"{model} was logged without an input example", hint="--example FILE")
        bundle = pack(
            source,
            example=rows,
            key=list(key) or None,
            units=dict(units),
            rounding=dict(rounding),
            tolerance=None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0),
            default=None if default is None else _json(default),
            allow_nan=allow_nan or None,
            progress=stage,
            **values,
        )
    if as_json:
        emit_json(describe(read_bundle(bundle.path, verify=False)))
    else:
        say(f"packed {bundle.path}, {bundle.digest[:19]}")
        say(f"parity: {parity_words(bundle.contract)}")
        say(f"batches: {batch_words(bundle.contract.batch)}")


def _check_given(ctx: click.Context, values: dict[str, Any], needed: tuple[str, ...]) -> None:
    for parameter in ctx.command.params:
        if parameter.name in needed and values[parameter.name] is None:
            raise click.MissingParameter(ctx=ctx, param=parameter)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"--default is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise SettingsError(
            f"--default: expected an object by output name, got {text}",
            hint='--default \'{"label": "unknown"}\'',
        )
    return value

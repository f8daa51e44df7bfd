"""Tell what a model is by its type or its file, and hand it to the source that can pack it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, Final, Literal

from parbake.contract.sources.model import Source
from parbake.errors import MissingExtra, NotAllowed, NotConvertible, PackRefused

Dimension = Literal["any", "one", "none"]

FRAMEWORKS: Final = ("lightgbm", "xgboost", "sklearn", "torch", "onnx")
"""Recognised by the top-level module of a class that a model's type inherits from."""

SUFFIXES: Final = (".onnx", ".txt", ".json", ".ubj", ".pt", ".pth", ".pt2", ".joblib", ".pkl")


def source_of(
    model: Any,
    example: object,
    *,
    allow_pickle: bool = False,
    pre: str | Callable[..., Any] | None = None,
    post: str | Callable[..., Any] | None = None,
    batch: Dimension | None = None,
    convert: bool = True,
) -> Source:
    """The Source of any model that can be packed.

    ``model`` is a fitted estimator, booster, module or function, the path of a model file, or
    ``module:function``. ``pre`` and ``post`` are Python functions around it: ``pre`` takes the example's
    columns and gives the model's inputs, ``post`` takes the model's outputs. ``batch`` overrules the batch
    dimension that was found. Without ``convert`` a scikit-learn model is pickled. Raises `PackRefused` or
    `NotConvertible`; `NotAllowed` where only a pickle would do; `MissingExtra` where the framework is not
    installed.
    """
    from parbake.contract.sources import python

    before = python.read_code(pre, allow_pickle=allow_pickle) if pre is not None else None
    after = python.read_code(post, allow_pickle=allow_pickle) if post is not None else None
    inner_example = example
    if before is not None:
        _, tensors = python.arguments(before.function, example)
        inner_example = _through(before, tensors, batch)
    source = inner_source(model, inner_example, allow_pickle=allow_pickle, batch=batch, convert=convert)
    if before is None and after is None:
        return source
    return python.around(source, before, after, example)


def inner_source(
    model: Any, example: object, *, allow_pickle: bool, batch: Dimension | None, convert: bool = True
) -> Source:
    """The Source of the model alone."""
    if isinstance(model, str | os.PathLike):
        text = os.fspath(model)
        from parbake.contract.sources import python

        if not Path(text).exists() and python.is_reference(text):
            return python.from_function(text, example, allow_pickle=allow_pickle, batch=batch)
        model = load_model(Path(text), allow_pickle=allow_pickle)
    framework = framework_of(model)
    if framework == "lightgbm":
        from parbake.contract.sources.lightgbm import from_lightgbm

        return _fixed(from_lightgbm(model, example), batch)
    if framework == "xgboost":
        from parbake.contract.sources.xgboost import from_xgboost

        return _fixed(from_xgboost(model, example), batch)
    if framework == "sklearn":
        from parbake.contract.sources.sklearn import from_sklearn

        return _fixed(from_sklearn(model, example, allow_pickle=allow_pickle, convert=convert), batch)
    if framework == "torch":
        from parbake.contract.sources.torch import from_torch

        return from_torch(model, example, batch=batch)
    if framework == "onnx" or isinstance(model, Path | bytes):
        from parbake.contract.sources.onnx import from_onnx

        return from_onnx(model, example, batch=batch)
    if isinstance(model, FunctionType):
        from parbake.contract.sources.python import from_function

        return from_function(model, example, allow_pickle=allow_pickle, batch=batch)
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    raise NotConvertible(
        f"cannot pack a {kind}",
        hint="models of scikit-learn, LightGBM, XGBoost, PyTorch, ONNX files, and functions at the top of a module",
    )


def framework_of(model: Any) -> str | None:
    """The framework a model belongs to, from its type alone: nothing is imported."""
    for kind in type(model).__mro__:
        top = kind.__module__.partition(".")[0]
        if top in FRAMEWORKS:
            return top
    return None


def load_model(path: Path, *, allow_pickle: bool) -> Any:
    """The model in a file, by its suffix; an ``.onnx`` path comes back as it is.

    Raises `PackRefused`, or `NotAllowed` for files that can run code when they are loaded.
    """
    if not path.is_file():
        hint = "give a file, or module:function"
        if path.is_dir() and (path / "manifest.json").exists():
            hint = "this is a bundle already: parbake check looks at it, parbake serve serves it"
        raise PackRefused(f"no model file at {path}", hint=hint)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return path
    if suffix == ".txt":
        try:
            import lightgbm
        except ImportError as error:
            raise MissingExtra("lightgbm", "lightgbm") from error
        try:
            return lightgbm.Booster(model_file=str(path))
        except lightgbm.basic.LightGBMError as error:
            raise PackRefused(f"{path} is not a LightGBM model: {error}") from error
    if suffix in (".json", ".ubj"):
        try:
            import xgboost
        except ImportError as error:
            raise MissingExtra("xgboost", "xgboost") from error
        booster = xgboost.Booster()
        try:
            booster.load_model(path)
        except xgboost.core.XGBoostError as error:
            reason = (str(error).strip().splitlines() or ["?"])[0]
            raise PackRefused(f"{path} is not an XGBoost model: {reason[:300]}") from error
        return booster
    if suffix in (".pt", ".pth", ".pt2"):
        from parbake.contract.sources.torch import read_torch

        return read_torch(path, allow_pickle=allow_pickle)
    if suffix in (".joblib", ".pkl", ".pickle"):
        if not allow_pickle:
            raise NotAllowed(
                f"{path} is a pickle, which can run any code when it is loaded",
                hint="--allow-pickle if you trust whoever wrote it; or parbake.pack(model, ...) where it was trained",
            )
        try:
            import joblib
        except ImportError as error:
            raise MissingExtra("joblib", "sklearn") from error
        try:
            return joblib.load(path)
        except Exception as error:
            raise PackRefused(f"{path} cannot be unpickled: {type(error).__name__}: {error}") from error
    raise PackRefused(
        f"cannot tell what {path} is", hint=f"known are {', '.join(SUFFIXES)}, and module:function"
    )


def _fixed(source: Source, batch: Dimension | None) -> Source:
    """Converted models have a free batch dimension; one row at a time is the only other thing to ask for."""
    if batch in (None, source.batch_dimension):
        return source
    if batch == "one":
        from dataclasses import replace

        from parbake.contract.sources.dimension import along_rows

        return replace(source, batch_dimension="one", predict=along_rows(source.predict, "one"))
    raise PackRefused(
        f"batch={batch!r} does not fit a {source.framework} model", hint="its first axis is the row"
    )


def _through(code: Any, tensors: Any, batch: Dimension | None) -> object:
    """The example as it leaves the function before the model."""
    from parbake.contract.sources.dimension import along_rows
    from parbake.contract.sources.python import caller

    try:
        answers = along_rows(caller(code.function), batch or "any")(tensors)
    except Exception as error:
        raise PackRefused(
            f"{code.entry} fails on the example: {type(error).__name__}: {error}",
            hint="it gets one array per input, by name; the first axis is the row",
        ) from error
    return dict(answers)

"""Models that MLflow's own flavours have logged: fetched, and loaded so that they can be packed.

What can run code when it is loaded (pickles) is loaded only where that is allowed. Of skops files nothing is loaded but
types that skops and this module know to be harmless, whatever the model says it trusts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from parbake.errors import MissingExtra, NotAllowed, NotConvertible, PackRefused, RegistryAway
from parbake.release.mlflow_sqlite import quiet
from parbake.release.registry import Reference

_FLAVOURS: Final = ("onnx", "lightgbm", "xgboost", "sklearn", "pytorch")
_KNOWN_TYPES: Final = frozenset(
    {
        "collections.OrderedDict",
        "lightgbm.basic.Booster",
        "lightgbm.sklearn.LGBMClassifier",
        "lightgbm.sklearn.LGBMRanker",
        "lightgbm.sklearn.LGBMRegressor",
        "xgboost.core.Booster",
        "xgboost.sklearn.XGBClassifier",
        "xgboost.sklearn.XGBRegressor",
    }
)
_PICKLES: Final = (".pkl", ".pickle", ".joblib", ".cloudpickle")


@dataclass(frozen=True, slots=True)
class LoggedModel:
    """A model as `parbake.pack` takes it, with what MLflow knows of it."""

    model: Any
    """The model, or the path of its file."""
    flavour: str
    example: Any
    """Its input example; None where it was logged without one."""


def take(url: str, reference: Reference, folder: Path, *, allow_pickle: bool = False) -> LoggedModel:
    """Fetch a version's files into ``folder``, and load the model.

    Raises `NotAllowed` for a pickle, `NotConvertible` for what is a Python function of MLflow's only, `PackRefused`,
    `RegistryAway`, `MissingExtra`.
    """
    try:
        with quiet():
            import mlflow
            from mlflow.exceptions import MlflowException
            from mlflow.models import Model
    except ImportError as error:
        raise MissingExtra("MLflow", "mlflow") from error
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with quiet():
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        separator = "@" if reference.follows else "/"
        uri = f"models:/{reference.name}{separator}{reference.which}"
        try:
            root = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(folder)))
            logged = Model.load(str(root))
            example = logged.load_input_example(str(root))
        except (MlflowException, OSError) as error:
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RegistryAway(f"the files of {uri} cannot be fetched: {words[:300]}") from error
        flavour = next((name for name in _FLAVOURS if name in logged.flavors), "")
        if not flavour:
            raise NotConvertible(
                f"{uri} is a Python function of MLflow's ({', '.join(logged.flavors)}), of which the files do not say "
                "what it does",
                hint="pack the function itself, as MODULE:FUNCTION, or log the model with the flavour of its framework",
            )
        return LoggedModel(_load(root, flavour, logged.flavors[flavour], allow_pickle), flavour, example)


def _load(root: Path, flavour: str, said: Mapping[str, Any], allow_pickle: bool) -> Any:
    name = said.get("pickled_model") or said.get("data") or said.get("model_data") or ""
    path = (root / str(name)).resolve()
    if not name or not path.is_relative_to(root.resolve()) or not path.exists():
        raise PackRefused(f"the {flavour} model of MLflow has no file {str(name)[:80]!r}")
    if path.suffix == ".skops":
        return _skops(path, allow_pickle)
    if flavour == "pytorch":
        found = [file for file in sorted(path.rglob("*")) if file.suffix in (".pt2", ".pth", ".pt")]
        if not found:
            raise PackRefused("the pytorch model of MLflow has no file of a model")
        # It says itself which of them are pickles.
        return found[0]
    if path.suffix in _PICKLES:
        if not allow_pickle:
            raise NotAllowed(
                f"{path.name} of MLflow's {flavour} model is a pickle, which can run any code when it is loaded",
                hint="--allow-pickle if you trust whoever logged it; or log it with serialization_format='skops'",
            )
        return _unpickle(path)
    if flavour == "lightgbm":
        import lightgbm

        return lightgbm.Booster(model_file=str(path))
    if flavour == "xgboost":
        return _xgboost(path, str(said.get("model_class", "")))
    return path


def _skops(path: Path, allow_pickle: bool) -> Any:
    try:
        import skops.io
    except ImportError as error:
        raise MissingExtra("skops", "mlflow") from error
    unknown = sorted(set(skops.io.get_untrusted_types(file=path)) - _KNOWN_TYPES)
    if unknown and not allow_pickle:
        raise NotAllowed(
            f"{path.name} holds {', '.join(unknown)[:300]}, which may run code when it is loaded",
            hint="--allow-pickle if you trust whoever logged it",
        )
    return skops.io.load(path, trusted=sorted(_KNOWN_TYPES | set(unknown)))


def _unpickle(path: Path) -> Any:
    import cloudpickle

    try:
        with path.open("rb") as handle:
            return cloudpickle.load(handle)
    except Exception as error:
        raise PackRefused(f"{path.name} cannot be unpickled: {type(error).__name__}: {error}") from error


def _xgboost(path: Path, named: str) -> Any:
    import xgboost

    kind = named.removeprefix("xgboost.sklearn.")
    known = {"XGBClassifier", "XGBRegressor", "XGBRFClassifier", "XGBRFRegressor", "XGBRanker"}
    model: Any = getattr(xgboost, kind)() if kind in known else xgboost.Booster()
    model.load_model(path)
    return model

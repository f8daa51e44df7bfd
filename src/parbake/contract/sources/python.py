"""Pack a Python function: its source, the local modules that it imports, and the libraries that it needs."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import inspect
import platform
import re
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any, Final

import numpy as np

from parbake.contract.datatypes import datatype_of
from parbake.contract.environment import Distributions
from parbake.contract.model import Step, TensorSpec
from parbake.contract.rows import holds_gaps
from parbake.contract.sources.dimension import along_rows
from parbake.contract.sources.model import Predict, Source
from parbake.contract.tensors import Tensor, Tensors, as_text
from parbake.errors import NotAllowed, NotConvertible, PackRefused

MAX_BYTES: Final = 256 * 1024**2
"""Most bytes of source and data files."""

_TRIED_ROWS: Final = 8
_REFERENCE: Final = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
_PICKLES: Final = frozenset({".pkl", ".pickle", ".joblib", ".pt", ".pth", ".dill"})


@dataclass(frozen=True, slots=True)
class Code:
    """A function with everything of its own that it runs on."""

    function: Callable[..., Any]
    entry: str
    """``module:function`` below the copied folder."""
    files: Mapping[str, bytes]
    """By path below the copied folder."""
    required: tuple[str, ...]
    """Distributions that the copied modules import."""


def is_reference(text: str) -> bool:
    """Whether a string has the form ``module:function``."""
    return bool(_REFERENCE.match(text))


def from_function(
    function: str | Callable[..., Any],
    example: object,
    *,
    allow_pickle: bool = False,
    batch: str | None = None,
) -> Source:
    """A Source of ``module:function`` or of a function object.

    The function takes one keyword argument per input, each an array whose first axis is the row (strings
    as objects of str), and gives an array, a tuple of arrays, or a dict of arrays by output name. A frame
    becomes one argument per column, shape (rows,), or one matrix if the function has a single parameter
    that no column is named like. Raises `NotConvertible` for functions that have no source of their own.
    """
    code = read_code(function, allow_pickle=allow_pickle)
    specs, tensors = arguments(code.function, example)
    dimension = batch or "any"
    predict = along_rows(caller(code.function), dimension)
    return Source(
        framework="python",
        framework_version=platform.python_version(),
        inputs=specs,
        outputs=outputs_of(predict, tensors, code.entry, dimension),
        steps=(Step("python", "source", code.entry),),
        files={f"source/{name}": data for name, data in code.files.items()},
        predict=predict,
        example=tensors,
        required=code.required,
        batch_dimension=dimension,
        own_runtime=True,
    )


def around(source: Source, pre: Code | None, post: Code | None, example: object) -> Source:
    """``source`` with a function before and one after it, as steps of their own.

    ``example`` is what the first of the steps takes. ``pre`` gives the inputs of the model by name,
    ``post`` takes its outputs by name.
    """
    specs, tensors = arguments(pre.function, example) if pre else (source.inputs, source.example)
    dimension = source.batch_dimension
    if pre:
        given = along_rows(caller(pre.function), dimension)(
            {name: array[:1] for name, array in tensors.items()}
        )
        absent = [spec.name for spec in source.inputs if spec.name not in given]
        if absent:
            raise PackRefused(
                f"{pre.entry} gives {', '.join(map(repr, given))}, the model takes {', '.join(map(repr, absent))}",
                hint="it must return a dict of arrays by the model's input names",
            )
    before = caller(pre.function) if pre else None
    after = caller(post.function) if post else None

    def call(given: Tensors) -> Mapping[str, Tensor]:
        inner = before(given) if before else given
        if dimension == "none":
            answers = source.predict({name: np.asarray(array)[np.newaxis] for name, array in inner.items()})
            answers = {name: np.asarray(array)[0] for name, array in answers.items()}
        else:
            answers = source.predict(inner)
        return after(answers) if after else answers

    predict = along_rows(call, dimension)
    steps = source.steps
    files = dict(source.files)
    if pre:
        steps = (Step("python", "pre", pre.entry), *steps)
        files.update({f"pre/{name}": data for name, data in pre.files.items()})
    if post:
        steps = (*steps, Step("python", "post", post.entry))
        files.update({f"post/{name}": data for name, data in post.files.items()})
    what = (post or pre).entry if post or pre else ""  # type: ignore[union-attr]  # one of them is there
    return Source(
        framework=source.framework,
        framework_version=source.framework_version,
        inputs=specs,
        outputs=outputs_of(predict, tensors, what, dimension) if post else source.outputs,
        steps=steps,
        files=files,
        predict=predict,
        example=tensors,
        thresholds={} if pre else source.thresholds,
        required=tuple(
            sorted({*source.required, *(pre.required if pre else ()), *(post.required if post else ())})
        ),
        batch_dimension=dimension,
        own_runtime=source.own_runtime,
        rtol=source.rtol,
        atol=source.atol,
        smooth=source.smooth,
    )


def read_code(function: str | Callable[..., Any], *, allow_pickle: bool = False) -> Code:
    """Find a function and collect its source, the local modules it imports, and the data files they name.

    A module of an installed distribution is not copied but imported, and the distribution is required.
    Raises `NotConvertible` for lambdas, closures, methods and functions without a file.
    """
    found = _import(function) if isinstance(function, str) else function
    name = _checked_name(found)
    module, file = _module_of(found)
    if _installed(file):
        # Not under the distribution's own name: the copied folder comes before it on the path.
        shim = f'"""The function of an installed library."""\n\nfrom {module} import {name}\n'
        distribution = Distributions().of(module)
        required = (distribution,) if distribution else ()
        return Code(found, f"parbake_entry:{name}", {"parbake_entry.py": shim.encode()}, required)
    root = file.parent
    for _ in range(module.count(".") + (file.name == "__init__.py")):
        root = root.parent
    copy = _Copy(root, allow_pickle)
    copy.take_module(module, file)
    return Code(found, f"{module}:{name}", dict(sorted(copy.files.items())), tuple(sorted(copy.required)))


def caller(function: Callable[..., Any]) -> Predict:
    """The function as a map of tensors to tensors, called as the runtime calls a Python step."""

    def call(tensors: Tensors) -> dict[str, Tensor]:
        result = function(**{n: as_text(a) if a.dtype == object else a for n, a in tensors.items()})
        if isinstance(result, Mapping):
            return {str(name): np.asarray(value) for name, value in result.items()}
        values = result if isinstance(result, tuple) else (result,)
        return {f"output{i}" if i else "output": np.asarray(value) for i, value in enumerate(values)}

    return call


def arguments(
    function: Callable[..., Any], example: object
) -> tuple[tuple[TensorSpec, ...], dict[str, Tensor]]:
    """Input specs and tensors of an example, as the parameters of a function ask for them.

    Raises `PackRefused` where names do not match.
    """
    from parbake.contract.sources.example import read

    found = read(example)
    wanted, required, open_ended = _parameters(function)
    if found.columns:
        names = [column.name for column in found.columns]
        if open_ended or set(names) <= set(wanted):
            _refuse_absent(function, required, names)
            tensors = {column.name: column.values for column in found.columns}
            specs = []
            for column in found.columns:
                gaps = column.missing or holds_gaps(column.values)
                specs.append(TensorSpec(column.name, datatype_of(column.values), allow_nan=gaps))
            return tuple(specs), tensors
        if len(required or wanted) == 1 and found.kind == "matrix":
            return _renamed(found.specs[0], found.tensors, (required or wanted)[0])
        unknown = [name for name in names if name not in wanted]
        raise PackRefused(
            f"{function.__name__}() has no parameter {', '.join(map(repr, unknown))}, which the example has",
            hint=f"its parameters are {', '.join(wanted) or 'none'}; **columns would take any",
        )
    if found.kind == "array":
        if len(required) > 1 or not (wanted or open_ended):
            raise PackRefused(
                f"{function.__name__}() takes {', '.join(wanted) or 'nothing'}, the example is one array",
                hint="example={name: array, ...}, or a DataFrame with these columns",
            )
        return _renamed(found.specs[0], found.tensors, (required or wanted or [found.specs[0].name])[0])
    names = list(found.tensors)
    unknown = [] if open_ended else [name for name in names if name not in wanted]
    if unknown:
        raise PackRefused(
            f"{function.__name__}() has no parameter {', '.join(map(repr, unknown))}, which the example has",
            hint=f"its parameters are {', '.join(wanted) or 'none'}",
        )
    _refuse_absent(function, required, names)
    return found.specs, dict(found.tensors)


def outputs_of(predict: Predict, tensors: Tensors, what: str, dimension: str) -> tuple[TensorSpec, ...]:
    """Output specs, from running a function on some of the example. Raises `PackRefused` with what it says."""
    some = {name: array[:_TRIED_ROWS] for name, array in tensors.items()}
    rows = len(next(iter(some.values())))
    try:
        answers = predict(some)
    except Exception as error:
        raise PackRefused(
            f"{what} fails on the example: {type(error).__name__}: {error}",
            hint="it gets one array per input, by name; the first axis is the row"
            if dimension == "any"
            else "it gets one row at a time",
        ) from error
    specs = []
    for name, array in answers.items():
        if array.ndim == 0 or len(array) != rows:
            raise PackRefused(
                f"{what} gives output {name!r} of shape {list(array.shape)} for {rows} rows",
                hint="the first axis of every output is the row; batch='none' calls it with one row at a time",
            )
        try:
            datatype = datatype_of(array)
        except ValueError as error:
            raise PackRefused(
                f"output {name!r} of {what}: {error}", hint="numbers, booleans or strings"
            ) from error
        specs.append(TensorSpec(name, datatype, tuple(array.shape[1:])))
    if not specs:
        raise PackRefused(f"{what} gives no outputs", hint="return an array, a tuple or a dict of arrays")
    return tuple(specs)


def _renamed(
    spec: TensorSpec, tensors: Tensors, name: str
) -> tuple[tuple[TensorSpec, ...], dict[str, Tensor]]:
    (array,) = tensors.values()
    new = TensorSpec(name, spec.datatype, spec.shape, columns=spec.columns, allow_nan=spec.allow_nan)
    return (new,), {name: array}


def _parameters(function: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of parameters, those without a default, and whether any other name is taken too."""
    wanted: list[str] = []
    required: list[str] = []
    open_ended = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            wanted.append(parameter.name)
            if parameter.default is parameter.empty:
                required.append(parameter.name)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            raise NotConvertible(
                f"{function.__name__}() takes {parameter.name!r} by position only",
                hint="inputs are given by name: remove the '/'",
            )
    return wanted, required, open_ended


def _refuse_absent(function: Callable[..., Any], required: Sequence[str], names: Sequence[str]) -> None:
    absent = [name for name in required if name not in names]
    if absent:
        raise PackRefused(
            f"{function.__name__}() needs {', '.join(map(repr, absent))}, which the example lacks",
            hint=f"the example has {', '.join(names)}",
        )


def _import(reference: str) -> Callable[..., Any]:
    module_name, _, name = reference.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    # A module that is changed within the second, and is as long as before, would be taken for what was compiled of it.
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise PackRefused(
            f"cannot import {module_name}: {type(error).__name__}: {error}",
            hint=f"module:function, found from {here} or sys.path",
        ) from error
    finally:
        sys.dont_write_bytecode = writes
        sys.path.remove(here)
    function = getattr(module, name, None)
    if function is None:
        raise PackRefused(f"{module_name} has no function {name!r}")
    if not callable(function):
        raise PackRefused(f"{reference} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]  # callable() narrows to Callable[..., object]


def _checked_name(function: Callable[..., Any]) -> str:
    """The name under which the module holds the function. Raises `NotConvertible` if it has none."""
    hint = "write a function at the top level of a module"
    if not isinstance(function, FunctionType):
        raise NotConvertible(
            f"{function!r} is a {type(function).__name__}, not a plain Python function", hint=hint
        )
    if function.__name__ == "<lambda>":
        raise NotConvertible("a lambda has no name to load it by", hint=hint)
    if "<locals>" in function.__qualname__:
        raise NotConvertible(f"{function.__qualname__} is defined inside another function", hint=hint)
    if "." in function.__qualname__:
        raise NotConvertible(f"{function.__qualname__} is a method", hint=hint)
    module = sys.modules.get(function.__module__)
    if module is None or getattr(module, function.__name__, None) is not function:
        raise NotConvertible(
            f"{function.__module__} has no {function.__name__!r} that is this function",
            hint="a decorator should keep the name (functools.wraps), and nothing overwrite it",
        )
    return str(function.__name__)


def _module_of(function: Callable[..., Any]) -> tuple[str, Path]:
    """Name and file of a function's module; a script that runs as ``__main__`` goes by its file's name."""
    module_name = function.__module__
    module = sys.modules[module_name]
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file() or not str(file).endswith(".py"):
        raise NotConvertible(
            f"{function.__name__} was typed in, it has no source file"
            if module_name == "__main__"
            else f"{module_name} has no source file",
            hint="write it into a module and give module:function",
        )
    path = Path(file).resolve()
    if module_name == "__main__":
        spec = getattr(module, "__spec__", None)
        module_name = spec.name if spec is not None and spec.name else path.stem
        module_name = (
            module_name.removesuffix(".__main__") + ".__main__" if path.stem == "__main__" else module_name
        )
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise NotConvertible(f"{path.name} cannot be imported as a module", hint="rename the file")
    return module_name, path


def _installed(file: Path) -> bool:
    """Whether a file belongs to an installed distribution or the standard library."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {*site.getsitepackages(), site.getusersitepackages()}
    return any(file.is_relative_to(Path(path).resolve()) for path in paths if path)


@dataclass(slots=True)
class _Copy:
    """The modules below ``root`` that one module needs, and what they need from outside."""

    root: Path
    allow_pickle: bool
    files: dict[str, bytes] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    _taken: int = 0
    _installed: Distributions | None = None

    def take_module(self, name: str, file: Path) -> None:
        """Copy a module, its packages' ``__init__`` and, in turn, what it imports."""
        relative = "/".join(name.split(".")) + ("/__init__.py" if file.name == "__init__.py" else ".py")
        if relative in self.files:
            return
        data = self._take(relative, file)
        parent, _, _ = name.rpartition(".")
        if parent:
            self._take_local(parent)
        try:
            tree = ast.parse(data, str(file))
        except SyntaxError as error:
            raise NotConvertible(f"{file}: {error}") from error
        package = name if file.name == "__init__.py" else parent
        for wanted in _imports(tree, package):
            if not self._take_local(wanted):
                self._require(wanted)
        self._take_data(tree, file)

    def _take_local(self, name: str) -> bool:
        """Copy the local module ``name``, if there is one, its packages first; gives whether there is."""
        at = self.root
        parts = name.split(".")
        for i, part in enumerate(parts):
            here = ".".join(parts[: i + 1])
            last = i == len(parts) - 1
            if (at / part / "__init__.py").is_file():
                self.take_module(here, at / part / "__init__.py")
                if last:
                    return True
            elif (at / f"{part}.py").is_file():
                self.take_module(here, at / f"{part}.py")
                return last
            else:
                self._refuse_extension(at, part)
                # A folder without __init__ is a package too, but one that yields to any other.
                if last or not (at / part).is_dir():
                    return False
            at = at / part
        return False

    def _refuse_extension(self, folder: Path, name: str) -> None:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (folder / f"{name}{suffix}").is_file():
                raise NotConvertible(
                    f"{name}{suffix} is a compiled module, which cannot be copied as source",
                    hint="install it as a distribution",
                )

    def _require(self, name: str) -> None:
        """Note the distribution of a module that is not local; a local one elsewhere on the path is copied."""
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top == "parbake" or top in sys.builtin_module_names:
            return
        if self._installed is None:
            self._installed = Distributions()
        if (distribution := self._installed.of(name)) is not None:
            self.required.add(distribution)
            return
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            spec = None
        if (
            spec is not None
            and spec.origin
            and spec.origin.endswith(".py")
            and not _installed(Path(spec.origin))
        ):
            root, self.root = self.root, Path(spec.origin).resolve().parent
            if Path(spec.origin).name == "__init__.py":
                self.root = self.root.parent
            try:
                self._take_local(name)
            finally:
                self.root = root

    def _take_data(self, tree: ast.AST, file: Path) -> None:
        """Copy the files beside a module that it names in a string (weights, vocabularies)."""
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            name = node.value
            if (
                not re.fullmatch(r"[\w][\w./ -]{0,200}\.\w{1,10}", name)
                or ".." in name
                or name.endswith(".py")
            ):
                continue
            target = file.parent / name
            if not target.is_file() or not target.resolve().is_relative_to(self.root):
                continue
            if target.suffix in _PICKLES and not self.allow_pickle:
                raise NotAllowed(
                    f"{file.name} names {name}, which may hold a pickle",
                    hint="store numbers as .npz or .json, or --allow-pickle",
                )
            relative = target.relative_to(self.root).as_posix()
            if relative not in self.files:
                self._take(relative, target)

    def _take(self, relative: str, file: Path) -> bytes:
        self._taken += file.stat().st_size
        if self._taken > MAX_BYTES:
            raise NotConvertible(
                f"source and data files are over {MAX_BYTES} bytes at {file}",
                hint="is the right folder the root?",
            )
        self.files[relative] = file.read_bytes()
        return self.files[relative]


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of the modules that a syntax tree imports, inside functions too.

    For ``from a import b`` both ``a`` and, as it may be a module, ``a.b``.
    """
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [node.module] if node.module else []
            if node.level:
                packages = package.split(".")
                parts = [*packages[: len(packages) - node.level + 1], *parts]
            base = ".".join(parts)
            if base:
                yield base
            for alias in node.names:
                if alias.name != "*":
                    yield f"{base}.{alias.name}" if base else alias.name
        elif isinstance(node, ast.If) and _type_checking(node.test):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))


def _type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )

"""Import a bundle's own source so that two bundles may carry modules of the same name."""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from parbake.errors import BundleError

_importing = threading.RLock()
# sys.modules belongs to the whole process: one folder's modules stand in it at a time.


def load_function(source: Path, entry: str) -> Callable[..., Any]:
    """Import ``module:function`` from a folder of source, leaving nothing of it behind in sys.modules.

    Import statements that the source runs later, inside its functions, find the same folder and the same
    modules. Raises `BundleError`.
    """
    module_name, _, function_name = entry.partition(":")
    try:
        function = getattr(_Folder(source).load(module_name), function_name)
    except Exception as error:
        # Importing runs the module, which may raise anything.
        raise BundleError(
            f"cannot load {entry} from {source}: {type(error).__name__}: {error}",
            hint="is a library missing that it imports?",
        ) from error
    if not callable(function):
        raise BundleError(f"{entry} in {source} is not a function")
    return function  # type: ignore[no-any-return]  # callable() narrows to Callable[..., object]


class _Folder:
    """The modules of one folder: in sys.modules only while one of them is importing."""

    def __init__(self, source: Path) -> None:
        self._source = str(source)
        self._tops = {item.stem if item.is_file() else item.name for item in source.iterdir()}
        self._modules: dict[str, ModuleType] = {}
        # A module's import statements call the __import__ of its own builtins.
        self.builtins = {**vars(builtins), "__import__": self._import}

    def load(self, name: str) -> ModuleType:
        """The module ``name`` of the folder."""
        with self._present():
            return importlib.import_module(name)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the folder's modules for the import system (`importlib.abc.MetaPathFinder`)."""
        if name.partition(".")[0] not in self._tops:
            return None
        for place in path or [self._source]:
            details: Any = (self._loader, [".py"])
            spec = FileFinder(place, details).find_spec(name)
            if spec is not None:
                return spec
        return None

    def _loader(self, name: str, path: str) -> _Loader:
        return _Loader(name, path, self.builtins)

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002  # the names of the built-in __import__
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0 and name.partition(".")[0] not in self._tops:
            return __import__(name, globals, locals, fromlist or (), level)
        with self._present():
            return __import__(name, globals, locals, fromlist or (), level)

    @contextmanager
    def _present(self) -> Iterator[None]:
        """Put the folder's modules in place of others of the same name, and back afterwards."""
        with _importing:
            if self in sys.meta_path:
                yield
                return
            hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if self._owns(name)}
            sys.modules.update(self._modules)
            sys.meta_path.insert(0, self)
            try:
                yield
            finally:
                sys.meta_path.remove(self)
                self._modules = {
                    name: sys.modules.pop(name) for name in list(sys.modules) if self._owns(name)
                }
                sys.modules.update(hidden)

    def _owns(self, name: str) -> bool:
        return name.partition(".")[0] in self._tops


class _Loader(SourceFileLoader):
    """Runs a module with builtins whose ``__import__`` knows the folder."""

    def __init__(self, name: str, path: str, own: dict[str, Any]) -> None:
        super().__init__(name, path)
        self._own = own

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        module.__dict__["__builtins__"] = self._own
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        """The source, compiled: the digest says nothing of a compiled file that lies beside it."""
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

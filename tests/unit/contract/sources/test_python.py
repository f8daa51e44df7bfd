"""Python functions as sources: what is copied, what is required, what is refused, and what comes out of it."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from parbake.contract.model import Step, TensorSpec
from parbake.contract.sources.python import arguments, around, from_function, is_reference, read_code
from parbake.errors import BundleError, NotAllowed, NotConvertible, PackRefused
from parbake.runtime.own_code import load_function

Project = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """Write modules into a folder that can be imported from; they are forgotten afterwards."""
    root = tmp_path / "project"
    root.mkdir()
    before = set(sys.modules)

    def write(**files: str) -> Path:
        for name, text in files.items():
            target = root / (
                name.replace("__", "/") + ".py" if not name.endswith("_init") else name[:-5] + "/__init__.py"
            )
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(text))
        return root

    monkeypatch.syspath_prepend(root)
    yield write
    for name in set(sys.modules) - before:
        if str(root) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def load(folder: Path, files: dict[str, bytes], entry: str) -> Callable[..., Any]:
    """The function from a copy of its source alone."""
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return load_function(folder, entry)


def test_a_function_comes_with_the_local_modules_it_imports_and_nothing_else(project: Project) -> None:
    project(
        fare="""
            import json
            import numpy as np
            import rates
            from fare_tools.rounding import half

            def fare(km):
                return half(km * rates.PER_KM)
        """,
        rates="PER_KM = 2.0",
        fare_tools_init="from .limits import LOW",
        fare_tools__rounding="""
            from . import limits
            def half(x):
                return x / 2 + limits.LOW
        """,
        fare_tools__limits="LOW = 1.0",
        fare_tools__unused="raise RuntimeError",
        training="raise RuntimeError",
    )
    source = from_function("fare:fare", {"km": np.array([1.0, 2.0])})
    assert set(source.files) == {
        "source/fare.py", "source/rates.py", "source/fare_tools/__init__.py", "source/fare_tools/rounding.py",
        "source/fare_tools/limits.py",
    }  # fmt: skip
    assert source.steps == (Step("python", "source", "fare:fare"),)
    assert source.required == ("numpy",)
    assert source.inputs == (TensorSpec("km", "FP64"),)
    assert source.outputs == (TensorSpec("output", "FP64"),)
    assert source.own_runtime
    assert source.predict(source.example)["output"].tolist() == [2.0, 3.0]


def test_the_copy_runs_without_the_original(project: Project, tmp_path: Path) -> None:
    root = project(
        pricing_init="",
        pricing__fare="from pricing.rates import R\ndef fare(km): return km * R",
        pricing__rates="R = 3",
    )
    code = read_code("pricing.fare:fare")
    assert set(code.files) == {"pricing/__init__.py", "pricing/fare.py", "pricing/rates.py"}
    for name in ("pricing", "pricing.fare", "pricing.rates"):
        del sys.modules[name]
    (root / "pricing" / "rates.py").write_text("R = 1000")
    assert load(tmp_path / "copy", dict(code.files), code.entry)(km=2) == 6


def test_imports_inside_functions_find_the_copy_too(project: Project, tmp_path: Path) -> None:
    root = project(
        lazy="def f(x):\n    import lazy_helper\n    from lazy_helper import TWO\n    return lazy_helper.ONE + TWO + x",
        lazy_helper="ONE = 1\nTWO = 2",
    )
    code = read_code("lazy:f")
    assert set(code.files) == {"lazy.py", "lazy_helper.py"}
    (root / "lazy_helper.py").write_text("ONE = TWO = 1000")
    importlib.invalidate_caches()
    assert load(tmp_path / "copy", dict(code.files), code.entry)(x=0) == 3


def test_two_bundles_may_carry_modules_of_one_name(tmp_path: Path) -> None:
    first = {"twin.py": b"import twin_part\ndef f(x): return x + twin_part.N", "twin_part.py": b"N = 1"}
    second = {
        "twin.py": b"def f(x):\n    import twin_part\n    return x + twin_part.N",
        "twin_part.py": b"N = 2",
    }
    one, two = load(tmp_path / "1", first, "twin:f"), load(tmp_path / "2", second, "twin:f")
    assert [one(x=0), two(x=0), one(x=0), two(x=0)] == [1, 2, 1, 2]
    assert not {"twin", "twin_part"} & set(sys.modules)
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_library", "No module named 'no_such_library'"),
        ("def f(:", "invalid syntax"),
        ("1 / 0", "ZeroDivisionError"),
        ("g = 1", "has no attribute 'f'"),
        ("f = 1", "is not a function"),
    ],
)
def test_source_that_cannot_be_loaded_is_a_bundle_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(tmp_path, {"broken.py": text.encode()}, "broken:f")


def test_data_files_that_a_module_names_are_copied(project: Project, tmp_path: Path) -> None:
    root = project(
        scale="""
            import json
            from pathlib import Path
            FACTOR = json.loads(Path(__file__).with_name("factor.json").read_text())
            OTHER = "../outside.json", "factor.txt", "/etc/passwd"
            def scale(x): return x * FACTOR
        """
    )
    (root / "factor.json").write_text("7")
    (root.parent / "outside.json").write_text("secret")
    code = read_code("scale:scale")
    assert set(code.files) == {"scale.py", "factor.json"}
    assert load(tmp_path / "copy", dict(code.files), code.entry)(x=2) == 14


def test_a_named_pickle_needs_permission(project: Project) -> None:
    root = project(pickled='NAME = "weights.pkl"\ndef f(x): return x')
    (root / "weights.pkl").write_bytes(b"whatever")
    with pytest.raises(NotAllowed, match=r"pickled\.py names weights\.pkl, which may hold a pickle"):
        read_code("pickled:f")
    assert set(read_code("pickled:f", allow_pickle=True).files) == {"pickled.py", "weights.pkl"}


def test_a_function_of_an_installed_library_is_imported_and_required(tmp_path: Path) -> None:
    code = read_code("hypothesis.extra.numpy:array_shapes")
    assert code.required == ("hypothesis",)
    assert list(code.files) == ["parbake_entry.py"]
    assert load(tmp_path, dict(code.files), code.entry).__name__ == "array_shapes"


def test_imports_for_type_checkers_are_not_followed(project: Project) -> None:
    project(
        typed="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas, typed_only\ndef f(x): return x",
        typed_only="",
    )
    code = read_code("typed:f")
    assert (set(code.files), code.required) == ({"typed.py"}, ())


def test_a_function_that_has_no_source_of_its_own_is_refused(project: Project) -> None:
    project(
        shapes="""
            import functools
            def outer(k):
                def inner(x): return x * k
                return inner
            class Model:
                def __call__(self, x): return x
                def predict(self, x): return x
            half = functools.partial(pow, 2)
            def hidden(x): return x
            kept, hidden = hidden, None
            def positional(x, /): return x
        """
    )
    import shapes  # type: ignore[import-not-found]  # written by this test

    for function, message in [
        (lambda x: x, "a lambda has no name"),
        (shapes.outer(2), "inner is defined inside another function"),
        (shapes.Model.predict, r"Model\.predict is a method"),
        (shapes.Model(), "is a Model, not a plain Python function"),
        (shapes.half, "is a partial, not a plain Python function"),
        (functools.partial(shapes.outer, 2), "is a partial, not a plain Python function"),
        (shapes.kept, "shapes has no 'hidden' that is this function"),
        (np.sqrt, "is a ufunc, not a plain Python function"),
        (shapes.positional, "takes 'x' by position only"),
    ]:
        with pytest.raises(NotConvertible, match=message):
            from_function(function, np.ones(3))


def test_a_reference_that_leads_nowhere_is_refused(project: Project) -> None:
    project(here="VALUE = 1\ndef f(x): return x", torn="def f(:", fails="1 / 0")
    for reference, message in [
        ("nowhere_at_all:f", "cannot import nowhere_at_all"),
        ("here:g", "here has no function 'g'"),
        ("here:VALUE", "here:VALUE is a int, not a function"),
        ("torn:f", "cannot import torn: SyntaxError"),
        ("fails:f", "cannot import fails: ZeroDivisionError"),
    ]:
        with pytest.raises(PackRefused, match=message):
            read_code(reference)


def test_a_function_typed_into_an_interpreter_is_refused() -> None:
    code = (
        "def f(x): return x\n"
        "from parbake.contract.sources.python import read_code\n"
        "try: read_code(f)\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("f was typed in, it has no source file\nhint: write it into a module")


def test_a_function_of_a_script_goes_by_the_script_s_name(tmp_path: Path) -> None:
    script = tmp_path / "my_script.py"
    script.write_text(
        "def f(x): return x\n"
        "if __name__ == '__main__':\n"
        "    from parbake.contract.sources.python import read_code\n"
        "    code = read_code(f)\n"
        "    print(code.entry, *code.files)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "my_script:f my_script.py\n"


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("a:f", True),
        ("a.b:f", True),
        ("a:f.g", False),
        ("a/b.onnx", False),
        ("C:\\m.onnx", False),
        (":f", False),
    ],
)
def test_a_reference_is_module_colon_function(text: str, yes: bool) -> None:
    assert is_reference(text) is yes


def test_a_table_becomes_the_arguments_that_the_function_asks_for() -> None:
    table = pa.table({"km": [1.5, 2.0], "city": ["rome", None], "n": [1, None]})

    def columns(km: Any, city: Any, n: Any = None) -> None: ...
    def anything(**columns: Any) -> None: ...

    for function in (columns, anything):
        specs, tensors = arguments(function, table)
        assert specs == (
            TensorSpec("km", "FP64"),
            TensorSpec("city", "BYTES", allow_nan=True),
            TensorSpec("n", "FP64", allow_nan=True),
        )
        assert tensors["city"].tolist() == ["rome", ""]

    def matrix(x: Any, scale: float = 1.0) -> None: ...

    specs, tensors = arguments(matrix, pa.table({"a": [1.0], "b": [2.0]}))
    assert specs == (TensorSpec("x", "FP64", (2,), columns=("a", "b")),)
    specs, tensors = arguments(matrix, np.ones((4, 3), dtype=np.float32))
    assert specs == (TensorSpec("x", "FP32", (3,)),)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            pa.table({"km": [1.0], "color": ["red"]}),
            r"fare\(\) has no parameter 'color', which the example has",
        ),
        (pa.table({"km": [1.0]}), r"fare\(\) needs 'city', which the example lacks"),
        ({"km": np.ones(1), "kg": np.ones(1)}, r"fare\(\) has no parameter 'kg'"),
        ({"km": np.ones(1)}, r"fare\(\) needs 'city'"),
        (np.ones((2, 2)), r"fare\(\) takes km, city, the example is one array"),
    ],
)
def test_an_example_that_does_not_match_the_parameters_is_refused(example: object, message: str) -> None:
    def fare(km: Any, city: Any) -> None: ...

    with pytest.raises(PackRefused, match=message):
        arguments(fare, example)


def test_every_form_of_answer_has_named_outputs(project: Project) -> None:
    project(
        forms="""
            import numpy as np
            def one(x): return (x * 2).tolist()
            def two(x): return x, x > 1
            def named(x): return {"score": x.astype("f4"), "why": np.array(["a"] * len(x))}
            def rows(x): return {"y": np.float64(x[0] + x[1])}
        """
    )
    example = np.array([[1.0, 2.0], [3.0, 4.0]])
    flat = example[:, 0]
    assert from_function("forms:one", flat).outputs == (TensorSpec("output", "FP64"),)
    assert from_function("forms:two", flat).outputs == (
        TensorSpec("output", "FP64"),
        TensorSpec("output1", "BOOL"),
    )
    assert from_function("forms:named", flat).outputs == (
        TensorSpec("score", "FP32"),
        TensorSpec("why", "BYTES"),
    )
    source = from_function("forms:rows", example, batch="none")
    assert source.outputs == (TensorSpec("y", "FP64"),)
    assert source.predict(source.example)["y"].tolist() == [3.0, 7.0]


def test_answers_that_are_no_rows_are_refused(project: Project) -> None:
    project(
        wrong="""
            import numpy as np
            def total(x): return x.sum()
            def short(x): return x[:1]
            def none(x): return {}
            def times(x): return x.astype("datetime64[s]")
            def raises(x): raise KeyError("no such store")
        """
    )
    for name, message in [
        ("total", r"wrong:total gives output 'output' of shape \[\] for 3 rows"),
        ("short", r"wrong:short gives output 'output' of shape \[1\] for 3 rows"),
        ("none", "wrong:none gives no outputs"),
        ("times", "no tensor datatype for numpy dtype datetime64"),
        ("raises", "wrong:raises fails on the example: KeyError: 'no such store'"),
    ]:
        with pytest.raises(PackRefused, match=message):
            from_function(f"wrong:{name}", np.array([1, 2, 3]))


def test_functions_before_and_after_a_model_are_steps_around_it(project: Project) -> None:
    project(
        model="def double(x): return {'y': x * 2.0}",
        before="def parse(text): return {'x': [float(t) for t in text]}",
        after="def describe(y): return {'words': [f'{v:g}' for v in y]}",
    )
    inner = from_function("model:double", {"x": np.array([1.0, 2.0])})
    example = {"text": np.array(["1.5", "2"], dtype=object)}
    source = around(inner, read_code("before:parse"), read_code("after:describe"), example)
    assert source.inputs == (TensorSpec("text", "BYTES"),)
    assert source.outputs == (TensorSpec("words", "BYTES"),)
    assert [(step.path, step.entry) for step in source.steps] == [
        ("pre", "before:parse"), ("source", "model:double"), ("post", "after:describe"),
    ]  # fmt: skip
    assert set(source.files) == {"pre/before.py", "source/model.py", "post/after.py"}
    assert source.predict(source.example)["words"].tolist() == ["3", "4"]
    other = replace(inner, inputs=(TensorSpec("z", "FP64"),))
    parse = read_code("before:parse")
    with pytest.raises(PackRefused, match="before:parse gives 'x', the model takes 'z'"):
        around(other, parse, None, example)


def test_a_module_that_was_changed_within_the_second_is_read_anew(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    answers = []
    for factor in (2.0, 2.5):
        root = project(edited=f"def f(x):\n    return {factor} * x\n")
        # As long as before, and of the same second: what Python goes by where it keeps what it compiled.
        os.utime(root / "edited.py", (1e9, 1e9))
        source = from_function("edited:f", {"x": np.array([1.0, 2.0])})
        answers.append(source.predict({"x": np.array([1.0, 2.0])})["output"].tolist())
        del sys.modules["edited"]

    assert answers == [[2.0, 4.0], [2.5, 5.0]]
    assert not sys.dont_write_bytecode

"""The OpenAPI document of what is served, made from the contracts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from parbake.app.jobs import LONGEST_KEY, LONGEST_WAIT_S
from parbake.contract.datatypes import FLOATS, INTEGERS
from parbake.contract.model import TensorSpec
from parbake.serving.service import ServedVersion
from parbake.transports.http.jobs import JobBody
from parbake.transports.http.labels import LabelsRequest
from parbake.transports.http.people import Column, bounds_of, columns_of, example_row, labels_of
from parbake.transports.inputs import NON_FINITE, wire_shape
from parbake.transports.metadata import server_metadata

Schema = dict[str, Any]

_JSON: Final = "application/json"
_BINARY: Final = "application/octet-stream"
_STATUSES: Final = {
    400: "The request does not fit; `path` says where, `hint` what to do.",
    401: "Needs an API key that is known.",
    403: "Needs the admin token or another API key, or is switched off.",
    404: "There is no such thing.",
    405: "The URL takes another method; the `allow` header names it.",
    409: "It does not fit the present state.",
    413: "Over a size limit; the message names the limit.",
    422: "The request was understood and cannot be carried out.",
    429: "More often than the API key allows: try again after `retry-after` seconds.",
    500: "The model failed, or the server has a bug; the log has it under the correlation id.",
    503: "Starting, overloaded or stopping: try again after `retry-after` seconds.",
    504: "No answer within the deadline.",
}
_PREDICTION: Final = (400, 404, 405, 409, 413, 422, 500, 503, 504)
_LARGEST_HEADER: Final = 10**18 - 1


def openapi(versions: Sequence[ServedVersion], *, keys: bool = False) -> bytes:
    """The document as JSON. Of several versions of a name the last one is also there without its number.

    ``keys`` says that callers need API keys.
    """
    document = _Document()
    document.server()
    for served in versions:
        document.version(served)
    defaults = {served.name: served for served in versions}
    for served in defaults.values():
        document.default(served)
    document.models(list(defaults), versions)
    if keys:
        document.keys()
    return msgspec.json.encode(document.content)


class _Document:
    """Collects paths and schemas."""

    def __init__(self) -> None:
        self._schemas: dict[str, Schema] = dict(_COMMON)
        self._paths: dict[str, Schema] = {}
        self._predictions: dict[tuple[str, str], tuple[Schema, Schema]] = {}
        self.content: Schema = {
            "openapi": "3.1.0",
            "info": {
                "title": "Models served by Parbake",
                "version": server_metadata()["version"],
                "description": "Predictions by column name at `/predict/NAME`, and the Open Inference Protocol v2.",
            },
            "servers": [{"url": "/"}],
            "tags": [{"name": "server"}, {"name": "models"}, {"name": "jobs"}, {"name": "repository"}],
            "paths": self._paths,
            "components": {"schemas": self._schemas, "responses": _responses()},
        }

    # Fixed -----------------------------------------------------------------------------------------

    def server(self) -> None:
        """What there is without any model."""
        get = self._get
        get("/v2/health/live", "The process answers.", _object(live={"const": True}))
        get("/v2/health/ready", "Every model answers.", _object(ready={"const": True}), 503)
        get("/v2", "Name, version and extensions of the server.", _ref("ServerMetadata"))
        get(
            "/v2/models/stats",
            "Counts and times of all models since the start.",
            _ref("Statistics"),
            500,
            503,
        )
        self.jobs()
        get("/metrics", "The page for Prometheus.", None, 500, 503)
        self._paths["/metrics"]["get"]["responses"]["200"]["content"] = {
            "text/plain": {"schema": {"type": "string"}}
        }
        get("/openapi.json", "This document.", {"type": "object"})
        for path in ("/", "/docs"):
            get(path, "A page to try the models on.", None)
            self._paths[path]["get"]["responses"]["200"]["content"] = {
                "text/html": {"schema": {"type": "string"}}
            }
        summary = "Every version with its state."
        get("/v2/repository/index", summary, _ref("Index"))
        self._paths["/v2/repository/index"]["post"] = {
            "summary": summary,
            "tags": ["repository"],
            "requestBody": _body(
                _object({"ready": "Only what is ready."}, required=(), ready={"type": "boolean"})
            ),
            "responses": self._answers(_ref("Index"), 400, 405),
        }

    def jobs(self) -> None:
        """Requests whose callers do not wait."""
        (body,), schemas = msgspec.json.schema_components(
            [JobBody], ref_template="#/components/schemas/{name}"
        )
        self._schemas.update(schemas)
        name = _parameter("job", "path", {"type": "string", "minLength": 1}, "Id of a job.")
        wait = _parameter(
            "wait",
            "query",
            {"type": "integer", "minimum": 0, "maximum": 999_999_999},
            f"Seconds to wait for the job to finish, {LONGEST_WAIT_S:g} at most.",
        )
        summary = "What became of a request that was sent with `prefer: respond-async`."
        self._paths["/v2/jobs/{job}"] = {
            "get": {
                "summary": summary,
                "tags": ["jobs"],
                "parameters": [name, wait],
                "responses": self._answers(body, 400, 404, 405, 500, 503),
            },
            "delete": {
                "summary": "Cancel a job that waits, or remove one that is answered.",
                "tags": ["jobs"],
                "parameters": [name],
                "responses": self._answers(body, 404, 405, 409, 500, 503),
            },
        }
        result = self._answers(None, 400, 404, 405, 409, 413, 422, 500, 503, 504)
        result["200"] = {"description": "The answer, as the request would have got it; errors too."}
        self._paths["/v2/jobs/{job}/result"] = {
            "get": {
                "summary": "The answer to such a request.",
                "tags": ["jobs"],
                "parameters": [name, wait],
                "responses": {**result, "202": _accepted(body, "Not answered yet.")},
            }
        }

    def models(self, names: Sequence[str], versions: Sequence[ServedVersion]) -> None:
        """What is asked of any model by its name."""
        name = _parameter("name", "path", {"type": "string", "enum": list(names)}, "Name of a deployment.")
        numbers = sorted({served.version for served in versions})
        version = _parameter("version", "path", {"type": "string", "enum": numbers}, "A version of it.")
        if not names:
            return
        for path, parameters in (("/v2/models/{name}/labels", [name]), ("/labels", [])):
            self._labels(path, parameters)
        for start, parameters in (
            ("/v2/models/{name}", [name]),
            ("/v2/models/{name}/versions/{version}", [name, version]),
        ):
            self._paths[start + "/ready"] = {
                "get": {
                    "summary": "The model answers.",
                    "tags": ["models"],
                    "parameters": parameters,
                    "responses": self._answers(
                        _object(name={"type": "string"}, ready={"const": True}), 404, 405, 503
                    ),
                }
            }
            for end, summary, reply in (
                ("", "Inputs, outputs and the contract's own words.", "ModelMetadata"),
                ("/config", "The model configuration extension's view.", "ModelConfig"),
                ("/stats", "Counts and times since the start.", "Statistics"),
            ):
                self._paths[start + end] = {
                    "get": {
                        "summary": summary,
                        "tags": ["models"],
                        "parameters": parameters,
                        "responses": self._answers(_ref(reply), 404, 405, 500, 503),
                    }
                }
        for action, summary in (
            ("load", "Load a configured deployment, or load it again."),
            ("unload", "Unload a deployment."),
        ):
            self._paths[f"/v2/repository/models/{{name}}/{action}"] = {
                "post": {
                    "summary": summary,
                    "tags": ["repository"],
                    "parameters": [name],
                    "requestBody": _body(_object(required=(), parameters={"type": "object"})),
                    "responses": self._answers(_object(), 400, 403, 404, 405, 409, 422, 500, 503),
                }
            }

    def _labels(self, path: str, parameters: list[Schema]) -> None:
        """Where labels are sent to."""
        (given,), schemas = msgspec.json.schema_components(
            [LabelsRequest], ref_template="#/components/schemas/{name}"
        )
        self._schemas.update(schemas)
        responses = self._answers(
            _object(accepted={"type": "integer"}, unknown={"type": "integer"}),
            400,
            404,
            405,
            409,
            413,
            500,
            503,
        )
        self._paths[path] = {
            "post": {
                "summary": "What turned out to be true, for versions that are compared.",
                "tags": ["models"],
                "parameters": parameters,
                "requestBody": _body(given, required=True),
                # Taken, and held against predictions that may still be on their way.
                "responses": {"202": responses.pop("200"), **responses},
            }
        }

    def keys(self) -> None:
        """Say of everything but probes and pages that it needs an API key, and what is answered without."""
        self.content["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer", "description": "An API key."},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        self.content["security"] = [{"bearer": []}, {"x-api-key": []}]
        for path, methods in self._paths.items():
            for operation in methods.values():
                if path in ("/", "/docs") or path.endswith(("/live", "/ready")):
                    operation["security"] = []
                elif path.endswith(("/load", "/unload")):
                    operation["security"] = [{"bearer": []}]
                else:
                    responses = operation["responses"]
                    for status in ("401", "403", "429"):
                        responses[status] = {"$ref": f"#/components/responses/{status}"}
                    operation["responses"] = dict(sorted(responses.items()))

    # Contracts -------------------------------------------------------------------------------------

    def version(self, served: ServedVersion) -> None:
        """The predictions of one version, under its number."""
        name, version = served.name, served.version
        people, infer = self._people(served), self._infer(served)
        self._predictions[name, version] = people, infer
        self._paths[f"/predict/{name}/versions/{version}"] = {"post": people}
        self._paths[f"/v2/models/{name}/versions/{version}/infer"] = {"post": infer}

    def default(self, served: ServedVersion) -> None:
        """The predictions of the version that answers where no number is given."""
        people, infer = self._predictions[served.name, served.version]
        self._paths[f"/predict/{served.name}"] = {"post": {**people, "x-parbake": _about(served)}}
        self._paths[f"/v2/models/{served.name}/infer"] = {"post": infer}

    def _people(self, served: ServedVersion) -> Schema:
        columns = columns_of(served)
        row = _object(
            required=[column.name for column in columns if column.needed],
            properties={column.name: _column(column) for column in columns},
        )
        row["examples"] = [example_row(columns)]
        answer = _object(properties={spec.name: _output(spec) for spec in served.contract.outputs})
        rows, answers = self._add(served, "Row", row), self._add(served, "Answer", answer)
        return {
            "summary": f"Predict with {served.name}, by column name.",
            "description": _described(served),
            "tags": ["models"],
            "parameters": [_deadline(), _priority(), _prefer(), _idempotency()],
            "requestBody": _body(
                {
                    "oneOf": [
                        rows,
                        {
                            "type": "array",
                            "items": rows,
                            "minItems": 1,
                            "maxItems": served.contract.batch.max_rows,
                        },
                    ]
                },
                required=True,
                example=example_row(columns),
            ),
            "responses": _or_later(
                self._answers({"oneOf": [answers, {"type": "array", "items": answers}]}, *_PREDICTION)
            ),
        }

    def _infer(self, served: ServedVersion) -> Schema:
        contract = served.contract
        needed = [contract.inputs[i] for i in served.needed]
        request = _object(
            required=["inputs"],
            id={"type": "string"},
            parameters=_ref("InferParameters"),
            inputs={
                "type": "array",
                "items": {"anyOf": [_tensor(served, spec) for spec in contract.inputs]},
                "minItems": len(needed),
                "maxItems": len(contract.inputs),
            },
            outputs={
                "type": "array",
                "items": _object(
                    required=["name"],
                    name={"enum": [spec.name for spec in contract.outputs]},
                    parameters=_object(required=(), additional=True, binary_data={"type": "boolean"}),
                ),
            },
        )
        request["examples"] = [{"inputs": [_example_tensor(served, spec) for spec in needed]}]
        reply = _object(
            required=["model_name", "model_version", "outputs"],
            model_name={"const": served.name},
            model_version={"const": served.version},
            id={"type": "string"},
            outputs={
                "type": "array",
                "items": {"anyOf": [_tensor(served, spec, reply=True) for spec in contract.outputs]},
            },
        )
        asked, answered = self._add(served, "InferRequest", request), self._add(served, "InferReply", reply)
        length = _parameter(
            "inference-header-content-length",
            "header",
            {"type": "integer", "minimum": 0},
            "Length of the JSON part where binary tensors follow it.",
        )
        body = _body(asked, required=True)
        body["content"][_BINARY] = {"schema": {"type": "string", "format": "binary"}}
        responses = self._answers(answered, *_PREDICTION)
        responses["200"]["content"][_BINARY] = {"schema": {"type": "string", "format": "binary"}}
        responses["200"]["headers"] = {
            "inference-header-content-length": {
                "schema": {"type": "integer"},
                "description": "Length of the JSON part where binary tensors follow it.",
            }
        }
        return {
            "summary": f"Predict with {served.name}, by the Open Inference Protocol.",
            "description": _described(served),
            "tags": ["models"],
            "parameters": [_deadline(), _priority(), length, _prefer(), _idempotency()],
            "requestBody": body,
            "responses": _or_later(responses),
        }

    # Parts -----------------------------------------------------------------------------------------

    def _get(self, path: str, summary: str, reply: Schema | None, *statuses: int) -> None:
        self._paths[path] = {
            "get": {"summary": summary, "tags": ["server"], "responses": self._answers(reply, 405, *statuses)}
        }

    def _answers(self, reply: Schema | None, *statuses: int) -> Schema:
        done: Schema = {"description": "Done."}
        if reply is not None:
            done["content"] = {_JSON: {"schema": reply}}
        return {
            "200": done,
            **{str(status): {"$ref": f"#/components/responses/{status}"} for status in sorted(statuses)},
        }

    def _add(self, served: ServedVersion, kind: str, schema: Schema) -> Schema:
        key = start = f"{served.name}-{served.version}.{kind}"
        number = 1
        while key in self._schemas:
            number += 1
            key = f"{start}.{number}"
        self._schemas[key] = schema
        return _ref(key)


# Tensors and columns -------------------------------------------------------------------------------


def _element(spec: TensorSpec, *, reply: bool = False) -> Schema:
    """One value of a tensor. Any model may answer NaN; what it is asked, its contract says."""
    if spec.datatype == "BYTES":
        return {"type": ["string", "null"]} if spec.allow_nan and not reply else {"type": "string"}
    if spec.datatype == "BOOL":
        return {"type": "boolean"}
    low, high = bounds_of(spec)
    number: Schema = {
        "type": "integer" if spec.datatype in INTEGERS else "number",
        "minimum": low,
        "maximum": high,
    }
    if spec.datatype not in FLOATS or not (spec.allow_nan or reply):
        return number
    return {"anyOf": [number, {"enum": [*NON_FINITE] if reply else [*NON_FINITE, None]}]}


def _column(column: Column) -> Schema:
    spec = column.spec
    schema = _element(spec)
    for size in () if column.single else reversed(spec.shape):
        schema = _list(schema, size)
    words: list[str] = [spec.datatype]
    if spec.unit:
        words.append(f"in {spec.unit}")
    if not column.needed:
        words.append("(not looked at: the key is made of other columns)")
    return {"description": " ".join(words), **schema, **({"x-unit": spec.unit} if spec.unit else {})}


def _output(spec: TensorSpec) -> Schema:
    schema = _element(spec, reply=True)
    if spec.shape in ((), (1,)):
        pass
    elif len(spec.shape) == 1 and (names := labels_of(spec, spec.shape[0])):
        schema = _object(properties=dict.fromkeys(names, schema))
    else:
        for size in reversed(spec.shape):
            schema = _list(schema, size)
    words = [spec.datatype, *([f"in {spec.unit}"] if spec.unit else [])]
    return {"description": " ".join(words), **schema}


def _tensor(served: ServedVersion, spec: TensorSpec, *, reply: bool = False) -> Schema:
    """One tensor of a request or reply of the Open Inference Protocol."""
    sizes = wire_shape(served.contract, spec)
    shown = ", ".join("any" if size == -1 else str(size) for size in sizes)
    shape: Schema = {
        "type": "array",
        "description": f"[{shown}]",
        "items": {"type": "integer", "minimum": 0},
        "minItems": len(sizes),
        "maxItems": len(sizes),
    }
    if sizes and not reply:
        shape["prefixItems"] = [
            {"type": "integer", "minimum": 1} if size == -1 else {"const": size} for size in sizes
        ]
    # The data may be flat or nested as the shape has it.
    data: Schema = {"type": "array", "items": _element(spec, reply=reply)}
    if not reply:
        data["items"] = {"anyOf": [data["items"], {"type": "array"}]}
    parameters = _object(required=(), additional=True, binary_data_size={"type": "integer", "minimum": 0})
    return _object(
        required=["name", "datatype", "shape"],
        name={"const": spec.name},
        datatype={"const": spec.datatype},
        shape=shape,
        data=data,
        parameters=parameters,
    )


def _example_tensor(served: ServedVersion, spec: TensorSpec) -> Schema:
    shape = [1 if size == -1 else size for size in wire_shape(served.contract, spec)]
    value: Any = {"BYTES": "text", "BOOL": False}.get(spec.datatype, 0)
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape, "data": [value] * math.prod(shape)}


def _described(served: ServedVersion) -> str:
    contract = served.contract
    key = ", ".join(contract.key.columns) or "the whole row"
    return f"{contract.purpose}\n\nOwner: {contract.owner}. Mode: {served.mode}. Key: {key}. Digest: `{served.digest}`."


def _about(served: ServedVersion) -> Schema:
    """What a page for people shows of a deployment."""
    contract = served.contract
    return {
        "name": served.name,
        "version": served.version,
        "mode": served.mode,
        "purpose": contract.purpose,
        "owner": contract.owner,
        "key": list(contract.key.columns),
        "digest": served.digest,
    }


# Schemas -------------------------------------------------------------------------------------------


def _object(
    described: dict[str, str] | None = None,
    *,
    required: Iterable[str] | None = None,
    additional: bool = False,
    properties: dict[str, Schema] | None = None,
    **named: Schema,
) -> Schema:
    """An object with exactly these properties, all of them required unless said otherwise."""
    fields = {**(properties or {}), **named}
    for name, words in (described or {}).items():
        fields[name] = {"description": words, **fields[name]}
    schema: Schema = {"type": "object", "properties": fields, "additionalProperties": additional}
    wanted = list(fields if required is None else required)
    if wanted:
        schema["required"] = wanted
    return schema


def _list(items: Schema, size: int = -1) -> Schema:
    schema: Schema = {"type": "array", "items": items}
    if size >= 0:
        schema |= {"minItems": size, "maxItems": size}
    return schema


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _body(schema: Schema, *, required: bool = False, example: Any = None) -> Schema:
    content: Schema = {"schema": schema}
    if example is not None:
        content["example"] = example
    return {"required": required, "content": {_JSON: content}}


def _parameter(name: str, where: str, schema: Schema, description: str) -> Schema:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": schema,
        "description": description,
    }


def _deadline() -> Schema:
    return _parameter(
        "parbake-deadline-ms",
        "header",
        {"type": "integer", "minimum": 1, "maximum": _LARGEST_HEADER},
        "Milliseconds within which the answer is wanted; what cannot meet it is refused at once.",
    )


def _prefer() -> Schema:
    return _parameter(
        "prefer",
        "header",
        {"type": "string"},
        "`respond-async`: not to wait for the answer; the request becomes a job, and 202 says where it is.",
    )


def _idempotency() -> Schema:
    return _parameter(
        "idempotency-key",
        "header",
        {"type": "string"},
        f"With `prefer: respond-async`, {LONGEST_KEY} characters at most: the same key and request are the same job.",
    )


def _accepted(body: Schema, words: str) -> Schema:
    return {
        "description": words,
        "headers": {"location": {"schema": {"type": "string"}, "description": "URL of the job."}},
        "content": {_JSON: {"schema": body}},
    }


def _or_later(responses: Schema) -> Schema:
    """The replies to a prediction, or a job in place of one."""
    taken = _accepted(_ref("JobBody"), "Taken as a job, which nothing loses from now on.")
    return dict(sorted({**responses, "202": taken}.items()))


def _priority() -> Schema:
    return _parameter(
        "parbake-priority",
        "header",
        {"enum": ["high", "normal", "low"]},
        "Who goes first while more is asked for than can be answered.",
    )


def _responses() -> Schema:
    responses: Schema = {
        str(status): {"description": words, "content": {_JSON: {"schema": _ref("Error")}}}
        for status, words in _STATUSES.items()
    }
    for status in ("429", "503", "504"):
        responses[status]["headers"] = {
            "retry-after": {"schema": {"type": "integer"}, "description": "Seconds to wait."}
        }
    responses["405"]["headers"] = {
        "allow": {"schema": {"type": "string"}, "description": "The methods there are."}
    }
    return responses


_TEXT: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_TIME: Final = _object(count=_COUNT, ns=_COUNT)
_TENSOR: Final = _object(name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": {"type": "integer"}})
_CONFIG_TENSOR: Final = _object(
    name=_TEXT, data_type=_TEXT, dims={"type": "array", "items": {"type": "integer"}}
)

_COMMON: Final[dict[str, Schema]] = {
    "Error": _object(
        {
            "error": "What is wrong, and where.",
            "code": "Which error, for programs.",
            "path": "Where in the request.",
            "hint": "What to do.",
            "correlation_id": "Number under which the server's log has more.",
        },
        required=["error", "code"],
        error=_TEXT,
        code=_TEXT,
        path=_TEXT,
        hint=_TEXT,
        correlation_id=_TEXT,
    ),
    "ServerMetadata": _object(name=_TEXT, version=_TEXT, extensions=_list(_TEXT)),
    "ModelMetadata": _object(
        name=_TEXT,
        versions=_list(_TEXT),
        platform=_TEXT,
        inputs=_list(_TENSOR),
        outputs=_list(_TENSOR),
        parameters=_object(
            version=_TEXT,
            digest=_TEXT,
            mode={"enum": ["dynamic", "static", "hybrid"]},
            purpose=_TEXT,
            owner=_TEXT,
            key=_TEXT,
        ),
    ),
    "ModelConfig": _object(
        name=_TEXT,
        platform=_TEXT,
        backend=_TEXT,
        version_policy=_object(specific=_object(versions=_list(_TEXT))),
        max_batch_size=_COUNT,
        input=_list(_CONFIG_TENSOR),
        output=_list(_CONFIG_TENSOR),
    ),
    "Statistics": _object(
        model_stats=_list(
            _object(
                name=_TEXT,
                version=_TEXT,
                last_inference=_COUNT,
                inference_count=_COUNT,
                execution_count=_COUNT,
                inference_stats=_object(
                    success=_TIME,
                    fail=_TIME,
                    queue=_TIME,
                    compute_input=_TIME,
                    compute_infer=_TIME,
                    compute_output=_TIME,
                    cache_hit=_TIME,
                    cache_miss=_TIME,
                ),
                batch_stats=_list(_object(batch_size=_COUNT, compute_infer=_TIME)),
            )
        )
    ),
    "Index": _list(
        _object(name=_TEXT, version=_TEXT, state={"enum": ["READY", "UNAVAILABLE"]}, reason=_TEXT)
    ),
    "InferParameters": _object(
        {
            "timeout": "Microseconds within which the answer is wanted; 0: the deployment's deadline.",
            "priority": "1 goes first, 0 or 2 as usual, 3 when nothing else waits.",
        },
        required=(),
        additional=True,
        timeout=_COUNT,
        priority=_COUNT,
        binary_data_output={"type": "boolean"},
    ),
}

"""The RPCs of ``inference.GRPCInferenceService``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Final, TypeVar
from urllib.parse import unquote
from weakref import WeakKeyDictionary

import grpc

from parbake.app.front import Front
from parbake.app.repository import Repository
from parbake.errors import NotReady, ParbakeError
from parbake.serving.fallback import Asked
from parbake.serving.model import Answer
from parbake.serving.route import NO_HINTS, Hints
from parbake.serving.routed import Routed
from parbake.serving.service import ServedVersion
from parbake.transports.access import Access
from parbake.transports.failures import shown, unexpected
from parbake.transports.grpc.codec import GrpcCodec, values_of
from parbake.transports.grpc.messages import message, parse, serialize
from parbake.transports.grpc.replies import details_of, status_of, trailers_of
from parbake.transports.http.oip import InferCall
from parbake.transports.keys import EVERYBODY, Gate, Holder, check_deployment
from parbake.transports.metadata import (
    model_config,
    model_metadata,
    repository_index,
    server_metadata,
    statistics,
)
from parbake.transports.parameters import refuse_overrides

_IN_FLIGHT: Final = 64
"""Requests of one stream that are worked on at a time; more wait in the connection."""

_T = TypeVar("_T")
Call = Callable[[Any, Any], Awaitable[Any]]
Handlers = dict[str, grpc.RpcMethodHandler]


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that failed: what the caller is told, and the correlation id where the log has more."""

    error: ParbakeError
    correlation_id: str = ""


class Caller:
    """Who waits for an answer, as the batcher wants to know it."""

    __slots__ = ("client", "closed")

    def __init__(self, client: str = "") -> None:
        self.client = client
        """Name of the client by its API key, "" where none is needed."""
        self.closed = False


class InferenceService:
    """Answers for one front. Messages are read here and not by gRPC, so that a bad one gets a good answer."""

    def __init__(self, front: Front, access: Access, gate: Gate | None = None) -> None:
        self._front = front
        self._gate = gate
        self._repository = Repository(front)
        self._access = access
        self._codecs: WeakKeyDictionary[ServedVersion, GrpcCodec] = WeakKeyDictionary()
        self._infer_request = message("ModelInferRequest")
        self.stopping = asyncio.Event()

    def handlers(self) -> Handlers:
        """The handler of each RPC, by its name."""
        handlers: Handlers = {
            name: grpc.unary_unary_rpc_method_handler(self._unary(message(f"{name}Request"), method))
            for name, method in {
                "ServerLive": self._server_live,
                "ServerReady": self._server_ready,
                "ModelReady": self._model_ready,
                "ServerMetadata": self._server_metadata,
                "ModelMetadata": self._model_metadata,
                "ModelConfig": self._model_config,
                "ModelStatistics": self._model_statistics,
                "RepositoryIndex": self._repository_index,
                "RepositoryModelLoad": self._load,
                "RepositoryModelUnload": self._unload,
            }.items()
        }
        handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(self._model_infer)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._model_stream_infer)
        return handlers

    def _unary(self, kind: Any, method: Call) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def answer(data: bytes, context: Any) -> bytes:
            try:
                return serialize(await method(parse(kind, data), context))
            except ParbakeError as error:
                self._front.refuse(error)
                failure = Failure(error)
            except Exception:
                failure = Failure(*unexpected(kind.DESCRIPTOR.full_name))
                self._front.refuse(failure.error)
            return await abort(context, failure)

        return answer

    # Predictions -----------------------------------------------------------------------------------

    async def _model_infer(self, data: bytes, context: Any) -> bytes:
        reply = await self._predict(data, context)
        if isinstance(reply, Failure):
            return await abort(context, reply)
        return serialize(reply)

    async def _predict(self, data: bytes, context: Any, *, streamed: bool = False) -> Any:
        """A ``ModelInferResponse``, or a `Failure`. Raises nothing but cancellation."""
        arrived = perf_counter()
        try:
            if self.stopping.is_set() and not streamed:
                raise NotReady("the server is stopping", hint="ask again: another one may answer")
            request = parse(self._infer_request, data)
            client = self._let_in(context, request.model_name).name if self._gate is not None else ""
            served = self._front.find(request.model_name, request.model_version)
        except ParbakeError as error:
            self._front.refuse(error)
            return Failure(error)
        except Exception:
            failure = Failure(*unexpected("inference.ModelInferRequest"))
            self._front.refuse(failure.error)
            return failure
        try:
            routed = self._front.routed.get(served.name) if not request.model_version else None
            codec = self._codec(served if routed is None else routed.reader)
            call = codec.read(request)
            parsed = perf_counter()
            remaining_s = context.time_remaining()
            limits = [served.deadline_s, call.timeout_s or served.deadline_s]
            if remaining_s is not None:
                limits.append(remaining_s)
            inputs = call.inputs
            asked = Asked(
                inputs.raws,
                inputs.rows,
                inputs.shapes,
                arrived + min(limits),
                Caller(client),
                arrived,
                call.priority,
                client,
            )
            if routed is None:
                answer = await _answer(served, asked)
            else:
                served, result = await _routed_answer(routed, asked, call, context)
                if isinstance(result, ParbakeError):
                    raise result
                answer, codec = result, self._codec(served)
            reply = codec.write(answer, call)
        except ParbakeError as error:
            served.refused(error.code, arrived)
            return Failure(*shown(error, served.name))
        except Exception:
            failure = Failure(*unexpected("inference.ModelInferRequest"))
            served.refused(failure.error.code, arrived)
            return failure
        if streamed and values_of(request.parameters).get("triton_enable_empty_final_response"):
            reply.parameters["triton_final_response"].bool_param = True
        served.stats.answered(
            parsed - arrived,
            answer.queue_s,
            answer.model_s,
            perf_counter() - arrived,
            answer.rows,
            answer.baked_rows,
        )
        return reply

    def _codec(self, served: ServedVersion) -> GrpcCodec:
        codec = self._codecs.get(served)
        if codec is None:
            codec = self._codecs[served] = GrpcCodec(served)
        return codec

    async def _model_stream_infer(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        """Answers in the order of the requests, while later ones are already worked on."""
        ids = message("ModelInferResponse")
        reply_of = message("ModelStreamInferResponse")
        pending: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        places = asyncio.Semaphore(_IN_FLIGHT)
        tasks: set[asyncio.Task[Any]] = set()

        async def one(data: bytes) -> Any:
            reply = await self._predict(data, context, streamed=True)
            if not isinstance(reply, Failure):
                return reply_of(infer_response=reply)
            return reply_of(error_message=details_of(reply.error), infer_response=ids(id=_id_of(data)))

        async def take() -> None:
            try:
                async for data in _until(self.stopping, requests):
                    task = asyncio.ensure_future(one(data))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                    pending.put_nowait(task)
                    await places.acquire()
            finally:
                pending.put_nowait(None)

        taking = asyncio.ensure_future(take())
        try:
            while (task := await pending.get()) is not None:
                yield serialize(await task)
                places.release()
            if self.stopping.is_set():
                await abort(
                    context, Failure(NotReady("the server is stopping", hint="open the stream again"))
                )
            # A stream that broke while it was read ends with what broke it.
            await taking
        finally:
            taking.cancel()
            for task in tasks:
                task.cancel()

    # Health and metadata ---------------------------------------------------------------------------

    async def _server_live(self, request: Any, context: Any) -> Any:
        return message("ServerLiveResponse")(live=True)

    async def _server_ready(self, request: Any, context: Any) -> Any:
        return message("ServerReadyResponse")(ready=self._front.ready)

    async def _model_ready(self, request: Any, context: Any) -> Any:
        return message("ModelReadyResponse")(ready=self.model_ready(request.name, request.version))

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a model would answer; False for one that is not there."""
        try:
            return self._front.find(name, version).ready and not self._front.draining
        except ParbakeError:
            return False

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        self._let_in(context)
        return message("ServerMetadataResponse")(**server_metadata())

    async def _model_metadata(self, request: Any, context: Any) -> Any:
        self._let_in(context, request.name)
        served = self._front.find(request.name, request.version)
        versions = [other.version for other in self._front.versions() if other.name == served.name]
        content = model_metadata(served, versions)
        return message("ModelMetadataResponse")(
            **{name: content[name] for name in ("name", "versions", "platform", "inputs", "outputs")}
        )

    async def _model_config(self, request: Any, context: Any) -> Any:
        self._let_in(context, request.name)
        served = self._front.find(request.name, request.version)
        content = model_config(served)
        content["version_policy"] = {
            "specific": {"versions": [int(served.version)] if _is_number(served.version) else []}
        }
        return message("ModelConfigResponse")(config=message("ModelConfig")(**content))

    async def _model_statistics(self, request: Any, context: Any) -> Any:
        holder = self._let_in(context, request.name)
        if request.name:
            self._front.find(request.name, request.version)
        counts = await self._repository.counts()
        found = self._repository.versions(request.name, request.version)
        served = [version for version in found if holder.may(version.name)]
        return message("ModelStatisticsResponse")(**statistics(served, counts))

    # Repository ------------------------------------------------------------------------------------

    async def _repository_index(self, request: Any, context: Any) -> Any:
        holder = self._let_in(context)
        listed = [item for item in self._repository.index(ready_only=request.ready) if holder.may(item.name)]
        return message("RepositoryIndexResponse")(models=repository_index(listed))

    async def _load(self, request: Any, context: Any) -> Any:
        self._check(context)
        refuse_overrides(request.parameters)
        await self._repository.set_loaded(request.model_name, loaded=True)
        return message("RepositoryModelLoadResponse")()

    async def _unload(self, request: Any, context: Any) -> Any:
        self._check(context)
        await self._repository.set_loaded(request.model_name, loaded=False)
        return message("RepositoryModelUnloadResponse")()

    def _let_in(self, context: Any, deployment: str = "") -> Holder:
        """Whose API key a call has. Raises `Unauthenticated`, `RateLimited`, or `NotAllowed` for the deployment."""
        if self._gate is None:
            return EVERYBODY
        holder = self._gate.holder(
            {
                name.lower().encode(): value.encode("latin-1", "replace") if isinstance(value, str) else value
                for name, value in context.invocation_metadata() or ()
            }
        )
        if deployment:
            check_deployment(holder, deployment)
        holder.take()
        return holder

    def _check(self, context: Any) -> None:
        metadata = {name.lower(): value for name, value in context.invocation_metadata() or ()}
        authorization = metadata.get("authorization", "")
        self._access.check(
            address_of(context.peer()),
            authorization if isinstance(authorization, str) else authorization.decode("latin-1"),
            browser="origin" in metadata or "sec-fetch-site" in metadata,
            forwarded=any(name in metadata for name in ("forwarded", "x-forwarded-for", "via")),
        )


async def abort(context: Any, failure: Failure) -> bytes:
    """End an RPC with an error."""
    error = failure.error
    await context.abort(status_of(type(error)), details_of(error), trailers_of(error, failure.correlation_id))
    return b""


def address_of(peer: str) -> str:
    """The address in gRPC's word for the other end (``ipv6:%5B::1%5D:5000``), or "" where there is none."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return ""
    return rest.rpartition(":")[0].strip("[]")


async def _answer(served: ServedVersion, asked: Asked) -> Answer:
    """Predict, and wait where a model has to run. Raises `ParbakeError`."""
    future: asyncio.Future[Answer | ParbakeError] = asyncio.get_running_loop().create_future()

    def done(result: Answer | ParbakeError) -> None:
        if not future.done():
            future.set_result(result)

    answer = served.predict(
        asked.raws,
        asked.rows,
        asked.shapes,
        asked.deadline,
        done,
        asked.caller,
        asked.arrived,
        asked.priority,
        asked.client,
    )
    if answer is not None:
        return answer
    result = await _until_gone(future, asked)
    if isinstance(result, ParbakeError):
        raise result
    return result


async def _routed_answer(
    routed: Routed, asked: Asked, call: InferCall, context: Any
) -> tuple[ServedVersion, Answer | ParbakeError]:
    """Predict by the version that the route has for a request, and wait; gives the version that answered or failed."""
    future: asyncio.Future[tuple[ServedVersion, Answer | ParbakeError]] = (
        asyncio.get_running_loop().create_future()
    )

    def done(served: ServedVersion, result: Answer | ParbakeError) -> None:
        if not future.done():
            future.set_result((served, result))

    hints = NO_HINTS
    if routed.chooser.needs_hints:
        metadata = {
            name.lower(): value if isinstance(value, str) else value.decode("latin-1")
            for name, value in context.invocation_metadata() or ()
        }
        hints = Hints(metadata, call.parameters or {})
    routed.predict(asked, done, hints, call.id)
    return await _until_gone(future, asked)


async def _until_gone(future: asyncio.Future[_T], asked: Asked) -> _T:
    """Wait for an answer as long as somebody wants it."""
    try:
        return await future
    finally:
        # Cancelled: no work for somebody who has gone.
        if isinstance(asked.caller, Caller):
            asked.caller.closed = True


async def _until(stopping: asyncio.Event, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The requests of a stream, until the server is to stop."""
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        while not stopping.is_set():
            coming = asyncio.ensure_future(anext(requests, None))
            await asyncio.wait({coming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return
            data = coming.result()
            if data is None:
                return
            yield data
    finally:
        stopped.cancel()


def _id_of(data: bytes) -> str:
    try:
        request_id: str = parse(message("ModelInferRequest"), data).id
    except ParbakeError:
        return ""
    return request_id


def _is_number(version: str) -> bool:
    return version.isascii() and version.isdigit() and len(version) < 19

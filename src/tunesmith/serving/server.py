"""The HTTP server: OpenAI's API over an :class:`~tunesmith.serving.engine.Engine`.

:func:`make_app` is the whole of it, :class:`Server` serves it until a signal. The event loop only passes things on:
prompts are encoded in one thread, adapters are read in others, answers are written in the engine's.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from tunesmith.core.errors import AdapterError, TunesmithError
from tunesmith.core.names import did_you_mean
from tunesmith.models.prompts import Prompt, require_prompt
from tunesmith.serving import request as asked
from tunesmith.serving.address import not_bound
from tunesmith.serving.answers import Answer, Answers
from tunesmith.serving.engine import Engine
from tunesmith.serving.metrics import CONTENT_TYPE, Metrics
from tunesmith.serving.places import adapter_inside
from tunesmith.serving.replies import ChatReply, CompletionReply, TokenNames
from tunesmith.serving.schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    LoadAdapter,
    TextRequest,
    UnloadAdapter,
    parse,
)

__all__ = ["Server", "make_app"]

_log = logging.getLogger(__name__)

_BODY_SECONDS = 60.0
"""A body that has not come by then is given up: it would hold up the end of the server."""
_CUT_OFF_SECONDS = 5.0
"""What is cut off has so long to see it."""
_RETRY_SECONDS = "1"


def make_app(
    engine: Engine,
    *,
    name: str,
    api_key: str | None = None,
    adapter_roots: Sequence[Path] = (),
    most_answers: int = 288,
    most_tokens: int = 2048,
    most_body_bytes: int = 4 * 2**20,
) -> FastAPI:
    """Return the application.

    Args:
        engine: stays the caller's, who closes it.
        name: what the base is called.
        api_key: what clients must send as bearer token, except for ``/health``; None: nothing.
        adapter_roots: folders that adapters may be loaded from while it runs; none: no adapter may.
        most_answers: answers that are written or wait at once; who asks for more gets 429.
        most_tokens: longest answer that may be asked for, and that is written where nothing is.
        most_body_bytes: largest body of a request.
    """
    service = _Service(engine, name, adapter_roots, most_answers, most_tokens, most_body_bytes)
    app = FastAPI(title="tunesmith", openapi_url=None, redirect_slashes=False)
    for method, path, function in (
        ("POST", "/v1/chat/completions", service.chat),
        ("POST", "/v1/completions", service.completions),
        ("GET", "/v1/models", service.models),
        ("GET", "/v1/models/{model:path}", service.model),
        ("POST", "/v1/load_lora_adapter", service.load),
        ("POST", "/v1/unload_lora_adapter", service.unload),
        ("GET", "/health", service.health),
        ("GET", "/metrics", service.metrics),
    ):
        app.add_api_route(path, function, methods=[method], response_model=None)
    app.add_exception_handler(ApiError, service.on_api_error)
    app.add_exception_handler(HTTPException, service.on_http_error)
    app.add_exception_handler(ClientDisconnect, service.on_disconnect)
    app.add_exception_handler(Exception, service.on_bug)
    if api_key is not None:
        app.add_middleware(_KeyGuard, api_key=api_key, refused=service.figures.refuse)
    return app


class Server(uvicorn.Server):
    """Serves an application until SIGINT or SIGTERM, then finishes what was accepted; a second signal cuts it off.

    ``run(sockets=[...])`` returns when it is over; ``force_exit`` then says whether it was cut off.

    Args:
        on_start: called when it listens.
    """

    def __init__(self, app: FastAPI, on_start: Callable[[], None] = lambda: None) -> None:
        settings: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
        super().__init__(uvicorn.Config(app, timeout_keep_alive=75, lifespan="off", **settings))
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so.

        Raises:
            ServingError: another program has come to listen at the port since it was bound.
        """
        try:
            await super().startup(sockets=sockets)
        except OSError as error:
            host, port = (sockets or [])[0].getsockname()[:2]
            raise not_bound(host, port, error) from None
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what was accepted. What is cut off ends as if its client had left: cancelling it would be logged."""
        await super().shutdown(sockets=sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_CUT_OFF_SECONDS)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, at once at the second. uvicorn's own would end the process by the signal."""
        self.force_exit = self.should_exit
        self.should_exit = True


class _KeyGuard:
    """Refuses every request without the key, before anything else is looked at."""

    def __init__(self, app: ASGIApp, api_key: str, refused: Callable[[int], None]) -> None:
        self._app, self._wanted, self._refused = app, api_key.encode(), refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = next((value for header, value in scope["headers"] if header == b"authorization"), b"")
            scheme, _, key = given.partition(b" ")
            # RFC 9110: the scheme is the same in any case.
            if not (hmac.compare_digest(key, self._wanted) and scheme.lower() == b"bearer"):
                self._refused(401)
                error = ApiError(401, "the API key is missing or wrong.", code="invalid_api_key")
                await JSONResponse(error.body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Stream(StreamingResponse):
    """A stream of answers, which end when nobody listens any more."""

    def __init__(self, answers: Answers, reply: ChatReply | CompletionReply) -> None:
        super().__init__(reply.stream(answers), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


class _Service:
    """What the routes do."""

    def __init__(
        self,
        engine: Engine,
        name: str,
        roots: Sequence[Path],
        most_answers: int,
        most_tokens: int,
        most_body_bytes: int,
    ) -> None:
        self.figures = Metrics()
        self._engine, self._name, self._roots = engine, name, list(roots)
        self._most_answers, self._most_tokens, self._most_body = most_answers, most_tokens, most_body_bytes
        self._open = 0
        self._started = int(time.time())
        self._shelving = asyncio.Lock()
        # One thread: tokenizers are not made to be used by several at once.
        self._encoder = ThreadPoolExecutor(1, "tunesmith-encoder")
        self._names_of = lru_cache(maxsize=32)(TokenNames)  # by tokenizer: an adapter's may have tokens of its own

    async def chat(self, request: Request) -> Response:
        """Answer a conversation."""
        began = time.perf_counter()
        wanted = parse(ChatRequest, await self._body(request))
        return await self._answer(request, wanted, [[message.plain for message in wanted.messages]], ChatReply, began)

    async def completions(self, request: Request) -> Response:
        """Go on from texts."""
        began = time.perf_counter()
        wanted = parse(CompletionRequest, await self._body(request))
        return await self._answer(request, wanted, wanted.prompts, CompletionReply, began)

    async def models(self) -> Response:
        """List the base and its adapters."""
        entries = [self._entry(name) for name in (self._name, *self._engine.shelf.folders)]
        return JSONResponse({"object": "list", "data": entries})

    async def model(self, model: str) -> Response:
        """Describe one of them."""
        self._adapter_of(model)
        return JSONResponse(self._entry(model))

    async def load(self, request: Request) -> Response:
        """Know another adapter."""
        wanted = parse(LoadAdapter, await self._body(request))
        self._require_roots()
        name = wanted.lora_name
        if name == self._name:
            raise ApiError(400, f"{name!r} is the base. Give the adapter another name.", param="lora_name")
        async with self._shelving:
            if name in self._engine.shelf.folders and not wanted.load_inplace:
                message = f"adapter {name!r} is loaded already. Unload it first, or give load_inplace: true."
                raise ApiError(400, message, param="lora_name", code="adapter_exists")
            try:
                notes = await asyncio.to_thread(self._read, wanted)
            except TunesmithError as error:
                raise ApiError(400, str(error), param="lora_path", code="adapter_refused") from error
        return JSONResponse({**self._entry(name), "notes": notes})

    async def unload(self, request: Request) -> Response:
        """Forget an adapter; what is being answered with it goes on."""
        name = parse(UnloadAdapter, await self._body(request)).lora_name
        self._require_roots()
        async with self._shelving:
            try:
                self._engine.unload(name)
            except AdapterError as error:
                raise ApiError(404, str(error), param="lora_name", code="model_not_found") from error
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def health(self) -> Response:
        """Say whether requests are taken."""
        is_well = self._engine.is_serving
        return JSONResponse({"status": "ok" if is_well else "failed"}, 200 if is_well else 503)

    async def metrics(self) -> Response:
        """Return the figures for Prometheus."""
        return Response(self.figures.text(self._engine), media_type=CONTENT_TYPE)

    async def on_api_error(self, request: Request, error: Any) -> Response:
        """Give an error in OpenAI's form."""
        self.figures.refuse(error.status)
        return JSONResponse(
            error.body, error.status, {"Retry-After": _RETRY_SECONDS} if error.status in (429, 503) else None
        )

    async def on_http_error(self, request: Request, error: Any) -> Response:
        """Give the framework's own errors (no such route, not this method) in the same form."""
        self.figures.refuse(error.status_code)
        where = f"{request.method} {request.url.path}"
        words = {404: f"there is no {where}", 405: f"{where} is not allowed"}.get(error.status_code, error.detail)
        return JSONResponse(ApiError(error.status_code, f"{words}.").body, error.status_code, error.headers)

    async def on_disconnect(self, request: Request, error: Any) -> Response:
        """Nobody is there to get an answer; 499 is what proxies note."""
        return Response(status_code=499)

    async def on_bug(self, request: Request, error: Any) -> Response:
        """Keep the reason to ourselves: the log has it."""
        self.figures.refuse(500)
        return JSONResponse(ApiError(500, "the server made a mistake; its log says which.").body, 500)

    async def _answer(
        self,
        request: Request,
        wanted: TextRequest,
        prompts: Sequence[Prompt],
        kind: type[ChatReply | CompletionReply],
        began: float,
    ) -> Response:
        count = len(prompts) * wanted.n
        adapter = self._adapter_of(wanted.model)
        self._reserve(count)
        answers = None
        try:
            tokenizer, ids = await self._encode(adapter, prompts)
            requests = [self._request(wanted, adapter, row, index) for row in ids for index in range(wanted.n)]
            answers = Answers(requests, self.figures, began=began, on_close=lambda: self._release(count))
            await self._submit(answers)
            names = self._names_of(tokenizer) if wanted.logprobs_wanted is not None else None
            reply = kind(wanted.model, names, sum(map(len, ids)), wanted.has_usage_part)
            if wanted.stream:
                return _Stream(answers, reply)
            whole = await _unless_gone(request, answers)
        except BaseException:
            # A stream ends its answers itself, and lives longer than this.
            self._release(count) if answers is None else answers.close()
            raise
        answers.close()
        return Response(status_code=499) if whole is None else _json(reply.whole(whole, answers.answer_tokens))

    def _reserve(self, count: int) -> None:
        most = self._most_answers
        if count > most:
            raise ApiError(400, f"the request asks for {count} answers; at most {most} are taken.", param="n")
        if self._open + count > most:
            message = f"{self._open} answers are being written or wait, and at most {most} may. Try again."
            raise ApiError(429, message, code="queue_full")
        self._open += count

    def _release(self, count: int) -> None:
        self._open -= count

    async def _encode(self, adapter: str | None, prompts: Sequence[Prompt]) -> tuple[Any, list[tuple[int, ...]]]:
        """Return the adapter's own tokenizer, and the token ids of all prompts as it and its template write them."""
        loop = asyncio.get_running_loop()
        try:
            # In a thread, as the adapter is read here where it has left memory.
            tokenizer = await asyncio.to_thread(self._engine.tokenizer_of, adapter)
            rows = [
                await loop.run_in_executor(self._encoder, require_prompt, tokenizer, prompt, row)
                for row, prompt in enumerate(prompts, 1)
            ]
        except TunesmithError as error:
            raise self._refusal(error, adapter) from error
        return tokenizer, [tuple(row) for row in rows]

    def _request(self, wanted: TextRequest, adapter: str | None, prompt: tuple[int, ...], index: int) -> asked.Request:
        window = self._engine.window
        room = window - len(prompt)
        if wanted.max_tokens is not None and wanted.max_tokens > self._most_tokens:
            message = f"max_tokens={wanted.max_tokens}: this server writes at most {self._most_tokens}."
            raise ApiError(400, message, param="max_tokens")
        if room < (wanted.max_tokens or 1):
            message = f"the prompt has {len(prompt)} tokens, which leaves {max(room, 0)} of {window} for the answer"
            suffix = "." if wanted.max_tokens is None else f", not max_tokens={wanted.max_tokens}."
            raise ApiError(400, message + suffix, code="context_length_exceeded")
        return asked.Request(
            prompt,
            max_new_tokens=wanted.max_tokens or min(self._most_tokens, room),
            adapter=adapter,
            sampling=wanted.sampling,
            stop=wanted.stops,
            seed=None if wanted.seed is None else wanted.seed + index,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            top_logprobs=wanted.logprobs_wanted,
            ignore_end=wanted.ignore_eos,
            continues=isinstance(wanted, CompletionRequest),
        )

    async def _submit(self, answers: Answers) -> None:
        try:
            await asyncio.to_thread(answers.submit, self._engine)
        except TunesmithError as error:
            raise self._refusal(error, answers.requests[0].adapter) from error

    def _refusal(self, error: TunesmithError, adapter: str | None) -> ApiError:
        if not self._engine.is_serving:
            return ApiError(503, str(error), code="not_serving")
        if adapter is not None and adapter not in self._engine.shelf.folders:
            return ApiError(404, f"the model {adapter!r} was unloaded.", param="model", code="model_not_found")
        if isinstance(error, AdapterError):
            _log.error("adapter %s can no longer be read", adapter, exc_info=error)
            return ApiError(500, f"the adapter {adapter!r} can no longer be read.", code="adapter_lost")
        return ApiError(400, str(error))

    def _adapter_of(self, model: str) -> str | None:
        """Return the adapter that ``model`` names, None for the base."""
        known = self._engine.shelf.folders
        if model == self._name:
            return None
        if model not in known:
            near = did_you_mean(model, [self._name, *known])
            message = f"the model {model!r} does not exist.{near}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return model

    def _entry(self, name: str) -> dict[str, Any]:
        parent = None if name == self._name else self._name
        entry = {"id": name, "object": "model", "created": self._started, "owned_by": "tunesmith", "parent": parent}
        return {**entry, "max_model_len": self._engine.window}

    def _require_roots(self) -> None:
        if not self._roots:
            message = "adapters come and go only where the server was started with --adapter-root."
            raise ApiError(403, message, code="not_allowed")

    def _read(self, wanted: LoadAdapter) -> list[str]:
        folder = adapter_inside(wanted.lora_path, self._roots)
        return list(self._engine.shelf.add(wanted.lora_name, folder, replace=wanted.load_inplace).notes)

    async def _body(self, request: Request) -> bytes:
        """Return the body of a request; one that is too large is never held."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # Browsers send no such body to another site without asking it first.
            raise ApiError(415, f"the body must be application/json, not {kind or 'of no type'}.")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    # What is a little too large is read to its end, so that the client gets to read the error.
                    if size > 16 * self._most_body:
                        break
                    if size <= self._most_body:
                        parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} seconds.") from None
        if size > self._most_body:
            raise ApiError(413, f"the body is larger than {self._most_body:,} bytes.", code="body_too_large")
        return b"".join(parts)


async def _unless_gone(request: Request, answers: Answers) -> list[Answer] | None:
    """Return the whole answers, or None where the client did not wait for them."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, left = asyncio.ensure_future(answers.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({whole, left}, return_when=asyncio.FIRST_COMPLETED)
        return whole.result() if whole.done() else None
    finally:
        whole.cancel()
        left.cancel()


def _json(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body, ensure_ascii=False, allow_nan=False), media_type="application/json")

"""A router before engines that prefill and engines that decode, which share KV through kvstore.

    python examples/vllm/router.py --prefill URL … --decode URL … [--port 8000]

A completion is asked for twice: of a prefill engine, for one token, which leaves the prompt's KV in the store; then of
a decode engine, with what the first said of it (`kv_transfer_params`), whose answer is passed on as it comes. Where no
prefill engine answers, the decode engine computes the prompt. All else goes to a decode engine as it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, web

COMPLETIONS = ("/v1/completions", "/v1/chat/completions")
PREFILL_S_MAX = 300.0
#: What asks for the whole answer. A prefill engine is asked for its first token alone, and all at once.
ANSWER_KEYS = (
    "stream_options", "min_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "echo", "best_of",
)  # fmt: skip
SESSION = web.AppKey("session", ClientSession)
log = logging.getLogger("router")


class Router:
    """Engines of a kind take turns. A request goes to the engine whose turn it is, whatever it has in its cache."""

    def __init__(self, prefill: list[str], decode: list[str]) -> None:
        self._prefill: Iterator[str] = itertools.cycle(prefill)
        self._decode: Iterator[str] = itertools.cycle(decode)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        told = await self._prefilled(request, asked)
        if told is not None:
            asked["kv_transfer_params"] = told
        return await self._passed_on(request, json.dumps(asked).encode())

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        return await self._passed_on(request, await request.read())

    async def _prefilled(self, request: web.Request, asked: dict[str, Any]) -> dict[str, Any] | None:
        """What the decode engine is to be told. None: it is on its own."""
        first = {key: value for key, value in asked.items() if key not in ANSWER_KEYS}
        first |= {"max_tokens": 1, "n": 1, "stream": False, "kv_transfer_params": {"do_remote_decode": True}}
        engine = next(self._prefill)
        try:
            async with request.app[SESSION].post(
                engine + request.path, json=first, headers=kept(request), timeout=ClientTimeout(PREFILL_S_MAX)
            ) as answer:
                if answer.status != 200:  # what is wrong with the request the decode engine says as well
                    log.warning("%s answers %d", engine, answer.status)
                    return None
                told: dict[str, Any] | None = (await answer.json()).get("kv_transfer_params")
                return told
        except (ClientError, TimeoutError) as error:
            log.warning("%s: %s", engine, error or type(error).__name__)
            return None

    async def _passed_on(self, request: web.Request, body: bytes) -> web.StreamResponse:
        engine = next(self._decode)
        passed: web.StreamResponse | None = None
        try:
            async with request.app[SESSION].request(
                request.method, engine + request.path_qs, data=body, headers=kept(request),
            ) as answer:  # fmt: skip
                passed = web.StreamResponse(
                    status=answer.status, headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")}
                )
                await passed.prepare(request)
                async for some in answer.content.iter_any():
                    await passed.write(some)
                await passed.write_eof()
                return passed
        except ClientError as error:
            if passed is not None:  # half an answer is there: its end is missed
                raise
            raise web.HTTPBadGateway(text=f"{engine}: {error}") from error


def kept(request: web.Request) -> dict[str, str]:
    return {
        name: value for name, value in request.headers.items() if name.lower() in ("authorization", "content-type")
    }  # fmt: skip


def application(prefill: list[str], decode: list[str]) -> web.Application:
    router = Router(prefill, decode)

    async def session(app: web.Application) -> AsyncIterator[None]:
        async with ClientSession(timeout=ClientTimeout(total=None)) as app[SESSION]:
            yield

    app = web.Application(client_max_size=1 << 26)
    app.cleanup_ctx.append(session)
    app.add_routes([web.post(path, router.complete) for path in COMPLETIONS])
    app.router.add_route("*", "/{anything:.*}", router.pass_on)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefill", nargs="+", required=True, metavar="URL")
    parser.add_argument("--decode", nargs="+", required=True, metavar="URL")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    logging.basicConfig(format="%(name)s: %(message)s")
    web.run_app(application(given.prefill, given.decode), host=given.host, port=given.port)


if __name__ == "__main__":
    main()

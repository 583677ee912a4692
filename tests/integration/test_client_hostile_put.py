"""Puts that a node answers out of place, with failures or not: rejected, or the typed error, within the deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from hostile_calls import CHUNK, CHUNKS, HELD, STATUSES, WIDE_HELD, calling, logged, raised, timed
from hostile_server import Answer, Context, Held, HostileServer, Put, hang, receive_data, results, verdicts

from kvstore_client import DeadlineExceeded, KvClientError, ProtocolViolation, PutResult
from kvstore_client.errors import ERROR_OF_STATUS
from kvstore_proto.v1 import store_pb2 as pb
from kvstore_proto.v1.framing import Framed


async def put_both_ways(
    put: Put, kind: type[KvClientError], caplog: pytest.LogCaptureFixture, *, held: Held = HELD
) -> None:
    with HostileServer(put=put) as server:
        async with calling(server.address) as lenient, calling(server.address, strict=True) as strict:
            result, error = await asyncio.gather(
                timed(lenient.namespace(held.layout).put(held.tokens, held.kv, quality="raw")),
                raised(strict.namespace(held.layout).put(held.tokens, held.kv, quality="raw")),
            )
            await lenient.namespace(held.layout).put(held.tokens, held.kv, quality="raw", deadline=0.3)
    chunks = len(held.refs)
    assert type(error) is kind, error
    assert result == PutResult(rejected=chunks, reasons=result.reasons)
    assert len(result.reasons) == len(result.reasons[0].splitlines()) == 1
    assert lenient.counted("rejected_chunks", reason=kind.code.value) == 2 * chunks
    (line,) = logged(caplog)
    assert line.startswith(f"put: {kind.code.value}: ")


def put_answers() -> Iterator[tuple[str, list[Answer]]]:
    """What is answered to the offer, and what to the commit."""
    send = verdicts([pb.VERDICT_SEND] * CHUNKS)
    stored = results([pb.OUTCOME_STORED] * CHUNKS)
    yield "a verdict too few", [verdicts([pb.VERDICT_SEND] * (CHUNKS - 1)), stored]
    yield "a verdict too many", [verdicts([pb.VERDICT_SEND] * (CHUNKS + 1)), stored]
    yield "no verdicts", [verdicts([]), stored]
    yield "a verdict unspecified", [verdicts([0] * CHUNKS), stored]
    yield "an unknown verdict", [verdicts([99] * CHUNKS), stored]
    yield "an empty answer to the offer", [b"", stored]
    yield "garbage for verdicts", [b"\xff" * 100, stored]
    yield "results for verdicts", [stored, stored]
    yield "an end after the offer", []
    yield "verdicts for results", [send, send]
    yield "a result too few", [send, results([pb.OUTCOME_STORED] * (CHUNKS - 1))]
    yield "a result too many", [send, results([pb.OUTCOME_STORED] * (CHUNKS + 1))]
    yield "an unknown outcome", [send, results([99] * CHUNKS)]
    yield "an outcome unspecified", [send, results([0] * CHUNKS)]
    yield "an empty answer to the commit", [send, b""]
    yield "garbage for results", [send, b"\xff" * 100]
    yield "an end after the commit", [send]


def answering(answers: list[Answer]) -> Put:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        for index, answer in enumerate(answers):
            if index:
                receive_data(requests)
            yield answer
        if answers:
            receive_data(requests)

    return put


@pytest.mark.parametrize(("what", "answers"), [pytest.param(*case, id=case[0]) for case in put_answers()])
async def test_a_put_answered_out_of_place(
    what: str, answers: list[Answer], caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    await put_both_ways(answering(answers), ProtocolViolation, caplog)


async def test_results_before_the_verdicts_end_nothing_early(caplog: pytest.LogCaptureFixture) -> None:
    """Both answers at once: what was not sent is not believed to be stored."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        yield results([pb.OUTCOME_STORED] * CHUNKS)
        yield verdicts([pb.VERDICT_SEND] * CHUNKS)

    await put_both_ways(put, ProtocolViolation, caplog)


@pytest.mark.slow
async def test_a_put_that_hangs_at_the_offer(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        hang(context)
        yield from ()

    await put_both_ways(put, DeadlineExceeded, caplog)


@pytest.mark.slow
async def test_a_put_whose_data_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    """Many MB, so that flow control stops the writer."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        hang(context)

    await put_both_ways(put, DeadlineExceeded, caplog, held=WIDE_HELD)


@pytest.mark.slow
async def test_a_put_that_hangs_at_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        receive_data(requests)
        hang(context)

    await put_both_ways(put, DeadlineExceeded, caplog)


async def test_a_put_that_ends_well_before_its_data_did(caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        yield verdicts([pb.VERDICT_SEND] * len(next(requests).head.offer.objects))
        next(requests)

    await put_both_ways(put, ProtocolViolation, caplog, held=WIDE_HELD)


@pytest.mark.parametrize("status", STATUSES, ids=lambda status: status.name)
@pytest.mark.parametrize("when", ["offer", "data", "commit"])
async def test_a_put_that_fails(when: str, status: grpc.StatusCode, caplog: pytest.LogCaptureFixture) -> None:
    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        count = len(next(requests).head.offer.objects)
        if when != "offer":
            yield verdicts([pb.VERDICT_SEND] * count)
        if when == "data":
            next(requests)
        if when == "commit":
            receive_data(requests)
        context.abort(status, "not\ntoday")

    held = WIDE_HELD if when == "data" else HELD  # of many MB: the writer still writes
    await put_both_ways(put, ERROR_OF_STATUS[status], caplog, held=held)


async def test_chunks_that_a_node_turns_down_are_rejected_not_errors(caplog: pytest.LogCaptureFixture) -> None:
    """Refused before or rejected after they are sent: an answer, counted and logged, also where the client is
    strict."""

    def put(requests: Iterator[Framed[pb.PutRequest]], context: Context) -> Iterator[Answer]:
        next(requests)
        yield verdicts([pb.VERDICT_SEND, pb.VERDICT_SEND, pb.VERDICT_REFUSED, pb.VERDICT_HAVE])
        assert receive_data(requests) == len(HELD.blobs[0]) + len(HELD.blobs[1])
        outcomes = [pb.OUTCOME_STORED, pb.OUTCOME_REJECTED, pb.OUTCOME_REJECTED, pb.OUTCOME_HAVE]
        yield pb.PutResponse(results=pb.PutResults(results=[
            pb.ObjectResult(outcome=outcome, reason="no\nroom\x1b[31m " + "x" * 10_000) for outcome in outcomes
        ]))  # fmt: skip

    with HostileServer(put=put) as server:
        async with calling(server.address, strict=True) as caller:
            result = await timed(caller.namespace().put(HELD.tokens, HELD.kv, quality="raw"))
    assert (result.stored, result.rejected, result.have, result.tokens) == (1, 2, 1, CHUNK)
    (reason,) = result.reasons
    assert reason.startswith("no room")
    assert reason.isprintable()
    assert len(reason) < 400
    assert caller.counted("rejected_chunks", reason="refused") == 2
    (line,) = logged(caplog)
    assert line.startswith("put: refused: no room")

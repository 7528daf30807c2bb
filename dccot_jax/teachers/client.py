"""Ask a teacher many requests: cached, with bounded concurrency, metered, committed one by one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Callable, Sequence

from dccot_jax.records import Request, Response, Teacher
from dccot_jax.teachers.cache import RequestCache, request_key


@dataclasses.dataclass
class Usage:
    """What was asked and what it cost.

    Attributes:
      requests: all requests. calls: those sent to the teacher. cache_hits: answered from disk.
      shared: equal to another request of the same batch, sent once. errors: calls that brought an error.
      truncated: responses cut at the token limit (fresh or cached).
      prompt_tokens, completion_tokens: tokens of the calls, where the teacher meters them; cached answers cost nothing.
    """

    requests: int = 0
    calls: int = 0
    cache_hits: int = 0
    shared: int = 0
    errors: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def complete_all(
    teacher: Teacher,
    requests: Sequence[Request],
    *,
    cache: RequestCache,
    concurrency: int = 16,
    meter: Usage | None = None,
    on_done: Callable[[int], None] | None = None,
) -> list[Response]:
    """Responses in the order of `requests`.

    Every answer is in the cache before the next call of its worker starts. Responses with ``finish_reason`` "error" are
    returned and counted, not cached: the next run asks again.

    Args:
      teacher: safe to call concurrently. requests: equal ones are sent once.
      cache: where responses are looked up and stored. concurrency: calls in flight at most.
      meter: counts are added to it. on_done: called with the number of requests just finished (from the event loop's thread).

    Raises:
      whatever `teacher.complete` or `on_done` raises, after calls in flight have come back and been stored; nothing further is sent.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency {concurrency} must be at least 1")
    job = _complete_all(teacher, requests, cache, concurrency, meter if meter is not None else Usage(), on_done or _ignore)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(job)
    # Inside a running loop (a notebook) the work goes to a thread with a loop of its own.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, job).result()


async def _complete_all(
    teacher: Teacher, requests: Sequence[Request], cache: RequestCache, concurrency: int, meter: Usage, on_done: Callable[[int], None]
) -> list[Response]:
    keys = [request_key(teacher, request) for request in requests]
    found: dict[str, Response] = {}
    open_requests: dict[str, Request] = {}
    meter.requests += len(keys)
    for key, request in zip(keys, requests, strict=True):
        if key in found or key in open_requests:
            meter.shared += 1
        elif (cached := cache.get(teacher, key)) is not None:
            found[key] = cached
            meter.cache_hits += 1
        else:
            open_requests[key] = request
    on_done(len(keys) - len(open_requests))

    todo = iter(open_requests.items())
    failed = False

    async def worker() -> None:
        nonlocal failed
        for key, request in todo:  # the iterator is shared: each worker takes the next request
            if failed:
                return
            try:
                response = await teacher.complete(request)
                meter.calls += 1
                meter.prompt_tokens += response.prompt_tokens or 0
                meter.completion_tokens += response.completion_tokens or 0
                if response.finish_reason == "error":
                    meter.errors += 1
                else:
                    cache.put(teacher, key, request, response)
                found[key] = response
                on_done(1)
            except BaseException:
                failed = True
                raise

    results = await asyncio.gather(*(worker() for _ in range(min(concurrency, len(open_requests)))), return_exceptions=True)
    cache.sync()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    meter.truncated += sum(response.finish_reason == "length" for response in found.values())
    return [found[key] for key in keys]


def _ignore(_: int) -> None:
    return None

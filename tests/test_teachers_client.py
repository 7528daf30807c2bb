"""The request cache and the client: nothing asked twice, nothing lost, everything counted."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from dccot_jax.records import Message, Request, Response, user_request
from dccot_jax.teachers.build import TeacherError, make_teacher, register_kind
from dccot_jax.teachers.cache import RequestCache, request_key
from dccot_jax.teachers.client import Usage, complete_all


class Echo:
    """Answers with the question; may fail at the n-th call, be slow, or return errors for some texts."""

    name = "echo"

    def __init__(self, *, key="v1", fail_at=0, delay=0.0, errors=()):
        self.cache_key = key
        self.asked: list[str] = []
        self.fail_at, self.delay, self.errors = fail_at, delay, errors
        self.running = self.most = 0

    async def complete(self, request: Request) -> Response:
        text = request.messages[-1].content
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delay)
            if self.fail_at and len(self.asked) + 1 >= self.fail_at:
                raise ConnectionError("gone")
            self.asked.append(text)
            if text in self.errors:
                return Response("", finish_reason="error", error="cannot")
            return Response(f"re: {text} {request.sample_index}", prompt_tokens=2, completion_tokens=3)
        finally:
            self.running -= 1


def ask(n):
    return [user_request(f"q{index}") for index in range(n)]


def test_order_concurrency_and_metering(tmp_path):
    teacher, usage, done = Echo(delay=0.001), Usage(), []
    with RequestCache(tmp_path) as cache:
        responses = complete_all(teacher, ask(50), cache=cache, concurrency=7, meter=usage, on_done=done.append)
    assert [response.text for response in responses] == [f"re: q{index} 0" for index in range(50)]
    assert teacher.most == 7
    assert usage.as_dict() | {"truncated": 0} == {
        "requests": 50,
        "calls": 50,
        "cache_hits": 0,
        "shared": 0,
        "errors": 0,
        "truncated": 0,
        "prompt_tokens": 100,
        "completion_tokens": 150,
    }
    assert sum(done) == 50


def test_second_run_asks_nothing(tmp_path):
    with RequestCache(tmp_path) as cache:
        first = complete_all(Echo(), ask(5), cache=cache)
    teacher, usage = Echo(), Usage()
    with RequestCache(tmp_path) as cache:
        assert complete_all(teacher, ask(5), cache=cache, meter=usage) == first
    assert teacher.asked == [] and (usage.calls, usage.cache_hits, usage.completion_tokens) == (0, 5, 0)


def test_an_interruption_sends_nothing_further_and_keeps_what_comes_back(tmp_path):
    teacher = Echo(delay=0.01)

    def stop(count):
        if count and len(teacher.asked) >= 10:
            raise KeyError("enough")

    with RequestCache(tmp_path) as cache, pytest.raises(KeyError):
        complete_all(teacher, ask(50), cache=cache, concurrency=4, on_done=stop)
    assert 10 <= len(teacher.asked) < 10 + 4  # calls in flight come back
    again = Echo()
    with RequestCache(tmp_path) as cache:
        complete_all(again, ask(50), cache=cache)
    assert sorted(teacher.asked + again.asked) == sorted(f"q{index}" for index in range(50))


def test_equal_requests_are_sent_once(tmp_path):
    teacher, usage = Echo(), Usage()
    with RequestCache(tmp_path) as cache:
        responses = complete_all(teacher, [user_request("q")] * 4, cache=cache, meter=usage)
    assert teacher.asked == ["q"] and len(set(responses)) == 1 and (usage.calls, usage.shared) == (1, 3)


def test_everything_that_reaches_the_teacher_is_in_the_key():
    teacher = Echo()
    base = Request((Message("system", "s"), Message("user", "u")), temperature=0.5, max_tokens=9, seed=1, sample_index=2)
    changed = [
        dataclasses.replace(base, messages=(Message("system", "S"), Message("user", "u"))),
        dataclasses.replace(base, messages=(Message("user", "u"),)),
        dataclasses.replace(base, temperature=0.6),
        dataclasses.replace(base, max_tokens=10),
        dataclasses.replace(base, seed=2),
        dataclasses.replace(base, sample_index=3),
    ]
    keys = {request_key(teacher, request) for request in [base, *changed]} | {request_key(Echo(key="v2"), base)}
    assert len(keys) == len(changed) + 2
    covered = {field.name for field in dataclasses.fields(Request)}
    assert covered == {"messages", "temperature", "max_tokens", "seed", "sample_index"}, "a new field needs a case above"


def test_errors_are_counted_and_asked_again(tmp_path):
    usage = Usage()
    with RequestCache(tmp_path) as cache:
        responses = complete_all(Echo(errors=("q1",)), ask(3), cache=cache, meter=usage)
    assert [response.finish_reason for response in responses] == ["stop", "error", "stop"] and usage.errors == 1
    teacher = Echo()
    with RequestCache(tmp_path) as cache:
        complete_all(teacher, ask(3), cache=cache)
    assert teacher.asked == ["q1"]


@pytest.mark.parametrize("fail_at", [1, 2, 7, 20])
def test_a_failed_run_repeats_no_call(tmp_path, fail_at):
    broken = Echo(fail_at=fail_at, delay=0.0005)
    with RequestCache(tmp_path) as cache, pytest.raises(ConnectionError):
        complete_all(broken, ask(30), cache=cache, concurrency=4)
    teacher = Echo()
    with RequestCache(tmp_path) as cache:
        responses = complete_all(teacher, ask(30), cache=cache)
    assert len(responses) == 30
    assert sorted(broken.asked + teacher.asked) == sorted(f"q{index}" for index in range(30)), "each request was answered exactly once"


def test_torn_last_line_is_one_missing_row(tmp_path):
    with RequestCache(tmp_path) as cache:
        complete_all(Echo(), ask(4), cache=cache, concurrency=1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in [*range(last + 1, len(whole), 61), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        teacher = Echo()
        with RequestCache(tmp_path) as cache:
            complete_all(teacher, ask(4), cache=cache)
        assert teacher.asked == ["q3"]
        with RequestCache(tmp_path) as cache:
            complete_all(teacher, ask(4), cache=cache)
        assert teacher.asked == ["q3"], "the row written after a torn line must be readable"


def test_rows_hold_request_and_response(tmp_path):
    teacher = Echo()
    request = Request((Message("system", "s"), Message("user", "ü")), temperature=0.5)
    with RequestCache(tmp_path) as cache:
        complete_all(teacher, [request], cache=cache)
        assert cache.request(teacher, request_key(teacher, request)) == request
    (path,) = tmp_path.iterdir()
    row = json.loads(path.read_text())
    assert row["response"]["text"] == "re: ü 0" and row["key"] == request_key(teacher, request)


def test_two_caches_on_one_folder_see_their_own_rows(tmp_path):
    with RequestCache(tmp_path) as one, RequestCache(tmp_path) as two:
        first = complete_all(Echo(), ask(3), cache=one)
        complete_all(Echo(), [user_request("other")], cache=two)
        complete_all(Echo(), [user_request("more")], cache=one)
        assert complete_all(Echo(fail_at=1), ask(3), cache=one) == first
        assert complete_all(Echo(fail_at=1), [user_request("more")], cache=one)[0].text == "re: more 0"
    with RequestCache(tmp_path) as cache:
        complete_all(Echo(fail_at=1), [*ask(3), user_request("other"), user_request("more")], cache=cache)


def test_batches_where_files_cannot_be_appended_to(tmp_path):
    with RequestCache(tmp_path, append=False) as cache:
        first = complete_all(Echo(), ask(150), cache=cache)
        assert len(list(tmp_path.glob("*/*.jsonl"))) == 3
    with RequestCache(tmp_path, append=False) as cache:
        assert complete_all(Echo(fail_at=1), ask(150), cache=cache) == first


def test_works_inside_a_running_loop(tmp_path):
    async def notebook():
        with RequestCache(tmp_path) as cache:
            return complete_all(Echo(), ask(2), cache=cache)

    assert len(asyncio.run(notebook())) == 2


def test_an_error_is_never_stored(tmp_path):
    with RequestCache(tmp_path) as cache, pytest.raises(ValueError, match="error"):
        cache.put(Echo(), "k", user_request("q"), Response("", finish_reason="error"))


def test_a_killed_process_loses_at_most_calls_in_flight(tmp_path):
    """SIGKILL in the middle: every answer the teacher logged as given, but those in flight, is on disk."""
    script = textwrap.dedent(
        """
        import asyncio, os, sys
        from dccot_jax.records import Response, user_request
        from dccot_jax.teachers.cache import RequestCache
        from dccot_jax.teachers.client import complete_all

        class Teacher:
            name = cache_key = "slow"
            async def complete(self, request):
                await asyncio.sleep(0.002)
                os.write(1, (request.messages[0].content + "\\n").encode())
                return Response("x" * 500)

        complete_all(Teacher(), [user_request(f"q{i}") for i in range(5000)], cache=RequestCache(sys.argv[1]), concurrency=4)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert process.stdout is not None
    given = [process.stdout.readline().strip() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    given += process.stdout.read().split()
    process.wait()
    assert 40 <= len(given) < 5000
    rows = [json.loads(line) for path in tmp_path.iterdir() for line in path.read_bytes().split(b"\n")[:-1]]
    stored = {row["request"]["messages"][0]["content"] for row in rows}
    lost = {text.decode() for text in given} - stored
    assert len(lost) <= 4


# --- building teachers ------------------------------------------------------------------------------------------------


def test_teacher_specs():
    assert make_teacher({"kind": "scripted", "style": "verbose"}).name
    with pytest.raises(TeacherError, match=r"'scriptd' is not one of .*did you mean 'scripted'"):
        make_teacher({"kind": "scriptd"})
    with pytest.raises(TeacherError, match="finished traces"):
        make_teacher({"kind": "replay", "name": "x", "files": ("a",)})
    with pytest.raises(TeacherError, match="stile"):
        make_teacher({"kind": "scripted", "stile": "verbose"})
    with pytest.raises(ValueError, match="already registered"):
        register_kind("scripted", Echo)

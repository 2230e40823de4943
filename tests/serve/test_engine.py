"""Places and queues: who joins, waits, leaves, and what happens to the others."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from service import LIMITS, load_served, serving, train_tiny

import gptlite
from gptlite.config.run import SampleConfig
from gptlite.errors import DivergedError
from gptlite.serve.app import Limits
from gptlite.serve.engine import Busy, Engine, Job, ServedModel


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("engine"))


def make_job(served: ServedModel, n_tokens: int, name: int = 1, n: int = 1) -> Job:
    options = SampleConfig(max_new_tokens=n_tokens, temperature=1.0)
    ids = served.trained.tokenizer.encode("The of")
    names = list(range(name, name + n))
    return Job(served.name, ids, names, options, [], None, 0, asyncio.Queue())


def make_engine(served: ServedModel, most_waiting: int) -> Engine:
    engine = Engine(most_waiting)
    engine.models[served.name] = served
    return engine


async def read(job: Job) -> str:
    text, left = "", len(job.names)
    while left:
        some = await asyncio.wait_for(job.news.get(), 30)
        if isinstance(some, Exception):
            raise some
        text += "".join(news.text for news in some)
        left -= sum(bool(news.finished) for news in some)
    return text


def run_engine(engine: Engine, work: Any) -> Any:
    async def all_of_it() -> Any:
        engine.start()
        try:
            return await work()
        finally:
            await asyncio.to_thread(engine.close)

    return asyncio.run(all_of_it())


def test_who_comes_while_others_write_gets_the_same_text(tiny: Path) -> None:
    served = load_served(tiny, most_rows=3)
    engine = make_engine(served, 100)

    async def alone_and_together() -> None:
        alone = []
        for name in range(6):
            job = make_job(served, 20 + 5 * name, name)
            engine.submit([job])
            alone.append(await read(job))
        jobs = [make_job(served, 20 + 5 * name, name) for name in range(6)]
        for job in jobs:
            engine.submit([job])
            await asyncio.sleep(0.001)
        assert await asyncio.gather(*map(read, jobs)) == alone

    run_engine(engine, alone_and_together)
    assert served.batch.rows == []


def test_the_queue_has_an_end_and_who_leaves_frees_a_place(tiny: Path) -> None:
    served = load_served(tiny, most_rows=1)
    engine = make_engine(served, 2)

    async def crowd() -> None:
        first = make_job(served, 100_000)
        engine.submit([first])
        await first.news.get()  # it has the only place
        second, third, fourth = (make_job(served, 5, name) for name in (2, 3, 4))
        engine.submit([second, third])
        with pytest.raises(Busy):
            engine.submit([fourth])
        third.gone = first.gone = True
        assert len(await read(second)) >= 1
        engine.submit([fourth])
        await read(fourth)
        assert third.news.empty()
        assert (engine.n_writing, len(engine.waiting)) == (0, 0)

    run_engine(engine, crowd)


def test_many_samples_wait_for_as_many_places_and_are_not_overtaken(tiny: Path) -> None:
    served = load_served(tiny, most_rows=3)
    engine = make_engine(served, 9)

    async def crowd() -> None:
        order: list[str] = []

        async def note(what: str, job: Job) -> None:
            await read(job)
            order.append(what)

        long, wide, short = make_job(served, 60), make_job(served, 10, 5, n=3), make_job(served, 2)
        engine.submit([long])
        await long.news.get()
        engine.submit([wide])
        engine.submit([short])
        await asyncio.gather(note("long", long), note("wide", wide), note("short", short))
        assert order == ["long", "short", "wide"] or order == ["long", "wide", "short"]

    run_engine(engine, crowd)


def test_a_model_that_diverges_tells_each_and_the_engine_lives(tiny: Path) -> None:
    served = load_served(tiny)
    engine = make_engine(served, 9)

    async def diverge() -> None:
        jobs = [make_job(served, 50, name) for name in range(3)]
        weight = served.generator.norm.weight
        whole = weight.detach().clone()
        weight.data[:] = torch.nan
        engine.submit(jobs)
        for job in jobs:
            with pytest.raises(DivergedError):
                await read(job)
        weight.data[:] = whole
        again = make_job(served, 4)
        engine.submit([again])
        assert await read(again)

    run_engine(engine, diverge)


def test_a_call_has_the_models_to_itself(tiny: Path) -> None:
    served = load_served(tiny)
    engine = make_engine(served, 9)

    async def calls() -> None:
        job = make_job(served, 30)
        engine.submit([job])
        await job.news.get()
        where = [engine.call(threading.current_thread) for _ in range(3)]
        assert {(await asyncio.wrap_future(future)).name for future in where} == {"engine"}
        with pytest.raises(ZeroDivisionError):
            await asyncio.wrap_future(engine.call(lambda: 1 // 0))
        await read(job)

    run_engine(engine, calls)


def test_a_full_queue_is_status_429_and_says_when_to_come_back(tiny: Path) -> None:
    with serving(tiny, most_rows=1, most_waiting=1) as client:
        asked = {"prompt": ["The", "of", "and", "to"], "max_tokens": 2}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert "busy" in answer.json()["error"]["message"]
        assert client.post("/v1/completions", json={"max_tokens": 2}).status_code == 200


def test_an_answer_has_its_time(tiny: Path) -> None:
    limits = Limits(10**6, LIMITS.most_body_bytes, most_seconds=0.05)
    with serving(tiny, limits=limits) as client:
        asked = {"prompt": "The", "max_tokens": 10**6}
        answer = client.post("/v1/completions", json=asked)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"].startswith("not done in 0.05 seconds")
        streamed = client.post("/v1/completions", json={**asked, "stream": True}).text
        assert "not done in 0.05 seconds" in streamed.split("\n\n")[-2]
        assert client.get("/metrics").text.splitlines()[-1]
        short = client.post("/v1/completions", json={"prompt": "The", "max_tokens": 1})
        assert short.status_code == 200


def test_what_a_model_writes_does_not_change_how_it_was_trained(tiny: Path) -> None:
    before = gptlite.load(tiny).model.state_dict()
    with serving(tiny) as client:
        client.post("/v1/completions", json={"prompt": "The", "max_tokens": 5})
        for path, more in (("look", {"rate": 0.5}), ("without", {"heads": [[0, 0]]})):
            assert client.post(f"/api/{path}", json={"text": "The of", **more}).status_code == 200
        after = client.service.engine.models[tiny.name].trained.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

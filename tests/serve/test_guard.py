"""Who is answered: no page of another site, nobody without the token, nobody who sends too much."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from service import serving, train_tiny

from gptlite.serve import guard as guards
from gptlite.serve.guard import Guard


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def client(tiny: Path) -> Any:
    with serving(tiny) as client:
        yield client


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "LOCALHOST:1"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example:8000"}, 421),
        ({"host": "evil.example#localhost"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://localhost:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:9000"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
    ids=str,
)
def test_another_site_is_refused(client: Any, headers: dict[str, str], status: int) -> None:
    for path in ("/v1/models", "/api/runs", "/metrics"):
        assert client.get(path, headers=headers).status_code == status
    asked = {"prompt": "The", "max_tokens": 1}
    assert client.post("/v1/completions", json=asked, headers=headers).status_code == status


def test_a_link_from_another_site_opens_the_page(client: Any) -> None:
    answer = client.get("/", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_form_of_another_site_is_no_question(client: Any, kind: str) -> None:
    """Browsers send these kinds without asking first."""
    answer = client.post("/v1/completions", content=b"{}", headers={"content-type": kind})
    assert answer.status_code == 415


def test_no_answer_lets_another_page_read_it(client: Any) -> None:
    for path in ("/", "/v1/models", "/none"):
        headers = client.get(path).headers
        assert "access-control-allow-origin" not in headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_a_token_is_needed_for_all_but_the_page(tiny: Path) -> None:
    with serving(tiny, token="sesame", hosts=None) as client:
        for path in ("/", "/health"):
            assert client.get(path).status_code == 200
        for path in ("/v1/models", "/metrics", "/api/runs", "/none"):
            answers = [
                client.get(path, headers={"authorization": given})
                for given in ("", "sesame", "Bearer", "Bearer sesam", "Bearer sesame2", "Bearer é")
                if given.isascii()
            ]
            assert {answer.status_code for answer in answers} == {401}
        right = {"authorization": "Bearer sesame", "host": "anything.example"}
        assert client.get("/v1/models", headers=right).status_code == 200


def test_a_large_body_is_refused_as_it_comes(client: Any) -> None:
    headers = {"content-type": "application/json"}
    large = b'{"prompt": "' + b"a" * 200_000 + b'"}'
    assert client.post("/v1/completions", content=large, headers=headers).status_code == 413

    def parts() -> Any:  # nobody says beforehand how much will come
        for _ in range(100):
            yield b"a" * 2000

    assert client.post("/v1/completions", content=parts(), headers=headers).status_code == 413
    odd = {**headers, "content-length": "-1"}
    assert client.post("/v1/completions", content=b"", headers=odd).status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "SECONDS_FOR_A_BODY", 0.01)
    sent: list[Any] = []

    async def never() -> Any:
        await asyncio.sleep(60)

    async def note(message: Any) -> None:
        sent.append(message)

    async def unreachable(*_: Any) -> None:
        raise AssertionError

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": headers}
    asyncio.run(Guard(unreachable, None, None, 100)(scope, never, note))
    assert sent[0]["status"] == 408

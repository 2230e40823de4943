"""OpenAI's own client drives every endpoint over a socket."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import train_tiny
from sockets import serving_process

import gptlite

openai = pytest.importorskip("openai", reason="openai is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the client, about itself


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("openai"), tokenizer={"kind": "byte"})


@pytest.fixture(scope="module")
def client(tiny: Path) -> Iterator[Any]:
    options = ("--token", "sesame", "--queue", "1", "--batch", "4")
    with serving_process(str(tiny), *options, folder=tiny.parent) as served:
        root = f"http://127.0.0.1:{served.port}/v1"
        with openai.OpenAI(base_url=root, api_key="sesame", max_retries=0) as client:
            yield client


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "gptlite"


def test_completions_whole_and_streamed(client: Any, tiny: Path) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "The of", "max_tokens": 20, "seed": 3}
    asked |= {"n": 2, "logprobs": 2, "temperature": 0.9}
    answer = client.completions.create(**asked)
    expected = gptlite.load(tiny).generate("The of", max_new_tokens=20, seed=3, temperature=0.9)
    assert answer.choices[0].text == expected
    assert answer.usage.completion_tokens == 40
    assert len(answer.choices[1].logprobs.token_logprobs) == 20
    pieces = {0: "", 1: ""}
    options = {"include_usage": True}
    for event in client.completions.create(**asked, stream=True, stream_options=options):
        for choice in event.choices:
            pieces[choice.index] += choice.text
        usage = event.usage
    assert pieces == {choice.index: choice.text for choice in answer.choices}
    assert usage == answer.usage
    more = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.2}
    assert client.completions.create(model="tiny", prompt="The", extra_body=more).choices
    (echoed,) = client.completions.create(
        model="tiny", prompt="The of", max_tokens=0, echo=True, logprobs=1
    ).choices
    assert echoed.text == "The of"


def test_chats_whole_and_streamed(client: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    asked |= {"max_completion_tokens": 12, "logprobs": True, "top_logprobs": 3}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "length"
    assert len(choice.logprobs.content) == 12
    assert len(choice.logprobs.content[0].top_logprobs) == 3
    pieces = [
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(**asked, stream=True)
    ]
    assert "".join(pieces) == choice.message.content


def test_errors_are_the_ones_it_knows(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens: 100000 is above 4096"):
        client.completions.create(model="tiny", prompt="The", max_tokens=100_000)
    with pytest.raises(openai.NotFoundError, match="is not here; here: tiny"):
        client.completions.create(model="gpt-4", prompt="The")
    with pytest.raises(openai.RateLimitError, match="the server is busy"):
        client.completions.create(model="tiny", prompt=["The"] * 6, max_tokens=4)
    with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"):
        client.with_options(api_key="wrong").models.list()


def test_the_example_of_the_documentation_runs(
    client: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "serve.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    block = block.replace("http://127.0.0.1:8000/v1", str(client.base_url))
    block = block.replace('api_key="none"', 'api_key="sesame"').replace("quickstart", "tiny")
    (tmp_path / "ask.py").write_text(block)
    runpy.run_path(str(tmp_path / "ask.py"))
    assert len(capsys.readouterr().out) > 10

"""OpenAI's API: the texts of `gptlite generate`, whole and in pieces; a line for every mistake."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import TestClient, serving, train_tiny
from typer.testing import CliRunner

import gptlite
from gptlite.cli.main import app


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("serve"), dropout={"rate": 0.1})


@pytest.fixture(scope="module")
def client(tiny: Path) -> Any:
    with serving(tiny) as client:
        yield client


def complete(client: TestClient, **asked: Any) -> Any:
    answer = client.post("/v1/completions", json=asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, path: str, **asked: Any) -> list[Any]:
    answer = client.post(path, json={**asked, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_text_is_that_of_generate(client: TestClient, tiny: Path) -> None:
    options = ["--max-new-tokens", "30", "--temperature", "0.7", "--top-k", "5", "--seed", "3"]
    asked = ["--run", str(tiny), "--prompt", "The of", "--num-samples", "3", "--json", *options]
    found = CliRunner().invoke(app, ["generate", *asked], catch_exceptions=False)
    expected = [result["text"] for result in json.loads(found.stdout)["results"]]
    given = {"max_tokens": 30, "temperature": 0.7, "top_k": 5, "seed": 3, "n": 3}
    answer = complete(client, prompt="The of", **given)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 90, "total_tokens": 96}
    pieces: dict[int, str] = dict.fromkeys(range(3), "")
    for event in events(client, "/v1/completions", prompt="The of", **given):
        (choice,) = event["choices"]
        pieces[choice["index"]] += choice["text"]
    assert list(pieces.values()) == expected


def test_what_is_left_out_is_as_the_run_has_it(client: TestClient, tiny: Path) -> None:
    assert complete(client, prompt="The of")["choices"][0]["text"] == gptlite.load(tiny).generate(
        "The of"
    )


def test_several_prompts_texts_and_ids(client: TestClient, tiny: Path) -> None:
    tokenizer = gptlite.load(tiny).tokenizer
    asked = {"max_tokens": 8, "n": 2, "temperature": 1.0}
    together = complete(client, prompt=["The", "of and"], **asked)
    ids = complete(client, prompt=[tokenizer.encode("The"), tokenizer.encode("of and")], **asked)
    one = complete(client, prompt=tokenizer.encode("of and"), **asked)
    texts = [choice["text"] for choice in together["choices"]]
    assert len(texts) == 4
    assert [choice["text"] for choice in ids["choices"]] == texts
    assert [choice["text"] for choice in one["choices"]] == texts[2:]


def test_it_ends_before_a_stop_text(client: TestClient) -> None:
    whole = complete(client, prompt="The", max_tokens=40)["choices"][0]["text"]
    stop = whole[10:12]
    (choice,) = complete(client, prompt="The", max_tokens=40, stop=stop)["choices"]
    assert choice["text"] == whole.partition(stop)[0]
    assert choice["finish_reason"] == "stop"


def test_probabilities_are_those_of_the_model(client: TestClient, tiny: Path) -> None:
    """Also of the prompt, where it is echoed; the offsets point to each token."""
    run = gptlite.load(tiny)
    asked = {"prompt": "The of", "max_tokens": 6, "logprobs": 3, "temperature": 0.5}
    (choice,) = complete(client, **asked, echo=True)["choices"]
    found, text = choice["logprobs"], choice["text"]
    ids = torch.tensor([run.tokenizer.encode(text)])
    with torch.no_grad():
        expected = run.model(ids)[0].log_softmax(-1)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert "".join(found["tokens"]) == text
    for at in range(1, len(text)):
        own = expected[at - 1, ids[0, at]].item()
        assert found["token_logprobs"][at] == pytest.approx(own, abs=1e-4)
        assert max(found["top_logprobs"][at].values()) == pytest.approx(
            expected[at - 1].max().item(), abs=1e-4
        )
        assert len(found["top_logprobs"][at]) == 3
        assert text[found["text_offset"][at] :].startswith(found["tokens"][at])
    (new,) = complete(client, **asked)["choices"]
    assert new["logprobs"]["tokens"] == found["tokens"][6:]
    pieces = [event["choices"][0] for event in events(client, "/v1/completions", **asked)]
    told = [value for piece in pieces for value in piece["logprobs"]["token_logprobs"]]
    assert told == new["logprobs"]["token_logprobs"]
    offsets = [at for piece in pieces for at in piece["logprobs"]["text_offset"]]
    assert offsets == new["logprobs"]["text_offset"]


def test_a_prompt_alone_is_judged(client: TestClient) -> None:
    """What lm-eval and others ask: echo, no new token."""
    (choice,) = complete(client, prompt="The of", max_tokens=0, echo=True, logprobs=0)["choices"]
    assert choice["text"] == "The of"
    assert len(choice["logprobs"]["token_logprobs"]) == 6
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"][1:])


def test_a_chat_is_a_template_and_a_completion(client: TestClient) -> None:
    messages = [{"role": "system", "content": "of"}, {"role": "user", "content": "and"}]
    asked = {"messages": messages, "max_tokens": 12, "seed": 5}
    answer = client.post("/v1/chat/completions", json=asked)
    if answer.status_code == 400:  # its characters are not all known here
        assert "character" in answer.json()["error"]["message"]
        return
    (choice,) = answer.json()["choices"]
    prompt = "System: of\nUser: and\nAssistant:"
    same = complete(client, prompt=prompt, max_tokens=12, seed=5, stop="\nUser:")
    assert choice["message"]["content"] == same["choices"][0]["text"]


def test_a_chat_streams_and_tells_its_usage(tmp_path: Path) -> None:
    directory = train_tiny(tmp_path, tokenizer={"kind": "byte"})
    with serving(directory) as client:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 7}
        asked |= {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}}
        found = events(client, "/v1/chat/completions", **asked)
        asked.pop("stream_options")
        whole = client.post("/v1/chat/completions", json=asked).json()
    first, *middle, last = found
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 7
    text = "".join(event["choices"][0]["delta"]["content"] for event in middle)
    (choice,) = whole["choices"]
    assert text == choice["message"]["content"]
    content = choice["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in content] == [2] * 7
    assert all(math.exp(token["logprob"]) <= 1 for token in content)


@pytest.mark.parametrize(
    ("asked", "status", "message"),
    [
        ({"promt": "The"}, 400, "promt: not a field; known here: model, n,"),
        ({"prompt": "Ж"}, 400, "prompt: character 'Ж' at position 1 is not"),
        ({"prompt": [9999]}, 400, "prompt: token 9999; the model has tokens 0 to"),
        ({"prompt": []}, 400, "prompt: 0 prompts; give 1 to 64"),
        ({"max_tokens": 501}, 400, "max_tokens: 501 is above 500, this server's limit"),
        ({"max_tokens": 0}, 400, "max_tokens: 0 only with echo: true"),
        ({"temperature": -1}, 400, "temperature: must be at least 0 (got -1.0)"),
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 5}, 400, "n: at most 4 here"),
        ({"n": "2"}, 400, "n: Input should be a valid integer"),
        ({"model": "gpt-4"}, 404, "model: 'gpt-4' is not here; here: tiny"),
        ({"best_of": 3}, 400, "best_of: is not done here; leave it out"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty: "),
        ({"stop": ""}, 400, "stop: "),
        ({"logprobs": 21}, 400, "logprobs: "),
        ([1], 400, "body: must be a JSON object"),
        ({"prompt": "The " * 50, "echo": True, "logprobs": 1}, 400, "prompt: 200 tokens; echo "),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_its_field(
    client: TestClient, asked: Any, status: int, message: str
) -> None:
    answer = client.post("/v1/completions", json=asked)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    assert error["param"] == message.partition(":")[0]


def test_what_is_no_json_and_no_path_is_said(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=b"{", headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "body: is not JSON")
    for path in ("/v1", "/../../etc/passwd", "/page.html", "/%2e%2e/x", "/api/runs/../../x"):
        assert client.get(path).status_code == 404
    assert client.get("/v1/completions").status_code == 405


def test_models_health_and_metrics(client: TestClient) -> None:
    complete(client, prompt="The", max_tokens=3)
    assert client.get("/health").json()["status"] == "ok"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["object"] == "model"
    assert client.get("/v1/models/none").status_code == 404
    text = client.get("/metrics").text
    assert 'gptlite_tokens_total{model="tiny"}' in text
    assert 'gptlite_answers_total{path="/v1/completions",status="200"}' in text
    assert "gptlite_writing 0.0" in text


FIELDS = [
    "model",
    "prompt",
    "max_tokens",
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stream",
    "logprobs",
    "echo",
    "best_of",
    "suffix",
    "user",
    "stream_options",
    "messages",
    "layer",
    "head",
    "step",
    "site",
    "rate",
    "text",
    "heads",
    "neurons",
    "layers",
    "fill",
    "split",
    "granularity",
    "max_new_tokens",
    "top_logprobs",
]
ODD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**65), 2**65),
        st.integers(0, 9),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from(["The of", "tiny", "element", "locked", "mean", "zero", "embedding"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
PATHS = st.sampled_from(
    ["/v1/completions", "/v1/completions", "/v1/chat/completions", "/api/look", "/api/without"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(PATHS, st.dictionaries(st.sampled_from(FIELDS), ODD, max_size=6))
def test_no_request_is_a_fault_of_the_server(
    client: TestClient, path: str, asked: dict[str, Any]
) -> None:
    asked = {"max_tokens": 3, **asked} if path.startswith("/v1") else {"text": "The of", **asked}
    headers = {"content-type": "application/json"}
    body = json.dumps(asked).encode("utf-8", "surrogatepass")
    answer = client.post(path, content=body, headers=headers)
    assert answer.status_code in (200, 400, 404), (answer.status_code, answer.text, asked)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]

"""The processor by its name, in vLLM's own server: engine settings reach the engine's process, modes come over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.vllm
PROMPT = "<|im_start|>user\nbought a cup<|im_end|>\n"
PATIENCE = 300  # seconds


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--logits-processors", "recllm.vllm_processor:CatalogueProcessor"),
        *("--additional-config", json.dumps({"recllm": {"opening": "so: ", "closing": "!"}})),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "256"),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "shop"),
    ]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with open(log, "w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def wait_for(url, process, log):
    for _ in range(PATIENCE):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def ask(url, prompt, **settings):
    body = {"model": "shop", "prompt": prompt, "max_tokens": 16, "n": 8, "skip_special_tokens": False} | settings
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return [choice["text"] for choice in json.load(answer)["choices"]]


def test_the_server_answers_with_items(server, table):
    texts = {table.text_of(item) for item in table.items}
    assert {text.removesuffix("!") for text in ask(server, PROMPT + "so: ")} <= texts  # the end is not sent
    assert set(ask(server, PROMPT, vllm_xargs={"recllm_mode": "direct"})) <= texts
    assert not set(ask(server, PROMPT, vllm_xargs={"recllm_mode": "free"})) & texts


def test_a_bad_mode_is_the_clients_mistake_and_the_server_lives_on(server, table):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, PROMPT, vllm_xargs={"recllm_mode": "slow"})
    assert refused.value.code == 400
    assert "mode 'slow' is not one of reason, direct, free" in refused.value.read().decode()
    assert len(ask(server, PROMPT)) == 8

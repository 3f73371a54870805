"""mergekit.hub against a real HTTP server; each client is a process of its own, as huggingface_hub needs it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit import hub
from mergekit.downloads import arriving
from mergekit.refs import ModelPath

sys.path.insert(0, str(Path(__file__).parent))
from hub_server import TOKEN, HubServer

REPO = "org/model"
HEADER = b'{"lm_head.weight":{"dtype":"F32","shape":[7,3],"data_offsets":[0,84]}}'
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER + bytes(84)

# Reads one call a line, and answers with its result or the error that it raised.
CLIENT = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from mergekit import hub
from mergekit.downloads import arriving
from mergekit.refs import ModelPath

hub._PAUSE = 0.05
for line in sys.stdin:
    call = json.loads(line)
    cache = call.get("cache") and Path(call["cache"])
    try:
        path = ModelPath.parse(call["path"])
        if call["do"] == "download":
            heard = []
            value = str(hub.download(path, cache_dir=cache, told=lambda *news: heard.append(news)))
            value = {"heard": heard, "path": value} if call.get("listen") else value
        else:
            opened = hub.open_repository(path, cache_dir=cache)
            if call["do"] == "open":
                value = asdict(opened)
            elif call["do"] == "small":
                value = str(hub.fetch_small(opened))
            else:
                value = hub.read_range(opened, call["name"], call["start"], call["stop"]).hex()
        answer = {"value": value}
    except Exception as error:
        chained = error.__cause__ or not error.__suppress_context__ and error.__context__
        answer = {"error": type(error).__name__, "text": str(error), "chained": bool(chained)}
    print(json.dumps(answer, default=str), flush=True)
"""


class ClientError(Exception):
    """An error of the client process: ``kind`` is the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.text = kind, text


class Client:
    """A process that uses mergekit.hub."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home, self.errors = home, home / "stderr"
        home.mkdir(parents=True)
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CLIENT],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ask(self, do: str, path: str = REPO, **more: Any) -> Any:
        """The result of a call; raises ClientError where the client raised one of our errors."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"do": do, "path": path, **more}, default=str), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.errors.read_text()
        answer = json.loads(line)
        if "error" not in answer:
            return answer["value"]
        text = answer["text"]
        assert answer["error"] in ("HubError", "ModelNotFoundError"), answer
        assert not answer["chained"], "a traceback would show the library's own words"
        assert len(text.splitlines()) <= 2, text
        for secret in (TOKEN, "secret-signature", "Traceback"):
            assert secret not in text
            assert secret not in self.errors.read_text()
        raise ClientError(answer["error"], text)

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def shared_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def server(shared_server: HubServer, tmp_path: Path) -> HubServer:
    """A well-behaved hub with one model of every kind of file."""
    shared_server.reset()
    shared_server.repositories = {REPO: write_model(tmp_path / "model")}
    return shared_server


@pytest.fixture(scope="module")
def clients(shared_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Client]]:
    """Clients by what they were started with: online with a token, anonymous, offline, without a hub."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and never listens
        nowhere = f"http://user:{TOKEN}@127.0.0.1:{unused.getsockname()[1]}"
        variables = {
            "online": {"HF_TOKEN": TOKEN, "TQDM_POSITION": "-1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"},
            "anonymous": {},
            "offline": {"HF_HUB_OFFLINE": "1"},
            "nowhere": {"HF_ENDPOINT": nowhere},
        }
        found = {}
        for name, more in variables.items():
            home = tmp_path_factory.mktemp("home") / name
            found[name] = Client(home, shared_server.environment(home, **more))
        yield found
        for client in found.values():
            client.close()


@pytest.fixture
def client(clients: dict[str, Client]) -> Client:
    return clients["online"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


SMALL = {
    "LICENSE": b"free",
    "Notice.txt": b"of someone",
    "README.md": b"# model",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "chat_template.jinja": b"{{ messages }}",
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "merges.txt": b"a b",
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}',
    "modeling_model.py": b"raise SystemExit",
    "qwen.tiktoken": b"IQ== 0",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"\n\x0e",
    "tokenizer.model.v3": b"\n\x0f",
}
SAFE = {"model-1.safetensors": WEIGHTS, "model-2.safetensors": WEIGHTS + b"\0"}
PICKLED = {"pytorch_model-1.bin": b"PK\x03\x04", "adapter_model.bin": b"PK\x03\x05"}
UNUSED = {
    "consolidated.safetensors": WEIGHTS,
    "consolidated.safetensors.index.json": b'{"weight_map": {"a": "consolidated-9.safetensors"}}',
    "model.gguf": b"GGUF",
    "onnx/config.json": b"{}",
    "original/model.safetensors": WEIGHTS,
    "training_args.bin": b"PK",
}


def write_model(folder: Path, *kinds: dict[str, bytes]) -> Path:
    for kind in kinds or (SMALL, SAFE, PICKLED, UNUSED):
        for name, data in kind.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return folder


def contents(folder: str) -> dict[str, bytes]:
    """The files of a snapshot."""
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


# What is there


def test_open_asks_once_and_settles_the_commit(server: HubServer, client: Client) -> None:
    opened = client.ask("open", "org/model@main")
    everything = SMALL | SAFE | PICKLED | UNUSED
    assert opened["files"] == [{"name": name, "size": len(everything[name])} for name in sorted(everything)]
    assert opened["commit"] == server.commit(REPO)
    assert (opened["repo_id"], opened["revision"], opened["cache_dir"]) == (REPO, "main", None)
    assert [request.path for request in server.requests()] == ["/api/models/org/model/revision/main"]


def test_names_without_an_owner(server: HubServer, client: Client, cache: Path) -> None:
    server.repositories["gpt2"] = server.repositories[REPO]
    assert client.ask("open", "gpt2")["repo_id"] == "gpt2"
    assert contents(client.ask("download", "gpt2", cache=cache)) == SMALL | SAFE


def test_fetch_small_brings_no_weights(server: HubServer, client: Client, cache: Path) -> None:
    folder = client.ask("small", cache=cache)
    assert contents(folder) == SMALL
    assert Path(folder).name == server.commit(REPO)
    assert server.sent("resolve") == sum(map(len, SMALL.values()))


def test_fetch_small_without_any(server: HubServer, client: Client, tmp_path: Path) -> None:
    server.repositories["org/bare"] = write_model(tmp_path / "bare", SAFE)
    with pytest.raises(ClientError, match=r"ModelNotFoundError: 'org/bare' holds 2 files, but no config"):
        client.ask("small", "org/bare")


@pytest.mark.parametrize("uses_cdn", [False, True])
def test_a_header_costs_its_own_bytes(server: HubServer, client: Client, uses_cdn: bool) -> None:
    server.uses_cdn = uses_cdn
    name = "model-1.safetensors"
    assert bytes.fromhex(client.ask("range", name=name, start=0, stop=8)) == WEIGHTS[:8]
    assert bytes.fromhex(client.ask("range", name=name, start=8, stop=8 + len(HEADER))) == HEADER
    assert server.sent("resolve") == 8 + len(HEADER)


def test_a_token_does_not_follow_a_redirect(server: HubServer, client: Client, cache: Path) -> None:
    server.uses_cdn = True
    client.ask("range", name="model-1.safetensors", start=0, stop=8)
    client.ask("download", cache=cache)
    hosts = {request.host: request.token for request in server.requests("resolve")}
    assert hosts == {"127.0.0.1": TOKEN, "localhost": None}


@pytest.mark.parametrize("start", [0, 1 << 20])
def test_ignored_ranges_are_cut_short(server: HubServer, client: Client, tmp_path: Path, start: int) -> None:
    server.ignores_ranges = True
    size = write_large(tmp_path / "model/model-1.safetensors")
    got = bytes.fromhex(client.ask("range", name="model-1.safetensors", start=start, stop=start + 80))
    assert got == (WEIGHTS + bytes(2 << 20))[start : start + 80]
    time.sleep(0.05)
    assert server.sent("resolve") < start + size // 2


def test_ignored_ranges_far_in_a_file_are_refused(server: HubServer, client: Client, tmp_path: Path) -> None:
    server.ignores_ranges = True
    size = write_large(tmp_path / "model/model-1.safetensors")
    with pytest.raises(ClientError, match=r"HubError: .* does not honour a request for a range of 'model-1"):
        client.ask("range", name="model-1.safetensors", start=size - 8, stop=size)
    time.sleep(0.05)
    assert server.sent("resolve") < size // 2


def write_large(path: Path) -> int:
    """A file far beyond what sockets hold on their way, which costs no disk."""
    with path.open("wb") as file:
        file.write(WEIGHTS)
        file.truncate(24 << 20)
    return 24 << 20


def test_ranges_must_be_the_ones_asked(server: HubServer, client: Client) -> None:
    server.range_shift = 1
    with pytest.raises(ClientError, match=r"HubError: .* does not honour a request for a range"):
        client.ask("range", name="model-1.safetensors", start=0, stop=8)


def test_ranges_must_be_whole(server: HubServer, client: Client) -> None:
    server.cuts_at = 5
    with pytest.raises(ClientError, match=r"HubError: "):
        client.ask("range", name="model-1.safetensors", start=0, stop=8)


@pytest.mark.parametrize(("start", "stop"), [(0, 1 << 40), (-1, 8), (8, 7)])
def test_ranges_stay_in_the_file(server: HubServer, client: Client, start: int, stop: int) -> None:
    with pytest.raises(ClientError, match=rf"HubError: .* has {len(WEIGHTS)} bytes: no bytes {start} to {stop}"):
        client.ask("range", name="model-1.safetensors", start=start, stop=stop)
    assert not server.requests("resolve")


def test_ranges_of_unknown_files(server: HubServer, client: Client) -> None:
    with pytest.raises(
        ClientError, match=r"ModelNotFoundError: .* no file 'model-3.safetensors'. Did you mean 'model-"
    ):
        client.ask("range", name="model-3.safetensors", start=0, stop=8)


# Downloads


def test_download_takes_safetensors_and_leaves_the_rest(server: HubServer, client: Client, cache: Path) -> None:
    folder = client.ask("download", cache=cache)
    assert contents(folder) == SMALL | SAFE
    assert not [request for request in server.requests() if request.path.endswith((".bin", ".gguf"))]


def test_download_falls_back_to_bin(server: HubServer, client: Client, cache: Path, tmp_path: Path) -> None:
    server.repositories["org/old"] = write_model(tmp_path / "old", SMALL, PICKLED, UNUSED)
    assert contents(client.ask("download", "org/old", cache=cache)) == SMALL | PICKLED


def test_download_without_config(server: HubServer, client: Client, cache: Path, tmp_path: Path) -> None:
    server.repositories["org/bare"] = write_model(tmp_path / "bare", SAFE)
    assert contents(client.ask("download", "org/bare", cache=cache)) == SAFE


def test_download_needs_weights(server: HubServer, client: Client, cache: Path, tmp_path: Path) -> None:
    server.repositories["org/quantised"] = write_model(tmp_path / "quantised", {"model.gguf": b"GGUF"})
    with pytest.raises(ClientError, match=r"ModelNotFoundError: .* no \*.safetensors .*, but \['model.gguf'\]"):
        client.ask("download", "org/quantised", cache=cache)
    assert not server.requests("resolve")


def test_revisions(server: HubServer, client: Client, clients: dict[str, Client], cache: Path, tmp_path: Path) -> None:
    older = write_model(tmp_path / "older", SMALL | {"config.json": b'{"version": 1}'}, SAFE)
    server.repositories[REPO] = {"main": tmp_path / "model", "v1": older, "refs/pr/3": older}
    commit = server.commit(REPO, "v1")
    for revision in ("v1", "refs/pr/3", commit):
        folder = client.ask("download", f"{REPO}@{revision}", cache=cache)
        assert (Path(folder).name, contents(folder)["config.json"]) == (commit, b'{"version": 1}')
        assert clients["offline"].ask("download", f"{REPO}@{revision}", cache=cache) == folder
    assert Path(client.ask("download", cache=cache)).name == server.commit(REPO, "main") != commit


@pytest.mark.parametrize("revision", ["v9", "0" * 40])
def test_unknown_revisions(server: HubServer, client: Client, revision: str) -> None:
    with pytest.raises(
        ClientError, match=rf"ModelNotFoundError: 'org/model@{revision}' .* no such branch, tag or commit"
    ):
        client.ask("download", f"{REPO}@{revision}")


@pytest.mark.parametrize("revision", ["../../x", "/x", "a/../../b"])
def test_revisions_that_leave_the_cache(server: HubServer, client: Client, revision: str) -> None:
    with pytest.raises(ClientError, match=r"ModelNotFoundError: .* no revision has such a name"):
        client.ask("download", f"{REPO}@{revision}")
    assert not server.requests()


def test_caches(server: HubServer, client: Client, cache: Path) -> None:
    server.repositories["org/cached"] = server.repositories[REPO]
    usual = client.home / "hub"
    assert Path(client.ask("download", "org/cached", cache=cache)).is_relative_to(cache)
    assert not list(usual.glob("*cached*"))
    assert Path(client.ask("download", "org/cached")).is_relative_to(usual)


def test_a_cache_that_is_a_file(server: HubServer, client: Client, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(ClientError, match=rf"HubError: '{REPO}' can't be kept in the cache {cache}"):
        client.ask("download", cache=cache)


def test_cached_files_stay(server: HubServer, client: Client, clients: dict[str, Client], cache: Path) -> None:
    folder = client.ask("download", cache=cache)
    server.log.clear()
    assert client.ask("download", cache=cache) == folder
    assert server.sent("resolve") == 0
    server.log.clear()
    assert clients["offline"].ask("download", cache=cache) == folder
    assert clients["offline"].ask("download", f"{REPO}@{server.commit(REPO)}", cache=cache) == folder
    assert not server.log


def test_a_push_is_a_new_folder(server: HubServer, client: Client, cache: Path, tmp_path: Path) -> None:
    before = client.ask("download", cache=cache)
    (tmp_path / "model/config.json").write_bytes(b'{"version": 2}')
    server.log.clear()
    after = client.ask("download", cache=cache)
    assert after != before
    assert contents(after)["config.json"] == b'{"version": 2}'
    assert server.sent("resolve") == len(b'{"version": 2}')


def test_offline_without_a_cache(server: HubServer, clients: dict[str, Client], cache: Path) -> None:
    with pytest.raises(ClientError, match=rf"HubError: '{REPO}' is not in the cache {cache}; .* set HF_HUB_OFFLINE=0"):
        clients["offline"].ask("download", cache=cache)
    with pytest.raises(ClientError, match=r"HubError: .* set HF_HUB_OFFLINE=0"):
        clients["offline"].ask("open")
    assert not server.requests()


@pytest.mark.parametrize("lost", ["model-1.safetensors", "*.safetensors"])
def test_offline_with_a_part(
    server: HubServer, client: Client, clients: dict[str, Client], cache: Path, lost: str
) -> None:
    folder = Path(client.ask("download", cache=cache))
    for link in folder.glob(lost):
        link.resolve().unlink()  # the link stays, and leads nowhere
    with pytest.raises(ClientError) as caught:
        clients["offline"].ask("download", cache=cache)
    assert f"is only in part in the cache ({folder} has no {lost})" in caught.value.text


def test_offline_with_a_stale_index(
    server: HubServer, client: Client, clients: dict[str, Client], cache: Path, tmp_path: Path
) -> None:
    server.repositories["org/whole"] = write_model(tmp_path / "whole", SMALL, {"model.safetensors": WEIGHTS})
    folder = client.ask("download", "org/whole", cache=cache)
    assert clients["offline"].ask("download", "org/whole", cache=cache) == folder


def test_damaged_caches(server: HubServer, client: Client, cache: Path) -> None:
    damaged = Path(client.ask("download", cache=cache), "model-1.safetensors").resolve()
    damaged.write_bytes(WEIGHTS[:-1])
    with pytest.raises(ClientError) as caught:
        client.ask("download", cache=cache)
    assert caught.value.text.endswith(f"delete {damaged} and run again")
    damaged.unlink()
    assert contents(client.ask("download", cache=cache)) == SMALL | SAFE


@pytest.mark.parametrize("do", ["small", "download"])
def test_the_library_draws_no_bars(server: HubServer, client: Client, cache: Path, do: str) -> None:
    before = client.errors.stat().st_size
    client.ask(do, cache=cache)
    assert client.errors.read_bytes()[before:] == b""


def test_who_listens_hears_of_bytes_while_they_come(
    server: HubServer, client: Client, cache: Path, tmp_path: Path
) -> None:
    weights = {f"model-{number}.safetensors": WEIGHTS for number in range(9)}
    server.repositories["org/many"] = write_model(tmp_path / "many", SMALL, weights)
    server.delay = 0.1  # four at a time
    heard = client.ask("download", "org/many", cache=cache, listen=True)["heard"]
    total = len(weights) * len(WEIGHTS)
    assert {model for model, _, _ in heard} == {"org/many"}
    assert {whole for _, _, whole in heard} <= {total, sum(map(len, SMALL.values()))}
    steps = [done for _, done, whole in heard if whole == total]
    assert steps == sorted(steps)
    assert any(0 < done < total for done in steps)


def test_bytes_of_files_that_are_not_whole_count(tmp_path: Path) -> None:
    blobs = tmp_path / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "old.incomplete").write_bytes(bytes(1000))
    os.utime(blobs / "old.incomplete", (0, 0))  # of a run that was killed
    count = arriving(REPO, tmp_path)
    assert count() == 0
    (blobs / "new.incomplete").write_bytes(bytes(30))
    os.utime(blobs / "new.incomplete", (2**33, 2**33))
    (blobs / "whole").write_bytes(bytes(500))
    assert count() == 30


def test_an_interrupt_does_not_wait_for_what_is_on_its_way(server: HubServer, tmp_path: Path) -> None:
    code = (
        "import sys, signal, threading, os; sys.argv = ['mergekit', 'merge', 'r.yml', 'out']\n"
        "from mergekit import hub\nfrom mergekit.cli.main import main\n"
        "hub.patiently = lambda call: call() if threading.current_thread() is threading.main_thread() else (\n"
        "    os.kill(os.getpid(), signal.SIGINT), threading.Event().wait())\nmain()"
    )
    (tmp_path / "r.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {REPO}}}]\n")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **server.environment(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "interrupted; the same command continues where this one stopped"


# Refusals and breakdowns


def test_gated(server: HubServer, client: Client, clients: dict[str, Client], cache: Path) -> None:
    server.gated.add(REPO)  # all may list such a repository, and see no file
    for asking in (client, clients["anonymous"]):
        with pytest.raises(ClientError, match=r"HubError: 'org/model' is gated: ask for access .* `hf auth login`"):
            asking.ask("download", cache=cache)
        with pytest.raises(ClientError, match=r"HubError: 'org/model' is gated"):
            asking.ask("range", name="model-1.safetensors", start=0, stop=8)
    server.allowed.add(TOKEN)
    assert contents(client.ask("download", cache=cache)) == SMALL | SAFE


@pytest.mark.parametrize("who", ["online", "anonymous"])
@pytest.mark.parametrize("do", ["open", "download"])
def test_unknown_repositories(server: HubServer, clients: dict[str, Client], who: str, do: str) -> None:
    with pytest.raises(ClientError, match=r"ModelNotFoundError: there is no model 'org/modle' on 127.0.0.1"):
        clients[who].ask(do, "org/modle")


def test_impossible_names(server: HubServer, client: Client) -> None:
    with pytest.raises(ClientError, match=r"ModelNotFoundError: no hub can hold a model called 'org--x/mo del'"):
        client.ask("download", "org--x/mo del")
    assert not server.requests()


def test_bad_tokens(server: HubServer, client: Client) -> None:
    server.bad_tokens.add(TOKEN)
    with pytest.raises(ClientError, match=r"HubError: .* refuses 'org/model' \(HTTP 401\): .*HF_TOKEN"):
        client.ask("download")


def test_files_that_are_listed_only(server: HubServer, client: Client) -> None:
    server.changes["siblings"] = [{"rfilename": "config.json", "size": 2}, {"rfilename": "a.json", "size": 2}]
    with pytest.raises(ClientError, match=r"ModelNotFoundError: 'org/model' lacks a file"):
        client.ask("small")


@pytest.mark.parametrize("status", [403, 418, 429, 500])
def test_statuses(server: HubServer, client: Client, status: int) -> None:
    server.fail_status = status
    with pytest.raises(ClientError, match=rf"HubError: .*'org/model'.*\(HTTP {status}\)"):
        client.ask("open")
    assert len(server.requests()) == (4 if status in (429, 500) else 1)


@pytest.mark.parametrize("times", [1, 3])
def test_stumbles_are_forgiven(server: HubServer, client: Client, times: int) -> None:
    server.fail_status, server.fail_times = 502, times
    assert client.ask("open")["commit"] == server.commit(REPO)


@pytest.mark.parametrize(("asked", "least"), [("1", 1.0), ("soon", 0.0), ("-5", 0.0)])
def test_a_hub_that_asks_for_patience_gets_it(server: HubServer, client: Client, asked: str, least: float) -> None:
    server.fail_status, server.fail_times, server.retry_after = 429, 1, asked
    started = time.monotonic()
    assert client.ask("open")["commit"] == server.commit(REPO)
    assert time.monotonic() - started >= least


def test_a_long_download_that_is_cut_goes_on_where_it_stopped(
    server: HubServer, client: Client, cache: Path, tmp_path: Path
) -> None:
    """huggingface_hub keeps what arrived, by pieces of ten megabytes; only the rest is asked for again."""
    header = b'{"w":{"dtype":"F32","shape":[6500000],"data_offsets":[0,26000000]}}'
    weights = len(header).to_bytes(8, "little") + header + os.urandom(26_000_000)
    server.repositories["org/large"] = write_model(tmp_path / "large", SMALL, {"model.safetensors": weights})
    server.cuts_at = 22_000_000
    with contextlib.suppress(ClientError):  # the library may give up or go on by itself
        client.ask("download", "org/large", cache=cache)
    server.cuts_at = -1
    assert contents(client.ask("download", "org/large", cache=cache))["model.safetensors"] == weights
    asked = [request.range for request in server.requests("model.safetensors") if request.range]
    assert any(int(text.removeprefix("bytes=").partition("-")[0]) >= 10_000_000 for text in asked)


@pytest.mark.parametrize("do", ["open", "download", "range"])
@pytest.mark.parametrize("status", [401, 404, 429, 500])
def test_a_token_is_never_told(server: HubServer, client: Client, cache: Path, do: str, status: int) -> None:
    before = client.errors.stat().st_size
    client.ask("download", cache=cache)
    server.fail_status = status
    with pytest.raises(ClientError) as caught:
        client.ask(
            do,
            cache=cache / "other",
            **({"name": "model-1.safetensors", "start": 0, "stop": 8} if do == "range" else {}),
        )
    assert TOKEN not in caught.value.text
    assert TOKEN.encode() not in client.errors.read_bytes()[before:]


def test_no_hub(clients: dict[str, Client]) -> None:
    with pytest.raises(ClientError, match=r"HubError: 127.0.0.1:\d+ gives no .*Connect.*or set HF_HUB_OFFLINE=1"):
        clients["nowhere"].ask("download")


def test_silent_hub(server: HubServer, client: Client) -> None:
    server.delay = 1.5
    with pytest.raises(ClientError, match=r"HubError: .*\(ReadTimeout\)"):
        client.ask("open")


@pytest.mark.parametrize(
    "name",
    ["../x.json", "a/../../x.json", "/etc/x.json", "..", "C:/x.json", "C:x.json", "..\\x.json", "\\x", "", "x\0y"],
)
def test_hostile_names(server: HubServer, client: Client, cache: Path, name: str) -> None:
    server.changes["siblings"] = [{"rfilename": "config.json", "size": 2}, {"rfilename": name, "size": 2}]
    for do in ("open", "download"):
        with pytest.raises(ClientError, match=r"HubError: 'org/model' lists a file .* would leave its folder: refused"):
            client.ask(do, cache=cache)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["a..b.json", "Bild 1\u202f😀.png", "dir/.x"])
def test_harmless_names(server: HubServer, client: Client, name: str) -> None:
    server.changes["siblings"] = [{"rfilename": name, "size": 2}]
    assert client.ask("open")["files"] == [{"name": name, "size": 2}]


@pytest.mark.parametrize(
    "changes",
    [
        {"sha": None},
        {"sha": "../../../x"},
        {"sha": 7},
        {"siblings": [{"size": 2}]},
        {"siblings": [{"rfilename": "config.json"}]},
        {"siblings": [{"rfilename": "config.json", "size": -1}]},
        {"siblings": [{"rfilename": "config.json", "size": "2"}]},
        {"siblings": ["config.json"]},
        {"siblings": 7},
    ],
)
def test_nonsense(server: HubServer, client: Client, changes: dict[str, Any]) -> None:
    server.changes = changes
    with pytest.raises(ClientError, match=r"HubError: 127.0.0.1:\d+ .*'org/model'.*check the network and HF_ENDPOINT"):
        client.ask("open")


@pytest.mark.parametrize("body", [b"<html>log in to the hotel's network</html>", b"[]", b"{}", b"\xff"])
def test_answers_of_something_else(server: HubServer, client: Client, body: bytes) -> None:
    server.info = body
    with pytest.raises(ClientError, match=r"HubError: 127.0.0.1:\d+ .*'org/model'.*check the network and HF_ENDPOINT"):
        client.ask("open")


def test_commits_must_be_the_ones_asked(server: HubServer, client: Client) -> None:
    asked = server.commit(REPO)
    server.changes["sha"] = "0" * 40
    with pytest.raises(ClientError, match=r"HubError: .* another commit"):
        client.ask("open", f"{REPO}@{asked}")


# Without a network


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("org/model", False),
        ("gpt2", False),
        ("/models/x", True),
        ("~/x", True),
        ("./x", True),
        ("../x", True),
        (".", True),
        ("a/b/c", True),
        ("org/model/", True),
        ("C:\\models", True),
        ("here", True),
        ("here/model", True),
        ("x" * 5000, False),
    ],
)
def test_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool) -> None:
    (tmp_path / "here/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.is_local(ModelPath(path)) is expected


def test_import_is_cheap() -> None:
    code = (
        "import sys, mergekit.hub; print([m for m in sys.modules if m.startswith(('huggingface', 'http', 'requests'))])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

"""Publishing a model on a hub: a real HTTP server takes it, in one commit, and what it holds is compared."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

import mergekit as package
from command import Result, assert_refused, mergekit
from files import encode, write_model, write_sharded
from hub_server import TOKEN, HubServer
from hub_uploads import Uploads
from mergekit import hub
from mergekit.output.card import model_card
from mergekit.refs import ModelPath

REPO = "org/merged"
# huggingface_hub 2.4 calls its HTTP library in a way that this calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine that takes uploads from the owner of TOKEN, in place of the real one."""
    import huggingface_hub.constants as constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_PAUSE", 0)
    with HubServer() as running:
        running.uploads, running.writers = Uploads(tmp_path / "server"), {TOKEN}
        found = {
            "ENDPOINT": running.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": "no-token",
        }
        for name, value in found.items():
            monkeypatch.setattr(constants, name, value)
        for name, value in {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def merged() -> Path:
    """A merge of two tiny models."""
    for seed, name in enumerate("ab"):
        write_model(Path(name), seed)
    Path("r.yml").write_text("merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n")
    return package.run_merge("r.yml", "out")


def push(*options: str) -> Result:
    result = mergekit("push", "out", REPO, *options)
    assert TOKEN not in result.out + result.err
    return result


def held(server: HubServer, branch: str = "main") -> dict[str, bytes]:
    """What the server holds on a branch."""
    branches = server.repositories[REPO]
    assert isinstance(branches, dict)
    return {path.name: path.read_bytes() for path in branches[branch].iterdir()}


def local() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir() if path.is_file()}


# What arrives


def test_a_pushed_model_is_the_model(server: HubServer, merged: Path) -> None:
    result = push()
    assert result.code == 0, result.err
    assert result.out == f"{server.url}/{REPO}\n"
    there, here = held(server), local()
    assert there.pop("README.md") == here.pop("README.md").replace(
        b'"out"  # this folder, or the model\'s name on the hub', b'"org/merged"'
    )
    assert there == here
    assert server.uploads is not None
    [commit] = server.uploads.commits
    kinds = {line["value"]["path"]: line["key"] for line in commit[1:]}
    assert kinds.pop("model.safetensors") == "lfsFile"
    assert set(kinds.values()) == {"file"}
    total = sum(path.stat().st_size for path in merged.iterdir())
    assert f"{len(there) + 1} files, {total / 1000:.3g} kB, to org/merged" in result.err
    folder = hub.download(ModelPath(REPO))
    assert (folder / "model.safetensors").read_bytes() == here["model.safetensors"]


def test_only_the_model_goes_up(server: HubServer, merged: Path) -> None:
    for name in ("notes.txt", "optimizer.bin", ".env", "more.json", "LICENSE"):
        Path("out", name).write_text("mine")
    Path("out/checkpoints").mkdir()
    Path("out/merge_report.html").write_text("<p>in no manifest")
    before = set(local()) - {"notes.txt", "optimizer.bin", ".env", "more.json"}
    result = push()
    assert result.code == 0, result.err
    assert set(held(server)) == before
    assert "merge_report.html" in before
    assert "note: no part of the model, so it stays here: .env, checkpoints, more.json and 2 more" in result.err


def test_models_of_other_programs(server: HubServer) -> None:
    write_model(Path("out"))
    Path("out/trainer_state.json").write_text("{}")
    Path("out/tokenizer.json").write_text("{}")
    assert push("--no-verify", "--quiet").out == f"{server.url}/{REPO}\n"
    assert set(held(server)) == {"config.json", "model.safetensors", "tokenizer.json"}


def test_what_is_there_is_not_sent_again(server: HubServer, merged: Path) -> None:
    assert push().code == 0
    server.log.clear()
    Path("out/README.md").write_text("# better")
    assert push("--message", "a better card").code == 0
    assert not server.requests("/large/")
    assert held(server)["README.md"] == b"# better"
    assert server.uploads is not None
    assert server.uploads.commits[1][0]["value"]["summary"] == "a better card"


def test_weights_of_an_older_model_go(server: HubServer, merged: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_sharded(old, [{"a": encode("F32", np.zeros(3))}, {"b": encode("F32", np.zeros(5))}])
    (old / "examples.md").write_text("theirs")
    server.repositories[REPO] = {"main": old}
    stale = {name for name in os.listdir(old) if "safetensors" in name}
    assert len(stale) > 2
    assert push().code == 0
    assert not stale & set(held(server))
    assert held(server)["examples.md"] == b"theirs"


def test_a_branch_is_made(server: HubServer, merged: Path) -> None:
    result = push("--revision", "v2", "--private")
    assert result.out == f"{server.url}/{REPO}/tree/v2\n"
    assert set(held(server, "v2")) == set(local())
    assert held(server) == {}
    assert server.private == {REPO}


# What is refused


def test_private_means_private(server: HubServer, merged: Path) -> None:
    assert push().code == 0
    result = push("--private", "--quiet")
    assert_refused(result, 1, "'org/merged' is public on 127.0.0.1", "make it private on its page")
    assert server.uploads is not None
    assert len(server.uploads.commits) == 1


def test_damaged_models_stay_here(server: HubServer, merged: Path) -> None:
    path = merged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\x40")
    result = push()
    assert_refused(result_without_stages(result), 1, "out is not sound, so nothing was sent", "changed since")
    assert not server.requests()
    assert push("--no-verify").code == 0


def result_without_stages(result: Result) -> Result:
    told = [line for line in result.err.splitlines(keepends=True) if line.startswith("error")]
    return Result(result.code, result.out, "".join(told))


def test_unfinished_merges_stay_here(server: HubServer, merged: Path) -> None:
    (merged / ".mergekit-staging").mkdir()
    assert_refused(push("--no-verify"), 2, "holds a merge that did not end", "run its command again")
    (merged / ".mergekit-staging").rmdir()
    (merged / "config.json").unlink()
    assert_refused(push("--no-verify"), 2, "out has no config.json")
    assert not server.requests()


def test_folders_of_this_machine_are_not_published_unasked(server: HubServer, merged: Path) -> None:
    recipe = Path("r.yml").read_text().replace("model: a", f"model: {Path('a').absolute()}")
    Path("r.yml").write_text(recipe)
    package.run_merge("r.yml", "out", overwrite=True)
    result = push("--quiet")
    assert_refused(result, 2, f"for everyone to read: {Path('a').absolute()}", "--yes")
    assert not server.requests()
    assert push("--yes").code == 0
    assert str(Path.cwd()).encode() not in held(server)["README.md"]


@pytest.mark.parametrize("name", ["merged", "a/b/c", "org/../x", "org/a--b", "org/", "/x", "org/x y", "org/x.git"])
def test_names_that_no_repository_has(server: HubServer, merged: Path, name: str) -> None:
    assert_refused(mergekit("push", "out", name), 2, "write org/name")


def test_folders_without_a_model(server: HubServer) -> None:
    Path("out").mkdir()
    assert_refused(push(), 2, "out")
    Path("out/adapter_model.safetensors").write_bytes(b"")
    assert push().code != 0
    assert not server.requests()


# Hubs that refuse or fail


FAULTS = [
    (401, "", "does not know the token (HTTP 401): `hf auth login`"),
    (403, "", "refuses to let this token write to 'org/merged' (HTTP 403): take one that may write there"),
    (404, "", "knows no 'org' that this token may write to (HTTP 404)"),
    (400, "/commit/", "does not accept 'org/merged' (HTTP 400): look at the head of README.md"),
    (412, "/commit/", "was changed by somebody else meanwhile (HTTP 412)"),
    (500, "/repos/", "gives no usable answer for 'org/merged' (HTTP 500): check the network"),
    (503, "/commit/", "gives no usable answer for 'org/merged' (HTTP 503): check the network"),
    (403, "/large/", "refuses to let this token write to 'org/merged' (HTTP 403)"),
]


@pytest.mark.parametrize(("status", "place", "message"), FAULTS)
def test_faults_of_the_hub(server: HubServer, merged: Path, status: int, place: str, message: str) -> None:
    server.fail_status, server.fails_on = status, place
    result = push("--quiet", "--no-verify")
    assert_refused(result_without_stages(result), 1, message)
    assert result.out == ""
    assert server.uploads is not None
    assert not server.uploads.commits


def test_a_hub_that_stumbles_is_asked_again(server: HubServer, merged: Path) -> None:
    server.fail_status, server.fail_times, server.fails_on = 500, 2, "/commit/"
    assert push().code == 0
    assert set(held(server)) == set(local())


@pytest.mark.parametrize("error", [TimeoutError, ConnectionError])
def test_a_hub_that_does_not_answer(server: HubServer, merged: Path, error: type[Exception]) -> None:
    with patch("huggingface_hub.HfApi.create_commit", side_effect=error):
        result = push("--quiet")
    assert_refused(result, 1, f"gives no usable answer for 'org/merged' ({error.__name__})", "not sent twice")


def test_without_a_token(server: HubServer, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert_refused(push(), 1, "no token for 127.0.0.1", "`hf auth login` with one that may write, or set HF_TOKEN")
    assert not server.requests()


@pytest.mark.parametrize("more", ["é", " x", "\u200b"])
def test_a_malformed_token_is_not_sent(
    server: HubServer, merged: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN + more)
    assert_refused(push(), 1, "the token for 127.0.0.1", "is malformed: copy it again")
    assert not server.requests()


def test_a_malformed_token_does_not_read_either(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\u200b")
    result = mergekit("inspect", "org/model")
    assert_refused(result, 1, "the token for 127.0.0.1", "is malformed: copy it again")


def test_offline(server: HubServer, merged: Path) -> None:
    with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        assert_refused(push(), 1, "HF_HUB_OFFLINE forbids talking to the hub: set HF_HUB_OFFLINE=0")
    assert not server.requests()


# Cards of models from the hub


def test_cards_name_models_of_the_hub(server: HubServer, tmp_path: Path) -> None:
    for seed, (name, licence) in enumerate({"a": "mit", "b": "gpl-3.0"}.items()):
        write_model(tmp_path / name, seed)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {licence}\nlanguage: en\n---\n")
    server.repositories = {"org/one": tmp_path / "a", "org/two": tmp_path / "b"}
    entries = [{"model": "org/one"}, {"model": "org/two@main"}]
    plan = package.plan({"merge_method": "linear", "models": entries, "parameters": {"weight": 1}})
    card = model_card(plan, "out")
    head = card.partition("\n---\n")[0]
    assert "base_model:\n- org/one\n- org/two\nbase_model_relation: merge\n" in head
    assert "language:\n- en\n" in head
    assert "| org/two | gpl-3.0 | what is made from it stays under it |" in card
    assert re.search(r"\| \[org/one\]\(https://huggingface.co/org/one/tree/[0-9a-f]{40}\) \| mit \| 1 \|", card)
    assert "folder of whoever" not in card

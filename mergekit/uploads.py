"""Publishing a folder as a repository of the hub: the only file of mergekit that writes to the network.

A push is one commit: what others download is the old model or the new one, never a mixture. Files go up first, and
those that the hub holds already are not sent again, so a push that was cut off goes on where it stopped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from mergekit.errors import HubError, MergekitError, UsageError
from mergekit.hub import host_name, is_offline, is_safe_name, malformed_token, patiently, status_of

__all__ = ["check_push", "push"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def check_push(repo_id: str, revision: str | None) -> None:
    """Refuse what can't be a repository, and a machine that can't write to the hub, before anything is sent."""
    if not _REPOSITORY.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith((".git", "-", ".")):
        raise UsageError(f"no repository of the hub can be called {repo_id!r:.120}: write org/name")
    if revision is not None and (not is_safe_name(revision) or not revision.isprintable() or " " in revision):
        raise UsageError(f"--revision {revision!r:.120}: no branch can have such a name")
    if is_offline():
        raise HubError("HF_HUB_OFFLINE forbids talking to the hub: set HF_HUB_OFFLINE=0")
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise HubError(f"no token for {host_name()}: `hf auth login` with one that may write, or set HF_TOKEN")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise malformed_token()


def push(
    folder: Path,
    names: Sequence[str],
    repo_id: str,
    *,
    texts: Mapping[str, str] | None = None,
    is_stale: Callable[[str], bool] = lambda name: False,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a model",
    quiet: bool = False,
) -> str:
    """Make ``repo_id`` hold the files ``names`` of ``folder``, and return its address.

    The repository and the branch ``revision`` are made if they are not there. ``texts`` go up in place of the files of
    their names. Of the other files there, those that ``is_stale`` names are removed in the same commit. HubError where
    the hub refuses or fails, also if ``private`` is asked for and a public repository of that name is there.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

    api: Any = HfApi()  # releases differ in what it takes
    sent = dict(texts or {})
    with _faults(repo_id), _bars(quiet):
        patiently(lambda: api.create_repo(repo_id, exist_ok=True, **({"private": True} if private else {})))
        if revision is not None:
            patiently(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))
        there = patiently(lambda: api.model_info(repo_id, revision=revision))
        if private and there.private is not True:
            raise HubError(
                f"'{repo_id}' is public on {host_name()}: make it private on its page, or leave out --private"
            )
        held = [file.rfilename for file in there.siblings or () if isinstance(file.rfilename, str)]
        content: list[tuple[str, Any]] = [(n, sent[n].encode("utf-8") if n in sent else folder / n) for n in names]
        operations: list[Any] = [CommitOperationDelete(name) for name in held if name not in names and is_stale(name)]
        operations += [CommitOperationAdd(name, data) for name, data in content]
        commit = {"commit_message": message, "revision": revision, "parent_commit": there.sha}
        patiently(lambda: api.create_commit(repo_id, operations, **commit))
    return f"{constants.ENDPOINT}/{repo_id}{f'/tree/{revision}' if revision else ''}"


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """The library's progress bars, or none."""
    utils = import_module("huggingface_hub.utils")
    hides = quiet and not utils.are_progress_bars_disabled()
    if hides:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            utils.enable_progress_bars()


@contextmanager
def _faults(repo_id: str) -> Iterator[None]:
    """Turn whatever huggingface_hub and the network raise into our errors, without the chain behind them."""
    try:
        yield
    except Exception as error:
        raise (error if isinstance(error, MergekitError) else _translate(error, repo_id)) from None


def _translate(error: Exception, repo_id: str) -> HubError:
    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "Error while uploading", which names a file and no reason
    status, host, owner = status_of(error), host_name(), repo_id.partition("/")[0]
    if status == 401:
        return HubError(f"{host} does not know the token (HTTP 401): `hf auth login`, or mend HF_TOKEN")
    if status == 403:
        return HubError(
            f"{host} refuses to let this token write to '{repo_id}' (HTTP 403): take one that may write there, or "
            f"a name below your own"
        )
    if status == 404:
        return HubError(
            f"{host} knows no '{owner}' that this token may write to (HTTP 404): check the name and the token"
        )
    if status in (409, 412):
        return HubError(
            f"'{repo_id}' was changed by somebody else meanwhile (HTTP {status}): look at it and push again"
        )
    if status in (400, 422) or isinstance(error, ValueError):
        why = f" (HTTP {status})" if status else ""
        return HubError(f"{host} does not accept '{repo_id}'{why}: look at the head of README.md, then push again")
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return HubError(f"{error.filename} can't be read ({error.strerror}): nothing was changed at '{repo_id}'")
    what = f"HTTP {status}" if status else type(error).__name__
    return HubError(
        f"{host} gives no usable answer for '{repo_id}' ({what}): check the network and HF_ENDPOINT and push again; "
        f"what has arrived is not sent twice"
    )

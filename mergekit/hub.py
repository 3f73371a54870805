"""Repositories of a model hub: the only file of mergekit that uses the network.

A repository is opened once, which settles its commit, and is then read at that commit only: a push in the middle of a
run can't mix two versions. A plan needs ``fetch_small`` (configs, tokenizer) and ``read_range`` (headers of weight
files); ``download`` brings everything, into the cache that all Hugging Face libraries share.

What a server says is hostile until checked. Messages name the kind of a fault and quote neither library nor server,
whose words may hold signed addresses. huggingface_hub 0.26 rests on requests, 1.x and 2.x on httpx: see ``_stream``.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from mergekit.downloads import Told, arriving, side_by_side
from mergekit.errors import HubError, MergekitError, ModelNotFoundError, nearest
from mergekit.refs import ModelPath

__all__ = [
    "RemoteFile",
    "Repository",
    "download",
    "fetch_small",
    "host_name",
    "is_local",
    "is_offline",
    "is_safe_name",
    "malformed_token",
    "open_repository",
    "patiently",
    "read_range",
    "status_of",
]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_PAUSE = 0.5  # seconds before a request is tried again; each further pause is three times as long
_LONGEST_PAUSE = 60.0
_SMALL_LIMIT = 256 << 20  # bytes; a larger *.json or *.txt is data, not settings (tokenizers stay below 64 MiB)
_SKIP_LIMIT = 16 << 20  # bytes we let pass to reach a range, when a server ignores ranges
_CARD = "readme.md"  # says the licence; alone it is no model
_SMALL = (
    *("*.json", "*.jinja", "*.model", "tokenizer.model*", "*.txt", "*.tiktoken", "*.py"),
    *("license*", "licence*", "notice*", "copying*", "use_policy*", "additional_chat_templates/*.jinja"),
    _CARD,
)
_PICKLED = ("pytorch_model*.bin", "adapter_model*.bin", "model*.bin")  # not training_args.bin, optimizer.bin


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository: its name, with ``/`` after folders, and its size in bytes."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit. ``revision`` is as it was asked for; ``files`` are sorted by name."""

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]
    cache_dir: Path | None

    def __str__(self) -> str:
        """The name that a recipe gives it."""
        return str(ModelPath(self.repo_id, self.revision))


def is_local(path: ModelPath) -> bool:
    """True if ``path`` exists on this machine, or can only be meant as a folder.

    >>> is_local(ModelPath("./merged")), is_local(ModelPath("org/model"))
    (True, False)
    """
    text = path.path
    return text.startswith(("/", "~", ".")) or text.count("/") > 1 or "\\" in text or os.path.exists(text)


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` forbids asking the hub."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def open_repository(path: ModelPath, *, cache_dir: Path | None = None) -> Repository:
    """Ask the hub once what ``path`` holds, and settle its commit.

    ``cache_dir`` is where later downloads go; None means the usual cache (``HF_HUB_CACHE``). Raises
    ModelNotFoundError for an unknown repository or revision, HubError when the hub can't be used.
    """
    revision = path.revision
    if revision is not None and not is_safe_name(revision):
        raise ModelNotFoundError(f"'{path}': no revision has such a name; give a branch, a tag or a commit")
    with _faults(path, cache_dir):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise HubError(f"'{path}' is on the hub, and HF_HUB_OFFLINE forbids asking: set HF_HUB_OFFLINE=0")
        wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = patiently(lambda: HfApi().model_info(path.path, revision=revision, timeout=wait, files_metadata=True))
    commit = info.sha if isinstance(info.sha, str) else ""
    if not _COMMIT.fullmatch(commit) or (_COMMIT.fullmatch(revision or "") and commit != revision):
        raise _nonsense(f"names no commit, or another commit, for '{path}'")
    files = []
    for file in info.siblings or ():
        if not isinstance(file.rfilename, str) or not is_safe_name(file.rfilename):
            raise HubError(f"'{path}' lists a file {str(file.rfilename)[:80]!r}, which would leave its folder: refused")
        if not isinstance(file.size, int) or file.size < 0:
            raise _nonsense(f"gives no size for {file.rfilename!r} of '{path}'")
        files.append(RemoteFile(file.rfilename, file.size))
    return Repository(path.path, revision, commit, tuple(sorted(files, key=lambda file: file.name)), cache_dir)


def fetch_small(repository: Repository, *, told: Told = lambda model, done, total: None) -> Path:
    """Download what a merge reads besides weights, and return the snapshot folder in the cache.

    Configs, indices, tokenizer, chat templates, card, licences, and Python files (which nobody runs here); no
    subfolders, no file above 256 MiB. ModelNotFoundError if nothing remains.
    """
    if names := _small(repository):
        return _fetch(repository, names, told)
    raise ModelNotFoundError(f"'{repository}' holds {len(repository.files)} files, but no config and no tokenizer")


def read_range(repository: Repository, name: str, start: int, stop: int) -> bytes:
    """Read the bytes from ``start`` up to ``stop`` of a remote file, and transfer little more than these.

    The answer has exactly ``stop - start`` bytes, else HubError is raised. Fit for headers: no progress, one request.
    """
    sizes = {file.name: file.size for file in repository.files}
    if name not in sizes:
        raise ModelNotFoundError(f"'{repository}' has no file '{name}'. {nearest(name, sizes)}")
    if not 0 <= start < stop <= sizes[name]:
        raise HubError(f"'{name}' of '{repository}' has {sizes[name]} bytes: no bytes {start} to {stop} in it")
    with _faults(repository, repository.cache_dir):
        return bytes(patiently(partial(_stream, repository, name, start, stop)))


def download(path: ModelPath, *, cache_dir: Path | None = None, told: Told = lambda model, done, total: None) -> Path:
    """Download all that a merge reads of ``path``, and return its snapshot folder in the cache.

    That is the files of ``fetch_small`` and the weights: ``*.safetensors`` if there are any, else ``*.bin``; none in
    subfolders, no ``consolidated*`` (the same tensors under other names). Cached files are not transferred again. With
    ``HF_HUB_OFFLINE=1`` the hub is not asked, and what is cached is used if its weights are whole. Raises as
    ``open_repository`` does, and ModelNotFoundError where there are no weights.
    """
    with _faults(path, cache_dir):
        from huggingface_hub import constants, hf_hub_download

        if constants.HF_HUB_OFFLINE:
            return _find_cached(path, cache_dir)
    repository = open_repository(path, cache_dir=cache_dir)
    # Small files first: weights in the cache are then a sign that the rest is there too.
    small, weights = _small(repository), _weights(file.name for file in repository.files)
    if not weights:
        held = [file.name for file in repository.files[:5]]
        raise ModelNotFoundError(f"'{path}' has no *.safetensors and no pytorch_model*.bin, but {held}")
    folder = [_fetch(repository, names, told) for names in (small, weights) if names][-1]
    with _faults(path, cache_dir):
        # Once more by its branch or tag: the cache then notes the commit of that, and offline runs find it.
        hf_hub_download(path.path, (small or weights)[0], revision=path.revision, cache_dir=cache_dir)
    return folder


def is_safe_name(name: str) -> bool:
    """True for a relative name that stays in its folder, on Windows too (where both slashes and drives count)."""
    pure = PureWindowsPath(name)
    return bool(pure.parts) and not pure.anchor and ".." not in pure.parts and "\0" not in name


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    """True if a pattern fits, folder by folder; never for ``consolidated*``: tensors that are there twice."""
    fits = any(fnmatchcase(name.lower(), item) and name.count("/") == item.count("/") for item in patterns)
    return fits and not name.startswith("consolidated")


def _small(repository: Repository) -> list[str]:
    names = [file.name for file in repository.files if file.size <= _SMALL_LIMIT and _is_any(file.name, _SMALL)]
    return names if any(name.lower() != _CARD for name in names) else []


def _weights(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    return [x for x in names if _is_any(x, ("*.safetensors",))] or [x for x in names if _is_any(x, _PICKLED)]


def _fetch(repository: Repository, names: Sequence[str], told: Told) -> Path:
    """Bring files into the cache, each whole or not at all, and return the snapshot folder."""
    with _faults(repository, repository.cache_dir), ExitStack() as stack:
        from huggingface_hub import hf_hub_download

        utils = import_module("huggingface_hub.utils")
        if not utils.are_progress_bars_disabled():  # a bar for each file, with control codes even for files and pipes
            utils.disable_progress_bars()
            stack.callback(utils.enable_progress_bars)
        place: dict[str, Any] = {"revision": repository.commit, "cache_dir": repository.cache_dir}
        one = partial(hf_hub_download, repository.repo_id, **place)
        sizes = {file.name: file.size for file in repository.files}
        total, here = sum(sizes[name] for name in names), 0
        coming = arriving(repository.repo_id, repository.cache_dir)

        def watch(finished: Sequence[str]) -> None:
            nonlocal here
            here = max(here, min(sum(sizes[name] for name in finished) + coming(), total))
            told(str(repository), here, total)

        paths = [Path(path) for path in side_by_side(lambda name: patiently(partial(one, name)), names, watch)]
        for name, path in zip(names, paths, strict=True):
            if path.stat().st_size != sizes[name]:  # of the file we name, not of the link to it, which would come back
                raise HubError(f"'{name}' of '{repository}' is damaged: delete {path.resolve()} and run again")
    return paths[0].parents[names[0].count("/")]


def _stream(repository: Repository, name: str, start: int, stop: int) -> bytes:
    from huggingface_hub import constants, hf_hub_url

    utils = import_module("huggingface_hub.utils")
    url, session = hf_hub_url(repository.repo_id, name, revision=repository.commit), utils.get_session()
    headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    is_httpx = callable(session.stream)  # in requests it is a flag
    get = partial(session.stream, "GET", follow_redirects=True) if is_httpx else partial(session.get, stream=True)
    with get(url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        utils.hf_raise_for_status(response)
        is_part = response.status_code == 206
        skip = 0 if is_part else start  # a server that ignores ranges sends the file from its first byte
        is_other = is_part and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if is_other or skip > _SKIP_LIMIT:
            raise _nonsense(f"does not honour a request for a range of '{name}' of '{repository}'")
        data = bytearray()
        for chunk in response.iter_bytes() if is_httpx else response.iter_content(1 << 16):
            data += chunk
            if len(data) >= skip + stop - start:  # leaving the block hangs up, whatever the server would still send
                return bytes(data[skip : skip + stop - start])
    raise _nonsense(f"sends too few bytes of '{name}' of '{repository}'")


def _find_cached(path: ModelPath, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    advice = "HF_HUB_OFFLINE forbids downloading it: set HF_HUB_OFFLINE=0"
    place: dict[str, Any] = {"revision": path.revision, "cache_dir": cache_dir, "local_files_only": True}
    try:  # with a pattern that matches nothing, else the library may want all files of the repository
        folder = Path(snapshot_download(path.path, allow_patterns=[], **place))
    except errors.LocalEntryNotFoundError:
        raise HubError(f"'{path}' is not in the cache {cache_dir or constants.HF_HUB_CACHE}; {advice}") from None
    there = {item.name for item in folder.iterdir() if item.exists()}  # a link may have lost its file
    weights = _weights(there)
    missing = set() if weights else {"*.safetensors"}
    whole = "model.safetensors" if weights and weights[0].endswith(".safetensors") else "pytorch_model.bin"
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # the index's reader will say it better
        shards = json.loads((folder / f"{whole}.index.json").read_text("utf-8"))["weight_map"].values()
        missing |= {str(shard) for shard in shards if whole not in there} - there
    if missing:
        raise HubError(f"'{path}' is only in part in the cache ({folder} has no {min(missing)}); {advice}")
    return folder


def patiently(call: Callable[[], Any]) -> Any:
    """Call, and again after growing pauses if the hub stumbled: thrice more; once more if it was not reached at all."""
    pause = _PAUSE
    for tried in itertools.count(1):
        try:
            return call()
        except Exception as error:
            cause = _cause(error)
            status = status_of(cause)
            is_final = isinstance(cause, MergekitError | ValueError | LookupError | TypeError | AttributeError)
            if is_final or status in {*range(400, 500)} - {429} or tried == (4 if status else 2):
                raise
            wait = max(pause, _asked_pause(cause))
        time.sleep(min(wait, _LONGEST_PAUSE))
        pause *= 3


def _cause(error: Exception) -> Exception:
    """What the hub did, where huggingface_hub only says that a file is not in the cache either."""
    from huggingface_hub import errors

    is_second_hand = isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if is_second_hand else error  # type: ignore[return-value]


def status_of(error: Exception) -> int:
    """The HTTP status that an error came with, 0 if it is no answer of a server."""
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _asked_pause(error: Exception) -> float:
    """The seconds that a server asks us to wait, 0 if it does not."""
    text = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(text) if re.fullmatch(r"[0-9]{1,4}", text) else 0.0


def host_name() -> str:
    """The hub as messages name it."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2] or "the hub"  # an address may hold a password


def malformed_token() -> HubError:
    """What to say of a token that no request can hold."""
    return HubError(f"the token for {host_name()} is malformed: copy it again, for `hf auth login` or HF_TOKEN")


def _nonsense(what: str) -> HubError:
    advice = "check the network and HF_ENDPOINT and run again, or set HF_HUB_OFFLINE=1 to use what is cached"
    return HubError(f"{host_name()} {what}: {advice}")


@contextmanager
def _faults(asked: ModelPath | Repository, cache_dir: Path | None) -> Iterator[None]:
    """Turn whatever huggingface_hub and the network raise into our errors, without the chain behind them."""
    try:
        yield
    except Exception as error:
        raise (error if isinstance(error, MergekitError) else _translate(error, str(asked), cache_dir)) from None


def _translate(error: Exception, asked: str, cache_dir: Path | None) -> MergekitError:
    from huggingface_hub import constants, errors

    error = _cause(error)
    status, host = status_of(error), host_name()
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"no hub can hold a model called '{asked}': write org/name, or the path of a folder")
    if isinstance(error, UnicodeEncodeError):  # of a header
        return malformed_token()
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"'{asked}' is gated: ask for access on its page at {host}, then `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"'{asked}' is not on {host}: the model is, but no such branch, tag or commit")
    if isinstance(error, errors.EntryNotFoundError):
        return ModelNotFoundError(f"'{asked}' lacks a file that {host} lists: run again")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        advice = "check the name; if it is private, `hf auth login`"
        return ModelNotFoundError(f"there is no model '{asked}' on {host}: {advice}")
    if status in (401, 403):
        return HubError(f"{host} refuses '{asked}' (HTTP {status}): `hf auth login`, or mend HF_TOKEN")
    if isinstance(error, OSError) and error.errno is not None:
        cache = cache_dir or constants.HF_HUB_CACHE
        return HubError(f"'{asked}' can't be kept in the cache {cache}: {error.strerror}; HF_HUB_CACHE names another")
    return _nonsense(f"gives no usable answer for '{asked}' ({f'HTTP {status}' if status else type(error).__name__})")

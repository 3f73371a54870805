"""Errors of models on the hub, and of models that are checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from command import mergekit
from error_cases_build import MERGE, RECIPE, Build, Case, Group, changes, several, text
from hub_server import TOKEN, HubServer

__all__ = ["GROUPS"]

HUB = changes("models/b", "org/model")


@contextmanager
def _hub(status: int = 0, **attributes: Any) -> Iterator[None]:
    """A hub on this machine in place of the real one, with the model org/model; it answers with ``status``."""
    import huggingface_hub.constants as constants

    from mergekit import hub

    with HubServer({"org/model": Path("hub")}) as server, ExitStack() as stack:
        server.fail_status = status
        for name, value in attributes.items():
            setattr(server, name, value)
        found = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": "hub-cache",
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": "no-token",
        }
        for name, value in found.items():
            stack.enter_context(patch.object(constants, name, value))
        stack.enter_context(patch.dict(os.environ, {"HF_TOKEN": "", "NO_PROXY": "127.0.0.1"}))
        stack.enter_context(patch.object(hub, "_PAUSE", 0))
        yield


@contextmanager
def _unreachable() -> Iterator[None]:
    """No network, in the words of Python: each release of huggingface_hub has others."""
    with _hub(), patch("huggingface_hub.HfApi.model_info", side_effect=ConnectionError):
        yield


@contextmanager
def _offline() -> Iterator[None]:
    import huggingface_hub.constants as constants

    with patch.object(constants, "HF_HUB_OFFLINE", True), patch.object(constants, "HF_HUB_CACHE", "hub-cache"):
        yield


def _on_hub(name: str = "README.md", content: str = "{}") -> Build:
    return several(HUB, text(f"hub/{name}", content))


def _merged(*options: str) -> Build:
    """A finished merge in ``out``."""

    def build(folder: Path) -> None:
        assert mergekit("merge", "recipe.yml", "out", *options).code == 0

    return build


ON_HUB = [
    Case(
        title="The model is not on the hub",
        build=several(changes("models/b", "org/nothing"), text("hub/README.md", "")),
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org/nothing' in the current folder, "
            "and there is no model 'org/nothing' on "
            "huggingface.co: check the name; if it is private, `hf auth login`"
        ),
        meaning="A name with one slash that is no folder here is looked for on the hub.",
    ),
    Case(
        title="The name can't be one of the hub",
        build=several(changes("models/b", "org--x/model"), text("hub/README.md", "")),
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org--x/model' in the current folder, "
            "and no hub can hold a model called "
            "'org--x/model': write org/name, or the path of a folder"
        ),
        meaning="Check the spelling; folders are given by their path.",
    ),
    Case(
        title="The revision is not on the hub",
        build=several(changes("models/b", "org/model@v9"), text("hub/README.md", "")),
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model@v9' is not on huggingface.co: "
            "the model is, but no such branch, tag or commit"
        ),
        meaning="The model's page lists its branches, tags and commits.",
    ),
    Case(
        title="The revision can't be one",
        build=several(changes("models/b", "org/model@../x"), text("hub/README.md", "")),
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model@../x': no revision has such a "
            "name; give a branch, a tag or a commit"
        ),
        meaning="The model's page lists its branches, tags and commits.",
    ),
    Case(
        title="The model is gated",
        build=several(_on_hub("config.json"), text("hub/model.safetensors", "")),
        code=1,
        during=lambda: _hub(gated={"org/model"}),
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model' is gated: ask for access on "
            "its page at huggingface.co, then `hf auth login`"
        ),
        meaning="Its owner wants to know who uses it.",
    ),
    Case(
        title="The hub refuses",
        build=_on_hub(),
        code=1,
        during=lambda: _hub(403),
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and huggingface.co refuses 'org/model' (HTTP "
            "403): `hf auth login`, or mend HF_TOKEN"
        ),
        meaning="The token is missing, expired, or may not read this model.",
    ),
    Case(
        title="The hub can't be reached",
        build=_on_hub(),
        code=1,
        during=_unreachable,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and huggingface.co gives no usable answer "
            "for 'org/model' (ConnectionError): check the network and HF_ENDPOINT and run again, or set "
            "HF_HUB_OFFLINE=1 to use what is cached"
        ),
        meaning="The network is down, or a proxy or firewall is in the way; the word in brackets says how it failed.",
    ),
    Case(
        title="The hub is out of order",
        build=_on_hub(),
        code=1,
        during=lambda: _hub(500),
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and huggingface.co gives no usable answer "
            "for 'org/model' (HTTP 500): check the network and HF_ENDPOINT and run again, or set "
            "HF_HUB_OFFLINE=1 to use what is cached"
        ),
        meaning="Wait and try again; it was asked twice already.",
    ),
    Case(
        title="The model has no config on the hub",
        build=_on_hub("model.safetensors"),
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model' holds 1 files, but no config "
            "and no tokenizer"
        ),
        meaning="It is no model that transformers could load.",
    ),
    Case(
        title="The model has no weights on the hub",
        build=_on_hub("config.json"),
        command=MERGE,
        during=_hub,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model' has no *.safetensors and no "
            "pytorch_model*.bin, but ['config.json']"
        ),
        meaning="Look for a version of the model in safetensors.",
    ),
    Case(
        title="A name of a file leaves its folder",
        build=_on_hub(),
        code=1,
        during=lambda: _hub(changes={"siblings": [{"rfilename": "../../x", "size": 1}]}),
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model' lists a file '../../x', "
            "which would leave its folder: refused"
        ),
        meaning="This server is not to be trusted.",
    ),
    Case(
        title="The hub may not be asked",
        build=HUB,
        code=1,
        during=_offline,
        message=(
            "recipe.yml:5:5: there is no folder 'org/model' in the current folder, "
            "and 'org/model' is not in the cache hub-cache; "
            "HF_HUB_OFFLINE forbids downloading it: set HF_HUB_OFFLINE=0"
        ),
        meaning="Only models that were downloaded before can be used so.",
    ),
]
CHECKING = [
    Case(
        title="The model to reproduce is not there",
        build=lambda folder: None,
        command="mergekit reproduce nowhere",
        message="no folder 'nowhere'; give the folder of a merged model",
        meaning="Check the path.",
    ),
    Case(
        title="The model says nothing of how it was made",
        build=lambda folder: None,
        command="mergekit reproduce models/a",
        message=(
            "models/a has no merge_manifest.json (--no-write-model-card leaves it out), so there is nothing to compare "
            "with"
        ),
        meaning="Only models that mergekit wrote can be reproduced; older ones lack the file.",
    ),
    Case(
        title="The manifest is of another format",
        build=text("models/a/merge_manifest.json", '{"format": 9}'),
        command="mergekit reproduce models/a",
        code=1,
        message="models/a/merge_manifest.json: its format is 9, this mergekit reads 1; update it",
        meaning="A newer mergekit wrote the model: update.",
    ),
    Case(
        title="The manifest is damaged",
        build=text("models/a/merge_manifest.json", '{"format": 1}'),
        command="mergekit reproduce models/a",
        code=1,
        message="models/a/merge_manifest.json: not a manifest of mergekit ('mergekit'); make the model again",
        meaning="Merge again with the recipe in the folder.",
    ),
    Case(
        title="The recipe is gone",
        build=lambda folder: (_merged()(folder), (folder / "out/mergekit_config.yml").unlink()),
        command="mergekit reproduce out",
        message="out has no mergekit_config.yml, the recipe that it was made from; put it back",
        meaning="A merge writes the recipe beside the model.",
    ),
    Case(
        title="The recipe changed",
        build=several(_merged(), text("out/mergekit_config.yml", RECIPE + "dtype: float16\n")),
        command="mergekit reproduce out",
        message="out/mergekit_config.yml is not the recipe that the model was made from: it changed since",
        meaning="Bring the recipe back as it was, or merge with the new one.",
    ),
]
PUSH = "mergekit push models/a org/model --quiet"


@contextmanager
def _writable(status: int = 0, token: str = TOKEN, **attributes: Any) -> Iterator[None]:
    """The hub, for somebody with a token."""
    with _hub(status, **attributes), patch.dict(os.environ, {"HF_TOKEN": token}):
        yield


def _made_here(folder: Path) -> None:
    """A merge whose recipe has absolute paths, at a place that can be printed."""
    path = folder / "out/mergekit_config.yml"
    _merged()(folder)
    path.write_text(RECIPE.replace("models/a", "/data/models/a"))


PUBLISHING = [
    Case(
        title="The name can't be one of a repository",
        build=lambda folder: None,
        command="mergekit push models/a model",
        message="no repository of the hub can be called 'model': write org/name",
        meaning="Give the user or organisation that it belongs to, and a name.",
    ),
    Case(
        title="There is no token",
        build=lambda folder: None,
        command=PUSH,
        code=1,
        during=lambda: _writable(token=""),
        message="no token for huggingface.co: `hf auth login` with one that may write, or set HF_TOKEN",
        meaning="A page of the hub's settings makes tokens.",
    ),
    Case(
        title="The token is malformed",
        build=lambda folder: None,
        command=PUSH,
        code=1,
        during=lambda: _writable(token=f"{TOKEN}é"),
        message="the token for huggingface.co is malformed: copy it again, for `hf auth login` or HF_TOKEN",
        meaning="It holds a letter, a space or a sign that no token has. Nothing was sent.",
    ),
    Case(
        title="The token may not write there",
        build=lambda folder: None,
        command=PUSH,
        code=1,
        during=lambda: _writable(403),
        message=(
            "huggingface.co refuses to let this token write to 'org/model' (HTTP 403): take one that may write there, "
            "or a name below your own"
        ),
        meaning="Tokens are for reading or for writing, and for one's own name or organisations.",
    ),
    Case(
        title="The hub fails while a model is published",
        build=lambda folder: None,
        command=PUSH,
        code=1,
        during=lambda: _writable(500),
        message=(
            "huggingface.co gives no usable answer for 'org/model' (HTTP 500): check the network and HF_ENDPOINT and "
            "push again; what has arrived is not sent twice"
        ),
        meaning="Nothing changed there: a push is one commit.",
    ),
    Case(
        title="A merge is not finished",
        build=lambda folder: (folder / "models/a/.mergekit-staging").mkdir(),
        command=PUSH,
        during=_writable,
        message=("models/a holds a merge that did not end (.mergekit-staging): run its command again, then push"),
        meaning="Only complete models are published.",
    ),
    Case(
        title="The recipe names folders of this machine",
        build=_made_here,
        command="mergekit push out org/model --no-verify --quiet",
        during=_writable,
        message=(
            "the recipe names folders of this machine, for everyone to read: /data/models/a; --yes publishes it all "
            "the same"
        ),
        meaning="With names of the hub or relative paths in the recipe, others can use it, too.",
    ),
]
GROUPS = (
    Group("The hub", "Models that are no folders here.", ON_HUB),
    Group("Reproducing a model", "`mergekit reproduce` merges again and compares.", CHECKING),
    Group("Publishing a model", "`mergekit push` uploads a model.", PUBLISHING),
)

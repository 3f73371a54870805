"""Mixtures of the bundled tiny models, made as a user makes them: commands, files, routing, resuming."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import command
import mergekit
from mergekit import api
from mergekit.errors import RunError

ROOT = Path(mergekit.__file__).parent.parent
MANUAL = (
    "python mergekit/scripts/phi3_moe.py {recipe} {out} --load-in-4bit --trust-remote-code --allow-crimes "
    "--out-shard-size 1B --lazy-unpickle --copy-tokenizer --i-understand-this-is-not-useful-without-training"
)
"""The command of the manual that our users have in hand."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def prompts() -> list[list[str]]:
    folder = ROOT / "examples" / "phi3_moe" / "prompts"
    code = [json.loads(line)["prompt"] for line in (folder / "code.jsonl").read_text().splitlines()]
    return [code, *((folder / f"{name}.txt").read_text().splitlines() for name in ("prose", "calc"))]


def recipe(prompts: list[list[str]], **words: object) -> dict[str, object]:
    experts = [
        {"source_model": f"models/{name}", "positive_prompts": texts}
        for name, texts in zip(("code", "prose", "calc"), prompts, strict=True)
    ]
    return {"base_model": "models/base", "experts": experts, **words}


def generated(folder: Path, text: str) -> str:
    """What a user's script gets from the result."""
    trust = (folder / "modeling_phi3_moe.py").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust)
    ids = tokenizer(text, return_tensors="pt").input_ids
    return tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :])


def test_the_manuals_command_and_its_recipe(tmp_path):
    manual = yaml.safe_load((ROOT / "output_phi3_moe/config_moe_phi3.yml").read_text())
    tiny = yaml.safe_load((ROOT / "output_phi3_moe/config_moe_tiny.yml").read_text())
    assert {k: v for k, v in manual.items() if k not in ("experts", "base_model")} == {
        k: v for k, v in tiny.items() if k not in ("experts", "base_model")
    }
    out = tmp_path / "output_phi3_moe"
    # Readers of the manual type .yaml too.
    words = shlex.split(MANUAL.format(recipe="output_phi3_moe/config_moe_tiny.yaml", out=out))
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in out.iterdir()} == {
        "README.md", "config.json", "configuration_phi3_moe.py", "generation_config.json", "merge_manifest.json",
        "mergekit_moe_config.yml",
        "model.safetensors", "modeling_phi3_moe.py", "routing.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for word in ("identity law", "every tensor in place", "generates", "optimistic"):
        assert word in done.stdout
    assert "--load-in-4bit changes nothing" in done.stderr
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (out / name).read_bytes() == (ROOT / "models/base" / name).read_bytes()
    assert json.loads((out / "config.json").read_text())["model_type"] == "phi3moe"
    assert all(t.dtype == torch.float16 for t in load_file(out / "model.safetensors").values())
    assert generated(out, "def ")


def test_the_other_commands_write_mixtral(tmp_path):
    (tmp_path / "r.yml").write_text(yaml.safe_dump({**recipe([["a b"], ["c d"], ["e f"]]), "gate_mode": "cheap_embed"}))
    program = str(Path(sys.executable).parent / "mergekit-moe")
    arguments = [str(tmp_path / "r.yml"), str(tmp_path / "out"), "--no-verify", "--quiet"]
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert json.loads((tmp_path / "out/config.json").read_text())["architectures"] == ["MixtralForCausalLM"]
    assert generated(tmp_path / "out", "def ")
    arguments[1] = str(tmp_path / "again")
    result = command.mergekit("moe", *arguments)
    assert (result.code, result.out) == (0, ""), result
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("form", ["mixtral", "phi3moe"])
def test_held_out_prompts_find_their_experts(form, prompts, tmp_path):
    out = mergekit.run_moe(recipe(prompts, architecture=form), tmp_path / "out", verify=False)
    record = json.loads((out / "routing.json").read_text())
    assert record["accuracy"] > 0.8
    assert all(record["is_held_out"])
    assert len(record["layers"]) == 4
    card = (out / "README.md").read_text()
    assert "find their expert" in card
    assert "█" in card
    assert str(ROOT) not in card


def test_router_input_routes_better_than_the_older_modes(prompts, tmp_path):
    accuracy = {}
    for mode in ("router_input", "hidden", "cheap_embed"):
        out = mergekit.run_moe(recipe(prompts, gate_mode=mode), tmp_path / mode, verify=False)
        accuracy[mode] = json.loads((out / "routing.json").read_text())["accuracy"]
    print(accuracy)
    assert accuracy["router_input"] > accuracy["hidden"] + 0.05
    assert accuracy["router_input"] > accuracy["cheap_embed"] + 0.05


def test_an_interrupted_run_continues_without_calibrating_again(prompts, tmp_path, monkeypatch):
    words = recipe(prompts)
    whole = mergekit.run_moe(words, tmp_path / "whole", verify=False)
    finished = []

    def fail(output: object, checksum: int) -> None:
        finished.append(output)
        if len(finished) == 20:
            raise RunError("the machine died")

    from mergekit.output.staging import Staging

    original = Staging.finish
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "finish", lambda self, o, c, f: (fail(o, c), original(self, o, c, f))[1])
        with pytest.raises(RunError, match="the machine died"):
            mergekit.run_moe(words, tmp_path / "out", verify=False, threads=1)
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.setattr("mergekit.moe.calibrate.calibrate", None)  # calling it would be a TypeError
    out = mergekit.run_moe(words, tmp_path / "out", verify=False)
    for name in ("model.safetensors", "config.json", "routing.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert not (out / ".mergekit-staging").exists()


def test_calibration_gives_the_same_bytes_on_any_number_of_threads(prompts, tmp_path):
    words, before = recipe(prompts, dtype="float32"), torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(mergekit.run_moe(words, tmp_path / str(threads), verify=False, threads=threads))
    finally:
        torch.set_num_threads(before)
    for name in ("model.safetensors", "routing.json"):
        assert len({(out / name).read_bytes() for out in made}) == 1


def test_other_prompts_make_another_plan(prompts, tmp_path):
    one = api.plan_moe(recipe(prompts)).plan
    other = api.plan_moe(recipe([prompts[0][:-1], *prompts[1:]])).plan
    assert one.digest() != other.digest()
    assert one.digest() == api.plan_moe(recipe(prompts)).plan.digest()


def test_prompt_files_stand_beside_the_recipe(tmp_path):
    plan = api.plan_moe("examples/phi3_moe/recipe.yml")
    assert [len(p.positive) + len(p.held_out) for p in plan.prompts] == [16, 16, 16]


def test_a_damaged_result_is_found_by_the_self_test(prompts, tmp_path, monkeypatch):
    """The identity law is not a formality: a config that lies about the model fails it, and nothing is published."""
    import dataclasses

    made = api.plan_moe(recipe(prompts, gate_mode="random"))
    target = dataclasses.replace(
        made.target, config=lambda dense, counts: {**original(dense, counts), "rope_theta": 1e6}
    )
    original = made.target.config
    with pytest.raises(RunError, match="the self-test failed"):
        api.run_moe_plan(dataclasses.replace(made, target=target), tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


def test_the_plan_says_what_it_is(capsys):
    from mergekit.cli.main import mergekit as program

    program.main(["moe", "examples/phi3_moe/recipe.yml", "nowhere", "--dry-run"], standalone_mode=False)
    printed = capsys.readouterr().out
    assert "Mixtral of 3 experts, 2 for each token, routers by router_input, shared weights from average" in printed
    assert "models/prose (expert 1)" in printed
    assert not Path("nowhere").exists()


def test_no_local_path_is_published(prompts, tmp_path):
    import shutil

    place = shutil.copytree(ROOT / "examples/phi3_moe", tmp_path / "secret")
    words = yaml.safe_load((place / "recipe.yml").read_text())
    for entry in words["experts"]:
        entry["positive_prompts_file"] = str(place / entry["positive_prompts_file"])
    words["experts"].append({**words["experts"][2]})
    (place / "r.yml").write_text(yaml.safe_dump(words))
    out = mergekit.run_moe(place / "r.yml", tmp_path / "out", verify=False)
    for name in ("README.md", "routing.json", "config.json"):
        assert str(tmp_path) not in (out / name).read_text()
        assert "secret" not in (out / name).read_text()


def test_another_form_over_the_first_leaves_nothing_of_it(prompts, tmp_path):
    mergekit.run_moe(recipe(prompts, architecture="phi3moe"), tmp_path / "out", verify=False)
    words = recipe(prompts, gate_mode="random")
    out = mergekit.run_moe(words, tmp_path / "out", verify=False, overwrite=True)
    assert not {"routing.json", "modeling_phi3_moe.py", "configuration_phi3_moe.py"} & {p.name for p in out.iterdir()}


def test_the_self_test_runs_no_code_of_a_tokenizer(prompts, tmp_path):
    """A tokenizer that brings code is left alone unless the user trusts it."""
    import shutil

    base = shutil.copytree(ROOT / "models/base", tmp_path / "base")
    record = json.loads((base / "tokenizer_config.json").read_text())
    record |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (base / "tokenizer_config.json").write_text(json.dumps(record))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\n")
    words = {**recipe(prompts, gate_mode="random"), "base_model": str(base)}
    assert mergekit.run_moe(words, tmp_path / "out", verify=True).is_dir()
    assert not (tmp_path / "ran").exists()


def test_a_recipe_of_the_other_kind_is_recognised(tmp_path, prompts):
    from mergekit.errors import RecipeError

    with pytest.raises(RecipeError, match="mergekit moe"):
        mergekit.plan("examples/phi3_moe/recipe.yml")
    with pytest.raises(RecipeError, match="mergekit merge"):
        api.plan_moe("examples/linear.yml")

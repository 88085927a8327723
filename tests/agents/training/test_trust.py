"""A folder that somebody else made: nothing that it names is run, contacted, read or written before --trust."""

import json
import os
import stat
import sys
import threading
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import pytest

from benchmark_suites import suite_text, write_suite
from diffusion_gym.agents.algorithms import AGENTS, agent_class
from diffusion_gym.agents.benchmark import command as bench_command
from diffusion_gym.agents.benchmark.suites import Suite, Task, suite_file, suites
from diffusion_gym.agents.cli import main
from diffusion_gym.agents.training import trust
from diffusion_gym.agents.training.env_options import EnvOptions
from diffusion_gym.agents.training.run_files import FORMAT
from diffusion_gym.agents.training.runs import load_settings, read_settings
from diffusion_gym.agents.training.settings import RunSettings, starting_point
from diffusion_gym.envs import vector
from diffusion_gym.models import load_model
from diffusion_gym.rewards import make_reward
from diffusion_gym.storage import write_json
from run_folders import made_here

ENV = "DiffusionDenoise-Shapes-Color-v0"
MODULE, URL, FILE = "module_of_a_stranger", "http://127.0.0.1:9", "secrets_of_this_user.txt"
SOURCE = (
    "from pathlib import Path\nPath('imported').touch()\n\ndef score(images, prompts, metadata):\n    return images\n"
)

# What a value of an option can be that does harm, if it is followed.
HARMFUL = {
    "code": f"{MODULE}:score",
    "code in the folder": f"stranger.{MODULE}:score",
    "url": f"{URL}/v1",
    "file": FILE,
    "path": f"./{FILE}",
    "parts": f"Color=1,{MODULE}:score=1,{URL}=1",
    "a file alone": [FILE],
    "texts": ["a red circle", f"./{FILE}"],
    "table": {f"{MODULE}:score": 1, URL: f"./{FILE}"},
}
_seen = []
_watching = False


def _hook(event, arguments):
    if _watching and event in ("open", "import", "socket.connect", "subprocess.Popen", "os.symlink", "os.mkdir"):
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_hook)  # there for good, and silent outside of `watched`


@contextmanager
def watched():
    """Yields a list; afterwards it holds what Python did meanwhile with anything of `HARMFUL`."""
    global _watching
    found = []
    _seen.clear()
    _watching = True
    try:
        yield found
    finally:
        _watching = False
        found += [line for line in _seen if any(word in line for word in (MODULE, "127.0.0.1", FILE))]


def without_weights(model, *others):
    """As `load_model`, but the embedded model, which anybody may name, ends what would be a training."""
    if model == "Shapes":
        raise ValueError("an environment with all that the folder names was about to be made")
    return load_model(model, *others)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current directory: a module and a file that are not to be touched, and the folder `stranger`."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    for where in (tmp_path, folder):
        (where / f"{MODULE}.py").write_text(SOURCE)
    (tmp_path / FILE).write_text("a secret\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vector, "load_model", without_weights)
    yield tmp_path
    for name in (MODULE, f"stranger.{MODULE}", "stranger"):
        sys.modules.pop(name, None)


def settings_json(agent="ddpo_is", **changed):
    """What `config.json` holds of a run that names nothing but what is registered."""
    return {**starting_point(ENV, agent, None, None).to_json(), **changed}


def write_run(folder, stored):
    write_json(folder / "config.json", {"format": FORMAT, "settings": stored, "versions": {}})


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, arguments)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    return error


def options():
    """Every option that a folder holds: the part of `config.json`, and its name."""
    for part, kind in (("", RunSettings), ("env_options", EnvOptions)):
        yield from ((part, entry.name) for entry in fields(kind) if entry.name not in ("env_options", "agent_options"))
    yield from (("agent_options", entry.name) for entry in fields(agent_class("ddpo_is").Config))


def with_option(part, name, value):
    stored = settings_json()
    return {**stored, part: {**stored[part], name: value}} if part else {**stored, name: value}


def harmful(part, name):
    """Each harmful value for an option; keywords of a reward are a table of them."""
    if name == "reward_kwargs":
        for value in HARMFUL.values():
            for keyword in ("vlm", "cache", "z_scores", "clip", "of_a_reward_to_come"):
                text = value if isinstance(value, str) else json.dumps(value)
                yield {keyword: text}
                yield {"keywords": json.dumps({"Aesthetic": {keyword: value}})}
    else:
        yield from HARMFUL.values()


@pytest.mark.parametrize(("part", "name"), list(options()))
def test_no_option_of_a_folder_is_followed(part, name, place, capsys):
    """By eval and --resume, which refuse it, and by report, which may show it."""
    for value in harmful(part, name):
        write_run(place / "stranger", with_option(part, name, value))
        with watched() as touched:
            if name not in ("out", "trust", "token_to"):  # those are never taken from a folder
                for command in (["eval", "stranger", "--samples", "2"], ["train", "--resume", "--out", "stranger"]):
                    refusal(capsys, *command)
            try:
                main(["report", "stranger"])
            except SystemExit as stopped:
                assert stopped.code == 2
        assert not touched and not (place / "imported").exists()
        assert sorted(path.name for path in place.iterdir()) == [f"{MODULE}.py", FILE, "stranger"]


@pytest.mark.parametrize("agent", AGENTS)
def test_every_text_of_an_agents_options_is_a_choice_or_is_listed(agent):
    plain = settings_json(agent)
    assert trust.run_claims(plain) == []
    for entry in fields(agent_class(agent).Config):
        for value in HARMFUL.values():
            changed = {**plain, "agent_options": {**plain["agent_options"], entry.name: value}}
            assert trust.run_claims(changed), entry.name


def suite_options():
    known = {"name", "description", "tasks", "overrides", "agents", "ceiling"}
    yield from (("", entry.name) for entry in fields(Suite) if entry.name not in known)
    yield from (("tasks.size", entry.name) for entry in fields(Task) if entry.name not in known)
    yield from (("tasks.size.env_options", entry.name) for entry in fields(EnvOptions))
    yield from (("overrides", name) for _, name in options())
    yield from (("agents.other", name) for _, name in options())


@pytest.mark.parametrize(("part", "name"), list(suite_options()))
def test_no_option_of_a_suites_file_is_followed(part, name, place, capsys, monkeypatch):
    monkeypatch.setattr(bench_command, "run_local", lambda *arguments: pytest.fail("a training would have begun"))
    kinds = HARMFUL if name in ("agent", "env", "reward", "probe", "model") else ("code", "url", "path")
    kinds = ("file", "path", "a file alone") if name == "prompts" else kinds  # others are prompts
    for value in (HARMFUL[kind] for kind in kinds):
        if name in ("reward_kwargs", "env_options", "probe_kwargs"):
            value = {"reward" if name == "env_options" else "cache": value}
        suite = {"description": "of a stranger", "budget": 6400, "evaluations": 1, "samples": 4, "overrides": {}}
        suite |= {"agents": {"other": {"agent": "ddpo_is"}}}
        suite |= {"tasks": {"size": {"env": ENV, "ceiling": 1.0, "env_options": {}}}}
        table = suite
        for key in filter(None, part.split(".")):
            table = table[key]
        table[name] = value
        (place / "stranger" / "suite.toml").write_text(suite_text(suite))
        with watched() as touched:
            refusal(capsys, "bench", "--suite", "stranger/suite.toml", "--out", "out", "--seeds", "1")
        assert not touched and not (place / "imported").exists() and not (place / "out").exists()


@pytest.mark.parametrize("suite", suites())
def test_what_comes_with_the_package_names_nothing(suite):
    assert trust.suite_claims(asdict(Suite.load(suite)), Task) == []


def test_every_field_with_a_default_names_nothing():
    for entry in fields(EnvOptions):
        assert entry.default is not MISSING
        assert trust.run_claims(with_option("env_options", entry.name, entry.default)) == []


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("env_options", "reward", "Color=1,Count=0.5"),
        ("env_options", "reward_kwargs", {"strict": "true", "z_scores": '{"Color": [0.5, 0.1]}'}),
        ("env_options", "prompts", ["shapes-color-4"]),
        ("env_options", "prompts", ["a red circle", "two blue stars: large"]),
        ("env_options", "model", "Shapes"),
        ("env_options", "device", "cuda:0"),
        ("env_options", "dtype", "bfloat16"),
        ("env_options", "sampler", "ddim"),
        ("", "preset", "shapes-demo"),
        ("", "track", "none"),
    ],
)
def test_what_is_registered_needs_no_trust(part, name, value, tmp_path):
    write_run(tmp_path, with_option(part, name, value))
    assert load_settings(tmp_path).token_to == ()


def test_a_folder_made_here_needs_no_trust_and_a_changed_or_copied_one_does(place, monkeypatch):
    folder = made_here(place / "mine", reward=f"{MODULE}:score")
    assert load_settings(folder).token_to is None
    (place / "moved").mkdir()
    assert load_settings(folder.rename(place / "moved" / "mine")).env_options.reward == f"{MODULE}:score"

    folder = place / "moved" / "mine"
    stored = json.loads((folder / "config.json").read_text())
    changed = {**stored, "settings": with_option("env_options", "reward", f"{MODULE}:another")}
    write_json(folder / "config.json", changed)
    with pytest.raises(trust.Untrusted, match="another"):
        load_settings(folder)
    write_json(folder / "config.json", stored)
    (folder / "model").symlink_to(place)
    with pytest.raises(trust.Untrusted, match=r"write +.*and delete in it \(model\)"):
        load_settings(folder)
    (folder / "model").unlink()
    load_settings(folder)

    monkeypatch.setenv("XDG_DATA_HOME", str(place / "another machine"))
    with pytest.raises(trust.Untrusted, match=f"run +{MODULE}:score, {MODULE} being .*{MODULE}.py"):
        load_settings(folder)
    assert load_settings(folder, trust=True).token_to == ()
    assert load_settings(folder).token_to == ()  # once is enough, and gives no token away
    assert not (place / "imported").exists()


@pytest.mark.parametrize(
    "seal", ["{}", "[]", "", '{"hmac": "0", "token_to": null}', '{"hmac": 1}', '{"hmac": "\\u00e4"}']
)
def test_a_seal_that_somebody_else_wrote_is_none(seal, tmp_path):
    made_here(tmp_path)
    (tmp_path / ".seal.json").write_text(seal)
    assert trust.seal_of(tmp_path) is None


def test_addresses_cannot_be_added_to_a_seal(tmp_path):
    made_here(tmp_path)
    trust.write_seal(tmp_path, trust.Seal(()))
    stored = json.loads((tmp_path / ".seal.json").read_text())
    for token_to in (None, ["http://127.0.0.1:9"]):
        write_json(tmp_path / ".seal.json", {**stored, "token_to": token_to})
        assert trust.seal_of(tmp_path) is None


def test_the_commands_go_on_with_trust(tiny_pipeline, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    numbers = ["--env.num-inference-steps", "2", "--samples-per-iteration", "4", "--rollout-batch", "4"]
    environment = ["--env", "DiffusionDenoise-v0", "--env.model", str(tiny_pipeline), "--env.reward", "Compressibility"]
    begin = [*environment, *numbers, "--env.prompts", "a", "--agent.batch-size", "4", "--track", "none"]
    main(["train", *begin, "--total-reward-queries", "4", "--out", str(out)])
    again = ["train", "--resume", "--out", str(out), "--total-reward-queries", "8"]
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "another machine"))
    for command in (again, ["eval", str(out), "--samples", "2"]):
        error = refusal(capsys, *command)
        assert f"read    {tiny_pipeline} (env.model)" in error and "add --trust" in error
    assert "trust=True is for the folder" in refusal(capsys, "train", *begin, "--out", tmp_path / "new", "--trust")
    main([*again, "--trust"])
    main(["eval", str(out), "--samples", "2", "--json"])
    assert trust.seal_of(out) == trust.Seal(())
    assert not {"trust", "token_to"} & set(json.loads((out / "config.json").read_text())["settings"])


def test_a_stranger_cannot_say_trust_in_the_folder(place, capsys):
    stored = {**with_option("env_options", "reward", f"{MODULE}:score"), "trust": True, "token_to": None}
    write_run(place / "stranger", stored)
    assert f"run     {MODULE}:score" in refusal(capsys, "eval", "stranger")
    with pytest.raises(ValueError, match="settings: the field 'trust' is not known here"):
        read_settings(place / "stranger")


@pytest.mark.parametrize("name", ["checkpoints", "images", "model", "metrics.jsonl", "report.html", "a/b/deep"])
def test_no_link_that_leads_out_of_a_folder_is_followed(name, place, capsys):
    folder, elsewhere = place / "stranger", place / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "iteration-000001.safetensors").write_text("mine")
    write_run(folder, settings_json())
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(elsewhere if "." not in name else elsewhere / "mine.txt")
    for command in (["report"], ["eval"], ["train", "--resume", "--out"]):
        error = refusal(capsys, *command, "stranger")
        assert str(elsewhere) in error and f"({name})" in error
    (folder / "config.json").unlink()
    (folder / "records").mkdir()
    (folder / "shapes-v1.toml").write_bytes(suite_file("shapes-v1").read_bytes())
    bench = ["bench", "--suite", "shapes-v1", "--agents", "ddpo_is", "--seeds", "1", "--out", "stranger"]
    assert str(elsewhere) in refusal(capsys, *bench)
    assert [path.name for path in elsewhere.iterdir()] == ["iteration-000001.safetensors"]


def test_links_within_a_folder_and_report_with_trust(place):
    folder = place / "stranger"
    write_run(folder, settings_json())
    (folder / "latest").symlink_to("config.json")
    main(["report", "stranger"])
    (folder / "images").symlink_to(place)
    main(["report", "stranger", "--trust"])


def test_the_settings_of_wandb_in_a_folder_count(place, capsys):
    write_run(place / "stranger", settings_json())
    (place / "stranger" / "wandb").mkdir()
    (place / "stranger" / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    assert "wandb/settings" in refusal(capsys, "train", "--resume", "--out", "stranger", "--track", "wandb")


def test_a_benchmark_is_trusted_once(tiny_pipeline, place, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(bench_command, "run_local", lambda cells, *others: ran.extend(cells))
    monkeypatch.setattr(bench_command.Results, "read", lambda out: None)
    for name in ("write_summary", "summary_text"):
        monkeypatch.setattr(bench_command, name, lambda *arguments: "")
    suite = write_suite(place / "suites", tiny_pipeline, probe=f'"{MODULE}:score"')
    arguments = ["bench", "--suite", str(suite), "--agents", "ddpo_is", "--seeds", "1", "--out", "out"]
    error = refusal(capsys, *arguments)
    assert f"read    {tiny_pipeline} (env.model)" in error and f"run     {MODULE}:score" in error
    main([*arguments, "--trust"])
    main(arguments)
    assert [cell.token_to for cell in ran] == [(), ()]
    main([*arguments, "--token-to", URL])
    main(arguments)
    assert [cell.settings(cell.load_suite()).token_to for cell in ran[2:]] == [(URL,), (URL,)]
    suite.write_text(suite.read_text().replace("score", "another"))
    assert f"run     {MODULE}:another" in refusal(capsys, *arguments)
    monkeypatch.setenv("XDG_DATA_HOME", str(place / "another machine"))
    assert "add --trust" in refusal(capsys, *[*arguments[:2], "out/tiny.toml", *arguments[3:]])


@pytest.mark.parametrize("name", [f"{MODULE}:score", f"stranger.{MODULE}:score"])
def test_the_current_directory_is_on_the_path_only_during_an_import(name, place, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = list(sys.path)
    make_reward(name)
    assert sys.path == before
    for failing in (f"{MODULE}:none", "no_module_of_this_name:x"):
        with pytest.raises(ValueError):
            make_reward(failing)
    assert sys.path == before


def test_the_list_is_one_screen_and_writes_nothing_else_on_the_terminal(place, capsys):
    texts = [f"\x1b[2J{index}/{'x' * 500}.txt" for index in range(200)]
    write_run(place / "stranger", with_option("env_options", "prompts", texts))
    lines = refusal(capsys, "eval", "stranger").splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 200
    assert not any("\x1b" in line for line in lines) and "  and 180 more" in lines


def test_the_key_is_one_for_all_and_for_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(trust._key(make=True))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = tmp_path / "diffusion-gym" / "key"
    assert len(keys) == 8 and set(keys) == {path.read_bytes()} and len(path.read_bytes()) == 32
    assert [entry.name for entry in path.parent.iterdir()] == ["key"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="holds no key of diffusion-gym; remove it"):
        trust.seal_of(made_here(tmp_path / "run"))


def test_where_no_key_can_be_kept_a_run_begins_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set XDG_DATA_HOME"):
        made_here(tmp_path / "run")
    assert not Path(tmp_path / "run" / ".seal.json").exists()

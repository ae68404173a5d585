"""What is refused before anything is trained, and the commands of runs that other machines train."""

import shlex

import pytest
import typer

from launch.cli import app, main
from launch.experiments import commands as commands_module
from launch.experiments.children import Slice
from launch.experiments.commands import command_lines
from launch.experiments.expand import Options, expand
from launch.experiments.perform import Workshop
from launch.experiments.rows import check_suites
from launch.recipe import load_recipe, resolve
from tests.evals.suite_rows import write_rows
from trellis_dist.files import write_json

GROUP = typer.main.get_command(app)


def _parsed(line):
    """The command's name and its options, as `trellis` itself reads them."""
    program, name, *arguments = shlex.split(line)
    assert program == "trellis"
    return name, GROUP.commands[name].make_context(name, arguments).params


def _loaded(given):
    return load_recipe(
        given["recipe"], given["set_"] or (), corpus=given["corpus"], dataset_dir=given["dataset_dir"]
    )


@pytest.mark.parametrize(("name", "scale"), [("table2", "paper"), ("table3", "tiny"), ("retention", "small")])
def test_a_printed_command_is_the_run_that_it_stands_for(name, scale, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a checkout that was used has shards, which need no command
    root = tmp_path / "a root"
    changes = ["--set", 'evals.ruler_essay="an essay.txt"']
    assert main(["reproduce", name, "--scale", scale, "--root", str(root), "--commands", *changes]) == 0
    lines = [_parsed(line) for line in capsys.readouterr().out.splitlines()]
    essay = root / "essay.txt"
    found = expand(name, scale, Options(overrides=(changes[1],), essay=essay if name == "table3" else None))
    trains = {given["run_dir"].name: given for what, given in lines if what == "train"}
    assert list(trains) == [spec.name for spec in found.specs.values()]
    for spec in found.specs.values():
        given = trains[spec.name]
        assert resolve(_loaded(given)) == resolve(spec.resolved), spec.name
        assert given["run_dir"] == root / "runs" / spec.name
    prepared = [_loaded(given).data.directory for what, given in lines if what == "prepare"]
    wanted = dict.fromkeys(spec.resolved.data.directory for spec in found.specs.values())
    assert prepared == list(wanted)
    assert not root.exists()


def test_runs_that_are_trained_or_known_need_no_command_and_another_run_is_refused(tmp_path, monkeypatch):
    specs = list(expand("gates", "tiny", Options()).specs.values())
    shop = Workshop(root=tmp_path, slice_=Slice())
    monkeypatch.chdir(tmp_path)
    first, second = specs
    (tmp_path / "shards" / "tiny").mkdir(parents=True)
    (tmp_path / "shards" / "tiny" / "manifest.json").touch()
    for spec in specs:
        shop.run_dir(spec).mkdir(parents=True)
    write_json(shop.run_dir(first) / "recipe.json", resolve(first.resolved))
    assert [_parsed(line)[1]["run_dir"].name for line in command_lines(shop, specs)] == [
        first.name,
        second.name,
    ]
    monkeypatch.setattr(commands_module, "trained", lambda run_dir, spec: run_dir.name == first.name)
    (line,) = command_lines(shop, specs)
    assert _parsed(line)[1]["run_dir"].name == second.name
    write_json(shop.run_dir(second) / "recipe.json", resolve(first.resolved))
    with pytest.raises(ValueError, match=f"is of another run named {second.name}"):
        command_lines(shop, specs)


def test_suites_are_looked_for_before_anything_is_trained(tmp_path, capsys):
    suites, root = write_rows(tmp_path / "suites"), tmp_path / "root"
    command = ["reproduce", "table1", "--only", "trellis", "--root", str(root)]
    specs = expand("table1", "tiny", Options(only=("trellis",), suites=suites)).specs.values()
    check_suites(specs)
    (suites / "piqa.jsonl").unlink()
    for more in ([], ["--commands"]):
        assert main([*command, *more, "--suites", str(suites)]) == 1
        refused = capsys.readouterr().err.strip()
        assert refused.startswith("trellis: error: nothing was started: evals.suites_folder")
        assert "has no file for piqa" in refused
        assert "--suites DIR" in refused
        assert "\n" not in refused
    assert main(command) == 1  # HF_HUB_OFFLINE=1
    assert "lambada_openai@900124b cannot be loaded" in capsys.readouterr().err
    assert not root.exists()
    (suites / "piqa.jsonl").write_text('{"goal": "no solutions"}\n')
    with pytest.raises(ValueError, match=r"piqa\.jsonl, line 1"):
        check_suites(specs)

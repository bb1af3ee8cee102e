"""The command line, errors and result file that all experiments share."""

import dataclasses
import errno
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import program, provenance
from metagen_jax.data import DataError
from metagen_jax.gradients import mean_over_tasks


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = 100
    """Outer steps."""
    learner: Literal["maml", "anil"] = "maml"
    """What meta-trains."""
    hidden_sizes: tuple[int, ...] = (40, 40)
    """Units of each layer."""
    data_dir: Path | None = None
    """Folder of data sets."""
    seed: int = 0
    """Fixes all randomness."""
    num_devices: int | None = None
    """Devices to use."""
    run_dir: Path = Path("runs/toy")
    """Where everything is written."""
    resume: bool = False
    """Go on from the last checkpoint."""


PRESETS = {"full": Config(), "smoke": Config(steps=2, hidden_sizes=(3,), resume=True)}


def main(config: Config) -> dict:
    """An experiment that has only numbers."""
    return {"test_mse": np.float32(0.5), "mse_after": jnp.arange(2.0), "steps_taken": config.steps}


def parse(*argv: str) -> Config:
    return program.parse("toy", PRESETS, default="full", argv=argv)


def run(*argv: str, main=main) -> dict:
    program.run("toy", main, PRESETS, default="full", argv=argv)
    [file] = Path().rglob("result.json")
    return json.loads(file.read_text())


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, *argv: str, main=main) -> str:
    """The single line on stderr of a program that exits with status 2."""
    with pytest.raises(SystemExit) as leaving:
        program.run("toy", main, PRESETS, default="full", argv=argv)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_without_flags_the_default_preset_runs_in_a_folder_named_after_both():
    assert parse() == dataclasses.replace(PRESETS["full"], run_dir=Path("runs/toy-full"))


@pytest.mark.parametrize(
    "argv",
    [
        ("--preset", "smoke", "--steps", "7", "--no-resume"),
        ("--steps=7", "--no-resume", "--preset=smoke"),
    ],
)
def test_a_flag_wins_over_the_preset_wherever_it_stands(argv):
    assert parse(*argv) == Config(steps=7, hidden_sizes=(3,), run_dir=Path("runs/toy-smoke"))


def test_every_field_of_the_config_is_a_flag():
    given = Config(5, "anil", (8, 9), Path("data"), 3, 2, Path("here"), True)
    argv = "--steps 5 --learner anil --hidden-sizes 8 9 --data-dir data --seed 3 --num-devices 2"
    assert parse(*argv.split(), "--run-dir", "here", "--resume") == given


def test_help_tells_what_each_flag_does_and_what_each_preset_changes(capsys):
    with pytest.raises(SystemExit) as leaving:
        program.run("toy", main, PRESETS, default="full", argv=["--help"])
    assert leaving.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "python -m experiments.toy" in text
    assert "The command line, errors and result file that all experiments share." in text
    assert "smoke: --steps 2 --hidden-sizes 3 --resume" in text
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "Units of each layer. (default: 40 40)" in text
    assert "(default: runs/toy-full)" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--preset", "huge"), ("'huge'", "--preset", "'full', 'smoke'")),
        (("--learner", "reptile"), ("'reptile'", "--learner", "'maml', 'anil'")),
        (("--steps", "many"), ("'many'", "--steps")),
        (("--step", "3"), ("--step,", "did you mean --steps?")),
        (("stray",), ("stray",)),
        (("--steps",), ("--steps",)),
        (("--seed", str(10**20)), (f"seed is {10**20}", "give 0 to 4294967295")),
        (("--seed", "-1"), ("seed is -1", "give 0 to 4294967295")),
        (("--num-devices", "0"), ("num_devices is 0", "give 1 or more")),
        (("--num-devices", "1000"), ("num_devices is 1000", "give at most")),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(capsys, argv, says):
    jax.devices()  # From here on JAX can't be given more devices.
    line = fails(capsys, *argv)
    assert all(part in line for part in says), line
    assert not list(Path().rglob("result.json"))


def test_the_result_holds_every_number_and_what_is_needed_to_repeat_the_run(capsys):
    result = run("--steps", "3", "--data-dir", "my data")
    assert result["test_mse"] == 0.5
    assert result["mse_after"] == [0, 1]
    assert result["steps_taken"] == 3
    assert result["seconds"] >= 0
    assert result["command"] == "python -m experiments.toy --steps 3 --data-dir 'my data'"
    assert result["config"] == {
        "steps": 3,
        "learner": "maml",
        "hidden_sizes": [40, 40],
        "data_dir": "my data",
        "seed": 0,
        "num_devices": None,
        "run_dir": "runs/toy-full",
        "resume": False,
    }
    assert result["seed"] == 0
    assert result["versions"]["jax"] == jax.__version__
    assert set(result["versions"]) == {
        "python", "jax", "jaxlib", "flax", "optax", "numpy", "metagen_jax"
    }  # fmt: skip
    assert result["device"] == {
        "kind": jax.devices()[0].device_kind,
        "count": len(jax.devices()),
        "cores": provenance.num_cores(),
        "processor": provenance.provenance()["device"]["processor"],
    }
    assert result["commit"] is None or len(result["commit"]) == 40
    assert (result["dirty"] is None) == (result["commit"] is None)
    assert result["started"].endswith("+00:00")
    assert "runs/toy-full/result.json" in capsys.readouterr().out


def test_commit_and_dirty_flag_are_those_of_the_folder_of_the_experiments(monkeypatch):
    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True)

    monkeypatch.setattr(provenance, "__file__", str(Path("provenance.py").resolve()))

    def describe():
        about = program.describe_run("toy", Config(), [])
        return about["commit"], about["dirty"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path.cwd().parent))
    assert describe() == (None, None)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert describe() == (commit, False)
    Path("benchmarks/results").mkdir(parents=True)
    Path("benchmarks/results/new.json").touch()
    assert describe() == (commit, False)
    Path("new").touch()
    assert describe() == (commit, True)
    monkeypatch.setenv("PATH", "")
    assert describe() == (None, None)


def test_a_finished_run_is_not_overwritten_unless_it_is_to_go_on(capsys):
    first = run("--seed", "1")
    line = fails(capsys, "--seed", "2")
    assert all(words in line for words in ("runs/toy-full", "--run-dir", "--resume"))
    [file] = Path().rglob("result.json")
    assert json.loads(file.read_text()) == first
    assert run("--seed", "1", "--resume")["seed"] == 1


def test_a_run_is_resumed_with_its_own_settings_alone(capsys):
    first = run("--seed", "1", "--hidden-sizes", "3", "4", "--data-dir", "here")
    for flags, says in (
        ("--seed 2 --hidden-sizes 3 4", "--seed 1 where this one has --seed 2"),
        ("--seed 1", "--hidden-sizes 3 4 where this one has --hidden-sizes 40 40"),
    ):
        line = fails(capsys, *flags.split(), "--resume")
        assert says in line
        assert "--run-dir" in line
        [file] = Path().rglob("result.json")
        assert json.loads(file.read_text()) == first
    # Where the data and the devices are is another matter.
    flags = "--seed 1 --hidden-sizes 3 4 --data-dir there --num-devices 1 --resume"
    assert run(*flags.split())["config"]["data_dir"] == "there"


@pytest.mark.parametrize("where", ["", "maml"])
def test_a_run_that_was_stopped_is_not_begun_anew_in_its_folder(capsys, where):
    def stopped(config):
        (config.run_dir / where).mkdir(exist_ok=True)
        (config.run_dir / where / "metrics.jsonl").touch()
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        program.run("toy", stopped, PRESETS, default="full", argv=["--seed", "1"])
    capsys.readouterr()
    line = fails(capsys, "--seed", "2")
    assert all(words in line for words in ("runs/toy-full", "--run-dir", "--resume"))
    assert run("--seed", "1", "--resume")["seed"] == 1


def test_a_run_that_failed_before_its_first_step_may_begin_with_other_settings(capsys):
    fails(capsys, "--seed", "1", main=own_error_type)
    assert run("--seed", "2")["seed"] == 2


def test_a_folder_of_other_files_is_left_alone(capsys):
    Path("episode.png").touch()
    assert "run_dir . holds files and no run" in fails(capsys, "--run-dir", ".")
    assert [path.name for path in Path().iterdir()] == ["episode.png"]


def test_damaged_settings_are_one_line(capsys):
    run()
    Path("runs/toy-full/config.json").write_text("{")
    assert "can't read runs/toy-full/config.json" in fails(capsys, "--resume")


@pytest.mark.parametrize("content", ['{"mine": 1}', "[1]"])
@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_config_that_is_not_from_a_run_is_left_alone(capsys, content, flags):
    Path("config.json").write_text(content)
    line = fails(capsys, "--run-dir", ".", *flags)
    assert "config.json is not from a run of this program; give another --run-dir" in line
    assert [path.read_text() for path in Path().iterdir()] == [content]


def test_the_result_of_a_resumed_run_tells_of_all_its_sessions(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([0.0, 5.5, 10.0, 20.0, 30.0, 32.0]).__next__)
    monkeypatch.setattr(program, "time", clock)
    config, while_running = Path("runs/toy-full/config.json"), []

    def stopped(_):
        while_running.append(config.read_text())
        raise KeyboardInterrupt

    for flags in ["--seed", "1"], ["--seed", "1", "--resume"]:
        with pytest.raises(SystemExit):
            run(*flags, main=stopped)
    config.write_text(while_running[1])  # As if the second session had been killed.
    result = run("--seed", "1", "--resume", "--num-devices", "1")
    begun = "python -m experiments.toy --seed 1"
    commands = [begun, f"{begun} --resume", f"{begun} --resume --num-devices 1"]
    assert [session["command"] for session in result["sessions"]] == commands
    assert [session["seconds"] for session in result["sessions"]] == [5.5, None, 2.0]
    assert result["seconds"] == 7.5
    assert result | result["sessions"][0] == result | {"seconds": 5.5}


def test_what_is_no_number_stands_as_null_in_the_result():
    numbers = {"mse": float("nan"), "curve": np.array([1.0, np.inf]), "count": 3}
    result = run(main=lambda config: numbers)
    assert (result["mse"], result["curve"], result["count"]) == (None, [1.0, None], 3)


def test_a_full_disk_at_the_end_is_one_line(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "no space")

    def fill_the_disk(_):
        monkeypatch.setattr(Path, "write_text", full)
        return {}

    assert "no space left on the disk to write runs/toy-full/" in fails(capsys, main=fill_the_disk)


def test_a_result_is_written_whole_or_not_at_all():
    run()
    [file] = Path().rglob("result.json")
    before = file.read_text()
    with pytest.raises(TypeError, match="can't be written as JSON"):
        program.write_result(file.parent, {"later": object()}, {})
    assert file.read_text() == before
    assert {path.name for path in file.parent.iterdir()} == {"config.json", "result.json"}


def test_a_number_may_not_take_the_name_of_something_else_in_the_result():
    with pytest.raises(KeyError, match="seed"):
        program.write_result(Path(), {"seed": 1}, {"seed": 0})


def test_a_run_folder_that_is_a_file_is_named(capsys):
    Path("taken").touch()
    assert "run_dir taken can't be made (File exists)" in fails(capsys, "--run-dir", "taken")


def library_error(_):
    mean_over_tasks(lambda p, b, k: (p, {}), chunk=0)


def library_error_while_tracing(_):
    mean = mean_over_tasks(lambda p, b, k: (p, {}))
    jax.jit(mean)(jnp.zeros(3), (jnp.zeros(3), jnp.zeros(4)), jax.random.key(0))


def own_error_type(_):
    raise DataError("no such\n  data set")


@pytest.mark.parametrize(
    ("main", "says"),
    [
        (library_error, "chunk is 0; give a positive number"),
        (library_error_while_tracing, "leading axes of [3, 4]"),
        (own_error_type, "error: no such data set"),
    ],
)
def test_an_error_that_the_library_raises_for_its_user_is_one_line(capsys, main, says):
    assert says in fails(capsys, main=main)


def bad_shape_while_tracing(_):
    mean = mean_over_tasks(lambda p, b, k: (p + b[: b.size + 1].reshape(2, 2), {}))
    jax.jit(mean)(jnp.zeros(3), jnp.zeros((3, 3)), jax.random.key(0))


@pytest.mark.parametrize(
    ("main", "error"),
    [
        (lambda _: int("three"), ValueError),
        (lambda _: np.zeros(3).reshape(2), ValueError),
        (lambda _: max([]), ValueError),
        (bad_shape_while_tracing, TypeError),
        (lambda _: {}["missing"], KeyError),
    ],
)
def test_a_mistake_in_the_program_keeps_its_traceback(main, error):
    with pytest.raises(error):
        program.run("toy", main, PRESETS, default="full", argv=[])
    assert not list(Path().rglob("result.json"))


def test_an_interrupted_run_says_so_without_a_traceback(capsys):
    def interrupted(_):
        raise KeyboardInterrupt("stopped at step 3")

    with pytest.raises(SystemExit) as leaving:
        program.run("toy", interrupted, PRESETS, default="full", argv=[])
    assert leaving.value.code == 130
    assert capsys.readouterr().err == "stopped at step 3\n"


@pytest.mark.parametrize(
    ("flags", "environment", "count"),
    [
        ([], {}, provenance.num_cores()),
        (["--num-devices", "3"], {}, 3),
        ([], {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"}, 5),
    ],
)
@pytest.mark.slow
def test_a_fresh_process_has_the_cpu_devices_asked_for_or_one_a_core(flags, environment, count):
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(program.__file__).parents[1])]!r}
import jax
import test_program
from experiments import program, provenance
main = lambda config: {{"devices": len(jax.devices())}}
program.run("toy", main, test_program.PRESETS, default="full")
"""
    environment = {"JAX_PLATFORMS": "cpu", **environment}
    subprocess.run([sys.executable, "-c", code, *flags], check=True, env=environment)
    [file] = Path().rglob("result.json")
    assert json.loads(file.read_text())["devices"] == count


def test_a_missing_package_is_one_line_and_status_2():
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tyro" else find_spec(name, *rest)
import experiments.few_shot
"""
    root = Path(program.__file__).parents[1]
    python = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert python.returncode == 2
    [line] = python.stderr.splitlines()
    assert "tyro is not installed" in line
    assert "pip install --editable '.[experiments]'" in line

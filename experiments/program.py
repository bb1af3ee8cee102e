"""What every experiment has in common as a program: command line, errors, devices, `result.json`.

An experiment is a file with a frozen dataclass `Config`, a dict `PRESETS` of such, a function
`main(config) -> {name: number}`, and at its end

    if __name__ == "__main__":
        program.run("sinusoid", main, PRESETS, default="published")

A user's mistake, a `metagen_jax.errors.UserError`, ends in one line on stderr and exit status 2.
Any other error is a mistake in the program and keeps its traceback.

Beside its numbers `result.json` says of the run: `command`, `commit`, `dirty` and `started` of the
session that began it; `sessions`, all those in which it was made, with `seconds` null for one that
was killed; `seconds`, their sum, without those killed; and of the last session `config`, `versions`
and `device`.
"""

import contextlib
import dataclasses
import datetime
import inspect
import io
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import jax
import numpy as np
import tyro

from experiments.provenance import num_cores, provenance
from metagen_jax.errors import UserError, one_line, writing
from metagen_jax.runs.log import METRICS


class Config(Protocol):
    """What `run` needs of an experiment's settings; each documents these fields and its own."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def seed(self) -> int: ...
    @property
    def run_dir(self) -> Path: ...
    @property
    def resume(self) -> bool: ...
    @property
    def num_devices(self) -> int | None: ...


C = TypeVar("C", bound=Config)

RESULT, CONFIG = "result.json", "config.json"
_PLACES = ("run_dir", "resume", "data_dir", "num_devices", "chunk")
"""Settings of where a run is made and not of what it gives: they may change on resumption, as may
those that the class names as `MAY_CHANGE`, of what a trained model is asked for."""
_OF_EVERY_RUN = {"seed", "run_dir", "resume", "num_devices"}
_OTHER_RUN_DIR = "give another --run-dir, or remove that file"
_OF_A_SESSION = ("command", "commit", "dirty", "started")


def run(
    name: str,
    main: Callable[[C], Mapping[str, Any]],
    presets: Mapping[str, C],
    *,
    default: str,
    vary: Callable[[C, C], C] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment as a program, from its command line to its `result.json`.

    The folder of the run is `runs/NAME-PRESET` unless `--run-dir` or `vary` says otherwise.

    Args:
      name: of the experiment: `python -m experiments.NAME`.
      main: the experiment; gives the numbers of its table by name.
      presets: settings by name.
      default: the preset that is taken without `--preset`.
      vary: `(preset's settings, settings of the command line) -> settings to start from`, where one
        flag brings others with it; the command line then wins over these.
      argv: the command line without the program; None takes that of this process.

    Raises:
      SystemExit: with status 2 after a user's mistake, 130 after Ctrl-C, 0 after `--help`.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        summary = (inspect.getdoc(inspect.getmodule(main)) or "").partition("\n")[0]
        config = parse(name, presets, default=default, vary=vary, argv=argv, about=summary)
        require((0 <= config.seed < 2**32, f"seed is {config.seed}; give 0 to {2**32 - 1}"))
        prepare_run_dir(config)
        start_devices(config.num_devices)
        about = describe_run(name, config, argv)
        with timed_session(config.run_dir, about) as sessions:
            numbers = main(config)
        seconds = round(sum(session["seconds"] or 0 for session in sessions), 1)
        about |= {**sessions[0], "seconds": seconds, "sessions": sessions}
        file = write_result(config.run_dir, numbers, about)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"all numbers are in {file}")


def parse(
    name: str,
    presets: Mapping[str, C],
    *,
    default: str,
    argv: Sequence[str],
    vary: Callable[[C, C], C] | None = None,
    about: str = "",
) -> C:
    """The settings of a command line: a preset's, and over them those given as flags.

    `vary` is that of `run`; `about` stands at the top of what `--help` prints.

    Raises:
      UserError: for an unknown preset, flag or value, in one line.
      SystemExit: after `--help`.
    """
    preset_type = Annotated[
        Literal[tuple(presets)],  # pyright: ignore[reportInvalidTypeForm]
        tyro.conf.arg(help="The settings to start from; the flags below win over it."),
    ]
    config_type = tyro.conf.OmitArgPrefixes[type(presets[default])]
    command_line: Any = dataclasses.make_dataclass(
        "CommandLine", [("preset", preset_type), ("settings", config_type)], frozen=True
    )
    preset, config = default, presets[default]
    for _ in range(2):  # The first pass finds the preset, the second takes its settings.
        run_dir = Path("runs") / f"{name}-{preset}"
        chosen = dataclasses.replace(presets[preset], run_dir=run_dir)
        if vary is not None:
            chosen = vary(chosen, config)
        with _one_line_errors():
            line = tyro.cli(
                command_line,
                default=command_line(preset, chosen),
                prog=f"python -m experiments.{name}",
                description=f"{about}\n\n{_describe_presets(presets, default)}",
                args=argv,
            )
        preset, config = line.preset, line.settings
    return config


def prepare_run_dir(config: Config) -> None:
    """Makes the folder of the run and keeps the settings there, as `config.json`.

    Raises:
      UserError: it can't be made, holds files and no run, a run that is not to be resumed or one
        of other settings, or a `config.json` that is not from a run.
    """
    folder = config.run_dir
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=_to_json))
    if not config.resume and (folder / RESULT).exists():
        raise UserError(
            f"run_dir {folder} holds a finished run; "
            "give another --run-dir, or --resume to go on with that one"
        )
    if not config.resume and [*folder.glob(METRICS), *folder.glob(f"*/{METRICS}")]:
        raise UserError(
            f"run_dir {folder} holds a run that was stopped; "
            "give another --run-dir, or --resume to go on with that one"
        )
    if (folder / CONFIG).exists():
        before = read_settings(folder, advice=_OTHER_RUN_DIR)
        if config.resume:
            changing = (*_PLACES, *getattr(config, "MAY_CHANGE", ()))
            _check_same({k: v for k, v in settings.items() if k not in changing}, before, folder)
            return
    elif folder.is_dir() and any(folder.iterdir()):
        raise UserError(
            f"run_dir {folder} holds files and no run, some of which a run might overwrite; "
            "give a new or an empty --run-dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_dir {folder} can't be made ({error.strerror}); give another --run-dir"
        ) from None
    _write_json(folder / CONFIG, settings)


def read_settings(folder: Path, *, advice: str) -> dict[str, Any]:
    """The settings with which a run was started, from the `config.json` in its folder.

    Raises:
      UserError: that file can't be read or is not from a run; it ends with the `advice`.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {file} ({one_line(error)}); {advice}") from None
    if not isinstance(config, dict) or not config.keys() >= _OF_EVERY_RUN:
        raise UserError(f"{file} is not from a run of this program; {advice}")
    return config


def _check_same(settings: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    """Raises a UserError if a run was started with settings that would give another result."""
    for name, value in settings.items():
        if before.get(name, value) != value:
            raise UserError(
                f"run_dir {folder} holds a run with {_as_flag(name, before[name])} where this "
                f"one has {_as_flag(name, value)}; give the settings of that run to go on with it, "
                "or another --run-dir"
            )


def start_devices(num_devices: int | None) -> None:
    """Gives JAX so many CPU devices; must come before its first use.

    By default as many as the environment asks for (`XLA_FLAGS`, `JAX_NUM_CPU_DEVICES`), else one a
    core.

    Raises:
      UserError: if there are fewer devices than asked for, on an accelerator or because JAX has
        started before.
    """
    if num_devices is not None and num_devices < 1:
        raise UserError(f"num_devices is {num_devices}; give 1 or more, or None for all")
    flagged = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if num_devices is None and (flagged or "JAX_NUM_CPU_DEVICES" in os.environ):
        return
    # Refused once JAX has started, in a test or a notebook: what there is, is checked below.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", num_devices or num_cores())
    if num_devices is not None and len(jax.devices()) < num_devices:
        raise UserError(
            f"num_devices is {num_devices} and JAX sees {len(jax.devices())} "
            f"({jax.default_backend()}); give at most {len(jax.devices())}"
        )


def devices_for(num_devices: int | None, num_tasks: int) -> list[jax.Device]:
    """The devices asked for; else as many of all as divide the tasks of an outer step evenly."""
    devices = jax.devices()
    if num_devices is not None:
        return devices[:num_devices]
    return devices[: max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)]


def require(*conditions: tuple[bool, str]) -> None:
    """Raises a UserError with the first message whose condition does not hold."""
    for holds, message in conditions:
        if not holds:
            raise UserError(message)


def describe_run(name: str, config: Config, argv: Sequence[str]) -> dict[str, Any]:
    """What is to be kept of a run beside its numbers, so that another can repeat it."""
    return {
        "command": shlex.join(["python", "-m", f"experiments.{name}", *argv]),
        "config": dataclasses.asdict(config),
        "seed": config.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **provenance(),
    }


@contextlib.contextmanager
def timed_session(run_dir: Path, about: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Notes in `config.json` that the run is begun or resumed and, however that ends, its seconds.

    Gives all sessions of the run, this one last.
    """
    file = run_dir / CONFIG
    config = read_settings(run_dir, advice=_OTHER_RUN_DIR)
    session = {**{name: about[name] for name in _OF_A_SESSION}, "seconds": None}
    sessions = [*config.get("sessions", []), session]
    _write_json(file, {**config, "sessions": sessions})
    start = time.perf_counter()
    try:
        yield sessions
    finally:
        session["seconds"] = round(time.perf_counter() - start, 1)
        _write_json(file, {**config, "sessions": sessions})


def write_result(run_dir: Path, numbers: Mapping[str, Any], about: Mapping[str, Any]) -> Path:
    """Writes the numbers and what is known of their run; a number that is not finite as null."""
    if common := numbers.keys() & about.keys():
        raise KeyError(f"the experiment's numbers take the names {sorted(common)} of the run's")
    return _write_json(run_dir / RESULT, {**numbers, **about})


@contextlib.contextmanager
def _one_line_errors():
    """Turns the box that tyro draws around an error into a UserError of one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            yield
    except SystemExit as leaving:
        if not leaving.code:
            raise
        uncoloured = re.sub(r"\x1b\[[0-9;]*m", "", stderr.getvalue())
        _, *rows = [row.strip(" │") for row in uncoloured.splitlines()]
        by_rule = itertools.groupby(rows, lambda row: bool(row.strip("─-╰╯")))
        message, *more = [" ".join(section) for is_text, section in by_rule if is_text]
        suggests = bool(more) and more[0].startswith("Perhaps you meant")
        similar = re.findall(r"(?<= )--\S+", more[0]) if suggests else []
        hint = f"did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"{message.rstrip('. ')}; {hint}--help lists all flags") from None


def _describe_presets(presets: Mapping[str, Config], default: str) -> str:
    """The presets and in which settings each differs from the default one."""
    usual = dataclasses.asdict(presets[default])
    lines = [f"Presets (the defaults below are those of {default}):"]
    for preset, config in presets.items():
        changes = [
            _as_flag(field, value)
            for field, value in dataclasses.asdict(config).items()
            if value != usual[field] and field != "run_dir"
        ]
        lines.append(f"  {preset}: {' '.join(changes) or 'the defaults'}")
    return "\n".join(lines)


def _as_flag(field: str, value: Any) -> str:
    flag = field.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"


def _write_json(file: Path, values: Mapping[str, Any]) -> Path:
    """Writes JSON all at once or not at all; what is no finite number stands as null."""
    plain = json.loads(json.dumps(values, default=_to_json), parse_constant=lambda _: None)
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        return partial.replace(file)


def _to_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} {value!r} can't be written as JSON")

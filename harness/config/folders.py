"""Where configs and sweep files lie: a user's own first, then those that come with lora-harness.

Own files are in `conf/` and `sweeps/` below the current folder, if there are any, or where `--config-dir DIR` says:
`DIR/dataset/mine.yaml` is `dataset=mine`, `DIR/sweeps/mine.yaml` is `sweeps=mine`. DIR may also be a folder with
`conf/` and `sweeps/` in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.validation import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]


def _shipped(name: str) -> Path:
    """In an installation inside the package, where setup.py copies it; in a checkout beside the package."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


CONF_DIR = _shipped("conf")
SWEEPS_DIR = _shipped("sweeps")

_MOST_NAMED = 12


@dataclass(frozen=True)
class OwnFolders:
    """A user's own configs: `conf_dir` holds a folder for each group, `sweeps_dir` sweep files; None for none."""

    conf_dir: Path | None = None
    sweeps_dir: Path | None = None

    def options(self) -> dict[str, Path]:
        """Each own file that can be chosen, by `group/name`; copies of our files are not own ones."""
        found: dict[str, Path] = {}
        if self.conf_dir is not None:
            starts = tuple(f"{group}/" for group in _groups())
            found |= {name: path for name, path in _files(self.conf_dir).items() if name.startswith(starts)}
        if self.sweeps_dir is not None:
            found |= {f"sweeps/{name}": path for name, path in _files(self.sweeps_dir).items()}
        ours = _shipped_options()
        return {name: path for name, path in found.items() if name not in ours or _differ(path, ours[name])}

    def describe(self) -> Iterator[str]:
        """What the log says of them: a line for the folders, and one for each file that replaces one of ours."""
        options, ours = self.options(), _shipped_options()
        folders = [str(folder) for folder in (self.conf_dir, self.sweeps_dir) if folder is not None]
        if folders:
            named = ", ".join(list(options)[:_MOST_NAMED]) or "none"
            more = f" and {len(options) - _MOST_NAMED} more" if len(options) > _MOST_NAMED else ""
            yield f"own configs in {' and '.join(folders)}: {named}{more}"
        for name in sorted(options.keys() & ours.keys()):
            yield f"own configs: {options[name]} replaces the {name} that comes with lora-harness"


# Hydra builds its search path in a plug-in that is given nothing: what the command line says is kept here for it.
_own = OwnFolders()


def use_own(own: OwnFolders) -> None:
    """From now on configs are looked for in `own` first."""
    global _own
    _own = own


def own_folders() -> OwnFolders:
    """What `use_own` was called with last."""
    return _own


def options_of(group: str) -> list[str]:
    """The names that an option of a group may have, own ones among them, sorted."""
    start = f"{group}/"
    names = (name.removeprefix(start) for name in _shipped_options() | _own.options() if name.startswith(start))
    # sweeps/wandb/ is for W&B's own command.
    return sorted(name for name in names if group != "sweeps" or not name.startswith("wandb/"))


def config_dir(arguments: Sequence[str]) -> str | None:
    """What a command line gives as `--config-dir`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    given: str | None = parser.parse_known_args(arguments)[0].config_dir
    return given


def find_own(arguments: Sequence[str]) -> OwnFolders:
    """The own folders of a command line. Raises `ConfigError` for folders that cannot be used.

    Args:
        arguments: what was typed after the program's name.
    """
    given = config_dir(arguments)
    if given is not None:
        own = _in_config_dir(given)
    else:
        own = OwnFolders(_below_current_folder("conf", CONF_DIR), _below_current_folder("sweeps", SWEEPS_DIR))
        if not own.options():
            return OwnFolders()
    if own.conf_dir is not None and _differ(own.conf_dir / "config.yaml", CONF_DIR / "config.yaml"):
        raise ConfigError(
            [
                f"{own.conf_dir / 'config.yaml'}: would replace that of lora-harness. Own files "
                "are options of groups (dataset/NAME.yaml, model/NAME.yaml, sweeps/NAME.yaml); give a whole config "
                "another name and choose it with --config-name NAME. If the folder belongs to another program, run in "
                "another folder."
            ]
        )
    return own


def _in_config_dir(given: str) -> OwnFolders:
    folder = Path(given).absolute()
    if not given or not folder.is_dir():
        raise ConfigError([f"--config-dir={given}: no such folder."])
    groups = _groups()
    if any((folder / group).is_dir() for group in groups if group != "sweeps"):
        return OwnFolders(folder)
    conf, sweeps = folder / "conf", folder / "sweeps"
    if conf.is_dir():
        return OwnFolders(conf, sweeps if sweeps.is_dir() else None)
    if not sweeps.is_dir() and not any(folder.glob("*.yaml")):
        raise ConfigError(
            [
                f"--config-dir={given}: has no folder named like a group ({', '.join(groups)}) and no conf/, so none "
                f"of its files can be chosen. {folder / 'dataset/mine.yaml'} would be dataset=mine."
            ]
        )
    return OwnFolders(folder)


def _below_current_folder(name: str, ours: Path) -> Path | None:
    folder = Path.cwd() / name
    return folder if folder.is_dir() and folder.resolve() != ours else None


def _groups() -> list[str]:
    # conf/accelerate/ is for its own launcher.
    return [*sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir() and path.name != "accelerate"), "sweeps"]


def _shipped_options() -> dict[str, Path]:
    return _files(CONF_DIR) | {f"sweeps/{name}": path for name, path in _files(SWEEPS_DIR).items()}


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(folder.rglob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _differ(path: Path, ours: Path) -> bool:
    return path.is_file() and path.read_bytes() != ours.read_bytes()

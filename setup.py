"""The one step of the build that pyproject.toml cannot say: `conf/` and `sweeps/` go into the wheel.

They lie beside the packages in a checkout and inside `harness` in an installation; harness/config/folders.py knows
both. A mapping in `package-dir` would do it too, and turn the editable install into an import hook (pyproject.toml says
why that must not be).
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = ("conf", "sweeps")


class BuildWithConfigs(build_py):
    """Copies the YAML files of `CONFIGS` into the package `harness`."""

    def run(self) -> None:
        """Called once per build; an editable install leaves the files where they are."""
        super().run()
        if not self.editable_mode:
            for target, source in self._config_files().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file that the build makes."""
        return [*super().get_outputs(include_bytecode), *self._config_files()]

    def get_source_files(self) -> list[str]:
        """Every file that the build reads, and so what a source distribution must hold."""
        return [*super().get_source_files(), *self._config_files().values()]

    def _config_files(self) -> dict[str, str]:
        """Path in the build to path in the checkout."""
        sources = [path for folder in CONFIGS for path in sorted(Path(folder).rglob("*.yaml"))]
        return {str(Path(self.build_lib, "harness", source)): str(source) for source in sources}


setup(cmdclass={"build_py": BuildWithConfigs})

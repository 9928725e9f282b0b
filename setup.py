"""Builds the native kernels along with the package where there is a C compiler; see pyproject.toml.

The library has a plain C interface, so that one build serves every Python and every torch. Without
a compiler, or where it fails, the package installs all the same and computes in torch.
"""

import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

KERNELS = Path("hf_adaptive_sparse/kernels")


class BuildKernels(build_ext):
    """Builds the library with the project's own script instead of as a Python extension."""

    def build_extension(self, ext: Extension) -> None:
        """Compile, or say that the package goes without."""
        script = runpy.run_path(str(KERNELS / "build.py"))
        output = Path(self.get_ext_fullpath(ext.name)).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            script["build"](output)
        except script["BuildError"] as error:
            print(f"warning: installing without native kernels. {error}", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        """Return a file name without the tag of a Python version."""
        return str(Path(*fullname.split("."))) + ".so"


class PlatformWheel(bdist_wheel):
    """Tags the wheel for the platform but for no Python version in particular."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the wheel's tag."""
        return ("py3", "none", super().get_tag()[2])


setup(
    ext_modules=[
        Extension(
            "hf_adaptive_sparse.kernels._kernels",
            sources=sorted(str(path) for path in KERNELS.glob("csrc/*.c")),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)

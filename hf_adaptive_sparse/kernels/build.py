"""Builds the native library with the system's C compiler.

``python -m hf_adaptive_sparse.kernels.build`` builds it in place. Installing the package does the
same (``setup.py``), and does without where there is no compiler.
The compiler is ``$CC``, else ``cc``, ``gcc`` or ``clang``. All paths go into one library; each
function says what processor it needs, so no flag here depends on the machine that builds.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
OUTPUT = Path(__file__).parent / "_kernels.so"
FLAGS = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # sparse values of 32 bits are moved as integers
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Werror=implicit-function-declaration",
    "-pthread",
)
EXACT = "encode*.c"
"""Sources whose results are to the last bit those of torch, which rounds every product."""


class BuildError(OSError):
    """The library could not be built."""


def compiler() -> list[str] | None:
    """Return the command of a C compiler, or None if there is none."""
    if wish := os.environ.get("CC"):
        command = shlex.split(wish)
        return command if command and shutil.which(command[0]) else None
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def build(output: Path = OUTPUT) -> Path:
    """Compile the library.

    Args:
        output: File to write; replaced at once when the compiler has succeeded.

    Returns:
        ``output``.

    Raises:
        BuildError: If there is no compiler, or it fails; with what it said.
    """
    command = compiler()
    if command is None:
        raise BuildError(
            "A C compiler is needed to build the kernels and none was found as $CC, cc, gcc or "
            "clang. Without them everything works in torch, slower."
        )
    exact = set(SOURCES.glob(EXACT))
    to_objects = [*command, *(flag for flag in FLAGS if flag != "-shared"), "-c", "-o"]

    def compiled(source: Path) -> str:
        target = str(Path(folder) / f"{source.stem}.o")
        rounding = ("-ffp-contract=off",) if source in exact else ()
        _run([*to_objects, target, *rounding, str(source)])
        return target

    with (
        tempfile.TemporaryDirectory(dir=output.parent) as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        objects = list(pool.map(compiled, sorted(SOURCES.glob("*.c"))))
        partial = Path(folder) / output.name
        _run([*command, *FLAGS, "-o", str(partial), *objects, "-lm"])
        partial.replace(output)
    return output


def _run(arguments: list[str]) -> None:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{arguments[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(
            f"{shlex.join(arguments)} failed with status {done.returncode}:\n{done.stderr}"
        )


def main() -> int:
    """Build in place; the exit code is 1 where that fails."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        logger.info("Built %s", build())
    except BuildError as error:
        logger.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

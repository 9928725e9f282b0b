"""Building, finding and choosing the native kernels, and going without them."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_adaptive_sparse.kernels import attention, build, library

FUZZ = [Path(__file__).parent / f"fuzz_{name}.c" for name in ("attention", "sparse", "encode")]
each_fuzz = pytest.mark.parametrize("fuzz", FUZZ, ids=lambda source: source.stem)

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="there is no C compiler")
needs_kernels = pytest.mark.skipif(
    not library.available_paths(), reason="the native kernels are not built here"
)


@pytest.fixture
def absent_library(monkeypatch, tmp_path):
    """The library is looked for where there is none."""
    caches = (library.library, library._chosen)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE, raising=False)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


@needs_kernels
def test_the_best_path_is_the_default(monkeypatch):
    monkeypatch.delenv(library.ENVIRONMENT_VARIABLE, raising=False)
    assert library.active_path() == library.available_paths()[0]
    assert library.available_paths()[-1] == "portable"
    assert library.describe().startswith(f"native, {library.active_path()}")


@needs_kernels
def test_a_path_can_be_chosen(monkeypatch):
    for name in library.available_paths():
        monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, name)
        assert library.active_path() == name
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "none")
    assert library.active_path() is None
    assert "chosen by HF_ADAPTIVE_SPARSE_KERNEL" in library.describe()


def test_an_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, "sse9")
    with pytest.raises(library.KernelError, match=r"auto, none, amx.*got 'sse9'"):
        library.active_path()


def test_a_path_of_another_processor_is_refused(monkeypatch):
    missing = sorted(set(library.PATHS) - set(library.available_paths()))
    monkeypatch.setenv(library.ENVIRONMENT_VARIABLE, missing[0])
    with pytest.raises(library.KernelError, match=f"of which this machine has none.*{missing[0]}"):
        library.active_path()


@needs_kernels
def test_the_call_structure_is_that_of_the_library():
    assert library.library().has_call_size_bytes() == ctypes.sizeof(attention._Call)


@needs_kernels
def test_threads_come_from_torchs_openmp():
    import torch

    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("torch has no OpenMP here")
    assert library._torch_parallel()


def test_without_the_library_torch_is_used(absent_library):
    assert library.library() is None
    assert library.available_paths() == ()
    assert library.active_path() is None
    assert "python -m hf_adaptive_sparse.kernels.build" in library.describe()


def test_a_damaged_library_is_not_used(absent_library, caplog):
    (absent_library / library.LIBRARY).write_bytes(b"no library")
    assert library.library() is None
    assert "cannot be loaded" in caplog.text


@needs_compiler
def test_a_library_of_another_version_is_not_used(absent_library, caplog):
    source = absent_library / "other.c"
    source.write_text("int has_abi_version(void) { return 999; }\n")
    output = absent_library / library.LIBRARY
    command = [*build.compiler(), "-shared", "-fPIC", "-o", str(output), str(source)]
    subprocess.run(command, check=True)
    assert library.library() is None
    assert "another version" in caplog.text


@needs_compiler
def test_building(monkeypatch, tmp_path):
    quick = ["-O0" if flag == "-O3" else flag for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", quick)
    output = tmp_path / "kernels.so"
    assert build.build(output) == output
    assert ctypes.CDLL(str(output)).has_abi_version() == library.ABI_VERSION
    assert list(tmp_path.iterdir()) == [output]


def test_building_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.compiler() is None
    with pytest.raises(build.BuildError, match="A C compiler is needed"):
        build.build(tmp_path / "kernels.so")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert build.compiler() is None


@pytest.mark.skipif(shutil.which("clang") is None, reason="Clang is not installed")
@pytest.mark.parametrize("source", sorted(build.SOURCES.glob("*.c")), ids=lambda path: path.stem)
def test_clang_takes_the_sources(source):
    command = ["clang", "-std=c11", "-O1", "-fsyntax-only", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_a_compiler_complains_about_is_shown(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'it is broken' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(build.BuildError, match=r"status 3(.|\n)*it is broken"):
        build.build(tmp_path / "kernels.so")
    assert not (tmp_path / "kernels.so").exists()


def compile_fuzz(fuzz, output, command, *flags):
    """Compile a program with the sources of what it is named after."""
    kernels = sorted(build.SOURCES.glob(f"{fuzz.stem.removeprefix('fuzz_')}*.c"))
    sources = [
        str(path)
        for path in (fuzz, *kernels, build.SOURCES / "library.c", build.SOURCES / "threads.c")
    ]
    shared = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    if fuzz.match(f"*_{build.EXACT}"):
        shared.append("-ffp-contract=off")
    arguments = [*command, *shared, *flags, f"-I{build.SOURCES}", "-o", str(output), *sources]
    return subprocess.run([*arguments, "-lm"], capture_output=True, text=True, check=False)


@needs_kernels
@needs_compiler
@pytest.mark.slow
@each_fuzz
def test_no_path_reads_or_writes_out_of_bounds(tmp_path, fuzz):
    """Random sizes in exactly allocated buffers, under the compiler's sanitizers."""
    program = tmp_path / "fuzz"
    # With -O3, what sanitizers add takes compilers four times as long, and finds no more; with more
    # debugging information than lines, twice as long.
    flags = ("-O1", "-g1", "-fsanitize=address,undefined")
    done = compile_fuzz(fuzz, program, build.compiler(), *flags)
    if done.returncode:
        pytest.skip(f"the compiler has no sanitizers: {done.stderr[-200:]}")
    for name in library.available_paths():
        run = subprocess.run(
            [str(program), str(library.PATHS[name]), "60"],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"ASAN_OPTIONS": "detect_leaks=1", "LD_PRELOAD": ""},
        )
        assert run.returncode == 0, (name, run.stdout, run.stderr)
        assert "runtime error" not in run.stderr, run.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64-static")),
    reason="needs a cross compiler and an emulator for AArch64",
)
@each_fuzz
def test_neon_agrees_with_portable_in_an_emulator(tmp_path, fuzz):
    program = tmp_path / "fuzz"
    done = compile_fuzz(fuzz, program, ["aarch64-linux-gnu-gcc"], "-static")
    assert done.returncode == 0, done.stderr
    command = ["qemu-aarch64-static", str(program), str(library.PATHS["neon"]), "60"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout, run.stderr)

"""The version of the package, and of the libraries that results depend on."""

from importlib.metadata import version

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions that every result depends on."""
    return {
        "hf_adaptive_sparse": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }

"""A parser that says in one line what is wrong with a command line, and what was probably meant."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without the usage of a whole screen in which an error is lost."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and refuse what is not known: of a command's words, only its own parser knows."""
        self._words = sys.argv[1:] if args is None else list(args)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}{self._guesses()}. See {self.prog} --help.\n")

    def _guesses(self) -> str:
        """Return what the options that are none were probably meant to be, in brackets."""
        if self._subparsers is not None:  # the words are options of a command
            return ""
        known = list(self._option_string_actions)
        guesses = []
        for word in self._words:
            option = word.partition("=")[0]
            if not option.startswith("--") or any(name.startswith(option) for name in known):
                continue
            nearest = get_close_matches(option.replace("_", "-"), known, n=1)
            guesses += [f"{name} for {option}" for name in nearest]
        return f" (did you mean {' and '.join(guesses)}?)" if guesses else ""

"""A program that repeats what a command did: the model, its inputs, the options, and the versions."""

from __future__ import annotations

import argparse
import platform
import shlex
from collections.abc import Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("mctf-compile", "torch", "timm")


def program(args: argparse.Namespace, options: dict[str, Any], arguments: Sequence[str]) -> str:
    """A program that prints the report of ``mctf explain``, or fails as it does.

    Args:
        args: those of the command.
        options: of the backend, as they were given.
        arguments: the command line, to be named in the program.
    """
    from mctf_compile import METHODS

    given = "".join(f", {name}={value!r}" for name, value in options.items())
    method = METHODS.get(options.get("method", "mctf"))
    learns = method is not None and method.reads is not None
    imports, weights = ["input_size", "make_model"], []
    lines = [
        "torch.manual_seed(0)",
        f"model = make_model({args.model!r}, {args.img_size}, pretrained={args.pretrained}).eval()",
    ]
    if args.weights is not None:
        imports.append("read_weights")
        weights = ["from pathlib import Path", ""]
        lines += [f"weights, learned = read_weights(Path({str(args.weights)!r}))", "model.load_state_dict(weights)"]
    lines.append(f"images = torch.randn({args.batch}, *input_size(model, {args.img_size}))")
    if learns:
        lines.append(f"mctf_compile.attach(model, images{given})")
        if args.weights is not None:
            lines.append("model.load_state_dict(learned, strict=False)")
    lines += [
        "with torch.no_grad():",
        f"    report = mctf_compile.explain(model, images{given})",
        "report.print()",
    ]
    return "\n".join(
        [
            f"# mctf {' '.join(shlex.join(arguments).splitlines())}",
            "#",
            "# What this prints, or how it fails, is what the command line above does.",
            f"# {versions()}",
            "",
            *weights,
            "import torch",
            "",
            "import mctf_compile",
            f"from mctf_compile.measuring.timm_models import {', '.join(imports)}",
            "",
            'if __name__ == "__main__":',
            *(f"    {line}" for line in lines),
            "",
        ]
    )


def versions() -> str:
    """What it runs on, without names of hosts and folders."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join([*found, f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}"])

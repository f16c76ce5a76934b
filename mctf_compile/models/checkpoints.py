"""Published weights, by the names that they have there."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mctf_compile import packages
from mctf_compile.errors import ConfigError

HEADS = ("head.", "aux_head.")


def load_official(model: nn.Module, file: Path | str) -> None:
    """Fill one of these models with what the authors of its paper published.

    The parameters have the names of the published ones; timm reads the file, in whatever a training script wrapped
    them. A head for another number of classes stays as it is, as in fine-tuning.

    Raises ``ConfigError`` for a file that is no checkpoint, and for one of another model: it names the first entries
    that are missing, left over, or of another shape. ``MissingPackage`` without timm.
    """
    found = state_dict_in(file)
    own = model.state_dict()
    other = {name for name in found if name in own and found[name].shape != own[name].shape}
    resized = {name.split(".")[0] for name in other if name.startswith(HEADS)}
    heads = {name for name in own if name.split(".")[0] in resized}
    wrong = {
        "lacks": own.keys() - found.keys(),
        "also has": found.keys() - own.keys(),
        "has in another shape": other - heads,
    }
    for what, names in wrong.items():
        if names:
            more = ", ..." if len(names) > 3 else ""
            raise ConfigError(f"{file} is of another model: it {what} {', '.join(sorted(names)[:3])}{more}")
    model.load_state_dict({name: own[name] if name in heads else value for name, value in found.items()})


def state_dict_in(file: Path | str) -> dict[str, Tensor]:
    """A checkpoint's state dict, out of what a training script wrapped it in.

    Raises ``ConfigError`` for a file that holds none; ``MissingPackage`` without timm.
    """
    models = packages.timm("timm.models")
    try:
        found: dict[str, Tensor] = models.load_state_dict(str(file), weights_only=True)
    except Exception as error:
        # The formats' readers raise errors of their own.
        raise ConfigError(f"{file} cannot be read as a state dict: {str(error).splitlines()[0]}") from error
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{file} holds no state dict: not every entry is a tensor")
    return found

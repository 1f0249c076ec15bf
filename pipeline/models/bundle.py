"""The folder model/ of a run: all that it takes to use the trained model, loadable without running code from it.

    model/
        model.json           format, how to build the model, names of the classes, mean and std of the pixels
        best.safetensors     weights of the best evaluation
        final.safetensors    weights of the end

model.json is there from the beginning of a run on; the weights come later.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pipeline.base.files import write_atomically
from pipeline.models.catalog import MODELS, ModelSpec, builder
from pipeline.models.normalize import Normalize

FORMAT = 1
CONTENT = "model.json"
TRUST_VARIABLE = "CONVOY_TRUST_MODELS"
"""Set to 1, it lets `sync` import models that are not Convoy's; a training's own publisher may."""


class BundleError(Exception):
    """A file of a bundle is missing, damaged or of another format; the message names it."""


class OwnCodeError(BundleError):
    """The model is code outside of Convoy that may not, or cannot, be imported."""


@dataclass(frozen=True)
class Bundle:
    folder: Path
    spec: ModelSpec
    classes: tuple[str, ...]
    """Names, in the order of the output."""
    mean: tuple[float, ...]
    """Mean of the pixels in 0..1, by channel; `std` likewise."""
    std: tuple[float, ...]

    def write(self) -> None:
        """Write model.json."""
        about = {"spec": asdict(self.spec), "classes": self.classes, "mean": self.mean, "std": self.std}
        write_atomically(self.folder / CONTENT, json.dumps({"format": FORMAT, **about}, indent=1) + "\n")

    @classmethod
    def open(cls, folder: Path | str, about: Mapping[str, Any] | None = None) -> Self:
        """Read model.json, if `about` does not give its content. Raises BundleError."""
        folder = Path(folder)
        path = folder / CONTENT
        try:
            about = about or json.loads(path.read_bytes())
            if about["format"] != FORMAT:
                raise BundleError(f"{path} has format {about['format']}; this version reads format {FORMAT}")
            return cls(folder, ModelSpec(**about["spec"]), *(tuple(about[key]) for key in ("classes", "mean", "std")))
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def path(self, which: str) -> Path:
        """Return where the weights `which`, "best" or "final", are stored."""
        return self.folder / f"{which}.safetensors"

    def save(self, which: str, state_dict: Mapping[str, Tensor], step: int) -> None:
        """Write the weights of an optimizer step. Raises OSError where there is no room, with the file as it was."""
        # a copy, since the format takes neither channels_last nor tensors that share memory
        tensors = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in state_dict.items()
        }
        write_atomically(self.path(which), save(tensors, {"sha256": _digest(tensors), "step": str(step)}))

    def step_of(self, which: str) -> int | None:
        """Return the optimizer step of stored weights; None if there are none, or none that can be read."""
        try:
            with safe_open(self.path(which), "pt") as file:
                return int(file.metadata()["step"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def load_weights(self, which: str) -> dict[str, Tensor]:
        """Return weights on the CPU, also from the .pt file of an earlier version. Raises BundleError."""
        path = self.path(which)
        try:
            if not path.exists() and (old := path.with_suffix(".pt")).exists():
                path = old
                return dict(torch.load(path, map_location="cpu", weights_only=True))
            with safe_open(path, "pt") as file:
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if file.metadata()["sha256"] != _digest(weights):
                    raise ValueError("it holds other bytes than were written")
            return weights
        except FileNotFoundError as error:
            raise BundleError(f"{path} is missing: the run has not saved these weights yet") from error
        except Exception as error:  # torch raises whatever its reader and its unpickler come upon
            raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}") from error

    def load(self, which: str = "best", *, own_code: bool = False) -> nn.Module:
        """Return the trained model in eval mode on the CPU.

        It takes float32 pixels in 0..255 [N, channels, S, S] and normalises them itself. A model that is not Convoy's
        is imported only with `own_code`: a bundle from elsewhere could name any code. Raises BundleError, OwnCodeError.
        """
        if self.spec.name not in MODELS and not own_code:
            raise OwnCodeError(
                f"model.name = {self.spec.name} is code outside of Convoy, which is not imported unasked: "
                f"own_code=True, or {TRUST_VARIABLE}=1 for `sync`, allows it"
            )
        try:
            builder(self.spec.name)
        except ValueError as error:
            raise OwnCodeError(str(error)) from error
        weights = self.load_weights(which)
        try:
            model = self.spec.build()
            model.load_state_dict(weights)
        except Exception as error:  # the builder may be anybody's
            problem = f"{type(error).__name__}: {error}"
            raise BundleError(f"{self.path(which)} does not fit {self.folder / CONTENT}: {problem}") from error
        return nn.Sequential(Normalize(self.mean, self.std), model).eval()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of the tensors' bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

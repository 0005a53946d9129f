"""A network that `experiments.train.classifier` has trained, to predict with.

from experiments.train.trained import load

trained = load("out/train")
labels = trained.predict(images)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax import Array

from experiments.lib.data import standardise
from experiments.lib.minibatch import EVALUATION_BATCH
from experiments.lib.networks import Network
from experiments.train.checkpoints import read_checkpoint, read_run
from experiments.train.classifier import Settings, make_classifier, on_device
from nt_deq.errors import InputError


@dataclass(frozen=True)
class Trained:
    """A trained network with what its images go through before.

    Attributes:
      network: in Flax; it takes standardised images and returns outputs and equilibria.
      settings: that it was trained with.
      classes: the labels.
      shape: of an image.
      mean: of the training images.
      scale: what the columns of a table are divided by; `None` of images.
    """

    network: Network
    settings: Settings
    classes: np.ndarray
    shape: tuple[int, ...]
    mean: np.ndarray
    scale: np.ndarray | None

    def __call__(self, images: np.ndarray) -> Array:
        """Returns the outputs, `(n, C)`, whose softmax is probabilities if `loss` is cross_entropy.

        Args:
          images: as those that it was trained on were, `(n, *shape)`.

        Raises:
          InputError: they are of another shape.
        """
        images = np.asarray(images)
        if images.shape[1:] != self.shape:
            raise InputError(
                f"images have shape {images.shape}; this network was trained on (n, "
                f"{', '.join(map(str, self.shape))})."
            )
        flat = images.reshape(len(images), -1).astype(float)
        x = standardise(flat, self.mean, self.scale)
        x = on_device(self.settings, x, self.shape)
        parts = range(0, len(x), EVALUATION_BATCH)
        return jax.numpy.concatenate(
            [_outputs(self.network, x[i : i + EVALUATION_BATCH]) for i in parts]
        )

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most probable label of each image, `(n,)`; arguments and errors as of a call."""
        return self.classes[np.asarray(self(images)).argmax(axis=1)]


@nnx.jit
def _outputs(network: Network, x: Array) -> Array:
    return network(x)[0]


def load(workdir: str | os.PathLike[str]) -> Trained:
    """Loads the network of the last checkpoint in a directory of `experiments.train.classifier`.

    Raises:
      InputError: there is none.
    """
    path = Path(workdir)
    try:
        held = read_run(path)
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is no --workdir of experiments.train.classifier: {error}"
        ) from None
    settings = Settings(**held["settings"], epochs=held["epochs"][-1]["epochs"])
    data = held["data"]
    shape, classes = tuple(data["shape"]), np.array(data["classes"])
    classifier = make_classifier(settings, shape, len(classes))
    state, _ = read_checkpoint(path, classifier.init())
    scale = None if data["scale"] is None else np.array(data["scale"])
    network = classifier.network(state.params)
    return Trained(network, settings, classes, shape, np.array(data["mean"]), scale)

"""Clusters of the samples of sources, which data.cluster writes and the mixture draws whole batches from.

<folder>/<source>/members.npy    the samples that are in any cluster, one cluster after the other
<folder>/<source>/starts.npy     where each cluster begins among them, and their number at the end
<folder>/<source>/centroids.npy  the mean embedding of each cluster
<folder>/<source>/clusters.json  what they were made of; written last
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from contrastive_jax import paths, runs
from contrastive_jax.errors import UserError
from contrastive_jax.training.targets import folder_of

ABOUT = "clusters.json"
_COMMAND = "python -m data.cluster"
_AGAIN = f"write them again with {_COMMAND}"


class Clusters:
  """The clusters of one source, whose members stay on disk.

  Attributes:
    about: what they were made of, such as the name of the source and its number of samples.
    members: the samples, one cluster after the other, ascending within each.
    starts: where each cluster begins among the members, and their number at the end.
  """

  def __init__(self, folder: Path):
    """Opens the clusters of one source.

    Raises:
      UserError: if a file is missing, damaged or of other clusters.
    """
    self._folder = folder
    self.about = runs.read_object(folder / ABOUT)
    try:
      self.members, self.starts = np.load(folder / "members.npy", mmap_mode="r"), np.load(folder / "starts.npy")
    except (OSError, ValueError, EOFError) as error:
      raise UserError(f"{folder} cannot be read ({error}): {_AGAIN}") from error
    found = {"members": len(self.members), "clusters": len(self.starts) - 1}
    if found != {name: self.about.get(name) for name in found}:
      raise UserError(f"{folder} holds {found}, and its {ABOUT} says otherwise: {_AGAIN}")

  @functools.cached_property
  def sizes(self) -> Int[np.ndarray, "clusters"]:
    """The number of samples of each cluster."""
    return np.diff(self.starts)

  @functools.cached_property
  def digest(self) -> str:
    """A digest of which samples each cluster has, and so of the batches that are drawn from them."""
    found = hashlib.sha256(self.starts)
    found.update(self.members)
    return found.hexdigest()

  def labels(self) -> Int[np.ndarray, "samples"]:
    """Returns the cluster of each sample of the source, -1 where it has none."""
    found = np.full(self.about["samples"], -1, np.int64)
    found[self.members] = np.repeat(np.arange(len(self.sizes)), self.sizes)
    return found

  def __reduce__(self):
    # A pickled memory map would carry the whole file to a worker process.
    return Clusters, (self._folder,)


def open_clusters(folder: str | os.PathLike, names: Iterable[str]) -> dict[str, Clusters]:
  """Opens the clusters of sources.

  Args:
    folder: `data.clusters`, the folder that data.cluster wrote.
    names: names of the sources.

  Raises:
    UserError: if it holds none of one of them.
  """
  path, found = paths.typed("data.clusters", folder), {}
  for name in names:
    own = folder_of(path, name)
    if not (own / ABOUT).is_file():
      raise UserError(
        f"data.clusters={folder} has no clusters of source '{name}': write them with {_COMMAND}, or leave"
        " data.clusters empty"
      )
    found[name] = Clusters(own)
  return found


def check_clusters(name: str, clusters: Clusters | None, samples: int, images: int) -> None:
  """Raises a `UserError` unless whole batches of a source can be drawn from its clusters.

  Args:
    name: name of the source.
    clusters: its clusters.
    samples: number of its samples.
    images: number of samples of a batch.
  """
  if clusters is None:
    raise UserError(f"data source '{name}' has no clusters: write them with {_COMMAND}, and name them in data.clusters")
  if clusters.about["samples"] != samples:
    raise UserError(
      f"data source '{name}' has {samples:,} samples, and its clusters in data.clusters are of"
      f" {clusters.about['samples']:,}: {_AGAIN}"
    )
  if clusters.sizes.max() < images:
    raise UserError(
      f"the largest cluster of data source '{name}' has {clusters.sizes.max():,} samples, and a batch takes {images:,}:"
      " lower batch_size, or write fewer clusters"
    )


def write_clusters(
  folder: Path,
  name: str,
  labels: Int[np.ndarray, "samples"],
  centroids: Float[np.ndarray, "clusters dim"],
  count: int,
  about: Mapping[str, Any],
) -> Clusters:
  """Writes the clusters of a source and opens them.

  Args:
    folder: the folder of all sources.
    name: name of the source.
    labels: the cluster of each sample, -1 where it has none.
    centroids: the means that the samples were assigned by.
    count: number of clusters.
    about: what they were made of.
  """
  own = folder_of(folder, name)
  own.mkdir(parents=True, exist_ok=True)
  (own / ABOUT).unlink(missing_ok=True)
  members = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0) :]
  starts = np.concatenate([[0], np.cumsum(np.bincount(labels[members], minlength=count))])
  for file, array in (("members", members), ("starts", starts), ("centroids", centroids)):
    np.save(own / f"{file}.npy", array)
  said = {"source": name, "samples": len(labels), "members": len(members), "clusters": count, **about}
  runs.write_object(own / ABOUT, said)
  return Clusters(own)

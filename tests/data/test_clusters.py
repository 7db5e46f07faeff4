"""Clusters of a set: found, written, divided; and batches that are drawn from one of them each."""

import numpy as np
import pytest
from toy import ToySource, WordTokenizer

from contrastive_jax.errors import UserError
from contrastive_jax.schedule.segments import Segment, draws_until
from data import cluster, embedding_files, kmeans
from data.clusters import open_clusters, write_clusters
from data.mixture import drawn
from data.pipeline import Pipeline


class Named(ToySource):
  shares_groups = False

  def sample_name(self, index):
    return f"{index:04d}"

  def stored(self, index):
    return self[index].image


class Blobs:
  """Embeds sample i near one of four corners, by the number that its name ends in."""

  class config:
    embed_dim = 2

  def encode_image(self, images):
    raise NotImplementedError

  def encode_text(self, names):
    rng = np.random.default_rng(1)
    corner = np.array([int(name) % 4 for name in names])
    corners = np.float32([[1, 0], [0, 1], [-1, 0], [0, -1]])
    return corners[corner] + 0.05 * rng.standard_normal((len(names), 2)).astype(np.float32)


@pytest.fixture
def embeddings(tmp_path):
  """Shards of 50 samples, of which number 7 could not be read."""
  folder = tmp_path / "embeddings"
  for number, (start, stop) in enumerate([(0, 30), (30, 50)]):
    names = [f"{index:04d}" for index in range(start, stop) if index != 7]
    about = {"of": "images", "samples": f"{start}:{stop} of 50"}
    embedding_files.write(folder / f"{number:06d}.parquet", Blobs(), names, names, about)
  return folder


def test_clusters_are_those_that_the_embeddings_form_and_are_divided_by_others(embeddings, tmp_path):
  made = cluster.cluster(Named("toy", 50), "folder/toy", embeddings, tmp_path / "c", count=4, fit_rows=37)
  labels = made.labels()
  assert labels[7] == -1 and len(made.members) == 49 and made.sizes.sum() == 49
  there = labels >= 0
  for corner in range(4):
    of_corner = labels[there & (np.arange(50) % 4 == corner)]
    assert (of_corner == of_corner[0]).all()
  assert len(set(labels[there])) == 4
  # Two parts of four make the corners again, each within the half that it was in.
  halves = np.where(there, np.arange(50) % 2, -1)
  before = write_clusters(tmp_path / "halves", "folder/toy", halves, np.zeros((2, 2)), 2, {})
  parts = cluster.cluster(Named("toy", 50), "folder/toy", embeddings, tmp_path / "p", count=4, within=before)
  assert len(parts.sizes) == 8 and np.count_nonzero(parts.sizes) == 4
  np.testing.assert_array_equal(parts.labels()[there] // 4, halves[there])
  again = open_clusters(str(tmp_path / "c"), ["folder/toy"])["folder/toy"]
  np.testing.assert_array_equal(again.labels(), labels)


def test_embeddings_of_other_samples_are_refused(embeddings, tmp_path):
  with pytest.raises(UserError, match=r"000000\.parquet is of a set of 50 samples, and this one has 51"):
    cluster.cluster(Named("toy", 51), "folder/toy", embeddings, tmp_path / "c", count=2)
  with pytest.raises(UserError, match="which is none of samples 0 to 29"):

    class Other(Named):
      def sample_name(self, index):
        return f"other {index}"

    cluster.cluster(Other("toy", 50), "folder/toy", embeddings, tmp_path / "c", count=2)
  with pytest.raises(UserError, match=r"--count=50 is more than the 49 embeddings"):
    cluster.cluster(Named("toy", 50), "folder/toy", embeddings, tmp_path / "c", count=50)


def test_centroids_are_the_means_of_what_is_nearest_to_them(rng):
  rows = np.float32(rng.normal(size=(500, 3)))
  found = kmeans.fit(rows, 6, tolerance=0.0)
  labels = ((rows[:, None] - found) ** 2).sum(-1).argmin(axis=1)
  np.testing.assert_array_equal(kmeans.nearest(rows, found), labels)
  for label in range(6):
    np.testing.assert_allclose(found[label], rows[labels == label].mean(axis=0), atol=1e-5)
  # Equal rows leave centroids without any, and k-means++ without a distance to draw by.
  assert np.isfinite(kmeans.fit(np.ones((5, 2), np.float32), 3)).all()


SIZES, IMAGES = (9, 3, 0, 22), 4


@pytest.fixture
def clustered(tmp_path):
  """Two sources; the labels of the first are mixed, and number 0 of it has none."""
  labels = {"a": np.repeat([-1, 0, 1, 2, 3], [1, *SIZES]), "b": np.zeros(10, np.int64)}
  labels["a"][1:] = np.random.default_rng(0).permutation(labels["a"][1:])
  for name, own in labels.items():
    write_clusters(tmp_path, name, own, np.zeros((4, 2)), int(own.max()) + 1, {})
  return labels, open_clusters(str(tmp_path), labels)


def test_a_batch_is_of_one_cluster_and_no_sample_comes_twice_in_an_epoch(clustered):
  labels, clusters = clustered
  run = (Segment(30, 2 * IMAGES, (("a", 2), ("b", 1)), 16, clustered=True, captions_per_image=2),)
  lengths = {name: len(own) for name, own in labels.items()}
  batches = {"a": [], "b": []}
  for step in range(30):
    plan = drawn(run, lengths, 0, step, slice(0, 2 * IMAGES), clusters)
    (source,) = set(plan.source)
    name = plan.names[source]
    (label,) = set(labels[name][plan.index])
    assert label >= 0 and (plan.index[::2] == plan.index[1::2]).all()
    batches[name].append(plan.index[::2])
    parts = [drawn(run, lengths, 0, step, slice(row, row + 2), clusters).index for row in range(0, 2 * IMAGES, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), plan.index)
  assert (len(batches["a"]), len(batches["b"])) == (20, 10)
  # Of 9, 3, 0 and 22 samples there are 2, 0, 0 and 5 batches in an epoch.
  epochs = [np.concatenate(batches["a"][start : start + 7]) for start in (0, 7)]
  for epoch in epochs:
    assert len(set(epoch)) == 7 * IMAGES
    np.testing.assert_array_equal(np.bincount(labels["a"][epoch], minlength=4), [8, 0, 0, 20])
  assert not np.array_equal(*epochs)
  assert draws_until(run, 30) == {"a": 80, "b": 40}


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(clustered):
  labels, clusters = clustered
  whole = Segment(9, IMAGES, (("a", 2), ("b", 1)), 16, clustered=True)
  lengths = {name: len(own) for name, own in labels.items()}
  parts = (Segment(6, IMAGES, whole.sources, 16, clustered=True), Segment(3, IMAGES, whole.sources, 16, clustered=True))
  for step in range(9):
    one, two = (drawn(run, lengths, 5, step, slice(0, IMAGES), clusters) for run in ((whole,), parts))
    np.testing.assert_array_equal(one.index, two.index)


def test_the_digest_tells_other_clusters_of_the_same_samples(clustered, tmp_path):
  labels, clusters = clustered
  same, other = (
    write_clusters(tmp_path / folder, "a", own, np.ones((4, 2)), 4, {"seed": 3})
    for folder, own in (("same", labels["a"]), ("other", np.roll(labels["a"], 1)))
  )
  assert same.digest == clusters["a"].digest != other.digest


def test_what_cannot_fill_a_batch_is_refused(clustered):
  labels, clusters = clustered
  sources = {name: ToySource(name, len(own)) for name, own in labels.items()}

  def pipeline(batch_size, sources=sources, clusters=clusters, start=0):
    segment = Segment(2, batch_size, (("a", 1), ("b", 1)), 16, clustered=True)
    how = {"text_length": 4, "patch_size": 4, "seed": 0, "clusters": clusters, "start": start}
    return Pipeline((segment,), sources, WordTokenizer(), **how)

  assert len(pipeline(10)) == 2
  assert len(pipeline(11, clusters=None, start=2)) == 2  # Those steps are done.
  with pytest.raises(UserError, match="the largest cluster of data source 'b' has 10 samples, and a batch takes 11"):
    pipeline(11)
  with pytest.raises(UserError, match=r"data source 'b' has 11 samples, and its clusters in data\.clusters are of 10"):
    pipeline(4, sources={**sources, "b": ToySource("b", 11)})
  with pytest.raises(UserError, match="data source 'a' has no clusters"):
    pipeline(4, clusters=None)
  with pytest.raises(UserError, match="has no clusters of source 'c'"):
    open_clusters("/tmp", ["c"])

"""Puts the samples of a set into clusters of similar images, for batches of one cluster each (`data.clusters`).

python embed.py --workdir=runs/first --source=table/photos.csv --output=embeddings
python -m data.cluster table/photos.csv --embeddings=embeddings --count=10 --output=clusters
python train.py --config=configs/own_pairs.py:photos.csv --workdir=runs/second --config.data.clusters=clusters

Names of sets, and the flags that give them options, are those of embed.py. Centroids are found on so many rows, evenly
spread over the set; then every sample is assigned. --within divides each of the clusters of another folder, as the
later stages of MCL do. A sample whose picture could not be embedded is in no cluster.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import flags
from jaxtyping import Float, Int

from contrastive_jax import cli, paths
from contrastive_jax.errors import UserError
from contrastive_jax.training.targets import folder_of
from data import clusters, embedding_files, embedding_shards, kmeans, named
from data.sources.pictures import StoredPictures

EMBEDDINGS = flags.DEFINE_string("embeddings", "", "Folder of the set's shards, which embed.py --source wrote.")
COUNT = flags.DEFINE_integer("count", 10, "Number of clusters, or of parts of each cluster of --within.", lower_bound=1)
WITHIN = flags.DEFINE_string("within", "", "Folder of clusters of the same set, which are divided.")
OUTPUT = flags.DEFINE_string("output", "", "Folder of the clusters, of any number of sets.")
FIT_ROWS = flags.DEFINE_integer("fit_rows", 1_000_000, "Most samples that centroids are found on.", lower_bound=1)
ITERATIONS = flags.DEFINE_integer("iterations", 100, "Most rounds in which centroids move.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the first centroids.", lower_bound=0)
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace clusters of the set that are there.")

flags.adopt_module_key_flags(named)

# Rows that are read from a shard at once.
_READ = 1 << 16


def main(*names: str) -> None:
  if len(names) != 1 or not EMBEDDINGS.value or not OUTPUT.value:
    raise UserError("one set, --embeddings and --output are needed, such as table/photos.csv --embeddings=FOLDER")
  name = names[0]
  output = paths.folder_to_write("--output", OUTPUT.value)
  if (folder_of(output, name) / clusters.ABOUT).is_file() and not OVERWRITE.value:
    raise UserError(f"--output={output} has clusters of {name} already: name another folder, or add --overwrite")
  source, _ = named.open_named(name)
  before = clusters.open_clusters(WITHIN.value, [name])[name] if WITHIN.value else None
  made = cluster(
    source,
    name,
    paths.typed("--embeddings", EMBEDDINGS.value),
    output,
    count=COUNT.value,
    fit_rows=FIT_ROWS.value,
    iterations=ITERATIONS.value,
    seed=SEED.value,
    within=before,
  )
  sizes = made.sizes[made.sizes > 0]
  print(
    f"{folder_of(output, name)} holds {len(made.members):,} samples in {len(sizes):,} clusters of {sizes.min():,} to"
    f" {sizes.max():,}; a batch takes at most as many as its cluster has."
  )
  if len(made.members) < len(source):
    print(f"{len(source) - len(made.members):,} samples have no embedding and are in no cluster.")


def cluster(
  source: StoredPictures,
  name: str,
  embeddings: Path,
  output: Path,
  *,
  count: int,
  fit_rows: int = 1_000_000,
  iterations: int = 100,
  seed: int = 0,
  within: clusters.Clusters | None = None,
) -> clusters.Clusters:
  """Finds the clusters of a set and writes them.

  Args:
    source: the set.
    name: its name in a config.
    embeddings: the folder of its shards.
    output: the folder of clusters.
    count: number of clusters.
    fit_rows: most rows that centroids are found on.
    iterations: most rounds in which centroids move.
    seed: seed of the first centroids.
    within: clusters of the same set. Samples share a new cluster if they share one of these and a centroid.

  Raises:
    UserError: if the shards are of another set or of texts, or there are fewer samples than clusters.
  """
  files = sorted(embeddings.glob("*.parquet"))
  if not files:
    raise UserError(f"--embeddings={embeddings} holds no shards: write them with embed.py --source={name}")
  total = sum(pq.read_metadata(file).num_rows for file in files)
  if total < count:
    raise UserError(f"--count={count} is more than the {total:,} embeddings of {embeddings}: lower it")
  if within is not None and within.about["samples"] != len(source):
    raise UserError(f"--within has clusters of {within.about['samples']:,} samples, and {name} has {len(source):,}")
  centroids = kmeans.fit(
    spread(files, source, total, min(total, max(fit_rows, count))), count, seed=seed, iterations=iterations
  )
  labels = np.full(len(source), -1, np.int64)
  for samples, rows in read(files, source):
    labels[samples] = kmeans.nearest(rows, centroids)
  clusters_now = count
  if within is not None:
    earlier = within.labels()
    labels = np.where((labels < 0) | (earlier < 0), -1, earlier * count + labels)
    clusters_now = count * len(within.sizes)
  about = {"seed": seed, "embeddings": embedding_files.origin(pq.read_schema(files[0]))}
  return clusters.write_clusters(output, name, labels, centroids, clusters_now, about)


def spread(files: Sequence[Path], source: StoredPictures, total: int, taken: int) -> Float[np.ndarray, "{taken} dim"]:
  """Returns some of the embeddings of a set, evenly spread over all."""
  found, seen = np.empty((taken, 0), np.float32), 0
  for _, rows in read(files, source):
    # Of the first n rows, the whole part of n * taken / total is taken.
    place = np.arange(seen, seen + len(rows) + 1) * taken // total
    if not found.size:
      found = np.empty((taken, rows.shape[1]), np.float32)
    found[place[0] : place[-1]] = rows[np.diff(place) > 0]
    seen += len(rows)
  return found


def read(
  files: Sequence[Path], source: StoredPictures
) -> Iterator[tuple[Int[np.ndarray, "rows"], Float[np.ndarray, "rows dim"]]]:
  """Yields samples and their embeddings, some thousands at a time, in the order of the set.

  Raises:
    UserError: if a file is damaged, or of other samples than those of the set.
  """
  for file in files:
    said = embedding_files.origin(pq.read_schema(file))
    if said.get("of") != embedding_shards.IMAGES:
      raise UserError(f"{file} holds no embeddings of images of a set: write them with embed.py --source")
    span, _, samples = said.get("samples", "").partition(" of ")
    if samples != str(len(source)):
      raise UserError(f"{file} is of a set of {samples or 'unknown'} samples, and this one has {len(source)}")
    start, stop = map(int, span.split(":"))
    at = start
    try:
      for batch in pq.ParquetFile(file).iter_batches(_READ):
        found = []
        for name in batch.column("id").to_pylist():
          # Those that could not be read were left out.
          while at < stop and source.sample_name(at) != name:
            at += 1
          if at == stop:
            raise UserError(
              f"{file} holds {name!r}, which is none of samples {start} to {stop - 1} of this set: embed it again"
            )
          found.append(at)
          at += 1
        vectors = batch.column("embedding")
        yield np.array(found, np.int64), vectors.flatten().to_numpy().reshape(len(batch), -1)
    except (pa.ArrowException, OSError) as error:
      raise UserError(f"{file} cannot be read ({error}): run embed.py again") from error


if __name__ == "__main__":
  cli.run(main, named=True)

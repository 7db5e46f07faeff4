"""Image-text retrieval: recall@k without ever holding the scores of everything against everything.

A query counts as found when anything that belongs to it is among the k nearest, as in CLIP_benchmark: an image may have
several captions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from contrastive_jax.evaluation.arrays import checked
from contrastive_jax.evaluation.results import Result, Search, thumbnail
from contrastive_jax.evaluation.tasks import Encoder, PairSet, kind_of
from contrastive_jax.parallel.mesh import MeshSpec, replicated

SHOWN_RESULTS = 5


@checked
def recall_at_k(
  queries: Float[Array | np.ndarray, "queries dim"],
  gallery: Float[Array | np.ndarray, "gallery dim"],
  query_group: Int[Array | np.ndarray, "queries"],
  gallery_group: Int[Array | np.ndarray, "gallery"],
  *,
  ks: tuple[int, ...] = (1, 5, 10),
  block: int = 4096,
) -> dict[str, float]:
  """Computes the share of queries that have an item of their group among their k nearest in the gallery.

  Args:
    queries: L2-normalised embeddings of the queries.
    gallery: L2-normalised embeddings of the items that are searched.
    query_group: the group of each query. A gallery item belongs to a query when their groups are equal: the five
      captions of an image share one, so that the same call serves image-to-text and text-to-image.
    gallery_group: the group of each gallery item.
    ks: the cut-offs, each at most the size of the gallery.
    block: number of queries, and of gallery items, that are scored at once. Peak memory is block x (block + max(ks)).

  Returns:
    `{"recall@1": ..., "recall@5": ...}`, fractions of the queries.

  Raises:
    ValueError: if a cut-off exceeds the gallery, or there are no queries.

  Follows CLIP_benchmark's zeroshot_retrieval. Equal scores rank by index, which torch.topk does not promise.

  Examples:
    >>> images = np.eye(2, 3, dtype=np.float32)
    >>> captions = np.float32([[0.9, 0.1, 0], [0.1, 0.9, 0], [0, 0, 1]])
    >>> recall_at_k(captions, images, np.array([0, 1, 1]), np.array([0, 1]), ks=(1, 2))
    {'recall@1': 0.6666666666666666, 'recall@2': 1.0}
  """
  if not len(queries):
    raise ValueError(f"recall needs at least one query, got none for {len(gallery)} gallery items")
  nearest, _ = top_k(queries, gallery, k=max(ks), block=block)
  return _recall(nearest, query_group, gallery_group, ks)


def _recall(nearest, query_group, gallery_group, ks: tuple[int, ...]) -> dict[str, float]:
  # On the host, where 64-bit groups stay 64-bit.
  hit = np.asarray(gallery_group)[nearest] == np.asarray(query_group)[:, None]
  # Nearest come first, so the first hit's rank answers for every cut-off.
  rank = np.where(hit.any(axis=1), hit.argmax(axis=1), hit.shape[1])
  return {f"recall@{k}": float(np.mean(rank < k)) for k in ks}


@checked
def top_k(
  queries: Float[Array | np.ndarray, "queries dim"],
  gallery: Float[Array | np.ndarray, "gallery dim"],
  *,
  k: int,
  block: int = 4096,
  mesh: Mesh | None = None,
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
  """Finds for each query the `k` gallery items with the largest inner product, largest first, ties by index.

  Args:
    queries: embeddings of the queries.
    gallery: embeddings of the items that are searched.
    k: number of items to find, at most the size of the gallery.
    block: number of queries, and of gallery items, that are scored at once.
    mesh: the devices that share the queries; None is one device. Every process makes the same call.

  Returns:
    The indices of the items, and their scores.

  Raises:
    ValueError: if `k` exceeds the gallery.

  Examples:
    >>> gallery = np.float32([[1, 0], [0, 1], [0.5, 0.5]])
    >>> indices, scores = top_k(np.float32([[1, 0]]), gallery, k=2)
    >>> indices.tolist(), scores.tolist()
    ([[0, 2]], [[1.0, 0.5]])
  """
  if not 0 < k <= len(gallery):
    raise ValueError(f"the {k} nearest need a gallery of at least {k} items, got {len(gallery)}")
  mesh = MeshSpec().make(jax.local_devices()[:1]) if mesh is None else mesh
  share = -(-len(queries) // mesh.size)
  query_blocks = _in_blocks(queries, min(block, max(share, 1)), multiple=mesh.size)
  gallery_blocks = _in_blocks(gallery, min(block, len(gallery)))
  shardings = NamedSharding(mesh, PartitionSpec(mesh.axis_names)), replicated(mesh)
  placed = (
    jax.make_array_from_callback(blocks.shape, sharding, blocks.__getitem__)
    for blocks, sharding in zip((query_blocks, gallery_blocks), shardings, strict=True)
  )
  scores, indices = _search(*placed, len(gallery), k=k, mesh=mesh)
  return (
    np.asarray(indices).reshape(-1, k)[: len(queries)],
    np.asarray(scores).reshape(-1, k)[: len(queries)],
  )


def _in_blocks(rows, block: int, multiple: int = 1) -> np.ndarray:
  rows = np.asarray(rows)
  return np.pad(rows, ((0, -len(rows) % (block * multiple)), (0, 0))).reshape(-1, block, rows.shape[1])


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _search(
  queries: Float[Array, "query_blocks query_block dim"],
  gallery: Float[Array, "gallery_blocks gallery_block dim"],
  size: int | Int[Array, ""],
  *,
  k: int,
  mesh: Mesh,
):
  """Every device searches the whole gallery for its share of the query blocks; all get the answer."""
  blocks = PartitionSpec(mesh.axis_names)
  specs = {"in_specs": (blocks, PartitionSpec(), PartitionSpec()), "out_specs": blocks}
  found = jax.shard_map(functools.partial(_scan, k=k), mesh=mesh, check_vma=False, **specs)(queries, gallery, size)
  return jax.lax.with_sharding_constraint(found, replicated(mesh))


def _scan(
  queries: Float[Array, "query_blocks query_block dim"],
  gallery: Float[Array, "gallery_blocks gallery_block dim"],
  size: Int[Array, ""],
  *,
  k: int,
):
  starts = jnp.arange(gallery.shape[0]) * gallery.shape[1]

  def search(some_queries):
    def merge(best, block):
      items, start = block
      index = start + jnp.arange(items.shape[0])
      # Accelerators multiply float32 in fewer bits unless told otherwise: that reorders near neighbours.
      scores = jnp.matmul(some_queries, items.T, precision=jax.lax.Precision.HIGHEST)
      scores = jnp.where(index < size, scores, -jnp.inf)
      # The best so far stand first and have the lower indices, and `top_k` keeps the order of equals.
      scores = jnp.concatenate([best[0], scores], axis=1)
      index = jnp.concatenate([best[1], jnp.broadcast_to(index, (some_queries.shape[0], items.shape[0]))], axis=1)
      top, position = jax.lax.top_k(scores, k)
      return (top, jnp.take_along_axis(index, position, axis=1)), None

    rows = some_queries.shape[0]
    none_yet = (jnp.full((rows, k), -jnp.inf, queries.dtype), jnp.full((rows, k), -1, starts.dtype))
    return jax.lax.scan(merge, none_yet, (gallery, starts))[0]

  return jax.lax.map(search, queries)


def evaluate_retrieval(
  model: Encoder,
  pairs: PairSet,
  *,
  ks: tuple[int, ...] = (1, 5, 10),
  block: int = 4096,
  examples: int = 6,
  seed: int = 0,
) -> Result:
  """Searches images by caption and captions by image.

  Args:
    model: the model, which embeds images and captions.
    pairs: the set; its images are read a batch at a time, and only embeddings are kept.
    ks: the cut-offs; those that exceed the number of images or captions are left out.
    block: number of queries, and of gallery items, that are scored at once.
    examples: number of queries to keep each way, half of them with a right first answer where there are enough.
    seed: seed of the choice of examples.

  Returns:
    The metrics image_retrieval_recall@k (caption to image) and text_retrieval_recall@k (image to caption).
  """
  if not len(pairs.images):
    raise ValueError(f"{pairs.name} has no images to evaluate on")
  image = model.encode_image(pairs.images)
  text = model.encode_text(pairs.captions)
  smallest = min(len(image), len(text))
  ks = tuple(k for k in ks if k <= smallest)
  if not ks:
    raise ValueError(f"{pairs.name} has {len(image)} images and {len(text)} captions: no cut-off fits")

  def picture(row: int) -> np.ndarray:
    return thumbnail(pairs.images[row])

  def caption(row: int) -> str:
    return pairs.captions[row]

  metrics, searches = {}, []
  ways = [
    ("image", text, image, pairs.caption_group, pairs.image_group, caption, picture),
    ("text", image, text, pairs.image_group, pairs.caption_group, picture, caption),
  ]
  for what, queries, gallery, query_group, gallery_group, show_query, show_found in ways:
    k = min(max(*ks, SHOWN_RESULTS), len(gallery))
    nearest, scores = top_k(queries, gallery, k=k, block=block, mesh=getattr(model, "mesh", None))
    recall = _recall(nearest, query_group, gallery_group, ks)
    metrics |= {f"{what}_retrieval_{name}": value for name, value in recall.items()}
    hit = gallery_group[nearest[:, :SHOWN_RESULTS]] == query_group[:, None]
    for row in _some_queries(hit[:, 0], query_group, examples, seed):
      found = tuple(
        (show_found(int(item)), float(score), bool(good))
        for item, score, good in zip(nearest[row], scores[row], hit[row], strict=False)
      )
      searches.append(Search(query=show_query(int(row)), found=found))
  return Result(
    dataset=pairs.name,
    task="zeroshot_retrieval",
    metrics=metrics,
    language=pairs.language,
    sizes={kind_of(pairs.images): len(image), "captions": len(text)},
    searches=tuple(searches),
  )


def _some_queries(first_hit, group, count: int, seed: int) -> np.ndarray:
  """Chooses rows of `count` queries of different groups, alternating between right and wrong first answers."""
  order = np.random.default_rng(seed).permutation(len(first_hit))
  _, first = np.unique(group[order], return_index=True)
  order = order[np.sort(first)]
  right = first_hit[order]
  turn = np.where(right, 2 * np.cumsum(right), 2 * np.cumsum(~right) + 1)
  return order[np.argsort(turn, kind="stable")][:count]

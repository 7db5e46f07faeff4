"""The reader of compiled HLO against programs whose arithmetic and traffic are known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from contrastive_jax.planning import costs, hlo, kernels, topologies

D = 64


def compiled(function, *shapes):
  arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def on_mesh(function, size, *, specs, out):
  mesh = Mesh(np.array(jax.devices()[:size]), ("d",))
  mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
  return lambda *arguments: mapped(*arguments)


def total_flops(module):
  return sum(costs.analyse(module).flops.values())


@pytest.mark.parametrize("depth", [1, 3, 24])
def test_a_scan_counts_as_often_as_it_runs(depth):
  def tower(x, kernels):
    return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

  assert total_flops(compiled(tower, (8, D), (depth, D, D))) == depth * 2 * 8 * D * D


def test_nested_loops_multiply():
  def tiles(x, kernel):
    def row(i, total):
      return jax.lax.fori_loop(0, 5, lambda j, total: total + jnp.tanh((total + x) @ kernel), total)

    return jax.lax.fori_loop(0, 7, row, x)

  assert total_flops(compiled(tiles, (8, D), (D, D))) == 7 * 5 * 2 * 8 * D * D


def test_gradients_of_a_rematerialised_scan_cost_four_passes():
  depth, rows = 6, 16

  def loss(x, kernels):
    body = jax.checkpoint(lambda x, kernel: (jnp.tanh(x @ kernel), None), prevent_cse=False)
    return jnp.sum(jnp.sin(jax.lax.scan(body, x, kernels)[0]))

  module = compiled(jax.grad(loss, argnums=(0, 1)), (rows, D), (depth, D, D))
  assert total_flops(module) == 4 * depth * 2 * rows * D * D


@pytest.mark.parametrize(
  ("window", "shapes", "labels", "expected"),
  [
    # A plain product [6, 5] x [5, 7].
    ("", ("[6,5]", "[5,7]", "[6,7]"), "bf_io->bf", 2 * 6 * 5 * 7),
    # The TPU's batched product: 4 x ([6, 5] x [5, 7]), the batch as a dilated window of which one tap in four counts.
    ("window={size=4 stride=3 lhs_dilate=4}, ", ("[4,6,5]", "[4,7,5]", "[4,6,7]"), "0bf_0oi->0bf", 2 * 4 * 6 * 5 * 7),
    # A window that is all of the input: a product contracted over 3 x 5.
    ("window={size=3}, ", ("[6,3,5]", "[3,5,7]", "[6,1,7]"), "b0f_0io->b0f", 2 * 6 * 3 * 5 * 7),
    # 'Same' padding: of 3 taps at 10 positions the two outermost see padding.
    ("window={size=3 pad=1_1}, ", ("[2,10,5]", "[3,5,7]", "[2,10,7]"), "b0f_0io->b0f", 2 * 2 * 5 * 7 * (3 * 10 - 2)),
  ],
)
def test_convolutions_count_taps_that_meet_an_element(window, shapes, labels, expected):
  left, kernel, out = shapes
  text = f"""HloModule m, num_partitions=1
ENTRY %main (a: bf16{left}, b: bf16{kernel}) -> bf16{out} {{
  %a = bf16{left} parameter(0)
  %b = bf16{kernel} parameter(1)
  ROOT %c = bf16{out} convolution(%a, %b), {window}dim_labels={labels}
}}
"""
  assert total_flops(hlo.parse(text)) == expected


KINDS = """HloModule m, num_partitions=1
%product (a: f32[4,4]) -> f32[4,4] {
  %a = f32[4,4] parameter(0)
  %b = f32[4,4] tanh(%a)
  ROOT %c = f32[4,4] dot(%b, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%outer (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4] parameter(0)
  ROOT %q = f32[4,4] fusion(%p), kind=kOutput, calls=%product
}
%move (x: f32[4,4]) -> f32[4,4] {
  %x = f32[4,4] parameter(0)
  ROOT %y = f32[4,4] transpose(%x), dimensions={1,0}
}
ENTRY %main (i: f32[4,4]) -> f32[4,4] {
  %i = f32[4,4] parameter(0)
  %f = f32[4,4] fusion(%i), kind=kOutput, calls=%outer, metadata={op_name="jit(f)/jvp(towers)/mlp/dot_general"}
  %g = f32[4,4] fusion(%f), kind=kLoop, calls=%move
  ROOT %h = f32[4,4] negate(%g), metadata={op_name="jit(f)/transpose(jvp(towers))/checkpoint/rematted_computation/neg"}
}
"""


def test_kinds_and_scopes_of_kernels():
  product, copy, other = costs.analyse(hlo.parse(KINDS)).kernels
  assert (product.kind, copy.kind, other.kind) == ("product", "copy", "other")
  assert product.flops == 2 * 4**3  # In a fusion within the fusion.
  assert kernels.named(product.scope) == "towers/mlp/dot_general" and kernels.pass_of(product.scope) == "forward"
  assert kernels.named(other.scope) == "towers/neg" and kernels.pass_of(other.scope) == "again"


def test_equal_kernels_are_one_row_and_shares_add_up():
  kernel = costs.Kernel("jit(f)/transpose(jvp(towers))/mlp/dot_general", "product", 12.0, 1e9, 1e6, 0.0)
  found = costs.Costs({}, {}, [], [kernel, kernel, dataclasses.replace(kernel, kind="copy", flops=0.0, bytes=3e6)])
  chip = topologies.Chip("chip", 1.0, 0.0, flops=1e12, bandwidth=1e9, link=1.0)  # A product takes 1 ms, a copy 3.
  copy, product = kernels.dearest(found, chip, 5)
  assert (copy["kind"], copy["pass"], copy["runs"], copy["seconds"]) == ("copy", "backward", 12, pytest.approx(0.036))
  assert (product["kind"], product["runs"], product["flops"]) == ("product", 24, 24e9)
  assert kernels.shares(found, chip) == pytest.approx({"product": 0.4, "copy": 0.6, "other": 0.0})


CUSTOM = """HloModule m, num_partitions=1
ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4] parameter(0)
  %b = bf16[8,4] custom-call(%a), custom_call_target="tpu_custom_call", config={"cost_estimate":{"flops":"5000"}}
  ROOT %c = bf16[8,4] custom-call(%b), custom_call_target="tpu_custom_call"
}
"""


def test_hand_written_kernels_count_what_they_say():
  found = costs.analyse(hlo.parse(CUSTOM))
  assert sum(found.flops.values()) == 5000 and found.not_counted == 1
  chip = topologies.Chip("chip", 1.0, 0.0, flops=1e6, bandwidth=1e5, link=1.0, clock=1e9)
  # Arithmetic, then the traffic of reading and writing 64 bytes.
  assert kernels.seconds(found.kernels[0], chip) == pytest.approx(5000 / 1e6 + 128 / 1e5)


LOOP = """HloModule m, num_partitions=8
%body (p: (u32[], f32[4,4])) -> (u32[], f32[4,4]) {
  %p = (u32[], f32[4,4]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %one = u32[] constant(1)
  %j = u32[] add(%i, %one)
  %k = u32[] add(%j, %one)
  ROOT %t = (u32[], f32[4,4]) tuple(%k, %y)
}
%condition (q: (u32[], f32[4,4])) -> pred[] {
  %q = (u32[], f32[4,4]) parameter(0)
  %n = u32[] get-tuple-element(%q), index=0
  %limit = u32[] constant(15)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}
ENTRY %main (x: f32[4,4]) -> (u32[], f32[4,4]) {
  %x.1 = f32[4,4] parameter(0)
  %start = u32[] constant(2)
  %carry = (u32[], f32[4,4]) tuple(%start, %x.1)
  ROOT %while = (u32[], f32[4,4]) while(%carry), condition=%condition, body=%body
}
"""


def test_the_trip_count_of_a_loop_without_a_note():
  # From 2 below 15 by twos, as TPU compilers leave loops that they unrolled.
  assert total_flops(hlo.parse(LOOP)) == 7 * 2 * 4**3


@pytest.mark.parametrize("size", [2, 8])
def test_bytes_that_a_device_sends(size):
  block = 4 * D * 4  # Bytes of [4, D] float32.
  everything = PartitionSpec("d")

  def function(x):
    gathered = jax.lax.all_gather(x, "d", tiled=True)
    summed = jax.lax.psum(jnp.sin(x), "d")
    scattered = jax.lax.psum_scatter(jnp.cos(gathered), "d", tiled=True)
    moved = jax.lax.ppermute(x * 2, "d", [(i, (i + 1) % size) for i in range(size)])
    return summed + scattered + moved

  module = compiled(on_mesh(function, size, specs=everything, out=everything), (4 * size, D))
  sent = {collective.kind: collective.bytes for collective in costs.analyse(module).collectives}
  assert sent == pytest.approx(
    {
      "all-gather": (size - 1) * block,
      "all-reduce": 2 * (size - 1) / size * block,
      "reduce-scatter": (size - 1) * block,
      "collective-permute": block,
    }
  )


def test_a_ring_sends_once_an_iteration():
  size = 8

  def ring(x):
    def step(_, carry):
      block, total = carry
      return jax.lax.ppermute(block, "d", [(i, (i + 1) % size) for i in range(size)]), total + block

    return jax.lax.fori_loop(0, size, step, (x, x))[1]

  module = compiled(on_mesh(ring, size, specs=PartitionSpec("d"), out=PartitionSpec("d")), (4 * size, D))
  (sent,) = costs.analyse(module).collectives
  assert (sent.kind, sent.count, sent.bytes) == ("collective-permute", size, size * 4 * D * 4)


def test_parts_of_the_step():
  def step(x, w):
    def loss(w):
      with jax.named_scope("towers"):
        y = jnp.tanh(x @ w)
      with jax.named_scope("loss"):
        return jnp.sum(jnp.sin(y @ y.T))

    gradient = jax.grad(loss)(w)
    with jax.named_scope("optimizer"):
      return w - gradient @ gradient

  flops = costs.analyse(compiled(step, (8, D), (D, D))).flops
  assert flops == {"towers": 2 * 2 * 8 * D * D, "loss": 3 * 2 * 8 * 8 * D, "optimizer": 2 * D**3}


@pytest.mark.parametrize(
  ("groups", "expected"),
  [
    ("replica_groups={{0,1},{2,3}}", [0, 1]),
    ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", [0, 4]),
    ("replica_groups={}", list(range(8))),
  ],
)
def test_groups_of_devices(groups, expected):
  seen = []
  text = f"""HloModule m, num_partitions=8
ENTRY %main (a: f32[4]) -> f32[4] {{
  %a = f32[4] parameter(0)
  ROOT %r = f32[4] all-reduce(%a), channel_id=1, {groups}, to_apply=%add
}}
"""
  costs.analyse(hlo.parse(text), lambda group: seen.append(group) or 1.0)
  assert seen == [expected]


def test_pieces_of_one_asynchronous_collective_count_once():
  lines = "\n".join(
    f"  %g.{i} = f32[32] all-gather(%a), channel_id=7, replica_groups={{{{0,1,2,3,4,5,6,7}}}}, dimensions={{0}},"
    ' backend_config={"async_collective_fusion_config":{}}'
    for i in range(3)
  )
  text = f"""HloModule m, num_partitions=8
ENTRY %main (a: f32[4]) -> f32[32] {{
  %a = f32[4] parameter(0)
{lines}
  ROOT %r = f32[32] add(%g.0, %g.2)
}}
"""
  (sent,) = costs.analyse(hlo.parse(text)).collectives
  assert (sent.count, sent.bytes) == (1, 7 * 16)


def test_traffic_of_a_slice_of_a_stack_is_the_slice():
  depth = 50

  def sums(stack, x):
    return jax.lax.fori_loop(0, depth, lambda i, x: jnp.tanh(x) + stack[i], x)

  kernels = costs.analyse(compiled(sums, (depth, D, D), (D, D))).kernels
  moved = sum(kernel.runs * kernel.bytes for kernel in kernels)
  block = D * D * 4
  # Read the layer and the sum, write the sum; copies of the carry at the ends.
  assert depth * 3 * block <= moved <= (depth * 3 + 8) * block + depth * 64


def test_what_a_kernel_says_of_itself_may_run_over_lines():
  text = """HloModule m, entry_computation_layout={()->f32[]}, num_partitions=1

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"said":"{\\"block\\": 512}"
}}, metadata={op_name="towers/kernel"}
  ROOT %b = f32[4]{0} add(%kernel, %a)
}
"""
  module = hlo.parse(text)
  assert list(module.computations[module.entry].instructions) == ["a", "kernel", "b"]
  assert "op_name" in module.computations[module.entry].instructions["kernel"].attributes

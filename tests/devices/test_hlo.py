"""Communication and products of a program, read from its text."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vcm_jax.devices import hlo, sharding

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused (p: bf16[32,250,448], q: bf16[3,448,1280]) -> bf16[32,250,1280] {
  %p = bf16[32,250,448]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q = bf16[3,448,1280]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %conv = bf16[32,250,1280]{2,1,0:T(8,128)(2,1)} convolution(%p, %q), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}

%body (t: (s32[], bf16[448,64])) -> (s32[], bf16[448,64]) {
  %t = (s32[]{:T(128)}, bf16[448,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %w = bf16[448,64]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=1
  %gather = (bf16[448,64]{1,0}, bf16[448,256]{1,0}) all-gather-start(%w), replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true
  %whole = bf16[448,256]{1,0} all-gather-done(%gather)
  %product = f32[448,448]{1,0} dot(%whole, %whole), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %next = (s32[]{:T(128)}, bf16[448,64]{1,0}) tuple(%w, %w)
}

%condition (t: (s32[], bf16[448,64])) -> pred[] {
  %t = (s32[], bf16[448,64]) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (x: f32[1024], start: (s32[], bf16[448,64])) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %start = (s32[], /*index=1*/bf16[448,64]{1,0}) parameter(1)
  %x1 = bf16[32,250,448] parameter(2)
  %x2 = bf16[3,448,1280] parameter(3)
  %loop = (s32[], bf16[448,64]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %fusion = bf16[32,250,1280] fusion(%x1, %x2), kind=kOutput, calls=%fused
  %moved = f32[1024]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}
  ROOT %sum = f32[1024]{0} all-reduce(%moved), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}
"""  # noqa: E501
Mesh = collections.namedtuple("Mesh", "shape")
MESH = Mesh({"data": 2, "fsdp": 4})


def test_collectives_count_as_often_as_the_loops_around_them_run():
    found = {c.kind: c for c in hlo.collectives(hlo.parse(PROGRAM), MESH)}
    assert found.keys() == {"all-gather", "all-reduce", "collective-permute"}
    gather = found["all-gather"]
    assert (gather.axes, gather.dtypes, gather.runs) == (("fsdp",), ("bf16",), 12)
    assert gather.bytes == 448 * 256 * 2 and gather.shapes == ((448, 256),)
    assert found["all-reduce"].axes == found["collective-permute"].axes == ("data",)
    assert found["all-reduce"].bytes == 4096 and found["all-reduce"].runs == 1


def test_a_loop_without_an_annotation_runs_as_often_as_its_condition_says():
    """XLA for TPUs does not write the number."""
    plain = re.sub(r", backend_config=.*", "", PROGRAM)
    bound = plain.replace(
        "%less = pred[] constant(true)",
        "%less = pred[] compare(%i, %n), direction=LT",
    ).replace(
        "  ROOT %less",
        "  %n = s32[]{:T(128)} constant(7)\n"
        "  %i = s32[] get-tuple-element(%t), index=0\n"
        "  ROOT %less",
    )
    runs = {c.kind: c.runs for c in hlo.collectives(hlo.parse(bound), MESH)}
    assert runs["all-gather"] == 7 and runs["all-reduce"] == 1


def test_products_are_counted_without_and_with_the_padding_of_tiles():
    computations = hlo.parse(PROGRAM)
    dots = 12 * 2 * 448 * 448 * 256
    convolution = 2 * 32 * (3 * 250 - 2) * 448 * 1280  # two places of the window are padding
    assert hlo.product_flops(computations) == dots + convolution
    # Rows of 448 bfloat16 numbers take 512 lanes; the kernel's 448 rows are whole tiles of 8.
    padded = hlo.product_flops(computations, tiled=True)
    assert padded == dots + convolution
    assert hlo.Array("bf16", (32, 250, 448), "{2,1,0:T(8,128)(2,1)}").tiled_shape == (32, 256, 512)
    assert hlo.Array("f32", (5,), "{0:T(128)}").tiled_shape == (128,)


def test_windows_belong_to_the_axes_that_labels_number():
    """XLA for TPUs writes the gradient of a kernel like this, its axes in any order."""
    program = """HloModule jit_step

ENTRY %main (p: bf16[32,250,3,448], q: bf16[32,250,2560,1]) -> bf16[3,448,2560,1] {
  %p = bf16[32,250,3,448]{3,2,1,0} parameter(0)
  %q = bf16[32,250,2560,1]{3,2,1,0} parameter(1)
  ROOT %conv = bf16[3,448,2560,1]{3,2,1,0} convolution(%p, %q), window={size=1x32}, dim_labels=1f0b_1io0->0bf1
}
"""  # noqa: E501
    assert hlo.product_flops(hlo.parse(program)) == 2 * 32 * 250 * 3 * 448 * 2560


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, channel_id=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
    ],
)
def test_groups(text, groups):
    np.testing.assert_array_equal(hlo.groups(text, 4), groups)


def test_a_real_program_of_this_version_of_xla():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def by_device(x, w):
        def layer(x, _):
            return jnp.tanh(x @ jax.lax.all_gather(w, "fsdp", axis=1, tiled=True)), None

        return jax.lax.psum(jax.lax.scan(layer, x, length=5)[0].sum(), "data")

    specs = PartitionSpec("data"), PartitionSpec(None, "fsdp")
    step = jax.shard_map(
        by_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((8, 16), (16, 16)), specs)
    ]
    computations = hlo.parse(jax.jit(step).lower(*arrays).compile().as_text())
    found = {(c.kind, c.axes): c.runs * c.bytes for c in hlo.collectives(computations, mesh)}
    assert found["all-gather", ("fsdp",)] in (16 * 16 * 4, 5 * 16 * 16 * 4)  # once, or each time
    assert found["all-reduce", ("data",)] == 4
    assert hlo.product_flops(computations) == 5 * 2 * 4 * 16 * 16


def test_of_the_branches_of_a_condition_one_runs():
    def step(chosen, x):
        return jax.lax.cond(chosen, lambda x: x @ x, lambda x: x @ x @ x @ x, x)

    arguments = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((64, 64), jnp.float32)
    computations = hlo.parse(jax.jit(step).lower(*arguments).compile().as_text())
    assert hlo.product_flops(computations) == (1 + 3) / 2 * 2 * 64**3

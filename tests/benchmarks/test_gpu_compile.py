"""Compiled for an H100 that is not there: B and S; and how time on paper is read."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import gpu_compile

    yield gpu_compile
    sys.path.remove(str(ROOT / "benchmarks"))


needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="jax with CUDA is not installed: pip install -e '.[gpu]'",
)


def run(*command):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, *command],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@needs_cuda
@pytest.mark.parametrize(
    "flags, kernels, temporaries",
    [
        # 19 layers with two attentions each, and one attention of the text encoder's loop; S has
        # heads of 12, which are padded.
        (["--config=configs/coco.py"], {"fmhaSoftmax": 39, "fmhaSoftmaxBackward": 38}, (20, 32)),
        (["--config=configs/cub_small.py"], {"fmhaSoftmax": 37, "fmhaSoftmaxBackward": 36}, (4, 8)),
        (["--config=configs/coco.py", "--program=sample"], {"fmhaSoftmax": 39}, (1, 3)),
        # What is worked out again stays so without a loop: the compiler does not undo it.
        (
            ["--config=configs/coco.py", "--remat=full"],
            {"fmhaSoftmax": 77, "fmhaSoftmaxBackward": 38},
            (3, 6),
        ),
    ],
)
def test_every_attention_is_cudnns(flags, kernels, temporaries, tmp_path):
    run("benchmarks/gpu_compile.py", *flags, f"--json={tmp_path}/result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    found = {n.removeprefix("__cudnn$"): c for n, c in result["targets"].items() if "fmha" in n}
    assert found == kernels
    assert temporaries[0] < result["temporaries"] / 2**30 < temporaries[1]
    assert 0 < result["diffusion"] < 0.15
    assert 0.2 < result["utilisation"] < 1


@needs_cuda
def test_heads_may_be_divided_over_gpus():
    output = run(
        "-m", "vqd_jax.main", "--mode=plan", "--config=configs/coco.py", "--topology=h100:8",
        "--config.denoiser.dtype=bfloat16", "--config.training.batch_size=32",
        "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
    )  # fmt: skip
    assert "parameters on 8 devices (data 1, fsdp 4, tensor 2)" in output
    assert "fits into 59 GiB" in output


HLO = """HloModule jit_step

%fused (a: f32[8,1024], b: s32[]) -> f32[1,1024] {
  %a = f32[8,1024]{1,0} parameter(0)
  %b = s32[] parameter(1)
  ROOT %row = f32[1,1024]{1,0} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,1024}
}

%update (c: f32[8,1024], d: f32[1,1024], e: s32[]) -> f32[8,1024] {
  %c = f32[8,1024]{1,0} parameter(0)
  %d = f32[1,1024]{1,0} parameter(1)
  %e = s32[] parameter(2)
  ROOT %put = f32[8,1024]{1,0} dynamic-update-slice(%c, %d, %e, %e)
}

%body (p: (s32[], f32[8,1024])) -> (s32[], f32[8,1024]) {
  %p = (s32[], f32[8,1024]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,1024]{1,0} get-tuple-element(%p), index=1
  %cut = f32[1,1024]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %new = f32[8,1024]{1,0} fusion(%x, %cut, %i), kind=kLoop, calls=%update
  ROOT %t = (s32[], f32[8,1024]{1,0}) tuple(%i, %new)
}

%condition (q: (s32[], f32[8,1024])) -> pred[] {
  %q = (s32[], f32[8,1024]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[8,1024], l: bf16[4096,1024], r: bf16[1024,2048]) -> f32[8,1024] {
  %x = f32[8,1024]{1,0} parameter(0)
  %l = bf16[4096,1024]{1,0} parameter(1)
  %r = bf16[1024,2048]{1,0} parameter(2)
  %product = (bf16[4096,2048]{1,0}, s8[64]{0}) custom-call(%l, %r), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/denoiser/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,1024]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,1024]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  ROOT %done = f32[8,1024]{1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_time_on_paper(script):
    product, *loop = script.kernels(HLO)
    assert product.flops == 2 * 4096 * 2048 * 1024
    # Without the workspace of the library, which a kernel need not use.
    assert product.moved == 2 * (4096 * 1024 + 1024 * 2048 + 4096 * 2048)
    # 17 us of products, 9 us of bytes.
    assert product.seconds == pytest.approx(product.flops / script.PEAK)
    assert product.scope == "jit(step)/denoiser/dot_general"
    # A row is read and written, and the index read; what is updated in place is not read.
    assert sorted((k.name, k.turns, k.moved, k.flops) for k in loop) == [
        ("cut", 7, 7 * (4096 + 4 + 4096), 0),
        ("new", 7, 7 * (4096 + 4 + 4096), 0),
    ]
    for kernel in loop:
        assert kernel.seconds == pytest.approx(kernel.moved / script.BANDWIDTH)


TPU_HLO = """HloModule jit_step

%cut (a: f32[8,1024], b: s32[]) -> f32[1,1024] {
  %b = s32[]{:T(128)} parameter(1)
  %a = f32[8,1024]{1,0:T(8,128)} parameter(0)
  ROOT %row = f32[1,1024]{1,0:T(8,128)} dynamic-slice(%a, %b, %b), dynamic_slice_sizes={1,1024}
}

%product (c: f32[8,1024], d: s32[], e: f32[4,1024]) -> f32[4,1] {
  %c = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %d = s32[]{:T(128)} parameter(1)
  %e = f32[4,1024]{1,0:T(8,128)S(1)} parameter(2)
  %fed = f32[1,1024]{1,0:T(8,128)} fusion(%c, %d), kind=kLoop, calls=%cut
  ROOT %out = f32[4,1]{1,0:T(8,128)S(1)} convolution(%e, %fed), dim_labels=bf_oi->bf
}

%body (p: (s32[], f32[8,1024], f32[4,1024])) -> (s32[], f32[8,1024], f32[4,1024]) {
  %p = (s32[]{:T(128)}, f32[8,1024]{1,0:T(8,128)}, f32[4,1024]{1,0:T(8,128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %h = f32[4,1024]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=2
  %ahead = (f32[8,1024]{1,0:T(8,128)S(1)}, f32[8,1024]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %there = f32[8,1024]{1,0:T(8,128)S(1)} copy-done(%ahead)
  %part = ((f32[8,1024]{1,0:T(8,128)}), f32[2,1024]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[4:6], [0:1024]}
  %parted = f32[2,1024]{1,0:T(8,128)S(1)} slice-done(%part)
  %made = f32[4,1]{1,0:T(8,128)S(1)} fusion(%x, %i, %h), kind=kOutput, calls=%product
  ROOT %t = (s32[]{:T(128)}, f32[8,1024]{1,0:T(8,128)}, f32[4,1024]{1,0:T(8,128)S(1)}) tuple(%i, %x, %h)
}

%condition (q: (s32[], f32[8,1024], f32[4,1024])) -> pred[] {
  %q = (s32[]{:T(128)}, f32[8,1024]{1,0:T(8,128)}, f32[4,1024]{1,0:T(8,128)S(1)}) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  ROOT %yes = pred[]{:T(512)} constant(true)
}

ENTRY %main (x: (s32[], f32[8,1024], f32[4,1024])) -> f32[8,1024] {
  %x = (s32[]{:T(128)}, f32[8,1024]{1,0:T(8,128)}, f32[4,1024]{1,0:T(8,128)S(1)}) parameter(0)
  %loop = (s32[]{:T(128)}, f32[8,1024]{1,0:T(8,128)}, f32[4,1024]{1,0:T(8,128)S(1)}) while(%x), condition=%condition, body=%body
  ROOT %done = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_memory_on_the_chip_of_a_tpu_costs_nothing(script):
    # A copy to the chip counts once, where it begins. A product reads a row of the stack in the
    # memory outside and the index; its other input and its output are on the chip.
    found = script.kernels(TPU_HLO, peak=1e12, bandwidth=1e9)
    assert [(k.name, k.turns, k.moved) for k in found] == [
        ("ahead", 5, 5 * 4 * 8 * 1024),
        ("part", 5, 5 * 4 * 2 * 1024),
        ("made", 5, 5 * (4 * 1024 + 4)),
    ]
    assert found[0].seconds == pytest.approx(5 * 4 * 8 * 1024 / 1e9)


@pytest.mark.parametrize(
    "target, shapes, flops",
    [
        # Queries, keys: two products forward, five backward.
        ("__cudnn$fmhaSoftmax", [(2, 64, 4, 8), (2, 32, 4, 8)], 4 * 2 * 4 * 64 * 32 * 8),
        ("__cudnn$fmhaSoftmaxBackward", [(2, 64, 4, 8), (2, 32, 4, 8)], 10 * 2 * 4 * 64 * 32 * 8),
        ("__cudnn$convForward", [(2, 5, 5, 16), (32, 3, 3, 16)], 2 * 9 * 16 * 32 * 2 * 25),
        ("__cublas$gemm_workspace", [(2, 5), (5, 2)], 0),
    ],
)
def test_flops_of_kernels(script, target, shapes, flops):
    make = script.Instruction
    body = {
        str(i): make(str(i), f"bf16[{','.join(map(str, s))}]", "parameter", [], "")
        for i, s in enumerate(shapes)
    }
    result = "bf16[2,5,5,32]" if "conv" in target else f"bf16[{','.join(map(str, shapes[0]))}]"
    kernel = make("k", result, "custom-call", ["0", "1"], f'custom_call_target="{target}"')
    assert script.product_flops(kernel, body) == flops

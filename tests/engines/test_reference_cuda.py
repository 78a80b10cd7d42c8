"""The contract on a GPU: fake-quantized graph against reference engine, code by code; exact sums under TF32."""

import pytest
import torch

import qvit
from qvit.analyze.agreement import agreement
from qvit.engines.reference import ReferenceEngine
from qvit.quantizers.exact_matmul import exact_matmul
from qvit.spec import ModelSpec

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_agreement_on_the_gpu(bits):
    torch.manual_seed(bits)
    model = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, num_classes=10).cuda()
    student = qvit.quantize(model, spec=ModelSpec.of_bits(bits))
    assert {p.device.type for p in student.parameters()} == {"cuda"}
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.qvit.preprocessing.mean, student.qvit.preprocessing.std))
    images = ((torch.randint(0, 256, (8, 3, 224, 224)) / 255 - mean) / std).cuda()
    qvit.calibrate(student, [images], images=8)
    engine = ReferenceEngine(qvit.freeze(student), "cuda")
    measured = agreement(student, engine, [images])
    assert measured.holds, measured


@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize(("length", "largest"), [(384, 8), (1536, 16), (3072, 255), (197, 128)])
def test_sums_are_exact_on_the_gpu(length, largest, allow_tf32):
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        a = torch.randint(-largest, largest + 1, (65, length))
        b = torch.randint(-largest, largest + 1, (length, 33))
        sums = exact_matmul(a.cuda(), b.cuda(), largest, largest)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(sums.cpu().long(), a @ b)

"""Parts of a report that depend on the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import timm

from qvit.cli.report_inputs import Opened, open_quantized
from qvit.cli.report_parts import Report


def _report(report_runs: Path) -> Report:
    report = Report(open_quantized(report_runs / "qvit"), None, "cpu")
    report.open_teacher(None)
    report.open_images(None, images=4, maps=1, batch=4, workers=0)
    return report


def test_a_teacher_without_attention_is_left_out(report_runs: Path) -> None:
    report = _report(report_runs)
    network = timm.create_model("resnet18", in_chans=1, num_classes=10).eval()
    report.teacher = Opened(network, report.student.preprocessing, None, (), {"method": "float"})
    report.add_attention()
    assert report.teacher is None
    sections = {section.id: section for section in report.sections}
    assert sections["similarity"].missing == ["The teacher (ResNet) has no attention to compare with."]
    assert [panel.id for panel in sections["distance"].panels] == ["distance-student"]
    report.add_sensitivity()
    assert [panel.id for panel in report.sections[-1].panels] == ["sensitivity-parts-after", "sensitivity-layers-after"]


def test_a_float_model_of_another_shape_is_not_calibrated(report_runs: Path) -> None:
    report = _report(report_runs)
    assert report.teacher is not None
    assert report._calibrated_parent() is not None
    report.teacher = replace(report.teacher, architecture=replace(report.teacher.architecture, depth=2))
    assert report._calibrated_parent() is None


def test_before_training_is_the_model_and_not_a_teacher_of_its_own(report_runs: Path) -> None:
    report = _report(report_runs)
    begun = report._calibrated_parent()
    metadata, teacher = report.student.metadata, report.teacher
    assert metadata is not None
    assert teacher is not None
    assert begun is not None
    own = replace(metadata, recipe=metadata.recipe | {"teacher": metadata.recipe["model"]})
    report.student = replace(report.student, metadata=own)
    for parameter in teacher.model.parameters():  # another teacher
        parameter.data.add_(1)
    again = report._calibrated_parent()
    assert all(a.equal(b) for a, b in zip(again.parameters(), begun.parameters(), strict=True))
    gone = {"name": None, "checkpoint": "/somewhere/float.safetensors"}
    report.student = replace(report.student, metadata=replace(own, recipe=own.recipe | {"model": gone}))
    assert report._calibrated_parent() is None


def test_the_parent_is_calibrated_with_the_students_own_bits(report_runs: Path) -> None:
    """With a budget, they are not those of the recipe."""
    report = _report(report_runs)
    metadata = report.student.metadata
    assert metadata is not None
    assert metadata.student is not None
    chosen = replace(metadata.student.spec, overrides={"blocks.0.mlp.fc1": {"bits": 4}})
    mixed = replace(metadata, student=replace(metadata.student, spec=chosen))
    report.student = replace(report.student, metadata=mixed)
    calibrated = report._calibrated_parent()
    assert calibrated is not None
    assert calibrated.qvit.spec == chosen
    assert calibrated.blocks[0].mlp.fc1.weight_quantizer.spec.bits == 4
    assert calibrated.blocks[0].mlp.fc2.weight_quantizer.spec.bits == 2


def test_two_runs_of_one_title_are_told_apart(report_runs: Path) -> None:
    student = open_quantized(report_runs / "qvit")
    titles = Report(student, open_quantized(report_runs / "qvit"), "cpu").titles
    assert titles == {"baseline": "Q-ViT W2A2, the other run", "student": "Q-ViT W2A2"}


def test_what_stands_above_the_figures(report_runs: Path) -> None:
    report = _report(report_runs)
    facts = report.facts
    assert facts["bits"] == "weights 2 bits, activations 2 bits"
    assert facts["shape"] == "1 block, 12 wide, 3 heads, 5 tokens"
    assert facts["images"] == "8 × 8 pixels, patches of 4 × 4"
    assert facts["top-1"].endswith("% of 30 images")
    assert facts["top-1, float"] == "9.75 %"
    assert facts["statistics"] == "4 images of images"

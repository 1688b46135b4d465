"""How what a client answers goes up: both halves, one after the other."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.codecs import parse
from fedllm.errors import CodecError, WireError
from fedllm.protocol.uplink import Uplink, Upload
from fedllm.tensors import spec_of
from tests.rounds.scripted import scripted

UPDATE = {"w": torch.tensor([3.0, 4.0, 0.0]), "v": torch.zeros(2)}
FIT = Upload("fit", 2, 0, 5, progress=0.5)


def uplink(up: str = "none", clip: float | None = None) -> Uplink:
    return Uplink(scripted(codec={"up": up}, privacy={"clip": clip}), parse(up))


@pytest.mark.parametrize("kind", ["setup", "evaluate"])
def test_what_is_no_update_travels_as_it_is(kind: str) -> None:
    """Neither clipped nor encoded, and the codec carries on what it carried."""
    lossy, upload = uplink("error_feedback(sign)", clip=1.0), Upload(kind, 2, 0, 5)
    residuals = {"w": torch.ones(3)}
    sent = lossy.send(upload, UPDATE, residuals)
    assert sent.payload == bytes(8) + b"\x00\x00\x40\x40" + b"\x00\x00\x80\x40" + bytes(4)  # v, then w
    assert (sent.residuals, sent.metrics) == (residuals, {})
    found = lossy.receive(upload, sent.payload, spec_of(UPDATE), {})
    assert found.tensors["w"].tolist() == [3.0, 4.0, 0.0]
    assert (found.parts, lossy.clip(upload, found.tensors, norm=5.0)) == ({}, found.tensors)


def test_an_update_is_clipped_before_it_is_encoded_and_tells_the_norm_it_had() -> None:
    plain = uplink(clip=1.0)
    sent = plain.send(FIT, UPDATE, {})
    assert sent.metrics == {"update_norm": 5.0}
    found = plain.receive(FIT, sent.payload, spec_of(UPDATE), {}).tensors
    assert found["w"].tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert plain.clip(FIT, found, norm=1.0 + 1e-7) is found  # the client's own scaling rounds
    assert plain.clip(FIT, UPDATE, norm=5.0)["w"].tolist() == pytest.approx([0.6, 0.8, 0.0])


def test_the_error_that_a_client_tells_is_that_of_what_the_server_reads() -> None:
    coarse = uplink("rotate | quantize(bits=3)")
    update = {"w": torch.linspace(-1.0, 2.0, 300)}
    sent = coarse.send(FIT, update, {})
    found = coarse.receive(FIT, sent.payload, spec_of(update), {})
    gap = math.dist(update["w"].tolist(), found.tensors["w"].tolist())
    assert sent.metrics["error_up"] == pytest.approx(gap / math.hypot(*update["w"].tolist()))
    assert sum(found.parts.values()) == len(sent.payload)


@pytest.mark.parametrize("other", [Upload("fit", 3, 0, 5), Upload("fit", 2, 1, 5), Upload("fit", 2, 0, 4)])
def test_each_upload_has_draws_of_its_own(other: Upload) -> None:
    rotated, update = uplink("rotate | quantize(bits=8)"), {"w": torch.linspace(-1.0, 2.0, 300)}
    sent = rotated.send(FIT, update, {})
    found = rotated.receive(other, sent.payload, spec_of(update), {}).tensors["w"]
    assert math.dist(found.tolist(), update["w"].tolist()) > float(update["w"].norm())


def test_what_is_not_what_was_asked_for_is_refused() -> None:
    with pytest.raises(WireError, match="holds 8 bytes, the receiver expects 20"):
        uplink().receive(Upload("setup", 0, 0, 1), bytes(8), spec_of(UPDATE), {})
    with pytest.raises(CodecError, match="cannot encode w"):
        uplink("sign").send(FIT, {"w": torch.tensor([math.nan])}, {})

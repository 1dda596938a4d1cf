"""Equal draws give equal bytes on every processor: with what libraries choose by the processor switched off."""

import json
import os
import subprocess
import sys

import cv2
import degradation_bytes
import pytest
import shard_bytes

from deedsr.degradation import kernels

EXPECTED = {
    "degradation": "05290cd0fdc2d419",
    "png": "f84e2d69e60552b6",
    "webp": "067dc97c6a61fc62",
    "jpeg": "035871c7d1d68e26",
    "shards": "0a1cb446b32b91a7",
}

NO_AVX = {"OPENCV_CPU_DISABLE": "AVX2,FMA3,AVX512_SKX"}
NO_SSE4 = {"OPENCV_CPU_DISABLE": "AVX512_SKX,AVX2,FMA3,FP16,AVX,POPCNT,SSE4.2,SSE4.1,SSSE3"}
NO_IPP = {"OPENCV_IPP": "disabled"}
BASELINE_NUMPY = {"NPY_DISABLE_CPU_FEATURES": "X86_V3"}
NO_JPEG_SIMD = {"JSIMD_FORCENONE": "1"}
BASELINE_LIBM = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4"}
THREE_THREADS = {"OPENCV_FOR_THREADS_NUM": "3"}

PROCESSORS = {
    "this one": {},
    "without AVX2": NO_AVX,
    "without IPP": NO_IPP,
    "numpy's baseline": BASELINE_NUMPY,
    "JPEG without SIMD": NO_JPEG_SIMD,
    "three threads": THREE_THREADS,
    "the oldest": NO_SSE4 | NO_IPP | BASELINE_NUMPY | NO_JPEG_SIMD | BASELINE_LIBM,
}


def test_the_draws_of_these_tests_cover_every_kernel_mode_family_and_order():
    draws = [draws for _, draws in degradation_bytes.every_draw()]
    steps = [step for draw in draws for step in draw["steps"]]
    assert {step["kernel"] for step in steps if step["step"] == "blur1"} == set(kernels.KERNELS)
    for name in ("resize1", "resize2", "resize3"):
        assert {step["mode"] for step in steps if step["step"] == name} == {"area", "bilinear", "bicubic"}
    for name in ("noise1", "noise2"):
        assert len({(step["family"], step["gray"]) for step in steps if step["step"] == name}) == 4
    factors = [step["factor"] for step in steps if step["step"] == "resize1"]
    assert min(factors) < 1 in factors
    assert max(factors) > 1
    assert {draw["clean"] for draw in draws} == {True, False}
    assert {draw["steps"][-1]["step"] for draw in draws} == {"jpeg2", "resize3", "sinc"}


def run(switches, *command):
    environment = os.environ | {"OPENCV_FOR_THREADS_NUM": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | switches
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=True
    ).stdout


# One switch at a time is for the soak; the two ends of the range are always looked at.
IN_SOAK = [name for name in PROCESSORS if name not in ("this one", "without AVX2", "the oldest")]


@pytest.mark.parametrize(
    "processor", [pytest.param(name, marks=[pytest.mark.soak] if name in IN_SOAK else []) for name in PROCESSORS]
)
def test_bytes_are_the_same_on_every_processor(processor):
    """Also on those of other machines that run this test: the hashes are written down above."""
    assert json.loads(run(PROCESSORS[processor], shard_bytes.__file__)) == EXPECTED


AVX2, FMA3 = 11, 12  # in OpenCV's enumeration


@pytest.mark.skipif(not (cv2.checkHardwareSupport(AVX2) and cv2.checkHardwareSupport(FMA3)), reason="needs AVX2")
def test_a_plain_blur_shows_the_processor():
    """Else the switches above would switch nothing."""
    code = (
        "import cv2, hashlib, degradation_bytes; image = degradation_bytes.picture(96, 128, 1).astype('float32');"
        "print(hashlib.sha256(cv2.GaussianBlur(image, (9, 9), 1.3).tobytes()).hexdigest())"
    )
    assert run({}, "-c", code) != run(NO_AVX, "-c", code)

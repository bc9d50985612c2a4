"""Checks the installation: versions, devices, and a self-test of the embedded model.

medley doctor
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from medley.doctor import LOGIT_TOLERANCE, run_self_test, versions
from medley.errors import UserError


@dataclass(frozen=True)
class DoctorOptions:
    """Checks versions, devices and the embedded model."""


def doctor(_: DoctorOptions) -> None:
    print(f"python {platform.python_version()} on {platform.machine()}")
    for name, version, note in versions():
        print(f"{name:14} {version:16} {note}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices: {', '.join([*devices, 'cpu'])}, {torch.get_num_threads()} threads")
    result = run_self_test()
    print(
        f"self-test: {result.wrong_codes} image codes differ, logits differ by at most "
        f"{result.logit_difference:.2g}"
    )
    if not result.passed:
        raise UserError(
            f"The self-test failed: {result.wrong_codes} image codes differ (expected 0), logits "
            f"differ by {result.logit_difference:.2g} (expected at most {LOGIT_TOLERANCE}). "
            "Install the tested versions listed above."
        )
    print("Self-test passed.")

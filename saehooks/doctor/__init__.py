"""`saehooks doctor`: whether this environment gives right results, and what would make it faster."""

from saehooks.doctor.environment import Finding, environment_findings
from saehooks.doctor.self_check import self_check_findings

__all__ = ["Finding", "environment_findings", "examine", "self_check_findings"]


def examine() -> list[Finding]:
    """Everything that `saehooks doctor` says: releases, known-bad pairs, kernels, threads, and a self-check."""
    return [*environment_findings(), *self_check_findings()]

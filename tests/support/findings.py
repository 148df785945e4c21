"""What the tests of the doctor share: findings by their name."""

from __future__ import annotations

from sam_poll.diagnostics.doctor.findings import Finding


def about(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def the(findings: list[Finding], name: str) -> Finding:
    (found,) = about(findings, name)
    return found

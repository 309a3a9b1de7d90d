"""What a record says of its machine: held to processor descriptions of Linux."""

from pathlib import Path

import pytest

from statefeed.lm.run import provenance


@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC, family 26"),
        ("model name\t: ARMv8 Processor rev 0\nCPU architecture: 8\n", "ARMv8 Processor rev 0"),
    ],
)
def test_a_processor_is_named_with_its_family(description: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda path: description if path == Path("/proc/cpuinfo") else "")
    assert provenance.processor() == name
